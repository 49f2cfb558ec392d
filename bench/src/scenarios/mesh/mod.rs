//! Meshes on real processes: what the planner predicts against what is measured, and what its choices are worth.

mod bed;
mod links;
mod predict;
mod ranks;
pub mod relay;
mod uneven;

use anyhow::Result;

use super::Settings;
use crate::measure::Report;

/// All of them, in order.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    report.sections.push(predict::run(settings)?);
    report.sections.push(ranks::run(settings)?);
    report.sections.push(uneven::run(settings)?);
    for latency_ms in [1, 10] {
        report.sections.push(links::run(settings, latency_ms)?);
    }
    Ok(())
}
