//! An engine and real stage tables under random load, delays, cancellations and shortage of blocks,
//! against sequences that run alone.
//!
//! The stages compute a pretend model whose every row reads all of its sequence's KV cache through
//! the block table, so that a block that is granted too early, a row at a wrong position or a stale
//! slot changes the tokens.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use shoal_protocol::activation::{CloseHeader, Open, Samples, Step};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{
    AdapterId, Attempt, Generation, ReplicaId, RequestId, SequenceId, TokenId,
};
use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaLimits};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::{FinishReason, Generate, HeadEvent, NO_STOP_TOKEN, SamplingRecord};
use shoal_protocol::units::Instant;

use super::{Action, ClientKey, Engine, EngineConfig, Event};
use crate::sample::{SamplerState, Scratch};
use crate::stage::table::StageTable;

const VOCAB: u32 = 24;
const STOP: TokenId = 5;

fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0x1234_5678_9ABC_DEF1);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Xorshift: the test's own dice.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What a stage writes for a row, of which an adapter makes something else.
fn written(hidden: u64, adapter: Option<AdapterId>) -> u64 {
    adapter.map_or(hidden, |AdapterId(number)| mix(hidden, u64::from(number)))
}

/// What a stage sends on, given all rows so far.
fn attend(cache: impl Iterator<Item = u64>) -> u64 {
    cache.fold(7, mix)
}

fn logits(hidden: u64) -> Vec<f32> {
    (0..VOCAB).map(|t| (mix(hidden, u64::from(t)) % 600) as f32 * 0.01 - 3.0).collect()
}

/// The answer of a sequence that runs alone in one stage list, without blocks, batches or chunks.
fn alone(stages: u32, context: u32, request: &Generate) -> (Vec<TokenId>, FinishReason) {
    let mut caches = vec![Vec::new(); stages as usize];
    let mut tokens = request.tokens.clone();
    let mut sampler = SamplerState::open(request.prompt_len, &tokens, request.sampling);
    let mut scratch = Scratch::default();
    loop {
        let answer = tokens.len() as u32 - request.prompt_len;
        if answer >= request.max_tokens || tokens.len() as u32 >= context {
            return (tokens.split_off(request.tokens.len()), FinishReason::Length);
        }
        let mut hidden = 0;
        let computed = caches[0].len();
        for &token in &tokens[computed..] {
            hidden = u64::from(token);
            for cache in &mut caches {
                cache.push(written(hidden, request.adapter));
                hidden = attend(cache.iter().copied());
            }
        }
        let position = tokens.len() as u32 - 1;
        let token = sampler.draw(&mut scratch, &logits(hidden), position).unwrap().token;
        if request.stop_tokens.contains(&token) {
            return (tokens.split_off(request.tokens.len()), FinishReason::Stop);
        }
        tokens.push(token);
    }
}

#[derive(Clone)]
enum Frame {
    Open(Open),
    Step(Step, Vec<u64>),
    Close(CloseHeader),
}

/// A stage: the real table, a pretend KV cache, and the frames that wait for it in order.
struct Stage {
    table: StageTable,
    cache: Vec<u64>,
    inbox: VecDeque<Frame>,
}

impl Stage {
    /// Takes one frame; what goes to the next stage, and what was drawn.
    fn advance(&mut self) -> (Option<Frame>, Option<Samples>, bool) {
        let Some(frame) = self.inbox.pop_front() else { return (None, None, false) };
        let sent = match frame {
            Frame::Open(open) => {
                self.table.open(&open).unwrap();
                (Some(Frame::Open(open)), None, true)
            }
            Frame::Close(close) => {
                self.table.close(&close).unwrap();
                (Some(Frame::Close(close)), None, true)
            }
            Frame::Step(step, payload) => {
                let begun = self.table.begin_step(&step).unwrap();
                let mut hidden = payload;
                for span in begun.spans() {
                    let slot = |p: usize| {
                        let size = BLOCK_TOKENS as usize;
                        span.blocks[p / size] as usize * size + p % size
                    };
                    for row in 0..span.rows {
                        let position = span.first_position as usize + row;
                        let value = &mut hidden[span.first_row + row];
                        self.cache[slot(position)] = written(*value, span.adapter);
                        *value = attend((0..=position).map(|p| self.cache[slot(p)]));
                    }
                }
                let rows = begun.sample_rows().iter().flat_map(|&row| logits(hidden[row]));
                let logits: Vec<f32> = rows.collect();
                let samples = self.table.draw(&step, &logits, VOCAB as usize).ok();
                (Some(Frame::Step(step, hidden)), samples, true)
            }
        };
        assert_eq!(self.table.check(), Vec::<String>::new());
        sent
    }
}

