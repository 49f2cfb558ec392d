//! One decoder layer, put together from the shared layers as the spec says.
//!
//! ```text
//! before    x + attn(norm(x)),        then the same with the MLP
//! after     x + norm(attn(x)),        then the same with the MLP
//! both      x + norm(attn(norm(x))),  then the same with the MLP
//! parallel  x + attn(norm(x)) + mlp(norm(x)), one norm for both
//! ```

use shoal_protocol::model::{
    LayerRope, Mla, ModelSpec, Moe as MoeShape, NormKind, Part, Placement, TensorRole,
};
use shoal_protocol::plan::ReplicaLimits;

use crate::backend::{FamilyOps, KvShape, Norm, Turn};
use crate::collective::Collective;
use crate::model::families::LoadError;
use crate::model::layers::{
    Attention, BroadNorm, Cut, Expert, HeadNorms, Holders, Inner, Joined, LatentAttention, Merge,
    Mlp, Moe, PreNorm, Scores, Scratch, Shared,
};
use crate::model::weights::{Weights, WeightsError};
use crate::model::{Batch, ComputeError};

/// The epsilon of DeepSeek's norms of compressed rows, whatever the config says of the others.
const LATENT_EPS: f32 = 1e-6;

/// See the module.
pub(super) struct Layer<B: FamilyOps> {
    attention_norm: PreNorm<B>,
    attention: AnyAttention<B>,
    /// `None` where the MLP stands beside attention.
    mlp_norm: Option<PreNorm<B>>,
    mlp: AnyMlp<B>,
    kv: B::Kv,
}

enum AnyAttention<B: FamilyOps> {
    Heads(Attention<B>),
    Latent(LatentAttention<B>),
}

enum AnyMlp<B: FamilyOps> {
    Dense(Mlp<B>),
    Experts(Moe<B>),
}

impl<B: FamilyOps> Layer<B> {
    pub(super) fn forward(
        &mut self,
        ops: &mut B,
        batch: &Batch<'_>,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let rows = batch.rows;
        self.attention_norm.forward(ops, stream, rows, scratch)?;
        match (&self.mlp_norm, &self.mlp) {
            (None, AnyMlp::Dense(mlp)) => {
                // Attention leaves its result where the normed rows are, so what the MLP needs of
                // them is taken first.
                mlp.first_half(ops, rows, scratch)?;
                let kv = &mut self.kv;
                self.attention.forward(ops, batch, kv, (&mut *scratch, &mut *peers), stream)?;
                mlp.second_half(ops, rows, (scratch, peers), stream)
            }
            (None, AnyMlp::Experts(_)) => {
                Err(ComputeError::BadBatch("experts beside attention".into()))
            }
            (Some(norm), mlp) => {
                let kv = &mut self.kv;
                self.attention.forward(ops, batch, kv, (&mut *scratch, &mut *peers), stream)?;
                norm.forward(ops, stream, rows, scratch)?;
                match mlp {
                    AnyMlp::Dense(mlp) => mlp.forward(ops, rows, (scratch, peers), stream),
                    AnyMlp::Experts(moe) => moe.forward(ops, rows, (scratch, peers), stream),
                }
            }
        }
    }
}

impl<B: FamilyOps> AnyAttention<B> {
    fn forward(
        &self,
        ops: &mut B,
        batch: &Batch<'_>,
        kv: &mut B::Kv,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        match self {
            AnyAttention::Heads(attention) => {
                attention.forward(ops, batch, kv, (scratch, peers), stream)
            }
            AnyAttention::Latent(attention) => {
                attention.forward(ops, batch, kv, (scratch, peers), stream)
            }
        }
    }
}

/// What a layer is put together from.
pub(super) struct Parts<'a, B: FamilyOps> {
    pub(super) spec: &'a ModelSpec,
    /// What this rank holds of it.
    pub(super) part: &'a Part,
    pub(super) layer: u32,
    pub(super) weights: &'a mut Weights<B>,
}

/// The norm in front of the output head.
pub(super) fn final_norm<B: FamilyOps>(
    spec: &ModelSpec,
    weights: &mut Weights<B>,
) -> Result<Norm<B>, WeightsError> {
    norm_of(spec, weights, (TensorRole::FinalNorm, TensorRole::FinalNormBias), None)
}

