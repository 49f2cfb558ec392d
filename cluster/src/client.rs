//! The admin API from the caller's side: one stream per call, every wait with a deadline.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::access::{AccessCall, AccessReply};
use shoal_protocol::adapters::AdapterCall;
use shoal_protocol::admin::{AdminCall, AdminReply, AdminRequest, ClusterView, MESSAGE_LEN_MAX};
use shoal_protocol::id::Role;
use shoal_protocol::join::Hex;
use shoal_protocol::presence::PresenceView;
use shoal_protocol::quic::{
    AdminContext, Alpn, Connection, Endpoint, Expect, FrameReceiver, close_code,
};
use shoal_protocol::version::VersionRange;

use crate::failure::Failure;
use crate::registry::Registry;

/// How long to wait for a coordinator to let us in. It is one round trip and two signatures.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for an answer. A deployment is accepted after each worker has read the model's
/// headers, which on a cold network file system, or from a hub, takes a while.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long nothing is said about what is waited for.
const SAY_AFTER: Duration = Duration::from_secs(1);

/// How long to wait until what was sent has been taken.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

/// What to do with a context that the cluster does not know any more, or that does not know the cluster.
const STALE_CONTEXT: &str = "this context file has expired, or is of a CA that is believed no more; copy \
                             `admin.context` from a coordinator's data folder again";

/// A connection to a coordinator.
#[derive(Debug)]
pub struct AdminClient {
    endpoint: Endpoint,
    connection: Connection,
    address: SocketAddr,
    context: AdminContext,
    /// Where the context was read.
    file: Option<PathBuf>,
}

impl AdminClient {
    /// Connects with this context file, or with that of the newest `shoal up` that runs.
    pub async fn open(context: Option<&Path>) -> Result<Self, Failure> {
        let path = match context {
            Some(path) => path.to_owned(),
            None => newest_up()?,
        };
        let context = AdminContext::load(&path)
            .map_err(|error| Failure::failed(format!("{:#}", anyhow::Error::new(error))))?
            .ok_or_else(|| {
                Failure::usage(format!(
                    "there is no context file {}; a coordinator writes one into its data folder",
                    path.display()
                ))
            })?;
        Ok(Self { file: Some(path), ..Self::connect(context).await? })
    }

    /// Connects with a context that has been read.
    pub async fn connect(context: AdminContext) -> Result<Self, Failure> {
        let address = context.address;
        let any: SocketAddr = match address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let endpoint = Endpoint::bind(any, Arc::new(context.identity.clone()), &[])
            .map_err(|error| Failure::failed(error.to_string()))?;
        let expect = Expect::Role(Role::Coordinator);
        let connection = endpoint
            .connect(address, expect, Alpn::Admin, CONNECT_TIMEOUT)
            .await
            .map_err(|error| match error.is_distrust() {
                true => Failure::unreachable(format!("{error}: {STALE_CONTEXT}")),
                false => Failure::unreachable(format!("{error}; is the cluster running?")),
            })?;
        Ok(Self { endpoint, connection, address, context, file: None })
    }

    /// Where the coordinator takes the cluster's conversations.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One question, one answer. A refusal is a `Failure` with the coordinator's words.
    pub async fn call(&self, call: AdminCall) -> Result<AdminReply, Failure> {
        let doing = doing(&call);
        let exchange = async { self.ask(call).await?.next().await };
        let answer = tokio::time::timeout(CALL_TIMEOUT, saying(doing, exchange))
            .await
            .map_err(|_| Failure::unreachable(format!("no answer within {CALL_TIMEOUT:?}")))?;
        // Whether it is believed a client hears only after its handshake.
        answer.map_err(|failure| match self.connection.was_distrusted() {
            true => Failure::unreachable(format!("{failure}: {STALE_CONTEXT}")),
            false => failure,
        })
    }

