//! One request inside the engine: what it is, how far it is, and each way in which that changes.
//!
//! ```text
//! new ─► Waiting ──enter──► Running: rows issued, in flight, absorbed; tokens pushed ─► ended
//!           ▲                   │
//!           └─────── leave ─────┘   (preempted: tokens stay, rows are computed again)
//! ```

use std::ops::Range;
use std::time::Duration;

use shoal_protocol::activation::Open;
use shoal_protocol::id::{Attempt, Generation, RequestId, SequenceId, TokenId};
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::request::{FinishReason, Generate};
use shoal_protocol::units::Instant;

use super::blocks::Taken;
use super::prefixes::{Chain, Content};
use super::{ClientKey, Ending};

/// A sequence's time on the stages: from `Open` to `Close`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    /// Its name on the links: another one each time that it is opened.
    pub id: SequenceId,
    /// Its blocks in order.
    pub blocks: Vec<u32>,
    /// How many of them, from the first on, it took from others, full: it writes to none of these.
    shared: u32,
    /// How many of them the stages have been told.
    granted: usize,
    /// Rows that were issued: the next row stands at this position.
    issued: u32,
    /// Rows that have come back, and those of shared blocks.
    computed: u32,
    /// Where decoding begins: the number of tokens when it was opened.
    prefill_end: u32,
    /// Steps in flight that carry rows of it.
    in_flight: u32,
}

#[derive(Clone, Debug, PartialEq)]
enum Phase {
    Waiting,
    Running(Run),
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sequence {
    key: ClientKey,
    request: Generate,
    /// Tokens of the answer that the request brought along.
    generated_before: u32,
    /// What its full blocks hold, where they may be shared.
    chain: Option<Chain>,
    submitted: Instant,
    deadline: Option<Instant>,
    first_step: Option<Instant>,
    preemptions: u32,
    phase: Phase,
}

/// How long a sequence waited and was prefilled, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct FirstToken {
    pub queue_us: u32,
    pub prefill_us: u32,
}

/// What a drawn token means for its sequence.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Pushed {
    /// It is the token with this index of the answer; `ending` where it is the last.
    Token { index: u32, first: FirstToken, ending: Option<Ending> },
    /// It ends the answer and is no part of it.
    Stop(Ending),
}

impl Sequence {
    /// A request that waits. With a chain, which has no tokens yet, it shares blocks.
    pub fn new(key: ClientKey, request: Generate, mut chain: Option<Chain>, now: Instant) -> Self {
        if let Some(chain) = &mut chain {
            chain.extend(&request.tokens);
        }
        let deadline =
            (request.deadline_ms > 0).then(|| now + Duration::from_millis(request.deadline_ms));
        Self {
            key,
            generated_before: (request.tokens.len() as u32).saturating_sub(request.prompt_len),
            request,
            chain,
            submitted: now,
            deadline,
            first_step: None,
            preemptions: 0,
            phase: Phase::Waiting,
        }
    }

    pub fn key(&self) -> ClientKey {
        self.key
    }

    /// What its events are marked with.
    pub fn names(&self) -> (RequestId, Attempt, u32) {
        (self.request.request, self.request.attempt, self.request.choice)
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub fn preemptions(&self) -> u32 {
        self.preemptions
    }

    /// Tokens that are known, prompt and answer.
    pub fn len(&self) -> u32 {
        self.request.tokens.len() as u32
    }

    pub fn prompt_len(&self) -> u32 {
        self.request.prompt_len
    }

    /// Tokens of the answer so far.
    pub fn generated(&self) -> u32 {
        self.len() - self.request.prompt_len
    }

    /// Whether nothing more may be generated, before anything was.
    pub fn is_used_up(&self, context: u32) -> bool {
        self.generated() >= self.request.max_tokens || self.len() >= context
    }

    /// Words for a client whose deadline has passed.
    pub fn expired_text(&self, now: Instant) -> String {
        let waited = now.since(self.submitted).as_millis();
        let (limit, tokens) = (self.request.deadline_ms, self.generated());
        match self.first_step {
            None => format!(
                "the request waited {waited} ms for its turn, its deadline was {limit} ms; \
                 try again later or allow more time"
            ),
            Some(_) => format!(
                "after {waited} ms and {tokens} tokens the answer was not complete, its deadline \
                 was {limit} ms; ask for fewer tokens or allow more time"
            ),
        }
    }

    pub fn run(&self) -> Option<&Run> {
        match &self.phase {
            Phase::Waiting => None,
            Phase::Running(run) => Some(run),
        }
    }

    fn run_mut(&mut self) -> Option<&mut Run> {
        match &mut self.phase {
            Phase::Waiting => None,
            Phase::Running(run) => Some(run),
        }
    }

    /// Blocks to begin with: for every known token and the one behind them.
    pub fn blocks_to_enter(&self) -> u32 {
        (self.len() + 1).div_ceil(BLOCK_TOKENS)
    }

    /// Whether it shares blocks with others.
    pub fn shares(&self) -> bool {
        self.chain.is_some()
    }

    /// What the blocks hold that it may begin with: full ones, and at least one token behind them, from
    /// whose row the next one is drawn.
    pub fn prefix(&self) -> &[Content] {
        let blocks = self.chain.as_ref().map_or(&[][..], Chain::blocks);
        let most = self.len().saturating_sub(1) / BLOCK_TOKENS;
        &blocks[..blocks.len().min(most as usize)]
    }

    /// What its block with this number holds, once all of its tokens are known.
    pub fn content(&self, block: u32) -> Option<Content> {
        self.chain.as_ref()?.blocks().get(block as usize).copied()
    }

    /// It goes onto the stages under this name with these blocks.
    pub fn enter(&mut self, generation: Generation, id: SequenceId, taken: Taken) -> Open {
        let begin = taken.shared * BLOCK_TOKENS;
        self.phase = Phase::Running(Run {
            id,
            blocks: taken.blocks,
            shared: taken.shared,
            granted: 0,
            issued: begin,
            computed: begin,
            prefill_end: self.len(),
            in_flight: 0,
        });
        Open {
            generation,
            sequence: id,
            request: self.request.request,
            attempt: self.request.attempt,
            choice: self.request.choice,
            prompt_len: self.request.prompt_len,
            adapter: self.request.adapter,
            sampling: self.request.sampling,
            tokens: self.request.tokens.clone(),
        }
    }

    /// It goes off the stages, if it is on them.
    pub fn leave(&mut self) -> Option<Run> {
        match std::mem::replace(&mut self.phase, Phase::Waiting) {
            Phase::Waiting => None,
            Phase::Running(run) => Some(run),
        }
    }

    /// `leave`, in order to come back.
    pub fn note_preemption(&mut self) {
        self.preemptions += 1;
    }

    /// A block more.
    pub fn add_block(&mut self, block: u32) {
        if let Some(run) = self.run_mut() {
            run.blocks.push(block);
        }
    }

    /// The ids of the next `rows` rows, which are issued with this, the position of the first, and
    /// the blocks that the stages have not been told yet.
    pub fn issue(&mut self, rows: u32, now: Instant) -> Option<Issued<'_>> {
        let Phase::Running(run) = &mut self.phase else { return None };
        let (first, end) = (run.issued, run.issued + rows);
        let tokens = self.request.tokens.get(first as usize..end as usize)?;
        self.first_step.get_or_insert(now);
        run.issued = end;
        run.in_flight += 1;
        let granted = std::mem::replace(&mut run.granted, run.blocks.len());
        Some(Issued {
            id: run.id,
            first_position: first,
            tokens,
            grants: &run.blocks[granted..],
            shared: (run.shared as usize).saturating_sub(granted),
            sample: end as usize == self.request.tokens.len(),
        })
    }

