//! ○ Whose word counts: the one of the latest leader that has told this worker what to be.
//!
//! A leader that was deposed and does not know it yet still talks to its workers. Each leader has an
//! epoch, greater than all before; what comes with a smaller one, or with the same from somebody else,
//! is not taken. Nothing of it is kept on disk: a worker that has just started is nothing, and the
//! generations of its shards come from the leader.

use shoal_protocol::id::NodeId;

/// The leader that was heard last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Orders {
    leader: Option<(u64, NodeId)>,
}

/// An order that is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{from} gives orders of epoch {epoch}, and {leader} has given some of epoch {later}; only the \
     latest leader is obeyed"
)]
pub struct Outranked {
    /// Who gave it.
    pub from: NodeId,
    /// As which leader.
    pub epoch: u64,
    /// Who has the last word.
    pub leader: NodeId,
    /// Its epoch.
    pub later: u64,
}

impl Orders {
    /// Whether an order is to be taken; from then on no earlier leader's is.
    pub fn admit(&mut self, from: NodeId, epoch: u64) -> Result<(), Outranked> {
        match self.leader {
            Some((later, leader)) if epoch < later || epoch == later && from != leader => {
                Err(Outranked { from, epoch, leader, later })
            }
            last => {
                if last != Some((epoch, from)) {
                    tracing::info!("{from} leads (epoch {epoch})");
                }
                self.leader = Some((epoch, from));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_leader_alone_is_obeyed() {
        let (c1, c2) = (NodeId::coordinator(1), NodeId::coordinator(2));
        let mut orders = Orders::default();
        let steps = [
            (c1, 3, true),
            (c1, 3, true),
            (c2, 3, false),
            (c2, 4, true),
            (c1, 3, false),
            (c1, 5, true),
        ];
        for (from, epoch, taken) in steps {
            assert_eq!(orders.admit(from, epoch).is_ok(), taken, "{from} {epoch}");
        }
        let words = orders.admit(c2, 4).unwrap_err().to_string();
        assert!(words.contains("c2") && words.contains("epoch 4"), "{words}");
        assert!(words.contains("c1") && words.contains("epoch 5"), "{words}");
    }
}
