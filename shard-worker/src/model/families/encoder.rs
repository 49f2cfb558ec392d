//! Encoders: layers that see the whole input, and what makes one vector of its rows.
//!
//! ```text
//! BERT, RoBERTa  tokens + types + positions ─► norm ─┬─► attention ─┬─► + ─► norm ─┬─► mlp ─┬─► + ─► norm ─► …
//!                                                    └──────────────┘              └────────┘
//! ModernBERT     tokens ─► norm ─┬─► norm ─► attention ─┬─► + ─┬─► norm ─► mlp ─┬─► + ─► …  ─► norm
//!                                └──────────────────────┘      └────────────────┘
//! last stage     rows ─► pool ─► (length 1)   or   pool ─► dense ─► tanh | gelu, norm ─► scores (─► sigmoid)
//! ```
//!
//! Attention, MLP, rotation, scratch and the cut over tensor ranks are the decoders' own. An input goes
//! through a stage in one step and leaves nothing behind: keys and values are those of one layer of one
//! step, so all layers share one cache, and the blocks that the head grants are not looked at. A vector
//! stands where a decoder's logits would: one row for each input. Every rank has all rows of the stream,
//! so each of the last stage makes the whole vector, and rank 0 tells it.

use shoal_protocol::model::{
    Activation, EncoderFamily, EncoderOutput, EncoderSpec, ModelSpec, Part, Pooling, TensorRole,
};
use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaLimits};
use shoal_protocol::request::SECOND_TEXT;
use shoal_protocol::units::LayerRange;

use crate::backend::{EncodeOps, KvShape, Linear, Norm, Pool};
use crate::collective::Collective;
use crate::model::bounds::StepBounds;
use crate::model::families::LoadError;
use crate::model::families::layer::{Parts, norm_of};
use crate::model::layers::{Attention, Embedding, Mlp, PreNorm, Rope, Scratch};
use crate::model::weights::{Weights, WeightsError};
use crate::model::{Batch, ComputeError, Output, ShardModel, Span};

/// One stage of an encoder.
pub(super) struct Encoder<B: EncodeOps> {
    ops: B,
    bounds: StepBounds,
    input: Option<Input<B>>,
    rope: Rope<B>,
    layers: Vec<Layer<B>>,
    /// ModernBERT, on the last stage.
    final_norm: Option<Norm<B>>,
    head: Option<Head<B>>,
    scratch: Scratch<B>,
    kv: B::Kv,
    /// What ranks tell each other in a step is at most so wide.
    widest: usize,
    /// Kept for their memory.
    spans: Vec<Span<'static>>,
    blocks: Vec<u32>,
}

/// What stands in front of the layers.
struct Input<B: EncodeOps> {
    /// Absent on a rank that has no part of the vocabulary.
    table: Option<B::Weight>,
    /// What each rank of this stage holds; one entry where it is not cut.
    parts: Vec<Part>,
    /// Absent with rotary positions.
    positions: Option<B::Weight>,
    types: Option<B::Weight>,
    /// See [`EncoderSpec::pad_token`].
    pad_token: Option<u32>,
    norm: Norm<B>,
    /// Kept for their memory.
    tokens: Vec<u32>,
    rows: Vec<u32>,
}

struct Layer<B: EncodeOps> {
    /// BERT's norms stand behind what they belong to.
    post_norm: bool,
    attention_norm: PreNorm<B>,
    attention: Attention<B>,
    mlp_norm: PreNorm<B>,
    mlp: Mlp<B>,
}

/// What stands behind the layers: on the last stage.
struct Head<B: EncodeOps> {
    pool: Pool,
    normalize: bool,
    sigmoid: bool,
    scores: Option<Scores<B>>,
    pooled: B::Buf,
}

struct Scores<B: EncodeOps> {
    dense: Linear<B>,
    /// ModernBERT: a GELU and this; others: a tanh.
    norm: Option<Norm<B>>,
    classifier: Linear<B>,
    inner: B::Buf,
    out: B::Buf,
}

/// What an encoder is assembled from.
struct Assembly<'a, B: EncodeOps> {
    spec: &'a EncoderSpec,
    /// Its layers in the words of the families.
    sizes: ModelSpec,
    part: &'a Part,
    weights: Weights<B>,
}

