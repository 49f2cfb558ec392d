//! Coordinator ↔ worker agent (`shoal-ctl`): one bidirectional stream that the worker opens.
//!
//! The worker registers and then reports what it observes, on change and every
//! `REPORT_INTERVAL`; the coordinator pushes what the worker should be, always complete, so that a
//! lost message is made good by the next one. Messages are postcard in a `Message` frame.
//!
//! A worker talks to every coordinator in the same way, and only the leader tells it what to be: what
//! it says carries its epoch, which grows with each leader.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::adapters::{HeldAdapters, WantedAdapters};
use crate::error::WireError;
use crate::id::{Generation, Incarnation, NodeId, ReplicaId, Role, StageIndex};
use crate::mesh::Fact;
use crate::plan::{Assignment, ModelSource, Numerics, ShardMemory};
use crate::prefix::PrefixReport;
use crate::trust::{CaFingerprint, Trust};
use crate::units::Bytes;
use crate::version::VersionRange;
use crate::weights::BlobNews;

/// The largest control message: an `Assign` of a few hundred shards.
pub const MESSAGE_LEN_MAX: usize = 4 << 20;

/// How often a worker reports where nothing changes.
pub const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// The most coordinators that a list names: five vote, as many may be on their way in or out, and
/// each costs every worker a connection.
pub const COORDINATORS_MAX: usize = 16;

/// Where a coordinator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorAddress {
    /// Who it is: nobody else is accepted there.
    pub node: NodeId,
    /// Its cluster address (UDP).
    pub cluster: SocketAddr,
}

/// A list of coordinators that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCoordinators {
    /// It is too long.
    #[error("{0} coordinators are named; a cluster has at most {COORDINATORS_MAX}")]
    TooMany(usize),
    /// It names somebody else.
    #[error("{0} is named as a coordinator and is none")]
    NotACoordinator(NodeId),
}

impl CoordinatorAddress {
    /// Checks a list that came over a wire or from a disk.
    pub fn check(list: &[Self]) -> Result<(), BadCoordinators> {
        if list.len() > COORDINATORS_MAX {
            return Err(BadCoordinators::TooMany(list.len()));
        }
        match list.iter().find(|named| named.node.role != Role::Coordinator) {
            Some(named) => Err(BadCoordinators::NotACoordinator(named.node)),
            None => Ok(()),
        }
    }

    /// Whether somebody can be reached there: an address to listen on may be none to connect to.
    pub fn is_reachable(&self) -> bool {
        !self.cluster.ip().is_unspecified() && self.cluster.port() != 0
    }
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum WorkerMessage {
    /// First on the stream.
    Register(Register),
    /// Then, on change and periodically.
    Report(Report),
    /// The answer to `CoordinatorMessage::Probe`.
    Probed {
        /// The probe's number.
        probe: u64,
        /// The fingerprint of what the worker reads at that source, or why it cannot.
        result: Result<[u8; 32], WireError>,
    },
    /// A certificate for the key that it has, long before the one it shows expires.
    Renew {
        /// A certificate signing request, DER, over the key that the cluster has on record.
        csr: Vec<u8>,
    },
    /// `Assign` or `Drain` was not taken: a later leader has told this worker what to be. Said by a
    /// worker of the leader's own cluster, it means that the leader was deposed and has not heard of
    /// it, or that its data are older than the worker's memory (restored from a backup).
    Outranked {
        /// The epoch of the later leader.
        epoch: u64,
    },
    /// Whom this worker believes and what it shows: the answer to `Trust`, and again on every change.
    /// For coordinators that speak version 2.
    Trusts {
        /// The CAs that it believes.
        trusts: Vec<CaFingerprint>,
        /// The CA of its certificate.
        shows: CaFingerprint,
    },
    /// All that this worker has to say of itself beyond its registration, and again on every change: at
    /// most [`FACTS_MAX`](crate::mesh::FACTS_MAX). For coordinators that speak version 3.
    Facts(Vec<Fact>),
    /// Chunks of weights that it wants or has. For coordinators that speak `KNOWS_HUB`.
    Blobs {
        /// Where it gives them to others (`shoal-blob`).
        address: SocketAddr,
        /// At most `BLOB_NEWS_MAX`.
        news: Vec<BlobNews>,
    },
    /// What its shards have of the adapters that it was told of, all of it, on every change. For
    /// coordinators that speak `KNOWS_ADAPTERS`.
    Adapters(Vec<HeldAdapters>),
    /// What its heads say of blocks that are shared, before a report where it has changed. For
    /// coordinators that speak `KNOWS_PREFIXES`.
    Prefixes(Vec<PrefixReport>),
}

/// The most pieces of news of chunks in one message.
pub const BLOB_NEWS_MAX: usize = 64;

/// What a coordinator says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum CoordinatorMessage {
    /// The answer to `Register`: the version that both will speak.
    Welcome {
        /// Out of both ranges.
        version: u16,
        /// All coordinators, as far as this one knows; empty where it cannot say. At most
        /// `COORDINATORS_MAX`.
        coordinators: Vec<CoordinatorAddress>,
    },
    /// The registration was refused; the stream ends.
    Refused(WireError),
    /// What the worker should be: all of it. What is not in the list is to be drained and freed.
    Assign {
        /// The leader's: a worker that has been told by a later one does not take it.
        epoch: u64,
        /// All of it.
        assignments: Vec<Assignment>,
    },
    /// Can the worker read this model?
    Probe {
        /// Comes back in the answer.
        probe: u64,
        /// What to read.
        source: ModelSource,
    },
    /// Finish what runs, take nothing new, then end the process.
    Drain {
        /// The leader's, as in `Assign`.
        epoch: u64,
    },
    /// The answer to `Renew`.
    Renewed {
        /// The certificate, DER.
        certificate: Vec<u8>,
    },
    /// Who the coordinators are has changed: all of them, as in `Welcome`.
    Coordinators(Vec<CoordinatorAddress>),
    /// Whom to believe from now on, on every change. For workers that speak version 2.
    Trust {
        /// A worker that has a newer one keeps that.
        trust: Trust,
        /// Whether this coordinator signs: a worker whose certificate is of another CA than the first asks
        /// for one (`Renew`) at once.
        signs: bool,
    },
    /// What other workers said of chunks of the models that this one wants, and where they are. For workers
    /// that speak `KNOWS_HUB`.
    Blobs(Vec<(NodeId, SocketAddr, BlobNews)>),
    /// The adapters that there should be, all of them, on every change. For workers that speak
    /// `KNOWS_ADAPTERS`.
    Adapters(WantedAdapters),
}

