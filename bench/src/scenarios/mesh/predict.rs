//! What `shoal plan --explain` says of a token's time, and what it takes; what a plan says of memory, and what
//! the processes take.

use anyhow::{Context, Result};
use shoal_protocol::mesh::Objective;
use shoal_protocol::plan::BLOCK_TOKENS;

use super::bed::{Bed, Served, Wanted, predicted_full_ms, predicted_ms, words};
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

/// Streams one after the other in each cluster, of which the median counts.
const STREAMS: usize = 3;

/// A prompt that fills the largest step, so that all its buffers are used; and the tokens behind it.
const LONG: (usize, u32) = (600, 8);

/// The prompt and the answer of each of as many streams as there may be at once: logits of all, and a block each.
const SHORT: (usize, u32) = (4, 12);

/// Streams that have just ended may still count among those that the coordinator lets in.
const ENDING: usize = 8;

/// By how much a prediction may be wrong.
const ERROR_MAX: f64 = 0.10;

/// By how much a shard may take more than the plan says, or less.
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
             the client; each thread is bound to a processor (`--cpus`), two to each. For each figure a new cluster is started {} times, whose \
             workers measure themselves as they always do. Predicted is what `shoal plan --explain` says of a token of one stream; measured is \
             the mean distance of {TOKENS} tokens, the median of {STREAMS} streams; and of as many streams of {MANY} tokens at once as there are stages, \
             against its step when full. The error is the median of the clusters' errors. Memory: by how much the anonymous memory of each worker's \
             process has grown with the mesh, a prompt of {} tokens and as many streams of {} tokens as the layout allows at once (but {ENDING}), against weights, buffers and those \
             streams' KV blocks in its plan, in the first cluster.",
            shape.parameters() / 1_000_000,
            settings.pairs,
            LONG.0,
            SHORT.0 + SHORT.1 as usize
        ),
    );
    for mesh in MESHES {
        let [mut token, mut full] = [(); 2].map(|()| Compared::default());
        let mut layout = (String::new(), 0);
        for cluster in 0..settings.pairs {
            let bed = Bed::start([0, 1, 0, 1].map(Host::computing_on).to_vec(), None)?;
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
            let plan = bed.explain(&served)?;
            bed.answer(&served, LONG.0, LONG.1)?;
            // The first stream warms up: pages of weights are there, caches are made.
            bed.token_ms(&served, TOKENS)?;
            token.push(predicted_ms(&plan)?, bed.tokens_ms(&served, STREAMS, TOKENS)?.median());
            // A stream for each stage: every step of the full pipeline has one row.
            let streams = plan.replicas.iter().map(|replica| replica.stages.len()).sum();
            let measured = bed.tokens_a_second(&served, streams, MANY)?;
            full.push(1e3 / predicted_full_ms(&plan)?, measured);
            if cluster == 0 {
                bytes(&bed, &served, &before, (mesh, &mut section))?;
                layout = (words(&plan), streams);
            }
        }
        let (words, streams) = layout;
        token.say(&mut section, format!("{mesh} ({words}): error of the predicted ms a token"));
        let what = format!("{mesh}: error of the predicted tokens/s of {streams} streams at once");
        full.say(&mut section, what);
    }
    Ok(section)
}

/// What was predicted, and what was measured of it in the same cluster.
#[derive(Default)]
struct Compared {
    predicted: Series,
    measured: Series,
}

impl Compared {
    fn push(&mut self, predicted: f64, measured: f64) {
        self.predicted.push(predicted);
        self.measured.push(measured);
    }

    fn say(&self, section: &mut Section, what: String) {
        let errors = self.predicted.over(&self.measured).map(|ratio| (ratio - 1.0).abs());
        let seen = format!("{errors} (predicted {}, measured {})", self.predicted, self.measured);
        section.at_most(what, errors.median(), seen, ERROR_MAX);
    }
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
    let plan = bed.explain(served)?;
    let limits = &plan.replicas.first().context("one replica")?.limits;
    let streams = (limits.sequences_max as usize).saturating_sub(ENDING).max(1);
    bed.all_at_once(served, streams, SHORT)?;
    let after = memory(bed)?;
    let mut worst: (f64, String) = (f64::NEG_INFINITY, String::new());
    let blocks_of =
        |(prompt, tokens): (usize, u32)| (prompt + tokens as usize).div_ceil(BLOCK_TOKENS as usize);
    let blocks = blocks_of(LONG).max(blocks_of(SHORT) * streams) as u64;
    let all = u64::from(limits.kv_blocks);
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
