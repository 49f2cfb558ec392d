//! shard-worker
