use std::fs;

use super::*;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

const CONFIG_JSON: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4,
    "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "vocab_size": 5, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32", "tie_word_embeddings": true
}"#;
const NORM: &str = "model.norm.weight";
const UP: &str = "model.layers.1.mlp.up_proj.weight";

/// One tensor to write: name, type, shape.
type Entry = (String, &'static str, Vec<u64>);

fn entries() -> Vec<Entry> {
    let spec = ModelSpec::from_config_json(CONFIG_JSON).expect("a valid config");
    spec.tensors(LayerRange::new(0, 2))
        .into_iter()
        .map(|t| (t.name, if t.is_matrix { "BF16" } else { "F32" }, t.shape))
        .collect()
}

/// The bytes of a safetensors file; its data are zeros.
fn file(entries: &[Entry]) -> Vec<u8> {
    let mut end = 0;
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    for (name, dtype, shape) in entries {
        let size = match *dtype {
            "F32" | "I32" => 4,
            "F64" => 8,
            _ => 2,
        };
        let start = end;
        end += shape.iter().product::<u64>() * size;
        let info = serde_json::json!(
            {"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    raw_file(&serde_json::Value::Object(header).to_string(), end)
}

fn raw_file(header: &str, data: u64) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data as usize, 0);
    bytes
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join(CONFIG), CONFIG_JSON).expect("written");
    fs::write(folder.path().join(SINGLE), file(&entries())).expect("written");
    folder
}

/// What opening says after `damage`, with the folder's path left out.
fn refusal(damage: impl FnOnce(&Path)) -> String {
    let folder = folder();
    damage(folder.path());
    let error = Checkpoint::open(folder.path()).expect_err("a damaged folder");
    error.to_string().replace(&format!("{}", folder.path().display()), "DIR")
}

fn write(path: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(path.join(name), bytes).expect("written");
}

fn remove(path: &Path, name: &str) {
    fs::remove_file(path.join(name)).expect("removed");
}

/// Splits the folder's weights over two files with an index.
fn split(path: &Path) {
    remove(path, SINGLE);
    let all = entries();
    let (first, second) = all.split_at(7);
    let mut map = serde_json::Map::new();
    for (name, part) in [("a.safetensors", first), ("b.safetensors", second)] {
        write(path, name, file(part));
        map.extend(part.iter().map(|(tensor, ..)| (tensor.clone(), name.into())));
    }
    write(path, INDEX, serde_json::json!({"metadata": {}, "weight_map": map}).to_string());
}

#[test]
fn tensors_are_located_in_one_file_and_in_many() {
    for many in [false, true] {
        let folder = folder();
        if many {
            split(folder.path());
        }
        let checkpoint = Checkpoint::open(folder.path()).expect("an intact folder");
        assert_eq!(checkpoint.spec().stored, Precision::Bf16, "the files have the last word");
        for (name, dtype, shape) in entries() {
            let found = checkpoint.locate(&name).expect("found");
            assert_eq!(found.shape, shape);
            assert_eq!(found.dtype.as_str().to_uppercase(), dtype);
            let elements = shape.iter().product::<u64>();
            assert_eq!(Some(found.len), found.dtype.row_bytes(elements));
            let file_len = fs::metadata(&found.file).expect("a file").len();
            assert!(found.offset + found.len <= file_len);
        }
        let last = checkpoint.locate(NORM).expect("found");
        assert_eq!(last.offset + last.len, fs::metadata(&last.file).expect("a file").len());
        assert_eq!(checkpoint.locate("model.norm.bias"), None);
    }
}

#[test]
fn the_fingerprint_tells_models_apart() {
    let fingerprint = |change: &dyn Fn(&Path)| {
        let folder = folder();
        change(folder.path());
        Checkpoint::open(folder.path()).expect("an intact folder").fingerprint()
    };
    let plain = fingerprint(&|_| ());
    assert_eq!(plain, fingerprint(&|_| ()), "the same in another folder");
    assert_ne!(plain, fingerprint(&split));
    assert_ne!(plain, fingerprint(&|p| write(p, CONFIG, CONFIG_JSON.replace("64", "65"))));
    assert_ne!(
        plain,
        fingerprint(&|p| {
            let mut entries = entries();
            entries.reverse();
            write(p, SINGLE, file(&entries));
        })
    );
}

#[test]
fn a_damaged_file_is_named_with_its_tensor() {
    let with = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = entries();
        change(&mut entries);
        refusal(|path| write(path, SINGLE, file(&entries)))
    };
    let at = |entries: &[Entry], name: &str| {
        entries.iter().position(|(entry, ..)| entry == name).expect("a tensor")
    };
    let total = file(&entries()).len();
    for (refusal, expected) in [
        (
            with(&|e| drop(e.remove(at(e, UP)))),
            format!(
                "DIR/model.safetensors: tensor `{UP}` is missing; expected it with shape [6, 4]; \
                 copy or download all of the model again"
            ),
        ),
        (
            with(&|e| {
                let i = at(e, UP);
                e[i].2 = vec![4, 6];
            }),
            format!(
                "DIR/model.safetensors: tensor `{UP}` has shape [4, 6]; by config.json it should \
                 be [6, 4]; copy or download all of the model again"
            ),
        ),
        (
            with(&|e| {
                let i = at(e, UP);
                e[i].1 = "I32";
            }),
            format!(
                "DIR/model.safetensors: tensor `{UP}` is stored as I32, which is not supported; \
                 supported: F32, BF16, F16, and with a quantization_config or in a GGUF file what \
                 docs/FORMATS.md lists; take the model in one of these"
            ),
        ),
        (
            refusal(|path| {
                let bytes = file(&entries());
                write(path, SINGLE, &bytes[..bytes.len() - 1]);
            }),
            format!(
                "DIR/model.safetensors: truncated: it has {} bytes, but tensor `{NORM}` ends at \
                 byte {total}; copy or download the file again",
                total - 1
            ),
        ),
        (
            refusal(|path| {
                let mut bytes = file(&entries());
                bytes.push(0);
                write(path, SINGLE, &bytes);
            }),
            format!(
                "DIR/model.safetensors: this is no intact safetensors file: it has {} bytes, but \
                 its last tensor ends at {total}",
                total + 1
            ),
        ),
        (
            refusal(|path| write(path, SINGLE, "abc")),
            "DIR/model.safetensors: this is no intact safetensors file: it has 3 bytes; the \
             length of the header alone takes 8"
                .into(),
        ),
        (
            refusal(|path| write(path, SINGLE, &file(&entries())[..40])),
            format!(
                "DIR/model.safetensors: this is no intact safetensors file: it is truncated \
                 inside its header: it has 40 bytes, the header ends at {}",
                8 + u64::from_le_bytes(file(&entries())[..8].try_into().expect("8 bytes"))
            ),
        ),
        (
            refusal(|path| write(path, SINGLE, [0xff; 64])),
            format!(
                "DIR/model.safetensors: this is no intact safetensors file: its first 8 bytes \
                 announce a header of {} bytes; at most 100000000 are allowed",
                u64::MAX
            ),
        ),
    ] {
        assert_eq!(refusal, expected);
    }
}

