//! `shoal rollout status NAME`: until the deployment is as was asked for.

use std::time::Duration;

use shoal_protocol::admin::{ClusterView, DeploymentPhase, DeploymentView, ReplicaView};
use shoal_protocol::id::DeploymentName;
use tokio::time::Instant;

use crate::args::RolloutStatusArgs;
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::table;

/// Waits, and says how far it is.
pub async fn status(args: RolloutStatusArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    super::check_exists(&args.name, &client.status().await?)?;
    let view = wait(&client, &args.name, 0, args.timeout).await?;
    client.close().await;
    eprintln!("{}: as was asked for", args.name);
    super::print(&table::stages(&view, |d| d.name == args.name).to_string())
}

/// Follows a deployment, with what is missing on stderr, until every replica is as was asked for, or one of
/// them cannot be. It must have been asked for more than `before` times: the first view may be older than the
/// acceptance.
pub async fn wait(
    client: &AdminClient,
    name: &DeploymentName,
    before: u64,
    timeout: Duration,
) -> Result<ClusterView, Failure> {
    let until = Instant::now() + timeout;
    let mut watch = client.watch().await?;
    let mut last = String::new();
    let mut seen = false;
    loop {
        let late = || {
            Failure::failed(format!("{name} is not as was asked for within {timeout:?}: {last}"))
        };
        let view = tokio::time::timeout_at(until, watch.next()).await.map_err(|_| late())??;
        let Some(deployment) = view.deployments.iter().find(|d| d.name == *name) else {
            // The first view may be older than the acceptance.
            if seen {
                return Err(Failure::failed(format!("{name} was undeployed by somebody else")));
            }
            continue;
        };
        seen = true;
        if deployment.asked <= before {
            continue;
        }
        if deployment.is_settled() {
            return Ok(view);
        }
        if let Some(why) = hopeless(deployment) {
            return Err(why);
        }
        let missing = missing(deployment);
        if missing != last {
            eprintln!("{name}: {}", missing.replace('\n', "; "));
            last = missing;
        }
    }
}

/// Why it will not become as was asked for, whatever others of its replicas do; they go on.
fn hopeless(deployment: &DeploymentView) -> Option<Failure> {
    let failed = |r: &&ReplicaView| !r.settled && r.phase == DeploymentPhase::Failed;
    let failed: Vec<_> = deployment.replicas.iter().filter(failed).collect();
    if failed.is_empty() {
        return None;
    }
    let name = &deployment.name;
    let words: Vec<_> = failed.iter().map(|r| format!("{name}: {}: {}", r.id, r.reason)).collect();
    let words = words.join("\n");
    // Something has changed: no refusal.
    Some(Failure::failed(match deployment.phase {
        DeploymentPhase::Failed => words,
        _ => format!("{words}\nthe other replicas are not touched: `shoal status` shows them"),
    }))
}

/// What the replicas that are not settled say.
fn missing(deployment: &DeploymentView) -> String {
    let settled = deployment.replicas.iter().filter(|r| r.settled).count();
    let all = deployment.replicas.len();
    let rest = deployment.replicas.iter().filter(|replica| !replica.settled);
    let rest: Vec<_> = rest.map(|r| format!("{}: {}", r.id, r.reason)).collect();
    format!("{settled} of {all} replicas are as was asked for; {}", rest.join("; "))
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::ReplicaId;
    use shoal_protocol::plan::ModelSource;

    use super::*;
    use crate::failure::Exit;

    fn deployment(replicas: &[(DeploymentPhase, bool)]) -> DeploymentView {
        let replica = |(id, (phase, settled)): (u32, &(DeploymentPhase, bool))| ReplicaView {
            id: ReplicaId(id),
            phase: *phase,
            reason: format!("why {id}"),
            settled: *settled,
            next: None,
        };
        DeploymentView {
            name: DeploymentName::new("m").unwrap(),
            source: ModelSource::Builtin { name: "demo".to_owned() },
            phase: replicas[0].0,
            reason: String::new(),
            stages: None,
            asked: 1,
            replicas: (1..).zip(replicas).map(replica).collect(),
        }
    }

    #[test]
    fn a_replica_that_has_failed_ends_the_wait_whatever_the_others_do() {
        use DeploymentPhase::{Failed, Loading, Ready, Waiting};
        for going_on in
            [&[(Ready, true), (Loading, false)][..], &[(Ready, false), (Waiting, false)]]
        {
            assert!(hopeless(&deployment(going_on)).is_none(), "{going_on:?}");
        }
        let failure = hopeless(&deployment(&[(Ready, true), (Failed, false)])).expect("it failed");
        assert_eq!(failure.exit, Exit::Failed);
        let words = failure.message;
        assert!(words.starts_with("m: r2: why 2\nthe other replicas are not touched"), "{words}");
        let failure = hopeless(&deployment(&[(Failed, false), (Failed, false)])).expect("both");
        assert_eq!(failure.message, "m: r1: why 1\nm: r2: why 2");
    }
}
