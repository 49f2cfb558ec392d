//! One stream: two workers over QUIC against the same engine unsplit.

use anyhow::{Result, ensure};

use super::Settings;
use crate::cluster::{Cluster, Options};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::workload::model::Shape;
use crate::workload::prompt;

const PROMPT: usize = 32;
const TOKENS: u32 = 64;

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let model = Shape::MEDIUM.write(&settings.models, 1)?;
    let start = |workers| {
        Cluster::start(&Options {
            model: Some(model.clone()),
            workers,
            threads: 1,
            ..Options::default()
        })
    };
    let (unsplit, split) = (start(1)?, start(2)?);
    let mut section = Section::new(
        "One stream, split over QUIC against unsplit",
        format!(
            "{} M parameters in bf16, one compute thread a worker; a prompt of {PROMPT} tokens, {TOKENS} tokens \
             decoded; `shoal up --workers 2` against `--workers 1`, taken in turn. The time of a token is the mean \
             distance between tokens of a stream.",
            Shape::MEDIUM.parameters() / 1_000_000
        ),
    );
    let ids = prompt(7, PROMPT, Shape::MEDIUM.vocab);
    let (_, a) = unsplit.generate(&ids, TOKENS)?;
    let (_, b) = split.generate(&ids, TOKENS)?;
    ensure!(a == b, "the split model does not give the tokens of the unsplit one");

    // Milliseconds between tokens, prefill left out.
    let token_ms = |cluster: &Cluster| -> Result<f64> {
        let times = cluster.stream(&ids, TOKENS)?;
        let span = times[times.len() - 1] - times[0];
        Ok(span.as_secs_f64() * 1e3 / f64::from(TOKENS - 1))
    };
    let (mut one, mut two) = (Series::default(), Series::default());
    for _ in 0..settings.pairs {
        one.push(token_ms(&unsplit)?);
        two.push(token_ms(&split)?);
    }
    section.seen("ms a token, unsplit, 1 thread", one.to_string());
    section.seen("ms a token, 2 workers x 1 thread", two.to_string());
    let ratio = one.over(&two);
    section.at_least("tokens/s split over unsplit", ratio.median(), ratio.to_string(), 0.97);
    section.seen("added a token, microseconds", significant((two.median() - one.median()) * 1e3));
    Ok(section)
}
