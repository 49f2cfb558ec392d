//! ◇ What happens again and again, several times a second, is logged at first, and then once in a while with how often.
//!
//! ```text
//! new, or in other words ─► said ─► again ─► counted ─► after `SAY_EVERY`: said with the count
//! ```

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use shoal_protocol::units::Instant;

/// How often the same is said: whoever looks into a log finds it without going back far.
pub(crate) const SAY_EVERY: Duration = Duration::from_secs(30);

/// Of so many it is known what was said last: more than a cluster has coordinators; beyond them it is strangers.
const KNOWN_MAX: usize = 256;

/// What was said of whom, by this process's clock.
#[derive(Debug)]
pub(crate) struct Seldom {
    origin: std::time::Instant,
    said: Mutex<Said>,
}

impl Default for Seldom {
    fn default() -> Self {
        Self { origin: std::time::Instant::now(), said: Mutex::default() }
    }
}

impl Seldom {
    /// What is to be said now of `who`, if anything.
    pub fn say(&self, who: &str, words: &str) -> Option<String> {
        let now = Instant(0) + self.origin.elapsed();
        // A panic under the lock leaves a map, each entry of which is valid by itself.
        self.said.lock().unwrap_or_else(PoisonError::into_inner).say(who, words, now)
    }
}

#[derive(Debug, Default)]
struct Said(BTreeMap<String, Last>);

#[derive(Debug)]
struct Last {
    words: String,
    /// When it was said.
    said: Instant,
    /// When it was last wanted to be said.
    wanted: Instant,
    /// How often it was not said since.
    unsaid: u32,
}

impl Said {
    fn say(&mut self, who: &str, words: &str, now: Instant) -> Option<String> {
        let is_same = |last: &&mut Last| last.words == words;
        if let Some(last) = self.0.get_mut(who).filter(is_same) {
            last.unsaid = last.unsaid.saturating_add(1);
            last.wanted = now;
            if now.since(last.said) < SAY_EVERY {
                return None;
            }
            let (times, since) = (last.unsaid, now.since(last.said).as_secs());
            (last.said, last.unsaid) = (now, 0);
            return Some(match times {
                1 => words.to_owned(),
                _ => format!("{words} ({times} times in the last {since} s)"),
            });
        }
        if self.0.len() >= KNOWN_MAX && !self.0.contains_key(who) {
            let oldest = self.0.iter().min_by_key(|(_, last)| last.wanted);
            let oldest = oldest.map(|(who, _)| who.clone());
            oldest.and_then(|who| self.0.remove(&who));
        }
        let last = Last { words: words.to_owned(), said: now, wanted: now, unsaid: 0 };
        self.0.insert(who.to_owned(), last);
        Some(words.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant(0) + Duration::from_millis(ms)
    }

    #[test]
    fn what_happens_many_times_a_second_is_said_twice_a_minute_with_its_number() {
        let mut said = Said::default();
        let lines: Vec<_> =
            (0..600).filter_map(|n| said.say("c2", "too old", at(n * 100))).collect();
        assert_eq!(lines, ["too old", "too old (300 times in the last 30 s)"]);
        // Somebody else, and other words, wait for nothing.
        assert_eq!(said.say("c3", "too old", at(60_000)).as_deref(), Some("too old"));
        assert_eq!(said.say("c2", "removed", at(60_000)).as_deref(), Some("removed"));
        assert_eq!(said.say("c2", "removed", at(60_001)), None);
        // Once in a while is no flood.
        assert_eq!(said.say("c3", "too old", at(200_000)).as_deref(), Some("too old"));
    }

    #[test]
    fn strangers_push_out_strangers_and_not_who_is_heard_of_all_the_time() {
        let mut said = Said::default();
        assert!(said.say("c2", "too old", at(0)).is_some());
        for n in 0..10_000 {
            assert!(said.say(&format!("stranger {n}"), "knocks", at(n)).is_some());
            assert_eq!(said.say("c2", "too old", at(n)), None);
        }
        assert_eq!(said.0.len(), KNOWN_MAX);
    }
}
