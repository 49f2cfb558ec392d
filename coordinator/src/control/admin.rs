//! ● The coordinator's side of `shoal-admin`: view, or propose. One stream per call.
//!
//! Who gets here has an admin's certificate; the endpoint has seen to it.

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::access::AccessCall;
use shoal_protocol::admin::{
    AdminCall, AdminReply, AdminRequest, ClusterView, MESSAGE_LEN_MAX, PlanView,
};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{DeploymentName, NodeId, Role};
use shoal_protocol::join::JoinToken;
use shoal_protocol::mesh::{MeshAsk, MeshAsked};
use shoal_protocol::plan::{Activations, DeploymentSpec, ModelRef, ModelSource, Precision};
use shoal_protocol::quic::{Connection, FrameReceiver, FrameSender, close_code};
use shoal_protocol::units::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::access::AccessServer;
use super::adapters::AdapterServer;
use super::admit::negotiate;
use super::agents::Agents;
use super::authority::Authority;
use super::changes::{Changes, speed_of};
use super::models::Models;
use super::planner::{explain, loads};
use super::reconcile::{Observed, dry_run, inventory_for};
use super::state::versions::{Needs, needs, needs_of};
use super::state::{Change, DeploymentCommand, DrainCommand, Refusal, TokenCommand, TokenHash};
use super::store::ControlStore;

/// How long a caller may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Calls of one operator at once; a script that wants more waits.
const CALLS_MAX: usize = 32;

/// Changes that follow each other sooner reach a watcher as one: a person cannot read faster, and
/// counters change with every report.
const WATCH_PAUSE: Duration = Duration::from_millis(50);

/// How long a deployment waits until it is on record that everybody understands its source: a cluster
/// that has just begun records it within a few seconds.
const NEEDS_PATIENCE: Duration = Duration::from_secs(10);

/// How long a model may take to be read here and by all workers: whoever deploys waits for two minutes in all
/// (`cluster::client`), and is told what came of it.
const LOOK_AT_MODEL_MAX: Duration = Duration::from_secs(105);

/// How long an operator waits for what is shown to follow what was decided: some rounds of the reconciler.
const SHOW_TIMEOUT: Duration = Duration::from_secs(2);

/// What is to be served, as an operator says it.
struct Wish {
    name: DeploymentName,
    source: ModelSource,
    stages: Option<u32>,
    precision: Option<Precision>,
    replicas: u32,
    ask: MeshAsk,
}

/// Answers operators.
#[derive(Clone, Debug)]
pub struct AdminServer {
    /// Answers what is asked about keys, tokens and nodes.
    pub access: AccessServer,
    /// Answers what is asked about adapters.
    pub adapters: AdapterServer,
    /// The replicated state.
    pub store: ControlStore,
    /// The connected workers.
    pub agents: Agents,
    /// Where models come from.
    pub models: Models,
    /// The cluster as people see it.
    pub view: watch::Receiver<Arc<ClusterView>>,
    /// Whose CA join tokens pin.
    pub authority: Authority,
}

impl AdminServer {
    /// Holds one operator's conversation, to its end.
    pub async fn serve(&self, connection: Connection) {
        let Some(operator) = connection.peer().filter(|peer| peer.role == Role::Admin) else {
            connection.close(close_code::REFUSED, "this needs an admin's certificate");
            return;
        };
        let mut calls = JoinSet::new();
        loop {
            tokio::select! {
                stream = connection.accept_bi(), if calls.len() < CALLS_MAX => match stream {
                    Ok((sender, receiver)) => {
                        let server = self.clone();
                        calls.spawn(async move {
                            server.call(operator, sender, receiver).await;
                        });
                    }
                    // The operator has gone. What the store has it makes all the same; changes of
                    // several steps are not held by this set.
                    Err(_) => return,
                },
                Some(_) = calls.join_next() => {}
            }
        }
    }

