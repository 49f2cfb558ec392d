//! ● Whether two ranks whose link has just come up are on one machine: they try to meet at a socket of its kernel.
//!
//! ```text
//! dialled:   listens ─► Near(yes) ───────────────► accepts, proof? ─► Near(yes) ─► the socket
//! dialler:                        connects, proof ─► Near(yes)                  ─► proof? ─► the socket
//! either:    Near(no) ─► the link, as between machines
//! ```
//!
//! Addresses do not say it: containers of one machine have several, machines behind one gateway share one. A name
//! that both work out from their link's keys does: only the other end of it can know the name before the socket is there.
//! Names are public from then on, so that each side proves itself with a further secret of the link. Proofs could be
//! passed on, by one who has a process at both ends: so both must run as one user, who could do worse. A stranger on
//! the machine can at most make them stay with the link, or this one link fail.

use std::io;
use std::time::Duration;

use shoal_protocol::activation::Near as Said;
use shoal_protocol::frame::{Flat, FrameError, FrameKind};
use shoal_protocol::quic::{Connection, FrameReceiver, FrameSender};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use super::door::HELLO_TIMEOUT;
use super::near::{Guard, Near};
use super::wire::LinkEnd;

/// How long to wait at the socket. Who comes is there within a round trip.
const MEETING: Duration = Duration::from_secs(1);

/// How long one who comes may take to prove itself: it does so before it says that it has come.
const PROOF: Duration = Duration::from_millis(100);

/// Where they meet, and what the sides of the link prove themselves with.
const NAME: &str = "shoal near name";
const OF_DIALLER: &str = "shoal near dialler";
const OF_DIALLED: &str = "shoal near dialled";

/// A link between two ranks that has just come up.
pub(super) struct Meeting<'a> {
    pub connection: &'a Connection,
    pub streams: (&'a mut FrameSender, &'a mut FrameReceiver),
    pub generation: u64,
    /// Whether this side has dialled.
    pub dialler: bool,
    /// Whether this side wants to.
    pub may: bool,
}

