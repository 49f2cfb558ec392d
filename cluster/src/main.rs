//! The one binary: runs a cluster (`up`, `coordinator`, `worker`) and operates it (the other
//! verbs, which know the admin API alone).
//!
//! ```text
//! args ─► run/{up, coordinator, worker}   config ─► node ─► drain
//!      └► commands/* ─► client ══shoal-admin══► coordinator ─► output/{table, json} ─► stdout
//! ```

mod args;
mod failure;
mod output;

fn main() {}
