//! Loading a model of more than 1 GiB: time against reading its files, and memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Settings;
use crate::cluster::{Cluster, Options, process_memory};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::workload::model::Shape;

/// The pause between two looks at a process's memory: a load takes hundreds of times as long.
const LOOK: Duration = Duration::from_millis(2);

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let model = Shape::LARGE.write(&settings.models, 2)?;
    let bytes: u64 =
        weight_files(&model)?.iter().map(|p| fs::metadata(p).map_or(0, |m| m.len())).sum();
    let mut section = Section::new(
        "Loading",
        format!(
            "{:.2} GiB in bf16 in {} files, three workers with one thread each on a running cluster: the time of \
             `shoal deploy` until it returns ready, against the time to read the same files with one thread in the \
             same state of the page cache (cold: dropped with posix_fadvise), taken in turn.",
            bytes as f64 / f64::from(1 << 30),
            Shape::LARGE.files
        ),
    );
    let cluster = Cluster::start(&Options { workers: 3, threads: 1, ..Options::default() })?;
    let path = model.to_str().context("the model's path is not UTF-8")?;
    let deploy = || -> Result<f64> {
        let start = Instant::now();
        cluster.operate(&["deploy", path, "--name", "large"])?;
        Ok(start.elapsed().as_secs_f64())
    };
    for cold in [false, true] {
        let (mut reads, mut loads) = (Series::default(), Series::default());
        for _ in 0..settings.pairs.min(5) {
            prepare(&model, cold)?;
            reads.push(read_all(&model)?.as_secs_f64());
            prepare(&model, cold)?;
            if loads.is_empty() && !cold {
                // Not timed: looking takes time, too.
                let (_, peaks) = watch_memory(&cluster.worker_pids(), deploy)?;
                memory(&cluster, &peaks, &mut section)?;
                cluster.operate(&["undeploy", "large"])?;
                prepare(&model, cold)?;
            }
            loads.push(deploy()?);
            cluster.operate(&["undeploy", "large"])?;
        }
        let state = if cold { "cold" } else { "warm" };
        section.seen(format!("seconds to read the files, {state}"), reads.to_string());
        let bound = 1.3 * reads.median() + 1.0;
        section.at_most(
            format!("seconds to ready, {state} (1.3 x reading + 1 s)"),
            loads.median(),
            loads.to_string(),
            (bound * 100.0).round() / 100.0,
        );
    }
    Ok(section)
}

/// Runs `work` while it looks at the anonymous memory of these processes; gives the most of each.
/// (Linux keeps a peak of all resident memory alone, in which the files that are read count too.)
fn watch_memory<T>(
    pids: &[u32],
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, BTreeMap<u32, u64>)> {
    let mut peaks: BTreeMap<u32, u64> = pids.iter().map(|pid| (*pid, 0)).collect();
    let (done, ended) = std::sync::mpsc::sync_channel::<()>(0);
    let seen = &mut peaks;
    std::thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                for (pid, peak) in seen.iter_mut() {
                    *peak = process_memory(*pid, "RssAnon").unwrap_or(0).max(*peak);
                }
            }
        });
        let result = work();
        drop(done);
        if watcher.join().is_err() {
            bail!("the thread that looks at memory panicked");
        }
        result
    })
    .map(|result| (result, peaks))
}

/// Peak anonymous memory of each worker against its slices and its KV budget.
fn memory(cluster: &Cluster, peaks: &BTreeMap<u32, u64>, section: &mut Section) -> Result<()> {
    let status: serde_json::Value = serde_json::from_str(&cluster.operate(&["status", "--json"])?)?;
    for worker in status["workers"].as_array().context("no workers in the status")? {
        let pid = worker["pid"].as_u64().context("no pid")? as u32;
        let shards = worker["shards"].as_array().cloned().unwrap_or_default();
        let held = |key: &str| shards.iter().filter_map(|s| s["memory"][key].as_u64()).sum::<u64>();
        let (weights, kv) = (held("weights"), held("kv"));
        let anonymous = *peaks.get(&pid).context("a worker that was not there before")?;
        anyhow::ensure!(anonymous > 0, "the memory of process {pid} could not be read");
        let bound = 1.05 * (weights + kv) as f64 + f64::from(80 << 20);
        let id = worker["id"].as_str().unwrap_or("?");
        section.at_most(
            format!(
                "{id}: peak anonymous memory while loading over its bound (1.05 x (weights + KV budget) + 80 MiB)"
            ),
            anonymous as f64 / bound,
            format!(
                "{} ({} MiB; slices {} MiB, KV budget {} MiB)",
                significant(anonymous as f64 / bound),
                anonymous >> 20,
                weights >> 20,
                kv >> 20
            ),
            1.0,
        );
    }
    Ok(())
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder)?.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    Ok(files)
}

/// Brings the files into the page cache, or out of it.
fn prepare(folder: &Path, cold: bool) -> Result<()> {
    if !cold {
        read_all(folder)?;
        return Ok(());
    }
    for path in weight_files(folder)? {
        let file = File::open(path)?;
        file.sync_all()?;
        drop_cache(&file)?;
    }
    Ok(())
}

#[allow(unsafe_code, reason = "the standard library has no posix_fadvise")]
fn drop_cache(file: &File) -> Result<()> {
    // SAFETY: the descriptor is open for the length of the call, which touches no memory of ours.
    let failed = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    anyhow::ensure!(failed == 0, "posix_fadvise: {}", std::io::Error::from_raw_os_error(failed));
    Ok(())
}

fn read_all(folder: &Path) -> Result<Duration> {
    let mut buffer = vec![0u8; 1 << 20];
    let start = Instant::now();
    for path in weight_files(folder)? {
        let mut file = File::open(path)?;
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(start.elapsed())
}