impl<B: EncodeOps> Assembly<'_, B> {
    fn norm(
        &mut self,
        roles: (TensorRole, TensorRole),
        layer: Option<u32>,
    ) -> Result<Norm<B>, WeightsError> {
        norm_of(&self.sizes, &mut self.weights, roles, layer)
    }

    /// One of the last stage.
    fn linear(
        &mut self,
        (role, bias): (TensorRole, TensorRole),
    ) -> Result<Linear<B>, WeightsError> {
        let weight = self.weights.matrix(role, None)?;
        Ok(Linear { weight, bias: self.weights.vector(bias, None) })
    }

    fn input(&mut self) -> Result<Input<B>, WeightsError> {
        use TensorRole::*;
        let spec = self.spec;
        let mut table = |role, is_there: bool| -> Result<_, WeightsError> {
            if is_there { self.weights.matrix(role, None).map(Some) } else { Ok(None) }
        };
        Ok(Input {
            positions: table(PositionEmbedding, spec.positions > 0)?,
            types: table(TypeEmbedding, spec.types > 0)?,
            table: table(Embedding, !self.part.vocab.is_empty())?,
            parts: self.part.all(&self.sizes),
            pad_token: spec.pad_token,
            norm: self.norm((EmbeddingNorm, EmbeddingNormBias), None)?,
            tokens: Vec::new(),
            rows: Vec::new(),
        })
    }

    fn layer(&mut self, number: u32) -> Result<Layer<B>, WeightsError> {
        use TensorRole::*;
        let modern = self.spec.family == EncoderFamily::ModernBert;
        // ModernBERT's first layer reads what the embedding's norm left.
        let attention_norm = match modern && number == 0 {
            true => None,
            false => Some(self.norm((AttentionNorm, AttentionNormBias), Some(number))?),
        };
        let mlp_norm = self.norm((MlpNorm, MlpNormBias), Some(number))?;
        let Self { sizes, part, weights, .. } = self;
        let mut parts = Parts { spec: sizes, part, layer: number, weights };
        let mut attention = parts.attention()?;
        // As far behind a row as before it.
        attention.scores.ahead = attention.scores.window.map_or(u32::MAX, |window| window - 1);
        Ok(Layer {
            post_norm: !modern,
            attention_norm: PreNorm(attention_norm),
            attention,
            mlp_norm: PreNorm(Some(mlp_norm)),
            mlp: parts.mlp()?,
        })
    }

    fn head(&mut self, ops: &mut B, limits: &ReplicaLimits) -> Result<Head<B>, LoadError> {
        use TensorRole::*;
        let (spec, rows) = (self.spec, limits.sample_rows_max() as usize);
        let width = spec.hidden as usize;
        let pool_of = |pooling| match pooling {
            Pooling::Cls => Pool::First,
            Pooling::Mean => Pool::Mean,
            Pooling::LastToken => Pool::Last,
        };
        let pooled = ops.buffer(rows, width)?;
        Ok(match spec.output {
            EncoderOutput::Embedding { pooling, normalize } => {
                let pool = pool_of(pooling);
                Head { pool, normalize, sigmoid: false, scores: None, pooled }
            }
            EncoderOutput::Scores { labels, pooling, sigmoid } => {
                let norm = match spec.family {
                    EncoderFamily::ModernBert => Some(self.norm((PoolNorm, PoolNormBias), None)?),
                    _ => None,
                };
                let scores = Scores {
                    dense: self.linear((PoolDense, PoolDenseBias))?,
                    norm,
                    classifier: self.linear((Classifier, ClassifierBias))?,
                    inner: ops.buffer(rows, width)?,
                    out: ops.buffer(rows, labels as usize)?,
                };
                let pool = pool_of(pooling);
                Head { pool, normalize: false, sigmoid, scores: Some(scores), pooled }
            }
        })
    }
}

