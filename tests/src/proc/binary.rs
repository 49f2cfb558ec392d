//! Which `shoal` the tests run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// The crates whose sources end up in the binary.
const CRATES: &[&str] = &["protocol", "coordinator", "shard-worker", "cluster"];

/// The path of the binary that is as new as its sources: that of SHOAL_BIN where it is set, else the
/// one that cargo has built beside this test, else one that cargo is asked to build now.
pub fn shoal() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("SHOAL_BIN") {
            return PathBuf::from(path);
        }
        // …/target/debug/deps/e2e-0123 stands two folders below …/target/debug/shoal, which `cargo test
        // --workspace` builds for the tests of its own package.
        let test = std::env::current_exe().expect("this test has a path");
        let folder = test.parent().and_then(Path::parent).expect("tests run in target/*/deps");
        let binary = folder.join("shoal");
        if !is_fresh(&binary) {
            build(&folder.file_name().unwrap_or_default().to_string_lossy());
        }
        assert!(binary.is_file(), "no binary at {}", binary.display());
        binary
    })
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn build(folder: &str) {
    let profile = if folder == "debug" { "dev" } else { folder };
    let status = Command::new(env!("CARGO"))
        .args(["build", "--package", "shoal", "--locked", "--profile", profile])
        .current_dir(root())
        .status()
        .expect("cargo runs");
    assert!(status.success(), "cargo could not build shoal");
}

/// Whether no source is newer than the binary.
fn is_fresh(binary: &Path) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|meta| meta.modified()).ok();
    let Some(built) = changed(binary) else { return false };
    CRATES.iter().all(|name| newest_under(&root().join(name)).is_none_or(|newest| newest <= built))
}

fn newest_under(path: &Path) -> Option<SystemTime> {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).ok()?;
        return entries.filter_map(|entry| newest_under(&entry.ok()?.path())).max();
    }
    let source = path.extension().is_some_and(|e| e == "rs" || e == "toml" || e == "safetensors");
    if source { path.metadata().and_then(|meta| meta.modified()).ok() } else { None }
}
