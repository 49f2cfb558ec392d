//! The pre-norm decoder: attention and a gated MLP, each behind a norm and added to the stream.

use shoal_protocol::model::{ModelSpec, Part, TensorRole};
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::units::LayerRange;

use crate::backend::{KvShape, Ops};
use crate::collective::Collective;
use crate::model::bounds::StepBounds;
use crate::model::families::LoadError;
use crate::model::layers::{Attention, Cut, Embedding, Head, Joined, Mlp, PreNorm, Rope, Scratch};
use crate::model::weights::{Weights, WeightsError};
use crate::model::{Batch, ComputeError, ShardModel};

/// One stage of a decoder.
pub(super) struct Decoder<B: Ops> {
    ops: B,
    bounds: StepBounds,
    /// On the first stage; on the last one too where it is tied to the output head. Of a rank that has
    /// no part of the vocabulary there is none.
    embedding: Option<B::Weight>,
    /// What each rank of this stage holds; one entry where it is not cut.
    parts: Vec<Part>,
    part: Part,
    /// What ranks tell each other in a step is at most so wide.
    widest: usize,
    rope: Rope<B>,
    layers: Vec<Layer<B>>,
    /// On the last stage: the norm, and the output head unless it is the embedding.
    head: Option<(Head<B>, Option<B::Weight>)>,
    scratch: Scratch<B>,
}

struct Layer<B: Ops> {
    attention_norm: PreNorm<B>,
    attention: Attention<B>,
    mlp_norm: PreNorm<B>,
    mlp: Mlp<B>,
    kv: B::Kv,
}

impl<B: Ops> Decoder<B> {
    pub(super) fn assemble(
        mut ops: B,
        spec: &ModelSpec,
        range: LayerRange,
        mut weights: Weights<B>,
        (limits, part): (&ReplicaLimits, &Part),
    ) -> Result<Self, LoadError> {
        let is_first = range.start == 0;
        let is_last = range.end == spec.layers;
        let vocabulary = |weights: &mut Weights<B>, role| -> Result<_, WeightsError> {
            if part.vocab.is_empty() { Ok(None) } else { weights.matrix(role, None).map(Some) }
        };
        let embedding =
            if is_first { vocabulary(&mut weights, TensorRole::Embedding)? } else { None };
        let layers = range
            .iter()
            .map(|layer| Layer::assemble(&mut ops, (spec, part), layer, &mut weights, limits))
            .collect::<Result<_, _>>()?;
        let head = if is_last {
            let norm = weights.norm(TensorRole::FinalNorm, None, spec.norm_eps)?;
            let shares_embedding = is_first && spec.tied_embeddings;
            let output = if shares_embedding {
                None
            } else {
                vocabulary(&mut weights, TensorRole::OutputHead)?
            };
            Some((Head { norm }, output))
        } else {
            None
        };
        Ok(Self {
            bounds: StepBounds::new(
                limits,
                spec.hidden,
                is_last.then_some(part.vocab.len() as u32),
                is_first,
            ),
            embedding,
            rope: Rope::new(&ops, spec)?,
            layers,
            head,
            scratch: Scratch::new(&mut ops, spec, part, limits.step_rows_max as usize)?,
            parts: part.all(spec),
            part: part.clone(),
            widest: spec.hidden.max(spec.query_width()).max(spec.intermediate) as usize,
            ops,
        })
    }
}

impl<B: Ops> Layer<B> {
    fn assemble(
        ops: &mut B,
        (spec, part): (&ModelSpec, &Part),
        layer: u32,
        weights: &mut Weights<B>,
        limits: &ReplicaLimits,
    ) -> Result<Self, LoadError> {
        use TensorRole::*;
        let norm = |weights: &mut Weights<B>, role| weights.norm(role, Some(layer), spec.norm_eps);
        let head_norm = |weights: &mut Weights<B>, role| -> Result<_, WeightsError> {
            if spec.qk_norm { norm(weights, role).map(Some) } else { Ok(None) }
        };
        let kv_heads = part.kv_heads.len() as u32;
        let shape = KvShape { blocks: limits.kv_blocks, kv_heads, head_dim: spec.head_dim };
        Ok(Self {
            attention_norm: PreNorm(norm(weights, AttentionNorm)?),
            attention: Attention {
                query: weights.linear((Query, QueryBias), layer)?,
                key: weights.linear((Key, KeyBias), layer)?,
                value: weights.linear((Value, ValueBias), layer)?,
                query_norm: head_norm(weights, QueryNorm)?,
                key_norm: head_norm(weights, KeyNorm)?,
                output: Joined::new(
                    weights.linear((AttentionOutput, AttentionOutputBias), layer)?,
                    part,
                    Cut::of_attention(spec, part),
                ),
                scale: Attention::<B>::scale_of(spec.head_dim),
            },
            mlp_norm: PreNorm(norm(weights, MlpNorm)?),
            mlp: Mlp {
                gate: weights.linear((Gate, GateBias), layer)?,
                up: weights.linear((Up, UpBias), layer)?,
                down: Joined::new(
                    weights.linear((Down, DownBias), layer)?,
                    part,
                    Cut::of_mlp(spec, part),
                ),
            },
            kv: ops.kv(shape)?,
        })
    }

    fn forward(
        &mut self,
        ops: &mut B,
        batch: &Batch<'_>,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        self.attention_norm.forward(ops, stream, batch.rows, scratch)?;
        self.attention.forward(ops, batch, &mut self.kv, (scratch, peers), stream)?;
        self.mlp_norm.forward(ops, stream, batch.rows, scratch)?;
        self.mlp.forward(ops, batch.rows, (scratch, peers), stream)
    }
}

impl<B: Ops> ShardModel for Decoder<B> {
    fn hidden(&self) -> usize {
        self.bounds.hidden
    }

    fn vocab(&self) -> std::ops::Range<usize> {
        match self.bounds.vocab {
            Some(_) => self.part.vocab.start as usize..self.part.vocab.end as usize,
            None => 0..0,
        }
    }

    fn round_bytes_max(&self) -> usize {
        self.bounds.rows_max * self.widest * size_of::<f32>()
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
        let Self { ops, scratch, .. } = self;
        let mut stream = ops.enter(hidden, self.bounds.hidden)?;
        match (tokens, &self.embedding) {
            (Some(tokens), table) if self.parts.len() > 1 => {
                let cut = (table.as_ref(), self.parts.as_slice());
                Embedding::forward_cut(ops, cut, tokens, peers, &mut stream)?;
            }
            (Some(tokens), Some(table)) => Embedding::forward(ops, table, tokens, &mut stream)?,
            _ => {}
        }
        self.rope.prepare(ops, batch, scratch)?;
        for layer in &mut self.layers {
            layer.forward(ops, batch, (&mut *scratch, &mut *peers), &mut stream)?;
        }
        if let (Some(logits), Some((head, output))) = (logits, &self.head)
            && let Some(output) = output.as_ref().or(self.embedding.as_ref())
        {
            head.forward(ops, output, &stream, batch.sample_rows, (scratch, logits))?;
        }
        ops.leave(stream)
    }
}
