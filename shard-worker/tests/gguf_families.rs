//! Models that llama.cpp's own converter wrote as GGUF (`tests/fixtures/convert_gguf.py`) are the models that
//! they were made of, bit for bit.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::Path;

use serde_json::{Value, json};
use shoal_protocol::model::{Checkpoint, Family, LayerOptions, ModelSpec};
use shoal_protocol::plan::{Numerics, Precision};

use support::stored::{GGUF_CONVERTED, GGUF_MERGED};
use support::{Case, Chain, Setup, assert_same_bits, blocks, cases, fixtures};

/// A file of `tests/fixtures/gguf`, and what it was made of.
struct Converted {
    case: &'static str,
    /// Of a model in parts how many.
    parts: usize,
    /// What was changed in `config.json`, as `CHANGES` in the script has it, and what the converter leaves out.
    changes: Value,
    /// Which layers it has, as `LAYERS` in the script.
    layers: &'static [usize],
}

impl Converted {
    fn of(case: &'static str) -> Self {
        Self { case, parts: 1, changes: json!({}), layers: &[] }
    }

    fn with(case: &'static str, changes: Value) -> Self {
        Self { changes, ..Self::of(case) }
    }

    fn file(&self) -> std::path::PathBuf {
        let name = match self.parts {
            1 => format!("{}.gguf", self.case),
            parts => format!("{}-00001-of-{parts:05}.gguf", self.case),
        };
        fixtures().join("gguf").join(name)
    }

    /// The folder with the changes.
    fn folder(&self, to: &Path) -> Checkpoint {
        let from = fixtures().join("models").join(self.case);
        let config = std::fs::read(from.join("config.json")).unwrap();
        let Value::Object(mut config) = serde_json::from_slice(&config).unwrap() else {
            panic!("{}: no object", self.case)
        };
        config.extend(self.changes.as_object().unwrap().clone());
        let weights = std::fs::read(from.join("model.safetensors")).unwrap();
        let weights = match self.layers {
            [] => weights,
            layers => {
                config.insert("num_hidden_layers".into(), json!(layers.len()));
                with_layers(&weights, layers)
            }
        };
        std::fs::write(to.join("config.json"), Value::Object(config).to_string()).unwrap();
        std::fs::write(to.join("model.safetensors"), weights).unwrap();
        Checkpoint::open(to).unwrap()
    }
}

