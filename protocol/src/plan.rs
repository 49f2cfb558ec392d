//! The complete assignment of shards to devices: immutable nouns that the planner, the replicated
//! state, the workers and the CLI share.

use serde::{Deserialize, Serialize};

use crate::id::{
    DeploymentName, Generation, NodeId, PlanRevision, RankIndex, ReplicaId, StageIndex,
};
use crate::units::{Bytes, LayerRange};

pub use crate::numerics::{Activations, KvPrecision, Numerics};

/// The number of token positions in one block of the KV cache, aligned to position 0.
pub const BLOCK_TOKENS: u32 = 16;

/// The type in which a shard holds its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Blocks of 32 signed bytes with one scale.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Blocks of 32 four-bit numbers with one scale.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// Blocks of 256 four-bit numbers; each 32 of them have a scale and a least value of six bits.
    #[serde(rename = "q4_k")]
    Q4K,
    /// Blocks of 128 numbers of eight bits (e4m3: four of exponent, three of fraction) with one scale.
    #[serde(rename = "fp8")]
    Fp8,
    /// Blocks of 256 five-bit numbers; each 32 of them have a scale and a least value of six bits.
    #[serde(rename = "q5_k")]
    Q5K,
    /// Blocks of 256 six-bit numbers; each 16 of them have a scale of eight bits.
    #[serde(rename = "q6_k")]
    Q6K,
    /// Experts alone, in blocks of 32 four-bit numbers (e2m1: one of fraction) with one power of two; all other
    /// matrices as bfloat16, as GPT-OSS is published.
    #[serde(rename = "mxfp4")]
    Mxfp4,
}

impl Precision {
    /// All of them, in the order in which messages list them.
    pub const ALL: [Precision; 10] = [
        Precision::F32,
        Precision::Bf16,
        Precision::F16,
        Precision::Q8_0,
        Precision::Q4_0,
        Precision::Q4K,
        Precision::Fp8,
        Precision::Q5K,
        Precision::Q6K,
        Precision::Mxfp4,
    ];

    /// Weights of one row that share a scale, and the bytes that they are held in.
    pub const fn block(self) -> (u64, u64) {
        match self {
            Precision::F32 => (1, 4),
            Precision::Bf16 | Precision::F16 => (1, 2),
            // A scale of two bytes, then the numbers.
            Precision::Q8_0 => (32, 2 + 32),
            Precision::Q4_0 => (32, 2 + 16),
            // Two scales of two bytes; for each 32 weights two bytes and the numbers.
            Precision::Q4K => (256, 4 + 8 * (2 + 16)),
            // A scale of four bytes.
            Precision::Fp8 => (128, 4 + 128),
            // As q4_k, with a fifth bit of each weight.
            Precision::Q5K => (256, 4 + 8 * (2 + 16 + 4)),
            // A scale of two bytes; for each 16 weights one byte, and six bits each.
            Precision::Q6K => (256, 2 + 16 * (1 + 8 + 4)),
            // An exponent of one byte.
            Precision::Mxfp4 => (32, 1 + 16),
        }
    }

    /// Bytes of so many weights of one row as they are held: whole blocks.
    pub const fn row_bytes(self, columns: u64) -> u64 {
        let (weights, bytes) = self.block();
        columns.div_ceil(weights) * bytes
    }

    /// Whether weights of one block share a scale, so that a weight is not its own nearest value.
    pub const fn is_quantised(self) -> bool {
        self.block().0 > 1
    }

    /// Whether weights are whole numbers with a factor, so that products can be of whole numbers.
    pub const fn has_numbers(self) -> bool {
        use Precision::{Q4_0, Q4K, Q5K, Q6K, Q8_0};
        matches!(self, Q8_0 | Q4_0 | Q4K | Q5K | Q6K)
    }

    /// Whether it needs less memory than another one.
    pub const fn is_smaller_than(self, other: Precision) -> bool {
        const COLUMNS: u64 = 256;
        self.row_bytes(COLUMNS) < other.row_bytes(COLUMNS)
    }

