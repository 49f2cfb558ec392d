//! What the ranks of a mesh fetch of a model of the hub: each its own slice, to the chunk, and the hub
//! sends each byte once.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use shoal_protocol::blob::Side;
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, Split, TensorPart};
use shoal_protocol::plan::{Assignment, Numerics};
use shoal_shard_worker::agent::Models;
use shoal_tests::model::RandomLlama;
use shoal_tests::plan::assignments;

use super::{CUT, PATIENCE, Town, WEIGHTS, Worker, source};

/// Its tensors have 8 to 32 chunks each.
const MODEL: RandomLlama = RandomLlama { layers: 4, hidden: 512, intermediate: 2048 };

/// What a rank computes with, in the file's bytes, and in how many stretches its rows lie.
#[derive(Debug)]
struct Slice {
    bytes: u64,
    stretches: u64,
}

fn slice(checkpoint: &Checkpoint, assignment: &Assignment) -> Result<Slice> {
    let (spec, replica) = (checkpoint.spec(), &assignment.replica);
    let ranks = replica.stages[assignment.stage.0 as usize].shards.len() as u32;
    let split = Split { rank: assignment.rank.0, ranks };
    let part = spec.part(split, Reduction::of(replica.numerics), replica.precision)?;
    let tensors = checkpoint.part_tensors(&part, assignment.layers());
    let f32s = |tensor: &TensorPart| tensor.row_count() * tensor.column_count() * 4;
    Ok(Slice { bytes: tensors.iter().map(f32s).sum(), stretches: tensors.len() as u64 })
}

/// Bytes of the chunks that are on record in a folder.
fn fetched(folder: &Path, len: u64) -> Result<u64> {
    let records = std::fs::read(folder.join(".chunks").join(WEIGHTS))?;
    let (records, torn) = records.get(24..).context("a head")?.as_chunks::<40>();
    ensure!(torn.is_empty(), "a torn record");
    let index =
        |record: &[u8; 40]| u32::from_le_bytes([record[0], record[1], record[2], record[3]]);
    // The one behind all is of the whole file.
    let chunks: BTreeSet<u32> = records.iter().map(index).filter(|n| *n != u32::MAX).collect();
    let bytes = |index: &u32| {
        let bytes = CUT.bytes(*index, len);
        bytes.end - bytes.start
    };
    Ok(chunks.iter().map(bytes).sum())
}

/// All ranks of a mesh load at once: what each fetched, and what the hub sent.
fn load(town: &Town, mesh: (u32, u32), numerics: Numerics) -> Result<(Vec<(u64, Slice)>, u64)> {
    let never = AtomicBool::new(false);
    let folder = |worker: &Worker| worker.cache.prepare(&source(), Side::Weights, &never);
    let checkpoint = Checkpoint::open(&folder(&town.workers[0])?)?;
    let assignments = assignments(&checkpoint, &source(), mesh, numerics)?;
    ensure!(assignments.len() == town.workers.len());
    let before = town.hub.counts().weights();
    let (cancel, begun) = (AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        let load = |worker: &Worker, assignment: &Assignment| -> Result<()> {
            let models = Models {
                data: worker.data.path().to_owned(),
                builtin: Vec::new(),
                threads: NonZeroUsize::MIN,
                cpus: Default::default(),
                cache: worker.cache.clone(),
                blobs: Some(worker.blobs.clone()),
            };
            let on_progress = |_, _| {
                if begun.elapsed() > PATIENCE {
                    cancel.store(true, Ordering::Relaxed);
                }
            };
            models.load(assignment, &on_progress, &cancel)?;
            Ok(())
        };
        let pairs = town.workers.iter().zip(&assignments);
        let all: Vec<_> = pairs.map(|(w, a)| scope.spawn(move || load(w, a))).collect();
        all.into_iter().try_for_each(|one| one.join().expect("no worker panics"))
    })?;
    let len = town.weights.len() as u64;
    let of = |(worker, assignment): (&Worker, &Assignment)| {
        Ok((fetched(&folder(worker)?, len)?, slice(&checkpoint, assignment)?))
    };
    let ranks = town.workers.iter().zip(&assignments).map(of).collect::<Result<_>>()?;
    Ok((ranks, town.hub.counts().weights() - before))
}

fn check(mesh: (u32, u32), numerics: Numerics, most_percent: u64) -> Result<()> {
    let mut town = Town::of(MODEL, 2)?;
    (0..mesh.0 * mesh.1).try_for_each(|_| town.join())?;
    let (ranks, sent) = load(&town, mesh, numerics)?;
    let all = town.weights.len() as u64;
    let stage = all / u64::from(mesh.0);
    println!("{mesh:?} {numerics:?}: the hub sent {:.3} of the model", sent as f64 / all as f64);
    for (fetched, slice) in &ranks {
        let (of, slice_of) = (*fetched as f64 / stage as f64, slice.bytes as f64 / stage as f64);
        println!("  a rank fetched {of:.3} of a stage; its slice is {slice_of:.3} of it");
        ensure!(slice.bytes <= *fetched, "{fetched} bytes for {slice:?}");
        ensure!(fetched * 100 <= stage * most_percent, "{fetched} of a stage of {stage}");
        if Reduction::of(numerics) == Reduction::Exact {
            // Each end of a stretch is rounded up to a chunk.
            let most = slice.bytes + slice.stretches * 2 * CUT.chunk;
            ensure!(*fetched <= most, "{fetched} bytes, at most {most}, for {slice:?}");
        }
    }
    ensure!(sent * 100 <= all * 105, "the hub sent {sent} bytes of a model of {all}");
    Ok(())
}

#[test]
fn a_rank_fetches_its_rows_to_the_chunk_where_everything_is_cut_by_rows() -> Result<()> {
    check((1, 2), Numerics::N1, 70)?;
    check((2, 2), Numerics::N1, 80)
}

#[test]
fn a_rank_that_holds_columns_fetches_their_rows_whole_and_the_hub_sends_them_once() -> Result<()> {
    check((1, 2), Numerics::N1Sum, 85)?;
    check((2, 2), Numerics::N1Sum, 95)
}