struct Client {
    request: Generate,
    expected: (Vec<TokenId>, FinishReason),
    got: Vec<TokenId>,
    deadline: Option<Instant>,
    cancelled: bool,
    done: bool,
}

struct World {
    engine: Engine,
    config: EngineConfig,
    stages: Vec<Stage>,
    samples: VecDeque<Samples>,
    clients: BTreeMap<ClientKey, Client>,
    dice: Dice,
    now: Instant,
    in_flight_seen: usize,
    expired: usize,
    /// Whether prompts begin as others do, and blocks are shared.
    shares: bool,
    /// Steps that computed less of a prompt because of that, as clients were told.
    reused: usize,
}

impl World {
    /// One whose sequences share what they have in common.
    fn sharing(seed: u64, stages: u32, limits: ReplicaLimits) -> Self {
        let mut world = Self::new(seed, stages, limits);
        world.config.prefix_key = Some([seed as u8; 32]);
        world.engine = Engine::new(world.config.clone()).unwrap();
        world.shares = true;
        world
    }

    fn new(seed: u64, stages: u32, limits: ReplicaLimits) -> Self {
        let mut config =
            EngineConfig::new(ReplicaId(1), Generation(3), limits.clone(), stages, VOCAB);
        config.prefill_rows_min = 4;
        config.split_rows_min = 2;
        let cells = (limits.kv_blocks * BLOCK_TOKENS) as usize;
        let stage = |i| Stage {
            table: StageTable::new(Generation(3), limits.clone(), i + 1 == stages),
            cache: vec![0; cells],
            inbox: VecDeque::new(),
        };
        Self {
            engine: Engine::new(config.clone()).unwrap(),
            config,
            stages: (0..stages).map(stage).collect(),
            samples: VecDeque::new(),
            clients: BTreeMap::new(),
            dice: Dice(mix(seed, 1) | 1),
            now: Instant(1),
            in_flight_seen: 0,
            expired: 0,
            shares: false,
            reused: 0,
        }
    }

    fn tell(&mut self, event: Event) {
        self.engine.handle(self.now, event);
        while let Some(action) = self.engine.poll_action() {
            self.act(action);
        }
        assert_eq!(self.engine.check(), Vec::<String>::new());
    }

    fn act(&mut self, action: Action) {
        let inbox = &mut self.stages[0].inbox;
        match action {
            Action::Open(open) => inbox.push_back(Frame::Open(open)),
            Action::Close(close) => inbox.push_back(Frame::Close(close)),
            Action::Issue { step, tokens } => {
                // The bounds that a receiver checks in the header.
                assert!(step.rows.len() <= self.config.limits.step_rows_max as usize);
                assert!(step.grants.len() <= self.config.limits.kv_blocks as usize);
                assert_eq!(step.rows.len(), tokens.len());
                let payload = tokens.into_iter().map(u64::from).collect();
                inbox.push_back(Frame::Step(step, payload));
            }
            Action::Emit { key, event } => self.client_hears(key, event),
            Action::Fault { reason } => panic!("{reason}"),
        }
    }

