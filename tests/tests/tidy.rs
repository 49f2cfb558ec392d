//! What the architecture promises and the compiler cannot hold: who depends on whom, which folders
//! are pure, where `unsafe` and `cfg(feature)` may stand, how long a file may grow.
//!
//! It reads sources as text, with comments, what stands between quotes and unit tests taken out. What
//! it finds it names with file and line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which sibling each crate may depend on. `shoal-tests` may use everything; nobody may use it.
const ARROWS: &[(&str, &[&str])] = &[
    ("shoal-protocol", &[]),
    ("shoal-coordinator", &["shoal-protocol"]),
    ("shoal-shard-worker", &["shoal-protocol"]),
    ("shoal-bench", &["shoal-protocol", "shoal-coordinator", "shoal-shard-worker"]),
    ("shoal", &["shoal-protocol", "shoal-coordinator", "shoal-shard-worker", "shoal-bench"]),
    (
        "shoal-tests",
        &["shoal-protocol", "shoal-coordinator", "shoal-shard-worker", "shoal-bench", "shoal"],
    ),
];

/// Files and folders that take time and randomness as arguments and return what is to be done.
const PURE: &[&str] = &[
    "coordinator/src/api/auth.rs",
    "coordinator/src/api/encode/ask.rs",
    "coordinator/src/api/encode/shapes.rs",
    "coordinator/src/api/encode/tokens.rs",
    "coordinator/src/api/fields.rs",
    "coordinator/src/api/generation.rs",
    "coordinator/src/api/gguf_patterns.rs",
    "coordinator/src/api/gguf_text.rs",
    "coordinator/src/api/messages.rs",
    "coordinator/src/api/origin.rs",
    "coordinator/src/api/pieces.rs",
    "coordinator/src/api/prepare.rs",
    "coordinator/src/api/refusal.rs",
    "coordinator/src/api/stream.rs",
    "coordinator/src/api/strftime.rs",
    "coordinator/src/api/surface.rs",
    "coordinator/src/api/template.rs",
    "coordinator/src/api/validate.rs",
    "coordinator/src/control/planner",
    "coordinator/src/control/reconcile",
    "coordinator/src/control/rotation/step.rs",
    "coordinator/src/control/shape.rs",
    "coordinator/src/control/state",
    "coordinator/src/control/store/etcd/chunks.rs",
    "coordinator/src/control/store/etcd/entry.rs",
    "coordinator/src/control/store/etcd/keys.rs",
    "coordinator/src/control/store/etcd/tail.rs",
    "coordinator/src/control/store/etcd/url.rs",
    "coordinator/src/control/store/heard.rs",
    "coordinator/src/control/store/presence.rs",
    "coordinator/src/dispatch/sequence.rs",
    "coordinator/src/recovery/course.rs",
    "coordinator/src/recovery/pace.rs",
    "coordinator/src/router",
    "protocol/src/access.rs",
    "protocol/src/activation.rs",
    "protocol/src/ranks.rs",
    "protocol/src/adapters.rs",
    "protocol/src/admin.rs",
    "protocol/src/blob/chunks.rs",
    "protocol/src/blob/name.rs",
    "protocol/src/blob/sigv4.rs",
    "protocol/src/blob/swarm.rs",
    "protocol/src/blob/tracker.rs",
    "protocol/src/control.rs",
    "protocol/src/error.rs",
    "protocol/src/frame.rs",
    "protocol/src/id.rs",
    "protocol/src/join.rs",
    "protocol/src/liveness",
    "protocol/src/lost.rs",
    "protocol/src/mesh.rs",
    "protocol/src/model/adapter/config.rs",
    "protocol/src/model/config.rs",
    "protocol/src/model/encoder.rs",
    "protocol/src/model/encoder_tensors.rs",
    "protocol/src/model/families",
    "protocol/src/model/fields.rs",
    "protocol/src/model/gguf/architectures.rs",
    "protocol/src/model/memory.rs",
    "protocol/src/model/mod.rs",
    "protocol/src/model/moe.rs",
    "protocol/src/model/options.rs",
    "protocol/src/model/pickle.rs",
    "protocol/src/model/pretend.rs",
    "protocol/src/model/rope.rs",
    "protocol/src/model/spec.rs",
    "protocol/src/model/stored.rs",
    "protocol/src/model/table.rs",
    "protocol/src/model/tensors.rs",
    "protocol/src/outcast.rs",
    "protocol/src/plan.rs",
    "protocol/src/presence.rs",
    "protocol/src/request.rs",
    "protocol/src/trace.rs",
    "protocol/src/trust.rs",
    "protocol/src/units.rs",
    "protocol/src/upgrade.rs",
    "protocol/src/version.rs",
    "protocol/src/weights.rs",
    "shard-worker/src/agent/adapters/ledger.rs",
    "shard-worker/src/agent/adapters/tries.rs",
    "shard-worker/src/agent/book.rs",
    "shard-worker/src/agent/lifecycle.rs",
    "shard-worker/src/agent/orders.rs",
    "shard-worker/src/agent/sameness.rs",
    "shard-worker/src/engine",
    "shard-worker/src/head/lateness.rs",
    "shard-worker/src/sample",
    "shard-worker/src/stage/ring.rs",
    "shard-worker/src/stage/table.rs",
    "shard-worker/src/stored",
];

