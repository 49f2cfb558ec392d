//! ● What keeps a coordinator's certificates fresh: the CA's key, as soon as it votes, and a new
//! certificate for itself and its operator every few hours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{AdminContext, Endpoint};
use tokio::sync::watch;

use crate::begin::{CA_FILE, OPERATOR};
use crate::control::authority::Authority;
use crate::control::peers::Peers;
use crate::start_error::StartError;

/// How often this coordinator renews its own certificate and its operator's: a third of their life,
/// so that one failure is not the end.
const RENEW_PERIOD: Duration = Duration::from_secs(8 * 3600);

/// How often to look whether that has passed, by the clock that certificates go by: it goes on while
/// the machine sleeps, and timers do not.
const RENEW_LOOK: Duration = Duration::from_secs(60);

/// How often a coordinator that votes asks for the CA's key.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Whose certificates, and where they go.
pub(crate) struct Renewal {
    pub me: NodeId,
    pub data: PathBuf,
    pub authority: Authority,
    pub endpoint: Endpoint,
    pub context: PathBuf,
    pub peers: Peers,
}

impl Renewal {
    /// Gets the CA's key where it is not here yet, then renews, until `stop` becomes true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            () = self.work() => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }

    async fn work(&self) {
        let ca = match self.authority.current() {
            Some(ca) => {
                wait_for_renewal().await;
                ca
            }
            None => self.get_key().await,
        };
        loop {
            let renewed = ca
                .issue_identity(self.me, SystemTime::now())
                .map_err(StartError::from)
                .and_then(|identity| Ok(self.endpoint.renew(Arc::new(identity))?))
                .and_then(|()| write_context(&ca, self.endpoint.local_address(), &self.context));
            if let Err(error) = renewed {
                tracing::error!(%error, "certificates could not be renewed; trying again later");
            }
            wait_for_renewal().await;
        }
    }

    async fn get_key(&self) -> Arc<CertificateAuthority> {
        loop {
            if let Some(ca) = self.peers.ask_for_key().await {
                match ca.save(&self.data.join(CA_FILE)) {
                    Ok(()) if self.authority.receive(ca) => {
                        tracing::info!("this coordinator holds the CA's key now");
                    }
                    Ok(()) => tracing::error!("the CA's key that came is of another cluster"),
                    Err(error) => tracing::error!(%error, "the CA's key cannot be kept"),
                }
            }
            if let Some(ca) = self.authority.current() {
                return ca;
            }
            // It votes as soon as the state says so.
            let _ = tokio::time::timeout(ASK_EVERY, self.peers.state_changed()).await;
        }
    }
}

async fn wait_for_renewal() {
    let last = SystemTime::now();
    // A clock that was set back counts from where it is.
    while SystemTime::now().duration_since(last).is_ok_and(|since| since < RENEW_PERIOD) {
        tokio::time::sleep(RENEW_LOOK).await;
    }
}

/// Writes what the operator needs. An address that listens everywhere is reached by loopback.
pub(crate) fn write_context(
    ca: &CertificateAuthority,
    cluster: SocketAddr,
    path: &Path,
) -> Result<(), StartError> {
    let ip = match cluster.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let identity = ca.issue_identity(OPERATOR, SystemTime::now())?;
    let address = SocketAddr::new(ip, cluster.port());
    Ok(AdminContext { address, identity }.save(path)?)
}
