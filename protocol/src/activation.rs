//! Stage ↔ stage (`shoal-act`): one stream per link, frames in order. The receiver answers the hello
//! with its own, its sides swapped, once it has let the sender in; nothing else goes back.
//!
//! ```text
//! stage i ──► LinkHello, then any of Open · Trace · Step · Close ──► stage i+1
//! last    ──► LinkHello, then Samples                   ──► stage 0 (the head)
//!         ◄── LinkHello
//!
//! Step body:    StepHeader.rows    x RowRecord   (16 B)
//!               StepHeader.grants  x BlockGrant  (16 B)
//!               hidden states: rows x hidden f32, little-endian; the width follows from the plan
//! Open body:    SamplingRecord (40 B), StepHeader.tokens x u32
//! Samples body: samples x SampleRecord (24 B), candidates x CandidateRecord (8 B),
//!               samples x SamplesHeader.width f32, little-endian: what an encoder made of each
//! rank r  ◄─► LinkHello, Near, then Partial ◄─► rank q of the same stage
//! ```
//!
//! Rows of one sequence are adjacent and in order of position. A grant names the sequence's next
//! block; grants stand in the order in which the blocks are used.

use crate::frame::{
    Flat, FrameError, append_floats, append_tokens, expect_end, flat, read_floats, read_tokens,
};
use crate::id::{AdapterId, Attempt, Generation, RankIndex, RequestId, SequenceId, TokenId};
use crate::plan::ReplicaLimits;
use crate::request::{CandidateRecord, SamplingRecord, TOP_LOGPROBS_MAX, VECTOR_MAX};

pub use crate::ranks::{Near, Partial};

flat! {
    /// Says which link a stream is. The receiver compares it with its assignment and with the
    /// certificate of the sender.
    pub struct LinkHello = 24 {
        /// The layout.
        pub generation: u64,
        /// The replica.
        pub replica: u32,
        /// The sender's stage.
        pub from_stage: u32,
        /// The receiver's stage.
        pub to_stage: u32,
        /// The sender's tensor rank, times 256 the receiver's, and [`LinkHello::OF_RANKS`] where the link
        /// joins ranks of one stage: 0 between stages of one rank each.
        pub ranks: u32,
    }
}

impl LinkHello {
    /// The link carries [`Partial`]s between two ranks of one stage.
    pub const OF_RANKS: u32 = 1 << 16;

    /// What stands in `ranks`. A stage has at most 256 ranks (`plan::RANKS_MAX`).
    pub fn ranks_of(from: RankIndex, to: RankIndex, of_ranks: bool) -> u32 {
        (from.0 & 0xff) | (to.0 & 0xff) << 8 | if of_ranks { Self::OF_RANKS } else { 0 }
    }

    /// The sender's rank.
    pub fn from_rank(&self) -> RankIndex {
        RankIndex(self.ranks & 0xff)
    }

    /// The receiver's rank.
    pub fn to_rank(&self) -> RankIndex {
        RankIndex(self.ranks >> 8 & 0xff)
    }

    /// What the receiver answers.
    pub fn answer(self) -> Self {
        let of_ranks = self.ranks & Self::OF_RANKS != 0;
        Self {
            from_stage: self.to_stage,
            to_stage: self.from_stage,
            ranks: Self::ranks_of(self.to_rank(), self.from_rank(), of_ranks),
            ..self
        }
    }
}

flat! {
    /// A sequence begins at every stage.
    pub struct OpenHeader = 48 {
        /// The layout.
        pub generation: u64,
        /// The sequence.
        pub sequence: u64,
        /// The client's request, for logs and traces.
        pub request: u64,
        /// Which try this is.
        pub attempt: u32,
        /// The choice.
        pub choice: u32,
        /// How many of the tokens are the prompt.
        pub prompt_len: u32,
        /// How many tokens follow.
        pub tokens: u32,
        /// The adapter's number, 0 for none. Before protocol version 3 it was always 0.
        pub adapter: u64,
    }
}

