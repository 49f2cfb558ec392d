//! A stage: what it knows of its sequences, and how steps reach it and leave it.
//!
//! `table` (with `blocks` and `fault`) and `ring` are pure; the rest are shells: `shard` puts one together out of `driver` (the compute
//! thread) and `link` (the ring of streams), into which `door` lets neighbours and whose frames `wire`
//! reads and writes.

mod adapters;
mod blocks;
mod buffer;
mod counters;
mod dial;
mod door;
mod draw;
mod driver;
mod fault;
mod link;
mod meet;
mod near;
mod ranks;
mod ring;
mod shard;
pub mod table;
mod ways;
mod wire;
mod wiring;
mod work;

pub use adapters::{AdapterOrder, AdapterOrderError, Served, ShardAdapters};
pub use buffer::{ALIGNMENT, BufferPool, HiddenBuffer};
pub use counters::Counters;
pub use driver::{ComputeThread, Ended, Outlet, Stage, StageError, StageParts, records_of};
pub use link::{Attached, LinkEnds, LinkEvent, LinkLost, Links, LinksError, link_events_max};
pub use near::Near;
pub use ranks::Ranks;
pub use ring::{BadRing, LinkPlan, Neighbour};
pub use shard::{DRAIN_TIMEOUT, LoadedModel, Shard, ShardEvent, ShardNews, ShardStop, StartError};
pub use ways::Ways;
pub use wire::{Inlet, LinkFrame, RankEnd, StageInput, StepData, Takes};
pub use work::{Work, WorkShare};
