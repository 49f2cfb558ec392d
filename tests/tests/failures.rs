//! What breaks, and what a user sees of it: words and an end, never a hang.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use shoal_protocol::admin::{ClusterView, DeploymentPhase};
use shoal_protocol::plan::ModelSource;
use shoal_tests::api::{Api, Event};
use shoal_tests::model::{RandomLlama, copy, demo};
use shoal_tests::proc::{Process, Signal, Up, UpOptions, signal, wait_until_gone};
use shoal_tests::slow::{SLOW, slow_stream};

/// How long a cluster of three may take to serve again.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn a_client_that_hangs_up_is_cancelled() -> Result<()> {
    let up = Up::start(&UpOptions::default())?;
    let admin = up.admin()?;
    admin.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let running = |view: &ClusterView| -> u32 {
        let slow = view.plan.replicas.iter().find(|r| r.deployment.as_str() == "slow");
        let heads = view.workers.iter().flat_map(|w| &w.heads);
        heads.filter(|h| slow.is_some_and(|s| s.id == h.replica)).map(|h| h.running).sum()
    };
    let mut stream = slow_stream(&Api::new(up.url(), "slow"))?;
    stream.event()?;
    admin.wait_until("running", Duration::from_secs(3), |view| running(view) == 1)?;
    drop(stream);
    admin.wait_until("cancelled", Duration::from_secs(3), |view| running(view) == 0)?;
    up.stop(&[])?;
    Ok(())
}

#[test]
fn a_stop_lets_streams_finish_or_ends_them_with_words() -> Result<()> {
    let mut up = Up::start(&UpOptions::default())?;
    let admin = up.admin()?;
    admin.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let api = Api::new(up.url(), "slow");
    let mut long = slow_stream(&api)?;
    let mut short = api.stream(vec![10, 11], json!({"max_tokens": 200, "ignore_eos": true}))?;
    for stream in [&mut long, &mut short] {
        assert!(matches!(stream.event()?, Event::Chunk(_)));
    }
    up.process().signal(Signal::TERM)?;
    assert_eq!(short.rest()?.1, Event::Done);
    let (_, end) = long.rest()?;
    let Event::Error(error) = end else { panic!("it was not complete: {end:?}") };
    assert_eq!(error["error"]["code"], "draining", "{error}");
    let message = error["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("the cluster is stopping"), "{error}");
    up.ended(&[])?;
    Ok(())
}

#[test]
fn nothing_outlives_a_killed_up() -> Result<()> {
    let up = Up::start(&UpOptions::default())?;
    let (pids, _data) = up.kill()?;
    assert_eq!(pids.len(), 5);
    for pid in pids {
        assert!(wait_until_gone(pid, Duration::from_secs(8))?, "{pid} is still there");
    }
    Ok(())
}

#[test]
fn a_killed_up_is_started_again_on_its_folder_at_once() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 2"))?;
    up.admin()?.deploy("slow", ModelSource::Pretend(SLOW), 2)?;
    // The children drain for as long as this stream may take.
    let mut stream = slow_stream(&Api::new(up.url(), "slow"))?;
    assert!(matches!(stream.event()?, Event::Chunk(_)));
    let (_, data) = up.kill()?;
    let mut again = Up::spawn(&UpOptions::flags("--workers 2"), data.path())?;
    again.wait_for_words("waiting up to", Duration::from_secs(5))?;
    let said = again.wait_for_words("also served", Duration::from_secs(30))?;
    assert!(said.contains("slow") && said.contains("`shoal undeploy slow`"), "{said}");
    let ready: Value = serde_json::from_str(&again.line(Duration::from_secs(60))?)?;
    assert_eq!(ready["model"], "demo");
    again.signal(Signal::TERM)?;
    again.finish(Duration::from_secs(15))?.expect_code(0);
    Ok(())
}

