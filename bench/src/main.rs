//! `shoal-bench`: measures, prints what it sees, writes the report.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use shoal_bench::measure::Report;
use shoal_bench::{micro, scenarios};

const USAGE: &str = "\
usage: shoal-bench [micro|split|route|election|all] [--pairs N=7] [--models DIR] [--out FILE]
  micro   frames, a hop, the engine, the planner
  split   real clusters on loopback: split against unsplit, loading
  route   the router: a simulated bad replica under each policy; the time of a pick
  election  how long three coordinators are without a leader when theirs dies
  all     micro and split; the default
  --pairs   pairs of runs of each comparison, taken in turn
  --models  where random models are written and kept (2 GiB); default: the system's temporary folder
  --out     where the report is written; default: stdout";

fn main() -> Result<()> {
    let mut what = "all".to_owned();
    let mut out: Option<PathBuf> = None;
    let mut settings =
        scenarios::Settings { pairs: 7, models: std::env::temp_dir().join("shoal-bench-models") };
    let mut args = std::env::args().skip(1).peekable();
    if args.peek().is_some_and(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return Ok(());
    }
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "micro" | "split" | "route" | "election" | "all" => what = arg,
            "--pairs" => settings.pairs = value()?.parse().context("--pairs takes a number")?,
            "--models" => settings.models = value()?.into(),
            "--out" => out = Some(value()?.into()),
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    let mut report = Report::default();
    if what == "route" {
        micro::route::run(&mut report)?;
    }
    if what == "election" {
        micro::election::run(&mut report)?;
    }
    if what == "split" || what == "all" {
        scenarios::run(&settings, &mut report)?;
    }
    if what == "micro" || what == "all" {
        micro::run(&mut report)?;
    }
    let text = report.markdown();
    match out {
        Some(path) => std::fs::write(&path, text)
            .with_context(|| format!("cannot write {}", path.display()))?,
        None => println!("{text}"),
    }
    Ok(())
}