    async fn call(&self, operator: NodeId, mut sender: FrameSender, mut receiver: FrameReceiver) {
        let request = receiver.message::<AdminRequest>(MESSAGE_LEN_MAX);
        let request = match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None)) | Err(_) => return sender.reset(close_code::PROTOCOL),
            Ok(Err(error)) => {
                tracing::warn!(%operator, %error, "an admin call cannot be read");
                return sender.reset(close_code::PROTOCOL);
            }
        };
        let reply = match negotiate(request.versions) {
            Err(mismatch) => AdminReply::Refused(mismatch),
            Ok(_) if request.call == AdminCall::Watch => return self.watch(sender).await,
            Ok(_) => self.finish(operator, request.call).await.unwrap_or_else(|refusal| {
                tracing::info!(%operator, label = %refusal.code, "refused: {refusal}");
                AdminReply::Refused(refusal)
            }),
        };
        // Where the operator has gone there is nobody to tell.
        if sender.send_message(&reply, MESSAGE_LEN_MAX).await.is_ok() {
            sender.finish();
        }
    }

    /// Answers a call; one whose steps belong together is gone through with whether its operator stays or
    /// hangs up: a coordinator without a vote that nobody removes, a CA's key of which nobody hears. Each of
    /// these has deadlines of its own.
    async fn finish(&self, operator: NodeId, call: AdminCall) -> Result<AdminReply, WireError> {
        let belongs_together = matches!(
            call,
            AdminCall::ChangeVoters { .. } | AdminCall::Access(AccessCall::RotateCa { .. })
        );
        if !belongs_together {
            return self.answer(operator, call).await;
        }
        let server = self.clone();
        let work = tokio::spawn(async move { server.answer(operator, call).await });
        work.await.unwrap_or_else(|error| {
            Err(WireError::new(ErrorCode::Internal, format!("making the change: {error}")))
        })
    }

    async fn watch(&self, mut sender: FrameSender) {
        let mut view = self.view.clone();
        loop {
            let reply = AdminReply::Status(Box::new(ClusterView::clone(&view.borrow_and_update())));
            if sender.send_message(&reply, MESSAGE_LEN_MAX).await.is_err() {
                return;
            }
            tokio::time::sleep(WATCH_PAUSE).await;
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return },
                () = sender.stopped() => return,
            }
        }
    }

    async fn answer(&self, operator: NodeId, call: AdminCall) -> Result<AdminReply, WireError> {
        match call {
            AdminCall::Status | AdminCall::Watch => {
                Ok(AdminReply::Status(Box::new(ClusterView::clone(&self.view.borrow()))))
            }
            AdminCall::Deploy { name, source, stages, precision, replicas } => {
                let ask = MeshAsk::default();
                self.deploy(operator, Wish { name, source, stages, precision, replicas, ask }).await
            }
            AdminCall::DeployMesh { name, source, precision, replicas, ask } => {
                let stages = match ask.mesh {
                    Some(MeshAsked::Exactly(mesh)) => Some(mesh.stages),
                    Some(MeshAsked::Auto) | None => None,
                };
                self.deploy(operator, Wish { name, source, stages, precision, replicas, ask }).await
            }
            AdminCall::Undeploy { name } => {
                tracing::info!(%operator, deployment = %name, "undeploy");
                let remove = DeploymentCommand::Remove { name };
                self.store.propose(Change::Deployment(remove)).await?;
                Ok(AdminReply::Accepted)
            }
            AdminCall::CreateToken { role, uses, expires_s } => {
                self.create_token(operator, role, uses, expires_s).await
            }
            AdminCall::ExplainPlan { name } => self.explain(&name),
            AdminCall::ChangeVoters { add, remove } => {
                tracing::info!(%operator, ?add, ?remove, "change of the coordinators that vote");
                super::voters::change(&self.store, &add, &remove).await?;
                Ok(AdminReply::Accepted)
            }
            AdminCall::Access(call) => {
                Ok(AdminReply::Access(self.access.answer(operator, call).await?))
            }
            AdminCall::Upgrade(call) => {
                let view = super::upgrade::answer(&self.store, operator, call);
                Ok(AdminReply::Upgrade(view.await?))
            }
            AdminCall::Adapters(call) => {
                let answer = self.adapters.answer(operator.to_string(), call);
                Ok(AdminReply::Adapters(answer.await?))
            }
            AdminCall::Presence => Ok(AdminReply::Presence(self.store.presence())),
            AdminCall::Scale { name, replicas, stages, dry_run } => {
                let scale = DeploymentCommand::Scale { name: name.clone(), replicas, stages };
                self.scale(operator, &name, scale, dry_run).await
            }
            AdminCall::ScaleMesh { ask, .. } if ask.kv.is_some() || ask.activations.is_some() => {
                Err(contract_stays())
            }
            AdminCall::ScaleMesh { name, replicas, ask, dry_run } => {
                let scale = DeploymentCommand::ScaleMesh { name: name.clone(), replicas, ask };
                self.scale(operator, &name, scale, dry_run).await
            }
            AdminCall::Drain { node, draining, dry_run } => {
                let drain = match draining {
                    true => DrainCommand::Begin { node },
                    false => DrainCommand::End { node },
                };
                self.changes().make(operator, Change::Drain(drain), dry_run).await
            }
        }
    }

    /// Waits until what is shown of a deployment is as new as what is decided: who is told `Accepted` and
    /// looks then must not find the layout of before, as it was asked for before.
    async fn show(&self, name: &DeploymentName) {
        let asked = self.store.state().deployments.get(name).map(|deployment| deployment.asked);
        let is_new = |view: &Arc<ClusterView>| {
            let shown = view.deployments.iter().find(|deployment| deployment.name == *name);
            shown.map(|deployment| deployment.asked) >= asked
        };
        // Where it takes longer the operator sees it later.
        let _ = tokio::time::timeout(SHOW_TIMEOUT, self.view.clone().wait_for(is_new)).await;
    }

    fn changes(&self) -> Changes<'_> {
        Changes { store: &self.store, agents: &self.agents }
    }

    /// Waits until all whom it concerns are known to understand it: they say so within a moment of their
    /// start. Nobody may be asked for what they do not.
    async fn wait_for(&self, needs: Needs) -> Result<(), WireError> {
        let mut state = self.store.watch();
        let permitted = state.wait_for(|state| state.permits_needs(needs).is_ok());
        if tokio::time::timeout(NEEDS_PATIENCE, permitted).await.is_ok_and(|found| found.is_ok()) {
            return Ok(());
        }
        Ok(self.store.state().permits_needs(needs)?)
    }

    /// Asks every worker whether it reads the same model under the same path, before anything is
    /// promised.
    async fn check_workers(&self, model: &ModelRef) -> Result<(), WireError> {
        for (node, result) in self.agents.probe_all(&model.source).await {
            match result {
                Ok(fingerprint) if fingerprint == model.fingerprint => {}
                Ok(_) => {
                    return Err(WireError::new(
                        ErrorCode::BadModel,
                        format!(
                            "{node} reads another model at {} than this coordinator does; put the \
                             same files under that path on each worker",
                            model.source
                        ),
                    ));
                }
                Err(error) => {
                    return Err(WireError::new(
                        error.code,
                        format!("{node} cannot read {}: {error}", model.source),
                    ));
                }
            }
        }
        Ok(())
    }

    async fn scale(
        &self,
        operator: NodeId,
        name: &DeploymentName,
        scale: DeploymentCommand,
        dry_run: bool,
    ) -> Result<AdminReply, WireError> {
        let scale = Change::Deployment(scale);
        self.wait_for(needs(&scale)).await?;
        let reply = self.changes().make(operator, scale, dry_run).await?;
        self.show(name).await;
        Ok(reply)
    }

    async fn deploy(&self, operator: NodeId, wish: Wish) -> Result<AdminReply, WireError> {
        let Wish { name, source, stages, precision, replicas, ask } = wish;
        if self.store.state().deployments.get(&name).is_some() {
            return Err(Refusal::NameTaken { name }.into());
        }
        self.wait_for(needs_of(&source)).await?;
        let until = Instant::now() + LOOK_AT_MODEL_MAX;
        let models = self.models.clone();
        // Where time is up it goes on: what it fetches is there for the next try.
        let open = tokio::task::spawn_blocking(move || models.open(&models.pin(source)?));
        let opened = timeout_at(until, open).await.map_err(|_| slow_model())?;
        let (model, shape) = opened.map_err(|error| {
            WireError::new(ErrorCode::Internal, format!("reading the model: {error}"))
        })??;
        let ask = with_activations(ask, precision.unwrap_or(shape.stored()))?;
        timeout_at(until, self.check_workers(&model)).await.map_err(|_| slow_model())??;
        let spec = DeploymentSpec { name, model, stages, precision };
        let state = self.store.state();
        let observed = Observed { workers: self.agents.observe(), ..Observed::default() };
        let planned = tokio::task::spawn_blocking(move || {
            dry_run(&state, &observed, &spec, &shape, replicas, ask)
                .map(|plan| (spec, shape, plan.mesh()))
        });
        let planned = planned
            .await
            .map_err(|error| WireError::new(ErrorCode::Internal, format!("planning: {error}")))?;
        let (spec, shape, mesh) = planned?;
        tracing::info!(%operator, deployment = %spec.name, source = %spec.model.source, mesh, %ask, replicas, "deploy");
        // Who asks for nothing new says so in the old words, which every build reads.
        let create = Change::Deployment(match ask.is_empty() {
            true => DeploymentCommand::Create { spec, shape, replicas },
            false => DeploymentCommand::CreateMesh { spec, shape, replicas, ask },
        });
        self.wait_for(needs(&create)).await?;
        if replicas == 1 {
            self.store.propose(create).await?;
            return Ok(AdminReply::Accepted);
        }
        self.changes().make(operator, create, false).await
    }

    async fn create_token(
        &self,
        operator: NodeId,
        role: Role,
        uses: u32,
        expires_s: u64,
    ) -> Result<AdminReply, WireError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| {
            WireError::new(ErrorCode::Internal, format!("no randomness: {error}"))
        })?;
        let hash = TokenHash::of(&secret);
        let expires = Duration::from_secs(expires_s);
        let create = TokenCommand::Create { hash, role, uses, expires };
        self.store.propose(Change::Token(create)).await?;
        tracing::info!(%operator, %role, uses, expires_s, "join token made");
        let token = JoinToken { role, ca_fingerprint: self.authority.fingerprint(), secret };
        Ok(AdminReply::Token { token: token.to_string() })
    }

    fn explain(&self, name: &DeploymentName) -> Result<AdminReply, WireError> {
        let state = self.store.state();
        let unknown = || Refusal::UnknownDeployment { name: name.clone() };
        let deployment = state.deployments.get(name).ok_or_else(unknown)?;
        let observed = Observed { workers: self.agents.observe(), ..Observed::default() };
        let mut view = PlanView { replicas: Vec::new(), explanation: Vec::new() };
        let ask = state.meshes.of(name);
        if !ask.is_empty() {
            view.explanation.push(format!("{name}: asked for {ask}"));
        }
        for replica in &deployment.replicas {
            if let Some(plan) = state.plans.get(*replica) {
                let inventory = inventory_for(&state, &observed, name, *replica);
                view.explanation.extend(explain(plan, &deployment.shape, &inventory));
                view.explanation.push(speed_of(plan, &deployment.shape, &observed));
                view.replicas.push(plan.clone());
            }
            if let Some(next) = state.plans.next(*replica) {
                view.explanation.push("being made beside it:".to_owned());
                let inventory = inventory_for(&state, &observed, name, *replica);
                view.explanation.extend(explain(next, &deployment.shape, &inventory));
                let read = loads(state.plans.get(*replica), next, true);
                let read: Bytes = read.into_iter().map(|(_, bytes)| bytes).sum();
                view.explanation.push(format!("it reads {read} of weights"));
            }
        }
        // Where it is says why there is no plan, or why the plan is not served.
        let shown = self.view.borrow();
        if let Some(at) = shown.deployments.iter().find(|deployment| deployment.name == *name) {
            view.explanation.push(format!("{name} is {:?}: {}", at.phase, at.reason));
        }
        Ok(AdminReply::Plan(Box::new(view)))
    }
}

