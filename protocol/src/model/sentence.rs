//! sentence-transformers' files beside a model: how an embedding is pooled, brought to length 1, and how
//! long an input may be.
//!
//! ```text
//! modules.json                 Transformer ─► Pooling ─► Normalize: what stands behind what, and where
//! 1_Pooling/config.json        which rows become one, and how
//! sentence_bert_config.json    max_seq_length
//! ```
//!
//! A folder without `modules.json` is a plain model: sentence-transformers takes the mean then, and so do
//! we. A module that changes the vector and is not known (a dense layer, another pooling) is refused by
//! name.

use std::io;
use std::path::Path;

use serde_json::Value;

use super::checkpoint::read_bounded;
use super::encoder::{EncoderOutput, EncoderSpec, Pooling};
use super::{CheckpointError, SpecError};

/// The largest of these files; real ones have a few hundred bytes.
const FILE_LEN_MAX: u64 = 1 << 20;
const MODULES: &str = "modules.json";
const BERT_CONFIG: &str = "sentence_bert_config.json";
/// More modules than any model has.
const MODULES_MAX: usize = 16;

/// Which pooling a switch of the older form of `config.json` means.
const SWITCHES: &[(&str, Option<Pooling>)] = &[
    ("pooling_mode_cls_token", Some(Pooling::Cls)),
    ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
    ("pooling_mode_lasttoken", Some(Pooling::LastToken)),
    ("pooling_mode_max_tokens", None),
    ("pooling_mode_mean_sqrt_len_tokens", None),
    ("pooling_mode_weightedmean_tokens", None),
];

/// Takes what the files say into the shape. Returns the bytes that were read, for the fingerprint.
pub(super) fn read(folder: &Path, spec: &mut EncoderSpec) -> Result<Vec<u8>, CheckpointError> {
    let mut seen = Vec::new();
    let config = optional(folder, BERT_CONFIG, &mut seen)?.unwrap_or_default();
    if config.get("do_lower_case") == Some(&Value::Bool(true)) {
        let why = "`do_lower_case` is not supported; let the tokenizer's normalizer do it";
        return Err(refused(folder, BERT_CONFIG, why));
    }
    if let Some(max) = config.get("max_seq_length").filter(|max| !max.is_null()) {
        let max = max.as_u64().filter(|max| *max >= 2).ok_or_else(|| {
            refused(folder, BERT_CONFIG, "`max_seq_length` is no whole number from 2 on")
        })?;
        spec.context_max = spec.context_max.min(u32::try_from(max).unwrap_or(u32::MAX));
    }
    // What a head scores is not pooled by these files.
    if matches!(spec.output, EncoderOutput::Scores { .. }) {
        return Ok(seen);
    }
    let Some(modules) = optional(folder, MODULES, &mut seen)? else { return Ok(seen) };
    let modules = modules.as_array().filter(|list| list.len() <= MODULES_MAX);
    let modules = modules.ok_or_else(|| refused(folder, MODULES, "it is no list of modules"))?;
    let (mut pooling, mut normalize) = (None, false);
    for module in modules {
        let text = |name: &str| module.get(name).and_then(Value::as_str).unwrap_or_default();
        // `sentence_transformers.models.Pooling`, whatever the package is called inside.
        match text("type").rsplit('.').next().unwrap_or_default() {
            "Transformer" => {}
            "Pooling" => {
                let path = text("path");
                if path.starts_with('/') || path.split('/').any(|part| part == "..") {
                    return Err(refused(folder, MODULES, "a module's path leaves the folder"));
                }
                let file = match path {
                    "" => "config.json".to_owned(),
                    path => format!("{path}/config.json"),
                };
                let config = optional(folder, &file, &mut seen)?;
                let config = config.ok_or_else(|| {
                    refused(folder, &file, "it is missing, and modules.json names it")
                })?;
                pooling = Some(pooling_of(&config).map_err(|why| refused(folder, &file, &why))?);
            }
            "Normalize" => normalize = true,
            other => {
                let why = format!(
                    "the module `{other}` is not supported; supported: Transformer, Pooling, Normalize"
                );
                return Err(refused(folder, MODULES, &why));
            }
        }
    }
    let pooling = pooling.ok_or_else(|| refused(folder, MODULES, "it has no Pooling"))?;
    spec.output = EncoderOutput::Embedding { pooling, normalize };
    Ok(seen)
}

/// The older form has a switch for each mode, the newer one a name.
fn pooling_of(config: &Value) -> Result<Pooling, String> {
    const SUPPORTED: &str = "supported: one of cls, mean, lasttoken";
    if let Some(mode) = config.get("pooling_mode") {
        return match mode.as_str() {
            Some("cls") => Ok(Pooling::Cls),
            Some("mean") => Ok(Pooling::Mean),
            Some("lasttoken") => Ok(Pooling::LastToken),
            _ => Err(format!("`pooling_mode` is {mode}, which is not supported; {SUPPORTED}")),
        };
    }
    let is_on = |name: &str| config.get(name).and_then(Value::as_bool) == Some(true);
    let on: Vec<_> = SWITCHES.iter().filter(|(name, _)| is_on(name)).collect();
    match on.as_slice() {
        [(_, Some(pooling))] => Ok(*pooling),
        [] => Err(format!("no pooling mode is on; {SUPPORTED}")),
        [(name, None)] => Err(format!("`{name}` is not supported; {SUPPORTED}")),
        [(first, _), (second, _), ..] => Err(format!(
            "`{first}` and `{second}` are both on, which is not supported; {SUPPORTED}"
        )),
    }
}

fn optional(
    folder: &Path,
    name: &str,
    seen: &mut Vec<u8>,
) -> Result<Option<Value>, CheckpointError> {
    let file = folder.join(name);
    let bytes = match read_bounded(&file, FILE_LEN_MAX) {
        Ok(bytes) => bytes,
        Err(CheckpointError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let value = serde_json::from_slice(&bytes)
        .map_err(|error| refused(folder, name, &format!("it is no JSON: {error}")))?;
    seen.extend((bytes.len() as u64).to_le_bytes());
    seen.extend(bytes);
    Ok(Some(value))
}

fn refused(folder: &Path, file: &str, why: &str) -> CheckpointError {
    let source = SpecError::Sentence { file: file.to_owned(), why: why.to_owned() };
    CheckpointError::Spec { folder: folder.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_forms_of_a_pooling_config_are_read_and_what_is_not_supported_is_named() {
        let check = |config: Value, expected: Result<Pooling, &str>| match (
            pooling_of(&config),
            expected,
        ) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{config}"),
            (Err(found), Err(part)) => assert!(found.contains(part), "{found}"),
            (found, expected) => panic!("{config}: {found:?} is not {expected:?}"),
        };
        check(json!({"pooling_mode_mean_tokens": true}), Ok(Pooling::Mean));
        check(
            json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}),
            Ok(Pooling::Cls),
        );
        check(json!({"pooling_mode_lasttoken": true}), Ok(Pooling::LastToken));
        check(json!({"pooling_mode": "lasttoken"}), Ok(Pooling::LastToken));
        check(json!({"pooling_mode": "max"}), Err("\"max\""));
        check(json!({"pooling_mode_max_tokens": true}), Err("`pooling_mode_max_tokens`"));
        check(json!({}), Err("no pooling mode is on"));
        let both = json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true});
        check(both, Err("are both on"));
    }
}
