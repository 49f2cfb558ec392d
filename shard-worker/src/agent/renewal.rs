//! Certificates live for a day: a worker asks for the next one over a conversation that the present
//! one has let it into, keeps it, and shows it from then on. Any coordinator can answer; one is asked
//! at a time. A worker that was off for longer gets its next one by `shoal-renew` before it begins a
//! conversation, and so does one whose certificate is believed no more, since another CA has taken the
//! place of the one that it knows.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use shoal_protocol::control::WorkerMessage;
use shoal_protocol::quic::renew::{is_due, renew};
use shoal_protocol::quic::{Endpoint, Identity, aside};
use shoal_protocol::trust::{BadTrust, Trust, fingerprint};
use tokio::sync::watch;

use crate::blob::Blobs;
use crate::stage::Links;

/// How long a coordinator may take to renew an expired certificate.
const RENEW_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a certificate is not replaced: a third of its life, so that one failure is not the end.
const RENEW_PERIOD: Duration = Duration::from_secs(8 * 3600);

/// How long to wait for an answer before another coordinator is asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The same while another CA takes the place of the one that signed: everybody waits for this worker.
const HASTE: Duration = Duration::from_secs(2);

/// When somebody was asked last, and when that last led to a certificate.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    asked: Option<Instant>,
    taken: Option<Instant>,
}

impl Asked {
    /// Whether it is time to ask; from then on it is not, for a while. A certificate of a CA that signs no
    /// more is not kept for its time.
    fn is_due(&mut self, now: Instant, outdated: bool) -> bool {
        let within = |then: Option<Instant>, time| then.is_some_and(|then| now < then + time);
        let patience = if outdated { HASTE } else { ANSWER_TIMEOUT };
        let young = !outdated && within(self.taken, RENEW_PERIOD);
        let due = !young && !within(self.asked, patience);
        if due {
            self.asked = Some(now);
        }
        due
    }
}

/// Whatever stands between a worker and its next certificate; it goes into the log.
type Fault = Box<dyn std::error::Error + Send + Sync>;

/// The right to take a certificate, as long as it is held.
type Turn = tokio::sync::OwnedMutexGuard<()>;

/// Where a new certificate has to go.
#[derive(Debug)]
pub(super) struct Renewal {
    /// Takes requests and reaches coordinators.
    pub endpoint: Endpoint,
    /// Takes and reaches neighbours.
    pub links: Arc<Links>,
    /// Gives and gets chunks of weights.
    pub blobs: Option<Blobs>,
    /// Where the identity is kept for the next start.
    pub file: PathBuf,
    /// Shared by the sessions.
    pub asked: Mutex<Asked>,
    /// Held while a certificate is taken, so that two do not mix.
    pub order: Arc<tokio::sync::Mutex<()>>,
    /// Counts what there is to say of whom this worker believes and what it shows.
    pub said: watch::Sender<u64>,
}

impl Renewal {
    /// What to ask a coordinator that signs, where another CA signs than that of the certificate.
    pub fn request_if_outdated(&self, signs: bool) -> Option<WorkerMessage> {
        let identity = self.endpoint.identity().filter(|_| signs)?;
        let outdated = identity.trust.signing().is_some_and(|ca| ca != identity.shows());
        if outdated { self.request() } else { None }
    }

    /// What to ask the coordinator; `None` where nothing is due, or where there is no key to ask for.
    pub fn request(&self) -> Option<WorkerMessage> {
        let identity = self.endpoint.identity()?;
        let outdated = identity.trust.signing().is_some_and(|ca| ca != identity.shows());
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if !asked.is_due(Instant::now(), outdated) {
            return None;
        }
        let request = identity.renewal_request();
        match request {
            Ok(csr) => Some(WorkerMessage::Renew { csr }),
            Err(error) => {
                tracing::error!("no certificate can be asked for: {error}");
                None
            }
        }
    }

    /// Takes the answer. Where it cannot be used the present certificate stays, and the next answer
    /// may be better.
    pub async fn take(&self, certificate: Vec<u8>) {
        match self.try_take(certificate).await {
            Ok(()) => self.note_taken(),
            Err(error) => tracing::error!("the new certificate cannot be used: {error}"),
        }
    }