    fn client_hears(&mut self, key: ClientKey, event: HeadEvent) {
        let client = self.clients.get_mut(&key).unwrap();
        assert!(!client.done, "{key:?} hears {event:?} after its end");
        assert!(!client.cancelled, "{key:?} hears {event:?} after it went away");
        let before = client.request.tokens.len() as u32 - client.request.prompt_len;
        match event {
            HeadEvent::Token { header, .. } => {
                assert_eq!(header.index, before + client.got.len() as u32);
                client.got.push(header.token);
            }
            HeadEvent::Done { header, reason } => {
                client.done = true;
                assert_eq!((&client.got, reason), (&client.expected.0, client.expected.1));
                assert_eq!(header.tokens, before + client.got.len() as u32);
                let stopped = header.stop_token != NO_STOP_TOKEN;
                assert_eq!(stopped, reason == FinishReason::Stop);
            }
            HeadEvent::Reused { header } => {
                assert!(client.got.is_empty() && self.shares);
                assert!(0 < header.tokens && header.tokens <= client.request.prompt_len);
                self.reused += 1;
            }
            HeadEvent::Vector { .. } => panic!("a vector from a model that draws"),
            HeadEvent::Failed { code, message, .. } => {
                assert_eq!(code, ErrorCode::DeadlineExceeded, "{message}");
                assert_eq!(client.deadline, Some(self.now), "a deadline is kept to the tick");
                assert!(client.expected.0.starts_with(&client.got));
                client.done = true;
                self.expired += 1;
            }
        }
    }

    fn submit(&mut self, deadlines: bool) {
        let key = ClientKey(self.clients.len() as u64);
        let context = u64::from(self.config.context());
        let longest = if self.dice.below(4) == 0 { context - 1 } else { context.min(40) / 2 };
        let prompt_len = 1 + self.dice.below(longest.max(1)) as u32;
        let mut sampling = SamplingRecord {
            seed: self.dice.below(1000),
            stream: self.dice.below(3) as u32,
            temperature: 1.5,
            ..SamplingRecord::GREEDY
        };
        match self.dice.below(4) {
            0 => sampling.temperature = 0.0,
            1 => (sampling.repetition_penalty, sampling.frequency_penalty) = (1.3, 0.2),
            2 => (sampling.top_k, sampling.top_p) = (9, 0.9),
            _ => {}
        }
        let mut request = Generate {
            request: RequestId(key.0),
            attempt: Attempt(1),
            choice: 0,
            replica: ReplicaId(1),
            deadline_ms: 0,
            prompt_len,
            max_tokens: 1 + self.dice.below(60) as u32,
            adapter: None,
            sampling,
            stop_tokens: if self.dice.below(2) == 0 { vec![STOP] } else { vec![] },
            tokens: (0..prompt_len).map(|_| self.dice.below(u64::from(VOCAB)) as u32).collect(),
        };
        let tenant = if self.shares { self.share(&mut request) } else { None };
        let mut expected = alone(self.stages.len() as u32, context as u32, &request);
        if self.dice.below(3) == 0 && expected.0.len() > 1 {
            // It goes on where another replica was lost.
            let kept = 1 + self.dice.below(expected.0.len() as u64 - 1) as usize;
            request.tokens.extend(expected.0.drain(..kept));
            request.attempt = Attempt(2);
        }
        if deadlines && self.dice.below(3) == 0 {
            request.deadline_ms =
                if self.dice.below(2) == 0 { 1 + self.dice.below(60) } else { 1 << 40 };
        }
        let mut client = Client {
            request: request.clone(),
            expected,
            got: Vec::new(),
            deadline: None,
            cancelled: false,
            done: false,
        };
        if request.deadline_ms > 0 {
            client.deadline = Some(self.now + Duration::from_millis(request.deadline_ms));
        }
        self.clients.insert(key, client);
        self.tell(Event::Submit { key, request: Box::new(request), tenant });
    }

