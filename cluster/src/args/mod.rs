//! Exactly what was typed: every verb, flag and default.
//!
//! Nothing here opens a socket or a file. A wrong word exits with 2 and names the nearest right
//! one.

mod access;
mod adapters;
mod ca;
mod coordinators;
mod deploy;
pub mod models;
mod moves;
mod nearest;
mod tokens;
mod upgrade;
mod values;
mod worker_addresses;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::builder::styling::Styles;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args as ClapArgs, Parser, Subcommand};
use shoal_coordinator::config::EtcdUrl;
use shoal_coordinator::router::policy::Policy;
use shoal_protocol::id::DeploymentName;
use shoal_protocol::mesh::ZoneName;
use shoal_protocol::plan::{Activations, KvPrecision, Precision};
use shoal_protocol::units::Bytes;
use shoal_shard_worker::backend::cpus::Cpus;

use crate::otlp::OtlpUrl;

pub use self::access::{
    KeyCreateArgs, KeyRevokeArgs, KeysCommand, ListArgs, NodeRemoveArgs, NodesCommand,
    TokenRevokeArgs,
};
pub use self::adapters::{AdapterLoadArgs, AdapterUnloadArgs, AdaptersCommand, RuntimeAdapterArgs};
pub use self::ca::{CaCommand, CaRotateArgs};
pub use self::coordinators::{CoordinatorsCommand, RecoverAloneArgs};
use self::deploy::DEPLOY_EXAMPLES;
pub use self::deploy::{DeployArgs, MeshArgs, UndeployArgs};
use self::moves::{DRAIN_EXAMPLES, SCALE_EXAMPLES};
pub use self::moves::{DrainArgs, RolloutCommand, RolloutStatusArgs, ScaleArgs, UndrainArgs};
use self::nearest::name_the_nearest_flag;
pub use self::tokens::{InvitationArgs, TokenCommand, TokenCreateArgs, TokenRole};
pub use self::upgrade::UpgradeCommand;
use self::values::{
    activations, address, coordinator, count, cpus, device, kv, memory, name, nonzero, policy,
    precision, store, threads, zone,
};
pub use self::worker_addresses::WorkerAddressArgs;

const ABOUT: &str = "Serve a model that is too large for one machine by splitting it over many";

const EXAMPLES: &str = "\
Examples:
  shoal up                                  the built-in model over 3 workers on this machine
  shoal up ~/models/qwen3-0.6b --workers 2  a folder in the Hugging Face layout over 2 workers
  shoal up Qwen/Qwen3-0.6B --workers 2      a model of the Hugging Face hub: HF_ENDPOINT, HF_TOKEN, HF_HOME
  shoal chat                                talk to what the newest `up` serves
  shoal status                              who is there, what is served, where each stage runs

