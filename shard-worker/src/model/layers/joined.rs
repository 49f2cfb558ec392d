//! A projection whose input is cut over the ranks of a stage: attention's output, the MLP's `down`.
//! Behind it every rank has the whole result again.
//!
//! ```text
//! sum     own input ─► columns of the weight ─► partial sums of all outputs ─► all_reduce
//! exact   own input ─► all_gather ─► rows of the weight ─► own outputs, whole sums ─► all_gather
//! ```
//!
//! What the two promise: `docs/decisions/029-tensor-ranks.md`.

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{ModelSpec, Part, TensorRole};

use crate::backend::{BackendError, FamilyOps, Linear, Ops};
use crate::collective::Collective;
use crate::model::ComputeError;
use crate::model::adapters::Adapters;

/// The weight and the way.
pub struct Joined<B: Ops> {
    linear: Linear<B>,
    way: Way,
}

/// How the ranks' results become one.
enum Way {
    /// One rank has everything.
    Alone,
    /// Partial sums are added.
    Sum,
    /// By rank: the width of its input and of its outputs.
    Exact { inputs: Vec<usize>, outputs: Vec<usize> },
}

/// The width of what a rank computes, and of what it gathers.
pub struct Cut {
    /// By rank.
    inputs: Vec<usize>,
    /// By rank.
    outputs: Vec<usize>,
}

/// Scratch for gathering; empty where nothing is gathered.
pub struct Gathered<B: Ops> {
    /// The whole input, and this rank's outputs.
    pair: Option<(B::Buf, B::Buf)>,
}

impl<B: Ops> Gathered<B> {
    /// Scratch for inputs that are at most `width` wide on all ranks together, and `outputs` of this one;
    /// none where nothing is gathered.
    pub fn new(
        ops: &mut B,
        (width, outputs): (u32, u32),
        rows_max: usize,
    ) -> Result<Self, BackendError> {
        if width == 0 {
            return Ok(Self { pair: None });
        }
        let pair = (ops.buffer(rows_max, width as usize)?, ops.buffer(rows_max, outputs as usize)?);
        Ok(Self { pair: Some(pair) })
    }
}

impl Cut {
    /// Of attention's output: heads in, stream out.
    pub fn of_attention(model: &ModelSpec, part: &Part) -> Self {
        let width = (model.attention_width() / model.heads.max(1)) as usize;
        Self::of(model, part, |p| p.heads.len() * width)
    }

    /// Of the MLP's `down`.
    pub fn of_mlp(model: &ModelSpec, part: &Part) -> Self {
        Self::of(model, part, |p| p.intermediate.len())
    }

    /// Of the shared expert's `down`.
    pub fn of_shared(model: &ModelSpec, part: &Part) -> Self {
        Self::of(model, part, |p| p.shared.len())
    }

    fn of(model: &ModelSpec, part: &Part, input: impl Fn(&Part) -> usize) -> Self {
        let parts = part.all(model);
        Self {
            inputs: parts.iter().map(input).collect(),
            outputs: parts.iter().map(|p| p.hidden.len()).collect(),
        }
    }
}

impl<B: FamilyOps> Joined<B> {
    /// This rank's part of a projection.
    pub fn new(linear: Linear<B>, part: &Part, cut: Cut) -> Self {
        let way = match part.reduction {
            _ if part.split.is_whole() => Way::Alone,
            Reduction::Sum => Way::Sum,
            Reduction::Exact => Way::Exact { inputs: cut.inputs, outputs: cut.outputs },
        };
        Self { linear, way }
    }

    /// The projection of a stage that is not cut.
    pub fn whole(linear: Linear<B>) -> Self {
        Self { linear, way: Way::Alone }
    }

    /// `out[r] = weight · x[r] + bias` over all ranks; `x` is this rank's input.
    pub fn forward(
        &self,
        ops: &mut B,
        peers: &mut dyn Collective,
        input: (&mut B::Buf, usize),
        gathered: &mut Gathered<B>,
        out: &mut B::Buf,
    ) -> Result<(), ComputeError> {
        self.forward_with(ops, peers, input, (gathered, None), out)
    }

    /// The same with what adapters add to the projection of this role.
    pub fn forward_with(
        &self,
        ops: &mut B,
        peers: &mut dyn Collective,
        (x, rows): (&mut B::Buf, usize),
        (gathered, adapted): (&mut Gathered<B>, Option<(&mut Adapters<B>, TensorRole)>),
        out: &mut B::Buf,
    ) -> Result<(), ComputeError> {
        let adapt = |ops: &mut B, x: &B::Buf, out: &mut B::Buf| match adapted {
            Some((adapters, role)) => adapters.add(ops, role, x, out),
            None => Ok(()),
        };
        match (&self.way, &mut gathered.pair) {
            (Way::Alone, _) => {
                ops.linear(x, rows, &self.linear, out)?;
                adapt(ops, x, out)
            }
            (Way::Sum, _) => {
                ops.linear(x, rows, &self.linear, out)?;
                adapt(ops, x, out)?;
                Ok(peers.all_reduce(ops.host(out, rows)?)?)
            }
            (Way::Exact { inputs, outputs }, Some((whole, own))) => {
                ops.reshape(whole, inputs.iter().sum())?;
                peers.all_gather(ops.host(x, rows)?, inputs, rows, ops.host(whole, rows)?)?;
                ops.linear(whole, rows, &self.linear, own)?;
                adapt(ops, whole, own)?;
                Ok(peers.all_gather(ops.host(own, rows)?, outputs, rows, ops.host(out, rows)?)?)
            }
            (Way::Exact { .. }, None) => {
                Err(ComputeError::BadBatch("no scratch to gather inputs in".to_owned()))
            }
        }
    }

    /// The same, but for partial sums, which are left to the caller to add over the ranks.
    pub fn partial(
        &self,
        ops: &mut B,
        peers: &mut dyn Collective,
        (x, rows): (&mut B::Buf, usize),
        gathered: &mut Gathered<B>,
        out: &mut B::Buf,
    ) -> Result<(), ComputeError> {
        match self.way {
            Way::Sum => ops.linear(x, rows, &self.linear, out),
            _ => self.forward(ops, peers, (x, rows), gathered, out),
        }
    }
}