/// Who a worker is and what it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Register {
    /// The protocol versions it speaks.
    pub versions: VersionRange,
    /// The version of its binary.
    pub build: String,
    /// Its identity; the certificate must say the same.
    pub node: NodeId,
    /// Grows with each start of this identity.
    pub incarnation: Incarnation,
    /// The process, for `shoal up --json` and the operator.
    pub pid: u32,
    /// Where it takes requests (`shoal-req`).
    pub requests: SocketAddr,
    /// Where it takes activations (`shoal-act`).
    pub activations: SocketAddr,
    /// Its devices.
    pub devices: Vec<DeviceInfo>,
    /// The contracts that its kernels keep.
    pub numerics: Vec<Numerics>,
}

/// One device of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// `cpu`, `cuda:0` …
    pub name: String,
    /// What it is, for people: instruction set, threads.
    pub description: String,
    /// The budget for weights, KV and activations.
    pub memory: Bytes,
    /// Compute threads.
    pub threads: u32,
}

/// What a worker observes of itself.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Report {
    /// Each shard that it has, wants to have, or is letting go.
    pub shards: Vec<ShardReport>,
    /// Each replica whose head runs here.
    pub heads: Vec<HeadReport>,
}

/// One shard, as observed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardReport {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout. Where the worker refuses an assignment as stale (`Failed` with
    /// `ErrorCode::StaleGeneration`): the newest layout that it knows; only a newer one is taken.
    pub generation: Generation,
    /// The stage.
    pub stage: StageIndex,
    /// Where it is in its life.
    pub state: ShardState,
    /// What it holds.
    pub memory: ShardMemory,
    /// Counters since the shard was created.
    pub counters: ShardCounters,
}

/// The life of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardState {
    /// Reading weights.
    Loading {
        /// Bytes read so far.
        done: Bytes,
        /// Bytes to read.
        total: Bytes,
    },
    /// Weights are there; links to its neighbours are not all up yet.
    Linking,
    /// Takes steps.
    Ready,
    /// Lets its last steps out.
    Draining,
    /// Cannot go on; a new generation is needed.
    Failed(WireError),
}

/// What a shard counted. All grow for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShardCounters {
    /// Steps computed.
    pub steps: u64,
    /// Rows computed.
    pub rows: u64,
    /// Microseconds of compute.
    pub compute_us: u64,
    /// Bytes sent to the next stage.
    pub sent_bytes: u64,
    /// Frames sent to the next stage.
    pub sent_frames: u64,
    /// Microseconds that frames spent between this stage's send and the wire's acceptance of them.
    pub send_us: u64,
    /// The link's smoothed round-trip time in microseconds; 0 where there is no link.
    pub link_rtt_us: u64,
    /// Packets that the link's transport declared lost.
    pub lost_packets: u64,
    /// How often a neighbour was suspected to be dead.
    pub suspicions: u64,
    /// Neighbours that are suspects now.
    pub suspects: u64,
}

/// A head, as observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeadReport {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait.
    pub waiting: u32,
    /// KV blocks in use.
    pub blocks_used: u32,
    /// KV blocks in all.
    pub blocks_total: u32,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Prompt tokens computed so far.
    pub prompt_tokens: u64,
    /// Tokens generated so far.
    pub generated_tokens: u64,
    /// Steps issued so far.
    pub steps: u64,
}
