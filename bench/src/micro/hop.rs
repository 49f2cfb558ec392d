//! One hop: a frame from send to usable tensor, against bare quinn as it comes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use shoal_protocol::activation::{RowRecord, Step, StepHeader};
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{Alpn, Connection, Endpoint, Expect, Pulse};
use tokio::sync::watch;

use crate::measure::Series;
use crate::measure::report::Section;

/// One row of 4,096 floats.
const PAYLOAD: usize = 16 << 10;
const ROUND_TRIPS: usize = 2000;
const PAIRS: usize = 9;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 64,
    context_max: 1024,
    step_rows_max: 64,
    sequences_max: 16,
    steps_in_flight_max: 4,
};

/// Runs it.
pub fn run() -> Result<Section> {
    let mut section = Section::new(
        "Hop",
        format!(
            "A frame of {PAYLOAD} B goes to a peer and comes back, one thread (and one endpoint) a side, mutual TLS, \
             {ROUND_TRIPS} round trips a run; half a round trip is one way. Bare quinn: its own \
             defaults, raw streams, the same bytes copied once into one buffer. Runs in turn."
        ),
    );
    let (mut framed, mut bare, mut p99) = (Series::default(), Series::default(), Series::default());
    let link = Link::open(false)?;
    let beating = Link::open(true)?;
    let mut beaten = Series::default();
    for _ in 0..PAIRS {
        let mut times = link.framed()?;
        framed.push(times.median());
        p99.push(times.quantile(0.99));
        beaten.push(beating.framed()?.median());
        times = link.bare()?;
        bare.push(times.median());
    }
    section.seen("one way, framed, microseconds, p50", framed.to_string());
    section.seen("one way, framed, microseconds, p99", p99.to_string());
    section.seen("one way, bare quinn, microseconds, p50", bare.to_string());
    let ratio = framed.over(&bare);
    section.at_most("framed over bare", ratio.median(), ratio.to_string(), 1.5);
    let ratio = beaten.over(&framed);
    section.seen("framed, with a beat each 10 ms from both ends, over without", ratio.to_string());
    let stats = link.near.stats();
    section.at_most("packets lost", stats.lost_packets as f64, stats.lost_packets.to_string(), 0.0);
    section.seen(
        "packets a kernel send",
        format!("{:.1}", stats.sent_packets as f64 / stats.sends.max(1) as f64),
    );
    Ok(section)
}

/// A connection between two endpoints on two threads; the far side echoes.
struct Link {
    runtime: tokio::runtime::Runtime,
    near: Connection,
    raw: quinn::Connection,
    /// Whether both ends send beats, as links between stages do while work flows.
    beats: bool,
    _endpoints: (Endpoint, quinn::Endpoint),
}

