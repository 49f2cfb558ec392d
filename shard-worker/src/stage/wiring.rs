//! Which queues join a shard's compute thread with its links: worked out from where it stands.

use shoal_protocol::activation::Samples;
use shoal_protocol::plan::Assignment;
use tokio::sync::mpsc;

use super::draw::round_bytes_max;
use super::driver::Outlet;
use super::ranks::Ranks;
use super::ring::LinkPlan;
use super::shard::LoadedModel;
use super::wire::{LinkFrame, RankEnd};
use crate::collective::{Alone, Collective};

/// The two ends of what leaves a compute thread.
pub(super) struct Wiring {
    /// The thread's.
    pub outlet: Outlet,
    /// The thread's, to the other ranks beside the head.
    pub mirrors: Vec<mpsc::Sender<LinkFrame>>,
    /// The links' ends of both, mirrors first.
    pub outlets: Vec<mpsc::Receiver<LinkFrame>>,
    /// The thread's, to the other ranks of its stage.
    pub peers: Box<dyn Collective>,
    /// The links' ends of it.
    pub siblings: Vec<RankEnd>,
}

impl Wiring {
    /// The queues of a shard; `ring` is `None` where it is the only one. `frames_max` bounds each queue
    /// to a link, `drawn` is the head's queue.
    pub(super) fn of(
        assignment: &Assignment,
        ring: Option<&LinkPlan>,
        loaded: &LoadedModel,
        (frames_max, drawn): (usize, &mpsc::Sender<Samples>),
    ) -> Self {
        let mut outlets = Vec::new();
        let mut queue = |_| {
            let (to, from) = mpsc::channel(frames_max);
            outlets.push(from);
            to
        };
        let (mirrors, next): (Vec<_>, Vec<_>) = match ring {
            Some(ring) => {
                let mirrors = ring.mirrors.iter().map(&mut queue).collect();
                (mirrors, ring.downstream.iter().map(&mut queue).collect())
            }
            None => (Vec::new(), Vec::new()),
        };
        let outlet = match (assignment.is_last(), assignment.has_head()) {
            (true, true) => Outlet::Head(drawn.clone()),
            (true, false) => next.into_iter().next().map_or(Outlet::Nobody, Outlet::Samples),
            (false, _) => Outlet::Next(next),
        };
        let (peers, siblings): (Box<dyn Collective>, Vec<RankEnd>) = match ring {
            Some(ring) if !ring.split.is_whole() => {
                let limits = &assignment.replica.limits;
                let draw = round_bytes_max(limits, loaded.vocab as usize);
                let bytes_max = loaded.model.round_bytes_max().max(draw);
                let (peers, ends) = Ranks::new(ring.split, bytes_max);
                (Box::new(peers), ends)
            }
            _ => (Box::new(Alone), Vec::new()),
        };
        Self { outlet, mirrors, outlets, peers, siblings }
    }
}
