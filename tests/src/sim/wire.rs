//! ○ What travels, and what happens: the closed lists.

use raft::prelude::Message;
use shoal_coordinator::control::state::Change;
use shoal_protocol::control::{Register, Report};
use shoal_protocol::id::{Attempt, NodeId, RequestId};
use shoal_protocol::plan::Assignment;
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::{Generate, HeadEvent};
use shoal_shard_worker::agent::lifecycle::{LoadId, ShardKey};

use super::faults::Fault;
use super::shard::Frame;

/// What travels on streams.
#[derive(Debug)]
pub enum Payload {
    /// A worker opens a conversation.
    Hello { from: NodeId, session: u64, life: u64, register: Box<Register> },
    /// It is let in.
    Welcome { from: NodeId, session: u64, life: u64 },
    /// A worker says what it is.
    Report { from: NodeId, session: u64, report: Report },
    /// It has been told by a later leader.
    Outranked { from: NodeId, session: u64, epoch: u64 },
    /// A coordinator says what it should be.
    Assign { from: NodeId, session: u64, epoch: u64, assignments: Vec<Assignment> },
    /// A coordinator asks a head for an answer.
    Generate { from: NodeId, life: u64, generate: Box<Generate>, tenant: Option<Tenant> },
    /// Or does not want it any more.
    Cancel { request: RequestId, attempt: Attempt, choice: u32 },
    /// A head says something of an answer.
    Head(HeadEvent),
    /// From a stage to the next one, or from the last to the head.
    Frame { key: ShardKey, frame: Box<Frame> },
    /// A shard leaves the ring of its layout.
    Bye { from: NodeId, key: ShardKey },
}

/// What travels by itself.
#[derive(Clone, Debug)]
pub enum Datagram {
    /// Between coordinators.
    Raft(Box<Message>),
    /// On a conversation between a worker and a coordinator.
    Beat { from: NodeId, session: u64 },
    /// A shard looks for another of its layout.
    RingHello { from: NodeId, life: u64, key: ShardKey },
    /// It has found it.
    RingOk { from: NodeId, life: u64, key: ShardKey },
    /// Between shards of a layout.
    RingBeat { from: NodeId, life: u64, key: ShardKey },
}

/// What happens, and to which process: numbers tell its lives apart.
#[derive(Debug)]
pub enum Event {
    /// A voter's time passes.
    Tick { at: NodeId, life: u64 },
    /// A write of a coordinator has come to its end.
    Written { at: NodeId, life: u64, good: bool },
    /// A lying disk empties its cache.
    Sync { at: NodeId },
    /// A snapshot on its way has, or has not, arrived.
    SnapshotSent { at: NodeId, life: u64, to: u64, arrived: bool },
    /// The executor looks.
    Reconcile { at: NodeId, life: u64 },
    /// A datagram has arrived.
    Datagram { to: NodeId, datagram: Datagram },
    /// Something may have arrived on a channel.
    Channel { from: NodeId, to: NodeId },
    /// A conversation's other end is looked at.
    Look { at: NodeId, life: u64, peer: NodeId, session: u64 },
    /// A shard's neighbour is looked at.
    RingLook { at: NodeId, life: u64, peer: NodeId, key: ShardKey },
    /// A machine's beats are due.
    Beats { at: NodeId, life: u64 },
    /// A worker looks for coordinators that it does not talk to.
    Connect { at: NodeId, life: u64 },
    /// A worker's report is due.
    Report { at: NodeId, life: u64 },
    /// A worker's load is complete.
    Loaded { at: NodeId, life: u64, load: LoadId },
    /// A worker's shard has stopped.
    Stopped { at: NodeId, life: u64, key: ShardKey, kept: bool },
    /// Its memory is free at last, where a planted bug said so too early.
    Freed { at: NodeId, life: u64, key: ShardKey },
    /// A shard looks for its neighbours.
    Ring { at: NodeId, life: u64, key: ShardKey },
    /// A head's engine is to be woken.
    Wake { at: NodeId, life: u64, key: ShardKey },
    /// What the only stage of a layout has drawn.
    Samples { at: NodeId, life: u64, key: ShardKey },
    /// A shard that is to end looks whether what runs is out.
    Leave { at: NodeId, life: u64, key: ShardKey },
    /// Something goes wrong.
    Fault(Fault),
    /// A machine's process is started.
    Start { at: NodeId },
    /// All faults are over.
    Calm,
    /// Somebody asks for an answer.
    Ask { client: u64 },
    /// Somebody goes away.
    HangUp { client: u64 },
    /// Somebody asks for a change, or reads.
    Operate,
    /// The operator has an idea.
    Alter,
    /// The operator goes on with replacing a coordinator.
    Replace,
    /// Is all well again?
    Check,
}

/// A change or a read that somebody waits for.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // Few and short-lived.
pub enum Wish {
    /// A change.
    Change(Change),
    /// A read.
    Read,
}
