//! Meshes on real processes: what the planner predicts against what is measured, and what its choices are worth.

pub(super) mod bed;
mod links;
mod predict;
mod ranks;
pub mod relay;
mod uneven;

use anyhow::Result;

use super::{Control, Settings};
use crate::measure::Report;

/// All of them, in order, or the one that is asked for.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let wanted = |part: &str| settings.only.as_deref().is_none_or(|only| only == part);
    let parts: [(&str, Control); 5] = [
        ("predict", predict::run),
        ("ranks", ranks::run),
        ("uneven", uneven::run),
        ("links", |settings| links::run(settings, 1)),
        ("links", |settings| links::run(settings, 10)),
    ];
    settings.check_part(&parts.map(|(name, _)| name))?;
    for (part, run) in parts {
        if wanted(part) {
            report.sections.push(run(settings)?);
        }
    }
    Ok(())
}
