//! Token ids to rows of the stream.

use crate::backend::Ops;
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
}
