//! Neighbours that do not reach each other: other workers for the stages, or the same in another order.
//!
//! The stages form a ring: each sends to the next, and the last one's tokens go back to the first.

use std::collections::BTreeSet;

use shoal_protocol::id::NodeId;

use super::Candidate;
use super::placement::Cut;

/// The most choices that are tried: every order of six workers, and most where few pairs are cut.
const TRIES_MAX: usize = 20_000;

/// Pairs of workers that do not reach each other, the lower number first.
pub type Apart = BTreeSet<(NodeId, NodeId)>;

/// A pair as `Apart` holds it.
pub fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

/// Whether some stage would have to send to a worker that it does not reach.
pub fn is_torn(nodes: &[NodeId], apart: &Apart) -> bool {
    let next = nodes.iter().cycle().skip(1);
    nodes.len() > 1 && nodes.iter().zip(next).any(|(a, b)| apart.contains(&pair(*a, *b)))
}

/// A worker for each stage of a cut, no two neighbours of which are apart: for each stage the first of
/// its `choices` with which that is possible. `None` where none was found.
pub(super) fn arrange<'w>(
    cuts: &[Cut],
    choices: impl Fn(&Cut) -> Vec<&'w Candidate>,
    apart: &Apart,
) -> Option<Vec<&'w Candidate>> {
    let choices: Vec<_> = cuts.iter().map(choices).collect();
    let mut search = Search { apart, tries: 0 };
    let mut named = Vec::with_capacity(cuts.len());
    search.rest(&choices, &mut named).then_some(named)
}

struct Search<'a> {
    apart: &'a Apart,
    tries: usize,
}

impl Search<'_> {
    /// Names the workers of the stages behind those that are named.
    fn rest<'w>(&mut self, stages: &[Vec<&'w Candidate>], named: &mut Vec<&'w Candidate>) -> bool {
        let Some((stage, behind)) = stages.split_first() else {
            let nodes: Vec<_> = named.iter().map(|worker| worker.node).collect();
            return !is_torn(&nodes, self.apart);
        };
        for &worker in stage {
            self.tries += 1;
            if self.tries > TRIES_MAX {
                return false;
            }
            let taken = named.iter().any(|other| other.node == worker.node);
            let last = named.last().map(|last| pair(last.node, worker.node));
            if taken || last.is_some_and(|pair| self.apart.contains(&pair)) {
                continue;
            }
            named.push(worker);
            if self.rest(behind, named) {
                return true;
            }
            named.pop();
        }
        false
    }
}
