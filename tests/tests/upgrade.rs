//! Two builds in one cluster: an older commit's, and this one's (`scripts/older.sh`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView, DeploymentPhase, Vote};
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::plan::ModelSource;
use shoal_protocol::upgrade::{UpgradeCall, UpgradeView};
use shoal_protocol::version::PROTOCOL_VERSION;
use shoal_tests::api::{Api, Event, Stream};
use shoal_tests::proc::cluster::START_TIMEOUT;
use shoal_tests::proc::{Admin, Cluster, Finished, Process, older, shoal};
use shoal_tests::slow::SLOW;

/// How long a drain, a start or an election may take beside everything else on two cores.
const WITHIN: Duration = Duration::from_secs(30);

/// A stream takes about a second: less than a coordinator that stops waits for it.
const TOKENS: u32 = 150;

/// Streams at once.
const CLIENTS: u32 = 3;

/// What a coordinator that is refused for good has said within.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

/// Clients that ask one coordinator after the other, without a pause, and compare what comes.
struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    /// The coordinators that are in use: what a load balancer knows. Who begins a request holds it, so that
    /// nobody is on his way to one that is not in use any more.
    used: RwLock<Vec<String>>,
    stop: AtomicBool,
    asked: AtomicUsize,
}

impl Shared {
    /// One request at the coordinator whose turn it is, and its number.
    fn ask(&self, client: u32) -> Result<Vec<u64>> {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        let used = self.used.read().unwrap_or_else(PoisonError::into_inner);
        let url = used[n % used.len()].clone();
        let begun = begin(&Api::new(&url, "slow"), client);
        drop(used);
        begun.and_then(finish).with_context(|| format!("request {n} at {url}"))
    }
}

impl Load {
    fn start(urls: Vec<String>) -> Result<Self> {
        let shared = Arc::new(Shared { used: RwLock::new(urls), ..Shared::default() });
        let mut clients = Vec::new();
        for client in 0..CLIENTS {
            let expected = shared.ask(client).context("undisturbed")?;
            ensure!(expected.len() == TOKENS as usize);
            let shared = Arc::clone(&shared);
            clients.push(std::thread::spawn(move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    let found = shared.ask(client)?;
                    ensure!(found == expected, "client {client} got other tokens");
                }
                Ok(())
            }));
        }
        Ok(Self { shared, clients })
    }

    /// From now on clients use these coordinators alone; what has begun at others goes on.
    fn use_only(&self, urls: Vec<String>) {
        *self.shared.used.write().unwrap_or_else(PoisonError::into_inner) = urls;
    }

    /// Requests that were begun so far.
    fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::Relaxed)
    }

    /// Every request that was begun has succeeded; how many there were.
    fn stop(self) -> Result<usize> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(self.shared.asked.load(Ordering::Relaxed))
    }
}

