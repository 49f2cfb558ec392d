//! Layouts that change while they serve: no request fails, and no token differs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView, DeploymentPhase};
use shoal_protocol::id::{DeploymentName, NodeId};
use shoal_protocol::plan::{ModelSource, PretendSpec, StagesAsked};
use shoal_tests::api::{Api, Event};
use shoal_tests::proc::{Admin, Up, UpOptions};
use shoal_tests::slow::SLOW;

/// How long a small cluster may take to make a layout.
const MOVE_TIMEOUT: Duration = Duration::from_secs(25);

/// A stream takes about a second: less than a layout that retires waits for it.
const TOKENS: u32 = 150;

/// Such a stream takes twelve seconds: more than a layout that retires waits for it.
const TOKENS_LONG: u32 = 2000;

/// Streams at once.
const CLIENTS: u32 = 4;

fn ask(api: &Api, client: u32) -> Result<Vec<u64>> {
    ask_for(api, client, TOKENS)
}

fn ask_for(api: &Api, client: u32, tokens: u32) -> Result<Vec<u64>> {
    let prompt: Vec<u32> = (10 + client..30 + client).collect();
    let options = json!({"max_tokens": tokens, "ignore_eos": true, "return_token_ids": true});
    let (chunks, end) = api.stream(prompt, options)?.rest()?;
    if end != Event::Done {
        bail!("after {} chunks: {end:?}", chunks.len());
    }
    let ids = |chunk: &Value| chunk["choices"][0]["token_ids"].as_array().cloned();
    let ids = chunks.iter().filter_map(ids).flatten().filter_map(|id| id.as_u64());
    Ok(ids.collect())
}

/// Clients that ask over and over, each its own question, and compare what comes.
struct Load {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    fn start(api: &Api) -> Result<Self> {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut clients = Vec::new();
        for client in 0..CLIENTS {
            let expected = ask(api, client).context("undisturbed")?;
            assert_eq!(expected.len(), TOKENS as usize);
            let (api, stop, asked) = (api.clone(), Arc::clone(&stop), Arc::clone(&asked));
            clients.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let n = asked.fetch_add(1, Ordering::Relaxed);
                    let found = ask(&api, client).with_context(|| format!("request {n}"))?;
                    assert_eq!(found, expected, "request {n} of client {client}");
                }
                Ok(())
            }));
        }
        Ok(Self { stop, asked, clients })
    }

    /// Every request that was begun has succeeded; how many there were.
    fn stop(self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().map_err(|_| anyhow::anyhow!("a client saw other tokens"))??;
        }
        Ok(self.asked.load(Ordering::Relaxed))
    }
}

/// The workers of a deployment, a list for each replica.
fn places(view: &ClusterView, name: &str) -> Vec<Vec<NodeId>> {
    let replicas = view.plan.replicas.iter().filter(|r| r.deployment.as_str() == name);
    replicas.map(|replica| replica.nodes().collect()).collect()
}

fn settled(
    admin: &Admin,
    name: &str,
    is_it: impl Fn(&[Vec<NodeId>]) -> bool,
) -> Result<ClusterView> {
    admin.wait_until("settled", MOVE_TIMEOUT, |view| {
        let deployment = view.deployments.iter().find(|d| d.name.as_str() == name);
        deployment.is_some_and(|d| d.is_settled()) && is_it(&places(view, name))
    })
}

/// A cluster without the built-in model, which would share its workers.
fn up(workers: u32, memory: &str) -> Result<(Up, Admin)> {
    let up =
        Up::start(&UpOptions::flags(&format!("--workers {workers} --worker-memory {memory}")))?;
    up.verb(&["undeploy", "demo"])?.expect_code(0);
    let admin = up.admin()?;
    Ok((up, admin))
}

fn slow(admin: &Admin, stages: u32) -> Result<()> {
    admin.deploy("slow", ModelSource::Pretend(SLOW), stages)?;
    Ok(())
}

#[test]
fn no_request_fails_while_a_deployment_is_scaled_up_and_down() -> Result<()> {
    let (up, admin) = up(4, "600MiB")?;
    slow(&admin, 2)?;
    let api = Api::new(up.url(), "slow");
    let expected = ask(&api, 0)?;
    let load = Load::start(&api)?;
    up.verb(&["scale", "slow", "--replicas", "2"])?.expect_code(0);
    settled(
        &admin,
        "slow",
        |places| matches!(places, [a, b] if a.iter().all(|node| !b.contains(node))),
    )?;
    // Moves take a tenth of a second: each is given some streams of its own.
    assert_eq!(ask(&api, 0)?, expected);
    up.verb(&["scale", "slow", "--stages", "3"])?.expect_code(0);
    settled(&admin, "slow", |places| places.len() == 2 && places.iter().all(|p| p.len() == 3))?;
    assert_eq!(ask(&api, 0)?, expected);
    up.verb(&["scale", "slow", "--replicas", "1", "--stages", "auto"])?.expect_code(0);
    let view = settled(&admin, "slow", |places| matches!(places, [only] if only.len() == 4))?;
    assert_eq!(view.deployments[0].phase, DeploymentPhase::Ready);
    assert_eq!(ask(&api, 0)?, expected);
    assert!(load.stop()? > 10);
    up.stop(&[])?;
    Ok(())
}

