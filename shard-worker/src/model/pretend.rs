//! A model without weights: exact, seeded, with a modelled time.
//!
//! ```text
//! state(layer, p) = mix(seed, layer, p, input, state(layer, p - 1), ends of the blocks before p's)
//! input           = the token on layer 0, the state of the layer below on others
//! next token      = state(last layer, p) mod vocab
//! ```
//!
//! Each layer keeps its states in a paged cache and reads what came before from there, as attention
//! does: a wrong block, a wrong position, a lost row or a step that was computed twice on other data
//! changes the answer. It stands in for a real model in tests of everything around it: router,
//! engine, recovery, CLI.

use std::time::{Duration, Instant};

use shoal_protocol::model::{PRETEND_HIDDEN_MIN, Split};
use shoal_protocol::plan::{BLOCK_TOKENS, PretendSpec, ReplicaLimits};
use shoal_protocol::units::LayerRange;

use crate::collective::Collective;
use crate::model::bounds::StepBounds;
use crate::model::{Batch, ComputeError, ShardModel, Span};

const SLOTS: usize = BLOCK_TOKENS as usize;
/// The system's sleep is late by less than this; the rest of a modelled time is spun away.
const SLEEP_SLACK: Duration = Duration::from_micros(150);
/// The environment variable that makes the pretend models of one worker take so many times as long: a
/// gray failure, which answers right and late.
pub const SLOWER_VARIABLE: &str = "SHOAL_PRETEND_SLOWER";
/// Logits of all tokens but the next lie from 0 up to here, that of the next one lies above.
const NOISE_MAX: f32 = 4.0;
const PEAK: f32 = 12.0;

/// The token that follows `tokens`, worked out from the definition, without a cache.
///
/// `tokens` must not be empty: a model has nothing to continue then.
pub fn oracle(spec: &PretendSpec, tokens: &[u32]) -> u32 {
    let mut oracle = Oracle::new(spec);
    tokens.iter().fold(0, |_, &token| oracle.push(token))
}

/// The same for a sequence that grows.
#[derive(Clone, Debug)]
pub struct Oracle {
    spec: PretendSpec,
    /// The states so far, by layer.
    states: Vec<Vec<u64>>,
}

impl Oracle {
    /// Of an empty sequence.
    pub fn new(spec: &PretendSpec) -> Self {
        Self { spec: spec.clone(), states: vec![Vec::new(); spec.layers as usize] }
    }

    /// Appends a token and returns the one that follows.
    pub fn push(&mut self, token: u32) -> u32 {
        let mut state = first_input(token);
        for (layer, states) in self.states.iter_mut().enumerate() {
            let position = states.len();
            state = next_state(self.spec.seed, layer as u32, position, state, |p| states[p]);
            states.push(state);
        }
        token_of(state, self.spec.vocab)
    }
}

/// One stage of a pretend model.
#[derive(Debug)]
pub struct PretendShard {
    spec: PretendSpec,
    layers: LayerRange,
    bounds: StepBounds,
    split: Split,
    /// Each step takes so many times as long as the model says.
    slower: f64,
    /// By layer of this stage: `kv_blocks x BLOCK_TOKENS` states.
    cache: Vec<Vec<u64>>,
}

impl PretendShard {
    /// The stage with these layers. Its cache is real, its weights are not.
    pub fn new(spec: &PretendSpec, layers: LayerRange, limits: &ReplicaLimits) -> Self {
        Self::rank(spec, layers, Split::WHOLE, limits)
    }

    /// One rank of the stage. It computes what the others compute, in its share of the time, and each
    /// step they compare: a rank that is given other rows than its siblings stops the stage.
    pub fn rank(
        spec: &PretendSpec,
        layers: LayerRange,
        split: Split,
        limits: &ReplicaLimits,
    ) -> Self {
        let own = split.vocab(spec.vocab);
        let vocab = (layers.end == spec.layers).then_some(own.end - own.start);
        let positions = limits.kv_blocks as usize * SLOTS;
        Self {
            spec: spec.clone(),
            layers,
            bounds: StepBounds::new(limits, spec.hidden, vocab, layers.start == 0),
            split,
            slower: 1.0,
            cache: layers.iter().map(|_| vec![0; positions]).collect(),
        }
    }

