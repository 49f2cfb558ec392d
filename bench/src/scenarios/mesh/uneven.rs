//! Two workers, one of which has half the processor time.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use shoal_protocol::admin::PlanView;
use shoal_protocol::mesh::Objective;

use super::bed::{Bed, Wanted, line, words};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::processes::Host;
use crate::scenarios::Settings;
use crate::workload::model::Shape;

const TOKENS: u32 = 48;

/// Streams at once: what fills both stages.
const STREAMS: u64 = 16;

/// A control group that has half a processor. It goes with this.
struct Half(PathBuf);

impl Half {
    fn make() -> Result<Self> {
        let (folder, quota): (&str, &[(&str, &str)]) =
            match Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
                true => ("/sys/fs/cgroup/shoal-bench-half", &[("cpu.max", "5000 10000")]),
                false => (
                    "/sys/fs/cgroup/cpu/shoal-bench-half",
                    &[("cpu.cfs_period_us", "10000"), ("cpu.cfs_quota_us", "5000")],
                ),
            };
        let half = Self(PathBuf::from(folder));
        std::fs::create_dir_all(&half.0).with_context(|| folder.to_owned())?;
        for (file, value) in quota {
            std::fs::write(half.0.join(file), value).with_context(|| format!("{folder}/{file}"))?;
        }
        Ok(half)
    }

    /// What enters it before it becomes the worker.
    fn prefix(&self) -> Vec<String> {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        [&["sh", "-c", &enter, "sh"].map(str::to_owned)[..], &Host::on(1).prefix].concat()
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let shape = settings.shape(Shape::MEDIUM);
    let model = shape.write(&settings.models, 1)?;
    // Where there are no control groups, twice the threads make the other one faster.
    let half = Half::make();
    let (hosts, how) = match &half {
        Ok(half) => (
            vec![Host::on(0), Host { prefix: half.prefix(), ..Host::default() }],
            "one of them in a control group with half a processor".to_owned(),
        ),
        Err(error) => (
            vec![Host { threads: 2, ..Host::default() }, Host::default()],
            format!(
                "one with two threads and one with one, since there is no control group ({error:#})"
            ),
        ),
    };
    let mut section = Section::new(
        "Workers of unlike speed",
        format!(
            "Two workers, {how}; {STREAMS} streams of {TOKENS} tokens at once, taken in turn. `--mesh 2x1 --objective throughput` against the \
             same number of layers on both. The exact optimum is the best of all cuts by what both were measured to read while \
             they served: how close the planner's cut comes to it."
        ),
    );
    let bed = Bed::start(hosts, None)?;
    let of = |mesh| Wanted {
        model: &model,
        vocab: shape.vocab,
        precision: None,
        mesh,
        objective: Objective::Throughput,
        reduction: None,
    };
    let meshes = ["even 2", "2x1"];
    let both = [bed.serve("even", of(meshes[0]))?, bed.serve("chosen", of(meshes[1]))?];
    let mut found = [Series::default(), Series::default()];
    for served in &both {
        bed.many(served, STREAMS, TOKENS)?;
    }
    for pair in 0..settings.pairs {
        for which in [pair % 2, 1 - pair % 2] {
            found[which].push(bed.many(&both[which], STREAMS, TOKENS)?);
        }
    }
    for ((served, mesh), series) in both.iter().zip(meshes).zip(&found) {
        let plan = bed.explain(served)?;
        section.seen(format!("{mesh} ({}): tokens/s", words(&plan)), series.to_string());
    }
    let share = of_optimum(&bed.explain(&both[1])?, shape)?;
    section.at_least("the planner's cut, of the exact optimum", share, significant(share), 0.95);
    let ratio = found[1].over(&found[0]);
    section.at_least(
        "the planner's cut over the even one, tokens/s",
        ratio.median(),
        ratio.to_string(),
        1.3,
    );
    for served in both {
        bed.remove(served)?;
    }
    drop(bed);
    Ok(section)
}

/// The slowest stage of the best cut over that of this plan, by what its workers have read in a second.
fn of_optimum(plan: &PlanView, shape: Shape) -> Result<f64> {
    let replica = plan.replicas.first().context("no replica")?;
    let rates = line(plan, &format!("{} ", replica.id))?;
    eprintln!("    {rates}");
    let rate = |stage: usize| -> Result<f64> {
        let node = replica.stages[stage].shards[0].node;
        // `w1 reads 11.3GiB/s (measured)`.
        let (_, rest) = rates.split_once(&format!("{node} reads ")).context("no rate")?;
        let word = rest.split("/s").next().unwrap_or_default();
        let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim();
        let unit = match &word[digits.len()..] {
            unit if unit.contains("GiB") => 1024.0,
            unit if unit.contains("KiB") => 1.0 / 1024.0,
            _ => 1.0,
        };
        Ok(digits.parse::<f64>().with_context(|| format!("`{word}` is no rate"))? * unit)
    };
    let rates = [rate(0)?, rate(1)?];
    let head = u64::from(shape.vocab) * u64::from(shape.hidden);
    let layer = (shape.parameters() - 2 * head) / u64::from(shape.layers);
    let slowest = |cut: u32| {
        let first = f64::from(cut) * layer as f64 / rates[0];
        let last = (f64::from(shape.layers - cut) * layer as f64 + head as f64) / rates[1];
        first.max(last)
    };
    let best = (1..shape.layers).map(slowest).fold(f64::INFINITY, f64::min);
    Ok(best / slowest(replica.stages[0].layers.end))
}