    /// Has a certificate that has expired, or that was not believed, renewed by the coordinator at
    /// `address`; one that is good stays.
    pub async fn refresh(&self, address: SocketAddr, distrusted: bool) -> Result<(), Fault> {
        match self.endpoint.identity() {
            Some(present) if distrusted || is_due(&present, SystemTime::now()) => {
                let renewed = renew(address, &present, RENEW_TIMEOUT).await?;
                let turn = self.turn().await;
                // Other conversations may have brought something since.
                let Some(present) = self.endpoint.identity() else { return Ok(()) };
                self.show(onward(&present, renewed, SystemTime::now())?, turn).await?;
                self.note_taken();
                tracing::info!("the certificate was believed no more and is renewed");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Believes these from now on, where that is newer than what it knows.
    pub async fn believe(&self, trust: Trust) -> Result<(), BadTrust> {
        trust.check()?;
        let turn = self.turn().await;
        if let Some(present) = self.endpoint.identity()
            && trust.revision > present.trust.revision
            && let Err(error) = self.show(present.trusting(trust), turn).await
        {
            tracing::error!("the CAs that came cannot be kept: {error}");
        }
        // It is said again, too, to whoever asks again.
        self.said.send_modify(|n| *n += 1);
        Ok(())
    }

    /// What there is to say.
    pub fn trusts(&self) -> Option<WorkerMessage> {
        let identity = self.endpoint.identity()?;
        let trusts = identity.roots().iter().map(|ca| fingerprint(ca)).collect();
        Some(WorkerMessage::Trusts { trusts, shows: identity.shows() })
    }

    async fn try_take(&self, certificate: Vec<u8>) -> Result<(), Fault> {
        let turn = self.turn().await;
        let Some(present) = self.endpoint.identity() else { return Ok(()) };
        let renewed = present.renewed(certificate)?;
        self.show(onward(&present, renewed, SystemTime::now())?, turn).await
    }

    fn note_taken(&self) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.taken = Some(Instant::now());
    }

    async fn turn(&self) -> Turn {
        Arc::clone(&self.order).lock_owned().await
    }

    /// Keeps it and shows it, aside: the beats of the conversation that brought it go on. Its turn ends with the
    /// work, also where that conversation has ended.
    async fn show(&self, renewed: Identity, turn: Turn) -> Result<(), Fault> {
        let (links, blobs) = (Arc::clone(&self.links), self.blobs.clone());
        let (endpoint, file, said) = (self.endpoint.clone(), self.file.clone(), self.said.clone());
        aside(move || {
            let _turn = turn;
            let renewed = Arc::new(renewed);
            renewed.save(&file)?;
            links.renew(Arc::clone(&renewed))?;
            if let Some(blobs) = &blobs {
                blobs.renew(Arc::clone(&renewed))?;
            }
            endpoint.renew(renewed)?;
            said.send_modify(|n| *n += 1);
            tracing::debug!("the certificate is renewed");
            Ok(())
        })
        .await
    }
}

/// What came is older than what is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it is of a CA that signs no more, so the coordinator that gave it lags behind: the certificate that is \
     here stays, and another coordinator is asked"
)]
struct Backward;

/// What came, as it may take the place of what is here now: who is believed is never taken back, and a good
/// certificate of the CA that signs not for one of another. One that has expired is worth nothing.
fn onward(present: &Identity, renewed: Identity, now: SystemTime) -> Result<Identity, Fault> {
    let renewed = match renewed.trust.revision < present.trust.revision {
        true => present.renewed(renewed.certificate)?,
        false => renewed,
    };
    let signs =
        |identity: &Identity| renewed.trust.signing().is_none_or(|ca| ca == identity.shows());
    if !signs(&renewed) && signs(present) && !is_due(present, now) {
        return Err(Backward.into());
    }
    Ok(renewed)
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::NodeId;
    use shoal_protocol::quic::ca::CertificateAuthority;

    use super::*;

    #[test]
    fn a_coordinator_that_lags_behind_takes_nothing_back() {
        let now = SystemTime::now();
        let [old, new] = [(); 2].map(|()| CertificateAuthority::create(now).unwrap());
        let trust = |revision, cas: &[&CertificateAuthority]| Trust {
            revision,
            cas: cas.iter().map(|ca| ca.certificate().to_vec()).collect(),
            ..Trust::default()
        };
        let both = trust(3, &[&new, &old]);
        let founded = old.issue_identity(NodeId::worker(1), now).unwrap();
        let signed = |by: &CertificateAuthority, of: &Identity| {
            of.renewed(by.issue(&of.renewal_request().unwrap(), of.node, now).unwrap()).unwrap()
        };
        let newest = signed(&new, &founded.trusting(both.clone()));
        // It signs with the old CA still.
        let stale = signed(&old, &newest);
        assert!(onward(&newest, stale.clone(), now).is_err());
        // Whoever has none of the new one loses nothing, and one that has expired is worth nothing.
        let shows_old = founded.trusting(both.clone());
        assert_eq!(onward(&shows_old, stale.clone(), now).unwrap().shows(), old.fingerprint());
        let later = now + Duration::from_secs(48 * 3600);
        assert_eq!(onward(&newest, stale, later).unwrap().shows(), old.fingerprint());
        // What was asked before the trust came is taken, and what came since is believed.
        let asked_before = signed(&old, &founded.trusting(trust(2, &[&old, &new])));
        let taken = onward(&shows_old, asked_before.clone(), now).unwrap();
        assert_eq!(taken.trust, both);
        // Where the old CA has left, its certificates are none.
        let alone = newest.trusting(trust(4, &[&new]));
        assert!(onward(&alone, asked_before, now).is_err());
        // And on it goes.
        let next = onward(&shows_old, newest.clone(), now).unwrap();
        assert_eq!((next.shows(), next.trust), (new.fingerprint(), both));
    }

    #[test]
    fn one_coordinator_is_asked_and_then_another_where_it_does_not_answer() {
        let start = Instant::now();
        let mut asked = Asked::default();
        assert!(asked.is_due(start, false));
        assert!(!asked.is_due(start, false), "the answer is on its way");
        assert!(asked.is_due(start + ANSWER_TIMEOUT, false), "it did not come");
        asked.taken = Some(start + ANSWER_TIMEOUT);
        assert!(!asked.is_due(start + ANSWER_TIMEOUT * 3, false));
        assert!(asked.is_due(start + ANSWER_TIMEOUT * 3, true), "another CA signs");
        assert!(!asked.is_due(start + ANSWER_TIMEOUT * 3, true), "the answer is on its way");
        assert!(asked.is_due(start + ANSWER_TIMEOUT + RENEW_PERIOD, false));
    }
}
