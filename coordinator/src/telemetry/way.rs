//! ● What a request's way through this coordinator takes.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, Registry};

use super::Telemetry;

/// Bounds in seconds: a pick takes about a microsecond, tokenising a long prompt milliseconds.
const WAY: &[f64] = &[
    0.000_001, 0.000_002, 0.000_005, 0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5,
    0.001, 0.002, 0.005, 0.01, 0.1, 1.0,
];

/// A part of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The router's: filters, policy, and the wait for its lock.
    Route,
    /// From a request that was read and checked to the head that was asked: tokens, route, and what a
    /// connection takes that is not there yet.
    Dispatch,
}

impl Part {
    fn label(self) -> &'static str {
        match self {
            Part::Route => "route",
            Part::Dispatch => "dispatch",
        }
    }
}

/// The metric.
#[derive(Debug)]
pub(super) struct Way(HistogramVec);

impl Way {
    /// At zero. An error means that a name is declared twice.
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let help = "What requests took here: `route`, the choice of a replica; `dispatch`, from the \
                    checked request to the head that was asked, which includes it.";
        let opts = HistogramOpts::new("shoal_request_way_seconds", help).buckets(WAY.to_vec());
        let vec = HistogramVec::new(opts, &["part"])?;
        registry.register(Box::new(vec.clone()))?;
        Ok(Self(vec))
    }
}

impl Telemetry {
    /// A request took so long for this part of its way.
    pub fn went(&self, part: Part, took: Duration) {
        self.way.0.with_label_values(&[part.label()]).observe(took.as_secs_f64());
    }
}
