//! One stream: two workers over QUIC against the same engine unsplit.

use anyhow::{Result, ensure};
use shoal_protocol::plan::PretendSpec;

use super::Settings;
use crate::cluster::{Cluster, Options};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::workload::model::Shape;
use crate::workload::prompt;

const PROMPT: usize = 32;
const TOKENS: u32 = 32;

/// Pairs of streams for each pair of the settings: a stream is short, and what the machine's memory
/// gives moves by tens of percent from second to second.
const STREAMS_A_PAIR: usize = 4;

/// A token takes 10 ms, however it is split: what is added is the way between the stages.
const MODELLED: PretendSpec = PretendSpec {
    layers: 20,
    hidden: 1024,
    vocab: 4099,
    max_context: 4096,
    seed: 5,
    layer_step_ns: 500_000,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "One stream, split over QUIC against unsplit",
        format!(
            "Two workers with one compute thread each against one; a prompt of {PROMPT} tokens, {TOKENS} tokens \
             decoded, taken in turn. The time of a token is the mean distance between tokens of a stream. First a \
             model whose time is modelled ({} ms a token, split or not), so that only the two hops differ; then \
             models of random weights in bf16, whose time is the machine's memory.",
            u64::from(MODELLED.layers) * MODELLED.layer_step_ns / 1_000_000
        ),
    );
    // Each pair of clusters ends before the next begins: a small machine has no memory for all.
    {
        let (mut unsplit, mut split) = (start(None, 1)?, start(None, 2)?);
        unsplit.deploy_pretend("modelled", MODELLED, 1)?;
        split.deploy_pretend("modelled", MODELLED, 2)?;
        measure(settings, &mut section, "modelled time", MODELLED.vocab, [&unsplit, &split])?;
    }
    for (shape, seed) in [(Shape::MEDIUM, 1), (Shape::LARGE, 2)] {
        let model = shape.write(&settings.models, seed)?;
        let (unsplit, split) = (start(Some(model.clone()), 1)?, start(Some(model), 2)?);
        let name = format!("{} M parameters", shape.parameters() / 1_000_000);
        measure(settings, &mut section, &name, shape.vocab, [&unsplit, &split])?;
    }
    Ok(section)
}

fn start(model: Option<std::path::PathBuf>, workers: usize) -> Result<Cluster> {
    Cluster::start(&Options { model, workers, threads: 1, ..Options::default() })
}

fn measure(
    settings: &Settings,
    section: &mut Section,
    name: &str,
    vocab: u32,
    clusters: [&Cluster; 2],
) -> Result<()> {
    let ids = prompt(7, PROMPT, vocab);
    let [(_, a), (_, b)] =
        [clusters[0].generate(&ids, TOKENS)?, clusters[1].generate(&ids, TOKENS)?];
    ensure!(a == b, "the split model does not give the tokens of the unsplit one");

    let mut series = [Series::default(), Series::default()];
    for stream in 0..settings.pairs * STREAMS_A_PAIR {
        // Each is first as often as the other.
        for which in [stream % 2, 1 - stream % 2] {
            let times = clusters[which].stream(&ids, TOKENS)?;
            let span = times[times.len() - 1] - times[0];
            series[which].push(span.as_secs_f64() * 1e3 / f64::from(TOKENS - 1));
        }
    }
    let [one, two] = series;
    section.seen(format!("{name}: ms a token, unsplit"), one.to_string());
    section.seen(format!("{name}: ms a token, 2 workers"), two.to_string());
    let ratio = one.over(&two);
    section.at_least(
        format!("{name}: tokens/s, split over unsplit"),
        ratio.median(),
        ratio.to_string(),
        0.97,
    );
    let added = (two.median() - one.median()) * 1e3;
    section.seen(format!("{name}: added a token, microseconds"), significant(added));
    Ok(())
}
