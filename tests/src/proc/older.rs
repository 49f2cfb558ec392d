//! The `shoal` of an older commit, for tests of two builds in one cluster.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Leaves out the tests that need it.
const SKIP: &str = "SHOAL_SKIP_OLDER";

/// Its path; `None` where the tests that need it are to be left out. `make test` has built it before;
/// else it is built now, which takes some minutes.
pub fn older() -> Result<Option<PathBuf>> {
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        eprintln!("left out: {SKIP}=1");
        return Ok(None);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/older.sh");
    let built = Command::new(&script).stderr(Stdio::inherit()).output();
    let built = built.with_context(|| format!("{} runs", script.display()))?;
    ensure!(
        built.status.success(),
        "{} could not build the older shoal; its words are above ({SKIP}=1 leaves this test out)",
        script.display()
    );
    let path = PathBuf::from(String::from_utf8(built.stdout)?.trim());
    ensure!(path.is_file(), "no binary at {}", path.display());
    Ok(Some(path))
}
