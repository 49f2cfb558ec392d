//! ○ Names of models elsewhere: what may be asked for, and where it lies on this machine.

use std::fmt;
use std::str::FromStr;

/// The longest part of a repository's name; the hub's own bound is 96 for both together.
const PART_MAX: usize = 96;

/// The longest revision: a branch, a tag or a commit.
const REVISION_MAX: usize = 256;

/// The longest word for a quantisation; `UD-IQ2_XXS` has ten letters.
const QUANT_MAX: usize = 64;

/// The longest name of a file in a repository.
const FILE_MAX: usize = 255;

/// What is asked for where nobody says a revision.
pub const MAIN: &str = "main";

/// A name that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Not `org/name`.
    #[error(
        "`{0}` is no model of a hub; expected org/name or org/name@revision, of letters, digits, `.`, \
         `_` and `-` (and of a GGUF repository org/name:QUANT or org/name/FILE.gguf)"
    )]
    Repo(String),
    /// Not a word for a quantisation.
    #[error("`{0}` is no quantisation; expected a word such as Q4_K_M, as files' names have it")]
    Quant(String),
    /// Not a revision.
    #[error("`{0}` is no revision; expected a branch, a tag or a commit")]
    Revision(String),
    /// Not a folder of an object store.
    #[error(
        "`{0}` is no folder of an object store; expected s3://bucket/folder or s3://bucket/folder/FILE.gguf"
    )]
    Object(String),
    /// A file's name that leads elsewhere.
    #[error("the file name `{0}` is refused: it does not stay inside the model's folder")]
    File(String),
}

/// `org/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RepoId {
    org: String,
    name: String,
}

impl RepoId {
    /// The part behind the slash.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `org--name`: what its folder is called, here and in the hub's own cache.
    pub fn folder(&self) -> String {
        format!("{}--{}", self.org, self.name)
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)
    }
}

impl FromStr for RepoId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let part = |part: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            let edges = part.starts_with(['.', '-']) || part.ends_with(['.', '-']);
            !part.is_empty() && part.len() <= PART_MAX && part.chars().all(plain) && !edges
        };
        match text.split_once('/') {
            // The hub allows no `--` either: it stands for the slash in folders.
            Some((org, name)) if part(org) && part(name) && !text.contains("--") => {
                Ok(Self { org: org.to_owned(), name: name.to_owned() })
            }
            _ => Err(BadName::Repo(text.to_owned())),
        }
    }
}

/// A model of a hub as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// Which repository.
    pub repo: RepoId,
    /// At which revision.
    pub revision: String,
    /// Which of its GGUF models, where that is said: a quantisation, or a file in it.
    pub gguf: Option<String>,
}

/// Reads `org/name[@revision][:QUANT]`, or `org/name/FILE.gguf[@revision]`.
pub fn parse(text: &str) -> Result<HubName, BadName> {
    let bad = || BadName::Repo(text.to_owned());
    // Neither a repository's name nor a revision has a colon.
    let (text, quant) = match text.split_once(':') {
        Some((text, quant)) => (text, Some(quant)),
        None => (text, None),
    };
    let (path, revision) = text.split_once('@').unwrap_or((text, MAIN));
    check_revision(revision)?;
    let name_ends = path.match_indices('/').nth(1).map(|(at, _)| at);
    let (repo, file) = match name_ends.filter(|_| is_gguf(path)) {
        Some(at) => (&path[..at], Some(&path[at + 1..])),
        None => (path, None),
    };
    let gguf = match (quant, file) {
        (Some(_), Some(_)) => return Err(bad()),
        (Some(quant), None) => Some(check_quant(quant)?),
        (None, Some(file)) => {
            check_file(file)?;
            Some(file)
        }
        (None, None) => None,
    };
    let repo = repo.parse().map_err(|_| bad())?;
    Ok(HubName { repo, revision: revision.to_owned(), gguf: gguf.map(str::to_owned) })
}

/// An adapter of a hub as people write it: `org/name[@revision]`.
pub fn parse_adapter(text: &str) -> Result<HubName, BadName> {
    let bad = || BadName::Repo(text.to_owned());
    parse(text).ok().filter(|found| found.gguf.is_none()).ok_or_else(bad)
}

