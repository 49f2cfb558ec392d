//! The shell around the engine, beside stage 0: streams from coordinators in, steps out.
//!
//! ```text
//! shoal-req ─► intake ─► Event ─► driver ─► Engine (○) ─► Action ─► stage 0's queue
//!           ◄─ intake ◄─ HeadEvent ◄─┘  ▲
//!                                       └── Samples, from the last stage's link
//! ```

mod driver;
mod heads;
pub mod intake;
mod lateness;

pub use driver::{Head, HeadClient, HeadParts};
pub use heads::{Heads, Marks};
