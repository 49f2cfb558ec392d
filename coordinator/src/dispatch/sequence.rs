//! ○ Everything that is known of one answer, enough to go on with it elsewhere.
//!
//! The prompt, every id received and the sampling stay together here: a `Generate` with a higher
//! attempt is made from them, and the generated ids never become prompt, so that penalties, limits
//! and the random stream go on as if nothing had happened.

use std::sync::Arc;

use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{AdapterId, Attempt, ReplicaId, RequestId, TokenId};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::{CandidateRecord, FinishReason, Generate, HeadEvent, SamplingRecord};

/// One choice of one prompt.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The client's request.
    pub request: RequestId,
    /// Which try this is.
    pub attempt: Attempt,
    /// The choice, counted over all prompts of the request.
    pub choice: u32,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// Every id of the answer so far, those whose text is held back included.
    pub received: Vec<TokenId>,
    /// How to draw.
    pub sampling: SamplingRecord,
    /// A sampled one of these ends the answer.
    pub stop_tokens: Arc<[TokenId]>,
    /// How many tokens the answer may have; 0: an encoder's input, of which a vector is the answer.
    pub max_tokens: u32,
    /// What is added to the base model; whichever replica goes on has it.
    pub adapter: Option<AdapterId>,
    /// Whose it is: with whom it may share what heads have computed. `None`: with nobody.
    pub tenant: Option<Tenant>,
    /// Tokens of the prompt that the head of the current attempt had already, as far as it has said.
    pub reused: u32,
}

/// What an encoder made of an input.
#[derive(Clone, Debug, PartialEq)]
pub struct Vector {
    /// The numbers.
    pub values: Vec<f32>,
    /// Microseconds that it waited.
    pub queue_us: u32,
    /// Microseconds that it took.
    pub encode_us: u32,
}

/// One token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: TokenId,
    /// Its log-probability; NaN where none was asked for.
    pub logprob: f32,
    /// The alternatives, best first.
    pub candidates: Vec<CandidateRecord>,
    /// On the first token: microseconds waited, and microseconds of prefill.
    pub first: Option<(u32, u32)>,
}

/// What a head's event means for the answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Taken {
    /// The next token.
    Token(Token),
    /// The answer is complete.
    Done {
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it.
        stop_token: Option<TokenId>,
    },
    /// The answer cannot go on.
    Failed {
        /// What kind of error.
        code: ErrorCode,
        /// Words for a person.
        message: String,
    },
    /// The whole answer of an encoder.
    Vector(Vector),
    /// Noted here: nothing to tell a client yet.
    Noted,
    /// An event of another attempt, or a token that is here already: to be counted and dropped.
    Stale,
    /// Tokens are missing: the head broke the protocol.
    Gap {
        /// The index that should have come.
        expected: u32,
        /// The index that came.
        found: u32,
    },
}

impl Sequence {
    /// What to send to the head of `replica`.
    pub fn generate(&self, replica: ReplicaId, deadline_ms: u64) -> Generate {
        Generate {
            request: self.request,
            attempt: self.attempt,
            choice: self.choice,
            replica,
            deadline_ms,
            prompt_len: self.prompt.len() as u32,
            max_tokens: self.max_tokens,
            adapter: self.adapter,
            sampling: self.sampling,
            stop_tokens: self.stop_tokens.to_vec(),
            tokens: self.prompt.iter().chain(&self.received).copied().collect(),
        }
    }

    /// Tokens that an attempt computes before it draws the next one: the prompt, and what was drawn.
    pub fn rows(&self) -> usize {
        self.prompt.len() + self.received.len()
    }

    /// Tokens that the answer may still have.
    pub fn left(&self) -> u32 {
        self.max_tokens.saturating_sub(self.received.len() as u32)
    }

