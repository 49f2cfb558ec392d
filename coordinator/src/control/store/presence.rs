//! ○ When each of the other coordinators was last heard, and who is missing where there is no majority.
//!
//! ```text
//! a message, a greeting, a conversation that lives ─► heard(node, now) ─► view ─► operators
//!                                                                     └─► missing ─► the words of what was not decided
//! ```
//!
//! Soft state of one coordinator: nothing is decided by it. Whoever refuses this one, or is refused by it, is there
//! and makes no majority with it: what it says goes before its silence.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::presence::HeardView;
use shoal_protocol::units::Instant;

/// How long a coordinator may be silent before it is said: longer than a lost connection takes to be made anew,
/// shorter than a person takes to look.
pub const SILENT_AFTER: Duration = Duration::from_secs(2);

/// How long a refusal counts that is not said again: whoever refuses is asked again every ten seconds, by somebody.
const REFUSAL_COUNTS: Duration = Duration::from_secs(30);

/// When each was last heard. Bounded by the nodes of the state: whoever notes something also calls `keep`.
/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Presence {
    known: Arc<Mutex<BTreeMap<NodeId, Known>>>,
}

/// What is known of one.
#[derive(Clone, Debug, Default)]
struct Known {
    heard: Option<Instant>,
    /// What each of the two has against the other, and when it last said so.
    against: BTreeMap<Side, (Instant, String)>,
}

/// Of two coordinators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// This one.
    Here,
    /// The other one.
    There,
}

impl Presence {
    /// This one was heard.
    pub fn heard(&self, node: NodeId, now: Instant) {
        self.lock().entry(node).or_default().heard = Some(now);
    }

    /// One of the two refuses the other.
    pub fn refused(&self, node: NodeId, by: Side, why: String, now: Instant) {
        self.lock().entry(node).or_default().against.insert(by, (now, why));
    }

    /// One of the two takes the other.
    pub fn welcomed(&self, node: NodeId, by: Side) {
        self.lock().entry(node).or_default().against.remove(&by);
    }

    /// Who refuses whom, of this coordinator and another, and why: the other's words first, if both do.
    fn refusal(&self, node: NodeId, now: Instant) -> Option<(Side, String)> {
        let known = self.lock();
        let against = &known.get(&node)?.against;
        let fresh = |(_, (at, _)): &(&Side, &(Instant, String))| now.since(*at) < REFUSAL_COUNTS;
        let (side, (_, why)) = against.iter().rev().find(fresh)?;
        Some((*side, why.clone()))
    }

    /// How long ago it was heard; `None`: never.
    pub fn silence(&self, node: NodeId, now: Instant) -> Option<Duration> {
        self.lock().get(&node)?.heard.map(|last| now.since(last))
    }

    /// Forgets those that do not belong to the cluster any more.
    pub fn keep(&self, is_member: impl Fn(NodeId) -> bool) {
        self.lock().retain(|node, _| is_member(*node));
    }

    /// How it is heard, for people. Whoever says it hears itself.
    pub fn view(&self, me: NodeId, node: NodeId, now: Instant) -> HeardView {
        let silence = if node == me { Some(Duration::ZERO) } else { self.silence(node, now) };
        HeardView {
            node,
            up: silence.is_some_and(|silence| silence < SILENT_AFTER),
            heard_ms_ago: silence.map(|silence| silence.as_millis() as u64),
        }
    }

