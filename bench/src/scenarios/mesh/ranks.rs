//! Two tensor ranks with a thread each against one thread unsplit.

use anyhow::Result;
use shoal_protocol::mesh::Objective;
use shoal_protocol::plan::Precision;

use super::bed::{Bed, Served, Wanted};
use crate::measure::Series;
use crate::measure::machine::read_bandwidth;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::processes::Host;
use crate::scenarios::Settings;
use crate::workload::model::Shape;

const TOKENS: u32 = 24;

/// Of what two cores could do at best.
const SHARE: f64 = 0.9;

/// What is asked of formats that are bound by arithmetic.
const COMPUTE: f64 = 1.7;

/// A format is bound by memory if one thread reads its weights at this part of what a thread reads at all.
const BOUND_BY_MEMORY: f64 = 0.75;

/// Milliseconds that a token takes at least where the goals are promised.
const TOKEN_MS: f64 = 20.0;

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "Two tensor ranks against one thread",
        format!(
            "One stream of {TOKENS} tokens: mesh 1x2 with one thread a rank, over QUIC, against 1x1 with one thread, taken in \
             turn, on models of {TOKEN_MS} ms a token and more. What one core reads in a second, and two together, is measured just \
             before each pair of meshes and just behind it. A format that one thread reads at {BOUND_BY_MEMORY} of that is bound by memory: its goal \
             is {SHARE} of what two cores read over what one reads (2 at most). The others are bound by arithmetic: {COMPUTE}. \
             distributed-llama's two nodes, on machines of their own, reach 2.00 of its one (issue 4)."
        ),
    );
    let bed = Bed::start((0..3).map(|_| Host::default()).collect(), None)?;
    for (shape, precision) in [
        (Shape::MEDIUM, Precision::F32),
        (Shape::LARGE, Precision::Bf16),
        (Shape::LARGE, Precision::Q8_0),
        (Shape::LARGE, Precision::Q4K),
    ] {
        let shape = settings.shape(shape);
        let model = shape.write(&settings.models, if shape == Shape::LARGE { 2 } else { 1 })?;
        let of = |mesh| Wanted {
            model: &model,
            vocab: shape.vocab,
            precision: Some(precision),
            mesh,
            objective: Objective::Latency,
        };
        let before = [read_bandwidth(1), read_bandwidth(2)];
        let both = [bed.serve("one", of("1x1"))?, bed.serve("two", of("1x2"))?];
        let bytes = weights(&bed, &both[0])?;
        let mut series = [Series::default(), Series::default()];
        for served in &both {
            bed.token_ms(served, TOKENS)?;
        }
        for pair in 0..settings.pairs {
            for which in [pair % 2, 1 - pair % 2] {
                series[which].push(bed.token_ms(&both[which], TOKENS)?);
            }
        }
        let after = [read_bandwidth(1), read_bandwidth(2)];
        let read = [0, 1].map(|cores| f64::midpoint(before[cores], after[cores]));
        let name = format!("{} M parameters, {precision}", shape.parameters() / 1_000_000);
        let [one, two] = series;
        let share = bytes / (one.median() / 1e3) / read[0];
        section.seen(
            format!("{name}: ms a token, one thread"),
            format!("{one} ({} of what a thread reads)", significant(share)),
        );
        section.seen(format!("{name}: ms a token, two ranks"), two.to_string());
        let (ratio, cores) = (one.over(&two), read[1] / read[0]);
        let (bound, goal) = match share >= BOUND_BY_MEMORY {
            true => ("memory", SHARE * cores.min(2.0)),
            false => ("arithmetic", COMPUTE),
        };
        let what = format!(
            "{name}: tokens/s, two ranks over one thread (bound by {bound}; two cores read {cores:.2}x)"
        );
        match one.median() >= TOKEN_MS {
            true => {
                let goal = (goal * 100.0).round() / 100.0;
                section.at_least(what, ratio.median(), ratio.to_string(), goal);
            }
            // Nothing is promised of it.
            false => section.seen(what, ratio.to_string()),
        }
        for served in both {
            bed.remove(served)?;
        }
    }
    Ok(section)
}

/// Bytes of the weights of a mesh.
fn weights(bed: &Bed, served: &Served) -> Result<f64> {
    let plan = bed.explain(served)?;
    let shards = plan.replicas.iter().flat_map(|r| &r.stages).flat_map(|stage| &stage.shards);
    Ok(shards.map(|shard| shard.memory.weights.0 as f64).sum())
}
