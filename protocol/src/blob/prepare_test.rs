//! What of a small part is fetched again: with an origin in memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Condvar;
use std::time::Duration;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const CONFIG: &str = "config.json";

/// Serves its files, and notes which of them it was asked for.
#[derive(Debug)]
struct Source {
    files: BTreeMap<&'static str, Vec<u8>>,
    /// What it says of a file's bytes.
    sum: fn(&[u8]) -> Option<Checksum>,
    asked: Mutex<Vec<String>>,
    /// Answered only when this file is asked for too, or after a while.
    waits_for: Option<&'static str>,
    came: Condvar,
}

/// How long an answer waits for another file to be asked for.
const A_WHILE: Duration = Duration::from_millis(300);

impl Origin for Source {
    fn name(&self) -> &str {
        "the origin"
    }

    fn list(&self, _: &str, _: &AtomicBool) -> Result<Listing, BlobError> {
        self.note("the list");
        let file = |(name, bytes): (&&str, &Vec<u8>)| {
            let len = bytes.len() as u64;
            RemoteFile { name: (*name).to_owned(), len, checksum: (self.sum)(bytes) }
        };
        Ok(Listing { commit: COMMIT.to_owned(), files: self.files.iter().map(file).collect() })
    }

    fn read(
        &self,
        _: &str,
        file: &RemoteFile,
        bytes: Range<u64>,
        out: &mut Vec<u8>,
        _: &AtomicBool,
    ) -> Result<(), BlobError> {
        self.note(&file.name);
        self.came.notify_all();
        if let Some(other) = self.waits_for {
            let asked = self.asked.lock().unwrap();
            let missing = |asked: &mut Vec<String>| !asked.iter().any(|name| name == other);
            drop(self.came.wait_timeout_while(asked, A_WHILE, missing).unwrap());
            self.note("answered");
        }
        let all = &self.files[file.name.as_str()];
        out.extend_from_slice(&all[bytes.start as usize..bytes.end as usize]);
        Ok(())
    }
}

impl Source {
    fn new(sum: fn(&[u8]) -> Option<Checksum>) -> Self {
        let weights = [&10_u64.to_le_bytes()[..], b"{\"m\": 123}", &[7; 500]].concat();
        let files = [(CONFIG, b"{\"layers\": 4}".to_vec()), (SINGLE, weights)].into();
        Self { files, sum, asked: Mutex::default(), waits_for: None, came: Condvar::new() }
    }

    fn note(&self, what: &str) {
        self.asked.lock().unwrap().push(what.to_owned());
    }

    /// What it was asked for while the folder was prepared.
    fn prepare(&self, folder: &Path) -> Vec<String> {
        self.asked.lock().unwrap().clear();
        prepare(self, (folder, COMMIT), Side::Weights, &AtomicBool::new(false)).unwrap();
        self.asked.lock().unwrap().clone()
    }
}

fn sha256(bytes: &[u8]) -> Option<Checksum> {
    let sum = ring::digest::digest(&ring::digest::SHA256, bytes);
    Some(Checksum::Sha256(super::super::origin::hex(sum.as_ref())))
}

fn etag(_: &[u8]) -> Option<Checksum> {
    Some(Checksum::Etag("\"1\"".to_owned()))
}

/// What a power cut may leave: the file's length, and nothing in it.
fn blank(path: &Path) {
    let len = std::fs::metadata(path).unwrap().len();
    std::fs::write(path, vec![0; len as usize]).unwrap();
}

#[test]
fn what_the_disk_has_lost_of_a_small_part_is_fetched_again_and_nothing_else() {
    for sum in [sha256, etag, |_: &[u8]| None] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let source = Source::new(sum);
        assert_eq!(source.prepare(folder.path()), ["the list", CONFIG, SINGLE]);
        assert!(source.prepare(folder.path()).is_empty());
        for (lost, expected) in [
            (CONFIG, CONFIG),
            (SINGLE, SINGLE),
            (LISTING, "the list"),
            (".kept/model.safetensors", SINGLE),
        ] {
            blank(&at(lost));
            assert_eq!(source.prepare(folder.path()), [expected], "{lost}");
            assert!(source.prepare(folder.path()).is_empty(), "{lost}");
        }
        assert_eq!(std::fs::read(at(CONFIG)).unwrap(), source.files[CONFIG]);
        assert_eq!(std::fs::read(at(SINGLE)).unwrap()[..18], source.files[SINGLE][..18]);
    }
}

#[test]
fn chunks_outlive_a_header_that_the_disk_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let source = Source::new(sha256);
    source.prepare(folder.path());
    let cut = super::super::Cut { chunk: 100, run: 100 };
    let file = SparseFile::open(folder.path(), SINGLE, cut).unwrap();
    file.write(2, &[7; 100], *blake3::hash(&[7; 100]).as_bytes()).unwrap();
    SparseFile::mend(folder.path(), SINGLE, 0, &[1; 18]).unwrap();
    assert_eq!(source.prepare(folder.path()), [SINGLE]);
    let file = SparseFile::open(folder.path(), SINGLE, cut).unwrap();
    assert!(file.verify(2).unwrap());
}

#[test]
fn of_the_headers_of_gguf_parts_the_next_is_asked_for_when_the_one_before_has_come() {
    const PARTS: [&str; 3] = [
        "mixtral-bf16-00001-of-00003.gguf",
        "mixtral-bf16-00002-of-00003.gguf",
        "mixtral-bf16-00003-of-00003.gguf",
    ];
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf");
    let part = |name: &'static str| (name, std::fs::read(fixtures.join(name)).unwrap());
    let files = PARTS.map(part).into();
    let source = Source { files, waits_for: Some(PARTS[2]), ..Source::new(sha256) };
    let folder = tempfile::tempdir().unwrap();
    let asked = source.prepare(folder.path());
    let [first, second, third] = PARTS;
    let expected = ["the list", first, "answered", second, "answered", third, "answered"];
    assert_eq!(asked, expected);
    assert!(source.prepare(folder.path()).is_empty());
}
