//! What happened in a cluster between two views of it, in words.

use shoal_protocol::admin::{ClusterView, DeploymentPhase, DeploymentView};
use shoal_protocol::id::NodeId;

/// A line for each thing that a person who watches a running cluster wants to know.
pub fn changes(before: &ClusterView, after: &ClusterView) -> Vec<String> {
    let mut lines = Vec::new();
    let connected = |view: &ClusterView, id: NodeId| {
        view.workers.iter().find(|w| w.id == id).is_some_and(|w| w.connected)
    };
    for worker in &after.workers {
        match (connected(before, worker.id), worker.connected) {
            (true, false) => lines.push(format!("{}: its link is down", worker.id)),
            (false, true) => lines.push(format!("{}: joined (pid {})", worker.id, worker.pid)),
            _ => {}
        }
    }
    for deployment in &after.deployments {
        let phase_before =
            before.deployments.iter().find(|d| d.name == deployment.name).map(|d| d.phase);
        if phase_before != Some(deployment.phase) {
            lines.push(phase(deployment));
        }
    }
    for gone in &before.deployments {
        if !after.deployments.iter().any(|d| d.name == gone.name) {
            lines.push(format!("{}: undeployed", gone.name));
        }
    }
    lines
}

fn phase(deployment: &DeploymentView) -> String {
    let name = &deployment.name;
    let why = match deployment.reason.as_str() {
        "" => String::new(),
        reason => format!(": {reason}"),
    };
    match deployment.phase {
        DeploymentPhase::Ready => format!("{name}: ready"),
        DeploymentPhase::Loading => format!("{name}: not ready, it loads{why}"),
        DeploymentPhase::Waiting => format!("{name}: not ready, it waits{why}"),
        DeploymentPhase::Failed => format!("{name}: failed{why}"),
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::admin::{CoordinatorView, WorkerView};
    use shoal_protocol::id::DeploymentName;
    use shoal_protocol::plan::{ModelSource, Plan};

    use super::*;

    fn view(workers: &[(u32, bool)], deployments: &[(&str, DeploymentPhase)]) -> ClusterView {
        let address = ([127, 0, 0, 1], 1).into();
        let worker = |&(number, connected): &(u32, bool)| WorkerView {
            id: NodeId::worker(number),
            connected,
            pid: 10 + number,
            build: String::new(),
            address: None,
            devices: Vec::new(),
            shards: Vec::new(),
            heads: Vec::new(),
            draining: false,
        };
        let deployment = |&(name, phase): &(&str, DeploymentPhase)| DeploymentView {
            name: DeploymentName::new(name).unwrap(),
            source: ModelSource::Builtin { name: "demo".to_owned() },
            phase,
            reason: if phase == DeploymentPhase::Ready { "" } else { "w1 was lost" }.to_owned(),
            stages: None,
            asked: 1,
            replicas: Vec::new(),
        };
        ClusterView {
            coordinators: Vec::new(),
            coordinator: CoordinatorView {
                id: NodeId::coordinator(1),
                pid: 1,
                build: String::new(),
                api: address,
                cluster: address,
                tls: false,
            },
            workers: workers.iter().map(worker).collect(),
            deployments: deployments.iter().map(deployment).collect(),
            plan: Plan::default(),
        }
    }

    #[test]
    fn only_what_changed_is_said() {
        use DeploymentPhase::{Loading, Ready};

        let well = view(&[(1, true), (2, true)], &[("m", Ready)]);
        assert_eq!(changes(&well, &well), Vec::<String>::new());
        let ill = view(&[(1, false), (2, true)], &[("m", Loading)]);
        assert_eq!(
            changes(&well, &ill),
            ["w1: its link is down", "m: not ready, it loads: w1 was lost"]
        );
        assert_eq!(changes(&ill, &well), ["w1: joined (pid 11)", "m: ready"]);
        assert_eq!(changes(&well, &view(&[(1, true), (2, true)], &[])), ["m: undeployed"]);
    }
}
