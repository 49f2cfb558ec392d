//! Puts each planted mistake back into a copy of the real sources, builds the simulator with it and
//! lets it look for it: `make sim-bugs`. Minutes for each, so it is no test.
//!
//! ```text
//! shoal-planted [--seeds 2000] [--only NAME,…] [--out FILE]   a table of what was caught where
//! ```

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fmt, fs};

use anyhow::{Context, anyhow, bail};
use shoal_tests::planted::{self, Planted};

/// 2,000 seeds take a minute or two. One that never ends may be the mistake's doing, and may be the
/// machine's: it does not count as caught.
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
    match scratch.run(&seeds)? {
        Found::Nothing => {}
        found => bail!("the tree without a planted bug is not clean, mend it first: {found}"),
    }
    let (mut rows, mut missed) = (Vec::new(), 0);
    for planted in &all {
        let begun = Instant::now();
        let found = scratch.find(planted, &seeds)?;
        let (by, seed) = match &found {
            Found::Caught { by, seed } => (format!("`{by}`"), seed.as_str()),
            Found::Nothing => ("-".to_owned(), "-"),
            Found::Broken(_) => (found.to_string(), "-"),
        };
        missed += usize::from(!matches!(found, Found::Caught { .. }));
        let file = planted.hunks.keys().next().map_or("", String::as_str);
        let name = &planted.name;
        let row = format!("| `{name}` | {} | `{file}` | {by} | {seed} |", planted.words);
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

/// What a run of the simulator came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    /// An invariant did not hold.
    Caught {
        /// Its name.
        by: String,
        /// Where first.
        seed: String,
    },
    /// All seeds went well.
    Nothing,
    /// It ended without a word, or not at all: that says nothing about an invariant.
    Broken(String),
}

impl Found {
    /// From what it printed, and how it ended.
    fn read(text: &str, status: ExitStatus) -> Self {
        let line = text.lines().find_map(|line| line.strip_prefix("first: "));
        match line.and_then(|line| line.split_once(" at ")) {
            Some((by, seed)) => Self::Caught { by: by.to_owned(), seed: seed.to_owned() },
            None if status.success() => Self::Nothing,
            None => Self::Broken(format!("it ended without a word ({status})")),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught { by, seed } => write!(f, "{by} at seed {seed}"),
            Self::Nothing => f.write_str("nothing was found"),
            Self::Broken(how) => write!(f, "not counted: {how}"),
        }
    }
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

    /// Copies what has changed, below a folder of the root, and deletes what is not there any more.
    fn copy(&self, below: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(self.tree.join(below))? {
            let entry = entry?;
            let there = fs::symlink_metadata(self.root.join(below).join(entry.file_name()));
            let kind = entry.file_type()?;
            match there {
                Ok(there) if there.file_type() == kind => {}
                _ if kind.is_dir() => fs::remove_dir_all(entry.path())?,
                _ => fs::remove_file(entry.path())?,
            }
        }
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

    /// Plants a bug, looks for it, and takes it out again.
    fn find(&self, planted: &Planted, seeds: &str) -> anyhow::Result<Found> {
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

    fn run(&self, seeds: &str) -> anyhow::Result<Found> {
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
            return Ok(Found::Broken(format!("it did not end within {PATIENCE:?}")));
        };
        Ok(Found::read(&text?, child.wait()?))
    }
}

fn write_if_other(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    match fs::read(path) {
        Ok(there) if there == bytes => Ok(()),
        _ => fs::write(path, bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_planted_bug_is_caught_by_an_invariant_and_by_nothing_else() {
        let ended = |code: i32| ExitStatus::from_raw(code << 8);
        let caught = Found::Caught { by: "tokens".to_owned(), seed: "17".to_owned() };
        assert_eq!(Found::read("first: tokens at 17\ntwo differ\n", ended(1)), caught);
        assert_eq!(Found::read("", ended(0)), Found::Nothing);
        assert!(matches!(Found::read("", ended(101)), Found::Broken(_)), "a panic is no catch");
        assert!(matches!(Found::read("", ExitStatus::from_raw(9)), Found::Broken(_)));
    }

    #[test]
    fn the_copy_that_is_planted_in_holds_nothing_that_the_tree_does_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path();
        let (root, tree) = (base.join("root"), base.join("tree"));
        let scratch = Scratch { root: root.clone(), tree: tree.clone(), target: base.join("t") };
        for path in ["root/a/kept.rs", "tree/a/gone.rs", "tree/b/gone.rs"] {
            let path = base.join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, "fn f() {}").expect("a file");
        }
        scratch.copy(Path::new("")).expect("a copy");
        assert!(tree.join("a/kept.rs").exists());
        assert!(!tree.join("a/gone.rs").exists() && !tree.join("b").exists());
    }
}
