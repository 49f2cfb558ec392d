//! A real etcd with one member or several, on free ports, in a folder that goes with it.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use etcd_client::{Client, GetOptions};
use rustix::process::{Pid, Signal, kill_process};
use shoal_coordinator::config::EtcdConfig;
use tempfile::TempDir;

use crate::contract::within;

/// Set to 1 where no etcd can be installed.
const SKIP: &str = "SHOAL_SKIP_ETCD";

/// How the members of one etcd speak to clients.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// More flags of each member.
    pub flags: Vec<String>,
    /// Whether clients speak TLS.
    pub tls: bool,
}

/// One etcd.
pub struct EtcdProcess {
    folder: TempDir,
    flags: Flags,
    /// Client and peer port of each member.
    ports: Vec<(u16, u16)>,
    members: Mutex<Vec<Option<Child>>>,
}

/// Whether to skip; it is said past the capture of the test runner, so that a skip is seen.
pub fn is_skipped() -> bool {
    let skipped = std::env::var_os(SKIP).is_some_and(|value| value == "1");
    if skipped {
        let line = format!("SKIPPED: the store in etcd was not tested, because {SKIP}=1\n");
        let terminal = std::fs::OpenOptions::new().append(true).open("/dev/stderr");
        let _ = terminal.and_then(|mut out| std::io::Write::write_all(&mut out, line.as_bytes()));
    }
    skipped
}

impl EtcdProcess {
    /// Starts one; whoever opens a store waits until it answers.
    pub fn start(members: usize, flags: Flags) -> Self {
        let free: Vec<TcpListener> =
            (0..2 * members).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
        let port = |i: usize| free[i].local_addr().expect("an address").port();
        let ports = (0..members).map(|i| (port(2 * i), port(2 * i + 1))).collect();
        drop(free);
        let folder = tempfile::tempdir().expect("a folder");
        let etcd = Self { folder, flags, ports, members: Mutex::default() };
        etcd.lock().resize_with(members, || None);
        (0..members).for_each(|member| etcd.start_member(member));
        etcd
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Child>>> {
        self.members.lock().expect("no test panics with it")
    }

    /// Starts a member again, on what it has on its disk.
    pub fn start_member(&self, member: usize) {
        let scheme = if self.flags.tls { "https" } else { "http" };
        let (client, peer) = self.ports[member];
        let client = format!("{scheme}://127.0.0.1:{client}");
        let peer_of = |peer: u16| format!("http://127.0.0.1:{peer}");
        let all = (0..).zip(&self.ports).map(|(i, (_, peer))| format!("m{i}={}", peer_of(*peer)));
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("m{member}")])
            .arg("--data-dir")
            .arg(self.folder.path().join(format!("m{member}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer_of(peer)])
            .args(["--initial-advertise-peer-urls", &peer_of(peer)])
            .args(["--initial-cluster", &all.collect::<Vec<_>>().join(",")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(&self.flags.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let log = std::fs::File::create(self.folder.path().join("log")).expect("a file");
        let child = command.stderr(log).spawn().unwrap_or_else(|error| {
            panic!(
                "cannot run `etcd` ({error}): install it (Debian: apt-get install etcd-server, or \
                 scripts/setup.sh test), or set {SKIP}=1 to skip these tests"
            )
        });
        self.lock()[member] = Some(child);
    }

    /// Sends a member a signal.
    pub fn signal(&self, member: usize, signal: Signal) {
        let members = self.lock();
        let child = members[member].as_ref().expect("it runs");
        let pid = Pid::from_raw(child.id() as i32).expect("a process");
        kill_process(pid, signal).expect("it runs");
    }

    /// Ends a member as kill -9 does.
    pub fn kill(&self, member: usize) {
        if let Some(mut child) = self.lock()[member].take() {
            child.kill().expect("it ran");
            child.wait().expect("it ends");
        }
    }

    /// Where a member takes clients.
    pub fn address(&self, member: usize) -> String {
        format!("127.0.0.1:{}", self.ports[member].0)
    }

    /// All members, for a coordinator without TLS or user.
    pub fn config(&self) -> EtcdConfig {
        let hosts: Vec<String> = (0..self.ports.len()).map(|i| self.address(i)).collect();
        config(&hosts.join(","))
    }

    /// The folder that goes with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A client of our own, once it answers.
    pub async fn client(&self) -> Client {
        let mut client = Client::connect([self.address(0)], None).await.expect("a client");
        let answers = async {
            while client.get("x", None).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        within("etcd's first answer", answers).await;
        client
    }

    /// How many keys there are under a prefix.
    pub async fn count(&self, prefix: &str) -> u64 {
        let options = GetOptions::new().with_prefix().with_count_only();
        let answer = self.client().await.get(prefix, Some(options)).await;
        answer.expect("it answers").count() as u64
    }

    /// Forgets the history of all keys up to now.
    pub async fn compact(&self) {
        let mut client = self.client().await;
        let answer = client.get("x", None).await.expect("it answers");
        let revision = answer.header().expect("a header").revision();
        client.compact(revision, None).await.expect("it compacts");
    }
}

/// A coordinator's configuration for `host:port,…`.
pub fn config(hosts: &str) -> EtcdConfig {
    EtcdConfig::plain(format!("etcd://{hosts}/test/shoal").parse().expect("a URL"))
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What the test saw is not enough to find out why.
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- etcd\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
        for child in self.members.get_mut().expect("no test panics with it").iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
