//! `shoal chat`: questions to the public API, answers as they are generated.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::time::Duration;

use serde_json::{Value, json};
use shoal_protocol::adapters::{AdapterCall, AdapterReply, AdapterView};
use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView, DeploymentPhase};
use shoal_protocol::id::DeploymentName;

use super::sse;
use crate::args::ChatArgs;
use crate::client::{AdminClient, unexpected};
use crate::failure::{Exit, Failure};
use crate::output::json::url;

/// How long to wait for the API to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for the next token: a long prompt is computed before the first.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(300);

/// Talks to a deployment.
pub async fn run(args: ChatArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let view = client.status().await?;
    let is_deployed = |name: &DeploymentName| view.deployments.iter().any(|d| d.name == *name);
    let model = match &args.name {
        Some(name) if !is_deployed(name) => choose_adapter(name, &adapters(&client).await?, &view),
        _ => choose(args.name, &view),
    };
    client.close().await;
    let model = model?;
    let api = view.coordinator.api;
    if view.coordinator.tls {
        return Err(Failure::failed(format!(
            "the API at {api} speaks TLS, and `shoal chat` speaks plain HTTP alone; use another client \
             of OpenAI's API, with the name that the certificate is for"
        )));
    }
    let mut chat = Chat::new(&url(api, false), model, args.max_tokens.map(|n| n.get()));
    let stdin = std::io::stdin();
    match args.ask {
        Some(question) => chat.ask_alone(&question),
        None if stdin.is_terminal() => chat.converse(&mut stdin.lock()),
        None => {
            for line in stdin.lock().lines() {
                let line = line.map_err(|e| Failure::failed(format!("cannot read stdin: {e}")))?;
                if !line.trim().is_empty() {
                    chat.ask_alone(&line)?;
                }
            }
            Ok(())
        }
    }
}

/// The deployment that is meant: the named one, else the only one.
fn choose(name: Option<DeploymentName>, view: &ClusterView) -> Result<DeploymentName, Failure> {
    let deployment = match name {
        Some(name) => {
            let found = view.deployments.iter().find(|d| d.name == name);
            found.ok_or_else(|| super::no_such_deployment(&name, view))?
        }
        None => match view.deployments.as_slice() {
            [] => return Err(Failure::refused("nothing is deployed; `shoal deploy MODEL` first")),
            [only] => only,
            several => {
                let names: Vec<&str> = several.iter().map(|d| d.name.as_str()).collect();
                let names = names.join(", ");
                return Err(Failure::usage(format!("which one? {names}: `shoal chat NAME`")));
            }
        },
    };
    match deployment.phase {
        DeploymentPhase::Ready => Ok(deployment.name.clone()),
        _ => Err(Failure::refused(format!(
            "{} is not ready: {}",
            deployment.name,
            if deployment.reason.is_empty() { "it loads" } else { &deployment.reason }
        ))),
    }
}

/// The adapters that there are: none, where an older build ends the conversation at the question.
async fn adapters(client: &AdminClient) -> Result<Vec<AdapterView>, Failure> {
    match client.call(AdminCall::Adapters(AdapterCall::List)).await {
        Ok(AdminReply::Adapters(AdapterReply::List(all))) => Ok(all),
        Ok(other) => Err(unexpected(&other)),
        Err(failure) if failure.exit == Exit::Unreachable => Ok(Vec::new()),
        Err(failure) => Err(failure),
    }
}

/// An adapter answers as its deployment does.
fn choose_adapter(
    name: &DeploymentName,
    adapters: &[AdapterView],
    view: &ClusterView,
) -> Result<DeploymentName, Failure> {
    let Some(adapter) = adapters.iter().find(|adapter| adapter.name == *name) else {
        let deployed = view.deployments.iter().map(|deployment| &deployment.name);
        let names = deployed.chain(adapters.iter().map(|adapter| &adapter.name));
        let names: Vec<&str> = names.map(DeploymentName::as_str).collect();
        return Err(super::no_such("deployment or adapter", name, &names));
    };
    match adapter.held {
        0 => {
            let why = if adapter.reason.is_empty() { "it loads" } else { &adapter.reason };
            Err(Failure::refused(format!("the adapter {name} is not ready: {why}")))
        }
        _ => Ok(name.clone()),
    }
}

