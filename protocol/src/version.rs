//! Which versions of the protocol this build speaks.
//!
//! The first message on every connection names a range; the answer names one number out of it. A
//! peer with no common number is refused by name before anything else is read.

use serde::{Deserialize, Serialize};

/// The newest protocol version that this build speaks.
///
/// It grows when a message, a command or a call is added. What is there keeps its shape for ever: new
/// variants stand at the end of their enums, and are sent only to those who speak the version that has
/// them (`coordinator::control::state::versions` for commands).
///
/// Version 3 was never released: until it is, its own messages may still change.
///
/// | version | what it added |
/// |---|---|
/// | 1 | everything up to commit f403ba0 |
/// | 2 | who speaks what ([`KNOWS_VERSIONS`]): `Change::Version`, `AdminCall::Upgrade`, `AdminReply::Upgrade` |
/// | 2 | one CA after another ([`KNOWS_TRUST`]): `Change::Authority`, `CoordinatorMessage::Trust`, `WorkerMessage::Trusts`, `JoinReply::Admitted`, `PeerRequest::CaKeyOf`, `AccessCall`'s CA calls and their replies |
/// | 2 | traces ([`KNOWS_TRACES`]): `FrameKind::Trace` |
/// | 3 | tensor ranks ([`KNOWS_RANKS`]): `FrameKind::{Partial, Near}`, `Numerics::N1Sum` |
/// | 3 | meshes ([`KNOWS_MESHES`]): `WorkerMessage::Facts`, `AdminCall::DeployMesh` and `ScaleMesh`, `DeploymentCommand::CreateMesh` and `ScaleMesh` |
/// | 3 | models of hubs ([`KNOWS_HUB`]): `ModelSource::{Hub, ObjectStore, HubGguf}`; `WorkerMessage::Blobs`, `CoordinatorMessage::Blobs`, ALPN `shoal-blob` |
/// | 3 | formats ([`KNOWS_FORMATS`]): `Precision::Q8_0`, `Q4_0`, `Q4K`, `Fp8`, `Q5K`, `Q6K`, `Mxfp4` |
/// | 3 | a cache of fewer bits ([`KNOWS_KV`]): `Numerics::{N1KvBf16, N1KvQ8, N1SumKvBf16, N1SumKvQ8}`, `MeshAsk::kv` |
/// | 3 | products of whole numbers ([`KNOWS_NUMBERS`]): `Numerics::N2` and what it is combined with, `MeshAsk::activations` |
/// | 3 | adapters ([`KNOWS_ADAPTERS`]): a number in `OpenHeader` and `GenerateHeader` where 0 was; `WorkerMessage::Adapters`, `CoordinatorMessage::Adapters`, `AdminCall::Adapters` and its reply, `Change::Adapter` |
/// | 3 | families with options of their own ([`KNOWS_FAMILIES`]): a shape of its own in `DeploymentCommand::Create` |
/// | 3 | removals in words that a node acts on ([`KNOWS_REMOVALS`]): `JoinReply::Removed`; a start number that was used before is refused with `AlreadyExists` |
/// | 3 | encoders ([`KNOWS_ENCODERS`]): `ModelShape::Encoder` in the log, `FrameKind::Vector`, the vectors of `Samples` |
/// | 3 | prefixes that requests share ([`KNOWS_PREFIXES`]): `FrameKind::{Tenant, Reused}`, `BlockGrant::SHARED`, `WorkerMessage::Prefixes` |
/// | 3 | which coordinators are there: `AdminCall::Presence` and its reply; `AccessCall::ListNodesKnown` and its reply |
pub const PROTOCOL_VERSION: u16 = 3;

/// From here on the log has room for what a node speaks, and for commands that wait until all speak it.
pub const KNOWS_VERSIONS: u16 = 2;

/// From here on nodes know that one CA may take the place of another, and say whom they believe.
pub const KNOWS_TRUST: u16 = 2;

/// From here on nodes know `FrameKind::Trace`. It is sent only where every member of the cluster does.
pub const KNOWS_TRACES: u16 = 2;

/// From here on a worker can be one of several ranks of a stage.
pub const KNOWS_RANKS: u16 = 3;

/// From here on nodes know of tensor ranks, of what is asked of the planner, and of what workers say of
/// themselves beyond their registration ([`crate::mesh`]).
pub const KNOWS_MESHES: u16 = 3;

/// From here on nodes fetch the models of hubs and of object stores themselves, and pass chunks of them on: `ModelSource::{Hub, ObjectStore, HubGguf}`.
pub const KNOWS_HUB: u16 = 3;

/// From here on weights can be held in blocks. They are asked for only where every member knows them.
pub const KNOWS_FORMATS: u16 = 3;

/// From here on keys and values can be held in fewer bits. They are asked for only where every member knows
/// the contracts that say so.
pub const KNOWS_KV: u16 = 3;

/// From here on nodes know contracts under which products are of whole numbers.
pub const KNOWS_NUMBERS: u16 = 3;

/// From here on nodes know families beside Llama, Qwen2 and Qwen3.
pub const KNOWS_FAMILIES: u16 = 3;

/// From here on a node that asks for a certificate is told that it was removed, and ends, and a coordinator is told by a
/// code of its own that its start number was used before.
pub const KNOWS_REMOVALS: u16 = 3;

/// From here on nodes can serve encoders. One is deployed only where every member can.
pub const KNOWS_ENCODERS: u16 = 3;

/// From here on workers add adapters to a model. An older one would take a request for one as a request for
/// the base model: it is sent only to replicas that have said that they have the adapter.
pub const KNOWS_ADAPTERS: u16 = 3;

/// From here on stages take blocks that another sequence has filled. Coordinators name tenants, and heads
/// share blocks for those that are named, only where every member of the cluster knows it.
pub const KNOWS_PREFIXES: u16 = 3;

/// The oldest protocol version that this build speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;

/// The layout of a frame's first eight bytes, as its seventh says it. It is no protocol version: a frame
/// looks the same whatever its sender speaks, since the first one comes before anything is negotiated.
pub const FRAME_VERSION: u8 = 1;

/// An inclusive range of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl VersionRange {
    /// What this build speaks.
    pub const OURS: Self = Self { min: PROTOCOL_VERSION_MIN, max: PROTOCOL_VERSION };

    /// The newest version that both speak.
    pub fn negotiate(self, peer: Self) -> Result<u16, VersionMismatch> {
        let common = self.max.min(peer.max);
        if common >= self.min && common >= peer.min {
            Ok(common)
        } else {
            Err(VersionMismatch { ours: self, peer })
        }
    }
}

/// Two nodes have no version of the protocol in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the peer speaks protocol versions {} to {}, this node {} to {}; upgrade the older of the two",
    peer.min, peer.max, ours.min, ours.max
)]
pub struct VersionMismatch {
    /// What this node speaks.
    pub ours: VersionRange,
    /// What the peer speaks.
    pub peer: VersionRange,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_wins() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 3).negotiate(range(2, 5)), Ok(3));
        assert_eq!(range(2, 5).negotiate(range(1, 3)), Ok(3));
        assert_eq!(range(1, 1).negotiate(range(1, 1)), Ok(1));
        assert!(range(1, 2).negotiate(range(3, 4)).is_err());
        assert!(range(3, 4).negotiate(range(1, 2)).is_err());
    }
}
