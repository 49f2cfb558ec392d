//! Two tensor ranks with a thread each against one thread unsplit.

use anyhow::Result;
use shoal_protocol::mesh::Objective;
use shoal_protocol::plan::Precision;

use super::bed::{Bed, Wanted};
use crate::measure::Series;
use crate::measure::machine::read_bandwidth;
use crate::measure::report::Section;
use crate::processes::Host;
use crate::scenarios::Settings;
use crate::workload::model::Shape;

const TOKENS: u32 = 24;

/// Of what two cores could do at best.
const SHARE: f64 = 0.9;

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "Two tensor ranks against one thread",
        format!(
            "One stream of {TOKENS} tokens: mesh 1x2 with one thread a rank, over QUIC, against 1x1 with one thread, taken in \
             turn. The goal is {SHARE} of what two cores read over what one reads (2 at most), measured just before each pair \
             of meshes."
        ),
    );
    let bed = Bed::start((0..3).map(|_| Host::default()).collect(), None)?;
    for (shape, precision) in [
        (Shape::MEDIUM, Precision::F32),
        (Shape::LARGE, Precision::Bf16),
        (Shape::LARGE, Precision::Q8_0),
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
        let bandwidth = read_bandwidth(2) / read_bandwidth(1);
        let both = [bed.serve("one", of("1x1"))?, bed.serve("two", of("1x2"))?];
        let mut series = [Series::default(), Series::default()];
        for served in &both {
            bed.token_ms(served, TOKENS)?;
        }
        for pair in 0..settings.pairs {
            for which in [pair % 2, 1 - pair % 2] {
                series[which].push(bed.token_ms(&both[which], TOKENS)?);
            }
        }
        let name = format!("{} M parameters, {precision}", shape.parameters() / 1_000_000);
        let [one, two] = series;
        section.seen(format!("{name}: ms a token, one thread"), one.to_string());
        section.seen(format!("{name}: ms a token, two ranks"), two.to_string());
        let ratio = one.over(&two);
        let goal = SHARE * bandwidth.min(2.0);
        section.at_least(
            format!("{name}: tokens/s, two ranks over one thread (two cores read {bandwidth:.2}x)"),
            ratio.median(),
            ratio.to_string(),
            (goal * 100.0).round() / 100.0,
        );
        for served in both {
            bed.remove(served)?;
        }
    }
    Ok(section)
}