    /// Lets a request begin as one of few others does, or as the answer to an earlier one goes on.
    fn share(&mut self, request: &mut Generate) -> Option<Tenant> {
        let root = self.dice.below(2);
        let context = u64::from(self.config.context());
        let len = (17 + self.dice.below(50)).min(context - 1);
        let prompt = &mut request.tokens;
        prompt.clear();
        prompt.extend((0..len).map(|i| (mix(root, i) % u64::from(VOCAB)) as u32));
        request.prompt_len = len as u32;
        let other = self.dice.below(len.min(24)) as usize;
        for token in prompt.iter_mut().rev().take(other) {
            *token = self.dice.below(u64::from(VOCAB)) as u32;
        }
        let earlier = ClientKey(self.dice.below(self.clients.len().max(1) as u64));
        if self.dice.below(3) == 0
            && let Some(earlier) = self.clients.get(&earlier)
        {
            let turn = earlier.request.tokens.iter().chain(&earlier.got);
            prompt.iter_mut().zip(turn).for_each(|(token, before)| *token = *before);
        }
        request.adapter = [None, None, None, Some(AdapterId(1))][self.dice.below(4) as usize];
        [None, Some(Tenant(1)), Some(Tenant(2)), Some(Tenant(2))][self.dice.below(4) as usize]
    }

    fn cancel(&mut self) {
        let key = ClientKey(self.dice.below(self.clients.len().max(1) as u64));
        if let Some(client) = self.clients.get_mut(&key) {
            client.cancelled = !client.done;
            self.tell(Event::Cancel { key });
        }
    }

    /// Time goes on; the engine hears of each deadline when it has come.
    fn pass(&mut self, micros: u64) {
        let then = Instant(self.now.0 + micros);
        while let Some(deadline) = self.engine.next_deadline()
            && deadline <= then
        {
            self.now = deadline;
            self.tell(Event::Tick);
        }
        self.now = then;
    }

    fn advance_stage(&mut self, i: usize) -> bool {
        let (sent, samples, any) = self.stages[i].advance();
        if let (Some(frame), Some(next)) = (sent, self.stages.get_mut(i + 1)) {
            next.inbox.push_back(frame);
        }
        if i + 1 == self.stages.len() {
            self.samples.extend(samples);
        }
        any
    }

    fn deliver_samples(&mut self) -> bool {
        let Some(samples) = self.samples.pop_front() else { return false };
        self.in_flight_seen = self.in_flight_seen.max(self.engine.pipeline.len());
        self.tell(Event::Samples(samples));
        true
    }

    /// Once stage 0 has taken all that was sent, its table is the engine's view.
    fn compare_tables(&mut self) {
        while self.advance_stage(0) {}
        let engine: BTreeMap<SequenceId, (u32, &[u32])> = self
            .engine
            .sequences
            .values()
            .filter_map(|s| s.run())
            .map(|run| {
                // Of blocks that it shares the stages hear with its first rows.
                let told = if run.to_grant() == run.blocks.len() as u32 { 0 } else { run.issued() };
                (run.id, (told, run.blocks.as_slice()))
            })
            .collect();
        let stage: Vec<_> = self.stages[0].table.sequences().collect();
        assert_eq!(stage.len(), engine.len());
        for (id, length, blocks) in stage {
            let (issued, held) = engine[&id];
            assert_eq!(length, issued);
            assert!(held.starts_with(blocks));
        }
    }

    /// Submits this many in all, then lets everything finish.
    fn play(&mut self, submits: usize, interrupts: bool) {
        let mut idle = 0;
        while self.clients.len() < submits || !self.engine.is_idle() {
            let micros = 1 + self.dice.below(50);
            self.pass(micros);
            let moved = match self.dice.below(12) {
                0 if self.clients.len() < submits => {
                    self.submit(interrupts);
                    true
                }
                1 if interrupts && self.dice.below(4) == 0 => {
                    self.cancel();
                    false
                }
                2 if self.dice.below(8) == 0 => {
                    self.compare_tables();
                    false
                }
                3..=5 => self.deliver_samples(),
                n => self.advance_stage(n as usize % self.stages.len()),
            };
            idle = if moved { 0 } else { idle + 1 };
            assert!(idle < 2000, "nothing moves and {} sequences are left", self.clients.len());
        }
        while self.deliver_samples() || (0..self.stages.len()).any(|i| self.advance_stage(i)) {}
        for (key, client) in &self.clients {
            assert!(client.done || client.cancelled, "{key:?} has no end");
        }
        assert!(self.stages.iter().all(|stage| stage.table.is_empty()));
        let report = self.engine.report();
        assert_eq!((report.running, report.waiting, report.blocks_used), (0, 0, 0));
    }
}

