//! Token ids to rows of the stream.

use bytes::Bytes;
use shoal_protocol::model::Part;

use crate::backend::Ops;
use crate::collective::{Collective, CollectiveError};
use crate::model::ComputeError;

/// The token embedding, `[vocab, hidden]`. The table may be shared with the output head.
pub struct Embedding;

impl Embedding {
    /// Writes the row of each token to the stream.
    pub fn forward<B: Ops>(
        ops: &mut B,
        table: &B::Weight,
        tokens: &[u32],
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        ops.embed(tokens, table, stream)
    }

    /// The same where the ranks of a stage have a part of the table each: the rows of a rank's tokens
    /// travel to the others as they are held, so that no bit depends on the cut.
    pub fn forward_cut<B: Ops>(
        ops: &mut B,
        (table, parts): (Option<&B::Weight>, &[Part]),
        tokens: &[u32],
        peers: &mut dyn Collective,
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let me = peers.split().rank as usize;
        let holder = |token: &u32| parts.iter().position(|part| part.vocab.contains(token));
        let holders: Vec<usize> = tokens
            .iter()
            .map(|token| {
                holder(token).ok_or_else(|| {
                    ComputeError::BadBatch(format!("token {token} beyond the vocabulary"))
                })
            })
            .collect::<Result<_, _>>()?;
        let own: Vec<u32> = tokens
            .iter()
            .zip(&holders)
            .filter(|(_, holder)| **holder == me)
            .map(|(token, _)| token - parts[me].vocab.start)
            .collect();
        if let Some(table) = table {
            ops.embed(&own, table, stream)?;
        }
        let rows = ops.host_stream(stream);
        let width = rows.len() / tokens.len().max(1);
        let held = Bytes::copy_from_slice(bytemuck::cast_slice(&rows[..own.len() * width]));
        let mut from = peers.share(held.clone())?;
        from[me] = held;
        let row_len = width * size_of::<f32>();
        for (rank, held) in from.iter().enumerate() {
            let expected = row_len * holders.iter().filter(|holder| **holder == rank).count();
            if held.len() != expected {
                let (rank, found) = (rank as u32, held.len());
                return Err(CollectiveError::WrongLength { rank, found, expected }.into());
            }
        }
        let rows: &mut [u8] = bytemuck::cast_slice_mut(rows);
        for (to, holder) in rows.chunks_exact_mut(row_len).zip(holders) {
            to.copy_from_slice(&from[holder].split_to(row_len));
        }
        Ok(())
    }
}
