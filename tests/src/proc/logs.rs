//! What processes wrote into their logs.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};

/// The lines of all logs in a folder that nobody expected: errors and panics without one of the
/// `expected` texts in them. Each stands behind the name of its log.
pub fn unexpected_errors(folder: &Path, expected: &[&str]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path)?;
        let errors = text.lines().filter(|line| is_error(line));
        let unexpected = errors.filter(|line| !expected.iter().any(|words| line.contains(words)));
        found.extend(unexpected.map(|line| format!("{name}: {line}")));
    }
    Ok(found)
}

/// Milliseconds since midnight (UTC), as a log line begins.
pub fn time_of(line: &str) -> Option<f64> {
    let (_, time) = line.split_once('T')?;
    let mut parts = time.split_once('Z')?.0.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    Some((next()? * 3600.0 + next()? * 60.0 + next()?) * 1000.0)
}

/// The same of now.
pub fn now_of_day() -> Result<f64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(since.as_secs_f64() * 1000.0 % 86_400_000.0)
}

fn is_error(line: &str) -> bool {
    line.contains(" ERROR ") || line.contains("panicked at")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_that_nobody_expected_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let log = "2026 INFO ERRORS are few\n2026 ERROR disk full\n2026 ERROR w2 lost\n\
                   thread 'x' panicked at y\n";
        std::fs::write(folder.path().join("w.log"), log).unwrap();
        assert_eq!(
            unexpected_errors(folder.path(), &["w2 lost"]).unwrap(),
            ["w.log: 2026 ERROR disk full", "w.log: thread 'x' panicked at y"]
        );
    }
}