impl<B: EncodeOps> Encoder<B> {
    pub(super) fn assemble(
        mut ops: B,
        spec: &EncoderSpec,
        range: LayerRange,
        weights: Weights<B>,
        (limits, part): (&ReplicaLimits, &Part),
    ) -> Result<Self, LoadError> {
        let (is_first, is_last) = (range.start == 0, range.end == spec.layers);
        let sizes = spec.sizes();
        let mut all = Assembly { spec, sizes: sizes.clone(), part, weights };
        let input = if is_first { Some(all.input()?) } else { None };
        let layers = range.iter().map(|layer| all.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = match is_last && spec.family == EncoderFamily::ModernBert {
            true => Some(all.norm((TensorRole::FinalNorm, TensorRole::FinalNormBias), None)?),
            false => None,
        };
        let blocks = spec.scratch_blocks(limits);
        let kv_heads = part.widths(&sizes).kv_heads;
        let shape = KvShape { blocks, kv_heads, head_dim: spec.head_dim() };
        let width = is_last.then(|| spec.output_width());
        Ok(Self {
            bounds: StepBounds::new(limits, spec.hidden, width, is_first),
            input,
            rope: Rope::new(&ops, &sizes, limits.context_max)?,
            layers,
            final_norm,
            head: if is_last { Some(all.head(&mut ops, limits)?) } else { None },
            scratch: Scratch::new(&mut ops, &sizes, part, limits.step_rows_max as usize)?,
            kv: ops.kv(shape)?,
            widest: spec.hidden.max(spec.intermediate) as usize,
            spans: Vec::with_capacity(limits.sequences_max as usize),
            blocks: (0..blocks).collect(),
            ops,
        })
    }
}

impl<B: EncodeOps> Layer<B> {
    fn forward(
        &self,
        ops: &mut B,
        batch: &Batch<'_>,
        kv: &mut B::Kv,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let rows = batch.rows;
        let (as_it_is, norms) = (PreNorm(None), (&self.attention_norm, &self.mlp_norm));
        let before = if self.post_norm { (&as_it_is, &as_it_is) } else { norms };
        before.0.forward(ops, stream, rows, scratch)?;
        self.attention.forward(ops, batch, kv, (&mut *scratch, &mut *peers), stream)?;
        self.behind(ops, stream, rows, norms.0)?;
        before.1.forward(ops, stream, rows, scratch)?;
        self.mlp.forward(ops, rows, (scratch, peers), stream)?;
        self.behind(ops, stream, rows, norms.1)
    }

