//! Files → texts → token ids → ragged passes.