/// Nothing was deployed, and whoever asked still listens.
fn slow_model() -> WireError {
    let words = format!(
        "the model was not read here and by all workers within {LOOK_AT_MODEL_MAX:?}; what has come is kept: try again"
    );
    WireError::new(ErrorCode::DeadlineExceeded, words)
}

/// Another cache is another contract, under which no stream of the old one could go on.
fn contract_stays() -> WireError {
    let words = "how keys and values are held (`shoal deploy --kv`) and what rows are in products (`--activations`) \
                 is chosen for good: deploy the model under another name, let its clients move, and undeploy this one";
    WireError::new(ErrorCode::InvalidRequest, words)
}

/// With activations chosen: whole numbers wherever weights are held as such. Every worker that may hold those knows
/// whole numbers too.
fn with_activations(ask: MeshAsk, held: Precision) -> Result<MeshAsk, WireError> {
    let activations = match ask.activations {
        Some(Activations::Int8) if !held.has_numbers() => {
            let words = format!(
                "int8 activations are multiplied with weights in blocks of whole numbers, and these are to be held as \
                 {held}; add --precision q8_0, q4_0, q4_k, q5_k or q6_k, or leave --activations out"
            );
            return Err(WireError::new(ErrorCode::InvalidRequest, words));
        }
        None if held.has_numbers() => Some(Activations::Int8),
        // What is so where nothing is said need not be said.
        Some(Activations::F32) | None => None,
        Some(Activations::Int8) => Some(Activations::Int8),
    };
    Ok(MeshAsk { activations, ..ask })
}