/// A norm of the kind that the spec says.
pub(super) fn norm_of<B: FamilyOps>(
    spec: &ModelSpec,
    weights: &mut Weights<B>,
    (role, bias): (TensorRole, TensorRole),
    layer: Option<u32>,
) -> Result<Norm<B>, WeightsError> {
    let norm = weights.norm(role, layer, spec.norm_eps)?;
    let centred = spec.options.norm == NormKind::Layer;
    Ok(Norm { centred, bias: weights.vector(bias, layer), ..norm })
}

impl<B: FamilyOps> Parts<'_, B> {
    /// The layer, with a cache for as many blocks as the replica has.
    pub(super) fn layer(
        mut self,
        ops: &mut B,
        limits: &ReplicaLimits,
    ) -> Result<Layer<B>, LoadError> {
        use TensorRole::{AttentionNorm, AttentionNormBias, MlpNorm, MlpNormBias};
        let spec = self.spec;
        let before = !matches!(spec.options.placement, Placement::After);
        let attention_norm = self.pre_norm(before, (AttentionNorm, AttentionNormBias))?;
        let attention = match spec.options.mla {
            Some(mla) => AnyAttention::Latent(self.latent(mla)?),
            None => AnyAttention::Heads(self.attention()?),
        };
        let mlp_norm = match spec.options.placement {
            Placement::Parallel => None,
            _ => Some(self.pre_norm(before, (MlpNorm, MlpNormBias))?),
        };
        let mlp = match spec.moe(self.layer) {
            Some(shape) => AnyMlp::Experts(self.moe(shape)?),
            None => AnyMlp::Dense(self.mlp()?),
        };
        let shape = KvShape {
            blocks: limits.kv_blocks,
            kv_heads: self.part.widths(spec).cache_heads(),
            head_dim: spec.cache_dim(),
        };
        Ok(Layer { attention_norm, attention, mlp_norm, mlp, kv: ops.kv(shape)? })
    }

    fn pre_norm(
        &mut self,
        is_there: bool,
        roles: (TensorRole, TensorRole),
    ) -> Result<PreNorm<B>, WeightsError> {
        if !is_there {
            return Ok(PreNorm(None));
        }
        norm_of(self.spec, self.weights, roles, Some(self.layer)).map(|norm| PreNorm(Some(norm)))
    }

    /// How a result comes into the stream; `role` is its norm, where there is one.
    fn merge(&mut self, role: TensorRole) -> Result<Merge<B>, WeightsError> {
        let normed = matches!(self.spec.options.placement, Placement::After | Placement::Both);
        let norm = if normed { Some(self.norm(role, self.spec.norm_eps)?) } else { None };
        Ok(Merge { norm, multiplier: self.spec.options.residual_multiplier })
    }

    fn norm(&mut self, role: TensorRole, eps: f32) -> Result<Norm<B>, WeightsError> {
        self.weights.norm(role, Some(self.layer), eps)
    }

    /// Which of the step's rotations the layer takes.
    fn rope(&self) -> Option<usize> {
        let rope = self.spec.layer(self.layer).rope;
        let found = self.spec.ropes().iter().position(|known| *known == rope);
        found.filter(|_| rope != LayerRope::None)
    }

    fn scores(&mut self) -> Scores<B> {
        Scores {
            scale: self.spec.attention_scale(),
            softcap: self.spec.options.attention_softcap,
            window: self.spec.layer(self.layer).window,
            ahead: 0,
            sinks: self.weights.vector(TensorRole::Sinks, Some(self.layer)),
        }
    }

    pub(super) fn attention(&mut self) -> Result<Attention<B>, WeightsError> {
        use TensorRole::*;
        let (spec, layer) = (self.spec, self.layer);
        let mut head_norm = |role| -> Result<_, WeightsError> {
            if spec.qk_norm { self.norm(role, spec.norm_eps).map(Some) } else { Ok(None) }
        };
        let (query, key) = (head_norm(QueryNorm)?, head_norm(KeyNorm)?);
        let norms = HeadNorms { query, key, broad: BroadNorm::of(spec, self.part) };
        let interleaved = spec.options.interleaved;
        let turn = Turn { interleaved, ..Turn::whole(spec.head_dim as usize) };
        Ok(Attention {
            query: self.weights.linear((Query, QueryBias), layer)?,
            key: self.weights.linear((Key, KeyBias), layer)?,
            value: self.weights.linear((Value, ValueBias), layer)?,
            norms,
            output: Joined::new(
                self.weights.linear((AttentionOutput, AttentionOutputBias), layer)?,
                self.part,
                Cut::of_attention(spec, self.part),
            ),
            rope: self.rope().map(|rope| (rope, turn)),
            scores: self.scores(),
            merge: self.merge(PostAttentionNorm)?,
        })
    }

    fn latent(&mut self, mla: Mla) -> Result<LatentAttention<B>, WeightsError> {
        use TensorRole::*;
        let (spec, layer) = (self.spec, self.layer);
        let query_down = match mla.q_rank {
            // None of these has a bias: a role that is nobody's stands for that.
            Some(_) => Some((
                self.weights.linear((QueryDown, QueryBias), layer)?,
                self.norm(QueryDownNorm, LATENT_EPS)?,
            )),
            None => None,
        };
        let mut of_heads = |role| -> Result<Vec<B::Weight>, WeightsError> {
            let heads = self.part.heads.clone();
            heads.map(|head| self.weights.matrix_of(role, Some(layer), head)).collect()
        };
        let (key_up, value_up) = (of_heads(KeyUp)?, of_heads(ValueUp)?);
        Ok(LatentAttention {
            query_down,
            query: self.weights.linear((Query, QueryBias), layer)?,
            kv_down: self.weights.linear((KvDown, KeyBias), layer)?,
            kv_norm: self.norm(KvDownNorm, LATENT_EPS)?,
            key_up,
            value_up,
            output: Joined::new(
                self.weights.linear((AttentionOutput, AttentionOutputBias), layer)?,
                self.part,
                Cut::of_attention(spec, self.part),
            ),
            kv_rank: mla.kv_rank as usize,
            parts: (mla.nope as usize, mla.rope as usize),
            rope: (self.rope().unwrap_or(0), spec.options.interleaved),
            scores: self.scores(),
            merge: self.merge(PostAttentionNorm)?,
        })
    }

    pub(super) fn mlp(&mut self) -> Result<Mlp<B>, WeightsError> {
        use TensorRole::*;
        let layer = self.layer;
        let gate = if self.spec.options.gated {
            Some(self.weights.linear((Gate, GateBias), layer)?)
        } else {
            None
        };
        Ok(Mlp {
            gate,
            up: self.weights.linear((Up, UpBias), layer)?,
            down: Joined::new(
                self.weights.linear((Down, DownBias), layer)?,
                self.part,
                Cut::of_mlp(self.spec, self.part),
            ),
            width: self.part.intermediate.len(),
            act: self.spec.options.activation,
            merge: self.merge(PostMlpNorm)?,
        })
    }

    fn moe(&mut self, shape: MoeShape) -> Result<Moe<B>, WeightsError> {
        use TensorRole::*;
        let (layer, part) = (self.layer, self.part);
        let width = shape.intermediate as usize;
        let mut expert = |id| -> Result<_, WeightsError> {
            let gate = self.weights.linear_of((ExpertGate, ExpertGateBias), layer, id)?;
            let up = self.weights.linear_of((ExpertUp, ExpertUpBias), layer, id)?;
            let down = self.weights.linear_of((ExpertDown, ExpertDownBias), layer, id)?;
            Ok(Expert { inner: Inner { gate, up, width }, down })
        };
        let experts = part.experts.clone().map(&mut expert).collect::<Result<_, _>>()?;
        let shared = if shape.shared.is_some() { Some(self.shared(shape)?) } else { None };
        Ok(Moe {
            router: self.weights.linear((Router, RouterBias), layer)?,
            correction: self.weights.vector(RouterCorrection, Some(layer)),
            shape,
            experts,
            holders: Holders::of(self.spec, part),
            shared,
            act: self.spec.options.activation,
            merge: self.merge(PostMlpNorm)?,
        })
    }

    /// The shared expert; it has no biases.
    fn shared(&mut self, shape: MoeShape) -> Result<Shared<B>, WeightsError> {
        use TensorRole::*;
        let (layer, part) = (self.layer, self.part);
        let inner = Inner {
            gate: self.weights.linear((SharedGate, GateBias), layer)?,
            up: self.weights.linear((SharedUp, UpBias), layer)?,
            width: part.shared.len(),
        };
        let down = self.weights.linear((SharedDown, DownBias), layer)?;
        let down = Joined::new(down, part, Cut::of_shared(self.spec, part));
        let weight = match shape.shared_gate {
            true => Some(self.weights.linear((SharedWeight, RouterBias), layer)?),
            false => None,
        };
        Ok(Shared { inner, down, weight })
    }
}
