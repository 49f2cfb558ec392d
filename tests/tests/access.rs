//! Keys, and certificates that have all expired, with real processes.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::quic::Identity;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_tests::api::Api;
use shoal_tests::proc::{Process, Signal, Up, UpOptions, shoal};

const WEEK: Duration = Duration::from_secs(7 * 86_400);

#[test]
fn a_key_opens_the_api_and_its_end_shuts_it() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 1"))?;
    ensure!(up.api().get("/v1/models")?.status == 200, "without a key everybody here is let in");
    let created = up.verb(&["keys", "create", "alice", "--rpm", "100"])?.expect_code(0);
    let key = created.stdout.trim();
    ensure!(key.starts_with("sk-shoal-") && created.stdout == format!("{key}\n"), "{created:?}");
    ensure!(!created.stderr.contains(&key[9..]), "the words repeat the secret");

    ensure!(up.api().get("/v1/models")?.status == 401);
    ensure!(up.api().get("/health")?.status == 200);
    let chat = |key: Option<&str>| {
        let mut command = std::process::Command::new(shoal());
        command.args(["chat", "--ask", "What is 20 plus 22?", "--context"]).arg(up.context());
        command.env_remove("SHOAL_API_KEY").envs(key.map(|key| ("SHOAL_API_KEY", key)));
        Process::spawn(command)?.finish(Duration::from_secs(30))
    };
    let refused = chat(None)?.expect_code(3);
    ensure!(refused.stderr.contains("this API needs a key"), "{}", refused.stderr);
    ensure!(chat(Some(key))?.expect_code(0).stdout == "20 plus 22 is 42.\n");

    let listed = up.verb(&["keys", "list", "--json"])?.expect_code(0).stdout;
    let listed: Value = serde_json::from_str(&listed)?;
    ensure!(listed["keys"][0]["name"] == "alice" && listed["keys"][0]["standing"] == "good");
    up.verb(&["keys", "revoke", "alice"])?.expect_code(0);
    ensure!(chat(Some(key))?.expect_code(3).stderr.contains("revoked"));
    ensure!(up.verb(&["keys", "revoke", "bob"])?.expect_code(3).stderr.contains("bob"));
    let list = up.verb(&["keys", "list"])?.expect_code(0).stdout;
    ensure!(list.contains("alice") && list.contains("revoked") && !list.contains(&key[9..]));
    up.stop(&[])?;
    Ok(())
}

/// Every file of this name under a folder.
fn find(folder: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(find(&path, name)?);
        } else if path.file_name().is_some_and(|file| file == name) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Starts a cluster in this folder, asks it something, and ends it.
fn run_once(folder: &Path) -> Result<()> {
    let mut process = Up::spawn(&UpOptions::flags("--workers 2"), folder)?;
    let ready: Value = serde_json::from_str(&process.line(Duration::from_secs(60))?)?;
    let url = ready["url"].as_str().context("a url")?;
    let answer =
        Api::new(url, "demo").chat("What is 1 plus 1?", json!({"temperature": 0}))?.ok()?;
    ensure!(answer.text() == "1 plus 1 is 2.", "{}", answer.text());
    let workers: Vec<_> = ready["workers"].as_array().into_iter().flatten().collect();
    ensure!(workers.len() == 2 && workers.iter().all(|worker| worker["stage"].is_u64()));
    // The same nodes each time: nobody has joined again.
    let ids: Vec<_> = workers.iter().filter_map(|worker| worker["id"].as_str()).collect();
    ensure!(ids == ["w1", "w2"], "{ids:?}");
    process.signal(Signal::TERM)?;
    process.finish(Duration::from_secs(20))?.expect_code(0);
    Ok(())
}

#[test]
fn a_cluster_whose_certificates_have_all_expired_comes_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    run_once(folder.path())?;
    let ca = find(folder.path(), "ca.key")?.pop().context("a CA")?;
    let ca = CertificateAuthority::load(&ca)?.context("a CA")?;
    let files = find(folder.path(), "identity")?;
    ensure!(files.len() == 3, "{files:?}");
    for file in &files {
        let identity = Identity::load(file)?.context("an identity")?;
        let csr = identity.renewal_request()?;
        let old = ca.issue(&csr, identity.node, SystemTime::now() - WEEK)?;
        identity.renewed(old)?.save(file)?;
    }
    run_once(folder.path())?;
    for file in &files {
        let expires = Identity::load(file)?.and_then(|identity| identity.expires());
        ensure!(expires.context("an end")? > SystemTime::now(), "{}", file.display());
    }
    Ok(())
}
