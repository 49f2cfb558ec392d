//! ○ When each of the other coordinators was last heard, and who is missing where there is no majority.
//!
//! ```text
//! a message, a greeting, a conversation that lives ─► heard(node, now) ─► view ─► operators
//!                                                                     └─► missing ─► the words of what was not decided
//! ```
//!
//! Soft state of one coordinator: nothing is decided by it.

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

/// When each was last heard. Bounded by the nodes of the state: whoever notes something also calls `keep`.
/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Presence {
    last: Arc<Mutex<BTreeMap<NodeId, Instant>>>,
}

impl Presence {
    /// This one was heard.
    pub fn heard(&self, node: NodeId, now: Instant) {
        self.lock().insert(node, now);
    }

    /// How long ago it was heard; `None`: never.
    pub fn silence(&self, node: NodeId, now: Instant) -> Option<Duration> {
        self.lock().get(&node).map(|last| now.since(*last))
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
        let views = voters.iter().map(|voter| self.view(me, *voter, now));
        let (there, silent): (Vec<_>, Vec<_>) = views.partition(|view| view.up);
        let needs = voters.len() / 2 + 1;
        // One that has just joined knows no voters yet.
        if voters.is_empty() || there.len() >= needs {
            return None;
        }
        let silence = |view: HeardView| view.heard_ms_ago.map(Duration::from_millis);
        let silent = silent.into_iter().map(|view| (view.node, silence(view))).collect();
        Some(NoMajority { silent, voters: voters.len(), needs })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Instant>> {
        // A panic under the lock leaves a map, each entry of which is valid by itself.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Too few coordinators are heard to decide anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoMajority {
    /// Those that vote and are not heard, and for how long; `None`: not since this one started.
    pub silent: Vec<(NodeId, Option<Duration>)>,
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
        let silent: Vec<_> = self.silent.iter().map(one).collect();
        write!(
            f,
            "no majority of the coordinators: not heard {} {}; a change needs {} of the {} that vote. See whether they \
             run: then this one is cut off, and they may go on without it; else start them, or, where they are \
             lost for ever, `shoal coordinators recover-alone`",
            if silent.len() == 1 { "is" } else { "are" },
            silent.join(" and "),
            self.needs,
            self.voters,
        )
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