    /// Takes an event: only the current attempt's, and of its tokens only the next.
    pub fn take(&mut self, event: HeadEvent) -> Taken {
        if event.names() != (self.request.0, self.attempt.0, self.choice) {
            return Taken::Stale;
        }
        match event {
            HeadEvent::Token { header, candidates } => {
                let expected = self.received.len() as u32;
                if header.index < expected {
                    return Taken::Stale;
                }
                if header.index > expected {
                    return Taken::Gap { expected, found: header.index };
                }
                self.received.push(header.token);
                Taken::Token(Token {
                    id: header.token,
                    logprob: header.logprob,
                    candidates,
                    first: (expected == 0).then_some((header.queue_us, header.prefill_us)),
                })
            }
            HeadEvent::Done { header, reason } => {
                let expected = self.received.len() as u32;
                if header.tokens != expected {
                    return Taken::Gap { expected: header.tokens, found: expected };
                }
                let stop_token = (header.stop_token != u32::MAX).then_some(header.stop_token);
                Taken::Done { reason, stop_token }
            }
            HeadEvent::Failed { code, message, .. } => Taken::Failed { code, message },
            HeadEvent::Reused { header } => {
                if header.tokens as usize > self.prompt.len() {
                    let expected = self.prompt.len() as u32;
                    return Taken::Gap { expected, found: header.tokens };
                }
                self.reused = header.tokens;
                Taken::Noted
            }
            HeadEvent::Vector { header, values } => Taken::Vector(Vector {
                values,
                queue_us: header.queue_us,
                encode_us: header.encode_us,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::request::{DoneHeader, TokenHeader};

    use super::*;

    fn sequence() -> Sequence {
        Sequence {
            request: RequestId(9),
            attempt: Attempt(1),
            choice: 2,
            prompt: Arc::from([5, 6]),
            received: Vec::new(),
            sampling: SamplingRecord::GREEDY,
            stop_tokens: Arc::from([1]),
            max_tokens: 8,
            adapter: Some(AdapterId(3)),
            tenant: Some(Tenant::OPEN),
            reused: 0,
        }
    }

    fn token(request: u64, attempt: u32, choice: u32, index: u32) -> HeadEvent {
        let token = 100 + index;
        let header =
            TokenHeader { request, attempt, choice, index, token, ..TokenHeader::default() };
        HeadEvent::Token { header, candidates: Vec::new() }
    }

    #[test]
    fn only_the_current_attempts_next_token_is_taken() {
        let mut sequence = sequence();
        let mut check = |event, expected: Result<u32, Taken>| match (sequence.take(event), expected)
        {
            (Taken::Token(token), Ok(id)) => assert_eq!(token.id, id),
            (found, Err(expected)) => assert_eq!(found, expected),
            (found, expected) => panic!("{found:?} where {expected:?} was expected"),
        };
        check(token(9, 1, 2, 0), Ok(100));
        check(token(9, 1, 2, 0), Err(Taken::Stale));
        check(token(9, 0, 2, 1), Err(Taken::Stale));
        check(token(9, 2, 2, 1), Err(Taken::Stale));
        check(token(9, 1, 3, 1), Err(Taken::Stale));
        check(token(8, 1, 2, 1), Err(Taken::Stale));
        check(token(9, 1, 2, 1), Ok(101));
        check(token(9, 1, 2, 3), Err(Taken::Gap { expected: 2, found: 3 }));
        let done = |tokens| HeadEvent::Done {
            header: DoneHeader {
                request: 9,
                attempt: 1,
                choice: 2,
                tokens,
                stop_token: u32::MAX,
                ..DoneHeader::default()
            },
            reason: FinishReason::Length,
        };
        check(done(3), Err(Taken::Gap { expected: 3, found: 2 }));
        check(done(2), Err(Taken::Done { reason: FinishReason::Length, stop_token: None }));
    }

    #[test]
    fn a_later_attempt_carries_what_was_generated_behind_the_prompt() {
        let mut sequence = sequence();
        sequence.take(token(9, 1, 2, 0));
        sequence.take(token(9, 1, 2, 1));
        sequence.attempt = Attempt(2);
        let generate = sequence.generate(ReplicaId(4), 1000);
        assert_eq!((generate.tokens, generate.prompt_len), (vec![5, 6, 100, 101], 2));
        assert_eq!((generate.max_tokens, generate.attempt), (8, Attempt(2)));
        assert_eq!(generate.adapter, Some(AdapterId(3)));
    }
}
