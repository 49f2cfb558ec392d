//! Mistakes put back into the real cores: `tests/planted/NN-name.patch`, each a few lines of a unified
//! diff with a sentence above it that says what it does.
//!
//! ```text
//! tests/planted/*.patch ─► parse ─► apply to a copy of the tree ─► build ─► the seeds that CI runs
//! ```
//!
//! A hunk is found by its text, not by its line numbers, and must be there exactly once: so patches
//! stay good while files move around them, and a test sees at once which one does not fit any more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A mistake that can be put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planted {
    /// Its name: the file's, without number and ending.
    pub name: String,
    /// What it does, for people.
    pub words: String,
    /// By file, below the root: what is there, and what takes its place.
    pub hunks: BTreeMap<String, Vec<(String, String)>>,
}

/// Where the patches are.
pub fn folder(root: &Path) -> PathBuf {
    root.join("tests/planted")
}

/// All patches, in order of their numbers.
pub fn all(root: &Path) -> Result<Vec<Planted>, String> {
    let folder = folder(root);
    let list = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = list.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "patch"));
    files.sort();
    let read = |path: &PathBuf| {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let name = stem.split_once('-').map_or(stem, |(_, name)| name);
        let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: {e}"))?;
        parse(name, &text)
    };
    files.iter().map(read).collect()
}

/// A patch from its text.
pub fn parse(name: &str, text: &str) -> Result<Planted, String> {
    let mut planted =
        Planted { name: name.to_owned(), words: String::new(), hunks: BTreeMap::new() };
    let mut file: Option<String> = None;
    let mut words = Vec::new();
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("+++ b/") {
            file = Some(path.to_owned());
            continue;
        }
        let Some(path) = &file else {
            if !line.starts_with("--- ") && !line.is_empty() {
                words.push(line);
            }
            continue;
        };
        if line.starts_with("--- ") {
            file = None;
            continue;
        }
        let hunks = planted.hunks.entry(path.clone()).or_default();
        if line.starts_with("@@") {
            hunks.push((String::new(), String::new()));
            continue;
        }
        let Some((before, after)) = hunks.last_mut() else {
            return Err(format!("{name}: a line before the first hunk: {line}"));
        };
        let (sign, rest) = line.split_at_checked(1).unwrap_or((" ", ""));
        if sign != "+" {
            before.push_str(rest);
            before.push('\n');
        }
        if sign != "-" {
            after.push_str(rest);
            after.push('\n');
        }
    }
    planted.words = words.join(" ");
    let whole = !planted.words.is_empty() && planted.hunks.values().flatten().next().is_some();
    if whole { Ok(planted) } else { Err(format!("{name}: no words, or no hunk")) }
}

impl Planted {
    /// The files with the mistake in them, below the root.
    pub fn apply(&self, root: &Path) -> Result<BTreeMap<String, String>, String> {
        let mut files = BTreeMap::new();
        for (path, hunks) in &self.hunks {
            let read = std::fs::read_to_string(root.join(path));
            let mut text = read.map_err(|error| format!("{}: {path}: {error}", self.name))?;
            for (before, after) in hunks {
                let times = text.matches(before.as_str()).count();
                if times != 1 {
                    let name = &self.name;
                    return Err(format!(
                        "{name}: this is {times} times in {path}, not once; mend the patch:\n{before}"
                    ));
                }
                text = text.replacen(before.as_str(), after, 1);
            }
            files.insert(path.clone(), text);
        }
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = "It adds wrongly.\n\n--- a/x.rs\n+++ b/x.rs\n@@ -1,3 +1,3 @@\n fn f() {\n-    1\n+    2\n }\n";

    #[test]
    fn a_hunk_is_found_by_its_text_and_must_be_there_once() {
        let planted = parse("adds", PATCH).unwrap();
        assert_eq!(planted.words, "It adds wrongly.");
        let root = tempfile::tempdir().unwrap();
        let with = |text: &str| {
            std::fs::write(root.path().join("x.rs"), text).unwrap();
            planted.apply(root.path())
        };
        let moved = with("// moved\n\nfn f() {\n    1\n}\n").unwrap();
        assert_eq!(moved["x.rs"], "// moved\n\nfn f() {\n    2\n}\n");
        assert!(with("fn f() {\n    3\n}\n").unwrap_err().contains("0 times"));
        assert!(with("fn f() {\n    1\n}\nfn f() {\n    1\n}\n").unwrap_err().contains("2 times"));
        assert!(parse("nothing", "words\n").is_err());
    }
}