/// Where the API key is looked for.
const KEY_VARIABLE: &str = "SHOAL_API_KEY";

/// Whom we talk to, and what has been said.
pub struct Chat {
    agent: ureq::Agent,
    url: String,
    key: Option<String>,
    model: DeploymentName,
    max_tokens: Option<u32>,
    messages: Vec<Value>,
}

/// The key stays out of logs.
impl std::fmt::Debug for Chat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chat({} at {})", self.model, self.url)
    }
}

impl Chat {
    /// A conversation with a deployment, at the public API under `url`.
    pub fn new(url: &str, model: DeploymentName, max_tokens: Option<u32>) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(TOKEN_TIMEOUT))
            .build()
            .new_agent();
        let url = format!("{url}/v1/chat/completions");
        // In the environment, where a list of processes does not show it.
        let key = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty());
        Self { agent, url, key, model, max_tokens, messages: Vec::new() }
    }

    /// Asks one question that knows of no other, and prints the answer.
    pub fn ask_alone(&mut self, question: &str) -> Result<(), Failure> {
        self.messages.clear();
        self.ask(question, &mut std::io::stdout().lock())
    }

    /// Question after question until the end of the input; each knows of those before.
    fn converse(&mut self, input: &mut dyn BufRead) -> Result<(), Failure> {
        eprintln!("{} listens; /new begins anew, Ctrl-D ends", self.model);
        loop {
            eprint!("> ");
            let mut line = String::new();
            let read = input.read_line(&mut line);
            match read.map_err(|e| Failure::failed(format!("cannot read stdin: {e}")))? {
                0 => {
                    eprintln!();
                    return Ok(());
                }
                _ => match line.trim() {
                    "" => {}
                    "/new" => self.messages.clear(),
                    question => {
                        let before = self.messages.len();
                        if let Err(failure) = self.ask(question, &mut std::io::stdout().lock()) {
                            // The conversation goes on without what could not be answered.
                            self.messages.truncate(before);
                            eprintln!("shoal: {failure}");
                        }
                    }
                },
            }
        }
    }

    /// Asks, and writes the answer as it comes.
    fn ask(&mut self, question: &str, out: &mut dyn Write) -> Result<(), Failure> {
        self.messages.push(json!({"role": "user", "content": question}));
        let mut body = json!({"model": self.model, "messages": self.messages, "stream": true});
        if let Some(max_tokens) = self.max_tokens {
            body["max_completion_tokens"] = max_tokens.into();
        }
        let mut request = self.agent.post(&self.url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let response = request
            .send_json(&body)
            .map_err(|error| Failure::unreachable(format!("{}: {error}", self.url)))?;
        let status = response.status();
        let mut lines = BufReader::new(response.into_body().into_reader());
        if !status.is_success() {
            return Err(refusal(status.as_u16(), &mut lines));
        }
        let answer = read_answer(&mut lines, out)?;
        self.messages.push(json!({"role": "assistant", "content": answer}));
        Ok(())
    }
}

/// Copies an answer from a stream of events, and ends its line.
fn read_answer(lines: &mut dyn BufRead, out: &mut dyn Write) -> Result<String, Failure> {
    let mut answer = String::new();
    let write = |out: &mut dyn Write, text: &str| {
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        written.map_err(|error| Failure::failed(format!("cannot write to stdout: {error}")))
    };
    loop {
        let mut line = String::new();
        let read = lines.read_line(&mut line);
        let ended = match read {
            Ok(0) => Some("the server hung up in the middle of the answer".to_owned()),
            Ok(_) => None,
            Err(error) => Some(format!("the answer broke off: {error}")),
        };
        let what = match ended {
            Some(why) => sse::Line::Error(why),
            None => sse::read(&line),
        };
        match what {
            sse::Line::Text(text) => {
                write(out, &text)?;
                answer.push_str(&text);
            }
            sse::Line::Nothing => {}
            sse::Line::Done => {
                write(out, "\n")?;
                return Ok(answer);
            }
            sse::Line::Error(why) => {
                if !answer.is_empty() {
                    write(out, "\n")?;
                }
                return Err(Failure::failed(why));
            }
        }
    }
}