impl Meeting<'_> {
    /// Gives the compute thread its end of a socket where both are; or, on both sides, tells it that there is none.
    pub async fn meet(
        mut self,
        compute: oneshot::Sender<Near>,
        bytes_max: usize,
    ) -> Result<Option<Guard>, LinkEnd> {
        let met = match self.dialler {
            true => self.come().await?,
            false => self.receive().await?,
        };
        let Some(socket) = met else { return Ok(None) };
        let ends = socket.into_std().and_then(|socket| Near::new(socket, bytes_max));
        let (near, guard) =
            ends.map_err(|error| LinkEnd::Gone(format!("a socket to a rank beside it: {error}")))?;
        // It takes it with its first round; where it has ended, so does the link.
        let _ = compute.send(near);
        Ok(Some(guard))
    }

    async fn receive(&mut self) -> Result<Option<UnixStream>, LinkEnd> {
        let listener = self.name().and_then(|name| listen(&name).ok());
        self.say(listener.is_some()).await?;
        let Some(listener) = listener else { return Ok(None) };
        if !self.heard().await? {
            return Ok(None);
        }
        let met = tokio::time::timeout(MEETING, self.accept(listener)).await.ok().flatten();
        self.say(met.is_some()).await?;
        Ok(met)
    }

    /// The first one that comes with the proof.
    async fn accept(&self, listener: UnixListener) -> Option<UnixStream> {
        let (own, expected) = (self.secret(OF_DIALLED)?, self.secret(OF_DIALLER)?);
        loop {
            let (mut socket, _) = listener.accept().await.ok()?;
            let greet = async {
                let proven = is_own(&socket) && read_proof(&mut socket).await? == expected;
                if proven {
                    socket.write_all(&own).await?;
                }
                Ok::<_, io::Error>(proven)
            };
            if matches!(tokio::time::timeout(PROOF, greet).await, Ok(Ok(true))) {
                return Some(socket);
            }
        }
    }

    async fn come(&mut self) -> Result<Option<UnixStream>, LinkEnd> {
        if !self.heard().await? {
            return Ok(None);
        }
        let come = async {
            let (name, own) = (self.name()?, self.secret(OF_DIALLER)?);
            // Whoever is another user's does not see the proof.
            let mut socket = connect(&name).await.ok().filter(is_own)?;
            socket.write_all(&own).await.ok()?;
            Some(socket)
        };
        let socket = tokio::time::timeout(MEETING, come).await.ok().flatten();
        self.say(socket.is_some()).await?;
        let Some(mut socket) = socket else { return Ok(None) };
        if !self.heard().await? {
            return Ok(None);
        }
        let proof = tokio::time::timeout(MEETING, read_proof(&mut socket)).await;
        match proof {
            Ok(Ok(proof)) if Some(proof) == self.secret(OF_DIALLED) => Ok(Some(socket)),
            // It says that both are there. Somebody else is: not its fault.
            _ => Err(LinkEnd::Gone("another one is at the socket of their machine".to_owned())),
        }
    }

    /// Where they meet; nothing where this side does not want to.
    fn name(&self) -> Option<[u8; 32]> {
        self.may.then(|| self.secret(NAME)).flatten()
    }

    fn secret(&self, label: &str) -> Option<[u8; 32]> {
        self.connection.shared_secret(label)
    }

    async fn say(&mut self, yes: bool) -> Result<(), LinkEnd> {
        let said = Said { generation: self.generation, yes: u64::from(yes) };
        let nothing = bytes::Bytes::new;
        Ok(self.streams.0.send(FrameKind::Near, &said, nothing(), nothing()).await?)
    }

    async fn heard(&mut self) -> Result<bool, LinkEnd> {
        let head = tokio::time::timeout(HELLO_TIMEOUT, self.streams.1.next()).await;
        let head = head.map_err(|_| {
            LinkEnd::Gone(format!("it said nothing of a socket within {HELLO_TIMEOUT:?}"))
        })?;
        let head = head?.ok_or_else(|| LinkEnd::Gone("it ended the stream".to_owned()))?;
        if head.kind != FrameKind::Near {
            return Err(FrameError::UnexpectedKind { found: head.kind, expected: "Near" }.into());
        }
        head.body_within(0)?;
        let said = Said::read_from(head.header())?;
        if said.generation != self.generation {
            let (found, expected) = (said.generation, self.generation);
            let why = format!("it is of generation {found} on a link of {expected}");
            return Err(LinkEnd::Violation(why));
        }
        Ok(said.yes == 1)
    }
}

/// Whether a process of this one's user is at the other end.
fn is_own(socket: &UnixStream) -> bool {
    socket.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw())
}

async fn read_proof(socket: &mut UnixStream) -> io::Result<[u8; 32]> {
    let mut proof = [0; 32];
    socket.read_exact(&mut proof).await?;
    Ok(proof)
}

/// A name without a file, which goes with its socket; in a network namespace of its own it is not seen.
#[cfg(target_os = "linux")]
fn address(name: &[u8; 32]) -> io::Result<std::os::unix::net::SocketAddr> {
    use std::fmt::Write as _;
    use std::os::linux::net::SocketAddrExt as _;
    let mut text = String::from("shoal-near-");
    for byte in name {
        // A string takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    std::os::unix::net::SocketAddr::from_abstract_name(text)
}

#[cfg(target_os = "linux")]
fn listen(name: &[u8; 32]) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::bind_addr(&address(name)?)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

#[cfg(target_os = "linux")]
async fn connect(name: &[u8; 32]) -> io::Result<UnixStream> {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStringExt as _;
    let address = address(name)?;
    // A path that begins with a zero is such a name.
    let path = [&[0], address.as_abstract_name().unwrap_or_default()].concat();
    UnixStream::connect(std::ffi::OsString::from_vec(path)).await
}

/// Elsewhere there are no names without files.
#[cfg(not(target_os = "linux"))]
fn listen(_name: &[u8; 32]) -> io::Result<UnixListener> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
async fn connect(_name: &[u8; 32]) -> io::Result<UnixStream> {
    Err(io::ErrorKind::Unsupported.into())
}