Over several machines:
  one$ shoal coordinator --data /var/lib/shoal --listen 127.0.0.1:8000 --cluster 10.0.0.1:4000
  one$ shoal token create --role worker --context /var/lib/shoal/admin.context
  two$ shoal worker --join 10.0.0.1:4000 --token shoal1.worker.… --data /var/lib/shoal
  one$ shoal deploy /models/llama-8b --context /var/lib/shoal/admin.context

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by the cluster, 4 the cluster is unreachable.
Data goes to stdout, everything said about it to stderr.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "shoal",
    version,
    about = ABOUT,
    after_help = EXAMPLES,
    disable_help_subcommand = true,
    max_term_width = 100,
    styles = Styles::plain()
)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Every verb.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // One in a process.
pub enum Command {
    /// Start a coordinator and workers on this machine and serve a model until Ctrl-C
    #[command(after_help = UP_EXAMPLES)]
    Up(UpArgs),
    /// Run a coordinator: the API, the plan and the cluster's identity
    #[command(after_help = COORDINATOR_EXAMPLES)]
    Coordinator(CoordinatorArgs),
    /// Run a worker: this machine's share of the layers
    #[command(after_help = WORKER_EXAMPLES)]
    Worker(WorkerArgs),
    /// Make, list and revoke the tokens with which nodes join
    Token {
        /// What to do with tokens.
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Show the coordinators, add, remove and replace them, or go on with the last one
    Coordinators {
        /// What to do with coordinators.
        #[command(subcommand)]
        command: CoordinatorsCommand,
    },
    /// Serve a model, and wait until it is ready
    #[command(after_help = DEPLOY_EXAMPLES)]
    Deploy(DeployArgs),
    /// Stop serving a model
    Undeploy(UndeployArgs),
    /// Show the coordinator, the workers, and where each stage runs
    Status(StatusArgs),
    /// Show a deployment's plan: which layers are where, and what they cost
    Plan(PlanArgs),
    /// List the families of models and the precisions that this binary can serve
    Models(models::ModelsArgs),
    /// Talk to a deployment
    #[command(after_help = CHAT_EXAMPLES)]
    Chat(ChatArgs),
    /// Make, list and revoke the keys of the public API
    Keys {
        /// What to do with keys.
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// List the nodes of the cluster, and remove one for ever
    Nodes {
        /// What to do with nodes.
        #[command(subcommand)]
        command: NodesCommand,
    },
    /// Serve a model with more or fewer replicas or stages, spread over the workers there are now
    #[command(after_help = SCALE_EXAMPLES)]
    Scale(ScaleArgs),
    /// Move everything off a worker, and place nothing new on it
    #[command(after_help = DRAIN_EXAMPLES)]
    Drain(DrainArgs),
    /// Let a worker that was drained hold something again
    Undrain(UndrainArgs),
    /// Follow a change until the deployment is served as was asked for
    Rollout {
        /// What to do with a rollout.
        #[command(subcommand)]
        command: RolloutCommand,
    },
    /// Show how an upgrade of the nodes' builds stands, and complete it
    Upgrade {
        /// What to do with the upgrade.
        #[command(subcommand)]
        command: UpgradeCommand,
    },
    /// Show the CA that signs the nodes' certificates, and let a new one take its place
    Ca {
        /// What to do with it.
        #[command(subcommand)]
        command: CaCommand,
    },
    /// Load, list and unload LoRA adapters beside deployments
    Adapters {
        /// What to do with adapters.
        #[command(subcommand)]
        command: AdaptersCommand,
    },
}

const UP_EXAMPLES: &str = "\
Examples:
  shoal up                                     the built-in model, 3 workers, one stage each
  shoal up ./llama-3.2-1b --precision bf16     weights held as bf16
  shoal up ./big --workers 4 --mesh 2x2         two stages of two tensor ranks each
  shoal up ./big --workers 4 --worker-memory 600MiB
                                               a hard budget for each worker's weights, KV and
                                               activations; a model that does not fit is refused
                                               with the arithmetic
  shoal up --listen 127.0.0.1:0 --json         any free port; one line of JSON when it is ready";

/// `shoal up`.
#[derive(Debug, Clone, ClapArgs)]
pub struct UpArgs {
    /// A folder in the Hugging Face layout (config.json, weights, tokenizer.json …) or a .gguf file (any of a
    /// model in parts), a model of the hub as org/name or org/name@revision (of a GGUF repository org/name:QUANT
    /// or org/name/FILE.gguf), or s3://bucket/folder (or its FILE.gguf); without one the built-in model `demo`
    /// is served
    pub model: Option<PathBuf>,
    /// How many workers to start
    #[arg(long, value_name = "N", default_value_t = nonzero(3), value_parser = count)]
    pub workers: NonZeroU32,
    /// Into how many pipeline stages to cut the layers [default: as many as workers, without --mesh]
    #[arg(long, value_name = "S", value_parser = count)]
    pub stages: Option<NonZeroU32>,
    /// What is asked of the planner.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Hold the weights as f32, bf16, f16, q8_0, q4_0, q4_k, q5_k, q6_k, fp8 or mxfp4 [default: as they are
    /// stored]
    #[arg(long, value_name = "P", value_parser = precision)]
    pub precision: Option<Precision>,
    /// Hold keys and values of the context as f32, bf16 or q8_0 [default: f32]
    #[arg(long, value_name = "P", value_parser = kv)]
    pub kv: Option<KvPrecision>,
    /// Multiply weights in blocks of whole numbers with rows as they are (f32), or rounded too (int8) [default: int8]
    #[arg(long, value_name = "A", value_parser = activations)]
    pub activations: Option<Activations>,
    /// A hard budget for each worker's weights + KV + activations, such as 600MiB [default: an even
    /// share of the memory that is free]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub worker_memory: Option<Bytes>,
    /// Compute threads of each worker [default: an even share of the cores]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub worker_threads: Option<NonZeroU32>,
    /// Where to take the public API; port 0 picks a free one; addresses that others reach need an API
    /// key (`shoal keys create`)
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000", value_parser = address)]
    pub listen: SocketAddr,
    /// Keep identities, state and logs in this folder [default: a fresh folder, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Do not start a worker again that dies
    #[arg(long)]
    pub no_respawn: bool,
    /// When ready, print one line of JSON to stdout, and nothing else ever
    #[arg(long)]
    pub json: bool,
    /// Ask one question when ready, show the answer and how to go on; ends after it where stdin is
    /// no terminal (`make demo`)
    #[arg(long, hide = true, conflicts_with_all = ["json", "model"])]
    pub demo: bool,
    /// How replicas are chosen.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Who may load adapters.
    #[command(flatten)]
    pub adapters: RuntimeAdapterArgs,
    /// Where traces go.
    #[command(flatten)]
    pub trace: TraceArgs,
}

const COORDINATOR_EXAMPLES: &str = "\
Examples:
  shoal coordinator --data /var/lib/shoal --listen 127.0.0.1:8000 --cluster 10.0.0.1:4000
  SHOAL_ETCD_PASSWORD_FILE=/etc/shoal/etcd shoal coordinator … \
    --store etcds://shoal@10.0.0.7:2379,10.0.0.8:2379 --store-ca /etc/etcd/ca.pem

At its first start it makes the cluster's CA and an admin context file in DIR; operator verbs take
that file with --context. Stopped and started again with the same DIR it finds its deployments.";

/// `shoal coordinator`.
#[derive(Debug, Clone, ClapArgs)]
pub struct CoordinatorArgs {
    /// Identity, state and the admin context file are kept here
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Where to take the public API (HTTP); port 0 picks a free one; addresses that others reach need
    /// an API key (`shoal keys create`)
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub listen: SocketAddr,
    /// Serve the public API with TLS: the certificate and what is between it and its authority, PEM;
    /// looked at again every few seconds
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Where to take the cluster's conversations (QUIC, mutual TLS); port 0 picks a free one
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub cluster: SocketAddr,
    /// Where others reach --cluster, if that is another address
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub advertise: Option<SocketAddr>,
    /// Join the cluster of the coordinators with these --cluster addresses, instead of founding one
    #[arg(long, value_name = "ADDR", value_parser = coordinator, value_delimiter = ',')]
    pub join: Vec<SocketAddr>,
    /// What lets it in.
    #[command(flatten)]
    pub invitation: InvitationArgs,
    /// Where the cluster's state is kept.
    #[command(flatten)]
    pub store: StoreArgs,
    /// How this process is tied to the `up` that started it.
    #[command(flatten)]
    pub child: ChildArgs,
    /// How replicas are chosen.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Who may load adapters.
    #[command(flatten)]
    pub adapters: RuntimeAdapterArgs,
    /// Where traces go.
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// How replicas are chosen.
#[derive(Debug, Clone, Copy, ClapArgs)]
pub struct RoutingArgs {
    /// How to choose among the replicas of a model: score, dynamic_wrr, round_robin, p2c or peak_ewma
    #[arg(long, value_name = "NAME", default_value_t, value_parser = policy)]
    pub policy: Policy,
    /// Count the beginning of a prompt as computed at replicas to which it went before (with `score`):
    /// of use with several replicas and long prompts that begin alike
    #[arg(long)]
    pub prefix_affinity: bool,
}

/// Where the cluster's state is kept.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct StoreArgs {
    /// Keep the cluster's state in an etcd.
    #[arg(
        long,
        value_name = "URL",
        value_parser = store,
        help = "Keep the cluster's state in an etcd: etcd://[USER@]HOST:PORT[,HOST:PORT…][/PREFIX], or \
                etcds:// for TLS [default: in --data]"
    )]
    pub store: Option<EtcdUrl>,
    /// Who signs etcd's certificate (PEM), for etcds://
    #[arg(long, value_name = "FILE", env = "SHOAL_ETCD_CA_FILE")]
    pub store_ca: Option<PathBuf>,
    /// Our certificate (PEM), where etcd asks for one
    #[arg(long, value_name = "FILE", env = "SHOAL_ETCD_CERT_FILE")]
    pub store_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE", env = "SHOAL_ETCD_KEY_FILE")]
    pub store_key: Option<PathBuf>,
    /// The password of the URL's user, in one line
    #[arg(long, value_name = "FILE", env = "SHOAL_ETCD_PASSWORD_FILE")]
    pub store_password_file: Option<PathBuf>,
}

