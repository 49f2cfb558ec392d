//! Whole-system measurements on real processes.

use std::path::PathBuf;

use anyhow::Result;

use crate::measure::Report;
use crate::measure::report::Section;
use crate::workload::model::Shape;

mod decode;
mod detect;
mod gray;
mod leader;
mod load;
pub mod mesh;
pub mod peers;
mod pipeline;
mod prefix;
mod serve;
mod size;

/// What a run of the scenarios may take.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Pairs of runs of each comparison.
    pub pairs: usize,
    /// Faults of each kind.
    pub trials: usize,
    /// Where random models are written and kept.
    pub models: PathBuf,
    /// Meshes of a small model: whether it works, not how fast.
    pub small: bool,
    /// Where llama.cpp's programs are.
    pub llama: PathBuf,
    /// That part of meshes, or of peers, alone.
    pub only: Option<String>,
}

impl Settings {
    /// That a part of this name is there, where one is asked for.
    fn check_part(&self, names: &[&str]) -> Result<()> {
        match &self.only {
            Some(only) if !names.contains(&only.as_str()) => {
                anyhow::bail!("--only {only} is none of {}", names.join(", "))
            }
            _ => Ok(()),
        }
    }

    /// This model, or the small one.
    fn shape(&self, shape: Shape) -> Shape {
        if self.small { Shape::SMALL } else { shape }
    }
}

/// All of them, in order.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    report.sections.push(decode::run(settings)?);
    report.sections.push(pipeline::run(settings)?);
    report.sections.push(load::run(settings)?);
    Ok(())
}

/// A measurement that is a section of its own.
pub type Control = fn(&Settings) -> Result<Section>;

/// Those of the control plane: what faults, gray failures and the coordinator itself cost, by name.
pub const CONTROL: [(&str, Control); 4] =
    [("leader", leader::run), ("detect", detect::run), ("gray", gray::run), ("serve", serve::run)];

/// Those that are run by name alone, as they take minutes.
pub const ALONE: [(&str, Control); 2] = [("size", size::run), ("prefix", prefix::run)];
