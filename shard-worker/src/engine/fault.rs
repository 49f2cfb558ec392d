//! The end of a generation: a stage or a link is lost, or the stages broke the protocol.
//!
//! All that a loss means for sequences is decided here. Today each of them fails with
//! `WorkerLost`, which a coordinator may try again; going on from the surviving stages is to take the
//! place of `fail_generation`.

use shoal_protocol::error::{ErrorCode, WireError};

use super::{Action, Arrival, Ending, Engine};

impl Engine {
    /// The engine itself found that the generation cannot go on.
    pub(super) fn find_fault(&mut self, reason: String) {
        if self.fault.is_none() {
            self.fail_generation(reason.clone());
            self.actions.push_back(Action::Fault { reason });
        }
    }

    /// No step will come back: those in flight are dropped, every sequence fails, and so does what
    /// comes later. Frames that were not sent yet are dropped with their links.
    pub(super) fn fail_generation(&mut self, reason: String) {
        if self.fault.is_some() {
            return;
        }
        self.actions.retain(|action| match action {
            Action::Emit { .. } | Action::Fault { .. } => true,
            Action::Open(_) | Action::Issue { .. } | Action::Close(_) => false,
        });
        self.pipeline.clear();
        self.fault = Some(reason.clone());
        let error = WireError::new(ErrorCode::WorkerLost, reason);
        let all: Vec<Arrival> = self.sequences.keys().copied().collect();
        for arrival in all {
            self.end(arrival, Some(Ending::Failed(error.clone())));
        }
    }
}
