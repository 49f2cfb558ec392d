//! What `shoal plan --explain` says of a token's time, and what it takes; what a plan says of memory, and what
//! the processes take.

use anyhow::Result;
use shoal_protocol::mesh::Objective;
use shoal_protocol::plan::BLOCK_TOKENS;

use super::bed::{Bed, Served, Wanted, line, predicted_full_ms, predicted_ms, words};
use crate::cluster::process_memory;
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::processes::Host;
use crate::scenarios::Settings;
use crate::workload::model::Shape;

const TOKENS: u32 = 32;

/// Tokens of each of several streams at once: enough for the beginning of each to count little.
const MANY: u32 = 64;

/// A prompt that fills the largest step, so that all buffers are used; and the tokens behind it.
const LONG: (usize, u32) = (600, 8);

/// By how much a prediction may be wrong.
const ERROR_MAX: f64 = 0.10;

/// By how much a shard may take more than the plan says.
const MEMORY_ERROR_MAX: f64 = 0.02;

const MESHES: [&str; 4] = ["1x1", "2x1", "1x2", "2x2"];

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let shape = settings.shape(Shape::LARGE);
    let model = shape.write(&settings.models, 2)?;
    let mut section = Section::new(
        "Predicted against measured",
        format!(
            "{} M parameters in bf16; four workers with one thread each on this machine, which also runs the coordinator and \
             the client. Predicted is what `shoal plan --explain` says of a token of one stream before any was made; measured is \
             the mean distance of {TOKENS} tokens, the median of {} streams; and of as many streams of {MANY} tokens at once as there are stages, \
             against its step when full. Memory: by how much the anonymous memory of each worker's \
             process has grown with the mesh and a prompt of {} tokens, against weights, buffers and that prompt's KV blocks in its plan (which has \
             logits of more sequences than one stream touches).",
            shape.parameters() / 1_000_000,
            settings.pairs,
            LONG.0
        ),
    );
    let bed = Bed::start(vec![Host::default(); 4], None)?;
    for mesh in MESHES {
        let wanted = Wanted {
            model: &model,
            vocab: shape.vocab,
            precision: None,
            mesh,
            objective: Objective::Latency,
            reduction: None,
        };
        let before: Vec<u64> = memory(&bed)?;
        let served = bed.serve("served", wanted)?;
        bed.answer(&served, LONG.0, LONG.1)?;
        bytes(&bed, &served, &before, (mesh, &mut section))?;
        let plan = bed.explain(&served)?;
        let predicted = predicted_ms(&plan)?;
        // The first stream warms up: pages of weights are there, caches are made.
        bed.token_ms(&served, TOKENS)?;
        let measured: Series = bed.tokens_ms(&served, settings.pairs, TOKENS)?;
        compare(
            &mut section,
            format!("{mesh} ({}): error of the predicted ms a token", words(&plan)),
            predicted,
            &measured,
        );
        // A stream for each stage: every step of the full pipeline has one row.
        let streams = plan.replicas.iter().map(|replica| replica.stages.len()).sum();
        let predicted = 1e3 / predicted_full_ms(&plan)?;
        let full = |_| bed.tokens_a_second(&served, streams, MANY);
        let measured =
            (0..settings.pairs).map(full).collect::<Result<Vec<f64>>>()?.into_iter().collect();
        let what = format!("{mesh}: error of the predicted tokens/s of {streams} streams at once");
        compare(&mut section, what, predicted, &measured);
        let parts = plan.explanation.iter().filter(|line| line.contains(": predicted "));
        parts.for_each(|part| eprintln!("    {part}"));
        eprintln!("    {}", line(&bed.explain(&served)?, "r").unwrap_or_default());
        bed.remove(served)?;
    }
    Ok(section)
}

fn compare(section: &mut Section, what: String, predicted: f64, measured: &Series) {
    let error = (predicted - measured.median()).abs() / measured.median();
    let (said, predicted) = (significant(error), significant(predicted));
    let seen = format!("{said} (predicted {predicted}, measured {measured})");
    section.at_most(what, error, seen, ERROR_MAX);
}

/// The anonymous memory of each worker.
fn memory(bed: &Bed) -> Result<Vec<u64>> {
    bed.cluster.worker_pids().into_iter().map(|pid| process_memory(pid, "RssAnon")).collect()
}

fn bytes(
    bed: &Bed,
    served: &Served,
    before: &[u64],
    (mesh, section): (&str, &mut Section),
) -> Result<()> {
    let after = memory(bed)?;
    let plan = bed.explain(served)?;
    let mut worst: (f64, String) = (f64::NEG_INFINITY, String::new());
    let blocks = (LONG.0 as u64 + u64::from(LONG.1)).div_ceil(BLOCK_TOKENS.into());
    let all: u64 = plan.replicas.iter().map(|r| u64::from(r.limits.kv_blocks)).sum();
    for shard in plan.replicas.iter().flat_map(|r| &r.stages).flat_map(|stage| &stage.shards) {
        let index = shard.node.number as usize - 1;
        let grown = after[index].saturating_sub(before[index]) as f64;
        let memory = &shard.memory;
        let kv = memory.kv.0 / all.max(1) * blocks;
        let planned = (memory.weights + memory.activations).0 + kv;
        let planned = planned as f64;
        let error = (grown - planned).abs() / planned;
        if error >= worst.0 {
            let mib = |bytes: f64| (bytes / f64::from(1 << 20)).round();
            let weights = mib(memory.weights.0 as f64);
            worst = (
                error,
                format!(
                    "{}: {} MiB of {} MiB, of which weights {weights}",
                    shard.node,
                    mib(grown),
                    mib(planned)
                ),
            );
        }
    }
    section.at_most(
        format!("{mesh}: bytes in memory against the plan, the worst shard"),
        worst.0,
        format!("{} ({})", significant(worst.0), worst.1),
        MEMORY_ERROR_MAX,
    );
    Ok(())
}
