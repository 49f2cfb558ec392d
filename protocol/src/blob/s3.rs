//! ● A folder in an S3-compatible object store, `s3://bucket/prefix`, or a GGUF model there, by its file.
//!
//! Nothing is listed: the names of a model's files are known, or stand in its index. An object may be
//! replaced at any time, so the revision is a hash of all names, lengths and ETags, and each read insists
//! on the ETag.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use serde::Deserialize;

use super::error::BlobError;
use super::http::{Http, Request};
use super::name::{self, BadName};
use super::origin::{Checksum, Listing, Origin, RemoteFile, hex};
use super::quant;
use super::settings::{BlobSettings, S3Keys, travels_plain};
use super::sigv4::{Unsigned, sign};
use crate::model::checkpoint::{INDEX, SINGLE};
use crate::model::gguf;
use crate::model::safetensors::HEADER_LEN_MAX;

/// What a model may have beside its weights.
const SMALL: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.txt",
    "modules.json",
    "1_Pooling/config.json",
];

const ADVICE: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION, AWS_ENDPOINT_URL) on \
                      every node to what may read it";

/// What to do where there is no folder of that name.
const NO_FOLDER: &str = "give AWS_ACCESS_KEY_ID and the others on every node; a folder needs a config.json, and a GGUF \
                         model is named by its file, s3://bucket/folder/FILE.gguf";

/// A bucket, and what stands before the names of a model's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectUrl {
    bucket: String,
    /// Without a slash at either end; empty for a GGUF file that stands in no folder.
    prefix: String,
    /// All files of a GGUF model, in the order of its parts.
    gguf: Option<Vec<String>>,
}

impl ObjectUrl {
    /// Reads `s3://bucket/prefix` or `s3://bucket/prefix/FILE.gguf`.
    pub fn parse(url: &str) -> Result<Self, BadName> {
        let bad = || BadName::Object(url.to_owned());
        let (bucket, path) =
            url.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).ok_or_else(bad)?;
        let (prefix, gguf) = match path.rsplit_once('/').unwrap_or(("", path)) {
            (prefix, file) if name::is_gguf(file) => (prefix, Some(quant::parts(file))),
            _ => (path.trim_end_matches('/'), None),
        };
        let plain =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-');
        let good = (3..=63).contains(&bucket.len())
            && bucket.chars().all(plain)
            && name::check_file(path.trim_end_matches('/')).is_ok()
            && gguf.as_ref().is_none_or(|parts| !parts.is_empty());
        let url = Self { bucket: bucket.to_owned(), prefix: prefix.to_owned(), gguf };
        if good { Ok(url) } else { Err(bad()) }
    }

    /// What the model is called: the last part of the prefix, or its file without its number among parts.
    pub fn name(&self) -> &str {
        match self.first() {
            Some(file) => gguf::stem(Path::new(file)),
            None => self.prefix.rsplit('/').next().unwrap_or(&self.prefix),
        }
    }

    /// The first file of a GGUF model.
    fn first(&self) -> Option<&str> {
        self.gguf.iter().flatten().next().map(String::as_str)
    }

    /// Where a file of the model is in its bucket.
    fn key(&self, file: &str) -> String {
        match self.prefix.as_str() {
            "" => file.to_owned(),
            prefix => format!("{prefix}/{file}"),
        }
    }

    /// What its folder is called here.
    pub(super) fn folder(&self) -> String {
        let path = self.first().map_or_else(|| self.prefix.clone(), |first| self.key(first));
        format!("{}--{}", self.bucket, name::segment(&path))
    }
}

/// One model in a bucket.
#[derive(Debug)]
pub(super) struct ObjectStore {
    http: Http,
    url: ObjectUrl,
    name: String,
    settings: BlobSettings,
}

impl ObjectStore {
    pub fn new(http: Http, settings: &BlobSettings, url: ObjectUrl) -> Self {
        let at = settings.s3_endpoint.clone();
        let mut settings = settings.clone();
        settings.keys = keys_for(&settings);
        let name = format!("the object store {}", at.as_deref().unwrap_or("s3.amazonaws.com"));
        Self { http, url, name, settings }
    }

    fn request(&self, what: String, file: &str, etag: Option<&str>) -> Request {
        let bucket = &self.url.bucket;
        let key = name::path(&self.url.key(file));
        let region = &self.settings.region;
        let (base, path) = match &self.settings.s3_endpoint {
            Some(endpoint) => (endpoint.clone(), format!("/{bucket}/{key}")),
            None => (format!("https://{bucket}.s3.{region}.amazonaws.com"), format!("/{key}")),
        };
        let host = base.split("://").nth(1).unwrap_or(&base);
        let time = timestamp(SystemTime::now());
        let unsigned = Unsigned { host, path: &path, headers: &[], region, time: &time };
        let mut headers: Vec<_> =
            self.settings.keys.iter().flat_map(|keys| sign(&unsigned, keys)).collect();
        headers.extend(etag.map(|etag| ("If-Match", etag.to_owned())));
        let (origin, url) = (self.name.clone(), format!("{base}{path}"));
        let is_signed = self.settings.keys.is_some();
        Request { origin, what, url, headers, is_signed, advice: ADVICE }
    }