/// What a pure file may not name, and what it does instead.
const IMPURE: &[(&str, &str)] = &[
    ("tokio", "a shell runs it; it returns actions"),
    ("quinn", "a shell owns the connection"),
    (".await", "a shell waits; it returns actions"),
    ("async fn", "a shell waits; it returns actions"),
    ("TcpStream", "a shell owns the socket"),
    ("TcpListener", "a shell owns the socket"),
    ("UdpSocket", "a shell owns the socket"),
    ("std::fs", "a shell reads and hands the bytes in"),
    ("std::thread", "a shell owns the thread"),
    ("std::process", "a shell owns the process"),
    ("std::env", "configuration is handed in"),
    ("Instant::now", "`now` is an argument"),
    ("SystemTime::now", "`now` is an argument"),
    ("thread_rng", "the seed is an argument"),
    ("getrandom", "the seed is an argument"),
    ("rand::", "the seed is an argument"),
];

/// Where `unsafe` may stand: kernels, each block with its proof.
const UNSAFE_UNDER: &[&str] = &["shard-worker/src/backend/"];

/// Where `cfg(feature = …)` may stand: the seam to devices, and the transport shell.
const FEATURES_UNDER: &[&str] =
    &["shard-worker/src/backend/", "protocol/src/quic/", "protocol/src/lib.rs"];

/// A longer file, unit tests aside, asks for a second noun.
const LINES_MAX: usize = 500;

/// Files that are longer, and why they stay whole.
const LONGER: &[(&str, &str)] = &[];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

fn cargo(args: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO")).args(args).current_dir(root()).output().expect("cargo");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A source file without what does not count.
struct Source {
    /// Relative to the repository, with `/`.
    path: String,
    /// Lines that are no unit test.
    lines: usize,
    /// Line number and text of what is neither comment, text nor unit test.
    code: Vec<(usize, String)>,
}

impl Source {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).expect("a source file");
        let relative = path.strip_prefix(root()).expect("inside the repository");
        let (code, lines) = product_code(&text);
        Self { path: relative.to_string_lossy().into_owned(), lines, code }
    }

    /// Where the word stands, as `path:line`.
    fn places(&self, word: &str) -> impl Iterator<Item = String> {
        let found = self.code.iter().filter(move |(_, line)| has_word(line, word));
        found.map(|(number, _)| format!("{}:{number}", self.path)).collect::<Vec<_>>().into_iter()
    }
}

/// What marks an item as a unit test.
const TEST_MARK: &str = "#[cfg(test)]";

/// The lines of a source with their numbers, without what does not count, and how many of them are
/// outside of unit tests.
fn product_code(text: &str) -> (Vec<(usize, String)>, usize) {
    let mut code = blank(text);
    let mut tests = Vec::new();
    let mut from = 0;
    while let Some(at) = code[from..].find(TEST_MARK).map(|at| from + at) {
        let end = item_end(&code, at + TEST_MARK.len());
        tests.push(at..end);
        from = end;
    }
    let mut in_tests = 0;
    for test in tests.into_iter().rev() {
        let gone: String = code[test.clone()].chars().filter(|c| *c == '\n').collect();
        in_tests += gone.len() + 1;
        code.replace_range(test, &gone);
    }
    let lines: Vec<(usize, String)> = (1..).zip(code.lines().map(str::to_owned)).collect();
    let count = text.lines().count() - in_tests;
    (lines, count)
}

