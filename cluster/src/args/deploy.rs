//! `shoal deploy`, and the words for meshes: what it and `scale` ask of the planner.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;
use shoal_protocol::id::DeploymentName;
use shoal_protocol::mesh::{MeshAsk, MeshAsked, Objective, Reduction};
use shoal_protocol::plan::{Activations, KvPrecision, Precision};

use super::ClusterArgs;
use super::values::{
    activations, count, duration, kv, mesh, name, nonzero, objective, precision, reduction,
};

pub(super) const DEPLOY_EXAMPLES: &str = "\
Examples:
  shoal deploy /models/qwen3-0.6b                      as `qwen3-0.6b`, a stage per worker
  shoal deploy /models/qwen3-0.6b --name q --stages 2  as `q`, in two stages
  shoal deploy /models/llama-8b --mesh 2x2             two stages of two tensor ranks each
  shoal deploy /models/llama-8b --mesh auto --objective throughput
                                                       whatever serves the most streams here
  shoal deploy /models/llama-8b --kv q8_0              room for some four times as much context
  shoal deploy org/Llama-8B-GGUF:Q4_K_M                of the hub, by its quantisation
  shoal deploy                                         the built-in model, as `demo`

Each worker must be able to read the folder under the same path; what is of the hub each fetches itself.";

/// `shoal deploy`.
#[derive(Debug, Clone, ClapArgs)]
pub struct DeployArgs {
    /// A folder in the Hugging Face layout, a GGUF file, org/name or org/name@revision of the hub (of a GGUF
    /// repository org/name:QUANT or org/name/FILE.gguf), or s3://bucket/folder (or its FILE.gguf); without
    /// one the built-in model `demo` is served
    pub model: Option<PathBuf>,
    /// What clients will call it [default: the folder's name]
    #[arg(long, value_name = "N", value_parser = name)]
    pub name: Option<DeploymentName>,
    /// Into how many pipeline stages to cut the layers [default: as many as workers]
    #[arg(long, value_name = "S", value_parser = count)]
    pub stages: Option<NonZeroU32>,
    /// What is asked of the planner.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// How many full copies of the model to serve
    #[arg(long, value_name = "N", default_value_t = nonzero(1), value_parser = count)]
    pub replicas: NonZeroU32,
    /// Hold the weights as f32, bf16, f16, q8_0, q4_0, q4_k, q5_k, q6_k, fp8 or mxfp4 [default: as they are
    /// stored]
    #[arg(long, value_name = "P", value_parser = precision)]
    pub precision: Option<Precision>,
    /// Hold keys and values of the context as f32, bf16 or q8_0: half or a quarter of the memory for as
    /// many tokens, at little loss; it stays for as long as the model is deployed [default: f32]
    #[arg(long, value_name = "P", value_parser = kv)]
    pub kv: Option<KvPrecision>,
    /// Multiply weights in blocks of whole numbers (q8_0, q4_0, q4_k, q5_k, q6_k) with rows as they are (f32), or
    /// with rows that are rounded to blocks too (int8), as llama.cpp does: tokens take some 0.7 of the time and
    /// prompts a quarter; it stays for as long as the model is deployed [default: int8]
    #[arg(long, value_name = "A", value_parser = activations)]
    pub activations: Option<Activations>,
    /// Return when the cluster has accepted it, before it is ready
    #[arg(long)]
    pub no_wait: bool,
    /// End with 1 if it is not ready by then, such as 90s or 30m; the cluster goes on with it [default: wait for as
    /// long as the cluster works on it]
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "no_wait")]
    pub timeout: Option<Duration>,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// What is asked of the planner. Without any of it a deployment has a stage for each worker.
#[derive(Debug, Clone, Copy, Default, ClapArgs)]
pub struct MeshArgs {
    /// Pipeline stages x tensor ranks, such as 2x2, or `auto`: chosen by what the workers measured of
    /// themselves and of the ways between them; --stages N is an N x 1 mesh with layers spread evenly
    #[arg(long, value_name = "SxR", value_parser = mesh, conflicts_with = "stages")]
    pub mesh: Option<MeshAsked>,
    /// What the layout is to be good at: latency (the time of one token) or throughput (the slowest
    /// stage) [default: latency, where a mesh is asked for]
    #[arg(long, value_name = "O", value_parser = objective)]
    pub objective: Option<Objective>,
    /// How tensor ranks come to one result: sum (fast; the last bits depend on the mesh) or exact (the
    /// bits of an unsplit model) [default: sum]
    #[arg(long, value_name = "R", value_parser = reduction)]
    pub reduction: Option<Reduction>,
}

impl From<MeshArgs> for MeshAsk {
    fn from(args: MeshArgs) -> Self {
        let MeshArgs { mesh, objective, reduction } = args;
        Self { mesh, objective, reduction, kv: None, activations: None }
    }
}

/// `shoal undeploy`.
#[derive(Debug, Clone, ClapArgs)]
pub struct UndeployArgs {
    /// The deployment
    #[arg(value_parser = name)]
    pub name: DeploymentName,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}
