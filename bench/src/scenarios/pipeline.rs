//! Two stages with one thread each against one thread unsplit: the pipeline kept full.

use anyhow::Result;

use super::Settings;
use crate::cluster::{Cluster, Options};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::workload::model::Shape;
use crate::workload::prompt;

const LONG_PROMPT: usize = 1024;
const STREAMS: usize = 48;
const STREAM_PROMPT: usize = 8;
const STREAM_TOKENS: u32 = 48;

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let model = Shape::MEDIUM.write(&settings.models, 1)?;
    let start = |workers, threads| {
        Cluster::start(&Options {
            model: Some(model.clone()),
            workers,
            threads,
            ..Options::default()
        })
    };
    let (one, two, wide) = (start(1, 1)?, start(2, 1)?, start(1, 2)?);
    let mut section = Section::new(
        "Two stages x 1 thread against 1 thread unsplit",
        format!(
            "The same model. Prefill: the time to the answer of one token to a prompt of {LONG_PROMPT} tokens. Decode: \
             {STREAMS} streams of {STREAM_TOKENS} tokens at once (3 micro-batches of {}), the time until the last one is done. Taken in \
             turn; one worker with two threads stands beside.",
            STREAMS / 3
        ),
    );
    let mut prefill = [Series::default(), Series::default(), Series::default()];
    let mut decode = [Series::default(), Series::default(), Series::default()];
    let clusters = [&one, &two, &wide];
    let vocab = Shape::MEDIUM.vocab;
    let prompts: Vec<_> =
        (0..STREAMS).map(|i| prompt(100 + i as u64, STREAM_PROMPT, vocab)).collect();
    for cluster in clusters {
        cluster.generate_all(&prompts, 4)?;
    }
    for round in 0..settings.pairs {
        // A new prompt each round, so that no cache of prefixes can help.
        let long = prompt(1000 + round as u64, LONG_PROMPT, vocab);
        for (cluster, series) in clusters.iter().zip(&mut prefill) {
            series.push(cluster.generate(&long, 1)?.0.as_secs_f64());
        }
        for (cluster, series) in clusters.iter().zip(&mut decode) {
            series.push(cluster.generate_all(&prompts, STREAM_TOKENS)?.as_secs_f64());
        }
    }
    let rate = |tokens: f64| move |seconds: f64| tokens / seconds;
    let names = ["unsplit, 1 thread", "2 stages x 1 thread", "unsplit, 2 threads"];
    for (name, series) in names.iter().zip(&prefill) {
        section.seen(
            format!("prefill tokens/s, {name}"),
            series.map(rate(LONG_PROMPT as f64)).to_string(),
        );
    }
    for (name, series) in names.iter().zip(&decode) {
        let tokens = STREAMS as f64 * f64::from(STREAM_TOKENS);
        section.seen(
            format!("decode tokens/s, {STREAMS} streams, {name}"),
            series.map(rate(tokens)).to_string(),
        );
    }
    let ratio = prefill[0].over(&prefill[1]);
    section.at_least("prefill, 2 x 1 over 1", ratio.median(), ratio.to_string(), 1.7);
    let ratio = decode[0].over(&decode[1]);
    section.at_least("decode, 2 x 1 over 1", ratio.median(), ratio.to_string(), 1.7);
    let ratio = prefill[2].over(&prefill[1]);
    section.seen("prefill, 2 x 1 over one worker with 2 threads", ratio.to_string());
    let ratio = decode[2].over(&decode[1]);
    section.seen("decode, 2 x 1 over one worker with 2 threads", ratio.to_string());
    Ok(section)
}
