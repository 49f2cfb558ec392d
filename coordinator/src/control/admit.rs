//! ● Whether a worker may take part, as far as this coordinator can know at this moment.
//!
//! The start number of a registration belongs into the log, so that a ghost stays a ghost at every
//! coordinator. Inference must not wait for consensus, though: a worker whose number is on record, or
//! newer than what is on record, is let in while no majority answers, and its number is recorded as
//! soon as one does. If the log then knows better, the conversation ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::control::Register;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::version::{KNOWS_VERSIONS, VersionRange};

use crate::control::state::{Change, ClusterState, NodeCommand, Refusal, VersionCommand};
use crate::control::store::{ControlStore, ProposeError};

/// How long a registration waits for the log: a few elections, and much less than a worker waits for
/// its welcome.
const RECORD_PATIENCE: Duration = Duration::from_secs(1);

/// The pause before a start number is proposed again.
const RECORD_RETRY: Duration = Duration::from_secs(1);

/// The most devices that a worker may name: ten times what a machine holds.
const DEVICES_MAX: usize = 1024;

/// The version that both will speak.
pub(super) async fn admit(
    store: &ControlStore,
    node: NodeId,
    register: &Register,
) -> Result<u16, WireError> {
    let version = negotiate(register.versions)?;
    let needs = store.state().versions.workers();
    if register.versions.max < needs {
        return Err(too_old(&format!("{node}"), register.versions, needs));
    }
    if register.node != node {
        let text = format!("the certificate is {node}'s, the registration {}'s", register.node);
        return Err(WireError::new(ErrorCode::PermissionDenied, text));
    }
    let devices = register.devices.len();
    if devices == 0 || devices > DEVICES_MAX || register.numerics.len() > DEVICES_MAX {
        let text = format!("a worker has 1 to {DEVICES_MAX} devices, not {devices}");
        return Err(WireError::new(ErrorCode::InvalidRequest, text));
    }
    let state = store.state();
    let known = state.nodes.get(node);
    let last = known.and_then(|known| known.incarnation);
    let incarnation = register.incarnation;
    match last {
        Some(last) if incarnation < last => {
            return Err(Refusal::OldIncarnation { node, incarnation, last }.into());
        }
        Some(last) if incarnation == last => return Ok(version),
        _ => {}
    }
    match tokio::time::timeout(RECORD_PATIENCE, store.propose(start_of(&state, node, register)))
        .await
    {
        Ok(Ok(_)) => {}
        Ok(Err(refused @ (ProposeError::Refused(_) | ProposeError::Stopped))) => {
            return Err(refused.into());
        }
        // Who is not on record here may have been removed.
        Ok(Err(error)) if known.is_none() => return Err(error.into()),
        Err(_) if known.is_none() => {
            let text = format!(
                "{node} is not on record at this coordinator, and no majority of the coordinators \
                 answers; the worker tries again by itself"
            );
            return Err(WireError::new(ErrorCode::NotReady, text));
        }
        Ok(Err(error)) => tracing::warn!(%node, "let in before its start is on record: {error}"),
        Err(_) => {
            tracing::warn!(%node, "let in before its start is on record: no majority answers")
        }
    }
    Ok(version)
}

/// The version that both will speak, or words for whoever shares none with this one.
pub(super) fn negotiate(versions: VersionRange) -> Result<u16, WireError> {
    VersionRange::OURS
        .negotiate(versions)
        .map_err(|mismatch| WireError::new(ErrorCode::VersionMismatch, mismatch.to_string()))
}

/// An address that a node says it listens on, as others reach it: one that listens everywhere is found where
/// its connection came from.
pub(super) fn reachable(mut address: SocketAddr, remote: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(remote.ip());
    }
    address
}

/// What somebody hears who is older than what was decided. Known before its certificate is made, or its
/// registration taken: it is told nothing that it cannot read.
pub(super) fn too_old(who: &str, speaks: VersionRange, needs: u16) -> WireError {
    let text = format!(
        "{who} speaks protocol versions up to {}, and this cluster needs {needs} since its upgrade was \
         completed: start the newer build on its data folder",
        speaks.max
    );
    WireError::new(ErrorCode::VersionMismatch, text)
}

/// Sees to it that a start number that `admit` let in is recorded, and what that start speaks, as soon
/// as there is room for that; returns only where the log refuses it, or has ended.
pub(super) async fn record(
    store: &ControlStore,
    node: NodeId,
    register: &Register,
) -> ProposeError {
    let is_current = |state: &ClusterState| {
        let recorded = state.nodes.get(node).and_then(|known| known.incarnation);
        recorded == Some(register.incarnation)
    };
    while !is_current(&store.state()) {
        if let Some(end) = try_to_record(store, node, register).await {
            return end;
        }
    }
    let lacks_version = |state: &Arc<ClusterState>| {
        let spoken = state.versions.spoken(node, register.incarnation);
        state.versions.log() >= KNOWS_VERSIONS
            && is_current(state)
            && spoken != Some(register.versions.max)
    };
    let mut state = store.watch();
    loop {
        if state.wait_for(lacks_version).await.is_err() {
            return ProposeError::Stopped;
        }
        if let Some(end) = try_to_record(store, node, register).await {
            return end;
        }
    }
}

async fn try_to_record(
    store: &ControlStore,
    node: NodeId,
    register: &Register,
) -> Option<ProposeError> {
    match store.propose(start_of(&store.state(), node, register)).await {
        Ok(_) => return None,
        Err(end @ (ProposeError::Refused(_) | ProposeError::Stopped)) => return Some(end),
        Err(error) => tracing::debug!(%node, "its start is not on record yet: {error}"),
    }
    tokio::time::sleep(RECORD_RETRY).await;
    None
}

fn start_of(state: &ClusterState, node: NodeId, register: &Register) -> Change {
    let incarnation = register.incarnation;
    // It is stored for ever, so it is bounded here.
    let build = register.build.chars().take(64).collect();
    if state.versions.log() < KNOWS_VERSIONS {
        return Change::Node(NodeCommand::Start { node, incarnation, build });
    }
    let protocol = register.versions.max;
    Change::Version(VersionCommand::Start { node, incarnation, build, protocol })
}
