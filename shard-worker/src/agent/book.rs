//! ○ Who the coordinators are, as far as a worker knows, and with which of them it talks.
//!
//! ```text
//! kept in the data folder ─┐
//! Welcome, Coordinators ───┴─► known: one session each ─► kept in the data folder
//! --join ─────────────────────► sought as long as nobody has said who the coordinators are
//! ```
//!
//! Lists come from coordinators that may lag behind each other, or that were taken out and have not
//! heard of it. So whoever *another* connected coordinator names is one; whoever none of the others
//! names is dropped, whatever it says of itself. A coordinator that cannot be reached says nothing: it
//! changes no list.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use shoal_protocol::control::{COORDINATORS_MAX, CoordinatorAddress};
use shoal_protocol::id::NodeId;

/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Book {
    known: BTreeMap<NodeId, SocketAddr>,
    /// Where each was reached last: where its listed address does not lead from here, this may.
    reached: BTreeMap<NodeId, SocketAddr>,
    /// With whom there is a conversation, and what they say; `None` before their welcome.
    talks: BTreeMap<NodeId, Option<Vec<CoordinatorAddress>>>,
    /// Who was known and is not any more.
    gone: BTreeSet<NodeId>,
}

/// The most that are remembered of those that are gone: more than a cluster loses while a worker runs.
const GONE_MAX: usize = 256;

impl Book {
    /// What was kept from the last life.
    pub fn new(kept: &[CoordinatorAddress]) -> Self {
        let known = kept.iter().take(COORDINATORS_MAX).map(|c| (c.node, c.cluster)).collect();
        Self { known, ..Self::default() }
    }

    /// The coordinators.
    pub fn known(&self) -> &BTreeMap<NodeId, SocketAddr> {
        &self.known
    }

    /// Whether it was a coordinator and is none any more. Nobody gets its number again.
    pub fn is_gone(&self, node: NodeId) -> bool {
        self.gone.contains(&node)
    }

    /// Whether others have said who the coordinators are, and this one is none of them. It may have joined
    /// a moment ago, and be named in the next list.
    pub fn is_stranger(&self, node: NodeId) -> bool {
        let others = self.talks.iter().filter(|(from, _)| **from != node);
        let informed = others.filter_map(|(_, list)| list.as_ref()).any(|list| !list.is_empty());
        informed && !self.known.contains_key(&node)
    }

    /// It has been a stranger for so long that it is none any more, until somebody names it.
    pub fn give_up(&mut self, node: NodeId) -> bool {
        let stranger = self.is_stranger(node);
        if stranger {
            self.gone.insert(node);
            self.bound_gone();
        }
        stranger
    }

    /// Where to look for one in the nth try; `None` where it is no coordinator any more.
    pub fn address_of(&self, node: NodeId, attempt: usize) -> Option<SocketAddr> {
        let listed = *self.known.get(&node)?;
        let reached = self.reached.get(&node).copied().unwrap_or(listed);
        Some(if attempt.is_multiple_of(2) { listed } else { reached })
    }

    /// Whether there is a conversation with it already: a coordinator takes the newest one of a worker
    /// and ends the others, so two of them would end each other for ever.
    pub fn talks_to(&self, node: NodeId) -> bool {
        self.talks.contains_key(&node)
    }

    /// Whether one of them has welcomed this worker, and talks to it still.
    pub fn is_welcome(&self) -> bool {
        self.talks.values().any(Option::is_some)
    }

    /// Whether an address of `--join` is worth a try: nobody who is connected has said who the
    /// coordinators are, and none of those that are known is there.
    pub fn needs_seed(&self, address: SocketAddr) -> bool {
        let informed = self.talks.values().flatten().any(|list| !list.is_empty());
        !informed && !self.known.values().any(|known| *known == address)
    }

    /// A conversation begins; `false` where there is one already.
    pub fn begin(&mut self, node: NodeId) -> bool {
        let free = !self.talks_to(node);
        if free {
            self.talks.insert(node, None);
        }
        free
    }

    /// A coordinator that was found at this address says who the coordinators are.
    pub fn hear(&mut self, from: NodeId, at: SocketAddr, list: Vec<CoordinatorAddress>) {
        let list: Vec<_> = list.into_iter().filter(CoordinatorAddress::is_reachable).collect();
        self.reached.insert(from, at);
        self.talks.insert(from, Some(list));
        self.conclude();
        let known = &self.known;
        self.reached.retain(|node, _| known.contains_key(node));
    }

    /// A conversation has ended. Whom it named stays known.
    pub fn end(&mut self, node: NodeId) {
        self.talks.remove(&node);
    }

    fn conclude(&mut self) {
        let lists = || self.talks.iter().filter_map(|(from, list)| Some((*from, list.as_ref()?)));
        let mut known = BTreeMap::new();
        for (from, list) in lists() {
            known.extend(list.iter().filter(|c| c.node != from).map(|c| (c.node, c.cluster)));
        }
        let all_silent = lists().all(|(_, list)| list.is_empty());
        for (from, list) in lists() {
            let others_say = lists().any(|(other, list)| other != from && !list.is_empty());
            // Nobody knows its address better than itself.
            let own = list.iter().find(|c| c.node == from).map(|c| c.cluster);
            if let Some(at) = own.or_else(|| self.reached.get(&from).copied())
                && (known.contains_key(&from) && own.is_some() || !others_say)
            {
                known.insert(from, at);
            }
        }
        if all_silent || known.is_empty() {
            // Nothing that would be a reason to forget anybody.
            self.known.append(&mut known);
        } else {
            let before = std::mem::replace(&mut self.known, known);
            self.gone.extend(before.into_keys());
        }
        // Who lags behind may have left somebody out.
        let known = &self.known;
        self.gone.retain(|node| !known.contains_key(node));
        self.bound_gone();
        while self.known.len() > COORDINATORS_MAX {
            self.known.pop_last();
        }
    }

