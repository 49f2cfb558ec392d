//! ○ The signature that S3-compatible object stores want (AWS Signature Version 4), for requests without a
//! body.

use std::collections::BTreeMap;

use ring::{digest, hmac};

use super::origin::hex;
use super::settings::S3Keys;

/// The hash of a body that is empty.
pub(super) const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// What is signed.
pub(super) struct Unsigned<'a> {
    /// The host, with its port where that is not the scheme's own.
    pub host: &'a str,
    /// The path, escaped as it is sent.
    pub path: &'a str,
    /// Other headers that are to be signed, by lower-case name.
    pub headers: &'a [(&'a str, &'a str)],
    pub region: &'a str,
    /// `20130524T000000Z`.
    pub time: &'a str,
}

/// The headers that make a GET a signed one.
pub(super) fn sign(request: &Unsigned<'_>, keys: &S3Keys) -> Vec<(&'static str, String)> {
    let Unsigned { host, path, headers, region, time } = *request;
    let mut all: BTreeMap<&str, &str> = headers.iter().copied().collect();
    all.extend([("host", host), ("x-amz-content-sha256", EMPTY), ("x-amz-date", time)]);
    if let Some(session) = &keys.session {
        all.insert("x-amz-security-token", session);
    }
    let names: Vec<&str> = all.keys().copied().collect();
    let names = names.join(";");
    let lines: String = all.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let canonical = format!("GET\n{path}\n\n{lines}\n{names}\n{EMPTY}");
    let day = time.split('T').next().unwrap_or_default();
    let scope = format!("{day}/{region}/s3/aws4_request");
    let hash = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hash}");
    let secret = format!("AWS4{}", keys.secret);
    let key = [day, region, "s3", "aws4_request"]
        .iter()
        .fold(secret.into_bytes(), |key, part| mac(&key, part).as_ref().to_vec());
    let signature = hex(mac(&key, &text).as_ref());
    let id = &keys.id;
    let authorization = format!(
        "AWS4-HMAC-SHA256 Credential={id}/{scope},SignedHeaders={names},Signature={signature}"
    );
    let mut signed = vec![
        ("Authorization", authorization),
        ("x-amz-content-sha256", EMPTY.to_owned()),
        ("x-amz-date", time.to_owned()),
    ];
    signed.extend(keys.session.iter().map(|session| ("x-amz-security-token", session.clone())));
    signed
}

fn mac(key: &[u8], text: &str) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_signed_as_in_the_documents_of_s3() {
        // "Signature Calculations for the Authorization Header", example GET Object.
        let keys = S3Keys {
            id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
            session: None,
        };
        let request = Unsigned {
            host: "examplebucket.s3.amazonaws.com",
            path: "/test.txt",
            headers: &[("range", "bytes=0-9")],
            region: "us-east-1",
            time: "20130524T000000Z",
        };
        assert_eq!(
            sign(&request, &keys)[0].1,
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
             SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
             Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
    }

    #[test]
    fn what_expires_with_its_session_says_which() {
        let session = Some("token".to_owned());
        let keys = S3Keys { id: "a".to_owned(), secret: "b".to_owned(), session };
        let (host, path, region, time) = ("h", "/", "r", "20130524T000000Z");
        let request = Unsigned { host, path, headers: &[], region, time };
        let signed = sign(&request, &keys);
        assert!(signed[0].1.contains("x-amz-date;x-amz-security-token,"), "{signed:?}");
        assert_eq!(signed[3], ("x-amz-security-token", "token".to_owned()));
    }
}