#[test]
fn a_data_folder_is_for_one_process() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 1"))?;
    let folder =
        |child: &str| up.runtime_dir().join("up").join(child).to_string_lossy().into_owned();
    let (worker, coordinator) = (folder("worker-1"), folder("coordinator"));
    let any = "127.0.0.1:0";
    let seconds = [
        (&worker, Process::shoal(["worker", "--join", "127.0.0.1:9", "--data", &worker])?),
        (
            &coordinator,
            Process::shoal([
                "coordinator",
                "--listen",
                any,
                "--cluster",
                any,
                "--data",
                &coordinator,
            ])?,
        ),
    ];
    for (folder, second) in seconds {
        let refused = second.finish(Duration::from_secs(20))?.expect_code(1);
        for words in [folder, "another process (pid ", "stop it", "--data"] {
            assert!(refused.stderr.contains(words), "{words:?} is not in {}", refused.stderr);
        }
    }
    up.stop(&[])?;
    Ok(())
}

#[test]
fn a_worker_is_not_started_again_where_that_is_not_wanted() -> Result<()> {
    let mut up = Up::start(&UpOptions::flags("--workers 2 --no-respawn"))?;
    let worker = up.workers()[1].pid;
    signal(worker, Signal::KILL)?;
    up.process().wait_for_words("--no-respawn", Duration::from_secs(5))?;
    let admin = up.admin()?;
    admin.wait_until("alone", Duration::from_secs(10), |view| {
        view.workers.iter().filter(|w| w.connected).count() == 1
    })?;
    up.stop(&["lost", "w2"])?;
    Ok(())
}

#[test]
fn a_restarted_coordinator_finds_its_deployments() -> Result<()> {
    let mut up = Up::start(&UpOptions::flags("--workers 2"))?;
    up.verb(&["deploy", "--name", "second", "--stages", "1"])?.expect_code(0);
    let coordinator = up.ready["coordinator"]["pid"].as_u64().context("a pid")? as u32;
    signal(coordinator, Signal::KILL)?;
    assert!(wait_until_gone(coordinator, Duration::from_secs(3))?);
    up.process().wait_for_words("coordinator: started again", RECOVERY_TIMEOUT)?;
    let admin = up.admin()?;
    let view = admin.wait_for_phase("second", DeploymentPhase::Ready, RECOVERY_TIMEOUT)?;
    assert_eq!(view.deployments.len(), 2);
    assert_eq!(view.workers.len(), 2, "no ghost is left");
    admin.wait_for_phase("demo", DeploymentPhase::Ready, RECOVERY_TIMEOUT)?;
    assert_eq!(up.api().chat("What is 4 plus 4?", json!({}))?.ok()?.text(), "4 plus 4 is 8.");
    Ok(())
}

#[test]
fn a_kept_folder_is_served_again() -> Result<()> {
    let data = tempfile::tempdir()?;
    for _ in 0..2 {
        let mut process = Up::spawn(&UpOptions::flags("--workers 2"), data.path())?;
        let ready: Value = serde_json::from_str(&process.line(Duration::from_secs(60))?)?;
        let ids: Vec<&str> = ready["workers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|worker| worker["id"].as_str())
            .collect();
        assert_eq!(ids, ["w1", "w2"], "{ready}");
        process.signal(Signal::INT)?;
        process.finish(Duration::from_secs(15))?.expect_code(0);
    }
    Ok(())
}

#[test]
fn a_second_ctrl_c_ends_what_does_not_end_by_itself() -> Result<()> {
    let mut up = Up::start(&UpOptions::flags("--workers 2"))?;
    // One that is frozen drains nothing.
    let frozen = up.workers()[0].pid;
    signal(frozen, Signal::STOP)?;
    let pid = up.process().pid();
    up.process().signal(Signal::INT)?;
    up.process().wait_for_words("interrupted; stopping", Duration::from_secs(5))?;
    up.process().signal(Signal::INT)?;
    up.process().wait_for_words("interrupted again; ending at once", Duration::from_secs(5))?;
    // The drain alone would take longer.
    assert!(wait_until_gone(pid, Duration::from_secs(5))?);
    assert!(wait_until_gone(frozen, Duration::from_secs(5))?);
    Ok(())
}

#[test]
fn a_model_that_fits_no_worker_alone_is_served_by_three() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("wide");
    RandomLlama { layers: 9, hidden: 256, intermediate: 704 }.write(&model)?;

    // 25 MiB of weights.
    let alone = UpOptions::flags("--workers 1 --worker-memory 16MiB").model(&model);
    let refused = Up::spawn(&alone, folder.path())?.finish(Duration::from_secs(60))?.expect_code(3);
    for words in ["does not fit", "stage 0", "w1 has 16.0 MiB", "more worker", "--precision"] {
        assert!(refused.stderr.contains(words), "{words:?} is not in {}", refused.stderr);
    }
    assert_eq!(refused.stdout, "");

    let split = UpOptions::flags("--workers 3 --worker-memory 16MiB").model(&model);
    let up = Up::start(&split)?;
    let split =
        up.api().complete("abc", json!({"max_tokens": 8, "return_token_ids": true}))?.ok()?;
    assert_eq!(split.token_ids().len(), 8);
    up.stop(&[])?;

    let whole = Up::start(&UpOptions::flags("--workers 1").model(&model))?;
    let whole = whole.api().complete("abc", json!({"max_tokens": 8, "return_token_ids": true}))?;
    assert_eq!(whole.ok()?.token_ids(), split.token_ids());
    Ok(())
}

