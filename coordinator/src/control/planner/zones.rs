//! Failure domains: replicas of one deployment in different zones, and a replica inside one where that costs
//! nothing. Where no worker has a zone, all of this is as if there were none.

use std::collections::BTreeSet;

use shoal_protocol::mesh::ZoneName;
use shoal_protocol::plan::ReplicaPlan;

use super::{Inventory, Job, PlanRefusal, plan_on};

/// A replica in zones where no other one of the deployment is, if that costs no context; else on workers that
/// have none of it themselves; else anywhere.
pub(super) fn apart_from_siblings(
    inventory: &Inventory,
    job: &Job<'_>,
    share: usize,
) -> Result<ReplicaPlan, PlanRefusal> {
    let taken: BTreeSet<&ZoneName> =
        inventory.workers.iter().filter(|w| w.sibling).filter_map(|w| w.zone.as_ref()).collect();
    let elsewhere =
        only(inventory, |w| !w.sibling && w.zone.as_ref().is_none_or(|zone| !taken.contains(zone)));
    let free = only(inventory, |w| !w.sibling);
    let free_workers = free.workers.len();
    let free = if free.workers.len() < inventory.workers.len() {
        plan(&free, job, share).or_else(|_| plan(inventory, job, share))
    } else {
        plan(inventory, job, share)
    };
    if elsewhere.workers.len() == free_workers {
        return free;
    }
    // One small machine in another zone would make the contexts of the whole deployment short.
    let as_good = |far: &ReplicaPlan| {
        free.as_ref().map_or(true, |near| far.limits.context_max >= near.limits.context_max)
    };
    plan(&elsewhere, job, share).ok().filter(as_good).map_or(free, Ok)
}

/// The layout on these workers: inside one zone, where that makes no fewer stages and no shorter contexts.
/// Layouts that go by what was measured need no such rule: their ways are counted.
pub(super) fn plan(
    inventory: &Inventory,
    job: &Job<'_>,
    share: usize,
) -> Result<ReplicaPlan, PlanRefusal> {
    let wide = plan_on(inventory, job, share);
    let zones: BTreeSet<&ZoneName> =
        inventory.workers.iter().filter_map(|w| w.zone.as_ref()).collect();
    let Ok(plan) = &wide else { return wide };
    if zones.len() < 2 || job.ask.is_measured() {
        return wide;
    }
    let mut zones: Vec<Inventory> = zones
        .into_iter()
        .map(|zone| only(inventory, |worker| worker.zone.as_ref() == Some(zone)))
        // Fewer workers make fewer stages: of many small zones none is planned for in vain.
        .filter(|zone| zone.workers.len() >= plan.stages.len())
        .collect();
    // A replica stays in its zone; else the one with the most workers comes first.
    let here = |zone: &Inventory| {
        let node = job.previous.and_then(ReplicaPlan::head);
        zone.workers.iter().any(|worker| Some(worker.node) == node)
    };
    zones.sort_by_key(|zone| (!here(zone), std::cmp::Reverse(zone.workers.len())));
    let as_good = |near: &ReplicaPlan| {
        near.stages.len() >= plan.stages.len() && near.limits.context_max >= plan.limits.context_max
    };
    let near = zones.iter().find_map(|zone| plan_on(zone, job, share).ok().filter(as_good));
    near.map_or(wide, Ok)
}

fn only(inventory: &Inventory, keep: impl Fn(&super::Candidate) -> bool) -> Inventory {
    let mut left = inventory.clone();
    left.workers.retain(keep);
    left
}
