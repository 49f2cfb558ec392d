//! What a worker is told at start.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use shoal_protocol::join::JoinToken;
use shoal_protocol::mesh::ZoneName;
use shoal_protocol::model::BuiltinModel;
use shoal_protocol::trace::Tracer;
use shoal_protocol::units::Bytes;

use crate::backend::cpus::Cpus;

/// The settings of one worker. There is no file: `shoal worker` has a flag for each.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Cluster addresses (UDP) of one or more coordinators; they name the others. At most
    /// `COORDINATORS_MAX`.
    pub join: Vec<SocketAddr>,
    /// Needed at the first start alone: later ones find the identity in `data`.
    pub token: Option<JoinToken>,
    /// Where it listens and is reached; by default at any port of the address that leads to the
    /// coordinators.
    pub addresses: Addresses,
    /// Where identity and unpacked models are kept. Two workers must not share it.
    pub data: PathBuf,
    /// The budget for weights, KV and activations of all shards together; `None`: 80 % of the
    /// memory that is free at start. More than is free makes the system swap or kill.
    pub memory: Option<Bytes>,
    /// Threads that compute; `None`: one for each processor. More than processors is slower.
    pub threads: Option<NonZeroUsize>,
    /// Processors that these are bound to.
    pub cpus: Cpus,
    /// What to compute on: `cpu`.
    pub device: String,
    /// The models inside the binary.
    pub builtin: Vec<BuiltinModel>,
    /// The failure domain that it stands in.
    pub zone: Option<ZoneName>,
    /// Whether its tensor ranks talk to those of its own machine over QUIC too, as between machines: to measure
    /// what that costs.
    pub ranks_apart: bool,
    /// Where it tells what it does for requests that are traced.
    pub tracer: Tracer,
}

/// Where a worker takes conversations, and where others find it. Fixed ports are for firewalls; other
/// addresses than its own for what stands in between: a container's port mapping, a relay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Addresses {
    /// Where to take requests of coordinators (UDP).
    pub requests: Option<SocketAddr>,
    /// Where to take activations of other workers (UDP).
    pub activations: Option<SocketAddr>,
    /// Where to give weights to other workers (UDP).
    pub blobs: Option<SocketAddr>,
    /// Where coordinators reach `requests`, if that is elsewhere.
    pub advertise_requests: Option<SocketAddr>,
    /// Where workers reach `activations`, if that is elsewhere.
    pub advertise_activations: Option<SocketAddr>,
    /// Where workers reach `blobs`, if that is elsewhere.
    pub advertise_blobs: Option<SocketAddr>,
}