/// Where the item behind an attribute ends: at its `;`, or with the braces that it opens.
fn item_end(code: &str, from: usize) -> usize {
    let mut depth = 0;
    for (at, c) in code[from..].char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' => depth -= 1,
            '}' => {
                depth -= 1;
                if depth <= 0 {
                    return from + at + 1;
                }
            }
            ';' if depth == 0 => return from + at + 1,
            _ => {}
        }
    }
    code.len()
}

/// The source with nothing in its comments and between its quotes; lines stay where they are.
fn blank(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word_before = code.chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let (len, quoted) = match first {
            '/' if rest.starts_with("//") => (rest.find('\n').unwrap_or(rest.len()), false),
            '/' if rest.starts_with("/*") => (comment_len(rest), false),
            '"' => (string_len(rest), true),
            'r' | 'b' | 'c' if !word_before => match raw_string_len(rest) {
                Some(len) => (len, true),
                None => (0, false),
            },
            '\'' => (char_len(rest), true),
            _ => (0, false),
        };
        if len == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (gone, behind) = rest.split_at(len);
        if quoted {
            code.push_str("\"\"");
        }
        code.extend(gone.chars().filter(|c| *c == '\n'));
        rest = behind;
    }
    code
}

/// The length of a block comment, with those inside of it.
fn comment_len(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of a string with its quotes; a backslash takes the next character with it.
fn string_len(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of `r"…"`, `r#"…"#`, `br"…"` and the like; `None` where it is something else.
fn raw_string_len(text: &str) -> Option<usize> {
    let marks = text.trim_start_matches(['b', 'c']);
    let hashes = marks.strip_prefix('r')?;
    let body = hashes.trim_start_matches('#');
    let closing = format!("\"{}", &hashes[..hashes.len() - body.len()]);
    let inside = body.strip_prefix('"')?;
    let end = inside.find(&closing).map_or(inside.len(), |at| at + closing.len());
    Some(text.len() - inside.len() + end)
}

/// The length of a character with its quotes; 0 where the quote begins a lifetime.
fn char_len(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            chars.next();
            chars.find(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1)
        }
        Some(_) => chars.next().filter(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1),
        None => 0,
    }
}

/// Whether the word stands in the line with no letter before or after it.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let open = |end: Option<char>, neighbour: Option<char>| {
            !(end.is_some_and(part) && neighbour.is_some_and(part))
        };
        open(word.chars().next(), before) && open(word.chars().next_back(), after)
    })
}

/// All Rust files under a file or folder.
fn sources(under: &str) -> Vec<Source> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).expect("a folder") {
                walk(&entry.expect("an entry").path(), found);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path.to_owned());
        }
    }
    let path = root().join(under);
    assert!(path.exists(), "{under} is listed in tidy.rs but is not there");
    let mut found = Vec::new();
    walk(&path, &mut found);
    found.sort();
    found.iter().map(|path| Source::read(path)).collect()
}

