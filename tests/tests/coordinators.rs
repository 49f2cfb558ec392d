//! Three coordinators and real workers: any of them serves, and the loss of one is nobody else's.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use shoal_protocol::admin::{AdminCall, DeploymentPhase};
use shoal_protocol::id::Role;
use shoal_protocol::plan::{ModelSource, PretendSpec};
use shoal_protocol::presence::PresenceView;
use shoal_tests::api::{Api, Event, Stream};
use shoal_tests::proc::cluster::START_TIMEOUT;
use shoal_tests::proc::{Cluster, Finished, Process, Signal};

/// 2 ms a token over two stages: a stream of 400 tokens outlasts an election.
const MODEL: PretendSpec = PretendSpec {
    layers: 4,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 11,
    layer_step_ns: 500_000,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

const TOKENS: u64 = 400;

fn prompt() -> Value {
    (10..40).collect::<Vec<u32>>().into()
}

fn options() -> Value {
    json!({"max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true, "seed": 4,
           "temperature": 0.8})
}

fn serve(cluster: &Cluster) -> Result<()> {
    cluster.admin(0)?.deploy("pretend", ModelSource::Pretend(MODEL), 2)?;
    ready_everywhere(cluster, 3)
}

fn ready_everywhere(cluster: &Cluster, coordinators: usize) -> Result<()> {
    for index in 0..coordinators {
        let admin = cluster.admin(index)?;
        admin.wait_for_phase("pretend", DeploymentPhase::Ready, START_TIMEOUT)?;
    }
    Ok(())
}

fn api(cluster: &Cluster, index: usize) -> Api {
    Api::new(&cluster.api(index), "pretend")
}

/// A whole answer, as one coordinator gives it.
fn tokens(cluster: &Cluster, index: usize) -> Result<Vec<u64>> {
    Ok(api(cluster, index).complete(prompt(), options())?.ok()?.token_ids())
}

/// The token ids of a stream's next event that has any; `None` at its end.
fn next_tokens(stream: &mut Stream) -> Result<Option<Vec<u64>>> {
    loop {
        let chunk = match stream.event()? {
            Event::Chunk(chunk) => chunk,
            Event::Done => return Ok(None),
            other => anyhow::bail!("{other:?} where tokens were expected"),
        };
        let ids = chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default();
        if !ids.is_empty() {
            return Ok(Some(ids.iter().filter_map(Value::as_u64).collect()));
        }
    }
}

/// Waits until a coordinator hears the others just so.
fn until_heard(cluster: &Cluster, by: usize, up: [bool; 3]) -> Result<PresenceView> {
    let is_so = |view: &PresenceView| view.coordinators.iter().map(|heard| heard.up).eq(up);
    cluster.admin(by)?.wait_until_heard(START_TIMEOUT, is_so)
}

/// What the CLI prints at a coordinator.
fn verb(cluster: &Cluster, at: usize, args: &[&str]) -> Result<Finished> {
    let context = cluster.context(at).to_string_lossy().into_owned();
    let args = args.iter().copied().chain(["--context", &context]);
    Process::shoal(args)?.finish(START_TIMEOUT)
}

/// Whether a table has a row that begins and ends with these words.
fn has_row(table: &str, begins: &str, ends: &str) -> bool {
    table.lines().any(|line| line.starts_with(begins) && line.contains(ends))
}

#[test]
fn a_dead_coordinator_is_seen_by_each_that_lives_also_by_those_that_do_not_talk_to_it() -> Result<()>
{
    let mut cluster = Cluster::start(3, 0)?;
    // Followers, of which each hears the leader alone unless it looks.
    let leader = cluster.leader(0)?;
    let (dead, other) = ((leader + 1) % 3, (leader + 2) % 3);
    for by in 0..3 {
        until_heard(&cluster, by, [true; 3])?;
    }
    cluster.signal_coordinator(dead, Signal::KILL)?;
    let mut up = [true; 3];
    up[dead] = false;
    let name = format!("c{} ", dead + 1);
    for by in [leader, other] {
        let view = until_heard(&cluster, by, up)?;
        assert_eq!(view.no_majority, None, "two of three");
        let list = verb(&cluster, by, &["coordinators", "list"])?.expect_code(0).stdout;
        assert!(has_row(&list, &name, "silent for"), "{list}");
        assert!(has_row(&list, &format!("c{} ", by + 1), " up"), "{list}");
        let status = verb(&cluster, by, &["status"])?.expect_code(0).stdout;
        assert!(has_row(&status, &name, "silent for"), "{status}");
        let nodes = verb(&cluster, by, &["nodes", "list"])?.expect_code(0).stdout;
        assert!(has_row(&nodes, &name, " down "), "{nodes}");
        let metrics = Api::new(&cluster.api(by), "").get("/metrics")?.body;
        let line = format!("shoal_coordinator_up{{coordinator=\"c{}\"}} 0", dead + 1);
        assert!(metrics.as_str().is_some_and(|text| text.contains(&line)), "no {line}");
    }
    // What is refused is told, and nothing of what has not happened.
    let removed = verb(&cluster, leader, &["coordinators", "remove", name.trim()])?.expect_code(3);
    let lines: Vec<_> = removed.stderr.lines().collect();
    assert!(lines.len() == 1 && lines[0].ends_with("add NEW --replace OLD`)"), "{lines:?}");
    cluster.restart_coordinator(dead)?;
    for by in 0..3 {
        until_heard(&cluster, by, [true; 3])?;
    }
    Ok(())
}

#[test]
fn a_stream_through_another_coordinator_does_not_notice_the_leaders_death() -> Result<()> {
    let mut cluster = Cluster::start(3, 2)?;
    serve(&cluster)?;
    let expected = tokens(&cluster, 0)?;
    for index in 1..3 {
        assert_eq!(tokens(&cluster, index)?, expected, "each serves the same");
    }
    let leader = cluster.leader(0)?;
    let other = (leader + 1) % 3;
    let mut stream = api(&cluster, other).stream(prompt(), options())?;
    let mut found = Vec::new();
    let (mut longest, mut last) = (Duration::ZERO, Instant::now());
    let mut killed = false;
    while let Some(ids) = next_tokens(&mut stream)? {
        longest = longest.max(last.elapsed());
        found.extend(ids);
        if found.len() > 50 && !killed {
            cluster.signal_coordinator(leader, Signal::KILL)?;
            killed = true;
        }
        last = Instant::now();
    }
    assert!(killed);
    assert_eq!(found, expected);
    // An election takes 200 ms and more; a stream that waited for one would show it.
    eprintln!("the longest gap was {longest:?}");
    let next = cluster.leader(other)?;
    assert_ne!(next, leader);
    // Changes go on too, and the one that was killed finds everything again.
    cluster.admin(other)?.call(AdminCall::CreateToken {
        role: Role::Worker,
        uses: 1,
        expires_s: 60,
    })?;
    cluster.restart_coordinator(leader)?;
    ready_everywhere(&cluster, 3)?;
    assert_eq!(tokens(&cluster, leader)?, expected);
    Ok(())
}

#[test]
fn without_a_majority_changes_wait_and_inference_does_not() -> Result<()> {
    let mut cluster = Cluster::start(3, 2)?;
    serve(&cluster)?;
    let expected = tokens(&cluster, 2)?;
    cluster.signal_coordinator(0, Signal::KILL)?;
    cluster.signal_coordinator(1, Signal::STOP)?;
    for _ in 0..2 {
        assert_eq!(tokens(&cluster, 2)?, expected);
    }
    let call = AdminCall::CreateToken { role: Role::Worker, uses: 1, expires_s: 60 };
    let refused = cluster.admin(2)?.call(call.clone()).unwrap_err().to_string();
    assert!(refused.contains("the change was not stored within"), "{refused}");
    // Whoever waited hears for whom, and how long they have been silent.
    let missing = "no majority of the coordinators: not heard are c1 for ";
    for words in [missing, " s and c2 for ", "a change needs 2 of the 3 that vote"] {
        assert!(refused.contains(words), "{words:?} is not in {refused}");
    }
    let status = verb(&cluster, 2, &["status"])?.expect_code(0).stdout;
    assert!(status.contains(missing), "{status}");
    let keys = verb(&cluster, 2, &["keys", "list"])?.expect_code(1).stderr;
    // And was told meanwhile that it waits.
    for words in [missing, "could not be read", "waiting for the coordinators to agree …"] {
        assert!(keys.contains(words), "{words:?} is not in {keys}");
    }
    // What it last knew it shows at once, and says that it is that.
    let listed = verb(&cluster, 2, &["nodes", "list"])?.expect_code(0);
    let as_of = ["\n  as of 20", "Z: nothing newer is known here: ", missing];
    for words in ["\nc3 ", " up ", "\nw1 "].into_iter().chain(as_of) {
        assert!(listed.stdout.contains(words), "{words:?} is not in {}", listed.stdout);
    }
    assert!(!listed.stderr.contains("waiting"), "{}", listed.stderr);
    let listed = verb(&cluster, 2, &["nodes", "list", "--json"])?.expect_code(0).stdout;
    let listed: Value = serde_json::from_str(&listed)?;
    assert!(listed["no_majority"].as_str().is_some_and(|why| why.starts_with(missing)));
    assert!(listed["as_of_s"].is_u64() && listed["nodes"].as_array().is_some_and(|n| n.len() > 5));
    assert_eq!(tokens(&cluster, 2)?, expected);
    cluster.signal_coordinator(1, Signal::CONT)?;
    cluster.leader(2)?;
    cluster.admin(2)?.call(call)?;
    Ok(())
}

#[test]
fn a_worker_dies_while_another_leads_than_its_streams_coordinator() -> Result<()> {
    let mut cluster = Cluster::start(3, 3)?;
    serve(&cluster)?;
    let expected = tokens(&cluster, 0)?;
    let leader = cluster.leader(0)?;
    let other = (leader + 2) % 3;
    let view = cluster.admin(other)?.wait_until("there", START_TIMEOUT, |_| true)?;
    let last = view.plan.replicas[0].nodes().last().expect("a worker").number as usize - 1;
    let mut stream = api(&cluster, other).stream(prompt(), options())?;
    let mut found = Vec::new();
    while let Some(ids) = next_tokens(&mut stream)? {
        found.extend(ids);
        if found.len() > 50 && cluster.worker_runs(last) {
            cluster.signal_worker(last, Signal::KILL)?;
        }
    }
    assert!(!cluster.worker_runs(last));
    assert_eq!(found, expected);
    Ok(())
}

#[test]
fn the_last_of_three_goes_on_alone_and_the_lost_ones_are_refused_by_name() -> Result<()> {
    let mut cluster = Cluster::start(3, 2)?;
    serve(&cluster)?;
    let expected = tokens(&cluster, 2)?;
    let data = cluster.coordinator_data(2).to_string_lossy().into_owned();
    let verb = |more: &[&str]| -> Result<_> {
        let verb = ["coordinators", "recover-alone", "--data", &data];
        Process::shoal(verb.into_iter().chain(more.iter().copied()))?.finish(START_TIMEOUT)
    };
    let running = verb(&[])?.expect_code(1);
    assert!(running.stderr.contains("uses the data folder"), "{}", running.stderr);
    for index in 0..2 {
        cluster.signal_coordinator(index, Signal::KILL)?;
    }
    cluster.signal_coordinator(2, Signal::KILL)?;
    // It says what it would do, and what to say.
    let asked = verb(&[])?.expect_code(3);
    for words in ["2 workers, 1 deployments", "lost FOR EVER", "--give-up c1,c2"] {
        assert!(asked.stderr.contains(words), "{words:?} is not in {}", asked.stderr);
    }
    let one = verb(&["--give-up", "c1"])?.expect_code(3);
    assert!(one.stderr.contains("c1,c2 would be given up, and c1 was said"), "{}", one.stderr);
    let done = verb(&["--give-up", "c1,c2"])?.expect_code(0);
    for words in ["c3 votes alone from now on", "state.redb.before-epoch-"] {
        assert!(done.stderr.contains(words), "{words:?} is not in {}", done.stderr);
    }
    cluster.restart_coordinator(2)?;
    // Its workers obey it, and what was served is served: without a further word from anybody.
    cluster.admin(2)?.wait_for_phase("pretend", DeploymentPhase::Ready, START_TIMEOUT)?;
    assert_eq!(tokens(&cluster, 2)?, expected);
    cluster.admin(2)?.call(AdminCall::CreateToken {
        role: Role::Worker,
        uses: 1,
        expires_s: 60,
    })?;
    // A majority of what was comes back, and there is no second cluster.
    for index in 0..2 {
        cluster.restart_coordinator(index)?;
    }
    for index in 0..2 {
        let ended = cluster.finish_coordinator(index)?.expect_code(3);
        let words = format!("c{} was removed from this cluster", index + 1);
        assert!(ended.stderr.contains(&words), "{}", ended.stderr);
    }
    assert_eq!(tokens(&cluster, 2)?, expected);
    let call = AdminCall::Scale {
        name: shoal_protocol::id::DeploymentName::new("pretend")?,
        replicas: Some(1),
        stages: shoal_protocol::plan::StagesAsked::Exactly(1),
        dry_run: false,
    };
    cluster.admin(2)?.call(call)?;
    assert_eq!(tokens(&cluster, 2)?, expected);
    Ok(())
}
