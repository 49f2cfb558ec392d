//! Coordinator ↔ head (`shoal-req`): one bidirectional stream per choice of a prompt.
//!
//! ```text
//! coordinator ──► Trace{mark}, where the request is traced
//!             ──► Generate{header, sampling, stop ids, tokens}          then keeps its half open;
//!                 a reset or a stop of the stream cancels the sequence
//! head        ──► Token{…} Token{…} … then Done{…} or Failed{…}, and finishes its half
//! ```
//!
//! An encoder's head is asked with a `Generate` whose `max_tokens` is 0 and whose ids may carry
//! [`SECOND_TEXT`]; it answers with one `Vector`, or with `Failed`.
//!
//! Tokens that were generated before (`Resume`) follow the prompt in the same list: `prompt_len`
//! tells them apart, so penalties, limits and the random stream go on as if nothing had happened.

use crate::error::ErrorCode;
use crate::frame::{
    Flat, FrameError, FrameKind, append_floats, append_tokens, expect_end, flat, read_floats,
    read_tokens,
};
use crate::id::{AdapterId, Attempt, ReplicaId, RequestId, TokenId};
use crate::prefix::ReusedHeader;

/// The most stop token ids of one request.
pub const STOP_TOKENS_MAX: usize = 64;

/// The most alternatives reported beside a token: OpenAI's bound.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// The most tokens in one `Generate`; the model's context is checked besides.
pub const TOKENS_MAX: usize = 1 << 21;

/// The most numbers of an encoder's vector: twice the width of the widest published encoder.
pub const VECTOR_MAX: usize = 1 << 14;

/// Marks an id of an encoder's input as one of the second text of a pair (BERT's token type 1). No
/// vocabulary reaches so far.
pub const SECOND_TEXT: TokenId = 1 << 31;

/// `logprobs` where none are asked for.
pub const NO_LOGPROBS: u32 = u32::MAX;

/// `DoneHeader::stop_token` where no stop token ended the answer.
pub const NO_STOP_TOKEN: u32 = u32::MAX;

flat! {
    /// How one sequence draws its tokens. All of it crosses the wire: the last stage samples.
    pub struct SamplingRecord = 40 {
        /// The seed of the request; the coordinator drew one where the client gave none.
        pub seed: u64,
        /// 0 is greedy.
        pub temperature: f32,
        /// In (0, 1]; 1 keeps all.
        pub top_p: f32,
        /// 0 keeps all.
        pub top_k: u32,
        /// Divides (or multiplies, where negative) the logits of tokens seen in prompt or answer; 1
        /// leaves them alone. Keskar et al. 2019, as in transformers.
        pub repetition_penalty: f32,
        /// Subtracted once from the logit of each token seen in the answer.
        pub presence_penalty: f32,
        /// Subtracted for each time that a token was seen in the answer.
        pub frequency_penalty: f32,
        /// Alternatives to report beside each token, at most 20; `NO_LOGPROBS`: report nothing, not
        /// even the drawn token's own.
        pub logprobs: u32,
        /// Which prompt of the request and which choice of that prompt: `prompt << 16 | choice`.
        /// Each has its own stream of randomness.
        pub stream: u32,
    }
}

impl SamplingRecord {
    /// Greedy, without penalties or logprobs.
    pub const GREEDY: Self = Self {
        seed: 0,
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logprobs: NO_LOGPROBS,
        stream: 0,
    };

    /// The stream number of a choice of a prompt.
    pub fn stream_of(prompt: u16, choice: u16) -> u32 {
        u32::from(prompt) << 16 | u32::from(choice)
    }

    /// Checks what a peer sent; the API has checked the same with better words.
    pub fn check(&self) -> Result<(), FrameError> {
        let fields = [
            ("temperature", self.temperature >= 0.0 && self.temperature.is_finite()),
            ("top_p", self.top_p > 0.0 && self.top_p <= 1.0),
            (
                "repetition_penalty",
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
            ),
            ("presence_penalty", self.presence_penalty.is_finite()),
            ("frequency_penalty", self.frequency_penalty.is_finite()),
            ("logprobs", self.logprobs == NO_LOGPROBS || self.logprobs <= TOP_LOGPROBS_MAX),
        ];
        match fields.iter().find(|(_, ok)| !ok) {
            None => Ok(()),
            Some((field, _)) => Err(FrameError::Invalid {
                what: "SamplingRecord",
                why: format!("{field} is out of range"),
            }),
        }
    }
}

