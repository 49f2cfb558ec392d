//! ● The Hugging Face hub, or a mirror that speaks like it.
//!
//! Two requests are all that is used: the description of a revision, which names its commit and all
//! files, and a file of that commit, of which we ask for ranges.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;

use super::error::BlobError;
use super::http::{Http, Request};
use super::name::{self, RepoId};
use super::origin::{Checksum, Listing, Origin, RemoteFile};
use super::quant;
use super::settings::{BlobSettings, travels_plain};

/// The longest description: some hundred bytes for each of `FILES_MAX` files.
const DESCRIPTION_MAX: u64 = 16 << 20;

/// More files than this are no model.
const FILES_MAX: usize = 16_384;

const ADVICE: &str = "set HF_TOKEN on every node to a token that may read it, and accept its licence on the \
                      model's page where it has one";

/// One repository.
#[derive(Debug)]
pub(super) struct Hub {
    http: Http,
    repo: RepoId,
    /// Where it stands for one GGUF model of the repository: all files of it.
    gguf: Option<Vec<String>>,
    name: String,
    endpoint: String,
    token: Option<String>,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Description {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hub {
    pub fn new(http: Http, settings: &BlobSettings, repo: RepoId) -> Self {
        let endpoint = settings.endpoint.clone();
        let name = format!("the hub {endpoint}");
        Self { http, repo, gguf: None, name, token: token_for(settings), endpoint }
    }

    /// One GGUF model of it, by a file: to everybody else that is a folder with these files alone.
    pub fn gguf(mut self, file: &str) -> Self {
        self.gguf = Some(quant::parts(file));
        self
    }

    /// What a file of the model is called in the repository.
    fn path_of<'a>(&'a self, name: &'a str) -> &'a str {
        let mut parts = self.gguf.iter().flatten();
        parts.find(|part| base(part) == name).map_or(name, String::as_str)
    }

    fn request(&self, what: String, path: &str) -> Request {
        let bearer = self.token.iter().map(|token| ("Authorization", format!("Bearer {token}")));
        Request {
            origin: self.name.clone(),
            what,
            url: format!("{}/{path}", self.endpoint),
            headers: bearer.collect(),
            is_signed: false,
            advice: ADVICE,
        }
    }
}

/// A path's last part.
fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A token goes nowhere unencrypted but to this machine.
fn token_for(settings: &BlobSettings) -> Option<String> {
    let token = settings.token.clone()?;
    if !travels_plain(&settings.endpoint) {
        return Some(token);
    }
    tracing::warn!("HF_TOKEN is not sent to {}: it would travel unencrypted", settings.endpoint);
    None
}

impl Origin for Hub {
    fn name(&self) -> &str {
        &self.name
    }

    fn list(&self, revision: &str, cancel: &AtomicBool) -> Result<Listing, BlobError> {
        let what = format!("{}@{revision}", self.repo);
        let at = name::segment(revision);
        let path = format!("api/models/{}/revision/{at}?blobs=true", self.repo);
        let body = self.http.whole(&self.request(what.clone(), &path), DESCRIPTION_MAX, cancel)?;
        let damaged = |why: String| {
            let (origin, what) = (self.name.clone(), format!("the description of {what}"));
            BlobError::Damaged { origin, what, why }
        };
        let found: Description =
            serde_json::from_slice(&body).map_err(|error| damaged(error.to_string()))?;
        if !name::is_commit(&found.sha) {
            return Err(damaged(format!("`{}` is no commit", found.sha)));
        }
        if found.siblings.len() > FILES_MAX {
            let files = found.siblings.len();
            return Err(damaged(format!("it has {files} files; a model has at most {FILES_MAX}")));
        }
        let files: Vec<_> = found
            .siblings
            .into_iter()
            .filter_map(|file| {
                // What cannot lie in a folder of ours is left out: `.gitattributes` among others.
                name::check_file(&file.rfilename).ok()?;
                let (sha256, lfs_len) = file.lfs.map_or((None, None), |lfs| (lfs.sha256, lfs.size));
                let checksum = sha256.map(Checksum::Sha256).or(file.blob_id.map(Checksum::GitBlob));
                let len = lfs_len.or(file.size)?;
                Some(RemoteFile { name: file.rfilename, len, checksum })
            })
            .collect();
        let Some(parts) = &self.gguf else { return Ok(Listing { commit: found.sha, files }) };
        let of = |part: &String| match files.iter().find(|file| file.name == *part) {
            Some(file) => Ok(RemoteFile { name: base(part).to_owned(), ..file.clone() }),
            None => Err(damaged(format!("there is no {part}, which is a part of the model"))),
        };
        let files = parts.iter().map(of).collect::<Result<_, _>>()?;
        Ok(Listing { commit: found.sha, files })
    }

    fn read(
        &self,
        commit: &str,
        file: &RemoteFile,
        bytes: Range<u64>,
        out: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> Result<(), BlobError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let what = format!("{}/{} bytes {}..{}", self.repo, file.name, bytes.start, bytes.end);
        let file_path = name::path(self.path_of(&file.name));
        let path = format!("{}/resolve/{commit}/{file_path}", self.repo);
        self.http.range(&self.request(what, &path), (bytes, file.len), out, cancel)
    }
}
