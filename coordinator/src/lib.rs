//! The edge and the brain of a cluster: a library that `shoal coordinator` composes.
//!
//! ```text
//! request:  client ─► api (●) ─► tokenize ─► router (○) ─► recovery (○) ─► dispatch (●) ══shoal-req══► head
//! control:  CLI ══shoal-admin══► admin (●) ─► store (●) ─► state.apply (○) ─► planner (○) ─► reconcile (○) ─► agents (●) ══shoal-ctl══► workers
//! ```

pub mod alone;
pub mod api;
mod begin;
pub mod config;
pub mod control;
pub mod dispatch;
pub mod node;
pub mod recovery;
mod renewal;
pub mod router;
mod seldom;
pub mod serving;
mod start_error;
pub mod telemetry;
mod trace;

pub use config::CoordinatorConfig;
pub use node::{Coordinator, Ended};
pub use start_error::StartError;