/// The words of an answer that is not one. What the caller did wrong is a refusal.
fn refusal(status: u16, body: &mut dyn BufRead) -> Failure {
    /// More than any error of ours.
    const BODY_LEN_MAX: u64 = 64 << 10;
    let mut text = String::new();
    let _ = std::io::Read::read_to_string(&mut std::io::Read::take(body, BODY_LEN_MAX), &mut text);
    let message = serde_json::from_str(&text).ok().as_ref().and_then(sse::error_message);
    let message = format!("{} (HTTP {status})", message.unwrap_or(text));
    if (400..500).contains(&status) { Failure::refused(message) } else { Failure::failed(message) }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::admin::CoordinatorView;
    use shoal_protocol::id::{AdapterId, NodeId};
    use shoal_protocol::plan::Plan;

    use super::*;

    fn answer(events: &str) -> (Result<String, Failure>, String) {
        let mut out = Vec::new();
        let result = read_answer(&mut events.as_bytes(), &mut out);
        (result, String::from_utf8(out).unwrap())
    }

    #[test]
    fn an_answer_is_copied_as_it_comes() {
        let chunk = |text: &str| {
            format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
        };
        let (result, out) = answer(&(chunk("8") + &chunk("5.") + "data: [DONE]\n\n"));
        assert_eq!((result.unwrap().as_str(), out.as_str()), ("85.", "85.\n"));
        let broken = chunk("8") + "data: {\"error\":{\"message\":\"w2 was lost\"}}\n\n";
        let (result, out) = answer(&broken);
        assert_eq!((result.unwrap_err().message.as_str(), out.as_str()), ("w2 was lost", "8\n"));
        let (result, _) = answer(&chunk("8"));
        assert!(result.unwrap_err().message.contains("hung up"));
    }

    #[test]
    fn an_adapter_is_talked_to_by_its_name_once_a_replica_has_it() {
        let view = ClusterView {
            coordinator: CoordinatorView {
                id: NodeId::coordinator(1),
                pid: 1,
                build: String::new(),
                api: ([127, 0, 0, 1], 1).into(),
                cluster: ([127, 0, 0, 1], 1).into(),
                tls: false,
            },
            workers: Vec::new(),
            deployments: Vec::new(),
            plan: Plan::default(),
            coordinators: Vec::new(),
        };
        let name = |text: &str| DeploymentName::new(text).unwrap();
        let adapter = |text, held, reason: &str| AdapterView {
            name: name(text),
            id: AdapterId(1),
            deployment: name("base"),
            path: "/a".to_owned(),
            created_s: 0,
            held,
            replicas: 1,
            reason: reason.to_owned(),
        };
        let all = [adapter("support", 1, ""), adapter("later", 0, "w1 reads it")];
        let choose = |text| choose_adapter(&name(text), &all, &view);
        assert_eq!(choose("support").unwrap(), name("support"));
        let waits = choose("later").unwrap_err();
        assert_eq!(waits.message, "the adapter later is not ready: w1 reads it");
        let unknown = choose("suport").unwrap_err().message;
        assert_eq!(unknown, "there is no deployment or adapter `suport`; did you mean `support`?");
    }

    #[test]
    fn a_refusal_keeps_the_servers_words() {
        let body = r#"{"error":{"message":"`best_of` is not supported"}}"#;
        let failure = refusal(400, &mut body.as_bytes());
        assert_eq!(failure.exit, Exit::Refused);
        assert_eq!(failure.message, "`best_of` is not supported (HTTP 400)");
        assert_eq!(refusal(503, &mut &b"busy"[..]).exit, Exit::Failed);
    }
}
