//! What a stall is made of, read from the logs of those who live.
//!
//! ```text
//! fault ─ detection ─► somebody is given up ─ plan ─► a layout is adopted ─ load ─► it is linked ─ begin ─►
//!         the answers go on elsewhere ─ prefill ─► the next token is with the client
//! ```

use std::time::Duration;

use crate::proc::logs::time_of;

/// What the bound of a stall allows for all that is not named in it.
pub const SLACK: Duration = Duration::from_millis(50);

/// The parts of the longest stall of one run, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parts {
    /// From the fault to the first word that somebody is given up.
    pub detection: f64,
    /// From there to the new layout.
    pub plan: f64,
    /// From there until all of it is linked.
    pub load: f64,
    /// From there until the last answer has asked its new head.
    pub begin: f64,
    /// From there to its client's next token.
    pub prefill: f64,
}

impl Parts {
    /// Of a fault at `at` whose last stalled stream went on at `until`; `None` where nobody was given
    /// up, or no answer had to go on elsewhere.
    pub fn of(said: &[(String, String)], at: f64, until: f64) -> Option<Self> {
        let times = |words: &[&str]| -> Vec<f64> {
            let told = said.iter().filter(|(_, line)| words.iter().any(|w| line.contains(w)));
            let mut times: Vec<_> = told.filter_map(|(_, line)| time_of(line)).collect();
            times.retain(|time| *time >= at && *time <= until + 1.0);
            times.sort_by(f64::total_cmp);
            times
        };
        let begun = *times(&["an answer goes on"]).last()?;
        let given_up =
            *times(&["is given up", "has failed", "control link ended", "is gone"]).first()?;
        let adopted = times(&[" adopt r", " promote r"]).first().copied().unwrap_or(given_up);
        let linked = times(&["is linked"]).last().copied().unwrap_or(adopted);
        let linked = linked.max(adopted).min(begun.max(adopted));
        Some(Self {
            detection: given_up - at,
            plan: (adopted - given_up).max(0.0),
            load: linked - adopted,
            begin: (begun - linked).max(0.0),
            prefill: (until - begun).max(0.0),
        })
    }

    /// The most that a stream may stall: detection, loading, the prefills of all that stalled, and
    /// the slack.
    pub fn bound(&self, prefills: Duration) -> Duration {
        let measured = (self.detection + self.load).max(0.0);
        Duration::from_secs_f64(measured / 1000.0) + prefills + SLACK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_ends_where_the_next_begins() {
        let said = [
            ("w2", "2026-11-21T00:00:10.005000Z  WARN the link to w1 has failed long ago"),
            ("w2", "2026-11-21T00:00:20.045000Z  WARN r1 g1 has failed: the link to w1 is gone"),
            ("c1", "2026-11-21T00:00:20.050000Z  INFO adopt r1 g2 (2x1 on w2, w3): w1 was lost"),
            ("w3", "2026-11-21T00:00:20.070000Z  INFO r1 g2 is linked"),
            ("c2", "2026-11-21T00:00:20.071000Z  INFO an answer goes on request=1"),
            ("w3", "2026-11-21T00:00:29.000000Z  INFO r1 g3 is linked"),
        ]
        .map(|(who, line)| (who.to_owned(), line.to_owned()));
        let parts = Parts::of(&said, 20_000.0, 20_075.0).unwrap();
        let round = |ms: f64| (ms * 1000.0).round() / 1000.0;
        let found = [parts.detection, parts.plan, parts.load, parts.begin, parts.prefill];
        assert_eq!(found.map(round), [45.0, 5.0, 20.0, 1.0, 4.0]);
        assert_eq!(parts.bound(Duration::from_millis(8)).as_millis(), 45 + 20 + 8 + 50);
        assert_eq!(Parts::of(&said, 21_000.0, 30_000.0), None, "nobody was given up then");
    }
}
