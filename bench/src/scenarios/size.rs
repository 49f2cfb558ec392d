//! A model of real size that no single worker has room for: served over each mesh, it says what one worker
//! with room for all of it says.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::Settings;
use crate::cluster::{Cluster, Options, process_memory};
use crate::measure::report::Section;
use crate::workload::model::Shape;
use crate::workload::prompt;

/// What it is served as.
const NAME: &str = "size";
const PROMPT: usize = 24;
const TOKENS: u32 = 32;

/// What a worker process takes beside its shards: code, stacks, connections, and the pieces in which it
/// reads weights.
const PROCESS: u64 = 160 << 20;

/// A mesh, and the budget of each of its workers in MiB: less than the model, more than a share.
const MESHES: [(&str, usize, u64); 3] = [("2x1", 2, 1400), ("1x2", 2, 1400), ("2x2", 4, 800)];

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let shape = Shape::BILLION;
    let model = shape.write(&settings.models, 3)?;
    let model = model.to_str().context("the model's path is not UTF-8")?;
    let mib = (2 * shape.parameters()) >> 20;
    let mut section = Section::new(
        "A model that no single worker has room for",
        format!(
            "{:.2} billion parameters, {mib} MiB in bf16, random weights. Each worker has a hard budget \
             (`--worker-memory`) below that. {TOKENS} greedy tokens after {PROMPT}; one worker without a \
             budget says what is right.",
            shape.parameters() as f64 / 1e9
        ),
    );
    let question = prompt(7, PROMPT, shape.vocab);
    let expected = {
        let mut alone = start(1, None)?;
        serve(&mut alone, model, &["--stages", "1"])?;
        alone.generate(&question, TOKENS)?
    };
    section
        .seen("seconds, one worker with room for all", format!("{:.1}", expected.0.as_secs_f64()));
    for (mesh, workers, budget) in MESHES {
        ensure!(budget < mib, "a budget of {budget} MiB has room for all of {mib} MiB");
        let mut cluster = start(workers, Some(budget))?;
        refused(&cluster, model, budget, &mut section)?;
        for reduction in ["exact", "sum"] {
            serve(&mut cluster, model, &["--mesh", mesh, "--reduction", reduction])?;
            let (took, found) = cluster.generate(&question, TOKENS)?;
            let same = found.iter().zip(&expected.1).take_while(|(a, b)| a == b).count();
            let seen = format!("{same} of {TOKENS}, {:.1} s", took.as_secs_f64());
            let what = format!("{mesh} {reduction}, {workers} x {budget} MiB: the same tokens");
            section.judged(what, seen, format!("{TOKENS}"), same == TOKENS as usize);
            memory(&cluster, (mesh, reduction, budget), &mut section)?;
            cluster.operate(&["undeploy", NAME])?;
        }
    }
    Ok(section)
}

/// A cluster with one compute thread a worker that serves nothing.
fn start(workers: usize, budget: Option<u64>) -> Result<Cluster> {
    let flags = budget.map(|mib| vec!["--worker-memory".to_owned(), format!("{mib}MiB")]);
    let flags = flags.unwrap_or_default();
    let cluster = Cluster::start(&Options { workers, threads: 1, flags, ..Options::default() })?;
    cluster.operate(&["undeploy", "demo"])?;
    Ok(cluster)
}

fn serve(cluster: &mut Cluster, model: &str, mesh: &[&str]) -> Result<()> {
    let words = [["deploy", model, "--name", NAME].as_slice(), mesh].concat();
    cluster.operate(&words)?;
    cluster.talk_to(NAME);
    Ok(())
}

/// One worker of this budget alone refuses the model.
fn refused(cluster: &Cluster, model: &str, budget: u64, section: &mut Section) -> Result<()> {
    let words = ["deploy", model, "--name", "alone", "--stages", "1"];
    let Err(error) = cluster.operate(&words) else {
        bail!("one worker with {budget} MiB serves all of {}", Path::new(model).display());
    };
    let said = error.to_string();
    let line = said.lines().find(|line| line.contains("fit")).unwrap_or(&said).to_owned();
    let fits = said.contains("does not fit") || said.contains("fits");
    section.judged(format!("one worker with {budget} MiB"), line, "refused with the sums", fits);
    // A deployment that waits for room would stand in the way of the next.
    let _ = cluster.operate(&["undeploy", "alone"]);
    Ok(())
}

/// The most anonymous memory of a worker against its budget.
fn memory(
    cluster: &Cluster,
    (mesh, reduction, budget): (&str, &str, u64),
    section: &mut Section,
) -> Result<()> {
    let of = |pid: &u32| process_memory(*pid, "RssAnon");
    let held = cluster.worker_pids().iter().map(of).collect::<Result<Vec<_>>>()?;
    let most = held.into_iter().max().context("there are workers")?;
    let bound = ((budget << 20) + PROCESS) >> 20;
    section.at_most(
        format!(
            "{mesh} {reduction}: MiB of anonymous memory of the fullest worker (budget + 160 MiB)"
        ),
        (most >> 20) as f64,
        (most >> 20).to_string(),
        bound as f64,
    );
    Ok(())
}
