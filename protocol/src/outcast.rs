//! ○ Whether there is anybody left who has to do with this node. Whoever was removed, or was off for too many
//! rotations of the CA, or finds another cluster where its own was, meets nobody who believes it, and so
//! nobody who could tell it.
//!
//! ```text
//! refused by one of those it knows ─► said, and again ─► refused by all of them, without a pause ─► the end
//!                                                     └─► by more than half, for a quarter of an hour ─► the end
//! anybody who believes it ─► nothing has happened
//! ```
//!
//! Silence is no refusal: a node that is cut off from the others waits for ever. Nor is a coordinator that has no
//! majority, or a certificate that is out of its time: whoever is back renews it. But one coordinator that is silent
//! for good (its machine is lost, which is why it was replaced) keeps no node waiting that most of the others refuse.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::units::Instant;

/// How long all that a node knows must refuse it before it ends. A rotation passes a coordinator by in 10 s,
/// an old backup leads for 2 s before the others find it, a clock is set within a minute of a boot: what
/// mends itself has mended itself by then, and what has not is a person's to mend.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How long more than half of them must refuse it, where the others are silent: these may come back, but without those
/// they decide nothing.
pub const PATIENCE_WITH_MOST: Duration = Duration::from_secs(900);

/// How often it is said.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// How long a refusal counts: several rounds of asking. A process that was stopped knows nothing of the time
/// in between.
const FRESH: Duration = Duration::from_secs(60);

/// The longest reason that is said again.
const REASON_MAX: usize = 300;

/// Who refuses this node.
#[derive(Clone, Debug, Default)]
pub struct Outcast {
    /// By whom, and their last reason.
    refusals: BTreeMap<String, (Instant, String)>,
    /// When the first of them did.
    first: Option<Instant>,
    /// Since when it has been all of them.
    all: Option<Instant>,
    /// Since when it has been more than half of them.
    most: Option<Instant>,
    said: Option<Instant>,
}

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, or nothing new.
    Wait,
    /// Say this.
    Say(String),
    /// End, with these words.
    End(String),
}

impl Outcast {
    /// Somebody refuses this node for what it is.
    pub fn refused(&mut self, by: &str, why: &str, now: Instant) {
        let last = self.refusals.get(by).map(|(at, _)| *at);
        if last.is_some_and(|last| now.since(last) >= FRESH) {
            self.believed();
        }
        let why = why.chars().take(REASON_MAX).collect();
        self.refusals.insert(by.to_owned(), (now, why));
        self.first.get_or_insert(now);
    }

    /// Somebody could not be reached, or said something else.
    pub fn otherwise(&mut self, who: &str) {
        self.refusals.remove(who);
        // It is not all of them now: what counts is a time without a pause.
        self.all = None;
        if self.refusals.is_empty() {
            self.believed();
        }
    }

    /// Somebody believes this node.
    pub fn believed(&mut self) {
        *self = Self::default();
    }

    /// What follows for `me`, where these are all whom it knows.
    pub fn look(&mut self, me: &str, known: &BTreeSet<String>, now: Instant) -> Verdict {
        self.refusals.retain(|by, (at, _)| known.contains(by) && now.since(*at) < FRESH);
        if self.refusals.is_empty() {
            self.believed();
            return Verdict::Wait;
        }
        let (refusing, first) = (self.refusals.len(), self.first.unwrap_or(now));
        let left = [
            left(&mut self.all, refusing == known.len(), PATIENCE, now),
            left(&mut self.most, 2 * refusing > known.len(), PATIENCE_WITH_MOST, now),
        ];
        let left = left.into_iter().flatten().min();
        if left == Some(Duration::ZERO) {
            return Verdict::End(self.words(me, known.len(), now.since(first), left));
        }
        if self.said.is_some_and(|said| now.since(said) < SAY_EVERY) {
            return Verdict::Wait;
        }
        self.said = Some(now);
        Verdict::Say(self.words(me, known.len(), now.since(first), left))
    }

    fn words(&self, me: &str, known: usize, since: Duration, left: Option<Duration>) -> String {
        let refusing = self.refusals.len();
        let who = match (refusing == known, known) {
            (true, 1) => "the only coordinator that it knows refuses it".to_owned(),
            (true, _) => format!("all {known} coordinators that it knows refuse it"),
            (false, _) => format!("{refusing} of the {known} coordinators that it knows refuse it"),
        };
        let reasons: Vec<_> =
            self.refusals.iter().map(|(by, (_, why))| format!("{by}: {why}")).collect();
        let next = match left {
            Some(Duration::ZERO) => "It ends now".to_owned(),
            Some(left) => format!("It ends in {} s if that stays so", left.as_secs()),
            None => "It goes on trying".to_owned(),
        };
        format!(
            "{me} belongs to no cluster that it can find: for {} s {who} ({}). {next}. Was it removed, was it off \
             while the CA was rotated more than four times, or is another cluster at these addresses? Then delete \
             its data folder and join anew on an empty one, with a token of `shoal token create`; else give it \
             the right --data or --join",
            since.as_secs(),
            reasons.join("; "),
        )
    }
}

