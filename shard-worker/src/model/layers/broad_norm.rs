//! The norms of queries and keys: over each head, or over all heads at once, which tensor ranks have to
//! put together first.
//!
//! ```text
//! own queries, own keys ─► to every rank ─► all queries, all keys ─► norm ─► own ones
//! ```
//!
//! One round for both. A sum of squares would be a shorter message, but a sum of parts has other bits
//! than the one chain of contract n1; so both contracts gather.

use bytes::{Bytes, BytesMut};
use shoal_protocol::model::{ModelSpec, Part};

use crate::backend::{BackendError, FamilyOps, Norm, Ops};
use crate::collective::{Collective, CollectiveError};
use crate::model::ComputeError;

/// Those of an attention layer, where it has them.
pub struct HeadNorms<B: Ops> {
    /// Over each query head, or all at once.
    pub query: Option<Norm<B>>,
    /// Over each key head, or all at once.
    pub key: Option<Norm<B>>,
    /// Where a norm is over the heads of other ranks too.
    pub broad: Option<BroadNorm>,
}

/// By rank: the width of its queries and of its keys.
pub struct BroadNorm {
    widths: Vec<[usize; 2]>,
}

/// Scratch for queries and keys of all ranks; empty where nobody needs it.
pub(super) struct HeadsOfAll<B: Ops> {
    pair: Option<[B::Buf; 2]>,
}

impl<B: Ops> HeadsOfAll<B> {
    /// Scratch for rows of such widths.
    pub(super) fn new(
        ops: &mut B,
        (query, key): (u32, u32),
        rows_max: usize,
    ) -> Result<Self, BackendError> {
        if query == 0 {
            return Ok(Self { pair: None });
        }
        let mut buffer = |width: u32| ops.buffer(rows_max, width as usize);
        Ok(Self { pair: Some([buffer(query)?, buffer(key)?]) })
    }
}

impl BroadNorm {
    /// Of a rank of a model whose norms are over all heads; `None` where they are not, or nothing is cut.
    pub fn of(model: &ModelSpec, part: &Part) -> Option<Self> {
        if part.joint_widths(model).query == 0 {
            return None;
        }
        let head = model.head_dim as usize;
        let of = |part: &Part| [part.heads.len() * head, part.kv_heads.len() * head];
        Some(Self { widths: part.all(model).iter().map(of).collect() })
    }

    /// Fills `all` with what every rank has of queries and keys; `own` are this one's.
    fn gather(
        &self,
        peers: &mut dyn Collective,
        rows: usize,
        own: [&[f32]; 2],
        all: [&mut [f32]; 2],
    ) -> Result<(), CollectiveError> {
        let me = peers.split().rank as usize;
        let held: Bytes = {
            let mut held = BytesMut::with_capacity(own.iter().map(|x| size_of_val(*x)).sum());
            own.iter().for_each(|x| held.extend_from_slice(bytemuck::cast_slice(x)));
            held.freeze()
        };
        let mut from = peers.share(held.clone())?;
        from[me] = held;
        let [mut queries, mut keys] = all;
        let totals = [0, 1].map(|i| self.widths.iter().map(|widths| widths[i]).sum::<usize>());
        let mut first = [0, 0];
        for (rank, (widths, held)) in self.widths.iter().zip(&from).enumerate() {
            let expected = rows * (widths[0] + widths[1]) * size_of::<f32>();
            if held.len() != expected {
                let (rank, found) = (rank as u32, held.len());
                return Err(CollectiveError::WrongLength { rank, found, expected });
            }
            let mut values = held.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value));
            for (i, all) in [&mut queries, &mut keys].into_iter().enumerate() {
                for row in all.chunks_exact_mut(totals[i]).take(rows) {
                    let to = row[first[i]..][..widths[i]].iter_mut();
                    to.zip(&mut values).for_each(|(to, value)| *to = value);
                }
                first[i] += widths[i];
            }
        }
        Ok(())
    }
}

impl<B: FamilyOps> HeadNorms<B> {
    /// Normalises the queries and keys of this rank.
    pub(super) fn forward(
        &self,
        ops: &mut B,
        peers: &mut dyn Collective,
        rows: usize,
        (query, key): (&mut B::Buf, &mut B::Buf),
        all: &mut HeadsOfAll<B>,
    ) -> Result<(), ComputeError> {
        let Some(broad) = &self.broad else {
            if let Some(norm) = &self.query {
                ops.head_norm(query, rows, norm)?;
            }
            if let Some(norm) = &self.key {
                ops.head_norm(key, rows, norm)?;
            }
            return Ok(());
        };
        let Some([queries, keys]) = &mut all.pair else {
            return Err(ComputeError::BadBatch("no scratch for the heads of all ranks".to_owned()));
        };
        let own = [&*ops.host(query, rows)?, &*ops.host(key, rows)?];
        broad.gather(peers, rows, own, [ops.host(queries, rows)?, ops.host(keys, rows)?])?;
        let me = peers.split().rank as usize;
        let sides = [(0, &self.query, queries, query), (1, &self.key, keys, key)];
        for (i, norm, all, own) in sides {
            if let Some(norm) = norm {
                ops.head_norm(all, rows, norm)?;
            }
            let width = |ranks: &[[usize; 2]]| ranks.iter().map(|widths| widths[i]).sum::<usize>();
            let (first, total) = (width(&broad.widths[..me]), width(&broad.widths));
            let to = ops.host(own, rows)?.chunks_exact_mut(broad.widths[me][i].max(1));
            for (to, row) in to.zip(ops.host(all, rows)?.chunks_exact(total)) {
                to.copy_from_slice(&row[first..first + to.len()]);
            }
        }
        Ok(())
    }
}