    /// A file, where there is one.
    fn look(&self, file: &str, cancel: &AtomicBool) -> Result<Option<RemoteFile>, BlobError> {
        let what = self.called(file);
        match self.http.describe(&self.request(what, file, None), cancel) {
            Ok((len, etag)) => {
                let checksum = Some(Checksum::Etag(etag));
                Ok(Some(RemoteFile { name: file.to_owned(), len, checksum }))
            }
            Err(BlobError::NotFound { .. }) => Ok(None),
            // Who may not list a bucket is told that of what is not there, too.
            Err(BlobError::Denied { .. }) if file != SMALL[0] && !name::is_gguf(file) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn called(&self, file: &str) -> String {
        format!("s3://{}/{}", self.url.bucket, self.url.key(file))
    }

    fn none(&self, file: &str, advice: &'static str) -> BlobError {
        BlobError::NotFound { origin: self.name.clone(), what: self.called(file), advice }
    }

    /// What the model consists of.
    fn files(&self, cancel: &AtomicBool) -> Result<Vec<RemoteFile>, BlobError> {
        if let Some(parts) = &self.url.gguf {
            let found =
                |part: &String| self.look(part, cancel)?.ok_or_else(|| self.none(part, ADVICE));
            return parts.iter().map(found).collect();
        }
        let mut files = Vec::new();
        for name in SMALL {
            match self.look(name, cancel)? {
                Some(file) => files.push(file),
                None if name == SMALL[0] => return Err(self.none(name, NO_FOLDER)),
                None => {}
            }
        }
        files.extend(self.weights(cancel)?);
        Ok(files)
    }

    fn weights(&self, cancel: &AtomicBool) -> Result<Vec<RemoteFile>, BlobError> {
        if let Some(single) = self.look(SINGLE, cancel)? {
            return Ok(vec![single]);
        }
        let Some(index) = self.look(INDEX, cancel)? else { return Ok(Vec::new()) };
        #[derive(Deserialize)]
        struct Index {
            weight_map: std::collections::HashMap<String, String>,
        }
        let damaged = |why: String| {
            let (origin, what) = (self.name.clone(), INDEX.to_owned());
            BlobError::Damaged { origin, what, why }
        };
        if index.len > HEADER_LEN_MAX {
            return Err(damaged(format!("it has {} bytes", index.len)));
        }
        let mut bytes = Vec::new();
        self.read("", &index, 0..index.len, &mut bytes, cancel)?;
        let parsed: Index =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
        let mut files = vec![index];
        for file in names {
            name::check_file(&file)?;
            let found = self.look(&file, cancel)?;
            files.push(
                found.ok_or_else(|| damaged(format!("it lists {file}, which is not there")))?,
            );
        }
        Ok(files)
    }
}

/// A session's token goes nowhere unencrypted but to this machine. A signature alone may: stores in a
/// network of one's own often have no certificate, and it opens one file for some minutes.
fn keys_for(settings: &BlobSettings) -> Option<S3Keys> {
    let keys = settings.keys.clone()?;
    let endpoint = settings.s3_endpoint.as_deref().unwrap_or_default();
    if !travels_plain(endpoint) {
        return Some(keys);
    }
    if keys.session.is_some() {
        tracing::warn!(
            "AWS_SESSION_TOKEN is not sent to {endpoint}, nor anything signed with its keys: it would \
             travel unencrypted; give an https:// endpoint"
        );
        return None;
    }
    tracing::warn!(
        "{endpoint} is asked unencrypted: who listens can read and change what it sends"
    );
    Some(keys)
}

impl Origin for ObjectStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn list(&self, _revision: &str, cancel: &AtomicBool) -> Result<Listing, BlobError> {
        let files = self.files(cancel)?;
        let bytes = serde_json::to_vec(&files).unwrap_or_default();
        // As long as a commit, which it stands for.
        let commit = hex(&blake3::hash(&bytes).as_bytes()[..20]);
        Ok(Listing { commit, files })
    }

    fn read(
        &self,
        _commit: &str,
        file: &RemoteFile,
        bytes: Range<u64>,
        out: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> Result<(), BlobError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let what = format!("{} bytes {}..{}", self.called(&file.name), bytes.start, bytes.end);
        let etag = match &file.checksum {
            Some(Checksum::Etag(etag)) => Some(etag.as_str()),
            _ => None,
        };
        self.http.range(&self.request(what, &file.name, etag), (bytes, file.len), out, cancel)
    }
}

/// `20130524T000000Z`.
fn timestamp(now: SystemTime) -> String {
    let now = time::OffsetDateTime::from(now);
    let (date, month) = (now.date(), u8::from(now.month()));
    format!(
        "{:04}{month:02}{:02}T{:02}{:02}{:02}Z",
        date.year(),
        date.day(),
        now.hour(),
        now.minute(),
        now.second()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_folder_of_a_bucket_is_a_url() {
        let url = ObjectUrl::parse("s3://my-bucket/models/tiny/").unwrap();
        assert_eq!((url.name(), url.folder().as_str()), ("tiny", "my-bucket--models%2Ftiny"));
        for (url, name, folder, files) in [
            ("s3://my-bucket/g/m-Q8_0.gguf", "m-Q8_0", "my-bucket--g%2Fm-Q8_0.gguf", 1),
            ("s3://my-bucket/m-Q8_0.gguf", "m-Q8_0", "my-bucket--m-Q8_0.gguf", 1),
            (
                "s3://my-bucket/g/m-00002-of-00003.gguf",
                "m",
                "my-bucket--g%2Fm-00001-of-00003.gguf",
                3,
            ),
        ] {
            let url = ObjectUrl::parse(url).unwrap();
            assert_eq!((url.name(), url.folder().as_str()), (name, folder));
            assert_eq!(url.gguf.unwrap().len(), files);
        }
        for bad in [
            "s3://b/x",
            "s3://bucket",
            "s3://bucket/",
            "s3://bucket/a//m.gguf",
            "s3://Bucket/x",
            "s3://bucket/../x",
            "https://a/b",
        ] {
            assert!(ObjectUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_reads_as_signatures_have_it() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600 + 3_661);
        assert_eq!(timestamp(at), "20130524T010101Z");
    }
}
