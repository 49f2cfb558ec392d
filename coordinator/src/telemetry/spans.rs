//! What became of this coordinator's spans, as metrics.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts};
use shoal_protocol::trace::SpanCounts;

/// The one family of traces.
pub fn families(counts: SpanCounts) -> Result<Vec<MetricFamily>, prometheus::Error> {
    let opts = Opts::new(
        "shoal_trace_spans_total",
        "Spans by what became of them: exported; queue_full and collector are dropped ones, since too \
         many waited, or the collector did not take them.",
    );
    let spans = IntCounterVec::new(opts, &["outcome"])?;
    for (outcome, count) in [
        ("exported", counts.exported),
        ("queue_full", counts.queue_full),
        ("collector", counts.refused),
    ] {
        spans.with_label_values(&[outcome]).inc_by(count);
    }
    Ok(spans.collect())
}