    /// The word of the CLI.
    pub const fn as_str(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
            Precision::Q8_0 => "q8_0",
            Precision::Q4_0 => "q4_0",
            Precision::Q4K => "q4_k",
            Precision::Fp8 => "fp8",
            Precision::Q5K => "q5_k",
            Precision::Q6K => "q6_k",
            Precision::Mxfp4 => "mxfp4",
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Precision {
    type Err = String;

    /// In either case: GGUF files write `Q8_0`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "f32" | "float32" => Ok(Precision::F32),
            "bf16" | "bfloat16" => Ok(Precision::Bf16),
            "f16" | "float16" => Ok(Precision::F16),
            "q8_0" => Ok(Precision::Q8_0),
            "q4_0" => Ok(Precision::Q4_0),
            "q4_k" => Ok(Precision::Q4K),
            "fp8" => Ok(Precision::Fp8),
            "q5_k" => Ok(Precision::Q5K),
            "q6_k" => Ok(Precision::Q6K),
            "mxfp4" => Ok(Precision::Mxfp4),
            _ => Err(format!(
                "`{text}` is not a precision; use f32, bf16, f16, q8_0, q4_0, q4_k, q5_k, q6_k, \
                 fp8 or mxfp4"
            )),
        }
    }
}

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// A folder in the Hugging Face layout, readable under this path on each node.
    Folder {
        /// An absolute path.
        path: String,
    },
    /// A model inside the binary, by name; each node unpacks it into its data folder.
    Builtin {
        /// Such as `demo`.
        name: String,
    },
    /// No files: a seeded pretend model with modelled time (`PretendSpec`), for tests and benches.
    Pretend(PretendSpec),
    /// A model of the Hugging Face hub, or of a mirror of it; each node fetches what it needs of it. For
    /// nodes that speak [`crate::version::KNOWS_HUB`].
    Hub {
        /// `org/name`.
        repo: String,
        /// A branch, a tag or a commit; in plans a commit, which names the same bytes for ever.
        revision: String,
    },
    /// A folder of an S3-compatible object store, or a GGUF file in one. For nodes that speak
    /// [`crate::version::KNOWS_HUB`].
    ObjectStore {
        /// `s3://bucket/folder` or `s3://bucket/folder/FILE.gguf`.
        url: String,
        /// Empty where it is asked for; in plans a hash of its files' names, lengths and ETags.
        revision: String,
    },
    /// One of the GGUF models of a repository of the Hugging Face hub. For nodes that speak
    /// [`crate::version::KNOWS_HUB`].
    HubGguf {
        /// `org/name`.
        repo: String,
        /// A branch, a tag or a commit; in plans a commit.
        revision: String,
        /// A quantisation such as `Q4_K_M`, or a file of the repository; in plans the file, of a model in
        /// parts the first.
        file: String,
    },
}

impl ModelSource {
    /// Whether nodes fetch it themselves, from an origin or from each other.
    pub fn is_fetched(&self) -> bool {
        match self {
            ModelSource::Hub { .. }
            | ModelSource::HubGguf { .. }
            | ModelSource::ObjectStore { .. } => true,
            ModelSource::Folder { .. } | ModelSource::Builtin { .. } | ModelSource::Pretend(_) => {
                false
            }
        }
    }
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelSource::Folder { path } => f.write_str(path),
            ModelSource::Builtin { name } => write!(f, "the built-in model `{name}`"),
            ModelSource::Pretend(_) => f.write_str("a pretend model"),
            ModelSource::Hub { repo, revision } => write!(f, "{repo}@{revision}"),
            ModelSource::HubGguf { repo, revision, file } => {
                let between = if file.ends_with(".gguf") { '/' } else { ':' };
                write!(f, "{repo}@{revision}{between}{file}")
            }
            ModelSource::ObjectStore { url, .. } => f.write_str(url),
        }
    }
}

/// A pretend model: the tokens are a hash of the sequence so far, the time is modelled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PretendSpec {
    /// The number of layers to split.
    pub layers: u32,
    /// The width of the activations that travel.
    pub hidden: u32,
    /// The vocabulary's size.
    pub vocab: u32,
    /// The longest context in tokens.
    pub max_context: u32,
    /// Distinguishes pretend models whose other fields are equal.
    pub seed: u64,
    /// Modelled compute time of one layer in one step, in nanoseconds.
    pub layer_step_ns: u64,
    /// Modelled compute time of one layer for each row, in nanoseconds.
    pub layer_row_ns: u64,
    /// Modelled bytes of one layer's weights.
    pub layer_weight_bytes: u64,
}

/// A model as a plan names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelRef {
    /// Where its files are.
    pub source: ModelSource,
    /// BLAKE3 of what the coordinator read there (`checkpoint::Checkpoint::fingerprint`); a worker
    /// that reads something else refuses.
    pub fingerprint: [u8; 32],
}

/// What the operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentSpec {
    /// What clients call it.
    pub name: DeploymentName,
    /// The model.
    pub model: ModelRef,
    /// The number of pipeline stages; `None`: as many as there are workers, at most one a layer.
    pub stages: Option<u32>,
    /// The type in which weights are held; `None`: as stored.
    pub precision: Option<Precision>,
}

/// Into how many stages a deployment that is scaled is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum StagesAsked {
    /// As was asked for before.
    #[default]
    Same,
    /// As many as there are workers for each replica now.
    Auto,
    /// So many.
    Exactly(u32),
}