impl Link {
    fn open(beats: bool) -> Result<Self> {
        let ca = CertificateAuthority::create(SystemTime::now())?;
        let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        let identity = |n| ca.issue_identity(NodeId::worker(n), SystemTime::now()).map(Arc::new);
        let (near, far) = (identity(1)?, identity(2)?);
        let (send_address, address) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let endpoint = Endpoint::bind(any, far, &[Alpn::Activations])?;
                send_address.send(endpoint.local_address())?;
                while let Some(accepting) = endpoint.accept().await {
                    tokio::spawn(async move {
                        let connection = accepting.establish().await?;
                        let _pulse = beats.then(|| Beating::on(connection.clone()));
                        echo_frames(connection).await
                    });
                }
                Ok(())
            })
        });
        let (send_raw, raw_address) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (server, _) = raw_configs()?;
                let endpoint = quinn::Endpoint::server(server, any)?;
                send_raw.send(endpoint.local_addr()?)?;
                while let Some(incoming) = endpoint.accept().await {
                    tokio::spawn(async move { echo_raw(incoming.await?).await });
                }
                Ok(())
            })
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (address, raw_address) = (address.recv()?, raw_address.recv()?);
        let (near, raw, endpoints) = runtime.block_on(async {
            let endpoint = Endpoint::bind(any, near, &[])?;
            let expect = Expect::Node(NodeId::worker(2));
            let near = endpoint
                .connect(address, expect, Alpn::Activations, Duration::from_secs(5))
                .await?;
            let bare = quinn::Endpoint::client(any)?;
            let raw = bare.connect_with(raw_configs()?.1, raw_address, "localhost")?.await?;
            anyhow::Ok((near, raw, (endpoint, bare)))
        })?;
        Ok(Self { runtime, near, raw, beats, _endpoints: endpoints })
    }

    fn framed(&self) -> Result<Series> {
        self.runtime.block_on(async {
            let _pulse = self.beats.then(|| Beating::on(self.near.clone()));
            let (mut sender, mut receiver) = self.near.open_bi().await?;
            let step = Step {
                header: StepHeader {
                    generation: 1,
                    step: 1,
                    rows: 1,
                    grants: 0,
                    samples: 1,
                    reserved: 0,
                },
                rows: vec![RowRecord { sequence: 1, position: 1, flags: RowRecord::SAMPLE }],
                grants: vec![],
            };
            let payload = Bytes::from(vec![1u8; PAYLOAD]);
            let mut tensor = vec![0u8; PAYLOAD];
            let mut times = Series::default();
            for _ in 0..ROUND_TRIPS {
                let start = Instant::now();
                let records = Bytes::from(step.encode_records());
                sender.send(FrameKind::Step, &step.header, records, payload.clone()).await?;
                let head = receiver.next().await?.context("the echo ended")?;
                let (header, records, _) =
                    Step::check(head.header(), head.body_len, &LIMITS, PAYLOAD)?;
                let mut record_bytes = [0; 64];
                receiver.read_into(&mut record_bytes[..records]).await?;
                Step::decode(header, &record_bytes[..records])?;
                receiver.read_into(&mut tensor).await?;
                times.push(start.elapsed().as_nanos() as f64 / 2e3);
            }
            sender.finish();
            Ok(times)
        })
    }

    fn bare(&self) -> Result<Series> {
        self.runtime.block_on(async {
            let (mut sender, mut receiver) = self.raw.open_bi().await?;
            let payload = Bytes::from(vec![1u8; PAYLOAD]);
            let mut tensor = vec![0u8; PAYLOAD];
            let mut times = Series::default();
            for _ in 0..ROUND_TRIPS {
                let start = Instant::now();
                sender.write_chunk(payload.clone()).await?;
                receiver.read_exact(&mut tensor).await?;
                times.push(start.elapsed().as_nanos() as f64 / 2e3);
            }
            sender.finish()?;
            Ok(times)
        })
    }
}

/// Beats on a connection for as long as this lives.
struct Beating(tokio::task::JoinHandle<()>);

impl Beating {
    fn on(connection: Connection) -> Self {
        Self(tokio::spawn(async move {
            let (_work, busy) = watch::channel(1);
            while connection.close_reason().is_none() {
                // Between two runs the other end is silent, and given up: that ends nothing here.
                let _ = Pulse::default().keep(&connection, busy.clone()).await;
            }
        }))
    }
}

impl Drop for Beating {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn echo_frames(connection: Connection) -> Result<()> {
    loop {
        let (mut sender, mut receiver) = connection.accept_bi().await?;
        while let Some(head) = receiver.next().await? {
            let (header, records, payload) =
                Step::check(head.header(), head.body_len, &LIMITS, PAYLOAD)?;
            let mut record_bytes = vec![0; records];
            receiver.read_into(&mut record_bytes).await?;
            Step::decode(header, &record_bytes)?;
            let mut tensor = vec![0; payload];
            receiver.read_into(&mut tensor).await?;
            sender.send(FrameKind::Step, &header, record_bytes.into(), tensor.into()).await?;
        }
    }
}

async fn echo_raw(connection: quinn::Connection) -> Result<()> {
    loop {
        let (mut sender, mut receiver) = connection.accept_bi().await?;
        loop {
            let mut tensor = vec![0; PAYLOAD];
            if receiver.read_exact(&mut tensor).await.is_err() {
                break;
            }
            sender.write_chunk(tensor.into()).await?;
        }
    }
}

/// Bare quinn as it comes: default transport, a self-signed certificate.
fn raw_configs() -> Result<(quinn::ServerConfig, quinn::ClientConfig)> {
    use std::sync::OnceLock;
    static PAIR: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    if PAIR.get().is_none() {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        let _ = PAIR.set((made.cert.der().to_vec(), made.signing_key.serialize_der()));
    }
    let (certificate, key) = PAIR.get().context("the certificate was just made")?;
    let certificate = rustls_pki_types::CertificateDer::from(certificate.clone());
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(key.clone());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.into())?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = quinn::crypto::rustls::QuicServerConfig::try_from(server)?;
    let client = quinn::crypto::rustls::QuicClientConfig::try_from(client)?;
    Ok((
        quinn::ServerConfig::with_crypto(Arc::new(server)),
        quinn::ClientConfig::new(Arc::new(client)),
    ))
}