    /// One question about access, one answer, and the end of the conversation.
    pub async fn access(self, call: AccessCall) -> Result<AccessReply, Failure> {
        let reply = self.call(AdminCall::Access(call)).await;
        self.close().await;
        match reply? {
            AdminReply::Access(reply) => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// The same, with the conversation going on.
    pub async fn ask_access(&self, call: AccessCall) -> Result<AccessReply, Failure> {
        match self.call(AdminCall::Access(call)).await? {
            AdminReply::Access(reply) => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// Gets a context of the CA that signs now, where the one that was read is of another: a copy on
    /// another machine goes on working. What cannot be renewed is said by the next command.
    pub async fn renew_context(&self, signing: &str) {
        let Some(file) = &self.file else { return };
        // Its coordinator may have written it anew meanwhile.
        let present = AdminContext::load(file).ok().flatten();
        let present = present.unwrap_or_else(|| self.context.clone());
        let identity = &present.identity;
        if Hex(&identity.shows()).to_string() == signing {
            return;
        }
        let Ok(csr) = identity.renewal_request() else { return };
        let renewed = self.ask_access(AccessCall::RenewAdmin { csr }).await;
        let Ok(AccessReply::Renewed { certificate, trust }) = renewed else { return };
        let renewed = identity.trusting(trust).renewed(certificate);
        let Ok(identity) = renewed else { return };
        let context = AdminContext { identity, address: present.address };
        if let Err(error) = context.save(file) {
            eprintln!("shoal: the renewed context cannot be kept: {error}");
        }
    }

    /// The whole cluster, now.
    pub async fn status(&self) -> Result<ClusterView, Failure> {
        match self.call(AdminCall::Status).await? {
            AdminReply::Status(view) => Ok(*view),
            other => Err(unexpected(&other)),
        }
    }

    /// Which coordinators are there. `None` from one of an older build, which ends the conversation at a
    /// question that it does not know.
    pub async fn presence(&self) -> Option<PresenceView> {
        match tokio::time::timeout(CONNECT_TIMEOUT, self.call(AdminCall::Presence)).await {
            Ok(Ok(AdminReply::Presence(view))) => Some(view),
            _ => None,
        }
    }

    /// The whole cluster, now and on every change.
    pub async fn watch(&self) -> Result<Watch, Failure> {
        Ok(Watch(self.ask(AdminCall::Watch).await?))
    }

    /// Ends the conversation.
    pub async fn close(self) {
        self.connection.close(close_code::DONE, "done");
        self.endpoint.drained(CLOSE_TIMEOUT).await;
    }

    async fn ask(&self, call: AdminCall) -> Result<Answers, Failure> {
        let gone = |why: String| Failure::unreachable(format!("the coordinator is gone: {why}"));
        let request = AdminRequest { versions: VersionRange::OURS, call };
        let exchange = async {
            let (mut sender, receiver) =
                self.connection.open_bi().await.map_err(|e| gone(e.to_string()))?;
            sender
                .send_message(&request, MESSAGE_LEN_MAX)
                .await
                .map_err(|e| gone(e.to_string()))?;
            sender.finish();
            Ok(Answers(receiver))
        };
        tokio::time::timeout(CONNECT_TIMEOUT, exchange)
            .await
            .map_err(|_| gone(format!("it took nothing within {CONNECT_TIMEOUT:?}")))?
    }
}

/// The answers on one stream.
#[derive(Debug)]
struct Answers(FrameReceiver);

impl Answers {
    async fn next(&mut self) -> Result<AdminReply, Failure> {
        match self.0.message::<AdminReply>(MESSAGE_LEN_MAX).await {
            Ok(Some(AdminReply::Refused(error))) => Err(error.into()),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(Failure::unreachable("the coordinator ended the conversation")),
            Err(error) => Err(Failure::unreachable(format!("the coordinator is gone: {error}"))),
        }
    }
}

/// Views, one after each change.
#[derive(Debug)]
pub struct Watch(Answers);

impl Watch {
    /// The next view. It must run to its end: a future that is dropped half-way loses a view.
    pub async fn next(&mut self) -> Result<ClusterView, Failure> {
        match self.0.next().await? {
            AdminReply::Status(view) => Ok(*view),
            other => Err(unexpected(&other)),
        }
    }
}

/// Says what is done where it is not done at once.
async fn saying<T>(doing: Option<String>, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(SAY_AFTER) => {}
    }
    if let Some(doing) = doing {
        eprintln!("{doing} …");
    }
    work.await
}

/// What a call waits for that may take longer than a person thinks that nothing happens.
fn doing(call: &AdminCall) -> Option<String> {
    match call {
        AdminCall::Deploy { source, .. } | AdminCall::DeployMesh { source, .. } => {
            let first = match source.is_fetched() {
                true => "asking for",
                false => "reading",
            };
            Some(format!("{first} {source}: the coordinator first, then each worker"))
        }
        AdminCall::Adapters(AdapterCall::Load { path, .. }) => {
            Some(format!("reading {path}: the coordinator first, then each worker"))
        }
        AdminCall::ChangeVoters { .. } => Some("waiting until it is so".to_owned()),
        AdminCall::Status | AdminCall::Watch | AdminCall::Presence => None,
        _ => Some("waiting for the coordinators to agree".to_owned()),
    }
}

/// An answer to another question than ours.
pub fn unexpected(reply: &AdminReply) -> Failure {
    let what = match reply {
        AdminReply::Status(_) => "a status",
        AdminReply::Accepted => "an acceptance",
        AdminReply::Token { .. } => "a token",
        AdminReply::Plan(_) => "a plan",
        AdminReply::Refused(_) => "a refusal",
        AdminReply::Access(_) => "another answer about access",
        AdminReply::Change(_) => "a change",
        AdminReply::Upgrade(_) => "how an upgrade stands",
        AdminReply::Adapters(_) => "an answer about adapters",
        AdminReply::Presence(_) => "which coordinators are there",
    };
    Failure::failed(format!("the coordinator answered another question: {what} came"))
}

fn newest_up() -> Result<PathBuf, Failure> {
    let entries = Registry::of_user().map(|registry| registry.running()).unwrap_or_default();
    let newest = entries.into_iter().next().ok_or_else(|| {
        Failure::unreachable(
            "no `shoal up` runs here; start one, or name a cluster with --context FILE or SHOAL_CONTEXT",
        )
    })?;
    Ok(newest.context)
}