    /// A step that carried rows of it, up to this position, has come back. Which of its blocks are full
    /// with that.
    pub fn absorbed(&mut self, last: u32) -> Range<u32> {
        let Some(run) = self.run_mut() else { return 0..0 };
        run.in_flight = run.in_flight.saturating_sub(1);
        let before = std::mem::replace(&mut run.computed, last.saturating_add(1));
        before / BLOCK_TOKENS..run.computed / BLOCK_TOKENS
    }

    /// How long it waited and was prefilled, where that has just come to its end.
    pub fn times(&self, now: Instant) -> FirstToken {
        let began = self.first_step.unwrap_or(now);
        FirstToken {
            queue_us: micros(began.since(self.submitted)),
            prefill_us: micros(now.since(began)),
        }
    }

    /// Takes the token that was drawn.
    pub fn push(&mut self, token: TokenId, context: u32, now: Instant) -> Pushed {
        if self.request.stop_tokens.contains(&token) {
            let reason = FinishReason::Stop;
            return Pushed::Stop(Ending::Done { reason, stop_token: Some(token) });
        }
        let index = self.generated();
        let first = match index == self.generated_before {
            true => self.times(now),
            false => FirstToken::default(),
        };
        self.request.tokens.push(token);
        if let Some(chain) = &mut self.chain {
            chain.extend(&self.request.tokens);
        }
        let reason = FinishReason::Length;
        let ending = self.is_used_up(context).then_some(Ending::Done { reason, stop_token: None });
        Pushed::Token { index, first, ending }
    }
}

/// Rows of a sequence that have just been issued.
pub(super) struct Issued<'a> {
    pub id: SequenceId,
    pub first_position: u32,
    pub tokens: &'a [TokenId],
    pub grants: &'a [u32],
    /// How many of these, from the first on, come with their content.
    pub shared: usize,
    /// Whether a token is drawn from the last of the rows.
    pub sample: bool,
}

impl Run {
    /// Rows of the prompt (and of what was generated before it was opened) still to be issued.
    pub fn prefill_left(&self) -> u32 {
        self.prefill_end.saturating_sub(self.issued)
    }

    /// Past its prefill.
    pub fn is_decoding(&self) -> bool {
        self.issued >= self.prefill_end
    }

    /// Whether its next row can go: past its prefill, and the token is known.
    pub fn is_ready(&self, len: u32) -> bool {
        self.is_decoding() && self.issued < len
    }

    /// Whether the next row has no block yet.
    pub fn lacks_block(&self) -> bool {
        self.blocks.len() as u32 * BLOCK_TOKENS <= self.issued
    }

    /// Blocks, from the first on, that it took from others.
    pub fn shared(&self) -> u32 {
        self.shared
    }

    /// Blocks of which the stages have not been told.
    pub fn to_grant(&self) -> u32 {
        (self.blocks.len() - self.granted) as u32
    }

    pub fn computed(&self) -> u32 {
        self.computed
    }

    pub fn issued(&self) -> u32 {
        self.issued
    }

    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}
