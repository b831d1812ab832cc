//! Results on disk: one format per file, written to a temporary name and renamed.