flat! {
    /// What a coordinator asks of a head.
    pub struct GenerateHeader = 48 {
        /// The client's request.
        pub request: u64,
        /// The deadline of the whole sequence, in milliseconds from receipt; 0: none.
        pub deadline_ms: u64,
        /// Which try this is.
        pub attempt: u32,
        /// The choice, counted over all prompts of the request.
        pub choice: u32,
        /// The replica whose head should serve it.
        pub replica: u32,
        /// How many of the tokens are the prompt; those behind it were generated before.
        pub prompt_len: u32,
        /// How many tokens follow.
        pub tokens: u32,
        /// How many tokens the answer may have in all, those generated before included.
        pub max_tokens: u32,
        /// How many stop token ids follow: a sampled one of them ends the answer.
        pub stop_tokens: u32,
        /// The adapter's number, 0 for none. Before protocol version 3 it was always 0.
        pub adapter: u32,
    }
}

/// A `Generate` frame, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    /// The client's request.
    pub request: RequestId,
    /// Which try this is.
    pub attempt: Attempt,
    /// The choice, counted over all prompts of the request.
    pub choice: u32,
    /// The replica whose head should serve it.
    pub replica: ReplicaId,
    /// The deadline in milliseconds from receipt; 0: none.
    pub deadline_ms: u64,
    /// How many of `tokens` are the prompt.
    pub prompt_len: u32,
    /// How many tokens the answer may have in all.
    pub max_tokens: u32,
    /// What is added to the base model's projections.
    pub adapter: Option<AdapterId>,
    /// How to draw.
    pub sampling: SamplingRecord,
    /// A sampled one of these ends the answer.
    pub stop_tokens: Vec<TokenId>,
    /// The prompt, then what was generated before.
    pub tokens: Vec<TokenId>,
}

impl Generate {
    /// The header and the body of the frame.
    pub fn encode(&self) -> (GenerateHeader, Vec<u8>) {
        let header = GenerateHeader {
            request: self.request.0,
            deadline_ms: self.deadline_ms,
            attempt: self.attempt.0,
            choice: self.choice,
            replica: self.replica.0,
            prompt_len: self.prompt_len,
            tokens: self.tokens.len() as u32,
            max_tokens: self.max_tokens,
            stop_tokens: self.stop_tokens.len() as u32,
            adapter: AdapterId::to_wire(self.adapter),
        };
        let mut body = Vec::with_capacity(
            SamplingRecord::LEN + 4 * (self.stop_tokens.len() + self.tokens.len()),
        );
        self.sampling.append_to(&mut body);
        append_tokens(&self.stop_tokens, &mut body);
        append_tokens(&self.tokens, &mut body);
        (header, body)
    }

    /// Checks every length and every number.
    pub fn decode(header: &[u8], body: &[u8]) -> Result<Self, FrameError> {
        let header = GenerateHeader::read_from(header)?;
        if header.stop_tokens as usize > STOP_TOKENS_MAX {
            return Err(FrameError::TooLong {
                what: "stop tokens",
                len: header.stop_tokens as usize,
                max: STOP_TOKENS_MAX,
            });
        }
        if header.tokens as usize > TOKENS_MAX {
            return Err(FrameError::TooLong {
                what: "tokens",
                len: header.tokens as usize,
                max: TOKENS_MAX,
            });
        }
        if header.prompt_len == 0 || header.prompt_len > header.tokens {
            return Err(FrameError::Invalid {
                what: "GenerateHeader",
                why: format!("a prompt of {} tokens out of {}", header.prompt_len, header.tokens),
            });
        }
        let (sampling, rest) = SamplingRecord::read_many(body, 1)?;
        let (stop_tokens, rest) = read_tokens(rest, header.stop_tokens as usize)?;
        let (tokens, rest) = read_tokens(rest, header.tokens as usize)?;
        expect_end(rest, "Generate")?;
        let sampling = sampling[0];
        sampling.check()?;
        Ok(Self {
            request: RequestId(header.request),
            attempt: Attempt(header.attempt),
            choice: header.choice,
            replica: ReplicaId(header.replica),
            deadline_ms: header.deadline_ms,
            prompt_len: header.prompt_len,
            max_tokens: header.max_tokens,
            adapter: AdapterId::of_wire(header.adapter),
            sampling,
            stop_tokens,
            tokens,
        })
    }
}

