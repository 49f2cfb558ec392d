//! Whole-system measurements on real processes.

use std::path::PathBuf;

use anyhow::Result;

use crate::measure::Report;

mod decode;
mod load;
mod pipeline;

/// What a run of the scenarios may take.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Pairs of runs of each comparison.
    pub pairs: usize,
    /// Where random models are written and kept.
    pub models: PathBuf,
}

/// All of them, in order.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    report.sections.push(decode::run(settings)?);
    report.sections.push(pipeline::run(settings)?);
    report.sections.push(load::run(settings)?);
    Ok(())
}