    fn bound_gone(&mut self) {
        while self.gone.len() > GONE_MAX {
            self.gone.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C1: NodeId = NodeId::coordinator(1);
    const C2: NodeId = NodeId::coordinator(2);
    const C3: NodeId = NodeId::coordinator(3);

    /// c`n` listens on port 4000 + n.
    fn at(node: NodeId) -> SocketAddr {
        ([10, 0, 0, 1], 4000 + node.number as u16).into()
    }

    fn list(nodes: &[NodeId]) -> Vec<CoordinatorAddress> {
        nodes.iter().map(|node| CoordinatorAddress { node: *node, cluster: at(*node) }).collect()
    }

    fn known(book: &Book) -> Vec<NodeId> {
        book.known().keys().copied().collect()
    }

    /// A book with these conversations, each with what it says.
    fn book(talks: &[(NodeId, &[NodeId])]) -> Book {
        let mut book = Book::default();
        for (from, named) in talks {
            assert!(book.begin(*from));
            book.hear(*from, at(*from), list(named));
        }
        book
    }

    #[test]
    fn whom_the_others_name_is_a_coordinator() {
        let check = |talks: &[(NodeId, &[NodeId])], expected: &[NodeId]| {
            assert_eq!(known(&book(talks)), expected, "{talks:?}");
        };
        check(&[(C1, &[])], &[C1]);
        check(&[(C1, &[C1])], &[C1]);
        check(&[(C1, &[]), (C2, &[])], &[C1, C2]);
        check(&[(C1, &[C1, C2, C3])], &[C1, C2, C3]);
        // One lags behind, and adds nothing and takes nothing away.
        check(&[(C1, &[C1, C2, C3]), (C2, &[C1])], &[C1, C2, C3]);
        check(&[(C1, &[C1, C2, C3]), (C2, &[])], &[C1, C2, C3]);
        // One was taken out, and believes that it is still there.
        check(&[(C1, &[C1, C2]), (C2, &[C1, C2]), (C3, &[C1, C2, C3])], &[C1, C2]);
        // The only one that answers says that it is none any more.
        check(&[(C1, &[C2, C3])], &[C1, C2, C3]);
        // Two halves that do not know of each other: none is a reason to forget the other.
        check(&[(C1, &[C1]), (C2, &[C2])], &[C1]);
    }

    #[test]
    fn a_coordinator_that_left_the_list_is_dropped_and_one_that_is_silent_is_not() {
        let mut book = book(&[(C1, &[C1, C2, C3]), (C2, &[C1, C2, C3])]);
        book.end(C1);
        assert_eq!(known(&book), [C1, C2, C3], "a broken conversation is no news");
        book.hear(C2, at(C2), list(&[C2, C3]));
        assert_eq!(known(&book), [C2, C3]);
        book.end(C2);
        assert_eq!(known(&book), [C2, C3], "nobody is there to say otherwise");
    }

    #[test]
    fn whom_nobody_names_is_a_stranger_and_none_any_more_until_somebody_names_it() {
        let mut book = book(&[(C3, &[C1, C2, C3])]);
        assert!(!book.is_stranger(C3), "nobody else has said anything");
        book.begin(C1);
        assert!(!book.is_stranger(C3), "c1 has not said anything yet");
        book = Book::default();
        book.begin(C1);
        book.hear(C1, at(C1), list(&[C1, C2]));
        assert!(book.is_stranger(C3) && !book.is_gone(C3), "it may have joined just now");
        assert!(!book.is_stranger(C1) && !book.is_stranger(C2));
        assert!(!book.give_up(C2) && !book.is_gone(C2));
        assert!(book.give_up(C3) && book.is_gone(C3));
        book.hear(C1, at(C1), list(&[C1, C2]));
        assert!(book.is_gone(C3), "it does not come back by being forgotten");
        book.hear(C1, at(C1), list(&[C1, C2, C3]));
        assert!(!book.is_gone(C3) && !book.is_stranger(C3));
    }

    #[test]
    fn there_is_one_conversation_with_each() {
        let mut book = Book::new(&list(&[C1]));
        assert!(book.begin(C1));
        assert!(!book.begin(C1), "the first one would be ended by the second");
        book.end(C1);
        assert!(book.begin(C1));
    }

    #[test]
    fn what_was_given_at_the_start_is_tried_until_somebody_says_who_is_there() {
        let seed: SocketAddr = ([192, 168, 0, 7], 4000).into();
        let mut book = Book::new(&list(&[C1]));
        assert!(book.needs_seed(seed) && !book.needs_seed(at(C1)), "c1 is tried as c1");
        book.begin(C2);
        book.hear(C2, seed, Vec::new());
        assert!(!book.needs_seed(seed), "c2 is known to be there");
        book.hear(C2, seed, list(&[C1, C2]));
        assert!(!book.needs_seed(seed) && !book.needs_seed(at(C3)));
        // What it says of itself may not lead there from here; what led there once may again.
        assert_eq!(book.address_of(C2, 0), Some(at(C2)));
        assert_eq!(book.address_of(C2, 1), Some(seed));
        assert_eq!(book.address_of(C3, 0), None);
        book.end(C2);
        assert!(book.needs_seed(seed), "all are lost");
    }

    #[test]
    fn an_address_that_leads_nowhere_is_not_believed() {
        let anywhere = CoordinatorAddress { node: C1, cluster: ([0, 0, 0, 0], 4001).into() };
        let mut book = Book::default();
        book.begin(C1);
        book.hear(C1, at(C1), vec![anywhere]);
        assert_eq!(book.address_of(C1, 0), Some(at(C1)));
    }
}
