//! Puts each planted mistake back into a copy of the real sources, builds the simulator with it and
//! lets it look for it: `make sim-bugs`. Minutes for each, so it is no test.
//!
//! ```text
//! shoal-planted [--seeds 2000] [--only NAME,…] [--out FILE]   a table of what was caught where
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use shoal_tests::planted::{self, Planted};

/// A seed that never ends in a core has been caught too; 2,000 seeds take a minute or two.
const PATIENCE: Duration = Duration::from_secs(600);

/// A run says what it has to say once.
const OUTPUTS_MAX: usize = 1;

/// How many may go uncaught, of all.
const MISSED_MAX: usize = 1;

fn main() -> ExitCode {
    match hunt() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn hunt() -> anyhow::Result<bool> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1).cloned()
    };
    let seeds = value("--seeds").unwrap_or_else(|| "2000".to_owned());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no workspace")?;
    let mut all = planted::all(root).map_err(|error| anyhow!(error))?;
    if let Some(only) = value("--only") {
        all.retain(|planted| only.split(',').any(|name| name == planted.name));
    }
    let scratch = Scratch::new(root)?;
    scratch.build().context("the tree without a planted bug")?;
    let (mut rows, mut missed) = (Vec::new(), 0);
    for planted in &all {
        let begun = Instant::now();
        let found = scratch.find(planted, &seeds)?;
        let (by, seed) = found.clone().unwrap_or_default();
        missed += usize::from(found.is_none());
        let file = planted.hunks.keys().next().map_or("", String::as_str);
        let cell = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let by = if by.is_empty() { cell("") } else { format!("`{by}`") };
        let name = &planted.name;
        let row = format!("| `{name}` | {} | `{file}` | {by} | {} |", planted.words, cell(&seed));
        println!("{row} {:.0?}", begun.elapsed());
        rows.push(row);
    }
    let caught = all.len() - missed;
    println!("caught {caught} of {}", all.len());
    if let Some(out) = value("--out") {
        let head =
            "| bug | what it does | where | caught by | first at seed |\n|---|---|---|---|---|";
        let sum = format!("{caught} of {} are caught within {seeds} seeds.", all.len());
        fs::write(out, format!("{head}\n{}\n\n{sum}\n", rows.join("\n")))?;
    }
    Ok(missed <= MISSED_MAX)
}

/// A copy of the tree with a target folder of its own.
struct Scratch {
    root: PathBuf,
    tree: PathBuf,
    target: PathBuf,
}

impl Scratch {
    fn new(root: &Path) -> anyhow::Result<Self> {
        let base = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| root.join("target"), PathBuf::from)
            .join("planted");
        let (tree, target) = (base.join("tree"), base.join("target"));
        let scratch = Self { root: root.to_owned(), tree, target };
        fs::create_dir_all(&scratch.tree)?;
        scratch.copy(Path::new(""))?;
        Ok(scratch)
    }

    /// Copies what has changed, below a folder of the root.
    fn copy(&self, below: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(self.root.join(below))? {
            let entry = entry?;
            let name = entry.file_name();
            let skip = ["target", ".git", ".venv", "node_modules"];
            if below == Path::new("") && skip.iter().any(|skip| name == *skip) {
                continue;
            }
            let (from, to) = (entry.path(), self.tree.join(below).join(&name));
            let kind = entry.file_type()?;
            if kind.is_dir() {
                fs::create_dir_all(&to)?;
                self.copy(&below.join(&name))?;
            } else if kind.is_file() {
                write_if_other(&to, &fs::read(&from)?)?;
            }
        }
        Ok(())
    }

    fn build(&self) -> anyhow::Result<()> {
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--quiet", "--locked", "--package", "shoal-tests"]);
        cargo.args(["--bin", "shoal-sim"]).current_dir(&self.tree);
        let done = cargo.env("CARGO_TARGET_DIR", &self.target).output()?;
        if !done.status.success() {
            bail!("it does not build:\n{}", String::from_utf8_lossy(&done.stderr));
        }
        Ok(())
    }

    /// Plants a bug, looks for it, and takes it out again: by which invariant it was caught, and at
    /// which seed.
    fn find(&self, planted: &Planted, seeds: &str) -> anyhow::Result<Option<(String, String)>> {
        let patched = planted.apply(&self.root).map_err(|error| anyhow!(error))?;
        let mut before = BTreeMap::new();
        for (path, text) in &patched {
            before.insert(path, fs::read(self.root.join(path))?);
            fs::write(self.tree.join(path), text)?;
        }
        let found =
            self.build().with_context(|| planted.name.clone()).and_then(|()| self.run(seeds));
        for (path, text) in before {
            fs::write(self.tree.join(path), text)?;
        }
        found
    }

    fn run(&self, seeds: &str) -> anyhow::Result<Option<(String, String)>> {
        let mut command = Command::new(self.target.join("debug/shoal-sim"));
        command.args(["--first", "--seeds", seeds]).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn()?;
        let mut out = child.stdout.take().context("it has no output")?;
        let (done, ended) = mpsc::sync_channel(OUTPUTS_MAX);
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = out.read_to_string(&mut text);
            // It fails where nobody waits any more.
            let _ = done.send(read.map(|_| text));
        });
        let Ok(text) = ended.recv_timeout(PATIENCE) else {
            child.kill()?;
            child.wait()?;
            return Ok(Some(("a hang".into(), "?".into())));
        };
        let (text, status) = (text?, child.wait()?);
        let line = text.lines().find_map(|line| line.strip_prefix("first: "));
        match (line.and_then(|line| line.split_once(" at ")), status.success()) {
            (Some((by, seed)), _) => Ok(Some((by.to_owned(), seed.to_owned()))),
            (None, true) => Ok(None),
            (None, false) => Ok(Some(("an abort".into(), "?".into()))),
        }
    }
}

fn write_if_other(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    match fs::read(path) {
        Ok(there) if there == bytes => Ok(()),
        _ => fs::write(path, bytes),
    }
}