flat! {
    /// A token beside the one that was drawn.
    pub struct CandidateRecord = 8 {
        /// The token.
        pub token: u32,
        /// Its log-probability under the model, before temperature, filters and penalties.
        pub logprob: f32,
    }
}

flat! {
    /// One token of an answer.
    pub struct TokenHeader = 40 {
        /// The client's request.
        pub request: u64,
        /// Which try this is: a receiver takes only the current one.
        pub attempt: u32,
        /// The choice.
        pub choice: u32,
        /// Which token of the answer, counted from 0 over all attempts.
        pub index: u32,
        /// The token.
        pub token: u32,
        /// Its log-probability; NaN where none was asked for.
        pub logprob: f32,
        /// How many candidate records follow, best first.
        pub candidates: u32,
        /// Microseconds that the sequence waited before its first step; on the first token alone.
        pub queue_us: u32,
        /// Microseconds from the first step to this token; on the first token alone.
        pub prefill_us: u32,
    }
}

flat! {
    /// The end of an answer.
    pub struct DoneHeader = 32 {
        /// The client's request.
        pub request: u64,
        /// Which try this is.
        pub attempt: u32,
        /// The choice.
        pub choice: u32,
        /// `FinishReason` as a number.
        pub reason: u32,
        /// Tokens of the whole answer.
        pub tokens: u32,
        /// How often it was preempted.
        pub preemptions: u32,
        /// The stop token that ended it; `NO_STOP_TOKEN` where none did.
        pub stop_token: u32,
    }
}

flat! {
    /// What an encoder made of an input: the whole answer. The body is `width` floats.
    pub struct VectorHeader = 32 {
        /// The client's request.
        pub request: u64,
        /// Which try this is.
        pub attempt: u32,
        /// The input, counted over the request.
        pub choice: u32,
        /// How many numbers follow.
        pub width: u32,
        /// Microseconds that the input waited before its step.
        pub queue_us: u32,
        /// Microseconds that its step took.
        pub encode_us: u32,
        /// 0; for later versions.
        pub reserved: u32,
    }
}

flat! {
    /// The failure of an answer; the body is a message of at most 4 KiB of UTF-8.
    pub struct FailedHeader = 24 {
        /// The client's request.
        pub request: u64,
        /// Which try this is.
        pub attempt: u32,
        /// The choice.
        pub choice: u32,
        /// `ErrorCode` as a number.
        pub code: u32,
        /// 0; for later versions.
        pub reserved: u32,
    }
}

/// Why an answer is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum FinishReason {
    /// A stop token was sampled (it is not part of the answer's text).
    Stop = 1,
    /// `max_tokens` or the model's context is used up.
    Length = 2,
}

/// What a head says on the stream of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum HeadEvent {
    /// The next token.
    Token {
        /// Its fixed part.
        header: TokenHeader,
        /// The alternatives, best first.
        candidates: Vec<CandidateRecord>,
    },
    /// The answer is complete.
    Done {
        /// The fixed part.
        header: DoneHeader,
        /// Why.
        reason: FinishReason,
    },
    /// The answer cannot go on.
    Failed {
        /// The fixed part.
        header: FailedHeader,
        /// What kind of error.
        code: ErrorCode,
        /// Words for a person.
        message: String,
    },
    /// So much of the prompt was there already; before the first token.
    Reused {
        /// All of it.
        header: ReusedHeader,
    },
    /// An encoder's answer, which is complete with it.
    Vector {
        /// Its fixed part.
        header: VectorHeader,
        /// The numbers.
        values: Vec<f32>,
    },
}

impl HeadEvent {
    /// Whether nothing of its answer comes behind it.
    pub fn is_last(&self) -> bool {
        !matches!(self, HeadEvent::Token { .. } | HeadEvent::Reused { .. })
    }

