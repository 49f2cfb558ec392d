//! The decoder of every family: embedding, [layers](super::layer), output head.

use std::ops::Range;

use shoal_protocol::id::AdapterId;
use shoal_protocol::model::{ModelSpec, Part, TensorRole};
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::units::LayerRange;

use crate::backend::FamilyOps;
use crate::collective::Collective;
use crate::model::adapters::{AdapterLoadError, AdapterSlices};
use crate::model::bounds::StepBounds;
use crate::model::families::LoadError;
use crate::model::families::layer::{Layer, Parts, final_norm};
use crate::model::layers::{Embedding, Head, Rope, Scratch};
use crate::model::weights::{Weights, WeightsError};
use crate::model::{Batch, ComputeError, ShardModel};

/// One stage of a decoder.
pub(super) struct Decoder<B: FamilyOps> {
    ops: B,
    bounds: StepBounds,
    /// On the first stage; on the last one too where it is tied to the output head. Of a rank that has
    /// no part of the vocabulary there is none.
    embedding: Option<B::Weight>,
    /// Multiplies its rows.
    embedding_multiplier: f32,
    /// What each rank of this stage holds; one entry where it is not cut.
    parts: Vec<Part>,
    part: Part,
    /// What ranks tell each other in a step is at most so wide.
    widest: usize,
    rope: Rope<B>,
    first_layer: u32,
    layers: Vec<Layer<B>>,
    /// On the last stage: the norm, and the output head unless it is the embedding.
    head: Option<(Head<B>, Option<B::Weight>)>,
    scratch: Scratch<B>,
}

impl<B: FamilyOps> Decoder<B> {
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
            .map(|layer| Parts { spec, part, layer, weights: &mut weights }.layer(&mut ops, limits))
            .collect::<Result<_, _>>()?;
        let head = if is_last {
            let norm = final_norm(spec, &mut weights)?;
            let shares_embedding = is_first && spec.tied_embeddings;
            let output = if shares_embedding {
                None
            } else {
                vocabulary(&mut weights, TensorRole::OutputHead)?
            };
            let multiplier = spec.options.logit_multiplier;
            Some((Head { norm, multiplier, softcap: spec.options.logit_softcap }, output))
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
            embedding_multiplier: spec.options.embedding_multiplier,
            rope: Rope::new(&ops, spec, limits.context_max)?,
            first_layer: range.start,
            layers,
            head,
            scratch: Scratch::new(&mut ops, spec, part, limits.step_rows_max as usize)?,
            parts: part.all(spec),
            part: part.clone(),
            widest: part.message_width(spec) as usize,
            ops,
        })
    }

    /// Makes no numbers of these rows.
    fn lose(ops: &mut B, lost: &[Range<usize>], width: usize, stream: &mut B::Stream<'_>) {
        for rows in lost {
            ops.host_stream(stream)[rows.start * width..rows.end * width].fill(f32::NAN);
        }
    }
}

impl<B: FamilyOps> ShardModel for Decoder<B> {
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
        if tokens.is_some() && self.embedding_multiplier != 1.0 {
            ops.scale_stream(&mut stream, batch.rows, self.embedding_multiplier)?;
        }
        self.rope.prepare(ops, batch, scratch)?;
        scratch.adapters.begin(batch.spans);
        // Before the layers, so that what the ranks exchange tells all of them, and behind the last one: no
        // row of it may look like an answer. Its sequence fails at the last stage; the others go on.
        Self::lose(ops, scratch.adapters.lost(), self.bounds.hidden, &mut stream);
        for (number, layer) in (self.first_layer..).zip(&mut self.layers) {
            scratch.adapters.enter(number);
            layer.forward(ops, batch, (&mut *scratch, &mut *peers), &mut stream)?;
        }
        Self::lose(ops, scratch.adapters.lost(), self.bounds.hidden, &mut stream);
        if let (Some(logits), Some((head, output))) = (logits, &self.head)
            && let Some(output) = output.as_ref().or(self.embedding.as_ref())
        {
            head.forward(ops, output, &stream, batch.sample_rows, (scratch, logits))?;
        }
        ops.leave(stream)
    }

    fn load_adapter(
        &mut self,
        id: AdapterId,
        slices: &AdapterSlices,
    ) -> Result<(), AdapterLoadError> {
        self.scratch.adapters.load(&mut self.ops, id, slices)
    }

    fn unload_adapter(&mut self, id: AdapterId) -> bool {
        self.scratch.adapters.unload(id)
    }
}
