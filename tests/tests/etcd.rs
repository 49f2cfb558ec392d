//! `shoal coordinator --store etcd://…`: a coordinator that keeps nothing of the cluster's state itself.

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use shoal_protocol::admin::{AdminCall, AdminReply, DeploymentPhase, Vote};
use shoal_protocol::id::Role;
use shoal_protocol::plan::{ModelSource, PretendSpec};
use shoal_protocol::presence::PresenceView;
use shoal_tests::api::Api;
use shoal_tests::proc::{Admin, Process, Signal};
use tempfile::TempDir;

/// Set to 1 where no etcd can be installed.
const SKIP: &str = "SHOAL_SKIP_ETCD";

/// How long a process may take to start on a machine that is busy.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a coordinator that was started again may take to serve what it served.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

const MODEL: PretendSpec = PretendSpec {
    layers: 4,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 5,
    layer_step_ns: 1000,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

/// An etcd with one member, on free ports.
fn etcd(folder: &TempDir) -> Result<(Process, u16)> {
    let free = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    let [client, peer] = [free[0].local_addr()?.port(), free[1].local_addr()?.port()];
    drop(free);
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let mut command = Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(folder.path().join("etcd"))
        .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
        .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
        .args(["--initial-cluster", &format!("default={}", url(peer))]);
    let process = Process::spawn(command).with_context(|| {
        format!(
            "install etcd (Debian: apt-get install etcd-server, or scripts/setup.sh test), or set \
             {SKIP}=1 to skip this test"
        )
    })?;
    Ok((process, client))
}

struct Coordinator {
    process: Process,
    announced: Value,
}

impl Coordinator {
    fn start(folder: &TempDir, store: &str, api: &str, cluster: &str) -> Result<Self> {
        Self::start_as("c1", folder, store, [api, cluster], &[])
    }

    fn start_as(
        name: &str,
        folder: &TempDir,
        store: &str,
        [api, cluster]: [&str; 2],
        more: &[&str],
    ) -> Result<Self> {
        let data = folder.path().join(name);
        let data = data.to_string_lossy();
        let flags = ["--listen", api, "--cluster", cluster, "--store", store, "--announce"];
        let args = ["coordinator", "--data", &data].into_iter().chain(flags);
        let args = args.chain(more.iter().copied());
        let mut process = Process::shoal(args)?;
        let announced = serde_json::from_str(&process.line(START_TIMEOUT)?)?;
        Ok(Self { process, announced })
    }

    fn text(&self, field: &str) -> &str {
        self.announced[field].as_str().unwrap_or_default()
    }

    fn admin(&self) -> Result<Admin> {
        Admin::open(self.text("context").as_ref())
    }
}

fn tokens(api: &str) -> Result<Value> {
    let prompt: Vec<u32> = (10..30).collect();
    let options = json!({"max_tokens": 20, "ignore_eos": true, "return_token_ids": true});
    let api = Api::new(&format!("http://{api}"), "pretend");
    Ok(api.complete(prompt, options)?.ok()?.body["choices"][0]["token_ids"].clone())
}

/// Whether no etcd can be had; says so past the capture of the test runner, so that a skip is seen.
fn skipped(what: &str) -> Result<bool> {
    let skip = std::env::var_os(SKIP).is_some_and(|value| value == "1");
    if skip {
        let line = format!("SKIPPED: {what} was not tested, because {SKIP}=1\n");
        let terminal = std::fs::OpenOptions::new().append(true).open("/dev/stderr");
        terminal.and_then(|mut out| std::io::Write::write_all(&mut out, line.as_bytes()))?;
    }
    Ok(skip)
}

#[test]
fn every_coordinator_on_etcd_gets_the_cas_key_and_the_ca_rotates() -> Result<()> {
    if skipped("several coordinators on etcd")? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (_etcd, port) = etcd(&folder)?;
    let store = format!("etcd://127.0.0.1:{port}");
    let any = ["127.0.0.1:0"; 2];
    let first = Coordinator::start_as("c1", &folder, &store, any, &[])?;
    let call = AdminCall::CreateToken { role: Role::Coordinator, uses: 2, expires_s: 600 };
    let AdminReply::Token { token } = first.admin()?.call(call)? else { panic!("no token") };
    let more = ["--join", first.text("cluster"), "--token", &token];
    let second = Coordinator::start_as("c2", &folder, &store, any, &more)?;
    let third = Coordinator::start_as("c3", &folder, &store, any, &more)?;
    // Nobody says `coordinators add`.
    let all_vote = |count: usize| {
        move |view: &shoal_protocol::admin::ClusterView| {
            let votes = view.coordinators.iter().filter(|peer| peer.vote == Vote::Voter);
            votes.count() == count && view.coordinators.len() == count
        }
    };
    first.admin()?.wait_until("votes", START_TIMEOUT, all_vote(3))?;
    for name in ["c2", "c3"] {
        assert!(folder.path().join(name).join("ca.key").is_file(), "{name} has no key");
    }

    let verb = |context: &str, args: &[&str]| -> Result<_> {
        let mut command = Command::new(shoal_tests::proc::shoal());
        command.args(args).args(["--context", context]);
        let finished = Process::spawn(command)?.finish(START_TIMEOUT * 2)?;
        Ok(finished.expect_code(0))
    };
    // Whoever founded it goes as any other one, and the CA with it.
    let said = verb(second.text("context"), &["coordinators", "remove", "c1"])?.stderr;
    assert!(said.contains("is being rotated"), "{said}");
    verb(second.text("context"), &["ca", "rotate", "--wait"])?;
    let list = |context: &str| Ok::<_, anyhow::Error>(verb(context, &["ca", "list"])?.stdout);
    let listed = list(second.text("context"))?;
    assert!(listed.contains("signs") && listed.contains("not believed"), "{listed}");
    assert_eq!(list(third.text("context"))?, listed);
    second.admin()?.wait_until("two", START_TIMEOUT, all_vote(2))?;
    // With an etcd nobody has anything to say to another one: who dies is missed all the same.
    until_the_other_is(&second, true)?;
    drop(third);
    until_the_other_is(&second, false)
}

/// Waits until a coordinator of two hears the other one, or does not.
fn until_the_other_is(coordinator: &Coordinator, up: bool) -> Result<()> {
    let other = |view: &PresenceView| view.coordinators.last().is_some_and(|heard| heard.up == up);
    let found = coordinator.admin()?.wait_until_heard(START_TIMEOUT, other)?;
    assert_eq!(found.no_majority, None, "etcd has the majority");
    Ok(())
}

#[test]
fn a_coordinator_on_etcd_serves_and_finds_its_state_after_kill_9() -> Result<()> {
    if skipped("a coordinator on etcd")? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (_etcd, port) = etcd(&folder)?;
    let store = format!("etcd://127.0.0.1:{port}");
    let first = Coordinator::start(&folder, &store, "127.0.0.1:0", "127.0.0.1:0")?;
    let admin = first.admin()?;
    let call = AdminCall::CreateToken { role: Role::Worker, uses: 1, expires_s: 600 };
    let AdminReply::Token { token } = admin.call(call)? else { panic!("no token") };
    let data = folder.path().join("w1");
    let (join, data) = (first.text("cluster"), data.to_string_lossy());
    let _worker = Process::shoal(["worker", "--join", join, "--token", &token, "--data", &data])?;
    admin.wait_until("joined", START_TIMEOUT, |view| view.workers.iter().any(|w| w.connected))?;
    let before = admin.deploy("pretend", ModelSource::Pretend(MODEL), 1)?;
    let answer = tokens(first.text("api"))?;

    let (api, cluster) = (first.text("api").to_owned(), first.text("cluster").to_owned());
    first.process.signal(Signal::KILL)?;
    drop(first);
    let second = Coordinator::start(&folder, &store, &api, &cluster)?;
    let admin = second.admin()?;
    let after = admin.wait_for_phase("pretend", DeploymentPhase::Ready, RECOVERY_TIMEOUT)?;
    let workers = |view: &shoal_protocol::admin::ClusterView| -> Vec<_> {
        view.workers.iter().map(|worker| worker.id).collect()
    };
    assert_eq!(workers(&after), workers(&before));
    assert_eq!(tokens(&api)?, answer);
    // The folder holds who it is, and nothing of the state; etcd holds the state, and no key.
    assert!(folder.path().join("c1/ca.key").is_file());
    assert!(!folder.path().join("c1/state.redb").exists());
    Ok(())
}
