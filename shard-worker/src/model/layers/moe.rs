//! A mixture of experts: a router chooses some MLPs for each row, and their results are summed in the
//! order of their ids.
//!
//! Tensor ranks have whole experts, in the order of their ids, and a part of the shared one's width. Every
//! rank works out alike which rows go where, so that no message says it.
//!
//! ```text
//! sum     own experts, own part of the shared one ─► partial sums ─► all_reduce
//! exact   own experts ─► each result to every rank ─► summed in the order of ids, as one rank does
//! ```

use std::ops::Range;

use bytes::{Buf as _, Bytes, BytesMut};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Activation, ModelSpec, Moe as Shape, Part};

use crate::backend::{FamilyOps, Linear, Router};
use crate::collective::{Collective, CollectiveError};
use crate::model::ComputeError;
use crate::model::layers::{Joined, Merge, Scratch};

/// The projections of one expert.
pub struct Expert<B: FamilyOps> {
    /// `gate` and `up`.
    pub inner: Inner<B>,
    /// `[hidden, moe intermediate]`.
    pub down: Linear<B>,
}

/// The first half of an expert.
pub struct Inner<B: FamilyOps> {
    /// `[moe intermediate, hidden]`.
    pub gate: Linear<B>,
    /// `[moe intermediate, hidden]`.
    pub up: Linear<B>,
    /// The intermediate width.
    pub width: usize,
}

/// The expert that every row uses.
pub struct Shared<B: FamilyOps> {
    /// `gate` and `up`.
    pub inner: Inner<B>,
    /// `[hidden, shared intermediate]`.
    pub down: Joined<B>,
    /// What weighs it, `[1, hidden]`.
    pub weight: Option<Linear<B>>,
}

/// Which rank has which experts, and how their results become one.
pub enum Holders {
    /// One rank has all.
    Alone,
    /// Partial sums are added; this rank's experts begin with that id.
    Sum {
        /// It.
        first: u32,
    },
    /// By rank: ids of experts.
    Exact(Vec<Range<u32>>),
}

/// See the module.
pub struct Moe<B: FamilyOps> {
    /// `[experts, hidden]`.
    pub router: Linear<B>,
    /// Added to scores for the choice.
    pub correction: Option<B::Vector>,
    /// How rows choose.
    pub shape: Shape,
    /// Those of this rank, in the order of their ids.
    pub experts: Vec<Expert<B>>,
    /// Who has the others.
    pub holders: Holders,
    /// For every row.
    pub shared: Option<Shared<B>>,
    /// The nonlinearity.
    pub act: Activation,
    /// How the sum comes into the stream.
    pub merge: Merge<B>,
}

impl Holders {
    /// Of the experts of a model.
    pub fn of(model: &ModelSpec, part: &Part) -> Self {
        match part.reduction {
            _ if part.split.is_whole() => Holders::Alone,
            Reduction::Sum => Holders::Sum { first: part.experts.start },
            Reduction::Exact => {
                Holders::Exact(part.all(model).into_iter().map(|part| part.experts).collect())
            }
        }
    }
}

impl<B: FamilyOps> Moe<B> {
    /// Adds the mixture of the normed rows in `scratch` to the stream.
    pub fn forward(
        &self,
        ops: &mut B,
        rows: usize,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let Scratch { normed, router, routes, sum, .. } = &mut *scratch;
        ops.reshape(router, self.shape.experts as usize)?;
        ops.linear(normed, rows, &self.router, router)?;
        let how = Router { moe: self.shape, correction: self.correction.as_ref() };
        ops.route(router, rows, &how, routes)?;
        ops.clear(sum, rows)?;
        match &self.holders {
            Holders::Alone => self.add_own(ops, rows, 0, scratch)?,
            Holders::Sum { first } => self.add_own(ops, rows, *first, scratch)?,
            Holders::Exact(holders) => self.add_all(ops, rows, holders, (scratch, peers))?,
        }
        if let Some(shared) = &self.shared {
            shared.add(ops, rows, self.act, (scratch, peers))?;
        }
        if matches!(self.holders, Holders::Sum { .. }) {
            peers.all_reduce(ops.host(&mut scratch.sum, rows)?)?;
        }
        std::mem::swap(&mut scratch.normed, &mut scratch.sum);
        self.merge.forward(ops, rows, scratch, stream)
    }

