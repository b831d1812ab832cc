//! Power and normalisation: pure functions on result arrays.
