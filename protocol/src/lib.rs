//! The words that every part of Shoal speaks, and what crosses which wire.
//!
//! | conversation (ALPN) | between | frames |
//! |---|---|---|
//! | `shoal-req` | coordinator ↔ head | flat rkyv: [`request`] |
//! | `shoal-act` | stage ↔ stage | flat rkyv and raw tensors: [`activation`] |
//! | `shoal-ctl` | coordinator ↔ worker agent | postcard: [`control`] |
//! | `shoal-admin` | CLI ↔ coordinator | postcard: [`admin`] |
//! | `shoal-blob` | worker ↔ worker | postcard, and chunks of weights: [`weights`] |
//! | `shoal-join` | joiner ↔ coordinator, no client certificate | postcard, at most 4 KiB: [`join`] |
//!
//! Without the `quic` feature this crate has no socket, no clock and no runtime in it.

pub mod access;
pub mod activation;
pub mod adapters;
pub mod admin;
#[cfg(feature = "blob")]
pub mod blob;
pub mod control;
pub mod error;
pub mod frame;
pub mod id;
pub mod join;
pub mod liveness;
pub mod lost;
pub mod mesh;
pub mod model;
pub mod neighbours;
pub mod numerics;
pub mod outcast;
pub mod peer;
pub mod plan;
pub mod prefix;
pub mod presence;
#[cfg(feature = "quic")]
pub mod quic;
pub mod ranks;
pub mod request;
pub mod trace;
pub mod trust;
pub mod units;
pub mod upgrade;
pub mod version;
pub mod weights;
