//! From a row of logits to a token, at the last stage.
//!
//! ```text
//! logits ─► penalties ─► temperature ─► top-k ─► top-p ─► argmax(logit/T + Gumbel) ─► token
//!    └────► log-softmax of the untouched logits ─► logprob, alternatives
//! ```
//!
//! The draw has no state of its own: its noise is a function of (seed, prompt and choice, position,
//! token id), so that any machine at any later time draws the same token. Reported
//! log-probabilities are those of the model's own distribution, before penalties, temperature and
//! filters. All sums are in f64 over fixed blocks of `logsumexp::BLOCK` tokens, folded in block
//! order, so that nothing depends on where a vocabulary is cut.
//!
//! What stays with a sequence between its draws is what it has seen: `SamplerState`.

pub mod exp;
pub mod greedy;
pub mod gumbel;
pub mod logsumexp;
pub mod nucleus;
pub mod penalty;
pub mod ranks;
mod state;
pub mod top;

use shoal_protocol::id::TokenId;
use shoal_protocol::request::CandidateRecord;

pub use state::{SamplerState, Scratch};

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: TokenId,
    /// Its log-probability under the model, before penalties, temperature and filters; NaN where
    /// none was asked for.
    pub logprob: f32,
    /// The alternatives that were asked for, best first, ties to the lower id.
    pub candidates: Vec<CandidateRecord>,
}

/// No token could be drawn. The state is as it was.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is no number.
    #[error("the logit of token {token} is {value}, which is not finite")]
    NonFinite {
        /// The first such token.
        token: TokenId,
        /// Its logit.
        value: f32,
    },
    /// A row of no logits: the vocabulary cannot be empty.
    #[error("the row of logits is empty")]
    NoLogits,
    /// The row is not the one behind the last known token.
    #[error("a draw at position {found}, where the last known token stands at {expected}")]
    Position {
        /// The row's position.
        found: u32,
        /// The position of the last known token.
        expected: u32,
    },
}
