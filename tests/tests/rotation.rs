//! The CA is rotated twice while streams run through every coordinator and worker: none of them notices.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView, DeploymentPhase};
use shoal_protocol::id::Role;
use shoal_protocol::plan::{ModelSource, PretendSpec};
use shoal_protocol::quic::join::join;
use shoal_protocol::quic::{AdminContext, Alpn, Endpoint, Expect, Identity};
use shoal_tests::api::Api;
use shoal_tests::proc::cluster::START_TIMEOUT;
use shoal_tests::proc::{Cluster, Process, Signal, shoal};

/// 1 ms a token over two stages.
const MODEL: PretendSpec = PretendSpec {
    layers: 4,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 23,
    layer_step_ns: 250_000,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

const TOKENS: u64 = 100;

/// Streams at once through each coordinator.
const STREAMS: usize = 2;

/// How long a rotation may take on a busy machine; without a fault it takes about two seconds.
const ROTATION: Duration = Duration::from_secs(60);

fn ask(url: &str) -> Result<Vec<u64>> {
    let prompt: Vec<u32> = (10..40).collect();
    let options = json!({"max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true,
                         "seed": 4, "temperature": 0.8});
    Ok(Api::new(url, "pretend").complete(prompt, options)?.ok()?.token_ids())
}

/// Clients that ask without a pause, and hold every answer against the first one.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    fn start(cluster: &Cluster, expected: &[u64]) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let client = |index: usize| {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            let (url, expected) = (cluster.api(index), expected.to_owned());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let found = ask(&url).with_context(|| format!("a request through {url}"))?;
                    ensure!(found == expected, "other tokens through {url}");
                    done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        };
        let clients = (0..3 * STREAMS).map(|n| client(n % 3)).collect();
        Self { stop, done, clients }
    }

    /// Ends it; how many requests were answered, all of them as expected.
    fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(self.done.load(Ordering::Relaxed))
    }
}

fn verb(context: &Path, args: &[&str]) -> Result<(Option<i32>, String, String)> {
    let mut command = std::process::Command::new(shoal());
    command.args(args).arg("--context").arg(context).env_remove("SHOAL_CONTEXT");
    let finished = Process::spawn(command)?.finish(ROTATION)?;
    Ok((finished.code(), finished.stdout, finished.stderr))
}

/// The fingerprint of the CA that signs, as `shoal ca list` shows it.
fn signing(context: &Path) -> Result<String> {
    let (code, stdout, stderr) = verb(context, &["ca", "list", "--json"])?;
    ensure!(code == Some(0), "{stderr}");
    let view: Value = serde_json::from_str(&stdout)?;
    ensure!(view["rotation"].is_null() && view["cas"][0]["standing"] == "signs", "{view}");
    Ok(view["cas"][0]["fingerprint"].as_str().context("a fingerprint")?.to_owned())
}

fn rotate(context: &Path, flags: &[&str]) -> Result<Duration> {
    let began = Instant::now();
    let args = [&["ca", "rotate", "--wait"], flags].concat();
    let (code, _, stderr) = verb(context, &args)?;
    ensure!(code == Some(0), "{stderr}");
    ensure!(stderr.contains("the CA before it is believed no more"), "{stderr}");
    eprintln!("{stderr}{:?}", began.elapsed());
    Ok(began.elapsed())
}

/// Whether a coordinator ends what this identity begins because it does not believe it.
fn is_distrusted(identity: &Identity, address: &str, alpn: Alpn) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let address = address.parse()?;
    runtime.block_on(async {
        let endpoint = Endpoint::bind(([127, 0, 0, 1], 0).into(), Arc::new(identity.clone()), &[])?;
        let expect = Expect::Role(Role::Coordinator);
        let connection = endpoint.connect(address, expect, alpn, START_TIMEOUT).await?;
        let ended = tokio::time::timeout(Duration::from_secs(3), connection.closed()).await;
        Ok(ended.is_ok() && connection.was_distrusted())
    })
}

fn all_connected(view: &ClusterView) -> bool {
    view.workers.iter().all(|worker| worker.connected)
}