fn begin(api: &Api, client: u32) -> Result<Stream> {
    let prompt: Vec<u32> = (10 + client..30 + client).collect();
    let options = json!({"max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true});
    api.stream(prompt, options)
}

fn finish(mut stream: Stream) -> Result<Vec<u64>> {
    let (chunks, end) = stream.rest()?;
    if end != Event::Done {
        bail!("after {} chunks: {end:?}", chunks.len());
    }
    let ids = |chunk: &Value| chunk["choices"][0]["token_ids"].as_array().cloned();
    let ids = chunks.iter().filter_map(ids).flatten().filter_map(|id| id.as_u64());
    Ok(ids.collect())
}

fn urls(cluster: &Cluster, indices: impl IntoIterator<Item = usize>) -> Vec<String> {
    indices.into_iter().map(|index| cluster.api(index)).collect()
}

fn upgrade(admin: &Admin, call: UpgradeCall) -> Result<UpgradeView> {
    match admin.call(AdminCall::Upgrade(call))? {
        AdminReply::Upgrade(view) => Ok(view),
        other => bail!("{other:?} where an upgrade's standing was expected"),
    }
}

/// Asks until the answer is as wanted: what coordinators hear of each other is seen from outside in
/// nothing else.
#[allow(clippy::disallowed_methods)]
fn until<T>(mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + WITHIN;
    loop {
        match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Err(error) if Instant::now() > end => return Err(error),
            Ok(None) if Instant::now() > end => bail!("not within {WITHIN:?}"),
            Ok(None) | Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// An upgrade cannot be completed yet, and these are named for it: no others, as soon as the coordinators
/// have heard what the others speak.
fn held_back(cluster: &Cluster, asked: usize, by: &str) -> Result<()> {
    let (admin, mut last) = (cluster.admin(asked)?, String::new());
    let expected =
        format!("needs protocol version {PROTOCOL_VERSION}; {by} not known to speak it: upgrade");
    let named = until(|| match upgrade(&admin, UpgradeCall::Finish) {
        Ok(view) => panic!("nobody held it back: {view:?}"),
        Err(error) => {
            last = error.to_string();
            Ok(last.contains(&expected).then_some(()))
        }
    });
    named.with_context(|| format!("{expected:?} is not in {last:?}"))
}

/// Completes the upgrade, as soon as the coordinators have heard each other.
fn complete(cluster: &Cluster, asked: usize) -> Result<UpgradeView> {
    let admin = cluster.admin(asked)?;
    until(|| upgrade(&admin, UpgradeCall::Finish).map(Some))
}

fn worker_of(view: &ClusterView, index: usize) -> Option<&shoal_protocol::admin::WorkerView> {
    let id = NodeId::worker(u32::try_from(index).ok()? + 1);
    view.workers.iter().find(|worker| worker.id == id)
}

/// As the guide says: drain, stop, start the other build on the same folder, undrain.
fn upgrade_worker(cluster: &mut Cluster, index: usize, asked: usize) -> Result<()> {
    let node = NodeId::worker(u32::try_from(index)? + 1);
    let drain = |draining| AdminCall::Drain { node, draining, dry_run: false };
    let admin = cluster.admin(asked)?;
    admin.call(drain(true))?;
    admin.wait_until("drained", WITHIN, |view| {
        worker_of(view, index).is_some_and(|worker| worker.shards.is_empty())
            && view.plan.replicas.iter().all(|replica| replica.nodes().all(|n| n != node))
    })?;
    cluster.stop_worker(index)?;
    cluster.restart_worker(index)?;
    admin.wait_until("back", WITHIN, |view| {
        worker_of(view, index).is_some_and(|worker| worker.connected)
    })?;
    admin.call(drain(false))?;
    settled(&admin)
}

/// As the guide says: clients use the others, SIGTERM, start the other build on the same folder.
fn upgrade_coordinator(
    cluster: &mut Cluster,
    index: usize,
    load: &Load,
    copy: Option<&Path>,
) -> Result<()> {
    let others: Vec<usize> = (0..3).filter(|other| *other != index).collect();
    load.use_only(urls(cluster, others.clone()));
    cluster.stop_coordinator(index)?;
    if let Some(copy) = copy {
        copy_folder(cluster.coordinator_data(index), copy)?;
    }
    cluster.restart_coordinator(index)?;
    let id = NodeId::coordinator(u32::try_from(index)? + 1);
    for seen_by in 0..3 {
        let admin = cluster.admin(seen_by)?;
        admin.wait_until("all vote", WITHIN, |view| {
            view.coordinators.iter().filter(|peer| peer.vote == Vote::Voter).count() == 3
                && view.coordinators.iter().any(|peer| peer.leads)
        })?;
    }
    let admin = cluster.admin(index)?;
    admin.wait_for_phase("slow", DeploymentPhase::Ready, WITHIN)?;
    admin.wait_until("all connected", WITHIN, |view| {
        view.coordinator.id == id && view.workers.iter().all(|worker| worker.connected)
    })?;
    load.use_only(urls(cluster, 0..3));
    Ok(())
}

fn settled(admin: &Admin) -> Result<()> {
    let settled = |view: &ClusterView| view.deployments.iter().all(|d| d.is_settled());
    admin.wait_until("settled", WITHIN, settled).map(drop)
}

/// Starts the older build with these arguments and waits for its end, which it explains.
fn ends_with_words(older: &Path, args: &[&str], words: &str) -> Result<()> {
    let finished: Finished = Process::shoal_at(older, args)?.finish(REFUSED_WITHIN)?;
    ensure!(finished.code() != Some(0), "it was not refused: {finished:?}");
    let said = format!("{}{}", finished.stdout, finished.stderr);
    ensure!(said.contains(words), "{words:?} is not in {said}");
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

#[test]
fn a_cluster_is_upgraded_node_by_node_under_load_and_no_request_fails() -> Result<()> {
    let Some(older) = older()? else { return Ok(()) };
    let mut cluster = Cluster::start_with(&older, 3, 4)?;
    cluster.admin(0)?.deploy("slow", ModelSource::Pretend(SLOW), 2)?;
    for index in 0..3 {
        cluster.admin(index)?.wait_for_phase("slow", DeploymentPhase::Ready, START_TIMEOUT)?;
    }
    let load = Load::start(urls(&cluster, 0..3))?;
    cluster.use_binary(shoal());

    // Workers first, but one: newer workers, older coordinators.
    let leader = cluster.leader(0)?;
    for index in 0..3 {
        upgrade_worker(&mut cluster, index, leader)?;
    }
    let before = load.asked();
    // Coordinators, the one that leads last: newer followers, an older leader.
    let followers: Vec<usize> = (0..3).filter(|index| *index != leader).collect();
    for index in followers.iter().copied() {
        upgrade_coordinator(&mut cluster, index, &load, None)?;
    }
    held_back(&cluster, followers[0], &format!("c{} and w4 are", leader + 1))?;
    // Its folder as the older build left it, for later.
    let copy = tempfile::tempdir()?;
    upgrade_coordinator(&mut cluster, leader, &load, Some(copy.path()))?;

    // Newer coordinators, one older worker, which alone holds back what is new.
    let asked = followers[0];
    let admin = cluster.admin(asked)?;
    held_back(&cluster, asked, "w4 is")?;
    let agreed = |view: UpgradeView| (view.log == PROTOCOL_VERSION).then_some(view);
    let view = until(|| upgrade(&admin, UpgradeCall::Status).map(agreed))?;
    ensure!((view.lowest, view.workers) == (1, 1), "{view:?}");
    upgrade_worker(&mut cluster, 3, asked)?;
    let view = complete(&cluster, asked)?;
    let newest = PROTOCOL_VERSION;
    ensure!((view.lowest, view.workers, view.log) == (newest, newest, newest), "{view:?}");
    ensure!(view.nodes.iter().all(|node| node.protocol == Some(newest)), "{view:?}");
    ensure!(load.asked() > before + 3, "no load while it was mixed");
    let asked = load.stop()?;
    eprintln!("{asked} requests");
    refused_everywhere(&mut cluster, &older, leader, copy.path())
}

/// Whoever goes back to the older build now is refused, and says why.
fn refused_everywhere(
    cluster: &mut Cluster,
    older: &Path,
    index: usize,
    before: &Path,
) -> Result<()> {
    let other = (index + 1) % 3;
    let join = cluster.cluster_address(other).to_owned();
    // A coordinator on its own folder cannot read what was decided since.
    cluster.stop_coordinator(index)?;
    let data = cluster.coordinator_data(index).to_string_lossy().into_owned();
    let at = cluster.cluster_address(index).to_owned();
    let args = |data| ["coordinator", "--data", data, "--listen", "127.0.0.1:0", "--cluster", &at];
    ends_with_words(older, &args(&data), "upgrade it")?;
    // On its folder of before it could, and is fed nothing: the others do not take part with it.
    let before = before.to_string_lossy();
    let needs = PROTOCOL_VERSION;
    let words = format!("what was decided since all coordinators were upgraded needs {needs}");
    ends_with_words(older, &args(&before), &words)?;
    cluster.restart_coordinator(index)?;
    // One that comes with an empty folder gets no identity.
    let token = cluster.token_from(other, Role::Coordinator, 1)?;
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("c9").to_string_lossy().into_owned();
    let args = ["coordinator", "--data", &data, "--listen", "127.0.0.1:0", "--cluster"];
    let args = [&args[..], &["127.0.0.1:0", "--join", &join, "--token", &token]].concat();
    ends_with_words(older, &args, &format!("this cluster needs {needs}"))?;
    // A worker on its own folder is not let in, and says so; the newer build is.
    cluster.stop_worker(3)?;
    let data = cluster.worker_data(3).to_string_lossy().into_owned();
    let args = ["worker", "--join", &join, "--data", &data, "--memory", "256MiB"];
    let mut worker = Process::shoal_at(older, args)?;
    let words = format!("w4 speaks protocol versions up to 1, and this cluster needs {needs}");
    worker.wait_for_words(&words, WITHIN)?;
    drop(worker);
    cluster.restart_worker(3)?;
    let back = |view: &ClusterView| worker_of(view, 3).is_some_and(|worker| worker.connected);
    cluster.admin(other)?.wait_until("back", WITHIN, back).map(drop)
}

#[test]
fn builds_lead_and_follow_each_other_and_take_each_others_snapshots() -> Result<()> {
    let Some(older) = older()? else { return Ok(()) };
    // The older build leads; a newer one begins with its snapshot.
    let mut cluster = Cluster::start_with(&older, 1, 2)?;
    cluster.admin(0)?.deploy("slow", ModelSource::Pretend(SLOW), 2)?;
    let expected = finish(begin(&Api::new(&cluster.api(0), "slow"), 0)?)?;
    cluster.use_binary(shoal());
    let newer = cluster.join_coordinator(0)?;
    cluster.use_binary(&older);
    let other = cluster.join_coordinator(0)?;
    let add = vec![NodeId::coordinator(2), NodeId::coordinator(3)];
    cluster.admin(0)?.call(AdminCall::ChangeVoters { add, remove: Vec::new() })?;
    serves(&cluster, newer, &expected)?;
    serves(&cluster, other, &expected)?;

    lead(&mut cluster, newer)?;
    for index in [0, newer, other] {
        serves(&cluster, index, &expected)?;
        // A change through an older one is forwarded to the newer leader, and read by all.
        cluster.token_from(index, Role::Worker, 1)?;
    }
    // An older one that comes now begins with the newer one's snapshot.
    let late = cluster.join_coordinator(newer)?;
    serves(&cluster, late, &expected)?;
    ensure!(cluster.leader(newer)? == newer, "it does not lead any more");
    held_back(&cluster, newer, "c1, c3, c4, w1 and w2 are")?;
    each_builds_cli_asks_the_other(&cluster, &older, (0, newer))
}

/// An operator's machine is upgraded before the cluster, or after it.
fn each_builds_cli_asks_the_other(
    cluster: &Cluster,
    older: &Path,
    (at_older, at_newer): (usize, usize),
) -> Result<()> {
    let ask = |binary: &Path, at: usize, verb: [&str; 2]| -> Result<String> {
        let context = cluster.context(at).to_string_lossy().into_owned();
        let args = verb.into_iter().chain(["--context", &context]);
        Ok(Process::shoal_at(binary, args)?.finish(WITHIN)?.expect_code(0).stdout)
    };
    let list = ["coordinators", "list"];
    // The older one does not say who is there, and the newer one of both builds.
    let said = ask(shoal(), at_older, list)?;
    ensure!(said.contains("LINK") && !said.contains(" up"), "{said}");
    let said = ask(shoal(), at_newer, list)?;
    ensure!(said.lines().filter(|line| line.ends_with(" up")).count() == 4, "{said}");
    let said = ask(older, at_newer, list)?;
    ensure!(said.contains("votes") && !said.contains("LINK"), "{said}");
    let said = ask(older, at_newer, ["nodes", "list"])?;
    ensure!(said.lines().any(|line| line.starts_with("c1 ") && line.contains(" up ")), "{said}");
    Ok(())
}

/// Makes one of three lead: a leader that stops hands over to the only one that is there, and that has
/// the longest log when the third one is back.
fn lead(cluster: &mut Cluster, index: usize) -> Result<()> {
    for _ in 0..4 {
        let leader = cluster.leader(index)?;
        if leader == index {
            return Ok(());
        }
        let third = (0..3).find(|i| ![leader, index].contains(i)).context("a third one")?;
        cluster.stop_coordinator(third)?;
        cluster.stop_coordinator(leader)?;
        cluster.restart_coordinator(third)?;
        cluster.restart_coordinator(leader)?;
    }
    bail!("c{} does not come to lead", index + 1)
}

fn serves(cluster: &Cluster, index: usize, expected: &[u64]) -> Result<()> {
    // One that has just joined is told where the workers are to go; they come to it.
    let api = Api::new(&cluster.api(index), "slow");
    until(|| Ok((api.get("/ready")?.status == 200).then_some(())))
        .with_context(|| format!("c{} is ready", index + 1))?;
    ensure!(finish(begin(&api, 0)?)? == expected, "c{} has other tokens", index + 1);
    Ok(())
}
