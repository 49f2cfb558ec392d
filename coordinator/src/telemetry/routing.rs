//! Where the router stands on each replica and why, as metrics.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, Opts};

use crate::router::{Standing, State};

/// All families of the router.
pub fn families(standings: &[(String, Standing)]) -> Result<Vec<MetricFamily>, prometheus::Error> {
    const REPLICA: [&str; 2] = ["model_name", "replica"];
    let gauge =
        |name: &str, help: &str, labels: &[&str]| GaugeVec::new(Opts::new(name, help), labels);
    let weight = gauge(
        "shoal_route_weight",
        "A replica's share of the weights by which requests are placed, 0 to 1.",
        &REPLICA,
    )?;
    let score = gauge(
        "shoal_route_score_seconds",
        "Why: the terms of the estimated time of an answer with a prompt of one token.",
        &["model_name", "replica", "term"],
    )?;
    let state = gauge(
        "shoal_route_state",
        "1 at the state that a replica is in for the router, else 0.",
        &["model_name", "replica", "state"],
    )?;
    let picks = Opts::new("shoal_route_picks_total", "Sequences that were sent to a replica.");
    let picks = CounterVec::new(picks, &REPLICA)?;
    for (model, standing) in standings {
        let replica = standing.replica.to_string();
        let labels = [model.as_str(), replica.as_str()];
        weight.with_label_values(&labels).set(standing.weight);
        picks.with_label_values(&labels).inc_by(standing.picks as f64);
        for (term, seconds) in standing.terms.named() {
            score.with_label_values(&[model.as_str(), &replica, term]).set(seconds);
        }
        for known in State::ALL {
            let is = f64::from(u8::from(standing.state == known));
            state.with_label_values(&[model.as_str(), &replica, known.name()]).set(is);
        }
    }
    let mut families = weight.collect();
    families.extend(score.collect());
    families.extend(state.collect());
    families.extend(picks.collect());
    Ok(families)
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;
    use shoal_protocol::id::ReplicaId;

    use super::*;
    use crate::router::policy::score::Terms;

    #[test]
    fn a_replica_shows_its_weight_its_state_and_each_term() {
        let standing = Standing {
            replica: ReplicaId(3),
            state: State::Ejected,
            weight: 0.25,
            terms: Terms { decode: 1.5, ..Terms::default() },
            picks: 7,
        };
        let families = families(&[("m".to_owned(), standing)]).expect("valid names");
        let text = TextEncoder::new().encode_to_string(&families).expect("renders");
        let replica = ReplicaId(3);
        for line in [
            format!("shoal_route_weight{{model_name=\"m\",replica=\"{replica}\"}} 0.25"),
            format!("shoal_route_picks_total{{model_name=\"m\",replica=\"{replica}\"}} 7"),
            format!(
                "shoal_route_score_seconds{{model_name=\"m\",replica=\"{replica}\",term=\"decode\"}} 1.5"
            ),
            format!(
                "shoal_route_state{{model_name=\"m\",replica=\"{replica}\",state=\"ejected\"}} 1"
            ),
            format!(
                "shoal_route_state{{model_name=\"m\",replica=\"{replica}\",state=\"ready\"}} 0"
            ),
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
    }
}
