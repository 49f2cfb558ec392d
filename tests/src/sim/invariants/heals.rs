//! **After the faults stop everything heals within a bound**: one leader, one state, every deployment
//! ready at every coordinator, no shard that no layout has, every answer complete, no block held, and
//! nothing under way.

use shoal_coordinator::control::state::ClusterState;
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::ReplicaId;

use crate::sim::changes::astray;
use crate::sim::wire::Event;
use crate::sim::world::World;

/// Patience of the cores: 30 s of back-off after many layouts that did not last, 10 s for a shard that
/// was not told, 10 s for a change that nobody answers.
const BOUND_US: u64 = 75_000_000;

/// A replica that is not yet where it is to be.
fn moving(state: &ClusterState) -> Option<String> {
    if let Some(next) = state.plans.nexts().next() {
        return Some(format!("{} still moves to {}", next.id, next.generation));
    }
    for (name, deployment) in state.deployments.iter() {
        let asked = |id: &ReplicaId| state.plans.asked(*id) < deployment.asked;
        if let Some(late) = deployment.replicas.iter().find(|id| asked(id)) {
            return Some(format!("{late} of {name} is not as was asked for"));
        }
    }
    None
}

impl World {
    /// Looks whether all is well; ends the run then, or where it has taken too long.
    pub fn check_healing(&mut self) {
        self.check_places();
        match self.unwell() {
            None => self.finished = true,
            Some(words) if self.now > self.calm_since + BOUND_US => {
                let views = self.views();
                self.violate("heals", format!("{words}\n{views}"));
            }
            Some(_) => self.at(self.now + 50_000, Event::Check),
        }
    }

    /// Each coordinator's view and each worker's, for whoever looks for the cause.
    fn views(&self) -> String {
        let mut lines = Vec::new();
        for (id, machine) in &self.coordinators {
            let Some(process) = &machine.process else { continue };
            let leads = process.standing.leading;
            for (name, served) in &process.desk.table.deployments {
                let generations: Vec<u64> =
                    served.replicas.iter().map(|replica| replica.generation.0).collect();
                lines.push(format!(
                    "{id} leads {leads}: {name} g{generations:?} {:?}: {}",
                    served.phase, served.reason
                ));
            }
            let linked = process.agents.workers.iter().filter(|(_, known)| known.link.is_some());
            let linked: Vec<String> = linked.map(|(node, _)| node.to_string()).collect();
            lines.push(format!("{id} hears {}; {:?}", linked.join(" "), process.executor));
        }
        for (id, worker) in &self.workers {
            let Some(process) = &worker.process else { continue };
            for shard in process.lifecycle.report(|_| Default::default()) {
                let (replica, generation) = (shard.replica, shard.generation);
                lines.push(format!("{id}: {replica} {generation} {:?}", shard.state));
            }
        }
        lines.join("\n")
    }

    /// A shard that no layout has.
    fn ghost(&self, state: &ClusterState) -> Option<String> {
        let processes = self.workers.iter().filter_map(|(id, w)| Some((*id, w.process.as_ref()?)));
        for (id, process) in processes {
            for key in process.shards.keys().chain(process.left.keys()) {
                let plan = state.plans.get(key.replica);
                let plan = plan.filter(|plan| plan.generation == key.generation);
                if !plan.is_some_and(|plan| plan.nodes().any(|node| node == id)) {
                    return Some(format!("{id} still has {key}"));
                }
            }
            if !process.loads.is_empty() {
                return Some(format!("{id} still holds what {} loads gave", process.loads.len()));
            }
        }
        None
    }

    /// What is not well yet.
    fn unwell(&self) -> Option<String> {
        if !self.operator.is_done() {
            return Some("a coordinator is still being replaced".into());
        }
        let mut states = Vec::new();
        let mut leaders = 0;
        for (id, machine) in &self.coordinators {
            let Some(process) = &machine.process else { return Some(format!("{id} is down")) };
            leaders += u32::from(process.standing.leading);
            states.push(&process.state);
            if let Some(change) = astray(&process.state) {
                return Some(format!("{id}: the operator still has to ask for {change:?}"));
            }
            for (name, _) in process.state.deployments.iter() {
                let served = process.desk.table.deployments.get(name);
                match served {
                    Some(served) if served.phase == DeploymentPhase::Ready => {}
                    Some(served) => {
                        let (phase, why) = (served.phase, &served.reason);
                        return Some(format!("{id}: {name} is {phase:?}: {why}"));
                    }
                    None => return Some(format!("{id}: {name} is unknown")),
                }
            }
            if !process.executor.is_idle() {
                return Some(format!("{id} is still acting"));
            }
        }
        if leaders != 1 {
            return Some(format!("{leaders} lead"));
        }
        if states.windows(2).any(|pair| pair[0] != pair[1]) {
            return Some("the coordinators' states differ".into());
        }
        if let Some(ghost) = states.first().and_then(|state| self.ghost(state)) {
            return Some(ghost);
        }
        if let Some(moving) = states.first().and_then(|state| moving(state)) {
            return Some(moving);
        }
        let waiting = self.clients.waiting();
        if waiting > 0 {
            return Some(format!("{waiting} answers are not complete"));
        }
        if let Some(held) = self.held_blocks() {
            return Some(held);
        }
        let open = |operation: &&crate::sim::history::Operation| {
            operation.ended.is_none() && operation.began > self.calm_since
        };
        let open = self.history.operations.iter().filter(open).count();
        (open > 0).then(|| format!("{open} operations are not answered"))
    }
}
