//! ● A folder in an S3-compatible object store: `s3://bucket/prefix`.
//!
//! Nothing is listed: the names of a model's files are known, or stand in its index. An object may be
//! replaced at any time, so the revision is a hash of all names, lengths and ETags, and each read insists
//! on the ETag.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use serde::Deserialize;

use super::error::BlobError;
use super::http::{Http, Request};
use super::name::{self, BadName};
use super::origin::{Checksum, Listing, Origin, RemoteFile, hex};
use super::settings::{BlobSettings, S3Keys, travels_plain};
use super::sigv4::{Unsigned, sign};
use crate::model::checkpoint::{INDEX, SINGLE};
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

/// A bucket and what stands before its files' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectUrl {
    bucket: String,
    /// Without a slash at either end.
    prefix: String,
}

impl ObjectUrl {
    /// Reads `s3://bucket/prefix`.
    pub fn parse(url: &str) -> Result<Self, BadName> {
        let bad = || BadName::Object(url.to_owned());
        let (bucket, prefix) = url
            .strip_prefix("s3://")
            .and_then(|rest| rest.trim_end_matches('/').split_once('/'))
            .ok_or_else(bad)?;
        let plain =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-');
        let good = (3..=63).contains(&bucket.len())
            && bucket.chars().all(plain)
            && name::check_file(prefix).is_ok();
        let url = Self { bucket: bucket.to_owned(), prefix: prefix.to_owned() };
        if good { Ok(url) } else { Err(bad()) }
    }

    /// The last part of the prefix: what the model is called.
    pub fn name(&self) -> &str {
        self.prefix.rsplit('/').next().unwrap_or(&self.prefix)
    }

    /// What its folder is called here.
    pub(super) fn folder(&self) -> String {
        format!("{}--{}", self.bucket, name::segment(&self.prefix))
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
        let ObjectUrl { bucket, prefix } = &self.url;
        let key = name::path(&format!("{prefix}/{file}"));
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
        let what = format!("s3://{}/{}/{file}", self.url.bucket, self.url.prefix);
        match self.http.describe(&self.request(what, file, None), cancel) {
            Ok((len, etag)) => {
                let checksum = Some(Checksum::Etag(etag));
                Ok(Some(RemoteFile { name: file.to_owned(), len, checksum }))
            }
            Err(BlobError::NotFound { .. }) => Ok(None),
            // Who may not list a bucket is told that of what is not there, too.
            Err(BlobError::Denied { .. }) if file != SMALL[0] => Ok(None),
            Err(error) => Err(error),
        }
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
        let mut files = Vec::new();
        for name in SMALL {
            match self.look(name, cancel)? {
                Some(file) => files.push(file),
                None if name == SMALL[0] => {
                    let what = format!("s3://{}/{}/{name}", self.url.bucket, self.url.prefix);
                    let origin = self.name.clone();
                    return Err(BlobError::NotFound { origin, what, advice: ADVICE });
                }
                None => {}
            }
        }
        files.extend(self.weights(cancel)?);
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
        let at = format!("s3://{}/{}", self.url.bucket, self.url.prefix);
        let what = format!("{at}/{} bytes {}..{}", file.name, bytes.start, bytes.end);
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
        for bad in ["s3://b/x", "s3://bucket", "s3://Bucket/x", "s3://bucket/../x", "https://a/b"] {
            assert!(ObjectUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_reads_as_signatures_have_it() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600 + 3_661);
        assert_eq!(timestamp(at), "20130524T010101Z");
    }
}
