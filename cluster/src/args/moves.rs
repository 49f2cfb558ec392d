//! The verbs that move shards: `scale`, `drain`, `undrain`, `rollout status`.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use shoal_protocol::id::{DeploymentName, NodeId};
use shoal_protocol::plan::StagesAsked;

use super::values::{count, duration, name, stages, worker};
use super::{ClusterArgs, MeshArgs};

pub(super) const SCALE_EXAMPLES: &str = "\
Examples:
  shoal scale demo --replicas 2              a second full copy
  shoal scale demo --stages auto             as many stages as there are workers for each replica now
  shoal scale demo --stages 4 --dry-run      what would move, and how fast it would be
  shoal scale demo --mesh auto --dry-run     the mesh that the planner would choose

The new layout is loaded beside the one that serves where there is memory for both.";

/// `shoal scale`.
#[derive(Debug, Clone, ClapArgs)]
pub struct ScaleArgs {
    /// The deployment
    #[arg(value_parser = name)]
    pub name: DeploymentName,
    /// How many full copies of the model to serve [default: as many as now]
    #[arg(long, value_name = "N", value_parser = count)]
    pub replicas: Option<NonZeroU32>,
    /// Into how many pipeline stages to cut each, or `auto` [default: as was asked for before]
    #[arg(long, value_name = "S", value_parser = stages)]
    pub stages: Option<StagesAsked>,
    /// What is asked of the planner; what is left out stays as it was.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Show before and after, bytes to read and expected speed, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Return when the cluster has accepted it, before it is as was asked for
    #[arg(long)]
    pub no_wait: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

pub(super) const DRAIN_EXAMPLES: &str = "\
Examples:
  shoal drain w2 --dry-run      what would move where, and what could not
  shoal drain w2 --wait         ... and wait until it holds nothing: then it can be stopped
  shoal drain w2 w3 --wait      both; nothing happens where one of the names is unknown
  shoal undrain w2 w3           they may hold something again

--wait ends with 1 after some seconds where something cannot leave the worker, and says what is missing;
the worker stays marked.";

/// `shoal drain`.
#[derive(Debug, Clone, ClapArgs)]
pub struct DrainArgs {
    /// The workers: w2, or worker-2
    #[arg(required = true, value_name = "WORKER", value_parser = worker)]
    pub nodes: Vec<NodeId>,
    /// Wait until they hold nothing
    #[arg(long)]
    pub wait: bool,
    /// How long to wait, for all of them
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration, requires = "wait")]
    pub timeout: Duration,
    /// Show what would move where, of each if it were drained alone, and change nothing
    #[arg(long, conflicts_with = "wait")]
    pub dry_run: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal undrain`.
#[derive(Debug, Clone, ClapArgs)]
pub struct UndrainArgs {
    /// The workers: w2, or worker-2
    #[arg(required = true, value_name = "WORKER", value_parser = worker)]
    pub nodes: Vec<NodeId>,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal rollout …`.
#[derive(Debug, Subcommand)]
pub enum RolloutCommand {
    /// Wait until a deployment is served as was asked for; exits with 1 where it is not in time
    Status(RolloutStatusArgs),
}

/// `shoal rollout status`.
#[derive(Debug, Clone, ClapArgs)]
pub struct RolloutStatusArgs {
    /// The deployment
    #[arg(value_parser = name)]
    pub name: DeploymentName,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub timeout: Duration,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}
