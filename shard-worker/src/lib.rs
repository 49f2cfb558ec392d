//! One machine's share of a model: a library that `shoal worker` composes.
//!
//! ```text
//! shoal-req ─► head (●) ─► engine (○): schedule · issue · absorb
//!                             │ steps                      ▲ samples
//!                             ▼                            │
//!                          stage 0 (●) ══shoal-act══► stage 1 … ══► stage n: sample (○)
//! ```
//!
//! `engine`, `sample`, `stage::table`, `stage::ring`, `head::lateness` and `agent::lifecycle` are pure:
//! no socket, file, clock, thread or random source.
//! `model` and `backend` compute; `head`, `stage`, `agent` are thin shells around the rest.

pub mod agent;
pub mod backend;
pub mod blob;
pub mod collective;
pub mod config;
pub mod engine;
pub mod head;
pub mod model;
pub mod node;
pub mod sample;
pub mod stage;
pub mod stored;
pub mod trace;

pub use config::{Addresses, WorkerConfig};
pub use node::{DrainHandle, StartError, Worker};
