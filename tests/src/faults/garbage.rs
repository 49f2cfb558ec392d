//! Noise at every port of a cluster, from without and from within.
//!
//! | who | where | what |
//! |---|---|---|
//! | a stranger | each UDP port | random datagrams; ones that look like the first of a handshake |
//! | a stranger | each API port | random bytes; requests with bits turned; requests that never end |
//! | whoever stole a worker's key | `shoal-ctl`, `shoal-act` | frames of each kind with random contents |
//! | whoever stole a coordinator's key | `shoal-req`, `shoal-raft` | the same |
//!
//! Nothing but the streams of others is looked at here: whether they notice.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use shoal_protocol::admin::ClusterView;
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::Role;
use shoal_protocol::quic::{Alpn, Endpoint, Expect, Identity};

use super::client::pass;
use super::trial::{COORDINATORS, WORKERS};
use crate::proc::Cluster;

/// One of each between two of these: much noise, and no flood, which is another thing.
const PAUSE: Duration = Duration::from_millis(2);

/// No exchange with a port may hold up the noise for the next one.
const PATIENCE: Duration = Duration::from_millis(200);

/// The longest piece of noise: a datagram of a LAN.
const NOISE_MAX: usize = 1400;

/// Frames on one stream: the first one that is wrong mostly ends it.
const FRAMES: usize = 4;

/// Where to.
#[derive(Clone, Debug)]
pub struct Targets {
    coordinators: Vec<SocketAddr>,
    requests: Vec<SocketAddr>,
    activations: Vec<SocketAddr>,
    apis: Vec<SocketAddr>,
    /// Of a worker, and of a coordinator that joined.
    identities: [PathBuf; 2],
}

impl Targets {
    /// All ports of a cluster.
    pub fn of(cluster: &Cluster, view: &ClusterView) -> Result<Self> {
        let api = |index| cluster.api(index).trim_start_matches("http://").parse();
        Ok(Self {
            coordinators: (0..COORDINATORS)
                .map(|index| cluster.cluster_address(index).parse())
                .collect::<Result<_, _>>()?,
            requests: (0..WORKERS).filter_map(|index| cluster.requests_address(index)).collect(),
            activations: view.workers.iter().filter_map(|worker| worker.address).collect(),
            apis: (0..COORDINATORS).map(api).collect::<Result<_, _>>()?,
            identities: [
                cluster.worker_data(WORKERS - 1).join("identity"),
                cluster.coordinator_data(1).join("identity"),
            ],
        })
    }

    fn udp(&self) -> impl Iterator<Item = SocketAddr> {
        self.coordinators.iter().chain(&self.requests).chain(&self.activations).copied()
    }
}

/// Noise until this is dropped.
#[derive(Debug)]
pub struct Noise {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Noise {
    /// Of somebody without a certificate.
    pub fn of_a_stranger(targets: Targets) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let mut noise = Self { stop: Arc::default(), threads: Vec::new() };
        let udp: Vec<_> = targets.udp().collect();
        noise.until_stopped(1, move |dice| {
            for target in &udp {
                // A port that refuses is as good.
                let _ = socket.send_to(&dice.datagram(), target);
            }
        });
        noise.until_stopped(2, move |dice| {
            for target in &targets.apis {
                let _ = shout(*target, dice);
            }
        });
        Ok(noise)
    }

    /// Of somebody who has the keys of a worker and of a coordinator.
    pub fn of_members(targets: Targets) -> Result<Self> {
        let mut noise = Self { stop: Arc::default(), threads: Vec::new() };
        for (seed, path) in (3..).zip(targets.identities.clone()) {
            let identity = Identity::load(&path)?;
            let identity = identity.with_context(|| format!("no {}", path.display()))?;
            let places = match identity.node.role {
                Role::Coordinator => [
                    (Alpn::Requests, Role::Worker, targets.requests.clone()),
                    (Alpn::Raft, Role::Coordinator, targets.coordinators.clone()),
                ],
                Role::Worker | Role::Admin => [
                    (Alpn::Control, Role::Coordinator, targets.coordinators.clone()),
                    (Alpn::Activations, Role::Worker, targets.activations.clone()),
                ],
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let identity = Arc::new(identity);
            let endpoint = runtime
                .block_on(async { Endpoint::bind(([127, 0, 0, 1], 0).into(), identity, &[]) })?;
            noise.until_stopped(seed, move |dice| {
                for (alpn, role, targets) in &places {
                    for target in targets {
                        let talk = talk(&endpoint, *target, *alpn, *role, dice);
                        runtime.block_on(async {
                            let _ = tokio::time::timeout(PATIENCE, talk).await;
                        });
                    }
                }
            });
        }
        Ok(noise)
    }

    fn until_stopped(&mut self, seed: u64, mut make: impl FnMut(&mut Dice) + Send + 'static) {
        let stop = Arc::clone(&self.stop);
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                make(&mut dice);
                pass(PAUSE);
            }
        }));
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A conversation that a certificate opens, with nothing but noise in it.
async fn talk(
    endpoint: &Endpoint,
    target: SocketAddr,
    alpn: Alpn,
    role: Role,
    dice: &mut Dice,
) -> Result<()> {
    let connection = endpoint.connect(target, Expect::Role(role), alpn, PATIENCE).await?;
    let (mut sender, mut receiver) = connection.open_bi().await?;
    for _ in 0..FRAMES {
        let kind = FrameKind::ALL[dice.below(FrameKind::ALL.len())];
        let (header, body) = (dice.bytes(64), dice.bytes(NOISE_MAX));
        sender.send_encoded(kind, &header, body).await?;
    }
    sender.finish();
    while receiver.next().await?.is_some() {}
    connection.close(0, "noise");
    Ok(())
}

/// One exchange with an API.
fn shout(target: SocketAddr, dice: &mut Dice) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let body = r#"{"model":"one","prompt":[10,11],"max_tokens":2}"#;
    let good = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {target}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut bytes = match dice.below(3) {
        0 => dice.bytes(NOISE_MAX),
        1 => good.into_bytes(),
        _ => format!("POST /v1/completions HTTP/1.1\r\ncontent-length: 999\r\n\r\n{body}").into(),
    };
    for _ in 0..dice.below(6) {
        let at = dice.below(bytes.len().max(1));
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 1 << dice.below(8);
        }
    }
    stream.write_all(&bytes)?;
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut [0; 512])?;
    Ok(())
}

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn draw(&mut self) -> u64 {
        self.0 |= u64::from(self.0 == 0);
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.draw() >> 11) as usize % end.max(1)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.below(most + 1);
        (0..len).map(|_| self.draw() as u8).collect()
    }

    /// Every other one looks like the first datagram of a QUIC handshake: a long header, version 1, two
    /// connection ids of eight bytes, and as long as such a datagram has to be.
    fn datagram(&mut self) -> Vec<u8> {
        let mut bytes = self.bytes(NOISE_MAX);
        if self.below(2) == 0 {
            bytes.resize(1200, 0);
            bytes[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
            bytes[14] = 8;
            bytes[23] = 0;
        }
        bytes
    }
}
