//! What `make demo` shows once the built-in model is served.

use std::io::IsTerminal;
use std::time::Duration;

use shoal_protocol::admin::ClusterView;
use shoal_protocol::id::DeploymentName;

use crate::builtin::DEMO_QUESTION;
use crate::client::AdminClient;
use crate::commands::chat::Chat;
use crate::commands::print;
use crate::failure::Failure;
use crate::output::table;

/// How long to wait for the workers' reports of what they have just done: they come several times a
/// second, and the demo goes on without them.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Asks the question, shows the answer, where it was computed and how to ask more. Says whether the
/// demo ends here, as it does where nobody sits at a terminal.
pub async fn show(client: &AdminClient, url: &str, name: &DeploymentName) -> Result<bool, Failure> {
    print(&format!("\nquestion: {DEMO_QUESTION}\nanswer:   "))?;
    let mut chat = Chat::new(url, name.clone(), None);
    let asked = tokio::task::spawn_blocking(move || chat.ask_alone(DEMO_QUESTION));
    asked.await.map_err(|error| Failure::failed(format!("the question broke off: {error}")))??;
    let view = after_the_answer(client, name).await?;
    let stages = table::stages(&view, |d| d.name == *name);
    let stays = std::io::stdin().is_terminal();
    let next = how_to_go_on(url, name, stays);
    print(&format!("\nthe layers that it went through:\n\n{stages}\n{next}"))?;
    if stays {
        eprintln!("\nor type `shoal chat` in another terminal; Ctrl-C stops");
    }
    Ok(!stays)
}

/// Where to ask more; where the server ends in this moment, how to get one that stays.
fn how_to_go_on(url: &str, name: &DeploymentName, stays: bool) -> String {
    let curl = curl(url, name);
    match stays {
        true => format!("ask more at {url}/v1:\n\n  {curl}\n"),
        false => format!(
            "stdin is no terminal, so the demo ends here, and {url}/v1 with it; to ask more type \
             `shoal up`, which serves until it is stopped, or `make demo` at a terminal, then\n\n  \
             {curl}\n"
        ),
    }
}

/// The view in which every stage has reported the steps of the answer, or the last one that came in
/// time.
async fn after_the_answer(
    client: &AdminClient,
    name: &DeploymentName,
) -> Result<ClusterView, Failure> {
    let mut watch = client.watch().await?;
    let mut view = watch.next().await?;
    let reported = async {
        while !all_have_stepped(&view, name) {
            view = watch.next().await?;
        }
        Ok(())
    };
    match tokio::time::timeout(REPORT_TIMEOUT, reported).await {
        Ok(Err(failure)) => Err(failure),
        Ok(Ok(())) | Err(_) => Ok(view),
    }
}

fn all_have_stepped(view: &ClusterView, name: &DeploymentName) -> bool {
    let replicas = || view.plan.replicas.iter().filter(|r| r.deployment == *name);
    let shards = view.workers.iter().flat_map(|worker| &worker.shards);
    shards
        .filter(|shard| replicas().any(|r| r.id == shard.replica))
        .all(|shard| shard.counters.steps > 0)
}

fn curl(url: &str, name: &DeploymentName) -> String {
    let body = serde_json::json!({
        "model": name,
        "messages": [{"role": "user", "content": DEMO_QUESTION}],
    });
    format!("curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_sent_to_a_server_that_ends() {
        let name = DeploymentName::new("demo").unwrap();
        let url = "http://127.0.0.1:8000";
        assert!(how_to_go_on(url, &name, true).starts_with("ask more at http://127.0.0.1:8000/v1"));
        let ends = how_to_go_on(url, &name, false);
        assert!(!ends.contains("ask more at") && ends.contains("`shoal up`"), "{ends}");
        assert!(ends.contains("curl http://127.0.0.1:8000/v1/chat/completions"), "{ends}");
    }
}
