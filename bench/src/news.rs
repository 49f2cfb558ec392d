//! What processes say in their logs, and when: the lines of all of them in one list.
//!
//! A line carries the time at which it was said, by the clock that all processes of a machine share, so
//! that neither a pipe nor the reader counts.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

/// Lines that are kept: what a bench waits for was said within the last seconds.
const LINES_MAX: usize = 20_000;

/// A day in milliseconds: times wrap at midnight.
const DAY: f64 = 86_400_000.0;

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    /// Who said it: `c1`, `w3`.
    pub who: String,
    /// Milliseconds since midnight.
    pub at: f64,
    /// The whole line.
    pub text: String,
}

/// The lines of all processes.
#[derive(Debug, Default)]
pub struct News {
    lines: Mutex<VecDeque<Line>>,
    more: Condvar,
}

impl News {
    /// Reads what one process says, to the end, in a thread.
    pub fn listen(self: &Arc<Self>, who: String, stream: impl Read + Send + 'static) {
        let news = Arc::clone(self);
        std::thread::spawn(move || {
            for text in BufReader::new(stream).lines().map_while(Result::ok) {
                let Some(at) = time_of(&text) else { continue };
                let mut lines = news.lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() >= LINES_MAX {
                    lines.pop_front();
                }
                lines.push_back(Line { who: who.clone(), at, text });
                news.more.notify_all();
            }
        });
    }

    /// The first line after a moment that is wanted, and how many milliseconds after it; `None` where
    /// nobody says it in time.
    pub fn wait(
        &self,
        after: f64,
        within: Duration,
        wanted: impl Fn(&Line) -> bool,
    ) -> Option<(f64, Line)> {
        let until = Instant::now() + within;
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let found = lines.iter().filter(|line| wanted(line)).filter_map(|line| {
                let later = (line.at - after).rem_euclid(DAY);
                (later < DAY / 2.0).then(|| (later, line.clone()))
            });
            if let Some(first) = found.min_by(|a, b| a.0.total_cmp(&b.0)) {
                return Some(first);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (lines, _) =
                self.more.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Milliseconds since midnight, as log lines count them.
pub fn now_of_day() -> Result<f64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Ok(since.context("the clock is before 1970")?.as_secs_f64() * 1000.0 % DAY)
}

/// The time at which a log line begins: `2026-11-21T18:39:04.123456Z`.
fn time_of(line: &str) -> Option<f64> {
    let (_, time) = line.split_once('T')?;
    let mut parts = time.split_once('Z')?.0.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    Some((next()? * 3600.0 + next()? * 60.0 + next()?) * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_by_what_it_says_and_when() {
        let news = Arc::new(News::default());
        let text = "2026-11-21T23:59:59.999000Z  INFO a: early\n2026-11-22T00:00:00.001500Z  INFO b: late\n";
        news.listen("c1".to_owned(), text.as_bytes());
        let wait = |after, words: &'static str| {
            news.wait(after, Duration::from_secs(5), move |line| line.text.contains(words))
        };
        let (later, line) = wait(DAY - 2.0, "late").expect("it was said");
        assert!((later - 3.5).abs() < 1e-3, "{later}");
        assert_eq!(line.who, "c1");
        assert!(wait(DAY - 2.0, "early").is_some());
        let none = news.wait(0.5, Duration::ZERO, |line| line.text.contains("early"));
        assert!(none.is_none(), "it was said before");
    }
}
