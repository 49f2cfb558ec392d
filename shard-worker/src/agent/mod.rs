//! What joins a worker to its cluster: it reports what it is, is told what to be, and becomes it.
//!
//! ```text
//! shoal-ctl ─► session ─► Assign ─► agent ─► Lifecycle (○) ─► load · start · stop ─► Shard
//!           ◄─ session ◄─ Report ◄──┘  ▲                                             │
//!                                      └──────── loaded, linked, failed, stopped ◄───┘
//! ```
//!
//! The shards do not need the coordinator: they go on serving while it restarts.

mod driver;
pub mod inventory;
pub mod lifecycle;
pub mod memory;
mod models;
mod renewal;
mod session;

pub use driver::{Agent, AgentHandle, AgentParts};
pub use models::Models;
