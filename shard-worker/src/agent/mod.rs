//! What joins a worker to its cluster: it reports what it is, is told what to be, and becomes it.
//!
//! ```text
//! shoal-ctl ─► session ─► Assign ─► agent ─► Lifecycle (○) ─► load · start · stop ─► Shard
//!           ◄─ session ◄─ Report ◄──┘  ▲                                             │
//!    one for each coordinator          └──────── loaded, linked, failed, stopped ◄───┘
//! ```
//!
//! It talks to every coordinator and obeys the latest leader. The shards need none of them: they go
//! on serving while all of them are away.

mod adapters;
mod book;
pub(crate) mod calibration;
mod coordinators;
mod driver;
mod fate;
pub mod inventory;
pub mod lifecycle;
pub mod memory;
mod models;
/// Public for the simulator alone (`shoal-tests`).
#[doc(hidden)]
pub mod orders;
mod renewal;
mod sameness;
mod session;

pub use coordinators::{FILE_NAME as COORDINATORS_FILE, read_kept};
pub use driver::{Agent, AgentHandle, AgentParts};
pub use models::Models;
