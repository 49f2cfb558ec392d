//! ○ How the tokens of an attempt come, and what a silence means.
//!
//! A silent attempt is looked up in the table: answers that flow cost nothing, and a head that was replaced
//! on purpose may finish what it has.

use std::time::Duration;

use shoal_protocol::units::Instant;

/// How long an attempt whose tokens come may be silent before it is looked up whether its layout still is the
/// one that serves.
pub const SILENCE: Duration = Duration::from_millis(50);

/// An attempt that has been as silent before is not silent yet: so many times its longest gap.
const SILENCE_FACTOR: u32 = 3;

/// However slow its tokens are: an old layout that retires waits five seconds for its answers. Also before the
/// first one, while it waits its turn or its prompt is read, which says nothing of its head: one that is dead
/// is found by its connection.
pub const SILENCE_MAX: Duration = Duration::from_secs(2);

/// How its tokens come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    last: Option<Instant>,
    longest: Duration,
}

impl Pace {
    /// One has come.
    pub fn token(&mut self, now: Instant) {
        // What comes before the first one is the prompt's.
        if let Some(last) = self.last.replace(now) {
            self.longest = self.longest.max(now.since(last));
        }
    }

    /// How long it may be silent now.
    pub fn silence(&self) -> Duration {
        match self.last {
            None => SILENCE_MAX,
            Some(_) => (self.longest * SILENCE_FACTOR).clamp(SILENCE, SILENCE_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_has_its_time_and_tokens_that_stop_do_not() {
        let mut pace = Pace::default();
        assert_eq!(pace.silence(), SILENCE_MAX, "it may wait its turn");
        let at = |ms: u64| Instant(0) + Duration::from_millis(ms);
        pace.token(at(900));
        assert_eq!(pace.silence(), SILENCE);
        pace.token(at(1000));
        assert_eq!(pace.silence(), Duration::from_millis(300));
        pace.token(at(1010));
        assert_eq!(pace.silence(), Duration::from_millis(300), "the longest counts");
        pace.token(at(9000));
        assert_eq!(pace.silence(), SILENCE_MAX);
    }
}
