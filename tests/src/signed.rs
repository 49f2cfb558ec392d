//! Whether a request is signed as an S3-compatible object store wants it (AWS Signature Version 4), worked
//! out here from the request as it came: with none of the code that signs.

use std::collections::BTreeMap;

use ring::{digest, hmac};

use crate::hub::{S3_KEY, S3_SECRET};

/// Whether a GET of this path, with these headers by lower-case name, is signed by `S3_KEY`.
pub fn is_signed(path: &str, headers: &BTreeMap<String, String>) -> bool {
    signature(path, headers).unwrap_or(false)
}

fn signature(path: &str, headers: &BTreeMap<String, String>) -> Option<bool> {
    let said = headers.get("authorization")?.strip_prefix("AWS4-HMAC-SHA256 ")?;
    let said: BTreeMap<&str, &str> =
        said.split(',').filter_map(|part| part.trim().split_once('=')).collect();
    let (id, scope) = said.get("Credential")?.split_once('/')?;
    let [day, region, "s3", "aws4_request"] = scope.split('/').collect::<Vec<_>>()[..] else {
        return None;
    };
    let names: Vec<&str> = said.get("SignedHeaders")?.split(';').collect();
    let time = headers.get("x-amz-date")?;
    // What is not signed, others could change: all of these must be.
    let mut needed = headers.keys().filter(|name| *name == "host" || name.starts_with("x-amz-"));
    let all_signed = needed.all(|name| names.contains(&name.as_str()));
    if id != S3_KEY || !all_signed || !names.is_sorted() || !time.starts_with(day) {
        return None;
    }
    let mut request = format!("GET\n{}\n\n", escaped(&unescaped(path)?));
    for name in &names {
        request.push_str(&format!("{name}:{}\n", headers.get(*name)?.trim()));
    }
    let payload = headers.get("x-amz-content-sha256")?;
    request.push_str(&format!("\n{}\n{payload}", names.join(";")));
    let request = hex(digest::digest(&digest::SHA256, request.as_bytes()).as_ref());
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{request}");
    let by_day = mac(format!("AWS4{S3_SECRET}").as_bytes(), day);
    let key = mac(&mac(&mac(&by_day, region), "s3"), "aws4_request");
    Some(hex(&mac(&key, &text)) == *said.get("Signature")?)
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unescaped(path: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let [first, behind @ ..] = rest {
        let (byte, behind) = match (first, behind) {
            (b'%', [a, b, behind @ ..]) => {
                let digits = [*a, *b];
                (u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?, behind)
            }
            (b'%' | b'?', _) => return None,
            (byte, behind) => (*byte, behind),
        };
        bytes.push(byte);
        rest = behind;
    }
    Some(bytes)
}

/// As signatures have it: all but these, in capitals.
fn escaped(path: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let escape = |byte: &u8| match plain(*byte) {
        true => char::from(*byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    path.iter().map(escape).collect()
}
