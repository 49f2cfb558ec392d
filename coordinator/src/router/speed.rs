//! ○ How fast a replica is, from nothing but when its tokens came.
//!
//! A head computes in steps, and a step takes a fixed time and a time per row. So the gap between two
//! tokens of a stream is a line over the sequences that run. The line is fitted over the last
//! seconds; where these say little of its slope, half of a step counts as its rows'.

use std::time::Duration;

use shoal_protocol::units::Instant;

/// How long a measurement counts: short enough that a replica that turns slow is known to be slow
/// after two seconds, long enough for the few hundred steps that a mean needs.
const MEMORY: Duration = Duration::from_secs(1);

/// A spread of the rows of this share of their mean says as much of the slope as the prior does.
const PRIOR_SPREAD: f64 = 0.25;

/// The rows' share of a step's time where nothing is known.
const PRIOR_ROWS_SHARE: f64 = 0.5;

/// How long a replica's figures are believed once nothing comes from it: finagle's and linkerd's
/// decay of an idle peer's cost.
const FORGET: f64 = 10.0;

/// The gap between tokens over the sequences that run, and the time of a prompt's token.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speed {
    weight: f64,
    rows: f64,
    gap: f64,
    rows_rows: f64,
    rows_gap: f64,
    prompt_tokens: f64,
    prompt_seconds: f64,
    last: Instant,
    /// The quotient of the two before, kept like the line so that a pick needs no division: forgetting
    /// leaves it as it is.
    prompt_token: Option<f64>,
    /// The line.
    at_zero: f64,
    slope: f64,
}

impl Speed {
    /// A stream's next token came `gap` seconds after the one before it, while so many ran.
    pub fn token(&mut self, now: Instant, rows: f64, gap: f64) {
        self.decay(now);
        self.weight += 1.0;
        self.rows += rows;
        self.gap += gap;
        self.rows_rows += rows * rows;
        self.rows_gap += rows * gap;
        let (rows, gap) = (self.rows / self.weight, self.gap / self.weight);
        let spread = (self.rows_rows / self.weight - rows * rows).max(0.0);
        let together = self.rows_gap / self.weight - rows * gap;
        let prior = (PRIOR_SPREAD * rows).powi(2);
        // Neither the slope nor what a step takes without rows can be below zero.
        let most = gap / rows.max(1.0);
        let slope = (together + prior * PRIOR_ROWS_SHARE * most) / (spread + prior).max(1e-9);
        self.slope = slope.clamp(0.0, most);
        self.at_zero = (gap - self.slope * rows).max(0.0);
    }

    /// A prompt of so many tokens took so long from its first step to its first token.
    pub fn prompt(&mut self, now: Instant, tokens: f64, seconds: f64) {
        self.decay(now);
        self.prompt_tokens += tokens;
        self.prompt_seconds += seconds;
        let known = self.prompt_tokens > 0.0;
        self.prompt_token = known.then(|| self.prompt_seconds / self.prompt_tokens);
    }

    /// Whether there is any measurement of a gap.
    pub fn is_known(&self) -> bool {
        self.weight > 0.0
    }

    /// Seconds between two tokens while so many sequences run.
    pub fn gap(&self, rows: f64) -> f64 {
        self.at_zero + self.slope * rows
    }

    /// Seconds of a prompt's token; `None` where none was measured.
    pub fn prompt_token(&self) -> Option<f64> {
        self.prompt_token
    }

    /// How far the figures are believed of a replica from which nothing is awaited, 1 to 0: not at
    /// all after `FORGET` seconds.
    pub fn trust(&self, now: Instant) -> f64 {
        // No exponential: every idle replica is asked at every pick.
        let age = now.0.saturating_sub(self.last.0) as f64 / (1e6 * FORGET);
        (1.0 - age * age).max(0.0)
    }

    /// The line at zero rows and its slope, in seconds.
    pub fn line(&self) -> (f64, f64) {
        (self.at_zero, self.slope)
    }

    fn decay(&mut self, now: Instant) {
        let passed = now.since(self.last);
        if passed.is_zero() {
            return;
        }
        self.last = now;
        let keep = (-passed.as_secs_f64() / MEMORY.as_secs_f64()).exp();
        for sum in [
            &mut self.weight,
            &mut self.rows,
            &mut self.gap,
            &mut self.rows_rows,
            &mut self.rows_gap,
            &mut self.prompt_tokens,
            &mut self.prompt_seconds,
        ] {
            *sum *= keep;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fed(line: impl Fn(f64) -> f64, rows: &[f64]) -> Speed {
        let mut speed = Speed::default();
        for i in 0..4000u64 {
            let rows = rows[i as usize % rows.len()];
            speed.token(Instant(i * 1000), rows, line(rows));
        }
        speed
    }

    #[test]
    fn a_line_is_found_where_the_rows_vary_and_the_prior_where_they_do_not() {
        let line = |rows: f64| 0.010 + 0.001 * rows;
        let varied = fed(line, &[2.0, 10.0, 18.0, 30.0]);
        for rows in [1.0, 12.0, 32.0] {
            let off = varied.gap(rows) / line(rows) - 1.0;
            assert!(off.abs() < 0.1, "{rows} rows: {} for {}", varied.gap(rows), line(rows));
        }
        let constant = fed(line, &[10.0]);
        assert!((constant.gap(10.0) - 0.020).abs() < 1e-6);
        assert!((constant.gap(20.0) - 0.030).abs() < 1e-6, "half of a step is its rows'");
    }

    #[test]
    fn a_replica_that_turns_slow_is_known_to_be_slow_after_two_seconds() {
        let mut speed = fed(|_| 0.010, &[4.0]);
        let mut at = Instant(4_000_000);
        for _ in 0..50 {
            at = at + Duration::from_millis(40);
            (0..4).for_each(|_| speed.token(at, 4.0, 0.040));
        }
        // The old gaps were ten times as many a second.
        assert!(speed.gap(4.0) > 0.020, "{}", speed.gap(4.0));
    }

    #[test]
    fn figures_stay_where_nothing_comes_but_are_believed_less() {
        let speed = fed(|_| 0.040, &[4.0]);
        let later = Instant(3_999_000) + Duration::from_secs(5);
        assert!((speed.gap(4.0) - 0.040).abs() < 1e-6);
        assert!((speed.trust(later) - 0.75).abs() < 1e-6);
    }
}