const WORKER_EXAMPLES: &str = "\
Example:
  shoal worker --join 10.0.0.1:4000 --token shoal1.worker.… --data /var/lib/shoal --memory 12GiB

The token is needed at the first start with a DIR: the identity it buys is kept there.";

/// `shoal worker`.
#[derive(Debug, Clone, ClapArgs)]
pub struct WorkerArgs {
    /// The --cluster address of a coordinator, or of several, with commas
    #[arg(long, value_name = "ADDR", value_parser = coordinator, value_delimiter = ',', required = true)]
    pub join: Vec<SocketAddr>,
    /// What lets it in.
    #[command(flatten)]
    pub invitation: InvitationArgs,
    /// Identity and unpacked models are kept here
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Where it listens, and where others find it.
    #[command(flatten)]
    pub addresses: WorkerAddressArgs,
    /// A hard budget for weights + KV + activations, such as 600MiB [default: most of the memory
    /// that is free]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub memory: Option<Bytes>,
    /// Compute threads [default: as many as cores, or as --cpus lists]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<NonZeroU32>,
    /// Bind the compute threads to these processors, such as 0-3,8: for several workers on one machine, each with its
    /// own [default: the system moves them]
    #[arg(long, value_name = "LIST", value_parser = cpus)]
    pub cpus: Option<Cpus>,
    /// What to compute on
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    pub device: String,
    /// The failure domain that it stands in, such as a rack: replicas go to different ones, and the
    /// ranks of a stage into one
    #[arg(long, value_name = "NAME", value_parser = zone)]
    pub zone: Option<ZoneName>,
    /// Where traces go.
    #[command(flatten)]
    pub trace: TraceArgs,
    /// How this process is tied to the `up` that started it.
    #[command(flatten)]
    pub child: ChildArgs,
}