#[test]
fn a_busy_port_is_an_error_that_names_a_way_out() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let data = tempfile::tempdir()?;
    let data = data.path().join("up").to_string_lossy().into_owned();
    let up = Process::shoal(["up", "--listen", &address, "--data", &data])?;
    let failed = up.finish(Duration::from_secs(30))?.expect_code(1);
    for words in [address.as_str(), ":0"] {
        assert!(failed.stderr.contains(words), "{words:?} is not in {}", failed.stderr);
    }
    Ok(())
}

#[test]
fn damaged_models_are_refused_by_name() -> Result<()> {
    type Damage = fn(&std::path::Path) -> Result<()>;
    fn edit(folder: &std::path::Path, change: fn(&mut Value)) -> Result<()> {
        let path = folder.join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        change(&mut config);
        Ok(std::fs::write(path, config.to_string())?)
    }
    let cases: [(&str, Damage, &[&str]); 8] = [
        (
            "truncated",
            |f| {
                let file =
                    std::fs::OpenOptions::new().write(true).open(f.join("model.safetensors"))?;
                Ok(file.set_len(file.metadata()?.len() - 1000)?)
            },
            &["model.safetensors"],
        ),
        (
            "no-weights",
            |f| Ok(std::fs::remove_file(f.join("model.safetensors"))?),
            &["safetensors"],
        ),
        (
            "no-tokenizer",
            |f| Ok(std::fs::remove_file(f.join("tokenizer.json"))?),
            &["tokenizer.json"],
        ),
        ("no-config", |f| Ok(std::fs::remove_file(f.join("config.json"))?), &["config.json"]),
        ("broken-config", |f| Ok(std::fs::write(f.join("config.json"), "{")?), &["config.json"]),
        (
            "other-family",
            |f| {
                edit(f, |c| {
                    c["architectures"] = json!(["MambaForCausalLM"]);
                    c["model_type"] = json!("mamba");
                })
            },
            &["MambaForCausalLM", "LlamaForCausalLM"],
        ),
        ("more-layers", |f| edit(f, |c| c["num_hidden_layers"] = json!(13)), &["model.layers.12"]),
        ("other-shape", |f| edit(f, |c| c["intermediate_size"] = json!(255)), &["mlp", "shape"]),
    ];
    let up = Up::start(&UpOptions::flags("--workers 2"))?;
    let folder = tempfile::tempdir()?;
    for (name, damage, expected) in cases {
        let model = folder.path().join(name);
        copy(&demo(), &model)?;
        damage(&model)?;
        let path = model.to_string_lossy().into_owned();
        let refused = up.verb(&["deploy", &path])?.expect_code(3);
        for words in expected {
            assert!(
                refused.stderr.contains(words),
                "{name}: {words:?} is not in {}",
                refused.stderr
            );
        }
    }
    assert_eq!(up.api().get("/v1/models")?.body["data"].as_array().map(Vec::len), Some(1));
    up.stop(&[])?;
    Ok(())
}
