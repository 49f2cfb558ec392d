//! Weights that workers pass on to each other: real endpoints in one process, a hub that counts what it
//! sends, and in the place of the coordinators the tracker that they have.

#[path = "blobs/ranks.rs"]
mod ranks;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use shoal_protocol::blob::tracker::{Told, Tracker};
use shoal_protocol::blob::{BlobSettings, Cut, Filling, ModelCache, Side, Wanted};
use shoal_protocol::control::WorkerMessage;
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ModelSource;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{Alpn, Endpoint, Expect};
use shoal_protocol::weights::{ASK_LEN_MAX, BlobNews, ChunkAsk, ChunkId, ChunkReply};
use shoal_shard_worker::blob::{Blobs, Telling, more};
use shoal_tests::hub::{COMMIT, Hub};
use shoal_tests::model::RandomLlama;
use tempfile::TempDir;

const REPO: &str = "shoal/random";
const WEIGHTS: &str = "model.safetensors";
const CUT: Cut = Cut { chunk: 128 << 10, run: 512 << 10 };

/// How long everything may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn source() -> ModelSource {
    ModelSource::Hub { repo: REPO.to_owned(), revision: COMMIT.to_owned() }
}

fn lock(tracker: &Mutex<Tracker>) -> MutexGuard<'_, Tracker> {
    tracker.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A worker as far as weights go.
struct Worker {
    node: NodeId,
    data: TempDir,
    cache: ModelCache,
    blobs: Blobs,
}

/// Workers, and what passes on what they say.
struct Town {
    hub: Hub,
    ca: CertificateAuthority,
    tracker: Arc<Mutex<Tracker>>,
    workers: Vec<Worker>,
    runtime: tokio::runtime::Runtime,
    _model: TempDir,
    weights: Vec<u8>,
}

impl Town {
    fn new() -> Result<Self> {
        Self::of(RandomLlama { layers: 4, hidden: 256, intermediate: 512 }, 1)
    }

    /// With another model, of so many key/value heads.
    fn of(model: RandomLlama, kv_heads: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        model.write_with_heads(folder.path(), kv_heads)?;
        let model = folder;
        let weights = std::fs::read(model.path().join(WEIGHTS))?;
        Ok(Self {
            hub: Hub::serve(model.path(), REPO, None)?,
            ca: CertificateAuthority::create(SystemTime::now())?,
            tracker: Arc::default(),
            workers: Vec::new(),
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()?,
            _model: model,
            weights,
        })
    }

    /// One more worker, whose small files are here.
    fn join(&mut self) -> Result<()> {
        self.join_at("127.0.0.1:0".parse()?, None)
    }

    /// The same, at an address where others do not find it, but at another.
    fn join_at(&mut self, at: SocketAddr, advertise: Option<SocketAddr>) -> Result<()> {
        let node = NodeId::worker(self.workers.len() as u32 + 1);
        let data = tempfile::tempdir()?;
        let settings =
            BlobSettings { endpoint: self.hub.url(), cut: CUT, ..BlobSettings::default() };
        let cache = ModelCache::new(data.path(), settings);
        cache.prepare(&source(), Side::Weights, &AtomicBool::new(false))?;
        let identity = self.ca.issue_identity(node, SystemTime::now())?;
        let blobs = Blobs::start((at, advertise), Arc::new(identity), cache.clone())?;
        self.pass_on(node, &blobs);
        self.workers.push(Worker { node, data, cache, blobs });
        Ok(())
    }

    /// Does for a worker what a coordinator does.
    fn pass_on(&self, node: NodeId, blobs: &Blobs) {
        let (tracker, blobs) = (Arc::clone(&self.tracker), blobs.clone());
        self.runtime.spawn(async move {
            let mut telling = Some(Telling::new(&blobs));
            let mut told = Told::default();
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            loop {
                tokio::select! {
                    said = more(&mut telling) => {
                        let WorkerMessage::Blobs { address, news } = said else { return };
                        for news in news {
                            // A lie is found out by who compares.
                            let _ = lock(&tracker).hear(node, address, news);
                        }
                    }
                    _ = ticks.tick() => {
                        let news = lock(&tracker).tell(node, &mut told);
                        blobs.hear(NodeId::coordinator(1), news);
                    }
                }
            }
        });
    }

    /// These workers fetch all of the model at once; how long each took.
    fn fetch(&self, workers: std::ops::Range<usize>) -> Result<Vec<Duration>> {
        let wanted = [Wanted { file: WEIGHTS.to_owned(), bytes: 0..self.weights.len() as u64 }];
        let cancel = AtomicBool::new(false);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let fetch = |worker: &Worker| -> Result<Duration> {
                let progress = |_: u64, _: u64| {
                    if begun.elapsed() > PATIENCE {
                        cancel.store(true, Ordering::Relaxed);
                    }
                };
                let filling = Filling { on_progress: &progress, cancel: &cancel };
                worker.blobs.fill(&source(), &wanted, &filling)?;
                Ok(begun.elapsed())
            };
            let all: Vec<_> = self.workers[workers]
                .iter()
                .map(|worker| scope.spawn(move || fetch(worker)))
                .collect();
            all.into_iter().map(|one| one.join().expect("no worker panics")).collect()
        })
    }

    fn check(&self, worker: &Worker) -> Result<()> {
        let folder = worker.cache.prepare(&source(), Side::Weights, &AtomicBool::new(false))?;
        let here = std::fs::read(folder.join(WEIGHTS))?;
        anyhow::ensure!(here == self.weights, "{} has other weights", worker.node);
        anyhow::ensure!(folder.starts_with(worker.data.path()));
        Ok(())
    }
}