#[test]
fn ranges_that_overlap_leave_holes_or_lie_are_refused() {
    let x =
        |range: &str| format!(r#""x": {{"dtype": "F32", "shape": [2], "data_offsets": {range}}}"#);
    let y =
        |range: &str| format!(r#""y": {{"dtype": "F32", "shape": [2], "data_offsets": {range}}}"#);
    for (header, words) in [
        (format!("{{{}, {}}}", x("[0, 8]"), y("[4, 12]")), "expected a range from 8 on"),
        (format!("{{{}, {}}}", x("[0, 8]"), y("[9, 17]")), "expected a range from 8 on"),
        (format!("{{{}, {}}}", x("[0, 8]"), y("[8, 20]")), "not what F32 of shape [2] takes"),
        (format!("{{{}, {}}}", x("[8, 0]"), y("[0, 8]")), "expected a range from 8 on"),
        (format!("{{{}, {}}}", x("[0, 8]"), x("[8, 16]")), "names tensor `x` twice"),
        (format!("{{{}}}", x("[-1, 8]")), "no JSON of the format"),
        (
            r#"{"x": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 8]}}"#
                .into(),
            "not what F32",
        ),
        (
            r#"{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 18446744073709551615]}}"#
                .into(),
            "no file is so long",
        ),
        ("[]".into(), "does not begin with `{`"),
        (r#"{"x": 1}"#.into(), "no JSON of the format"),
    ] {
        let refusal = refusal(|path| write(path, SINGLE, raw_file(&header, 16)));
        assert!(refusal.contains(words), "{header}: {refusal}");
    }
}

#[test]
fn files_that_are_missing_or_lead_elsewhere_are_named() {
    let reindexed = |from: &str, to: &str| {
        refusal(|path| {
            split(path);
            let index = fs::read_to_string(path.join(INDEX)).expect("an index");
            write(path, INDEX, index.replace(from, to));
        })
    };
    for (refusal, words) in [
        (refusal(|path| remove(path, CONFIG)), "DIR/config.json: no model here: expected a folder"),
        (refusal(|path| write(path, CONFIG, vec![b' '; 1 << 21])), "at most 1048576 are read"),
        (refusal(|path| write(path, CONFIG, [0xff])), "DIR: config.json is not readable"),
        (refusal(|path| write(path, CONFIG, "{}")), "DIR: config.json: `architectures` is missing"),
        (refusal(|path| remove(path, SINGLE)), "DIR: no weights: expected model.safetensors"),
        (
            refusal(|path| {
                remove(path, SINGLE);
                write(path, "pytorch_model.bin", "");
            }),
            "DIR/pytorch_model.bin: this is no state dict of torch.save that is read: it is no zip",
        ),
        (
            refusal(|path| {
                split(path);
                remove(path, "b.safetensors");
            }),
            "DIR/b.safetensors: ",
        ),
        (
            refusal(|path| {
                split(path);
                write(path, INDEX, "{");
            }),
            "DIR/model.safetensors.index.json: no index of weights",
        ),
        (
            refusal(|path| {
                split(path);
                write(path, INDEX, r#"{"weight_map": {}}"#);
            }),
            "it lists 0 files",
        ),
        (reindexed("a.safetensors", "../a.safetensors"), "expected the name of a .safetensors"),
        (reindexed("a.safetensors", "/etc/passwd"), "expected the name of a .safetensors"),
        (
            reindexed(NORM, "other"),
            "DIR/model.safetensors.index.json: tensor `model.norm.weight` is missing",
        ),
        (reindexed("b.safetensors", "a.safetensors"), "DIR/a.safetensors: tensor `model.layers.0"),
    ] {
        assert!(refusal.contains(words), "expected {words:?} in: {refusal}");
    }
}

#[test]
fn a_missing_or_empty_tokenizer_is_named() {
    let folder = folder();
    let checkpoint = Checkpoint::open(folder.path()).expect("an intact folder");
    let error = checkpoint.check_tokenizer().expect_err("none there");
    assert!(error.to_string().contains("tokenizer.json: it is not there; expected"), "{error}");
    write(folder.path(), TOKENIZER, "");
    assert!(checkpoint.check_tokenizer().is_err());
    write(folder.path(), TOKENIZER, "{}");
    assert!(checkpoint.check_tokenizer().is_ok());
}

#[test]
fn mutated_headers_never_panic() {
    let folder = folder();
    let bytes = file(&entries());
    let mut state = 7u64;
    for _ in 0..200 {
        let mut damaged = bytes.clone();
        for _ in 0..2 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            damaged[(state >> 33) as usize % bytes.len()] = (state >> 25) as u8;
        }
        write(folder.path(), SINGLE, &damaged);
        // Damage of the data is not seen here; whatever is accepted lies inside the file.
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            for tensor in checkpoint.tensors.values() {
                assert!(tensor.offset + tensor.len <= bytes.len() as u64);
            }
        }
    }
}
