//! The control plane: what the operator asked for, what the workers are, and what is done about
//! the difference.
//!
//! ```text
//! admin, join, agents (●) ─► store (●) ─► state.apply (○) ─► planner (○) ─► reconcile (○) ─► executor (●) ─► agents ══shoal-ctl══► workers
//! ```

pub mod access;
pub mod adapters;
pub mod admin;
mod admit;
pub mod agents;
pub mod authority;
pub mod changes;
pub mod executor;
mod folders;
pub mod join;
pub mod membership;
pub mod models;
pub mod peers;
pub mod planner;
pub mod reconcile;
mod registry;
pub mod rotation;
pub mod shape;
pub mod state;
pub mod store;
mod upgrade;
mod voters;