#[test]
fn the_ca_is_rotated_twice_under_load_and_no_request_fails() -> Result<()> {
    let mut cluster = Cluster::start(3, 3)?;
    cluster.admin(0)?.deploy("pretend", ModelSource::Pretend(MODEL), 2)?;
    for index in 0..3 {
        let admin = cluster.admin(index)?;
        admin.wait_for_phase("pretend", DeploymentPhase::Ready, START_TIMEOUT)?;
    }
    let expected = ask(&cluster.api(0))?;
    ensure!(expected.len() as u64 == TOKENS);
    let view = cluster.admin(0)?.wait_until("there", START_TIMEOUT, |_| true)?;
    // The one on which nothing is placed is off during both rotations.
    let placed: Vec<_> =
        view.plan.replicas[0].nodes().map(|node| node.number as usize - 1).collect();
    let spare = (0..3).find(|index| !placed.contains(index)).context("a spare worker")?;
    let old = Identity::load(&cluster.worker_data(placed[0]).join("identity"))?.context("one")?;
    let old_context = cluster.context(1).with_file_name("old.context");
    let copy = cluster.context(1).with_file_name("copy.context");
    std::fs::copy(cluster.context(1), &old_context)?;
    std::fs::copy(cluster.context(1), &copy)?;
    let call = AdminCall::CreateToken { role: Role::Worker, uses: 1, expires_s: 600 };
    let AdminReply::Token { token } = cluster.admin(0)?.call(call)? else { panic!("no token") };
    cluster.signal_worker(spare, Signal::KILL)?;

    let load = Load::start(&cluster, &expected);
    let first = signing(&cluster.context(0))?;
    // An operator on another machine has a copy of a context, which goes on working.
    rotate(&copy, &["--skip-absent"])?;
    let second = signing(&copy)?;
    ensure!(first != second);
    rotate(&cluster.context(2), &["--skip-absent"])?;
    let third = signing(&cluster.context(0))?;
    ensure!(third != second);
    let answered = load.end()?;
    eprintln!("{answered} requests were answered meanwhile, each with the same tokens");
    ensure!(answered >= 20, "{answered} answers are no load");

    // What the CAs from before signed opens nothing at any of them.
    for index in 0..3 {
        let address = cluster.cluster_address(index);
        ensure!(is_distrusted(&old, address, Alpn::Control)?, "c{} lets it in", index + 1);
        let context = AdminContext::load(&old_context)?.context("a context")?;
        ensure!(is_distrusted(&context.identity, address, Alpn::Admin)?);
    }
    let (code, _, stderr) = verb(&old_context, &["ca", "list"])?;
    ensure!(code == Some(4) && stderr.contains("believed no more"), "{code:?} {stderr}");

    // The worker that was off comes back as who it was, and a token from before lets somebody in.
    cluster.restart_worker(spare)?;
    for index in 0..3 {
        cluster.admin(index)?.wait_until("all connected", START_TIMEOUT, all_connected)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let address = cluster.cluster_address(1).parse()?;
    let joined = runtime.block_on(join(address, &token.parse()?, START_TIMEOUT))?;
    ensure!(shoal_protocol::join::Hex(&joined.shows()).to_string() == third);

    // All coordinators at once, and then the worker again.
    for index in 0..3 {
        cluster.signal_coordinator(index, Signal::KILL)?;
    }
    for index in 0..3 {
        cluster.restart_coordinator(index)?;
    }
    cluster.leader(0)?;
    ensure!(signing(&cluster.context(0))? == third);
    let back = |view: &ClusterView| view.workers.iter().filter(|w| w.connected).count() == 3;
    for index in 0..3 {
        cluster.admin(index)?.wait_until("all connected", START_TIMEOUT, back)?;
        let admin = cluster.admin(index)?;
        admin.wait_for_phase("pretend", DeploymentPhase::Ready, START_TIMEOUT)?;
        ensure!(ask(&cluster.api(index))? == expected);
    }
    Ok(())
}
