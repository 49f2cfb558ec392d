//! What keys open, what they limit, and what stays open without one.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use shoal_coordinator::api::{Gate, Limits};
use shoal_coordinator::control::state::{
    Change, ClusterState, Command, KeyCommand, KeyHash, Timestamp,
};
use shoal_protocol::access::{KeyLimits, KeyName};
use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::version::KNOWS_PREFIXES;
use tokio::sync::watch;

use super::client::{Response, get, open, send};
use super::head::{End, Script};
use super::setup::Setup;

const COMPLETIONS: &str = "/v1/completions";
const KEY: &str = "sk-shoal-5ec2e7";

/// A request plane whose keys can be changed, and the sequence number of the last change.
struct Locked {
    setup: Setup,
    state: watch::Sender<Arc<ClusterState>>,
    changes: u64,
}

impl Locked {
    async fn open() -> Self {
        let (state, seen) = watch::channel(Arc::new(ClusterState::default()));
        let setup = Setup::behind(Limits::default(), Gate::new(seen)).await;
        Self { setup, state, changes: 0 }
    }

    async fn with_key(limits: KeyLimits) -> Self {
        let mut locked = Self::open().await;
        let (name, hash) = (name(), KeyHash::of(KEY));
        locked.change(KeyCommand::Create { name, hash, limits, expires: None });
        locked
    }

    fn change(&mut self, change: KeyCommand) {
        self.changes += 1;
        let (client, sequence, at) = (NodeId::coordinator(1), self.changes, Timestamp(0));
        let (incarnation, change) = (Incarnation(1), Change::Key(change));
        let command = Command { client, incarnation, sequence, at, change };
        let mut state = ClusterState::clone(&self.state.borrow());
        state.apply(&command).expect("a change that is allowed");
        self.state.send_replace(Arc::new(state));
    }

    async fn get(&self, path: &str, headers: &str) -> Response {
        let head = format!("GET {path} HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
        send(self.setup.http, &head).await
    }

    async fn models(&self, key: &str) -> Response {
        let headers = format!("host: localhost\r\nauthorization: Bearer {key}\r\n");
        self.get("/v1/models", &headers).await
    }
}

fn name() -> KeyName {
    KeyName::new("alice").expect("a name")
}

fn body(stream: bool) -> Value {
    json!({"model": "demo", "prompt": "x", "max_tokens": 8, "stream": stream})
}

fn denied(response: &Response, status: u16, code: &str) {
    assert_eq!(response.status, status, "{}", response.body);
    let error = &response.json()["error"];
    assert_eq!(error["code"], code, "{error}");
    assert!(error["message"].is_string() && error["param"].is_null(), "{error}");
    assert_eq!(response.header("www-authenticate"), (status == 401).then_some("Bearer"));
    assert_eq!(response.header("retry-after").is_some(), status == 429);
}

#[tokio::test]
async fn each_key_is_a_tenant_of_its_own() {
    let mut locked = Locked::with_key(KeyLimits::default()).await;
    let other = "sk-shoal-b0b";
    let (name, hash) = (KeyName::new("bob").expect("a name"), KeyHash::of(other));
    let limits = KeyLimits::default();
    locked.change(KeyCommand::Create { name, hash, limits, expires: None });
    locked.setup.says("3.");
    locked.setup.speak(KNOWS_PREFIXES);
    for key in [KEY, other, KEY] {
        let body = body(false).to_string();
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        assert_eq!(send(locked.setup.http, &head).await.status, 200);
    }
    let tenants = locked.setup.head.tenants();
    assert_eq!((tenants.len(), tenants[0]), (3, tenants[2]));
    assert!(tenants[0] != tenants[1] && !tenants.contains(&Some(Tenant::OPEN)), "{tenants:?}");
    assert!(tenants.iter().all(Option::is_some));
}

#[tokio::test]
async fn the_first_key_shuts_an_open_api_and_the_last_one_leaves_it_shut() {
    let mut locked = Locked::open().await;
    assert_eq!(get(locked.setup.http, "/v1/models").await.status, 200);
    let (name, hash) = (name(), KeyHash::of(KEY));
    let limits = KeyLimits::default();
    locked.change(KeyCommand::Create { name: name.clone(), hash, limits, expires: None });

    for path in ["/v1/models", "/v1/models/demo", "/v1/nowhere", "/"] {
        denied(&get(locked.setup.http, path).await, 401, "invalid_api_key");
    }
    let post = super::client::post(locked.setup.http, COMPLETIONS, &body(false)).await;
    denied(&post, 401, "invalid_api_key");
    denied(&locked.models("sk-shoal-5ec2e8").await, 401, "invalid_api_key");
    assert_eq!(locked.models(KEY).await.status, 200);
    // Probes and scrapers have none.
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(get(locked.setup.http, path).await.status, 200, "{path}");
    }

    locked.change(KeyCommand::Revoke { name });
    let revoked = locked.models(KEY).await;
    denied(&revoked, 401, "invalid_api_key");
    assert!(revoked.body.contains("`alice` was revoked"), "{}", revoked.body);
    denied(&get(locked.setup.http, "/v1/models").await, 401, "invalid_api_key");
    let metrics = get(locked.setup.http, "/metrics").await.body;
    assert!(metrics.contains("reason=\"invalid_api_key\""), "{metrics}");
}

#[tokio::test]
async fn with_keys_other_names_than_this_machines_are_served() {
    let locked = Locked::with_key(KeyLimits::default()).await;
    let proxied = "host: shoal.example\r\norigin: https://app.example\r\n";
    denied(&locked.get("/v1/models", proxied).await, 401, "invalid_api_key");
    let with_key = format!("{proxied}authorization: Bearer {KEY}\r\n");
    assert_eq!(locked.get("/v1/models", &with_key).await.status, 200);
}

#[tokio::test]
async fn a_key_has_its_requests_of_a_minute() {
    let limits = KeyLimits { requests_per_minute: Some(2), concurrent: None };
    let locked = Locked::with_key(limits).await;
    // Another's attempts cost it nothing.
    denied(&locked.models("sk-shoal-other").await, 401, "invalid_api_key");
    assert_eq!(locked.models(KEY).await.status, 200);
    assert_eq!(locked.models(KEY).await.status, 200);
    let response = locked.models(KEY).await;
    denied(&response, 429, "rate_limit_exceeded");
    assert_eq!(response.header("retry-after"), Some("30"));
}

#[tokio::test]
async fn a_stream_has_its_place_until_its_end_or_until_its_client_hangs_up() {
    let limits = KeyLimits { requests_per_minute: None, concurrent: Some(1) };
    let locked = Locked::with_key(limits).await;
    let head = &locked.setup.head;
    head.set(Script { tokens: vec![40], pace: Duration::ZERO, end: End::Silence });
    let path = format!("{COMPLETIONS} HTTP/1.1\r\nauthorization: Bearer {KEY}\r\nx:");
    let stream = open(locked.setup.http, &path, &body(true)).await;
    head.sees(|seen| seen.requests.len() == 1).await;
    let response = locked.models(KEY).await;
    denied(&response, 429, "rate_limit_exceeded");
    assert_eq!(response.header("retry-after"), Some("1"));

    drop(stream);
    head.sees(|seen| seen.cancelled == 1).await;
    // The sequence is cancelled a moment before the place is free.
    let free = async {
        while locked.models(KEY).await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), free).await.expect("the place is given back");
}