/// Bounds that all shards of a replica agree on. Nothing in them may come from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaLimits {
    /// KV blocks of `BLOCK_TOKENS` positions that each stage holds.
    pub kv_blocks: u32,
    /// The longest sequence, prompt and answer together, in tokens.
    pub context_max: u32,
    /// The largest number of rows (tokens) in one step.
    pub step_rows_max: u32,
    /// The largest number of sequences that run at once.
    pub sequences_max: u32,
    /// The largest number of steps in flight.
    pub steps_in_flight_max: u32,
}

/// The memory of one shard, to the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShardMemory {
    /// Weights in the precision in which they are held.
    pub weights: Bytes,
    /// The paged KV cache.
    pub kv: Bytes,
    /// Activations, logits and buffers of steps in flight.
    pub activations: Bytes,
}

impl ShardMemory {
    /// All of it.
    pub fn total(&self) -> Bytes {
        self.weights + self.kv + self.activations
    }
}

/// One (stage, rank), placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// The tensor rank inside the stage.
    pub rank: RankIndex,
    /// The worker that holds it.
    pub node: NodeId,
    /// The device on that worker: `cpu`.
    pub device: String,
    /// What it needs.
    pub memory: ShardMemory,
}

/// A contiguous range of layers, and who computes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagePlan {
    /// The layers; the first stage has the embedding too, the last one norm and output head.
    pub layers: LayerRange,
    /// One shard per tensor rank, in rank order.
    pub shards: Vec<ShardPlan>,
}

/// One full copy of a model, spread over a mesh of shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaPlan {
    /// The replica.
    pub id: ReplicaId,
    /// The deployment it belongs to.
    pub deployment: DeploymentName,
    /// The number of this layout.
    pub generation: Generation,
    /// What it serves.
    pub model: ModelRef,
    /// The type in which weights are held.
    pub precision: Precision,
    /// The arithmetic.
    pub numerics: Numerics,
    /// The stages in pipeline order.
    pub stages: Vec<StagePlan>,
    /// Bounds that all shards agree on.
    pub limits: ReplicaLimits,
}

impl ReplicaPlan {
    /// `stages x ranks`, as people write it: `3x1`. Stages of unequal width show each: `3x(1+2+2)`.
    pub fn mesh(&self) -> String {
        let ranks: Vec<String> = self.stages.iter().map(|s| s.shards.len().to_string()).collect();
        let even = ranks.windows(2).all(|pair| pair[0] == pair[1]);
        match ranks.first() {
            Some(ranks) if even => format!("{}x{ranks}", self.stages.len()),
            Some(_) => format!("{}x({})", self.stages.len(), ranks.join("+")),
            None => "0x0".to_owned(),
        }
    }

    /// The worker beside whose stage 0 the head runs.
    pub fn head(&self) -> Option<NodeId> {
        self.stages.first().and_then(|s| s.shards.first()).map(|s| s.node)
    }

    /// The workers of all shards, in mesh order.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.stages.iter().flat_map(|s| s.shards.iter().map(|shard| shard.node))
    }

    /// Whether this stage samples.
    pub fn is_last(&self, stage: StageIndex) -> bool {
        stage.0 as usize + 1 == self.stages.len()
    }
}

/// The most tensor ranks of a stage: links say theirs in a byte.
pub const RANKS_MAX: u32 = 256;

/// The complete, immutable assignment of all shards to devices.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Grows by one with each plan.
    pub revision: PlanRevision,
    /// All replicas of all deployments.
    pub replicas: Vec<ReplicaPlan>,
}

/// Where a worker's stages take activations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddress {
    /// The worker.
    pub node: NodeId,
    /// Its `shoal-act` endpoint.
    pub activations: std::net::SocketAddr,
}

/// What one worker is told to be: one shard of one replica's generation, and where its peers are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The whole layout, so that every stage knows whom to accept and what shapes to expect.
    pub replica: ReplicaPlan,
    /// This worker's stage.
    pub stage: StageIndex,
    /// This worker's rank in it.
    pub rank: RankIndex,
    /// One for each worker of the replica.
    pub peers: Vec<PeerAddress>,
}

impl Assignment {
    /// The layers of this shard.
    pub fn layers(&self) -> LayerRange {
        self.replica.stages.get(self.stage.0 as usize).map(|s| s.layers).unwrap_or_default()
    }

    /// Whether the head runs beside this shard.
    pub fn has_head(&self) -> bool {
        self.is_first() && self.rank.0 == 0
    }

    /// Whether this is a shard of the first stage, which takes tokens.
    pub fn is_first(&self) -> bool {
        self.stage.0 == 0
    }

    /// Whether this stage samples.
    pub fn is_last(&self) -> bool {
        self.replica.is_last(self.stage)
    }
}