    /// Who is missing, if those that are heard are no majority of the voters.
    pub fn missing(&self, me: NodeId, voters: &[NodeId], now: Instant) -> Option<NoMajority> {
        let refusal = |voter: &NodeId| Some((*voter, self.refusal(*voter, now)?));
        let refusals: Vec<_> = voters.iter().filter_map(refusal).collect();
        let refuses = |voter: NodeId| refusals.iter().any(|(node, _)| *node == voter);
        let views = voters.iter().map(|voter| self.view(me, *voter, now));
        let missing = views.filter(|view| !view.up || refuses(view.node));
        let missing: Vec<_> = missing.collect();
        let needs = voters.len() / 2 + 1;
        // One that has just joined knows no voters yet.
        if voters.is_empty() || voters.len() - missing.len() >= needs {
            return None;
        }
        let silence = |view: HeardView| view.heard_ms_ago.map(Duration::from_millis);
        let silent = missing.into_iter().filter(|view| !refuses(view.node));
        let silent = silent.map(|view| (view.node, silence(view))).collect();
        Some(NoMajority { silent, refusals, voters: voters.len(), needs })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Known>> {
        // A panic under the lock leaves a map, each entry of which is valid by itself.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Too few coordinators are heard to decide anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoMajority {
    /// Those that vote and are not heard, and for how long; `None`: not since this one started.
    pub silent: Vec<(NodeId, Option<Duration>)>,
    /// Those that vote and are there, and which of the two refuses the other, in its words.
    pub refusals: Vec<(NodeId, (Side, String))>,
    /// How many vote.
    pub voters: usize,
    /// How many of them it takes.
    pub needs: usize,
}

impl fmt::Display for NoMajority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = |(node, silence): &(NodeId, Option<Duration>)| match silence {
            Some(silence) => format!("{node} for {} s", silence.as_secs()),
            None => format!("{node} since this coordinator started"),
        };
        f.write_str("no majority of the coordinators: ")?;
        for (node, (side, why)) in &self.refusals {
            match side {
                Side::There => write!(f, "{node} refuses this one: {why}; ")?,
                Side::Here => write!(f, "this one refuses {node}: {why}; ")?,
            }
        }
        let silent: Vec<_> = self.silent.iter().map(one).collect();
        if !silent.is_empty() {
            let are = if silent.len() == 1 { "is" } else { "are" };
            write!(f, "not heard {are} {}; ", silent.join(" and "))?;
        }
        write!(f, "a change needs {} of the {} that vote. ", self.needs, self.voters)?;
        f.write_str(match silent.is_empty() {
            true => {
                "They run, and may go on without this one: mend what is said of them, or of this one, first"
            }
            false => {
                "See whether they run: then this one is cut off, and they may go on without it; else start them, \
                 or, where they are lost for ever, `shoal coordinators recover-alone`"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C1: NodeId = NodeId::coordinator(1);
    const C2: NodeId = NodeId::coordinator(2);
    const C3: NodeId = NodeId::coordinator(3);

    fn at(ms: u64) -> Instant {
        Instant(0) + Duration::from_millis(ms)
    }

    #[test]
    fn whoever_was_heard_just_now_is_up_and_others_say_how_long_they_are_silent() {
        let presence = Presence::default();
        presence.heard(C2, at(1_000));
        let view = |node, ms| presence.view(C1, node, at(ms));
        assert_eq!(view(C2, 2_999), HeardView { node: C2, up: true, heard_ms_ago: Some(1_999) });
        assert_eq!(view(C2, 13_000), HeardView { node: C2, up: false, heard_ms_ago: Some(12_000) });
        assert_eq!(view(C3, 13_000), HeardView { node: C3, up: false, heard_ms_ago: None });
        // It hears itself, whatever the time.
        assert_eq!(view(C1, 13_000), HeardView { node: C1, up: true, heard_ms_ago: Some(0) });
        presence.keep(|node| node != C2);
        assert_eq!(presence.silence(C2, at(13_000)), None);
    }

    #[test]
    fn who_refuses_is_named_with_the_reason_and_is_no_majority_however_loud() {
        let presence = Presence::default();
        let all = [C1, C2, C3];
        for node in [C2, C3] {
            presence.heard(node, at(0));
        }
        presence.refused(C2, Side::There, "upgrade it".to_owned(), at(0));
        assert_eq!(presence.missing(C1, &all, at(0)), None, "two of three");
        presence.refused(C3, Side::Here, "it is too old".to_owned(), at(0));
        let words = presence.missing(C1, &all, at(1_000)).unwrap().to_string();
        assert_eq!(
            words,
            "no majority of the coordinators: c2 refuses this one: upgrade it; this one refuses c3: it is too old; \
             a change needs 2 of the 3 that vote. They run, and may go on without this one: mend what is said of \
             them, or of this one, first"
        );
        // What both have against each other is told in the words of the other one.
        presence.refused(C3, Side::There, "it is too new".to_owned(), at(0));
        let words = presence.missing(C1, &all, at(1_000)).unwrap().to_string();
        assert!(words.contains("; c3 refuses this one: it is too new; a change"), "{words}");
        // One of them has died since.
        presence.refused(C2, Side::There, "upgrade it".to_owned(), at(40_000));
        let words = presence.missing(C1, &all, at(40_000)).unwrap().to_string();
        assert!(words.contains("c2 refuses this one: upgrade it; not heard is c3 for 40 s; "));
        assert!(words.ends_with("`shoal coordinators recover-alone`"), "{words}");
        presence.welcomed(C2, Side::There);
        presence.heard(C2, at(40_000));
        assert_eq!(presence.missing(C1, &all, at(41_000)), None);
    }

    #[test]
    fn who_is_missing_is_named_only_where_those_that_are_there_are_too_few() {
        let presence = Presence::default();
        let all = [C1, C2, C3];
        presence.heard(C2, at(0));
        assert_eq!(presence.missing(C1, &all, at(1_000)), None, "two of three");
        let words = presence.missing(C1, &all, at(14_000)).unwrap().to_string();
        assert_eq!(
            words,
            "no majority of the coordinators: not heard are c2 for 14 s and c3 since this coordinator started; \
             a change needs 2 of the 3 that vote. See whether they run: then this one is cut off, and they may go \
             on without it; else start them, or, where they are lost for ever, `shoal coordinators recover-alone`"
        );
        assert_eq!(presence.missing(C1, &[C1], at(14_000)), None, "alone it is a majority");
        // One that has no vote does not count itself.
        presence.heard(C3, at(14_000));
        assert!(presence.missing(C1, &[C2, C3], at(14_000)).is_some());
    }
}
