//! `shoal-bench`: measures, prints what it sees, writes the report.
//!
//! `shoal-bench [micro|split|all] [--pairs N] [--models DIR] [--out FILE]`

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use shoal_bench::measure::Report;
use shoal_bench::{micro, scenarios};

fn main() -> Result<()> {
    let mut what = "all".to_owned();
    let mut out: Option<PathBuf> = None;
    let mut settings =
        scenarios::Settings { pairs: 7, models: std::env::temp_dir().join("shoal-bench-models") };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "micro" | "split" | "all" => what = arg,
            "--pairs" => settings.pairs = value()?.parse().context("--pairs takes a number")?,
            "--models" => settings.models = value()?.into(),
            "--out" => out = Some(value()?.into()),
            _ => bail!(
                "unknown argument {arg}; use [micro|split|all] [--pairs N] [--models DIR] [--out FILE]"
            ),
        }
    }
    let mut report = Report::default();
    if what != "micro" {
        scenarios::run(&settings, &mut report)?;
    }
    if what != "split" {
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