    /// Whose it is: the request, the attempt and the choice.
    pub fn names(&self) -> (u64, u32, u32) {
        match self {
            HeadEvent::Token { header, .. } => (header.request, header.attempt, header.choice),
            HeadEvent::Done { header, .. } => (header.request, header.attempt, header.choice),
            HeadEvent::Failed { header, .. } => (header.request, header.attempt, header.choice),
            HeadEvent::Reused { header } => (header.request, header.attempt, header.choice),
            HeadEvent::Vector { header, .. } => (header.request, header.attempt, header.choice),
        }
    }

    /// The kind, the header's bytes and the body of the frame.
    pub fn encode(&self) -> (FrameKind, Vec<u8>, Vec<u8>) {
        let mut head = Vec::with_capacity(TokenHeader::LEN);
        let mut body = Vec::new();
        let kind = match self {
            HeadEvent::Token { header, candidates } => {
                header.append_to(&mut head);
                candidates.iter().for_each(|c| c.append_to(&mut body));
                FrameKind::Token
            }
            HeadEvent::Done { header, .. } => {
                header.append_to(&mut head);
                FrameKind::Done
            }
            HeadEvent::Failed { header, message, .. } => {
                header.append_to(&mut head);
                body.extend_from_slice(message.as_bytes());
                FrameKind::Failed
            }
            HeadEvent::Reused { header } => {
                header.append_to(&mut head);
                FrameKind::Reused
            }
            HeadEvent::Vector { header, values } => {
                header.append_to(&mut head);
                append_floats(values, &mut body);
                FrameKind::Vector
            }
        };
        (kind, head, body)
    }

    /// Checks every length and every number.
    pub fn decode(kind: FrameKind, header: &[u8], body: &[u8]) -> Result<Self, FrameError> {
        match kind {
            FrameKind::Token => {
                let header = TokenHeader::read_from(header)?;
                if header.candidates > TOP_LOGPROBS_MAX {
                    return Err(FrameError::TooLong {
                        what: "candidates",
                        len: header.candidates as usize,
                        max: TOP_LOGPROBS_MAX as usize,
                    });
                }
                let (candidates, rest) =
                    CandidateRecord::read_many(body, header.candidates as usize)?;
                expect_end(rest, "Token")?;
                Ok(HeadEvent::Token { header, candidates })
            }
            FrameKind::Done => {
                let header = DoneHeader::read_from(header)?;
                expect_end(body, "Done")?;
                let reason = match header.reason {
                    1 => FinishReason::Stop,
                    2 => FinishReason::Length,
                    other => {
                        return Err(FrameError::Invalid {
                            what: "DoneHeader",
                            why: format!("reason {other}"),
                        });
                    }
                };
                Ok(HeadEvent::Done { header, reason })
            }
            FrameKind::Failed => {
                let header = FailedHeader::read_from(header)?;
                if body.len() > crate::error::WireError::MESSAGE_LEN_MAX {
                    return Err(FrameError::TooLong {
                        what: "message",
                        len: body.len(),
                        max: crate::error::WireError::MESSAGE_LEN_MAX,
                    });
                }
                let code = u16::try_from(header.code).ok().and_then(ErrorCode::from_number);
                let code = code.unwrap_or(ErrorCode::Internal);
                Ok(HeadEvent::Failed {
                    header,
                    code,
                    message: String::from_utf8_lossy(body).into_owned(),
                })
            }
            FrameKind::Reused => {
                let header = ReusedHeader::read_from(header)?;
                expect_end(body, "Reused")?;
                Ok(HeadEvent::Reused { header })
            }
            FrameKind::Vector => {
                let header = VectorHeader::read_from(header)?;
                let (max, len) = (VECTOR_MAX, header.width as usize);
                if len > max {
                    return Err(FrameError::TooLong { what: "vector", len, max });
                }
                let (values, rest) = read_floats(body, len)?;
                expect_end(rest, "Vector")?;
                Ok(HeadEvent::Vector { header, values })
            }
            found => {
                let expected = "Token, Done, Failed, Reused or Vector";
                Err(FrameError::UnexpectedKind { found, expected })
            }
        }
    }
}