    /// The same stage on a machine that takes so many times as long.
    #[must_use]
    pub fn slower(self, times: f64) -> Self {
        Self { slower: times, ..self }
    }

    /// All ranks must have the same rows now.
    fn compare(&self, hidden: &[f32], peers: &mut dyn Collective) -> Result<(), ComputeError> {
        if self.split.is_whole() {
            return Ok(());
        }
        let rows = hidden.chunks_exact(self.bounds.hidden);
        let states: Vec<u8> = rows.flat_map(|row| decode(row).unwrap_or(0).to_le_bytes()).collect();
        let got = peers.share(states.clone().into())?;
        let me = self.split.rank as usize;
        match (0..).zip(&got).find(|(rank, got)| *rank != me && **got != states) {
            Some((rank, _)) => {
                Err(ComputeError::Device(format!("rank {rank} has computed other rows")))
            }
            None => Ok(()),
        }
    }

    fn row(&mut self, span: &Span<'_>, position: usize, mut state: u64) -> u64 {
        let slot = |p: usize| span.blocks[p / SLOTS] as usize * SLOTS + p % SLOTS;
        for (layer, cache) in self.layers.iter().zip(&mut self.cache) {
            state = next_state(self.spec.seed, layer, position, state, |p| cache[slot(p)]);
            cache[slot(position)] = state;
        }
        state
    }
}

impl ShardModel for PretendShard {
    fn hidden(&self) -> usize {
        self.bounds.hidden
    }

    fn vocab(&self) -> std::ops::Range<usize> {
        match self.bounds.vocab {
            Some(_) => {
                let own = self.split.vocab(self.spec.vocab);
                own.start as usize..own.end as usize
            }
            None => 0..0,
        }
    }

    fn round_bytes_max(&self) -> usize {
        self.bounds.rows_max * size_of::<u64>()
    }

    fn forward(
        &mut self,
        batch: &Batch<'_>,
        tokens: Option<&[u32]>,
        hidden: &mut [f32],
        logits: Option<&mut [f32]>,
        peers: &mut dyn Collective,
    ) -> Result<(), ComputeError> {
        let start = Instant::now();
        self.bounds.check(batch, tokens, hidden, logits.as_deref())?;
        let width = self.bounds.hidden;
        for span in batch.spans {
            for i in 0..span.rows {
                let row = span.first_row + i;
                let values = &mut hidden[row * width..(row + 1) * width];
                let input = match tokens {
                    Some(tokens) => first_input(tokens[row]),
                    None => decode(values).ok_or_else(|| {
                        ComputeError::Device(format!("row {row} holds no pretend activations"))
                    })?,
                };
                let state = self.row(span, span.first_position as usize + i, input);
                encode(state, values);
            }
        }
        let own = self.vocab();
        if let Some(logits) = logits.filter(|_| !own.is_empty()) {
            for (&row, logits) in batch.sample_rows.iter().zip(logits.chunks_exact_mut(own.len())) {
                if let Some(state) = decode(&hidden[row * width..(row + 1) * width]) {
                    fill_logits(state, self.spec.vocab, own.start, logits);
                }
            }
        }
        let alone = modelled(&self.spec, self.layers, batch.rows) / self.split.ranks.max(1);
        wait_until(start + alone.mul_f64(self.slower));
        self.compare(hidden, peers)
    }
}

/// How long a stage takes for a step of so many rows.
pub fn modelled(spec: &PretendSpec, layers: LayerRange, rows: usize) -> Duration {
    let layer_ns = spec.layer_step_ns.saturating_add(spec.layer_row_ns.saturating_mul(rows as u64));
    Duration::from_nanos(layer_ns.saturating_mul(u64::from(layers.len())))
}

fn wait_until(deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now());
    if left > SLEEP_SLACK {
        #[expect(clippy::disallowed_methods, reason = "the passing of time is what is modelled")]
        std::thread::sleep(left - SLEEP_SLACK);
    }
    while Instant::now() < deadline {
        std::hint::spin_loop();
    }
}

fn first_input(token: u32) -> u64 {
    u64::from(token)
}