/// An `Open` frame, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Open {
    /// The layout.
    pub generation: Generation,
    /// The sequence.
    pub sequence: SequenceId,
    /// The client's request.
    pub request: RequestId,
    /// Which try this is.
    pub attempt: Attempt,
    /// The choice.
    pub choice: u32,
    /// How many of `tokens` are the prompt.
    pub prompt_len: u32,
    /// What is added to the base model's projections.
    pub adapter: Option<AdapterId>,
    /// How the last stage draws.
    pub sampling: SamplingRecord,
    /// The prompt, then what was generated before.
    pub tokens: Vec<TokenId>,
}

impl Open {
    /// The header and the body of the frame.
    pub fn encode(&self) -> (OpenHeader, Vec<u8>) {
        let header = OpenHeader {
            generation: self.generation.0,
            sequence: self.sequence.0,
            request: self.request.0,
            attempt: self.attempt.0,
            choice: self.choice,
            prompt_len: self.prompt_len,
            tokens: self.tokens.len() as u32,
            adapter: AdapterId::to_wire(self.adapter).into(),
        };
        let mut body = Vec::with_capacity(SamplingRecord::LEN + 4 * self.tokens.len());
        self.sampling.append_to(&mut body);
        append_tokens(&self.tokens, &mut body);
        (header, body)
    }

    /// Checks every length and every number against the plan's bounds.
    pub fn decode(header: &[u8], body: &[u8], limits: &ReplicaLimits) -> Result<Self, FrameError> {
        let header = OpenHeader::read_from(header)?;
        let (len, max) = (header.tokens as usize, limits.context_max as usize);
        if len > max {
            return Err(FrameError::TooLong { what: "tokens", len, max });
        }
        let invalid = |why: String| FrameError::Invalid { what: "OpenHeader", why };
        if header.prompt_len == 0 || header.prompt_len > header.tokens {
            let OpenHeader { prompt_len, tokens, .. } = header;
            return Err(invalid(format!("a prompt of {prompt_len} tokens out of {tokens}")));
        }
        let adapter = u32::try_from(header.adapter)
            .map_err(|_| invalid(format!("adapter {}", header.adapter)))?;
        let (sampling, rest) = SamplingRecord::read_many(body, 1)?;
        let (tokens, rest) = read_tokens(rest, header.tokens as usize)?;
        expect_end(rest, "Open")?;
        sampling[0].check()?;
        Ok(Self {
            generation: Generation(header.generation),
            sequence: SequenceId(header.sequence),
            request: RequestId(header.request),
            attempt: Attempt(header.attempt),
            choice: header.choice,
            prompt_len: header.prompt_len,
            adapter: AdapterId::of_wire(adapter),
            sampling: sampling[0],
            tokens,
        })
    }
}

flat! {
    /// A batch.
    pub struct StepHeader = 32 {
        /// The layout.
        pub generation: u64,
        /// The step.
        pub step: u64,
        /// How many row records follow.
        pub rows: u32,
        /// How many block grants follow.
        pub grants: u32,
        /// How many rows have `RowRecord::SAMPLE` set.
        pub samples: u32,
        /// 0; for later versions.
        pub reserved: u32,
    }
}

flat! {
    /// One row of a batch: one token of one sequence.
    pub struct RowRecord = 16 {
        /// The sequence.
        pub sequence: u64,
        /// The token's position in it, counted from 0.
        pub position: u32,
        /// `SAMPLE` or 0.
        pub flags: u32,
    }
}

impl RowRecord {
    /// The last stage draws the next token from this row.
    pub const SAMPLE: u32 = 1;

    /// Whether the last stage draws from this row.
    pub fn samples(&self) -> bool {
        self.flags & Self::SAMPLE != 0
    }
}

flat! {
    /// A sequence gets its next KV block.
    pub struct BlockGrant = 16 {
        /// The sequence.
        pub sequence: u64,
        /// The block, below the plan's `kv_blocks`.
        pub block: u32,
        /// `SHARED` or 0. Before protocol version 3 it was always 0.
        pub flags: u32,
    }
}

/// A `Step` frame without its payload, parsed.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Step {
    /// The fixed part.
    pub header: StepHeader,
    /// The rows.
    pub rows: Vec<RowRecord>,
    /// The blocks that are new since the last step.
    pub grants: Vec<BlockGrant>,
}

impl Step {
    /// Bytes of the records between header and payload.
    pub fn records_len(&self) -> usize {
        self.rows.len() * RowRecord::LEN + self.grants.len() * BlockGrant::LEN
    }

