//! `shoal worker`: configuration → node → drain.

use shoal_shard_worker::{Worker, WorkerConfig};

use super::announce::Announcement;
use super::lock::FolderLock;
use super::stop::Stop;
use super::{DRAIN_TIMEOUT, explain_start};
use crate::args::WorkerArgs;
use crate::builtin;
use crate::failure::Failure;
use crate::otlp::Otlp;

/// Runs a worker until it is told to stop, by a signal or by its coordinator.
pub async fn run(args: WorkerArgs) -> Result<(), Failure> {
    let otlp = Otlp::start(args.trace.otlp.as_ref(), "shoal-worker")?;
    let outcome = serve(args, &otlp).await;
    otlp.finish().await;
    outcome
}

/// Set to anything but 0, the tensor ranks of this worker talk to those of its machine over QUIC.
const APART_VARIABLE: &str = "SHOAL_RANKS_APART";

async fn serve(args: WorkerArgs, otlp: &Otlp) -> Result<(), Failure> {
    let mut stop = Stop::listen(args.child.lifeline)?;
    let join = args.join;
    let coordinators = join.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let _lock = tokio::select! {
        locked = FolderLock::of_node(&args.data) => locked?,
        _ = stop.requested() => return Ok(()),
    };
    let config = WorkerConfig {
        join,
        token: args.invitation.token,
        addresses: args.addresses.into(),
        data: args.data,
        memory: args.memory,
        threads: args.threads.and_then(|threads| threads.try_into().ok()),
        cpus: args.cpus.unwrap_or_default(),
        device: args.device,
        builtin: builtin::ALL.to_vec(),
        zone: args.zone,
        ranks_apart: std::env::var_os(APART_VARIABLE).is_some_and(|value| value != "0"),
        tracer: otlp.tracer(),
    };
    let worker = tokio::select! {
        started = Worker::start(config) => started.map_err(|error| {
            let needs_a_person = error.needs_a_person();
            explain_start(error, needs_a_person)
        })?,
        _ = stop.requested() => return Ok(()),
    };
    let id = worker.id();
    otlp.named(id);
    if args.child.announce {
        Announcement::Worker { id }.print();
    }
    tracing::info!(%id, %coordinators, "worker runs");
    let handle = worker.drain_handle();
    let mut running = std::pin::pin!(worker.run_until_drained());
    tokio::select! {
        unwanted = &mut running => {
            if let Some(why) = unwanted {
                return Err(Failure::refused(why));
            }
            tracing::info!(%id, "drained by the coordinator");
            return Ok(());
        }
        why = stop.requested() => tracing::info!(%id, "{why}; draining"),
    }
    handle.drain();
    tokio::select! {
        drained = tokio::time::timeout(DRAIN_TIMEOUT, &mut running) => {
            if drained.is_err() {
                tracing::warn!(%id, "not drained within {DRAIN_TIMEOUT:?}; ending anyway");
            }
        }
        why = stop.requested() => tracing::warn!(%id, "{why} again; ending at once"),
    }
    Ok(())
}