fn limits(kv_blocks: u32, step_rows_max: u32, sequences_max: u32) -> ReplicaLimits {
    ReplicaLimits {
        kv_blocks,
        context_max: 100,
        step_rows_max,
        sequences_max,
        steps_in_flight_max: 5,
    }
}

#[test]
fn answers_are_those_of_sequences_that_run_alone() {
    for seed in 0..3 {
        for stages in [1, 2, 3] {
            let mut world = World::new(seed, stages, limits(60, 32, 8));
            world.play(40, false);
            assert!(world.in_flight_seen > stages as usize / 2);
            assert_eq!(world.engine.report().preemptions, 0);
        }
    }
}

#[test]
fn shortage_of_blocks_preempts_and_changes_no_token() {
    let mut preemptions = 0;
    for seed in 10..16 {
        // Six blocks hold 96 tokens: two middling sequences crowd each other out.
        let mut world = World::new(seed, 1 + seed as u32 % 3, limits(6, 24, 6));
        world.play(30, false);
        preemptions += world.engine.report().preemptions;
    }
    assert!(preemptions > 20, "only {preemptions} preemptions: the test shows nothing");
}

#[test]
fn cancellations_and_deadlines_leave_nothing_behind() {
    let mut expired = 0;
    for seed in 20..26 {
        let mut world = World::new(seed, 1 + seed as u32 % 4, limits(9, 16, 4));
        world.play(60, true);
        assert!(world.clients.values().filter(|client| client.cancelled).count() > 2);
        expired += world.expired;
    }
    assert!(expired > 10, "only {expired} deadlines passed: the test shows nothing");
}

#[test]
fn shared_beginnings_change_no_token() {
    let (mut reused, mut evictions, mut preemptions) = (0, 0, 0);
    for seed in 30..42 {
        // From room for all to so little that blocks are given away and sequences preempted.
        let kv_blocks = [60, 20, 9, 6][seed as usize % 4];
        let mut world = World::sharing(seed, 1 + seed as u32 % 3, limits(kv_blocks, 24, 6));
        world.play(60, seed % 2 == 0);
        reused += world.reused;
        let (prefixes, report) = (world.engine.prefixes(), world.engine.report());
        assert!(prefixes.hits >= world.reused as u64 && prefixes.lookups >= prefixes.hits);
        assert!(prefixes.tokens_asked >= prefixes.tokens_found);
        assert_eq!(prefixes.blocks_idle, prefixes.blocks_known, "nobody holds any");
        evictions += prefixes.evictions;
        preemptions += report.preemptions;
    }
    assert!(reused > 100, "only {reused} prompts began as others: the test shows nothing");
    assert!(evictions > 100 && preemptions > 20, "{evictions} and {preemptions}");
}

#[test]
fn the_smallest_replicas_work() {
    // One block; one row a step; one sequence; one step in flight.
    for (kv_blocks, step_rows_max, sequences_max, steps_in_flight_max) in
        [(1, 8, 3, 3), (4, 1, 4, 4), (7, 8, 1, 2), (5, 16, 4, 1)]
    {
        let limits = ReplicaLimits {
            steps_in_flight_max,
            ..limits(kv_blocks, step_rows_max, sequences_max)
        };
        World::new(u64::from(kv_blocks), 2, limits).play(12, true);
    }
}
