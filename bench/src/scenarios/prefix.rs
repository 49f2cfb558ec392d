//! How soon an answer begins whose prompt begins as one before did, against one that is all new.

use anyhow::{Context, Result};

use super::Settings;
use crate::cluster::{Cluster, Options};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::workload::model::Shape;
use crate::workload::prompt;

const NAME: &str = "alike";
/// Whole blocks of 16 tokens at each of the shares below.
const PROMPT: usize = 1280;
const ANSWER: u32 = 9;
/// What is new of a prompt, in percent.
const NEW: [usize; 3] = [10, 25, 50];
/// What the time to the first token may be beyond its share.
const SLACK: f64 = 1.1;

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let shape = settings.shape(Shape::MEDIUM);
    let model = shape.write(&settings.models, 1)?;
    let mut section = Section::new(
        "Prompts that begin alike",
        format!(
            "One stream at a time; prompts of {PROMPT} tokens, answers of {ANSWER}. A miss is a prompt of which nothing was \
             asked before; the hit behind it has its beginning and an end of its own. Seconds until the first token, as the \
             client sees it. What a hit takes beyond one token's time (the mean distance of the miss's tokens) over what its \
             miss takes is to be at most {SLACK} of the share of the prompt that is new. Taken in turn, {} pairs of each.",
            settings.pairs
        ),
    );
    let path = model.to_str().context("the model's path is not UTF-8")?;
    let mut cluster = Cluster::start(&Options { workers: 2, threads: 1, ..Options::default() })?;
    cluster.operate(&["undeploy", "demo"])?;
    cluster.talk_to(NAME);
    for (name, mesh) in [("one worker", "1x1"), ("2 stages", "2x1"), ("2 ranks", "1x2")] {
        cluster.operate(&["deploy", path, "--name", NAME, "--mesh", mesh])?;
        let mut misses = Series::default();
        for percent in NEW {
            let of = measure(&cluster, settings.pairs, percent, shape.vocab)?;
            let goal = SLACK * percent as f64 / 100.0;
            let ratio = of.rest.over(&of.misses);
            let seen = format!("{ratio} (hits {} s)", of.hits);
            section.at_most(
                format!("{name}: {percent} % new, hit over miss"),
                ratio.median(),
                seen,
                goal,
            );
            misses.extend(of.misses.iter());
        }
        section.seen(format!("{name}: misses, seconds"), misses.to_string());
        cluster.operate(&["undeploy", NAME])?;
    }
    Ok(section)
}

/// Seconds until the first token.
#[derive(Default)]
struct Pairs {
    misses: Series,
    hits: Series,
    /// Of hits, beyond one token's time.
    rest: Series,
}

fn measure(cluster: &Cluster, pairs: usize, percent: usize, vocab: u32) -> Result<Pairs> {
    let mut of = Pairs::default();
    // The first pair warms everything up.
    for round in 0..=pairs {
        let seed = 10_000 * percent as u64 + 2 * round as u64;
        let first = prompt(seed, PROMPT, vocab);
        let mut second = prompt(seed + 1, PROMPT, vocab);
        let known = PROMPT - PROMPT * percent / 100;
        second[..known].copy_from_slice(&first[..known]);
        // The end differs from its first token on, so that no block of it is known.
        second[known] = (first[known] + 1) % vocab;
        let (miss, token) = times(cluster, &first)?;
        let (hit, _) = times(cluster, &second)?;
        if round > 0 {
            of.misses.push(miss);
            of.hits.push(hit);
            of.rest.push((hit - token).max(0.0));
        }
    }
    Ok(of)
}

/// Seconds until the first token, and between two.
fn times(cluster: &Cluster, prompt: &[u32]) -> Result<(f64, f64)> {
    let times = cluster.stream(prompt, ANSWER)?;
    let seconds = |i: usize| times.get(i).map_or(f64::NAN, |time| time.as_secs_f64());
    let (first, last) = (seconds(0), seconds(ANSWER as usize - 1));
    Ok((first, (last - first) / f64::from(ANSWER - 1)))
}
