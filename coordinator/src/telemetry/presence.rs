//! Which coordinators this one hears, as metrics.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};
use shoal_protocol::presence::PresenceView;

/// The one family of coordinators.
pub fn families(presence: &PresenceView) -> Result<Vec<MetricFamily>, prometheus::Error> {
    let opts = Opts::new(
        "shoal_coordinator_up",
        "1 for each coordinator that this one has heard within two seconds, itself included, else 0.",
    );
    let up = IntGaugeVec::new(opts, &["coordinator"])?;
    for heard in &presence.coordinators {
        up.with_label_values(&[heard.node.to_string()]).set(i64::from(heard.up));
    }
    Ok(up.collect())
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;
    use shoal_protocol::id::NodeId;
    use shoal_protocol::presence::HeardView;

    use super::*;

    #[test]
    fn a_coordinator_that_is_not_heard_is_0() {
        let heard = |number, up| HeardView {
            node: NodeId::coordinator(number),
            up,
            heard_ms_ago: up.then_some(0),
        };
        let coordinators = vec![heard(1, true), heard(2, false)];
        let presence = PresenceView { coordinators, no_majority: None };
        let families = families(&presence).expect("valid names");
        let text = TextEncoder::new().encode_to_string(&families).expect("renders");
        for line in [
            "shoal_coordinator_up{coordinator=\"c1\"} 1",
            "shoal_coordinator_up{coordinator=\"c2\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
    }
}
