//! ● What operators ask about the CA: rotate, list, and a certificate for themselves.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::access::{AccessReply, CaEntry, CaStanding, CaView, RotationView};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::join::Hex;
use shoal_protocol::quic::aside;
use shoal_protocol::quic::ca::{CaError, CertificateAuthority};
use shoal_protocol::trust::{CaFingerprint, fingerprint};
use tokio::sync::Mutex;

use super::step::Verdict;
use crate::control::agents::Agents;
use crate::control::authority::{Authority, CaFiles};
use crate::control::state::versions::needs;
use crate::control::state::{
    AuthorityCommand, Change, ClusterState, LEAVING_MAX, Refusal, Timestamp,
};
use crate::control::store::{ControlStore, ProposeError};

/// How long coordinators may take to hear what the others speak: two of their rounds.
const AGREE_PATIENCE: Duration = Duration::from_secs(4);

/// Answers operators about the CA.
#[derive(Clone, Debug)]
pub struct CaServer {
    /// The replicated state.
    pub store: ControlStore,
    /// The connected workers.
    pub agents: Agents,
    /// The keys that are here.
    pub authority: Authority,
    /// Where they are kept.
    pub files: CaFiles,
    /// This coordinator.
    pub me: NodeId,
    /// Whoever begins a rotation here: two at once would overwrite each other's key on the disk.
    pub turn: Arc<Mutex<()>>,
}

impl CaServer {
    /// Begins a rotation. Where one is under way it goes on, and is the one that was asked for.
    pub async fn rotate(
        &self,
        operator: NodeId,
        skip_absent: bool,
    ) -> Result<AccessReply, WireError> {
        let _turn = self.turn.lock().await;
        let state = self.store.read().await?;
        if let Some(rotation) = state.authorities.rotation() {
            if skip_absent && !rotation.skip_absent {
                let skip = AuthorityCommand::SkipAbsent { ca: rotation.ca() };
                self.store.propose(Change::Authority(skip)).await?;
            }
            return Ok(AccessReply::Done);
        }
        self.begin(operator, skip_absent).await?;
        Ok(AccessReply::Done)
    }