#[test]
fn several_workers_are_drained_in_one_command_and_none_where_a_name_is_unknown() -> Result<()> {
    let (up, admin) = up(3, "600MiB")?;
    slow(&admin, 1)?;
    let draining = |wanted: &[&str]| {
        let marked = |view: &ClusterView| -> Vec<String> {
            let marked = view.workers.iter().filter(|worker| worker.draining);
            marked.map(|worker| worker.id.to_string()).collect()
        };
        admin.wait_until("marked", MOVE_TIMEOUT, |view| marked(view) == wanted)
    };
    let holds = |view: &ClusterView| places(view, "slow")[0][0].to_string();
    let view = settled(&admin, "slow", |places| places.len() == 1)?;
    let (all, holder) = (["w1", "w2", "w3"], holds(&view));
    let refused = up.verb(&["drain", &holder, "w9"])?.expect_code(3).stderr;
    assert!(refused.contains("w9") && !refused.contains("nothing new"), "{refused}");
    draining(&[])?;

    let stays = all.into_iter().rfind(|name| *name != holder).context("a third")?;
    let go: Vec<&str> = all.into_iter().filter(|name| *name != stays).collect();
    let drained = up.verb(&[&["drain", "--wait"], &go[..]].concat())?.expect_code(0).stderr;
    for name in &go {
        let words = format!("{name}: it holds nothing; it can be stopped");
        assert!(drained.contains(&words), "{words:?} is not in {drained}");
    }
    assert_eq!(holds(&draining(&go)?), stays);
    up.verb(&[&["undrain"], &go[..]].concat())?.expect_code(0);
    draining(&[])?;

    // Nobody is left for what the last of them holds; with the other two it works all the same.
    let drained = up.verb(&[&["drain", "--wait"], &all[..]].concat())?.expect_code(1).stderr;
    let words = format!("1 of 3 are not drained: {stays}; above it is said why");
    assert!(drained.contains(&words), "{words:?} is not in {drained}");
    for name in go {
        assert!(drained.contains(&format!("{name}: it holds nothing")), "{drained}");
    }
    draining(&all)?;
    up.stop(&[])?;
    Ok(())
}

#[test]
fn no_request_fails_while_a_worker_is_drained() -> Result<()> {
    let (up, admin) = up(3, "600MiB")?;
    slow(&admin, 2)?;
    let load = Load::start(&Api::new(up.url(), "slow"))?;
    // Each stage in turn: the head's worker, and one behind it.
    for stage in [0, 1, 0] {
        let view = settled(&admin, "slow", |places| places.len() == 1)?;
        let node = places(&view, "slow")[0][stage];
        let shown = up.verb(&["drain", &node.to_string(), "--dry-run"])?.expect_code(0);
        for words in ["before  r", "after   r", "weights to read in all", "assumed"] {
            // What was measured meanwhile is not assumed any more.
            let known = words == "assumed" && shown.stdout.contains("measured");
            assert!(known || shown.stdout.contains(words), "{words:?}: {}", shown.stdout);
        }
        let number = node.number;
        up.verb(&["drain", &format!("worker-{number}"), "--wait"])?.expect_code(0);
        let view = settled(&admin, "slow", |places| !places[0].contains(&node))?;
        let worker = view.workers.iter().find(|w| w.id == node).context("it is there")?;
        assert!(worker.draining && worker.shards.is_empty(), "{worker:?}");
        let status = up.verb(&["status"])?.expect_code(0);
        assert!(status.stdout.contains("draining"), "{}", status.stdout);
        up.verb(&["undrain", &node.to_string()])?.expect_code(0);
    }
    up.verb(&["rollout", "status", "slow", "--timeout", "20s"])?.expect_code(0);
    assert!(load.stop()? > 10);
    up.stop(&[])?;
    Ok(())
}

#[test]
fn a_stream_that_outlasts_its_layout_goes_on_at_the_next_one() -> Result<()> {
    let (up, admin) = up(3, "600MiB")?;
    slow(&admin, 2)?;
    let api = Api::new(up.url(), "slow");
    let view = settled(&admin, "slow", |places| places.len() == 1)?;
    let (head, before) = (places(&view, "slow")[0][0], resumed(&api)?);
    let clients: Vec<_> = (0..2)
        .map(|client| {
            let api = api.clone();
            std::thread::spawn(move || ask_for(&api, client, TOKENS_LONG))
        })
        .collect();
    admin.wait_until("both run", MOVE_TIMEOUT, |view| {
        let heads = view.workers.iter().flat_map(|worker| &worker.heads);
        heads.map(|head| head.running).sum::<u32>() == 2
    })?;
    let drained =
        up.verb(&["drain", &head.to_string(), "--wait", "--timeout", "20s"])?.expect_code(0);
    assert!(resumed(&api)? >= before + 2.0, "they ended before: {}", drained.stdout);
    for (client, stream) in (0..).zip(clients) {
        let found = stream.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        // Only now, so that both begin as the only ones.
        assert_eq!(found, ask_for(&api, client, TOKENS_LONG)?, "client {client}");
    }
    up.stop(&[])?;
    Ok(())
}

