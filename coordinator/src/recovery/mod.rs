//! ● Answers that outlive their workers.
//!
//! ```text
//! session ─► LastingAnswer::next ─► attempt 0 at a head ──lost──► Recovery (○) ─┬─► Ask:  place, Generate{attempt + 1,
//!                  ▲                                                            │         prompt, every id received}
//!                  │                                                            ├─► Wait: table changes, back-off
//!                  └──────── the next token, none twice, none lost ◄────────────┴─► GiveUp: words for the client
//! ```
//!
//! What is kept of an answer is `dispatch::Sequence`; where it goes on is the router's choice. How it
//! goes on is decided in `course` alone: today by replaying all of its tokens, and a cluster that
//! rebuilds only the lost stage will say so there.

mod answer;
mod course;
mod error;
mod pace;
mod probation;

pub use answer::{LastingAnswer, Resumer};
pub use course::{GiveUp, Loss, Move, Next, Recovery, is_superseded};
pub use error::RecoveryError;
pub use pace::Pace;