    /// BERT's norm of what attention or MLP has been added to.
    fn behind(
        &self,
        ops: &mut B,
        stream: &mut B::Stream<'_>,
        rows: usize,
        norm: &PreNorm<B>,
    ) -> Result<(), ComputeError> {
        match &norm.0 {
            Some(norm) if self.post_norm => ops.norm_stream(stream, rows, norm),
            _ => Ok(()),
        }
    }
}

impl<B: EncodeOps> Input<B> {
    /// Tokens, types and positions to the stream, in the order in which transformers adds them.
    fn forward(
        &mut self,
        ops: &mut B,
        (marked, spans): (&[u32], &[Span<'_>]),
        peers: &mut dyn Collective,
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let Self { tokens, rows, .. } = self;
        tokens.clear();
        tokens.extend(marked.iter().map(|token| token & !SECOND_TEXT));
        match &self.table {
            table if self.parts.len() > 1 => {
                let cut = (table.as_ref(), self.parts.as_slice());
                Embedding::forward_cut(ops, cut, tokens, peers, stream)?;
            }
            Some(table) => Embedding::forward(ops, table, tokens, stream)?,
            None => return Err(ComputeError::BadBatch("no table of tokens".to_owned())),
        }
        if let Some(types) = &self.types {
            rows.clear();
            rows.extend(marked.iter().map(|token| u32::from(token & SECOND_TEXT != 0)));
            ops.add_rows(rows, types, stream)?;
        }
        if let Some(positions) = &self.positions {
            rows.clear();
            for span in spans {
                let mut next = self.pad_token.map_or(0, |pad| pad + 1);
                for token in &tokens[span.first_row..span.first_row + span.rows] {
                    // Padding stands where padding stands, and is not counted.
                    match self.pad_token {
                        Some(pad) if *token == pad => rows.push(pad),
                        _ => {
                            rows.push(next);
                            next += 1;
                        }
                    }
                }
            }
            ops.add_rows(rows, positions, stream)?;
        }
        ops.norm_stream(stream, tokens.len(), &self.norm)
    }
}

impl<B: EncodeOps> Head<B> {
    /// One row of `out` for each span.
    fn forward(
        &mut self,
        ops: &mut B,
        spans: &[Span<'_>],
        stream: &B::Stream<'_>,
        out: &mut [f32],
    ) -> Result<(), ComputeError> {
        let rows = spans.len();
        ops.pool(stream, spans, self.pool, &mut self.pooled)?;
        let made = match &mut self.scores {
            None => ops.host(&mut self.pooled, rows)?,
            Some(scores) => {
                ops.linear(&self.pooled, rows, &scores.dense, &mut scores.inner)?;
                match &scores.norm {
                    Some(norm) => {
                        ops.activate(&mut scores.inner, rows, Activation::Gelu)?;
                        ops.head_norm(&mut scores.inner, rows, norm)?;
                    }
                    None => ops.tanh(&mut scores.inner, rows)?,
                }
                ops.linear(&scores.inner, rows, &scores.classifier, &mut scores.out)?;
                ops.host(&mut scores.out, rows)?
            }
        };
        if made.len() != out.len() {
            let (found, expected) = (out.len(), made.len());
            return Err(ComputeError::BadBatch(format!("room for {found} of {expected} numbers")));
        }
        out.copy_from_slice(made);
        if self.normalize && rows > 0 {
            out.chunks_exact_mut(out.len() / rows).for_each(to_length_one);
        }
        if self.sigmoid {
            let sigmoid = |x: f32| (1.0 / (1.0 + libm::exp(-f64::from(x)))) as f32;
            out.iter_mut().for_each(|score| *score = sigmoid(*score));
        }
        Ok(())
    }
}

/// As `torch.nn.functional.normalize`, in f64 and rounded once.
fn to_length_one(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let length = squares.sqrt().max(1e-12);
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}

impl<B: EncodeOps> ShardModel for Encoder<B> {
    fn hidden(&self) -> usize {
        self.bounds.hidden
    }

    fn vocab(&self) -> std::ops::Range<usize> {
        0..self.bounds.vocab.unwrap_or(0)
    }

    fn round_bytes_max(&self) -> usize {
        self.bounds.rows_max * self.widest * size_of::<f32>()
    }

    fn output(&self) -> Output {
        Output::Vectors
    }

    fn forward(
        &mut self,
        batch: &Batch<'_>,
        tokens: Option<&[u32]>,
        hidden: &mut [f32],
        logits: Option<&mut [f32]>,
        peers: &mut dyn Collective,
    ) -> Result<(), ComputeError> {
        self.bounds.check(batch, tokens, hidden, logits.as_deref())?;
        check_whole(batch)?;
        let Self { ops, scratch, kv, .. } = self;
        let spans = place(&mut self.spans, batch, &self.blocks)?;
        let own = Batch { spans: &spans, ..*batch };
        let mut stream = ops.enter(hidden, self.bounds.hidden)?;
        if let (Some(marked), Some(input)) = (tokens, &mut self.input) {
            input.forward(ops, (marked, &spans), &mut *peers, &mut stream)?;
        }
        self.rope.prepare(ops, &own, scratch)?;
        for layer in &self.layers {
            layer.forward(ops, &own, kv, (&mut *scratch, &mut *peers), &mut stream)?;
        }
        if let Some(norm) = &self.final_norm {
            ops.norm_stream(&mut stream, batch.rows, norm)?;
        }
        if let (Some(vectors), Some(head)) = (logits, &mut self.head) {
            head.forward(ops, &spans, &stream, vectors)?;
        }
        self.spans = give_back(spans);
        ops.leave(stream)
    }
}

/// Each span is a whole input, and what is wanted of it is one vector.
fn check_whole(batch: &Batch<'_>) -> Result<(), ComputeError> {
    let last = |span: &Span<'_>| span.first_row + span.rows - 1;
    let whole = batch.spans.iter().all(|span| span.first_position == 0);
    if whole && batch.spans.iter().map(last).eq(batch.sample_rows.iter().copied()) {
        return Ok(());
    }
    Err(ComputeError::BadBatch("an encoder takes whole inputs, each in one step".to_owned()))
}

/// The same spans, at blocks of the shared cache.
fn place<'a>(
    kept: &mut Vec<Span<'static>>,
    batch: &Batch<'_>,
    blocks: &'a [u32],
) -> Result<Vec<Span<'a>>, ComputeError> {
    let mut spans: Vec<Span<'a>> = std::mem::take(kept);
    let mut left = blocks;
    for span in batch.spans {
        let (mine, rest) = left
            .split_at_checked(span.rows.div_ceil(BLOCK_TOKENS as usize))
            .ok_or_else(|| ComputeError::BadBatch("more inputs than the plan has".to_owned()))?;
        spans.push(Span { blocks: mine, ..*span });
        left = rest;
    }
    Ok(spans)
}

/// Collecting an emptied vector into one of the same layout keeps its allocation.
fn give_back(mut spans: Vec<Span<'_>>) -> Vec<Span<'static>> {
    spans.clear();
    spans.into_iter().map(|span| Span { blocks: &[], ..span }).collect()
}
