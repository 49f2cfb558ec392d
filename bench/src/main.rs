//! `shoal-bench`: measures, prints what it sees, writes the report.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use shoal_bench::measure::Report;
use shoal_bench::{micro, scenarios};

const USAGE: &str = "\
usage: shoal-bench [WHAT] [--pairs N=7] [--trials N=30] [--models DIR] [--small] [--only PART] [--out FILE]
  all       micro and split; the default
  micro     frames, a hop, beats, the engine, the planner
  split     real clusters on loopback: split against unsplit, loading
  control   those below, all in nine minutes
  leader    kill -9 of the leader: until another leads, and the gaps of streams meanwhile
  election  the same without processes: three voters in this one, whose messages are lost
  detect    kill -9 and SIGSTOP of workers: until they are given up
  gray      a replica four times slower on real processes, under two policies
  mesh      predicted against measured, ranks, unlike workers, slow ways: some minutes
  peers     beside llama.cpp, in turn: one stream, many, meshes; needs --llama
  planner   how long a plan takes
  families  what a token costs in each family, against Llama's
  products  what a product with a matrix costs in each format
  route     the same in the simulator, under each policy; the time of a pick
  quality   what each precision of weights and KV cache costs, against f32
  serve     what the coordinator adds to a request, and its processor time
  prefix    prompts that begin alike: until the first token, against new ones
  size      1.04 billion parameters over meshes of workers none of which has room for all
  --pairs   pairs of runs of each comparison, taken in turn
  --trials  faults of each kind
  --small   mesh, peers, prefix with a small model: whether it works
  --only    of mesh: predict, ranks, uneven or links; of peers: one, many or meshes
  --llama   the folder with llama.cpp's programs (scripts/llama-cpp.sh builds them)
  --models  where random models are written and kept (8 GiB); default: the system's temporary folder
  --out     where the report is written; default: stdout";

/// Whole groups.
const GROUPS: [&str; 4] = ["all", "micro", "split", "control"];

/// Those of the control plane that run in this process.
const WITHIN: [&str; 8] =
    ["mesh", "peers", "route", "election", "quality", "planner", "families", "products"];

fn main() -> Result<()> {
    let mut what = "all".to_owned();
    let mut out: Option<PathBuf> = None;
    let mut settings = scenarios::Settings {
        pairs: 7,
        trials: 30,
        models: std::env::temp_dir().join("shoal-bench-models"),
        small: false,
        llama: PathBuf::new(),
        only: None,
    };
    let mut args = std::env::args().skip(1).peekable();
    if args.peek().is_some_and(|arg| arg == scenarios::mesh::relay::RELAY) {
        return scenarios::mesh::relay::run(&args.skip(1).collect::<Vec<_>>());
    }
    if args.peek().is_some_and(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return Ok(());
    }
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            _ if is_known(&arg) => what = arg,
            "--trials" => settings.trials = value()?.parse().context("--trials takes a number")?,
            "--pairs" => settings.pairs = value()?.parse().context("--pairs takes a number")?,
            "--models" => settings.models = value()?.into(),
            "--llama" => settings.llama = value()?.into(),
            "--small" => settings.small = true,
            "--only" => settings.only = Some(value()?),
            "--out" => out = Some(value()?.into()),
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    let mut report = Report::default();
    if what == "split" || what == "all" {
        scenarios::run(&settings, &mut report)?;
    }
    if what == "micro" || what == "all" {
        micro::run(&mut report)?;
    }
    for (name, run) in scenarios::CONTROL {
        if what == name || what == "control" {
            report.sections.push(run(&settings)?);
        }
    }
    for (name, run) in scenarios::ALONE {
        if what == name {
            report.sections.push(run(&settings)?);
        }
    }
    if what == "election" || what == "control" {
        micro::election::run(&mut report)?;
    }
    if what == "mesh" {
        scenarios::mesh::run(&settings, &mut report)?;
    }
    if what == "peers" {
        scenarios::peers::run(&settings, &mut report)?;
    }
    if what == "planner" {
        report.sections.push(micro::planner::run()?);
    }
    if what == "families" {
        report.sections.push(micro::families::run(settings.pairs)?);
    }
    if what == "products" {
        report.sections.push(micro::products::run(settings.pairs)?);
    }
    if what == "quality" {
        report.sections.push(micro::quality::run()?);
    }
    if what == "route" || what == "control" {
        micro::route::run(&mut report)?;
    }
    let by = match what.as_str() {
        "all" => "make bench".to_owned(),
        "control" => "make bench-control".to_owned(),
        "quality" => "make bench-quality".to_owned(),
        "families" => "make bench-families".to_owned(),
        "products" => "make bench-products".to_owned(),
        "mesh" => "make bench-mesh".to_owned(),
        "peers" => "make bench-peers".to_owned(),
        "prefix" => "make bench-prefix".to_owned(),
        _ => format!("shoal-bench {what}"),
    };
    let text = report.markdown(&by);
    match out {
        Some(path) => std::fs::write(&path, text)
            .with_context(|| format!("cannot write {}", path.display()))?,
        None => println!("{text}"),
    }
    Ok(())
}

fn is_known(what: &str) -> bool {
    let mut scenarios = scenarios::CONTROL.iter().chain(&scenarios::ALONE).map(|(name, _)| name);
    GROUPS.contains(&what) || WITHIN.contains(&what) || scenarios.any(|name| *name == what)
}