fn is_test_file(path: &str) -> bool {
    path.ends_with("_test.rs") || path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The sources of the libraries and the binary.
fn product() -> Vec<Source> {
    let crates = ["protocol/src", "coordinator/src", "shard-worker/src", "cluster/src"];
    crates.into_iter().flat_map(sources).filter(|s| !is_test_file(&s.path)).collect()
}

fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let metadata: Value = serde_json::from_str(&cargo(&[
        "metadata",
        "--no-deps",
        "--format-version",
        "1",
        "--locked",
    ]))
    .expect("JSON");
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("a name");
        let Some(allowed) = allowed.get(name) else {
            wrong.push(format!("{name} is not in ARROWS"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let to = dependency["name"].as_str().expect("a name");
            if dependency["path"].is_string() && !allowed.contains(&to) {
                wrong.push(format!("{name} must not depend on {to}"));
            }
        }
    }
    none("dependencies against the arrows of ARCHITECTURE.md", wrong);
}

#[test]
fn the_protocol_without_its_transport_has_no_runtime_in_it() {
    let tree = cargo(&[
        "tree",
        "--package",
        "shoal-protocol",
        "--no-default-features",
        "--edges",
        "normal",
        "--prefix",
        "none",
        "--locked",
    ]);
    assert!(tree.contains("serde "), "{tree}");
    let runtime = ["tokio ", "quinn ", "rustls ", "socket2 "];
    let found = tree.lines().filter(|line| runtime.iter().any(|name| line.starts_with(name)));
    none("shoal-protocol without `quic` must not contain", found.map(str::to_owned).collect());
}

#[test]
fn pure_files_do_nothing_but_compute() {
    let mut found = Vec::new();
    for source in PURE.iter().flat_map(|under| sources(under)).filter(|s| !is_test_file(&s.path)) {
        for (word, instead) in IMPURE {
            found.extend(source.places(word).map(|at| format!("{at}: `{word}`: {instead}")));
        }
    }
    none("not pure", found);
}

#[test]
fn unsafe_stays_in_the_kernels() {
    let outside = product().into_iter().filter(|s| !starts_with_any(&s.path, UNSAFE_UNDER));
    none(
        "`unsafe` outside of shard-worker/src/backend",
        outside.flat_map(|s| s.places("unsafe").collect::<Vec<_>>()).collect(),
    );
}

#[test]
fn features_are_chosen_at_the_seams_alone() {
    let outside = product().into_iter().filter(|s| !starts_with_any(&s.path, FEATURES_UNDER));
    none(
        "`feature =` outside of the seams",
        outside.flat_map(|s| s.places("feature =").collect::<Vec<_>>()).collect(),
    );
}

#[test]
fn files_stay_short() {
    let reasons: BTreeMap<&str, &str> = LONGER.iter().copied().collect();
    let all = product();
    let long: Vec<&Source> = all.iter().filter(|s| s.lines > LINES_MAX).collect();
    none(
        "files that ask for a second noun",
        long.iter()
            .filter(|s| !reasons.contains_key(s.path.as_str()))
            .map(|s| format!("{}: {} lines", s.path, s.lines))
            .collect(),
    );
    none(
        "in LONGER, but not longer any more",
        reasons
            .keys()
            .filter(|path| !long.iter().any(|s| s.path == **path))
            .map(|path| (*path).to_owned())
            .collect(),
    );
}

#[test]
fn every_crate_inherits_the_lints() {
    let mut missing = Vec::new();
    for folder in ["protocol", "coordinator", "shard-worker", "cluster", "bench", "tests"] {
        let manifest =
            std::fs::read_to_string(root().join(folder).join("Cargo.toml")).expect(folder);
        if !manifest.contains("[lints]\nworkspace = true") {
            missing.push(format!("{folder}/Cargo.toml"));
        }
    }
    none("without `[lints] workspace = true`", missing);
}

fn starts_with_any(path: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| path.starts_with(prefix))
}

#[test]
fn the_scanner_sees_what_it_should() {
    for (line, word, expected) in [
        ("use tokio::net;", "tokio", true),
        ("tokio_util", "tokio", false),
        ("let x = f().await;", ".await", true),
        ("Instant::now()", "Instant::now", true),
        ("operand::x", "rand::", false),
        ("rand::rng()", "rand::", true),
        ("unsafe_code", "unsafe", false),
        ("unsafe { f() }", "unsafe", true),
    ] {
        assert_eq!(has_word(line, word), expected, "{word:?} in {line:?}");
    }
}

#[test]
fn comments_texts_and_unit_tests_do_not_count_and_the_rest_does() {
    let text = r##"use a; // unsafe
let url = "shoal://x"; unsafe_here();
/* one /* two */ unsafe */ after();
let (quote, life): (char, &'static str) = ('"', r#"unsafe " "#);
#[cfg(test)]
mod tests {
    const X: [u8; 2] = [b'}', b'\''];
    fn f() { unsafe_test(); }
}
fn behind() { "a \" b"; tokio(); }
#[cfg(test)]
#[path = "x_test.rs"]
mod more;
last();
"##;
    let (code, lines) = product_code(text);
    let code: Vec<(usize, &str)> = code
        .iter()
        .map(|(number, line)| (*number, line.trim()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    assert_eq!(
        code,
        [
            (1, "use a;"),
            (2, r#"let url = ""; unsafe_here();"#),
            (3, "after();"),
            (4, r#"let (quote, life): (char, &'static str) = ("", "");"#),
            (10, r#"fn behind() { ""; tokio(); }"#),
            (14, "last();"),
        ]
    );
    assert_eq!(lines, 14 - 5 - 3);
}