    /// The records' bytes.
    pub fn encode_records(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.records_len());
        self.rows.iter().for_each(|r| r.append_to(&mut out));
        self.grants.iter().for_each(|g| g.append_to(&mut out));
        out
    }

    /// Checks the header against the plan, and the body's length against the header, before
    /// anything is allocated. Returns the header, the records' bytes and the payload's bytes.
    pub fn check(
        header: &[u8],
        body_len: usize,
        limits: &ReplicaLimits,
        row_bytes: usize,
    ) -> Result<(StepHeader, usize, usize), FrameError> {
        let header = StepHeader::read_from(header)?;
        for (what, len, max) in [
            ("rows", header.rows, limits.step_rows_max),
            ("grants", header.grants, limits.kv_blocks),
            ("samples", header.samples, header.rows),
        ] {
            if len > max {
                return Err(FrameError::TooLong { what, len: len as usize, max: max as usize });
            }
        }
        let records =
            header.rows as usize * RowRecord::LEN + header.grants as usize * BlockGrant::LEN;
        let payload = header.rows as usize * row_bytes;
        if body_len != records + payload {
            return Err(FrameError::WrongLength {
                what: "Step",
                len: body_len,
                expected: records + payload,
            });
        }
        Ok((header, records, payload))
    }

    /// Reads the records that `check` has sized.
    pub fn decode(header: StepHeader, records: &[u8]) -> Result<Self, FrameError> {
        let (rows, rest) = RowRecord::read_many(records, header.rows as usize)?;
        let (grants, rest) = BlockGrant::read_many(rest, header.grants as usize)?;
        expect_end(rest, "Step records")?;
        let samples = rows.iter().filter(|r| r.samples()).count();
        if samples != header.samples as usize {
            return Err(FrameError::Invalid {
                what: "StepHeader",
                why: format!(
                    "{samples} rows are marked to sample, the header says {}",
                    header.samples
                ),
            });
        }
        Ok(Self { header, rows, grants })
    }
}

flat! {
    /// A sequence ends at every stage; its blocks are free for others behind this frame.
    pub struct CloseHeader = 16 {
        /// The layout.
        pub generation: u64,
        /// The sequence.
        pub sequence: u64,
    }
}

flat! {
    /// What the last stage drew in one step.
    pub struct SamplesHeader = 32 {
        /// The layout.
        pub generation: u64,
        /// The step.
        pub step: u64,
        /// How many sample records follow: 0 for a step of prompt rows alone.
        pub samples: u32,
        /// How many candidate records follow, in the order of the samples.
        pub candidates: u32,
        /// Numbers of each sample's vector: 0 for what draws tokens, and from peers that know no
        /// encoders.
        pub width: u64,
    }
}

flat! {
    /// One drawn token.
    pub struct SampleRecord = 24 {
        /// The sequence.
        pub sequence: u64,
        /// The position of the row that it was drawn from; the token stands at the next one.
        pub position: u32,
        /// The token.
        pub token: u32,
        /// Its log-probability; NaN where none was asked for.
        pub logprob: f32,
        /// How many of the candidate records are this token's.
        pub candidates: u32,
    }
}

/// One drawn token with its alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The sequence.
    pub sequence: SequenceId,
    /// The position of the row that it was drawn from.
    pub position: u32,
    /// The token.
    pub token: TokenId,
    /// Its log-probability; NaN where none was asked for.
    pub logprob: f32,
    /// The alternatives, best first.
    pub candidates: Vec<CandidateRecord>,
}

impl Sample {
    /// Stands for a token where none could be drawn: the row's logits were not finite. The sequence
    /// fails, the others of its step go on. No vocabulary is that large.
    pub const NO_TOKEN: TokenId = TokenId::MAX;
}

/// A `Samples` frame, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// The layout.
    pub generation: Generation,
    /// The step.
    pub step: crate::id::StepId,
    /// What was drawn, in row order.
    pub samples: Vec<Sample>,
    /// What an encoder made of each sampled row's sequence, in row order and all equally long; their
    /// samples' tokens mean nothing then. Empty where tokens are drawn.
    pub vectors: Vec<Vec<f32>>,
}