/// A safetensors file with these layers of another one.
fn with_layers(bytes: &[u8], layers: &[usize]) -> Vec<u8> {
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let (header, stored) = rest.split_at(length);
    let header: Value = serde_json::from_slice(header).unwrap();
    let (mut found, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in header.as_object().unwrap() {
        let Some(offsets) = tensor["data_offsets"].as_array() else { continue };
        let at = |i: usize| offsets[i].as_u64().unwrap() as usize;
        let mut add = |name: String| {
            let start = data.len();
            data.extend(&stored[at(0)..at(1)]);
            let mut tensor = tensor.clone();
            tensor["data_offsets"] = json!([start, data.len()]);
            found.insert(name, tensor);
        };
        match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
            None => add(name.clone()),
            Some((layer, rest)) => {
                let own = |from: &usize| layer.parse() == Ok(*from);
                let places = layers.iter().enumerate().filter(|(_, from)| own(from));
                places.for_each(|(place, _)| add(format!("model.layers.{place}.{rest}")));
            }
        }
    }
    let header = Value::Object(found).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn case(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap()
}

fn transcript(name: &str, checkpoint: &Checkpoint, setup: &Setup) -> Vec<Vec<f32>> {
    let case = case(name);
    let prompt = &case.prompts[0];
    let (tokens, from) = (prompt.inputs(), prompt.first_sampled());
    Chain::load(checkpoint, setup).transcript(&tokens, from, 16, &blocks())
}

fn all() -> Vec<Converted> {
    vec![
        Converted::of("mistral-saved"),
        // The converter writes no window of it, as llama.cpp has none.
        Converted::with("starcoder2-bf16", json!({"sliding_window": null})),
        Converted { parts: 3, ..Converted::of("mixtral-bf16") },
        Converted::of("phi3-short"),
        Converted::of("phi3-long"),
        Converted::of("olmo2"),
        Converted::of("granite-bf16"),
        Converted::of("smollm3"),
        Converted::with("gemma2-bf16", json!({"query_pre_attn_scalar": 12})),
        Converted {
            layers: &[0, 1, 2, 3, 0, 1],
            ..Converted::with("gemma3-bf16", json!({"sliding_window_pattern": 6}))
        },
        Converted::of("cohere-bf16"),
        Converted::of("cohere2"),
        Converted {
            layers: &[1, 2],
            ..Converted::with("qwen2-moe", json!({"mlp_only_layers": []}))
        },
        Converted::of("qwen3-moe-bf16"),
        Converted::of("qwen3-yarn"),
        Converted::of("gpt-oss-bf16"),
        Converted::of("gpt-oss-mxfp4"),
        Converted::of("deepseek2-groups"),
        Converted::of("deepseek2-lite"),
        Converted { parts: 3, ..Converted::of("deepseek3-bf16") },
    ]
}

#[test]
fn what_the_converter_wrote_is_the_model_that_it_was_made_of() {
    assert_eq!(all().iter().map(|one| one.case).collect::<Vec<_>>(), GGUF_CONVERTED);
    for converted in all() {
        let name = converted.case;
        let to = tempfile::tempdir().unwrap();
        let folder = converted.folder(to.path());
        let gguf = Checkpoint::open(&converted.file()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut expected = ModelSpec { stored: gguf.spec().stored, ..folder.spec().clone() };
        if expected.family == Family::Mistral {
            // Without a window it is a Llama, and is called one.
            expected.family = Family::Llama;
            assert!(expected.options.layers.iter().all(|layer| *layer == LayerOptions::PLAIN));
            expected.options.layers.clear();
        }
        assert_eq!(gguf.spec(), &expected, "{name}");
        let packed = folder.spec().stored == Precision::Mxfp4;
        let held = if packed { Precision::Mxfp4 } else { Precision::Bf16 };
        assert_eq!(gguf.spec().stored, held, "{name}");
        // A model of f32 was rounded when it was converted, and so is one that is held as bf16.
        let mut all = vec![held];
        all.extend((folder.spec().stored != Precision::F32).then_some(Precision::F32));
        for held in all {
            let whole = Setup { held, ..Setup::plain(folder.spec()) };
            let expected = transcript(name, &folder, &whole);
            let what = format!("{name} held as {held}");
            let found = transcript(name, &gguf, &Setup { held, ..Setup::plain(gguf.spec()) });
            assert_same_bits(&found, &expected, &what);
            let cuts = vec![0, 1, folder.spec().layers];
            let staged = Setup { held, cuts, threads: 2, ..Setup::plain(gguf.spec()) };
            assert_same_bits(&transcript(name, &gguf, &staged), &expected, &format!("{what}, cut"));
        }
    }
}

#[test]
fn ranks_read_their_own_experts_and_heads_out_of_merged_tensors() {
    let merged = |converted: &Converted| GGUF_MERGED.contains(&converted.case);
    assert_eq!(all().iter().filter(|one| merged(one)).count(), GGUF_MERGED.len());
    for converted in all().into_iter().filter(merged) {
        let name = converted.case;
        let to = tempfile::tempdir().unwrap();
        let folder = converted.folder(to.path());
        let gguf = Checkpoint::open(&converted.file()).unwrap();
        let ranks = |checkpoint: &Checkpoint, numerics| {
            let held = gguf.spec().stored;
            let cuts = vec![0, 1, folder.spec().layers];
            let plain = Setup::plain(checkpoint.spec());
            let setup = Setup { held, cuts, ranks: vec![2, 2], numerics, ..plain };
            transcript(name, checkpoint, &setup)
        };
        for numerics in [Numerics::N1, Numerics::N1Sum] {
            let what = format!("{name}, {numerics}");
            assert_same_bits(&ranks(&gguf, numerics), &ranks(&folder, numerics), &what);
        }
    }
}
