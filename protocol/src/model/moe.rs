//! Mixtures of experts, and attention over a compressed cache: their sizes.

use serde::{Deserialize, Serialize};

use crate::model::spec::ModelSpec;

/// How a router's logits become the weights of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// The logistic function of each; a bias of each expert takes part in the choice alone.
    Sigmoid,
}

/// Experts are chosen within some groups of adjacent ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// How many groups.
    pub groups: u32,
    /// How many of them a row may use.
    pub kept: u32,
    /// A group's score is the sum of its best so many.
    pub best: u32,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moe {
    /// How many experts.
    pub experts: u32,
    /// How many of them a row uses.
    pub top_k: u32,
    /// The width of each.
    pub intermediate: u32,
    /// How they are scored.
    pub scoring: Scoring,
    /// Whether a row's weights are divided by their sum.
    pub normalise: bool,
    /// Multiplies them at the end.
    pub scale: f32,
    /// Where they are chosen from.
    pub groups: Option<Groups>,
    /// The width of the expert that every row uses.
    pub shared: Option<u32>,
    /// Whether that one has a gate of its own.
    pub shared_gate: bool,
    /// Biases on the router and on the experts' projections.
    pub bias: bool,
}

/// Attention whose cache is one compressed vector a position, shared by all heads, and a part with
/// the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mla {
    /// The width of the compressed query; `None` where it is not compressed.
    pub q_rank: Option<u32>,
    /// The width of the compressed key and value.
    pub kv_rank: u32,
    /// Dimensions of a query head without rotation.
    pub nope: u32,
    /// Dimensions with it.
    pub rope: u32,
    /// Dimensions of a value head.
    pub value: u32,
}

impl Mla {
    /// The width of what is cached of a position.
    pub fn cached(&self) -> u32 {
        self.kv_rank + self.rope
    }
}

impl ModelSpec {
    /// The key/value heads of the cache.
    pub fn cache_heads(&self) -> u32 {
        if self.options.mla.is_some() { 1 } else { self.kv_heads }
    }

    /// The width of one of them.
    pub fn cache_dim(&self) -> u32 {
        self.options.mla.map_or(self.head_dim, |mla| mla.cached())
    }

    /// The experts of a layer; `None` where its MLP is dense.
    pub fn moe(&self, layer: u32) -> Option<Moe> {
        self.options.moe.filter(|_| self.layer(layer).is_moe)
    }
}
