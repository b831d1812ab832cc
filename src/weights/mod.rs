//! Checkpoint folder → views over memory-mapped safetensors shards.
