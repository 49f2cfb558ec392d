//! ○ Whether a peer lives: what is said by beats, when they are sent, and what silence means.
//!
//! ```text
//! sender:   Pacer ─ every 10 ms while work flows, else seldom ─► Beat
//! observer: Beat, frame, packet ─► Detector ◄─ its own timer, which may be late itself
//!                                      └─► Alive · Late · Suspect · Dead
//! ```
//!
//! The arithmetic of the thresholds stands at [`Bounds`]. Nothing here has a clock or a socket: the
//! shell of a link (`quic::pulse`) brings both.

mod beat;
mod detector;
mod experience;
mod lease;
mod worst;

pub use beat::{BEAT_BUSY, BEAT_IDLE, BEAT_LEN, Beat, Pacer};
pub use detector::{Bounds, DEAD_MAX, Detector, Verdict, bounds};
pub use experience::{Experience, Known};
pub use lease::{LEASE, Lease};
pub use worst::Worst;