/// Where traces go. Without the flag, OpenTelemetry's environment variables say it.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct TraceArgs {
    /// Send traces to this OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318
    /// [default: what OTEL_EXPORTER_OTLP_ENDPOINT says, else none]
    #[arg(long, value_name = "URL")]
    pub otlp: Option<OtlpUrl>,
}

/// How `shoal up` and the processes that it starts know of each other.
#[derive(Debug, Clone, Copy, ClapArgs)]
pub struct ChildArgs {
    /// End, after a short drain, when stdin closes
    #[arg(long, hide = true)]
    pub lifeline: bool,
    /// Print one line of JSON to stdout when started, or why not
    #[arg(long, hide = true)]
    pub announce: bool,
}

/// `shoal status`.
#[derive(Debug, Clone, ClapArgs)]
pub struct StatusArgs {
    /// Print the whole view as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal plan`.
#[derive(Debug, Clone, ClapArgs)]
pub struct PlanArgs {
    /// The deployment
    #[arg(value_parser = name)]
    pub name: DeploymentName,
    /// Show the arithmetic: weights, KV and activations of each stage, to the byte
    #[arg(long)]
    pub explain: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

const CHAT_EXAMPLES: &str = "\
Examples:
  shoal chat                                  a conversation; Ctrl-D ends it, /new forgets it
  shoal chat --ask 'What is 47 plus 38?'      one question
  shoal chat demo < questions.txt             one question a line, each on its own

Where the API needs a key, the environment variable SHOAL_API_KEY holds it.";

/// `shoal chat`.
#[derive(Debug, Clone, ClapArgs)]
pub struct ChatArgs {
    /// The deployment, or an adapter beside one [default: the only deployment]
    #[arg(value_parser = name)]
    pub name: Option<DeploymentName>,
    /// Ask this, print the answer and end
    #[arg(long, value_name = "TEXT")]
    pub ask: Option<String>,
    /// The most tokens of an answer [default: as many as the model's context holds]
    #[arg(long, value_name = "N", value_parser = count)]
    pub max_tokens: Option<NonZeroU32>,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Which cluster an operator verb talks to.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct ClusterArgs {
    /// The context file of the cluster: admin address and certificate [default: that of the newest
    /// `shoal up` that runs]
    #[arg(long, value_name = "FILE", env = "SHOAL_CONTEXT")]
    pub context: Option<PathBuf>,
}

impl Args {
    /// Reads the command line; on a mistake or `--help` returns what clap has to say, with the
    /// nearest right flag named where there is one.
    pub fn try_from_line<I>(line: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = std::ffi::OsString> + Clone,
    {
        Self::try_parse_from(line.clone())
            .map_err(|error| name_the_nearest_flag(hide_secrets(error), line))
    }
}

/// A token that cannot be read is as secret as one that can, and so is a store's URL, which may hold
/// a password: the error does not repeat it.
fn hide_secrets(mut error: clap::Error) -> clap::Error {
    let secret = |context: &ContextValue| matches!(context, ContextValue::String(flag) if flag.starts_with("--token") || flag.starts_with("--store "));
    if error.kind() == ErrorKind::ValueValidation
        && error.get(ContextKind::InvalidArg).is_some_and(secret)
    {
        let hidden = ContextValue::String("(not shown)".to_owned());
        error.insert(ContextKind::InvalidValue, hidden);
    }
    error
}

#[cfg(test)]
#[path = "args_test.rs"]
mod tests;
