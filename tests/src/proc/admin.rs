//! The admin API, so that a test can wait for what a cluster becomes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use shoal_protocol::admin::{
    AdminCall, AdminReply, AdminRequest, ClusterView, DeploymentPhase, MESSAGE_LEN_MAX,
};
use shoal_protocol::id::{DeploymentName, Role};
use shoal_protocol::mesh::MeshAsk;
use shoal_protocol::plan::ModelSource;
use shoal_protocol::presence::PresenceView;
use shoal_protocol::quic::{AdminContext, Alpn, Connection, Endpoint, Expect};
use shoal_protocol::version::VersionRange;
use tokio::runtime::Runtime;
use tokio::time::{Instant, timeout_at};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is asked for what is not told by itself.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A connection to a coordinator.
#[derive(Debug)]
pub struct Admin {
    runtime: Runtime,
    connection: Connection,
    _endpoint: Endpoint,
}

impl Admin {
    /// Connects with a context file.
    pub fn open(context: &Path) -> Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let context = AdminContext::load(context)?
            .with_context(|| format!("no file {}", context.display()))?;
        let (endpoint, connection) = runtime.block_on(async {
            let any = ([127, 0, 0, 1], 0).into();
            let endpoint = Endpoint::bind(any, Arc::new(context.identity), &[])?;
            let expect = Expect::Role(Role::Coordinator);
            let connection =
                endpoint.connect(context.address, expect, Alpn::Admin, CONNECT_TIMEOUT).await?;
            anyhow::Ok((endpoint, connection))
        })?;
        Ok(Self { runtime, connection, _endpoint: endpoint })
    }

    /// One call, one answer; a refusal is an error.
    pub fn call(&self, call: AdminCall) -> Result<AdminReply> {
        let exchange = async {
            let (mut sender, mut receiver) = self.connection.open_bi().await?;
            let request = AdminRequest { versions: VersionRange::OURS, call };
            sender.send_message(&request, MESSAGE_LEN_MAX).await?;
            sender.finish();
            match receiver.message(MESSAGE_LEN_MAX).await?.context("no answer")? {
                AdminReply::Refused(error) => bail!("refused: {error}"),
                reply => Ok(reply),
            }
        };
        self.runtime.block_on(async { tokio::time::timeout(CALL_TIMEOUT, exchange).await? })
    }

    /// Serves a model and waits until it is ready.
    pub fn deploy(&self, name: &str, source: ModelSource, stages: u32) -> Result<ClusterView> {
        let name = DeploymentName::new(name)?;
        let phase_of = name.to_string();
        let stages = Some(stages);
        let call = AdminCall::Deploy { name, source, stages, precision: None, replicas: 1 };
        self.call(call)?;
        self.wait_for_phase(&phase_of, DeploymentPhase::Ready, CALL_TIMEOUT)
    }

    /// Deploys a model over a mesh and waits until it serves.
    pub fn deploy_mesh(
        &self,
        name: &str,
        source: ModelSource,
        ask: MeshAsk,
    ) -> Result<ClusterView> {
        let call = AdminCall::DeployMesh {
            name: DeploymentName::new(name)?,
            source,
            precision: None,
            replicas: 1,
            ask,
        };
        self.call(call)?;
        self.wait_for_phase(name, DeploymentPhase::Ready, CALL_TIMEOUT)
    }

    /// Waits until the cluster's view is as wanted, and returns that view.
    pub fn wait_until(
        &self,
        what: &str,
        within: Duration,
        mut wanted: impl FnMut(&ClusterView) -> bool,
    ) -> Result<ClusterView> {
        let until = Instant::now() + within;
        self.runtime.block_on(async {
            let (mut sender, mut receiver) = self.connection.open_bi().await?;
            let request = AdminRequest { versions: VersionRange::OURS, call: AdminCall::Watch };
            sender.send_message(&request, MESSAGE_LEN_MAX).await?;
            sender.finish();
            let mut last = None;
            loop {
                let next = receiver.message::<AdminReply>(MESSAGE_LEN_MAX);
                let reply = match timeout_at(until, next).await {
                    Ok(reply) => reply?.context("the coordinator ended the watch")?,
                    Err(_) => bail!("not {what} within {within:?}; the last view was {last:#?}"),
                };
                match reply {
                    AdminReply::Status(view) if wanted(&view) => return Ok(*view),
                    AdminReply::Status(view) => last = Some(view),
                    other => bail!("{other:?} where a view was expected"),
                }
            }
        })
    }

    /// Waits until the coordinator hears the others as wanted.
    pub fn wait_until_heard(
        &self,
        within: Duration,
        wanted: impl Fn(&PresenceView) -> bool,
    ) -> Result<PresenceView> {
        let until = Instant::now() + within;
        loop {
            match self.call(AdminCall::Presence)? {
                AdminReply::Presence(view) if wanted(&view) => return Ok(view),
                AdminReply::Presence(view) if Instant::now() > until => {
                    bail!("not heard as wanted within {within:?}: {view:?}")
                }
                AdminReply::Presence(_) => {}
                other => bail!("{other:?} where it was asked who is there"),
            }
            // Nothing tells of silence.
            self.runtime.block_on(async { tokio::time::sleep(LOOK_EVERY).await });
        }
    }

    /// Waits until a deployment is in a phase.
    pub fn wait_for_phase(
        &self,
        deployment: &str,
        phase: DeploymentPhase,
        within: Duration,
    ) -> Result<ClusterView> {
        self.wait_until(&format!("{deployment} {phase:?}"), within, |view| {
            view.deployments.iter().any(|d| d.name.as_str() == deployment && d.phase == phase)
        })
    }
}