impl Samples {
    /// The header and the body of the frame.
    pub fn encode(&self) -> (SamplesHeader, Vec<u8>) {
        let candidates: usize = self.samples.iter().map(|s| s.candidates.len()).sum();
        let header = SamplesHeader {
            generation: self.generation.0,
            step: self.step.0,
            samples: self.samples.len() as u32,
            candidates: candidates as u32,
            width: self.vectors.first().map_or(0, Vec::len) as u64,
        };
        let mut body = Vec::with_capacity(
            self.samples.len() * SampleRecord::LEN
                + candidates * CandidateRecord::LEN
                + vectors_len(&header),
        );
        for sample in &self.samples {
            SampleRecord {
                sequence: sample.sequence.0,
                position: sample.position,
                token: sample.token,
                logprob: sample.logprob,
                candidates: sample.candidates.len() as u32,
            }
            .append_to(&mut body);
        }
        self.samples.iter().flat_map(|s| &s.candidates).for_each(|c| c.append_to(&mut body));
        self.vectors.iter().for_each(|vector| append_floats(vector, &mut body));
        (header, body)
    }

    /// The longest body that a step under these limits can have behind this header.
    pub fn body_len_max(header: &SamplesHeader, limits: &ReplicaLimits) -> usize {
        let samples = limits.step_rows_max.min(header.samples);
        let vectors = SamplesHeader { samples, ..*header };
        limits.step_rows_max as usize
            * (SampleRecord::LEN + TOP_LOGPROBS_MAX as usize * CandidateRecord::LEN)
            + vectors_len(&vectors)
    }

    /// Checks every length and every number against the plan's bounds.
    pub fn decode(header: &[u8], body: &[u8], limits: &ReplicaLimits) -> Result<Self, FrameError> {
        let header = SamplesHeader::read_from(header)?;
        if header.samples > limits.step_rows_max {
            return Err(FrameError::TooLong {
                what: "samples",
                len: header.samples as usize,
                max: limits.step_rows_max as usize,
            });
        }
        let (records, rest) = SampleRecord::read_many(body, header.samples as usize)?;
        let (candidates, rest) = CandidateRecord::read_many(rest, header.candidates as usize)?;
        if header.width > VECTOR_MAX as u64 {
            return Err(FrameError::TooLong {
                what: "vectors",
                len: usize::try_from(header.width).unwrap_or(usize::MAX),
                max: VECTOR_MAX,
            });
        }
        let (vectors, rest) = read_vectors(rest, &header)?;
        expect_end(rest, "Samples")?;
        let mut candidates = candidates.into_iter();
        let mut samples = Vec::with_capacity(records.len());
        for record in records {
            if record.candidates > TOP_LOGPROBS_MAX || record.candidates as usize > candidates.len()
            {
                return Err(FrameError::Invalid {
                    what: "SampleRecord",
                    why: format!("{} candidates", record.candidates),
                });
            }
            samples.push(Sample {
                sequence: SequenceId(record.sequence),
                position: record.position,
                token: record.token,
                logprob: record.logprob,
                candidates: candidates.by_ref().take(record.candidates as usize).collect(),
            });
        }
        if candidates.len() != 0 {
            return Err(FrameError::Invalid {
                what: "SamplesHeader",
                why: format!("{} candidates belong to no sample", candidates.len()),
            });
        }
        Ok(Self {
            generation: Generation(header.generation),
            step: crate::id::StepId(header.step),
            samples,
            vectors,
        })
    }
}

/// Bytes of the vectors behind a header.
fn vectors_len(header: &SamplesHeader) -> usize {
    let width = header.width.min(VECTOR_MAX as u64) as usize;
    header.samples as usize * width * size_of::<f32>()
}

/// The vectors that this header counts, and what is left behind them.
fn read_vectors<'a>(
    bytes: &'a [u8],
    header: &SamplesHeader,
) -> Result<(Vec<Vec<f32>>, &'a [u8]), FrameError> {
    if header.width == 0 {
        return Ok((Vec::new(), bytes));
    }
    let (all, rest) = read_floats(bytes, vectors_len(header) / size_of::<f32>())?;
    Ok((all.chunks_exact(header.width as usize).map(<[f32]>::to_vec).collect(), rest))
}
