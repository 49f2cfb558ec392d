//! ○ What computes: layers of hashes with a KV cache in the engine's own blocks, and the oracle.
//!
//! ```text
//! token ─► h ─► layer: slot[block of p][p % 16] = k(h, p, layer); h = mix(sum of all slots up to p)
//!            └► … ─► logits(h) ─► the real sampler ─► token
//! ```
//!
//! Each layer reads every slot of its sequence, by the block numbers that the stage's real table has.
//! So a block that two sequences share, a row that was left out or came twice, and a token that was
//! forgotten all change what follows. The oracle has no blocks, no stages and no attempts: it knows the
//! prompt and what it has drawn itself.

use shoal_protocol::id::TokenId;
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::request::SamplingRecord;
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::model::Span;
use shoal_shard_worker::sample::{SamplerState, Scratch};

use super::dice::mix;

/// Tokens of every simulated model.
pub const VOCAB: u32 = 32;

const SLOTS: usize = BLOCK_TOKENS as usize;

/// The KV cache of one stage.
pub struct Kv {
    layers: LayerRange,
    /// By layer of this stage, block, and position in the block.
    slots: Vec<[u64; SLOTS]>,
    blocks: usize,
}

impl Kv {
    /// An empty one.
    pub fn new(layers: LayerRange, blocks: u32) -> Self {
        let blocks = blocks as usize;
        let count = blocks * (layers.end - layers.start) as usize;
        Self { layers, slots: vec![[0; SLOTS]; count], blocks }
    }

    /// Computes the rows of one span in place.
    pub fn forward(&mut self, span: &Span<'_>, rows: &mut [u64]) {
        for (position, row) in (span.first_position as usize..).zip(rows) {
            for (at, layer) in (self.layers.start..self.layers.end).enumerate() {
                let base = at * self.blocks;
                let key = key_of(*row, position as u64, layer);
                let block = span.blocks[position / SLOTS] as usize;
                self.slots[base + block][position % SLOTS] = key;
                let mut sum = 0u64;
                for (nth, block) in span.blocks.iter().take(position / SLOTS + 1).enumerate() {
                    let end = (position + 1 - nth * SLOTS).min(SLOTS);
                    let slots = &self.slots[base + *block as usize];
                    sum = slots[..end].iter().fold(sum, |sum, slot| sum.wrapping_add(*slot));
                }
                *row = hidden_of(sum, layer);
            }
        }
    }
}

/// The hidden state of a token before the first layer.
pub fn embed(token: TokenId) -> u64 {
    mix(u64::from(token) + 1)
}

fn key_of(hidden: u64, position: u64, layer: u32) -> u64 {
    mix(hidden ^ position << 40 ^ u64::from(layer) << 32)
}

fn hidden_of(sum: u64, layer: u32) -> u64 {
    mix(sum ^ (u64::from(layer) + 1))
}

/// What the last layer says of the next token.
pub fn logits(hidden: u64, into: &mut Vec<f32>) {
    for token in 0..u64::from(VOCAB) {
        let bits = mix(hidden ^ (token + 1) << 48) >> 40;
        into.push(bits as f32 / (1u64 << 24) as f32 * 6.0);
    }
}

/// What every undisturbed cluster would say.
pub struct Oracle {
    sums: Vec<u64>,
    position: u64,
    hidden: u64,
    sampler: SamplerState,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl Oracle {
    /// Of a model of so many layers, after a prompt.
    pub fn new(layers: u32, prompt: &[TokenId], sampling: SamplingRecord) -> Self {
        let sampler = SamplerState::open(prompt.len() as u32, prompt, sampling);
        let mut oracle = Self {
            sums: vec![0; layers as usize],
            position: 0,
            hidden: 0,
            sampler,
            scratch: Scratch::default(),
            logits: Vec::new(),
        };
        prompt.iter().for_each(|token| oracle.feed(*token));
        oracle
    }

    fn feed(&mut self, token: TokenId) {
        self.hidden = embed(token);
        for (layer, sum) in (0..).zip(&mut self.sums) {
            *sum = sum.wrapping_add(key_of(self.hidden, self.position, layer));
            self.hidden = hidden_of(*sum, layer);
        }
        self.position += 1;
    }

    /// The next token, which counts as said.
    pub fn next(&mut self) -> Option<TokenId> {
        self.logits.clear();
        logits(self.hidden, &mut self.logits);
        let position = (self.position as u32).checked_sub(1)?;
        let drawn = self.sampler.draw(&mut self.scratch, &self.logits, position).ok()?;
        self.feed(drawn.token);
        Some(drawn.token)
    }
}