    /// Adds the results of this rank's experts, the first of which has the id `first`, to the sum.
    fn add_own(
        &self,
        ops: &mut B,
        rows: usize,
        first: u32,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ComputeError> {
        for (id, expert) in (first..).zip(&self.experts) {
            if expert.forward(ops, (rows, id), self.act, scratch)? > 0 {
                let Scratch { routes, routed, sum, .. } = &mut *scratch;
                ops.scatter_add(routed, rows, (routes, id), sum)?;
            }
        }
        Ok(())
    }

    /// Adds the results of the experts of all ranks in the order of their ids.
    fn add_all(
        &self,
        ops: &mut B,
        rows: usize,
        holders: &[Range<u32>],
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
    ) -> Result<(), ComputeError> {
        let me = peers.split().rank as usize;
        let own_bytes = self.result_bytes(ops, rows, holders[me].clone(), scratch)?;
        let mut own = BytesMut::with_capacity(own_bytes);
        for (id, expert) in holders[me].clone().zip(&self.experts) {
            let count = expert.forward(ops, (rows, id), self.act, scratch)?;
            let results = ops.host(&mut scratch.routed, count)?;
            own.extend_from_slice(bytemuck::cast_slice(results));
        }
        let own = own.freeze();
        let mut from = peers.share(own.clone())?;
        from[me] = own;
        for (rank, (results, holder)) in (0..).zip(from.iter_mut().zip(holders)) {
            let found = results.len();
            let expected = self.result_bytes(ops, rows, holder.clone(), scratch)?;
            if found != expected {
                return Err(CollectiveError::WrongLength { rank, found, expected }.into());
            }
            for id in holder.clone() {
                let Scratch { routes, routed, sum, .. } = &mut *scratch;
                let count = chosen(ops.host(routes, rows)?, self.shape.top_k, id..id + 1);
                if count > 0 {
                    take(results, ops.host(routed, count)?);
                    ops.scatter_add(routed, rows, (routes, id), sum)?;
                }
            }
        }
        Ok(())
    }

    /// The bytes of the results of some experts.
    fn result_bytes(
        &self,
        ops: &mut B,
        rows: usize,
        experts: Range<u32>,
        scratch: &mut Scratch<B>,
    ) -> Result<usize, ComputeError> {
        let width = ops.host(&mut scratch.routed, 1)?.len();
        let count = chosen(ops.host(&mut scratch.routes, rows)?, self.shape.top_k, experts);
        Ok(count * width * size_of::<f32>())
    }
}

/// How many rows chose these experts, a row counted once for each; see [`FamilyOps::route`].
fn chosen(routes: &[f32], top_k: u32, experts: Range<u32>) -> usize {
    let top_k = top_k as usize;
    let experts = experts.start as f32..experts.end as f32;
    let of = |route: &[f32]| route[..top_k].iter().filter(|id| experts.contains(id)).count();
    routes.chunks_exact(2 * top_k).map(of).sum()
}

/// Takes as many values as there is room for; they need not be aligned.
fn take(from: &mut Bytes, to: &mut [f32]) {
    let bytes = from.split_to(size_of_val(to).min(from.remaining()));
    let values = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value));
    to.iter_mut().zip(values).for_each(|(to, value)| *to = value);
}

impl<B: FamilyOps> Expert<B> {
    /// Leaves the results of the rows that chose this expert in `routed`; how many they are.
    fn forward(
        &self,
        ops: &mut B,
        (rows, id): (usize, u32),
        act: Activation,
        scratch: &mut Scratch<B>,
    ) -> Result<usize, ComputeError> {
        let Scratch { normed, gate, up, routes, routed, .. } = scratch;
        let count = ops.gather(normed, rows, (routes, id), routed)?;
        if count > 0 {
            self.inner.forward(ops, (&*routed, count), act, (&mut *gate, up))?;
            ops.linear(gate, count, &self.down, routed)?;
        }
        Ok(count)
    }
}

impl<B: FamilyOps> Shared<B> {
    /// Adds its results to the sum; of tensor ranks that add partial sums its part of them.
    fn add(
        &self,
        ops: &mut B,
        rows: usize,
        act: Activation,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
    ) -> Result<(), ComputeError> {
        let Scratch { normed, gate, up, router, routed, sum, gated_by_all, .. } = scratch;
        self.inner.forward(ops, (&*normed, rows), act, (&mut *gate, up))?;
        self.down.partial(ops, peers, (gate, rows), gated_by_all, routed)?;
        if let Some(weight) = &self.weight {
            ops.reshape(router, 1)?;
            ops.linear(normed, rows, weight, router)?;
        }
        ops.add_gated(routed, rows, self.weight.as_ref().map(|_| &*router), sum)
    }
}

impl<B: FamilyOps> Inner<B> {
    /// Leaves `act(gate(x)) * up(x)` of the first `rows` rows in `gate`.
    fn forward(
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
