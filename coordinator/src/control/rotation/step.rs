//! ○ The next step of a rotation of the CA, and whom it waits for.
//!
//! | what stands in the state | what is waited for | then |
//! |---|---|---|
//! | begun | each coordinator has the key and believes the new CA, each connected worker believes it | `Sign` |
//! | begun, and nobody has the key any more, or somebody who was removed may have it | | `Abandon` |
//! | it signs | each member shows a certificate of it, or 24 h have passed | `Retire` |
//! | over, and a coordinator was removed meanwhile | | another one begins ([`super::CaServer`]) |
//!
//! A coordinator that has not come so far within [`COORDINATOR_PATIENCE`] is taken for one that is off, as
//! long as most of them hold the key. It loses nothing: what is signed with the new key comes with the
//! proof of it that the old one made.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::trust::CaFingerprint;

use crate::control::state::{
    AuthorityCommand, CaStep, ClusterState, LEAVING_MAX, Rotation, Timestamp,
};

/// How long a coordinator that is there may take: many elections, and a few retries after each.
pub const COORDINATOR_PATIENCE: Duration = Duration::from_secs(10);

/// A worker, as far as it concerns its certificates.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SeenWorker {
    /// Whether it is there.
    pub connected: bool,
    /// The CAs that it said that it believes.
    pub trusts: Vec<CaFingerprint>,
    /// The CA of the certificate that it said that it shows.
    pub shows: Option<CaFingerprint>,
}

/// What is to be done, or waited for.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Verdict {
    /// What to propose.
    pub commands: Vec<AuthorityCommand>,
    /// What is waited for, for people.
    pub waits: String,
    /// Whom.
    pub waits_for: Vec<NodeId>,
}

/// Looks at everything there is.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The replicated state.
    pub state: &'a ClusterState,
    /// The coordinators that are to hold the CA's key.
    pub entitled: &'a BTreeSet<NodeId>,
    /// The workers that have been here.
    pub workers: &'a BTreeMap<NodeId, SeenWorker>,
    /// The time by which the state's stamps were made, and no earlier than any of them.
    pub now: Timestamp,
    /// How long the rotation has been seen where it stands, by a clock that nobody sets: the stamps are of
    /// the clock of whoever led then.
    pub seen_for: Duration,
    /// Whether the workers that are there have had the time to come to this coordinator since it leads:
    /// before, those that have not are not off.
    pub settled: bool,
}

impl View<'_> {
    /// The next step, where a rotation is under way.
    pub fn decide(&self) -> Verdict {
        let Some(rotation) = self.state.authorities.rotation() else { return Verdict::default() };
        let notes = self.notes(rotation);
        if !notes.is_empty() {
            // They count once they are written down.
            return Verdict { commands: notes, ..self.wait(rotation) };
        }
        self.wait(rotation)
    }

    fn wait(&self, rotation: &Rotation) -> Verdict {
        match rotation.signs {
            None => self.spread(rotation),
            Some(since) => self.leave(rotation, since),
        }
    }

    /// What workers have said and is not written down.
    fn notes(&self, rotation: &Rotation) -> Vec<AuthorityCommand> {
        let ca = rotation.ca();
        let reached = |step, known: &BTreeSet<NodeId>, has: &dyn Fn(&SeenWorker) -> bool| {
            let new = self.workers.iter().filter(|(node, worker)| {
                !known.contains(node) && self.state.nodes.get(**node).is_some() && has(worker)
            });
            let nodes: BTreeSet<_> = new.map(|(node, _)| *node).collect();
            (!nodes.is_empty()).then_some(AuthorityCommand::Reached { ca, step, nodes })
        };
        let trusts =
            reached(CaStep::Trusts, &rotation.trusting, &|worker| worker.trusts.contains(&ca));
        let shows = reached(CaStep::Shows, &rotation.showing, &|worker| worker.shows == Some(ca));
        trusts.into_iter().chain(shows).collect()
    }

    fn coordinators(&self) -> impl Iterator<Item = NodeId> {
        self.state.coordinators.iter().map(|(node, _)| node)
    }

    fn spread(&self, rotation: &Rotation) -> Verdict {
        let ca = rotation.ca();
        let verdict = |commands, waits: &str, waits_for| Verdict {
            commands,
            waits: waits.to_owned(),
            waits_for,
        };
        let members: BTreeSet<_> = self.coordinators().collect();
        if rotation.holding.intersection(&members).next().is_none() {
            let commands = vec![AuthorityCommand::Abandon { ca }];
            return verdict(commands, "is given up: nobody has its key any more", vec![]);
        }
        if self.state.authorities.again() {
            let commands = vec![AuthorityCommand::Abandon { ca }];
            let words =
                "is given up for another one: a coordinator was removed that may have its key";
            return verdict(commands, words, vec![]);
        }
        let late = self.seen_for >= COORDINATOR_PATIENCE;
        let keyless: Vec<_> = self.entitled.difference(&rotation.holding).copied().collect();
        let most_hold = keyless.len() * 2 < self.entitled.len().max(1);
        let forgiven = late && most_hold;
        if !keyless.is_empty() && !forgiven {
            return verdict(vec![], "its key goes to the other coordinators", keyless);
        }
        let connected = self
            .workers
            .iter()
            .filter(|(node, worker)| worker.connected && self.state.nodes.get(**node).is_some());
        let connected = connected.map(|(node, _)| *node);
        let coordinators = self.coordinators().filter(|_| !forgiven);
        let unaware =
            coordinators.chain(connected).filter(|node| !rotation.trusting.contains(node));
        let unaware: Vec<_> = unaware.collect();
        if !unaware.is_empty() {
            return verdict(vec![], "everybody who is there is to believe it first", unaware);
        }
        if !self.settled {
            return verdict(vec![], "the workers come to a new leader", vec![]);
        }
        verdict(vec![AuthorityCommand::Sign { ca }], "it signs", vec![])
    }

    fn leave(&self, rotation: &Rotation, since: Timestamp) -> Verdict {
        let retire = || vec![AuthorityCommand::Retire { ca: rotation.ca() }];
        let late = self.seen_for >= COORDINATOR_PATIENCE;
        let is_off = |node: NodeId| match node.role {
            Role::Worker => {
                let here = self.workers.get(&node).is_some_and(|worker| worker.connected);
                self.settled && !here
            }
            Role::Coordinator | Role::Admin => late,
        };
        let workers = self.state.nodes.workers().map(|(node, _)| node);
        let counts = |node: &NodeId| !rotation.skip_absent || !is_off(*node);
        let waits_for = self.coordinators().chain(workers);
        let waits_for = waits_for.filter(|node| !rotation.showing.contains(node) && counts(node));
        let waits_for: Vec<_> = waits_for.collect();
        let over = self.now >= since + LEAVING_MAX;
        let commands = if waits_for.is_empty() || over { retire() } else { vec![] };
        let waits = match commands.is_empty() {
            true => "every member is to show a certificate of it",
            false => "the old one is believed no more",
        };
        Verdict { commands, waits: waits.to_owned(), waits_for }
    }
}

#[cfg(test)]
#[path = "step_test.rs"]
mod tests;
