//! `shoal coordinator`: configuration → node → drain.

use shoal_coordinator::api::tls;
use shoal_coordinator::config::{EtcdConfig, StoreConfig, TlsFiles};
use shoal_coordinator::router::policy::Policy;
use shoal_coordinator::{Coordinator, CoordinatorConfig};

use super::announce::Announcement;
use super::lock::FolderLock;
use super::stop::Stop;
use super::{DRAIN_TIMEOUT, explain_start};
use crate::args::{CoordinatorArgs, StoreArgs};
use crate::builtin;
use crate::failure::Failure;
use crate::otlp::Otlp;

/// Runs a coordinator until it is told to stop.
pub async fn run(args: CoordinatorArgs) -> Result<(), Failure> {
    if args.routing.prefix_affinity && args.routing.policy != Policy::Score {
        return Err(Failure::usage(format!(
            "--prefix-affinity is for --policy score alone: {} does not look at prompts",
            args.routing.policy
        )));
    }
    let otlp = Otlp::start(args.trace.otlp.as_ref(), "shoal-coordinator")?;
    let outcome = serve(args, &otlp).await;
    otlp.finish().await;
    outcome
}

async fn serve(args: CoordinatorArgs, otlp: &Otlp) -> Result<(), Failure> {
    let mut stop = Stop::listen(args.child.lifeline)?;
    let _lock = tokio::select! {
        locked = FolderLock::of_node(&args.data) => locked?,
        _ = stop.requested() => return Ok(()),
    };
    let config = CoordinatorConfig {
        data: args.data,
        store: store(args.store),
        listen: args.listen,
        tls: args
            .tls_cert
            .zip(args.tls_key)
            .map(|(certificate, key)| tls::TlsFiles { certificate, key }),
        cluster: args.cluster,
        advertise: args.advertise,
        join: args.join,
        token: args.invitation.token,
        builtin: builtin::ALL.to_vec(),
        policy: args.routing.policy,
        prefix_affinity: args.routing.prefix_affinity,
        runtime_adapters: args.adapters.allow_runtime_adapters,
        tracer: otlp.tracer(),
    };
    let mut coordinator = tokio::select! {
        started = Coordinator::start(config) => started.map_err(|error| {
            let needs_a_person = error.needs_a_person();
            explain_start(error, needs_a_person)
        })?,
        _ = stop.requested() => return Ok(()),
    };
    let (id, api, cluster) =
        (coordinator.id(), coordinator.api_address(), coordinator.cluster_address());
    let context = coordinator.admin_context().to_owned();
    otlp.named(id);
    tracing::info!(%id, %api, %cluster, context = %context.display(), "coordinator runs");
    if args.child.announce {
        Announcement::Coordinator { id, api, cluster, context }.print();
    }
    let why = tokio::select! {
        // A verdict must not be lost to a stop that comes with it: the next start would be refused no more.
        biased;
        // What is left of it would serve an old picture for ever.
        ended = coordinator.failed() => {
            if tokio::time::timeout(DRAIN_TIMEOUT, coordinator.give_up(&ended)).await.is_err() {
                tracing::warn!(%id, "its state is not closed after {DRAIN_TIMEOUT:?}; ending anyway");
            }
            return Err(match ended.for_good {
                true => Failure::refused(ended.why),
                false => Failure::failed(ended.why),
            });
        }
        why = stop.requested() => why,
    };
    tracing::info!(%id, "{why}; draining");
    tokio::select! {
        drained = tokio::time::timeout(DRAIN_TIMEOUT, coordinator.drain()) => {
            if drained.is_err() {
                tracing::warn!(%id, "not drained within {DRAIN_TIMEOUT:?}; ending anyway");
            }
        }
        why = stop.requested() => tracing::warn!(%id, "{why} again; ending at once"),
    }
    Ok(())
}

/// Where the state is kept. Flags for an etcd that is not used are ignored where they come from the
/// environment of all coordinators.
fn store(args: StoreArgs) -> StoreConfig {
    let tls = TlsFiles { ca: args.store_ca, certificate: args.store_cert, key: args.store_key };
    match args.store {
        None => StoreConfig::Raft,
        Some(url) => {
            let password = args.store_password_file;
            StoreConfig::Etcd(Box::new(EtcdConfig { url, tls, password }))
        }
    }
}