/// What is left of a patience that runs while something `is` so.
fn left(
    since: &mut Option<Instant>,
    is: bool,
    patience: Duration,
    now: Instant,
) -> Option<Duration> {
    *since = is.then(|| since.unwrap_or(now));
    since.map(|since| patience.saturating_sub(now.since(since)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant(seconds * 1_000_000)
    }

    fn known(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Refused by these every five seconds from `from` to `to`; what came of it.
    fn refuse(outcast: &mut Outcast, by: &[&str], all: &[&str], times: (u64, u64)) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for second in (times.0..=times.1).step_by(5) {
            for one in by {
                outcast.refused(one, "w7 is not a node of this cluster", at(second));
                verdicts.push(outcast.look("w7", &known(all), at(second)));
            }
        }
        verdicts.retain(|verdict| *verdict != Verdict::Wait);
        verdicts
    }

    fn ends(verdicts: &[Verdict]) -> bool {
        verdicts.iter().any(|verdict| matches!(verdict, Verdict::End(_)))
    }

    #[test]
    fn who_is_refused_by_all_says_so_now_and_then_and_ends_after_two_minutes() {
        let mut outcast = Outcast::default();
        let all = ["c1", "c2", "c3"];
        let before = refuse(&mut outcast, &all, &all, (0, 115));
        assert!(!ends(&before), "{before:?}");
        assert_eq!(before.len(), 4, "said at 0, 30, 60 and 90 s: {before:?}");
        let Verdict::Say(last) = &before[3] else { panic!("{before:?}") };
        for word in ["w7", "for 90 s all 3 coordinators", "c2: w7 is not", "empty", "shoal token"] {
            assert!(last.contains(word), "{word}: {last}");
        }
        assert!(last.contains("ends in 30 s"), "{last}");
        let after = refuse(&mut outcast, &all, &all, (120, 120));
        let Some(Verdict::End(why)) = after.last() else { panic!("{after:?}") };
        assert!(why.contains("for 120 s all 3"), "{why}");
    }

    #[test]
    fn who_is_cut_off_from_one_of_them_is_told_and_ends_only_where_most_refuse_it_for_long() {
        let all = ["c1", "c2", "c3", "c4"];
        let said = refuse(&mut Outcast::default(), &["c1", "c2"], &all, (0, 3600));
        assert!(!ends(&said), "half are no majority: {said:?}");
        let Some(Verdict::Say(last)) = said.last() else { panic!("{said:?}") };
        assert!(last.contains("2 of the 4 coordinators") && last.contains("goes on"), "{last}");
        // One whose machine is lost is silent for good.
        let mut outcast = Outcast::default();
        let said = refuse(&mut outcast, &all[..3], &all, (0, 895));
        assert!(!ends(&said), "{said:?}");
        let Some(Verdict::Say(last)) = said.last() else { panic!("{said:?}") };
        assert!(last.contains("3 of the 4") && last.contains("ends in"), "{last}");
        assert!(ends(&refuse(&mut outcast, &all[..3], &all, (900, 900))));
        // Where it was not most of them for a moment, it begins anew.
        let mut outcast = Outcast::default();
        assert!(!ends(&refuse(&mut outcast, &all[..3], &all, (0, 600))));
        assert!(!ends(&refuse(&mut outcast, &all[..2], &all, (605, 700))));
        assert!(!ends(&refuse(&mut outcast, &all[..3], &all, (705, 1600))));
        // Silence of all of them is nothing at all.
        let mut silent = Outcast::default();
        silent.otherwise("c1");
        assert_eq!(silent.look("w7", &known(&["c1"]), at(1000)), Verdict::Wait);
    }

    #[test]
    fn what_interrupts_the_refusals_begins_them_anew() {
        type Interrupt = fn(&mut Outcast);
        let interrupts: [(&str, Interrupt); 3] = [
            ("somebody believes it", |outcast| outcast.believed()),
            ("one cannot be reached", |outcast| outcast.otherwise("c1")),
            // It was asleep, so it does not know what they said meanwhile.
            ("nothing is heard for a while", |_| {}),
        ];
        for (name, interrupt) in interrupts {
            let mut outcast = Outcast::default();
            assert!(!ends(&refuse(&mut outcast, &["c1"], &["c1"], (0, 115))));
            interrupt(&mut outcast);
            let later = refuse(&mut outcast, &["c1"], &["c1"], (180, 295));
            assert!(!ends(&later), "{name}: {later:?}");
            assert!(ends(&refuse(&mut outcast, &["c1"], &["c1"], (300, 300))), "{name}");
        }
    }

    #[test]
    fn another_one_that_becomes_known_is_heard_first() {
        let mut outcast = Outcast::default();
        assert!(!ends(&refuse(&mut outcast, &["c1"], &["c1"], (0, 100))));
        assert!(!ends(&refuse(&mut outcast, &["c1"], &["c1", "c2"], (105, 500))));
        assert!(!ends(&refuse(&mut outcast, &["c1", "c2"], &["c1", "c2"], (505, 620))));
        assert!(ends(&refuse(&mut outcast, &["c1", "c2"], &["c1", "c2"], (625, 625))));
    }
}