/// Whether this is an adapter of a hub at a commit, as plans have it.
pub fn is_pinned_adapter(text: &str) -> bool {
    parse_adapter(text).is_ok_and(|found| is_commit(&found.revision))
}

/// Whether a file is called as GGUF files are.
pub fn is_gguf(name: &str) -> bool {
    name.ends_with(".gguf")
}

fn check_quant(quant: &str) -> Result<&str, BadName> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let good = !quant.is_empty() && quant.len() <= QUANT_MAX && quant.chars().all(plain);
    if good { Ok(quant) } else { Err(BadName::Quant(quant.to_owned())) }
}

/// Whether something may be asked for as a revision.
pub fn check_revision(revision: &str) -> Result<(), BadName> {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '\\' | '?' | '#' | '%');
    let good = !revision.is_empty()
        && revision.len() <= REVISION_MAX
        && revision.chars().all(plain)
        && !revision.contains("..");
    if good { Ok(()) } else { Err(BadName::Revision(revision.to_owned())) }
}

/// Whether a revision is a commit, which names the same bytes for ever.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Checks a file's name that somebody else has said: it is joined to a folder of ours.
pub fn check_file(name: &str) -> Result<(), BadName> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && !part.contains(['\\', '\0', ':'])
            && !part.chars().any(char::is_control)
    };
    let good = name.len() <= FILE_MAX && name.split('/').all(part);
    if good { Ok(()) } else { Err(BadName::File(name.to_owned())) }
}

/// A text as one segment of a URL's path.
pub fn segment(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// A path as a URL has it: its slashes stay.
pub fn path(text: &str) -> String {
    text.split('/').map(segment).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_a_hub_is_org_name_and_a_revision() {
        for (text, repo, revision, gguf) in [
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "main", None),
            ("a/b@v1.0", "a/b", "v1.0", None),
            ("a/b@refs/pr/3", "a/b", "refs/pr/3", None),
            ("a/b-GGUF:Q4_K_M", "a/b-GGUF", "main", Some("Q4_K_M")),
            ("a/b@v1:UD-Q4_K_XL", "a/b", "v1", Some("UD-Q4_K_XL")),
            ("a/b/b-Q8_0.gguf", "a/b", "main", Some("b-Q8_0.gguf")),
            ("a/b/BF16/b-00001-of-00002.gguf@v1", "a/b", "v1", Some("BF16/b-00001-of-00002.gguf")),
            ("a/b.gguf", "a/b.gguf", "main", None),
        ] {
            let found = parse(text).unwrap();
            assert_eq!((&*found.repo.to_string(), &*found.revision), (repo, revision));
            assert_eq!(found.gguf.as_deref(), gguf, "{text}");
        }
        for text in [
            "",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "./b",
            "../b",
            "a/..",
            "a b/c",
            "a--b/c",
            "a/b@",
            "a/b:",
            "a/b:Q4 0",
            "a/b:Q4@v1",
            "a/b/x.gguf:Q4_0",
            "a/b/../x.gguf",
            "a/b//x.gguf",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(is_pinned_adapter(&format!("a/b@{}", "0123456789".repeat(4))));
        for text in ["/a/b", "a/b", "a/b@v1", "adapters/d/e", "a/b:Q4_0"] {
            assert!(!is_pinned_adapter(text), "{text:?}");
        }
        for revision in ["", "a..b", "a b", "a?b", "x\n"] {
            assert!(check_revision(revision).is_err(), "{revision:?}");
        }
    }

    #[test]
    fn a_file_stays_inside_its_folder() {
        for name in ["config.json", "1_Pooling/config.json", "model-00001-of-00002.safetensors"] {
            check_file(name).unwrap();
        }
        for name in
            ["", "/etc/passwd", "../x", "a/../b", "a//b", ".git/config", "a\\b", "a\0", "c:x"]
        {
            assert!(check_file(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn what_a_url_would_misread_is_escaped() {
        assert_eq!(path("a b/ü+c~"), "a%20b/%C3%BC%2Bc~");
        assert_eq!(segment("refs/pr/3"), "refs%2Fpr%2F3");
    }
}