/// Attempts that took an answer on, so far.
fn resumed(api: &Api) -> Result<f64> {
    let text = api.get("/metrics")?.body;
    let lines = text.as_str().context("a text")?.lines();
    let of = lines.filter(|line| line.starts_with("shoal_resumed_attempts_total{"));
    Ok(of.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

#[test]
fn what_cannot_be_moved_stays_and_says_why() -> Result<()> {
    let (up, admin) = up(2, "600MiB")?;
    slow(&admin, 2)?;
    // It waits neither for the time-out nor for ever.
    let since = Instant::now();
    let drained = up.verb(&["drain", "w1", "--wait", "--timeout", "10m"])?.expect_code(1);
    let waited = since.elapsed();
    assert!(waited < Duration::from_secs(30), "{waited:?}");
    for words in [
        "cannot leave w1: a drain needs a place",
        "2 stages were asked for, but 1 workers",
        "with fewer stages it would fit: `shoal scale slow --stages auto`, or start another worker",
        "waiting does not help",
    ] {
        assert!(drained.stderr.contains(words), "{words:?} is not in {}", drained.stderr);
    }
    let rollout = up.verb(&["rollout", "status", "slow", "--timeout", "1s"])?.expect_code(1);
    assert!(rollout.stderr.contains("0 of 1 replicas"), "{}", rollout.stderr);
    assert_eq!(ask(&Api::new(up.url(), "slow"), 1)?.len(), TOKENS as usize, "it serves");
    up.verb(&["undrain", "w1"])?.expect_code(0);
    up.verb(&["rollout", "status", "slow", "--timeout", "10s"])?.expect_code(0);
    let refused = up.verb(&["scale", "slow", "--stages", "5"])?.expect_code(3);
    assert!(refused.stderr.contains("2 workers are connected"), "{}", refused.stderr);
    up.stop(&[])?;
    Ok(())
}

/// Else whoever waits for it takes the layout of before, which is as was asked for before, for it.
#[test]
fn what_is_shown_after_an_acceptance_is_as_new_as_it() -> Result<()> {
    let (up, admin) = up(3, "600MiB")?;
    slow(&admin, 3)?;
    let asked = || -> Result<u64> {
        match admin.call(AdminCall::Status)? {
            AdminReply::Status(view) => Ok(view.deployments[0].asked),
            other => bail!("{other:?} where a view was expected"),
        }
    };
    for stages in [2, 3, 2, 1, 3] {
        let before = asked()?;
        let name = DeploymentName::new("slow")?;
        let stages = StagesAsked::Exactly(stages);
        admin.call(AdminCall::Scale { name, replicas: None, stages, dry_run: false })?;
        assert_eq!(asked()?, before + 1);
    }
    // One change after the other, of which nobody waits for the first.
    up.verb(&["scale", "slow", "--stages", "2", "--no-wait"])?.expect_code(0);
    let scaled = up.verb(&["scale", "slow", "--stages", "1"])?.expect_code(0);
    assert!(scaled.stderr.contains("as was asked for"), "{}", scaled.stderr);
    // One line for each stage.
    assert!(
        scaled.stdout.contains("\n0.0 ") && !scaled.stdout.contains("\n1.0 "),
        "{}",
        scaled.stdout
    );
    up.stop(&[])?;
    Ok(())
}

#[test]
fn two_deployments_live_side_by_side_and_leave_each_other_alone() -> Result<()> {
    let (up, admin) = up(3, "600MiB")?;
    slow(&admin, 3)?;
    let generation = |view: &ClusterView| {
        let mut replicas = view.plan.replicas.iter();
        replicas.find(|r| r.deployment.as_str() == "slow").map(|r| r.generation)
    };
    let before = generation(&settled(&admin, "slow", |_| true)?);
    let load = Load::start(&Api::new(up.url(), "slow"))?;
    let other = PretendSpec { seed: 9, ..SLOW };
    let call = AdminCall::Deploy {
        name: DeploymentName::new("other")?,
        source: ModelSource::Pretend(other),
        stages: None,
        precision: None,
        replicas: 2,
    };
    admin.call(call)?;
    let view = settled(&admin, "other", |places| places.len() == 2)?;
    assert_eq!(generation(&view), before);
    assert_ne!(ask(&Api::new(up.url(), "other"), 0)?, ask(&Api::new(up.url(), "slow"), 0)?);
    up.verb(&["undeploy", "other"])?.expect_code(0);
    let view = settled(&admin, "slow", |_| true)?;
    assert_eq!(generation(&view), before);
    load.stop()?;
    up.stop(&[])?;
    Ok(())
}
