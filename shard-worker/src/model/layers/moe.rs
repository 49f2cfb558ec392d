//! A mixture of experts: a router chooses some MLPs for each row, and their results are summed in the
//! order of their ids.

use shoal_protocol::model::{Activation, Moe as Shape};

use crate::backend::{FamilyOps, Linear, Router};
use crate::model::ComputeError;
use crate::model::layers::{Merge, Scratch};

/// The projections of one expert.
pub struct Expert<B: FamilyOps> {
    /// `[moe intermediate, hidden]`.
    pub gate: Linear<B>,
    /// `[moe intermediate, hidden]`.
    pub up: Linear<B>,
    /// `[hidden, moe intermediate]`.
    pub down: Linear<B>,
    /// The intermediate width.
    pub width: usize,
}

/// The expert that every row uses.
pub struct Shared<B: FamilyOps> {
    /// Its projections.
    pub expert: Expert<B>,
    /// What weighs it, `[1, hidden]`.
    pub weight: Option<Linear<B>>,
}

/// See the module.
pub struct Moe<B: FamilyOps> {
    /// `[experts, hidden]`.
    pub router: Linear<B>,
    /// Added to scores for the choice.
    pub correction: Option<B::Vector>,
    /// How rows choose.
    pub shape: Shape,
    /// In the order of their ids.
    pub experts: Vec<Expert<B>>,
    /// For every row.
    pub shared: Option<Shared<B>>,
    /// The nonlinearity.
    pub act: Activation,
    /// How the sum comes into the stream.
    pub merge: Merge<B>,
}

impl<B: FamilyOps> Moe<B> {
    /// Adds the mixture of the normed rows in `scratch` to the stream.
    pub fn forward(
        &self,
        ops: &mut B,
        rows: usize,
        scratch: &mut Scratch<B>,
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let Scratch { normed, gate, up, router, routes, routed, sum, .. } = scratch;
        ops.reshape(router, self.shape.experts as usize)?;
        ops.linear(normed, rows, &self.router, router)?;
        let how = Router { moe: self.shape, correction: self.correction.as_ref() };
        ops.route(router, rows, &how, routes)?;
        ops.clear(sum, rows)?;
        for (id, expert) in (0..).zip(&self.experts) {
            let count = ops.gather(normed, rows, (routes, id), routed)?;
            if count > 0 {
                expert.inner(ops, (&*routed, count), self.act, (&mut *gate, &mut *up))?;
                ops.linear(gate, count, &expert.down, routed)?;
                ops.scatter_add(routed, rows, (routes, id), sum)?;
            }
        }
        if let Some(shared) = &self.shared {
            shared.expert.inner(ops, (&*normed, rows), self.act, (&mut *gate, &mut *up))?;
            ops.linear(gate, rows, &shared.expert.down, routed)?;
            if let Some(weight) = &shared.weight {
                ops.reshape(router, 1)?;
                ops.linear(normed, rows, weight, router)?;
            }
            ops.add_gated(routed, rows, shared.weight.as_ref().map(|_| &*router), sum)?;
        }
        std::mem::swap(normed, sum);
        self.merge.forward(ops, rows, scratch, stream)
    }
}

impl<B: FamilyOps> Expert<B> {
    /// Leaves `act(gate(x)) * up(x)` of the first `rows` rows in `gate`.
    fn inner(
        &self,
        ops: &mut B,
        (x, rows): (&B::Buf, usize),
        act: Activation,
        (gate, up): (&mut B::Buf, &mut B::Buf),
    ) -> Result<(), ComputeError> {
        ops.reshape(gate, self.width)?;
        ops.reshape(up, self.width)?;
        ops.linear(x, rows, &self.gate, gate)?;
        ops.linear(x, rows, &self.up, up)?;
        ops.gate(gate, up, rows, act)
    }
}
