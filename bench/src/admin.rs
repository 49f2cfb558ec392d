//! The admin API of a cluster that is measured.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use shoal_protocol::admin::{
    AdminCall, AdminReply, AdminRequest, ClusterView, DeploymentPhase, DeploymentView,
    MESSAGE_LEN_MAX,
};
use shoal_protocol::id::{DeploymentName, Role};
use shoal_protocol::plan::{ModelSource, PretendSpec};
use shoal_protocol::quic::{AdminContext, Alpn, Connection, Endpoint, Expect};
use shoal_protocol::version::VersionRange;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// How long the admin API may take to answer, and a deployment without weights to be ready.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the cluster may take to be as wanted: a billion weights are rounded to four bits by one thread.
const WANTED_TIMEOUT: Duration = Duration::from_secs(180);

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
            .with_context(|| format!("there is no context file {}", context.display()))?;
        let (endpoint, connection) = runtime.block_on(async {
            let any = ([127, 0, 0, 1], 0).into();
            let endpoint = Endpoint::bind(any, Arc::new(context.identity), &[])?;
            let expect = Expect::Role(Role::Coordinator);
            let connection =
                endpoint.connect(context.address, expect, Alpn::Admin, ADMIN_TIMEOUT).await?;
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
        self.runtime.block_on(async { timeout(ADMIN_TIMEOUT, exchange).await? })
    }

    /// A join token.
    pub fn token(&self, role: Role, uses: usize) -> Result<String> {
        let call = AdminCall::CreateToken { role, uses: u32::try_from(uses)?, expires_s: 600 };
        match self.call(call)? {
            AdminReply::Token { token } => Ok(token),
            other => bail!("{other:?} where a token was expected"),
        }
    }

    /// Serves a model whose time is modelled, and waits until it is ready.
    pub fn deploy(
        &self,
        name: &str,
        spec: PretendSpec,
        stages: u32,
        replicas: u32,
    ) -> Result<ClusterView> {
        let deployment = DeploymentName::new(name)?;
        let source = ModelSource::Pretend(spec);
        let stages = Some(stages);
        let call =
            AdminCall::Deploy { name: deployment, source, stages, precision: None, replicas };
        self.call(call)?;
        self.wait_until(&format!("{name} ready"), |view| is_ready(view, name))
    }

    /// Waits until the cluster's view is as wanted, and returns it.
    pub fn wait_until(
        &self,
        what: &str,
        mut wanted: impl FnMut(&ClusterView) -> bool,
    ) -> Result<ClusterView> {
        let watch = async {
            let (mut sender, mut receiver) = self.connection.open_bi().await?;
            let request = AdminRequest { versions: VersionRange::OURS, call: AdminCall::Watch };
            sender.send_message(&request, MESSAGE_LEN_MAX).await?;
            sender.finish();
            while let Some(reply) = receiver.message(MESSAGE_LEN_MAX).await? {
                match reply {
                    AdminReply::Status(view) if wanted(&view) => return Ok(*view),
                    AdminReply::Refused(error) => bail!("refused: {error}"),
                    _ => {}
                }
            }
            bail!("the coordinator ended the watch")
        };
        self.runtime
            .block_on(async { timeout(WANTED_TIMEOUT, watch).await? })
            .with_context(|| format!("the cluster is not {what} within {WANTED_TIMEOUT:?}"))
    }
}

/// Whether a deployment serves with all of its replicas, and nothing is under way.
pub fn is_ready(view: &ClusterView, name: &str) -> bool {
    let ready = |d: &DeploymentView| {
        d.phase == DeploymentPhase::Ready
            && d.replicas.iter().all(|replica| replica.phase == DeploymentPhase::Ready)
    };
    view.deployments.iter().any(|d| d.name.as_str() == name && ready(d))
}
