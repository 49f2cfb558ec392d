//! One machine's share of a model: a library that `shoal worker` composes.
//!
//! ```text
//! shoal-req ─► head (●) ─► engine (○): schedule · issue · absorb
//!                             │ steps                      ▲ samples
//!                             ▼                            │
//!                          stage 0 (●) ══shoal-act══► stage 1 … ══► stage n: sample (○)
//! ```
//!
//! `engine`, `sample` and `stage::table` are pure: no socket, file, clock, thread or random source.
//! `model` and `backend` compute; `head`, `stage`, `agent` are thin shells around the rest.

pub mod backend;
pub mod engine;
pub mod model;
pub mod sample;
pub mod stage;
