//! ● What answers that outlive their workers count.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

use super::Telemetry;

/// Bounds of stalls, in seconds: from the time that a replay of a short answer takes to a deadline.
const STALL: &[f64] = &[
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 320.0, 640.0,
];

/// The metrics of recovery.
#[derive(Debug)]
pub(super) struct Resumes {
    resumed: IntCounterVec,
    stall: HistogramVec,
    quarantined: IntCounterVec,
}

impl Resumes {
    /// All at zero. An error means that a name is declared twice.
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let resumed = IntCounterVec::new(
            Opts::new(
                "shoal_resumed_attempts_total",
                "Attempts that took the place of one that had ended early, by what ended it.",
            ),
            &["model_name", "reason"],
        )?;
        let help = "From the loss of an attempt to the answer's next event.";
        let stall = HistogramVec::new(
            HistogramOpts::new("shoal_stall_seconds", help).buckets(STALL.to_vec()),
            &["model_name"],
        )?;
        let quarantined = IntCounterVec::new(
            Opts::new(
                "shoal_quarantined_total",
                "Answers that were given up because their workers were lost time and again.",
            ),
            &["model_name"],
        )?;
        registry.register(Box::new(resumed.clone()))?;
        registry.register(Box::new(stall.clone()))?;
        registry.register(Box::new(quarantined.clone()))?;
        Ok(Self { resumed, stall, quarantined })
    }
}

impl Telemetry {
    /// An attempt took the place of another, which had ended for this reason.
    pub fn resumed(&self, model: &str, reason: &str) {
        self.resumes.resumed.with_label_values(&[model, reason]).inc();
    }

    /// An answer went on after this long.
    pub fn stalled(&self, model: &str, stall: Duration) {
        self.resumes.stall.with_label_values(&[model]).observe(stall.as_secs_f64());
    }

    /// An answer was given up for what it seems to do to its workers.
    pub fn quarantined(&self, model: &str) {
        self.resumes.quarantined.with_label_values(&[model]).inc();
    }
}
