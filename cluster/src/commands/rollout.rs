//! `shoal rollout status NAME`: until the deployment is as was asked for.

use std::time::Duration;

use shoal_protocol::admin::{ClusterView, DeploymentView};
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

/// Follows a deployment, with what is missing on stderr, until every replica is as was asked for. It must
/// have been asked for more than `before` times: the first view may be older than the acceptance.
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
        let missing = missing(deployment);
        if missing != last {
            eprintln!("{name}: {}", missing.replace('\n', "; "));
            last = missing;
        }
    }
}

/// What the replicas that are not settled say.
fn missing(deployment: &DeploymentView) -> String {
    let settled = deployment.replicas.iter().filter(|r| r.settled).count();
    let all = deployment.replicas.len();
    let rest = deployment.replicas.iter().filter(|replica| !replica.settled);
    let rest: Vec<_> = rest.map(|r| format!("{}: {}", r.id, r.reason)).collect();
    format!("{settled} of {all} replicas are as was asked for; {}", rest.join("; "))
}