    /// Begins another rotation, where one is to follow the last one: who was off then and not waited for is
    /// not waited for now.
    pub(super) async fn rotate_again(
        &self,
        state: &ClusterState,
        skip_absent: bool,
    ) -> Result<(), WireError> {
        let is_due = |state: &ClusterState| {
            state.authorities.again() && state.authorities.rotation().is_none()
        };
        if !is_due(state) {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        match is_due(&*self.store.read().await?) {
            true => self.begin(self.me, skip_absent).await,
            false => Ok(()),
        }
    }

    /// Makes a CA, and has the rotation to it begin. Whoever calls this has the turn.
    async fn begin(&self, asked_by: NodeId, skip_absent: bool) -> Result<(), WireError> {
        let now = SystemTime::now();
        let present = self.authority.required()?;
        let next = CertificateAuthority::create(now).map_err(failed)?;
        let introduction = present.introduce(&next, now).map_err(failed)?;
        let begin = AuthorityCommand::Begin {
            present: present.certificate().to_vec(),
            next: next.certificate().to_vec(),
            introduction,
            maker: self.me,
            skip_absent,
        };
        let begin = Change::Authority(begin);
        // Coordinators that have just come have not said yet what they speak; who does not is named.
        let mut changes = self.store.watch();
        let agreed = changes.wait_for(|state| state.versions.log() >= needs(&begin).log);
        let _ = tokio::time::timeout(AGREE_PATIENCE, agreed).await;
        if self.store.state().authorities.rotation().is_some() {
            // Somebody else was faster, and its key may be on this disk already.
            return Ok(());
        }
        // Before it is on this disk nobody hears of it: a crash must not lose what others wait for.
        let next = self.save_next(next).await?;
        let made = next.fingerprint();
        let name = Hex(&made).to_string();
        self.authority.keep(next);
        match self.store.propose(begin).await {
            Ok(_) => tracing::info!(%asked_by, ca = name, "the CA's rotation begins"),
            Err(ProposeError::Refused(refusal)) => {
                self.discard(&made).await?;
                // Somebody else was faster.
                if refusal != Refusal::RotationUnderWay {
                    return Err(refusal.into());
                }
            }
            // It may still begin: its key stays.
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The key of a CA that never comes goes, and makes room for that of the one that does.
    async fn discard(&self, made: &CaFingerprint) -> Result<(), WireError> {
        self.authority.drop_key(made);
        let (files, made) = (self.files.clone(), *made);
        aside(move || files.drop_next(&made)).await.map_err(failed)?;
        let state = self.store.state();
        let begun = state.authorities.rotation().filter(|rotation| rotation.signs.is_none());
        match begun.and_then(|rotation| self.authority.key_of(&rotation.ca())) {
            // What was saved here took its place.
            Some(key) => self.save_next(key).await.map(|_| ()),
            None => Ok(()),
        }
    }

    async fn save_next<K>(&self, key: K) -> Result<K, WireError>
    where
        K: std::borrow::Borrow<CertificateAuthority> + Send + 'static,
    {
        let files = self.files.clone();
        aside(move || files.save_next(key.borrow()).map(|()| key)).await.map_err(failed)
    }

    /// The CAs, and how far a rotation is.
    pub async fn list(&self) -> Result<AccessReply, WireError> {
        let state = self.store.read().await?;
        // For people: by the stamps, since this coordinator may not be the one that drives it.
        let rotation = state.authorities.rotation();
        let since = rotation.map(|rotation| rotation.signs.unwrap_or(rotation.begun));
        let now = Timestamp::of(SystemTime::now());
        let stands_s = since.map_or(0, |since| now.0.saturating_sub(since.0));
        let seen = (Duration::from_secs(stands_s), true);
        let verdict = super::verdict(&self.store, &self.agents, &state, seen);
        Ok(AccessReply::Cas(view(&state, &self.authority.certificate(), &verdict)))
    }

    /// A certificate of the CA that signs, over whatever key an admin asks it for: they may make another
    /// admin by a token, so this gives nobody more than they have.
    pub fn renew(&self, operator: NodeId, csr: &[u8]) -> Result<AccessReply, WireError> {
        let issued = self.authority.required()?.issue(csr, operator, SystemTime::now());
        let certificate = issued.map_err(|_| {
            WireError::new(ErrorCode::InvalidRequest, "the signing request cannot be read")
        })?;
        tracing::info!(%operator, "an operator's certificate is renewed");
        Ok(AccessReply::Renewed { certificate, trust: self.authority.trust().for_workers() })
    }
}

fn failed(error: CaError) -> WireError {
    WireError::new(ErrorCode::Internal, error.to_string())
}

/// The CAs, for people.
fn view(state: &ClusterState, founding: &[u8], verdict: &Verdict) -> CaView {
    let authorities = &state.authorities;
    let entry = |certificate: &[u8], standing, since: Option<Timestamp>| CaEntry {
        fingerprint: Hex(&fingerprint(certificate)).to_string(),
        standing,
        since_s: since.map(|at| at.0),
    };
    let signing = authorities.signing().unwrap_or(founding);
    let mut cas = vec![entry(signing, CaStanding::Signs, authorities.signing_since())];
    let rotation = authorities.rotation();
    if let (Some(rotation), Some(trust)) = (rotation, authorities.trust()) {
        let (standing, since) = match rotation.signs {
            None => (CaStanding::Next, rotation.begun),
            Some(since) => (CaStanding::Leaving, since),
        };
        let others = trust.cas.iter().filter(|ca| ca.as_slice() != signing);
        cas.extend(others.map(|ca| entry(ca, standing, Some(since))));
    }
    let past = authorities.past().iter();
    CaView {
        cas,
        past: past.map(|ca| entry(&ca.certificate, CaStanding::Past, Some(ca.left))).collect(),
        rotation: rotation.map(|rotation| RotationView {
            begun_s: rotation.begun.0,
            ends_s: rotation.signs.map(|since| (since + LEAVING_MAX).0),
            waits: verdict.waits.clone(),
            waits_for: verdict.waits_for.clone(),
        }),
    }
}