fn token_of(state: u64, vocab: u32) -> u32 {
    (mix(state, 1) % u64::from(vocab)) as u32
}

/// `read(p)` gives the layer's state at a position below `position`.
fn next_state(
    seed: u64,
    layer: u32,
    position: usize,
    input: u64,
    read: impl Fn(usize) -> u64,
) -> u64 {
    let place = (u64::from(layer) << 32) | position as u64;
    let mut state = mix(mix(seed, place), input);
    if position > 0 {
        state = mix(state, read(position - 1));
    }
    for block in 0..position / SLOTS {
        state = mix(state, read(block * SLOTS + SLOTS - 1));
    }
    state
}

/// The finaliser of SplitMix64 over both words.
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(25).wrapping_add(b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// 16 bits a float, exact, again and again over the row: a damaged float shows.
fn encode(state: u64, row: &mut [f32]) {
    for (i, value) in row.iter_mut().enumerate() {
        *value = f32::from((state >> (16 * (i % 4))) as u16);
    }
}

fn decode(row: &[f32]) -> Option<u64> {
    let mut state = 0;
    for (i, &value) in row.iter().take(PRETEND_HIDDEN_MIN as usize).enumerate() {
        state |= u64::from(value as u16) << (16 * i);
    }
    let is_whole =
        row.iter().enumerate().all(|(i, &v)| v == f32::from((state >> (16 * (i % 4))) as u16));
    is_whole.then_some(state)
}

/// `logits` are those of the tokens from `first` on.
fn fill_logits(state: u64, vocab: u32, first: usize, logits: &mut [f32]) {
    for (token, logit) in (first..).zip(logits.iter_mut()) {
        let noise = (mix(state, token as u64) >> 40) as f32 / (1u64 << 24) as f32;
        *logit = noise * NOISE_MAX;
    }
    let next = (token_of(state, vocab) as usize).checked_sub(first);
    if let Some(next) = next.and_then(|at| logits.get_mut(at)) {
        *next = PEAK;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Alone;

    const LIMITS: ReplicaLimits = ReplicaLimits {
        kv_blocks: 16,
        context_max: 128,
        step_rows_max: 64,
        sequences_max: 4,
        steps_in_flight_max: 1,
    };

    fn spec() -> PretendSpec {
        PretendSpec {
            layers: 6,
            hidden: 6,
            vocab: 101,
            max_context: 128,
            seed: 7,
            layer_step_ns: 0,
            layer_row_ns: 0,
            layer_weight_bytes: 0,
        }
    }

    fn stages(cuts: &[u32]) -> Vec<PretendShard> {
        let spec = spec();
        cuts.windows(2)
            .map(|c| PretendShard::new(&spec, LayerRange::new(c[0], c[1]), &LIMITS))
            .collect()
    }

    /// Takes rows from `first` on through all stages; `None` where a stage refuses.
    fn step(
        stages: &mut [PretendShard],
        tokens: &[u32],
        first: usize,
        blocks: &[u32],
    ) -> Option<u32> {
        let rows = tokens.len();
        let spans =
            [Span { first_row: 0, rows, first_position: first as u32, blocks, adapter: None }];
        let batch = Batch { spans: &spans, rows, sample_rows: &[rows - 1] };
        let mut hidden = vec![0.0; rows * 6];
        let mut logits = vec![0.0; 101];
        for stage in stages {
            let (first, last) = (stage.layers.start == 0, !stage.vocab().is_empty());
            let tokens = first.then_some(tokens);
            let logits = last.then_some(logits.as_mut_slice());
            stage.forward(&batch, tokens, &mut hidden, logits, &mut Alone).ok()?;
        }
        (0..101u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]))
    }

    /// Greedy tokens after the prompt, which is cut into chunks.
    fn run(cuts: &[u32], prompt: &[u32], chunk: usize, blocks: &[u32]) -> Vec<u32> {
        let mut stages = stages(cuts);
        let mut tokens = prompt.to_vec();
        let mut done = 0;
        let mut next = 0;
        while tokens.len() < prompt.len() + 24 {
            let end = (done + chunk).min(tokens.len());
            next = step(&mut stages, &tokens[done..end], done, blocks).expect("a step");
            done = end;
            if done == tokens.len() {
                tokens.push(next);
            }
        }
        assert_ne!(next, 0x7fff_ffff);
        tokens[prompt.len()..].to_vec()
    }

    fn expected(prompt: &[u32]) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        for _ in 0..24 {
            tokens.push(oracle(&spec(), &tokens));
        }
        tokens[prompt.len()..].to_vec()
    }

    #[test]
    fn every_split_and_chunk_gives_what_the_oracle_says() {
        let prompt: Vec<u32> = (0..40).map(|i| i * 13 % 101).collect();
        let expected = expected(&prompt);
        for cuts in [&[0, 6][..], &[0, 3, 6], &[0, 1, 5, 6], &[0, 1, 2, 3, 4, 5, 6]] {
            for chunk in [1, 3, 7, 64] {
                assert_eq!(run(cuts, &prompt, chunk, &[9, 2, 4, 0, 15]), expected, "{cuts:?}");
            }
        }
    }

    #[test]
    fn a_wrong_block_or_position_changes_the_answer() {
        let prompt: Vec<u32> = (0..40).collect();
        let right = expected(&prompt)[0];
        let blocks = [3, 1, 2];
        let last = &prompt[39..];
        // Each is the last token after the others were computed in the right blocks.
        let after = |blocks_now: &[u32], position: usize, damage: &dyn Fn(&mut [PretendShard])| {
            let mut stages = stages(&[0, 2, 6]);
            step(&mut stages, &prompt[..39], 0, &blocks).expect("a step");
            damage(&mut stages);
            step(&mut stages, last, position, blocks_now).expect("a step")
        };
        assert_eq!(after(&blocks, 39, &|_| ()), right);
        assert_ne!(after(&[4, 1, 2], 39, &|_| ()), right, "the first block");
        assert_ne!(after(&[1, 3, 2], 39, &|_| ()), right, "two blocks exchanged");
        assert_ne!(after(&[3, 1, 5], 39, &|_| ()), right, "the current block");
        assert_ne!(after(&blocks, 38, &|_| ()), right, "the position");
        let at_last_stage = |stages: &mut [PretendShard]| stages[1].cache[0][3 * 16 + 15] ^= 1;
        assert_ne!(after(&blocks, 39, &at_last_stage), right, "the last stage's cache");
    }

    #[test]
    fn activations_that_are_damaged_are_refused() {
        let mut last = stages(&[3, 6]);
        let mut hidden = [0.0; 6];
        encode(0x0123_4567_89ab_cdef, &mut hidden);
        let spans =
            [Span { first_row: 0, rows: 1, first_position: 0, blocks: &[0], adapter: None }];
        let batch = Batch { spans: &spans, rows: 1, sample_rows: &[] };
        assert_eq!(decode(&hidden), Some(0x0123_4567_89ab_cdef));
        for damage in [0.5, -1.0, f32::NAN, 65536.0] {
            let mut damaged = hidden;
            damaged[5] = damage;
            let result = last[0].forward(&batch, None, &mut damaged, None, &mut Alone);
            assert!(matches!(result, Err(ComputeError::Device(_))), "{damage}");
        }
        assert_eq!(last[0].forward(&batch, None, &mut hidden, None, &mut Alone), Ok(()));
    }

    #[test]
    fn a_step_takes_its_modelled_time() {
        let spec = PretendSpec { layer_step_ns: 1_000_000, layer_row_ns: 100_000, ..spec() };
        let mut shard = PretendShard::new(&spec, LayerRange::new(0, 2), &LIMITS);
        let spans =
            [Span { first_row: 0, rows: 10, first_position: 0, blocks: &[0], adapter: None }];
        let batch = Batch { spans: &spans, rows: 10, sample_rows: &[] };
        let start = Instant::now();
        shard.forward(&batch, Some(&[1; 10]), &mut [0.0; 60], None, &mut Alone).expect("a step");
        assert_eq!(modelled(&spec, LayerRange::new(0, 2), 10), Duration::from_millis(4));
        assert!(start.elapsed() >= Duration::from_millis(4));
    }
}