#[test]
fn a_hub_sends_a_model_once_to_eight_workers_and_they_are_done_together() -> Result<()> {
    let mut town = Town::new()?;
    (0..8).try_for_each(|_| town.join())?;
    let heads = town.hub.counts().weights();
    let took = town.fetch(0..8)?;
    town.workers.iter().try_for_each(|worker| town.check(worker))?;
    let (sent, all) = (town.hub.counts().weights() - heads, town.weights.len() as u64);
    let (first, last) = (took.iter().min().context("8")?, took.iter().max().context("8")?);
    println!("the hub sent {:.3} of the model to 8 workers", sent as f64 / all as f64);
    println!("the first was done after {first:?}, the last after {last:?}");
    assert!(sent * 100 <= all * 105, "{sent} bytes of a model of {all}");
    // On a busy machine of two cores the last may be scheduled late.
    assert!(*last <= 2 * *first + Duration::from_secs(1), "{took:?}");
    Ok(())
}

#[test]
fn a_worker_that_comes_later_gets_everything_from_the_others() -> Result<()> {
    let mut town = Town::new()?;
    (0..2).try_for_each(|_| town.join())?;
    town.fetch(0..2)?;
    town.join()?;
    let before = town.hub.counts().weights();
    town.fetch(2..3)?;
    town.check(&town.workers[2])?;
    assert_eq!(town.hub.counts().weights(), before, "the hub was asked again");
    let given: u64 = town.workers[..2].iter().map(|worker| worker.blobs.given()).sum();
    assert!(given >= town.weights.len() as u64, "{given}");
    Ok(())
}

#[test]
fn who_is_no_member_any_more_is_given_nothing_although_it_has_a_certificate() -> Result<()> {
    let mut town = Town::new()?;
    (0..2).try_for_each(|_| town.join())?;
    town.fetch(0..1)?;
    // A stranger with a good certificate: no coordinator speaks of it.
    let node = NodeId::worker(77);
    let identity = Arc::new(town.ca.issue_identity(node, SystemTime::now())?);
    let ask = ChunkAsk {
        key: town.workers[0].cache.key(&source())?,
        chunk: ChunkId { file: 0, index: 1 },
    };
    let (address, to) = (town.workers[0].blobs.address(), town.workers[0].node);
    let reply: Option<ChunkReply> = town.runtime.block_on(async {
        let endpoint = Endpoint::bind("127.0.0.1:0".parse()?, identity, &[])?;
        let expect = Expect::Node(to);
        let connection = endpoint.connect(address, expect, Alpn::Blobs, PATIENCE).await?;
        let (mut sender, mut receiver) = connection.open_bi().await?;
        sender.send_message(&ask, ASK_LEN_MAX).await?;
        anyhow::Ok(receiver.message(ASK_LEN_MAX).await?)
    })?;
    assert_eq!(reply, Some(ChunkReply::NotHere));
    Ok(())
}

#[test]
fn a_worker_whose_disk_lies_is_found_out_and_the_others_have_the_model_all_the_same() -> Result<()>
{
    let mut town = Town::new()?;
    town.join()?;
    town.fetch(0..1)?;
    // Behind its back: it has hashed what was there before.
    let folder =
        town.workers[0].cache.prepare(&source(), Side::Weights, &AtomicBool::new(false))?;
    let mut damaged = town.weights.clone();
    let middle = damaged.len() / 2;
    damaged[middle..].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(folder.join(WEIGHTS), &damaged)?;
    (0..2).try_for_each(|_| town.join())?;
    town.fetch(1..3)?;
    town.check(&town.workers[1])?;
    town.check(&town.workers[2])?;
    Ok(())
}

#[test]
fn a_worker_behind_a_mapping_gives_what_it_has_where_it_says_that_it_is() -> Result<()> {
    let mut town = Town::new()?;
    // A port that is free now.
    let port = std::net::UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    let mapped = SocketAddr::from(([127, 0, 0, 1], port));
    town.join_at(SocketAddr::from(([0, 0, 0, 0], port)), Some(mapped))?;
    assert_eq!(town.workers[0].blobs.address(), mapped);
    town.fetch(0..1)?;
    let sent = town.hub.counts().weights();
    town.join()?;
    let header = town.hub.counts().weights() - sent;
    town.fetch(1..2)?;
    town.check(&town.workers[1])?;
    assert_eq!(town.hub.counts().weights(), sent + header, "the hub was asked for chunks");
    assert!(town.workers[0].blobs.given() > 0);
    Ok(())
}

#[test]
fn a_worker_that_says_what_it_does_not_have_holds_nobody_up() -> Result<()> {
    let mut town = Town::new()?;
    town.join()?;
    let key = town.workers[0].cache.key(&source())?;
    // It promises everything, at an address where nobody is.
    let nowhere: SocketAddr = "127.0.0.1:9".parse()?;
    let chunks = (0..4).map(|index| (ChunkId { file: 0, index }, [index as u8; 32])).collect();
    let promised = BlobNews::Has { key, chunks };
    let liar = NodeId::worker(99);
    let mut tracker = lock(&town.tracker);
    tracker.hear(liar, nowhere, promised).context("it is the first to say so")?;
    tracker.hear(liar, nowhere, BlobNews::Wants { key, chunks: vec![(0, 0..1000)] })?;
    drop(tracker);
    let took = town.fetch(0..1)?;
    town.check(&town.workers[0])?;
    assert!(took[0] < Duration::from_secs(40), "{took:?}");
    Ok(())
}
