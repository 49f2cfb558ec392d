//! Files that hold the same model in other ways give the same bits.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use shoal_protocol::model::{Checkpoint, ModelSpec, StoredType, TensorRole, TensorSpec};
use shoal_protocol::plan::{Numerics, Precision};
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::stored::decode_row;

use support::stored::{GGUF_BLOCKS, GGUF_WRITTEN, OVER, TORCH};
use support::{
    Case, Chain, Dice, Setup, assert_close, assert_same_bits, assignment, blocks, cases, fixtures,
    load, random_model,
};

fn case(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap()
}

/// The logits of a case's first prompt and its continuation.
fn transcript(case: &Case, checkpoint: &Checkpoint, held: Precision) -> Vec<Vec<f32>> {
    let prompt = &case.prompts[0];
    let tokens = prompt.inputs();
    let setup = Setup { held, ..Setup::plain(checkpoint.spec()) };
    Chain::load(checkpoint, &setup).transcript(&tokens, prompt.first_sampled(), 16, &blocks())
}

#[test]
fn a_gguf_file_of_the_ecosystem_gives_the_bits_of_the_folder() {
    for name in GGUF_WRITTEN {
        let case = case(name);
        let folder = case.checkpoint();
        let file = fixtures().join("gguf").join(format!("{name}.gguf"));
        let gguf = Checkpoint::open(&file).unwrap();
        assert_eq!(gguf.spec(), folder.spec(), "{name}");
        assert_ne!(gguf.fingerprint(), folder.fingerprint(), "{name}");
        let expected = transcript(&case, &folder, Precision::F32);
        assert_same_bits(&transcript(&case, &gguf, Precision::F32), &expected, name);
        let split = Setup {
            cuts: vec![0, 1, folder.spec().layers],
            threads: 2,
            ..Setup::plain(folder.spec())
        };
        if folder.spec().layers > 1 {
            let tokens = case.prompts[0].inputs();
            let from = case.prompts[0].first_sampled();
            let way = |checkpoint| {
                Chain::load(checkpoint, &split).transcript(&tokens, from, 7, &blocks())
            };
            assert_same_bits(&way(&gguf), &way(&folder), name);
        }
    }
}

#[test]
fn a_gguf_file_of_several_types_is_near_the_folder_it_was_made_of() {
    let case = case("qwen2-many-files");
    let file = fixtures().join("gguf/qwen2-many-files-q8_0.gguf");
    let gguf = Checkpoint::open(&file).unwrap();
    // Blocks and halves: as blocks of bytes unless asked.
    assert_eq!(gguf.spec().stored, Precision::Q8_0);
    let expected = transcript(&case, &case.checkpoint(), Precision::F32);
    for held in [Precision::F32, Precision::Q8_0] {
        let found = transcript(&case, &gguf, held);
        let pairs = || found.iter().flatten().zip(expected.iter().flatten());
        let error: f64 = pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let size: f64 = pairs().map(|(_, b)| f64::from(*b).powi(2)).sum();
        assert!(error.sqrt() < 0.1 * size.sqrt(), "{held}: {}", (error / size).sqrt());
    }
}

#[test]
fn a_folder_with_one_gguf_file_is_that_file() {
    let folder = tempfile::tempdir().unwrap();
    let from = fixtures().join("gguf");
    let copy = |name: &str| std::fs::copy(from.join(name), folder.path().join(name)).unwrap();
    copy("qwen3-tied-bf16.gguf");
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert!(opened.gguf().is_some());
    copy("qwen2-tied-bf16.gguf");
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("several GGUF files") && error.contains("qwen2-tied"), "{error}");
}

#[test]
fn a_state_dict_of_torch_gives_the_bits_of_the_folder() {
    let case = case(TORCH);
    let folder = fixtures().join("torch").join(TORCH);
    let torch = Checkpoint::open(&folder).unwrap();
    let folder = case.checkpoint();
    assert_eq!(torch.spec(), folder.spec());
    let expected = transcript(&case, &folder, Precision::F32);
    assert_same_bits(&transcript(&case, &torch, Precision::F32), &expected, "torch");
}

/// A model whose matrices are whole blocks of 256.
const WIDE: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 301, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "torch_dtype": "float32", "tie_word_embeddings": false
}"#;

/// A tensor's values in the model's order.
fn values(checkpoint: &Checkpoint, tensor: &TensorSpec) -> Vec<f32> {
    let at = checkpoint.locate(&tensor.name).unwrap();
    let file = std::fs::read(&at.file).unwrap();
    let mut values = vec![0.0; tensor.elements() as usize];
    decode_row(at.dtype, &file[at.offset as usize..][..at.len as usize], &mut values);
    values
}

/// As llama.cpp's converter: rows `i` and `i + dim / 2` of each head beside each other.
fn turned(values: &[f32], columns: usize, dim: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks(columns).collect();
    let from = |row: usize| row / dim * dim + row % dim / 2 + row % 2 * (dim / 2);
    (0..rows.len()).flat_map(|row| rows[from(row)].to_vec()).collect()
}

/// Candle writes the model as a GGUF file, every matrix as this type.
fn write_gguf(checkpoint: &Checkpoint, dtype: GgmlDType, to: &Path) {
    write_gguf_parts(checkpoint, dtype, &[to]);
}

/// The same in parts, the metadata in the first.
fn write_gguf_parts(checkpoint: &Checkpoint, dtype: GgmlDType, to: &[&Path]) {
    let spec = checkpoint.spec();
    let name_of = |tensor: &TensorSpec| {
        let name = tensor.name.replace("model.layers.", "blk.");
        [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ]
        .iter()
        .fold(name, |name, (from, to)| name.replace(from, to))
    };
    let tensors: Vec<(String, QTensor)> = spec
        .tensors(LayerRange::new(0, spec.layers))
        .iter()
        .map(|tensor| {
            let mut found = values(checkpoint, tensor);
            if matches!(tensor.role, TensorRole::Query | TensorRole::Key) {
                found = turned(&found, spec.hidden as usize, spec.head_dim as usize);
            }
            let shape: Vec<usize> = tensor.shape.iter().map(|n| *n as usize).collect();
            let found = Tensor::from_vec(found, shape, &Device::Cpu).unwrap();
            let dtype = if tensor.is_matrix { dtype } else { GgmlDType::F32 };
            (name_of(tensor), QTensor::quantize(&found, dtype).unwrap())
        })
        .collect();
    use gguf_file::Value::{F32, I32, String as Text, U16, U32};
    let values: Vec<(&str, gguf_file::Value)> = vec![
        ("general.architecture", Text("llama".into())),
        ("llama.block_count", U32(spec.layers)),
        ("llama.embedding_length", U32(spec.hidden)),
        ("llama.feed_forward_length", U32(spec.intermediate)),
        ("llama.attention.head_count", U32(spec.heads)),
        ("llama.attention.head_count_kv", U32(spec.kv_heads)),
        ("llama.attention.layer_norm_rms_epsilon", F32(spec.norm_eps)),
        ("llama.context_length", U32(spec.context_max)),
        ("llama.rope.dimension_count", U32(spec.head_dim)),
    ];
    for (number, file) in to.iter().enumerate() {
        let mut values = if number == 0 { values.clone() } else { Vec::new() };
        if to.len() > 1 {
            values.push(("split.no", U16(number as u16)));
            values.push(("split.count", U16(to.len() as u16)));
            values.push(("split.tensors.count", I32(tensors.len() as i32)));
        }
        let values: Vec<_> = values.iter().map(|(key, value)| (*key, value)).collect();
        let own = tensors.iter().skip(number).step_by(to.len());
        let own: Vec<_> = own.map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut std::fs::File::create(file).unwrap(), &values, &own).unwrap();
    }
}

/// The same model with what the blocks of a file stand for as plain values.
fn write_plain(config: &str, gguf: &Checkpoint, to: &Path) {
    let spec = ModelSpec::from_config_json(config).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in spec.tensors(LayerRange::new(0, spec.layers)) {
        let start = data.len();
        let found = values(gguf, &tensor);
        let order = gguf.locate(&tensor.name).unwrap().order;
        let columns = *tensor.shape.last().unwrap() as usize;
        let mut rows = vec![&[][..]; found.len() / columns];
        for (row, values) in (0..).zip(found.chunks(columns)) {
            rows[order.model_row(row) as usize] = values;
        }
        data.extend(rows.concat().iter().flat_map(|value| value.to_le_bytes()));
        let info = serde_json::json!({
            "dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()],
        });
        header.insert(tensor.name, info);
    }
    let header = serde_json::Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(to.join("config.json"), config).unwrap();
    let bytes = [&length, header.as_bytes(), &data].concat();
    std::fs::write(to.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn every_type_of_block_gives_the_bits_of_what_it_stands_for() {
    let (_folder, model) = random_model(WIDE);
    let mut dice = Dice(5);
    let tokens: Vec<u32> = (0..40).map(|_| dice.below(301) as u32).collect();
    let logits = |checkpoint: &Checkpoint, held| {
        let setup = Setup { held, threads: 2, ..Setup::plain(checkpoint.spec()) };
        Chain::load(checkpoint, &setup).transcript(&tokens, 30, 40, &blocks())
    };
    for stored in GGUF_BLOCKS {
        let dtype = match stored {
            StoredType::Q4_0 => GgmlDType::Q4_0,
            StoredType::Q4_1 => GgmlDType::Q4_1,
            StoredType::Q5_0 => GgmlDType::Q5_0,
            StoredType::Q5_1 => GgmlDType::Q5_1,
            StoredType::Q8_0 => GgmlDType::Q8_0,
            StoredType::Q4K => GgmlDType::Q4K,
            StoredType::Q5K => GgmlDType::Q5K,
            StoredType::Q6K => GgmlDType::Q6K,
            other => panic!("{other} is no type of blocks"),
        };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        write_gguf(&model, dtype, &file);
        let gguf = Checkpoint::open(&file).unwrap();
        assert_eq!(gguf.locate("lm_head.weight").unwrap().dtype, stored);
        write_plain(WIDE, &gguf, folder.path());
        let plain = Checkpoint::open(folder.path()).unwrap();
        let expected = logits(&plain, Precision::F32);
        assert_same_bits(&logits(&gguf, Precision::F32), &expected, &format!("{stored} as f32"));
        // Each rank reads its rows and columns, also where a border is inside of a block.
        for (over, ranks, numerics) in OVER {
            let ranks = |checkpoint: &Checkpoint, held| {
                let ranks = vec![ranks];
                let setup = Setup { held, numerics, ranks, ..Setup::plain(checkpoint.spec()) };
                Chain::load(checkpoint, &setup).transcript(&tokens, 30, 40, &blocks())
            };
            let split = ranks(&plain, Precision::F32);
            let what = format!("{stored} over {over}");
            assert_same_bits(&ranks(&gguf, Precision::F32), &split, &what);
            if stored.held().is_some() && stored.block().0 == 32 {
                // Where columns are cut, what is held in blocks is cut between them, and f32 anywhere.
                let found = ranks(&gguf, stored.held().unwrap());
                match numerics {
                    Numerics::N1 => assert_same_bits(&found, &split, &what),
                    _ => assert_close(&found, &expected, &what),
                }
            }
        }
        // Held as they are stored, blocks are what they stand for.
        if let Some(held) = stored.held() {
            assert_eq!(gguf.spec().stored, held);
            assert_same_bits(&logits(&gguf, held), &expected, &format!("{stored} as {held}"));
        }
    }
}

#[test]
fn blocks_in_parts_are_held_as_they_are_stored() {
    let (_folder, model) = random_model(WIDE);
    let mut dice = Dice(6);
    let tokens: Vec<u32> = (0..20).map(|_| dice.below(301) as u32).collect();
    for (dtype, held, ranks) in
        [(GgmlDType::Q4K, Precision::Q4K, 1), (GgmlDType::Q8_0, Precision::Q8_0, 2)]
    {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("whole.gguf");
        write_gguf(&model, dtype, &file);
        let parts = [1, 2, 3].map(|n| folder.path().join(format!("parts-0000{n}-of-00003.gguf")));
        write_gguf_parts(&model, dtype, &[&parts[0], &parts[1], &parts[2]]);
        let (whole, parts) =
            (Checkpoint::open(&file).unwrap(), Checkpoint::open(&parts[1]).unwrap());
        assert_eq!((whole.spec(), parts.spec().stored), (parts.spec(), held));
        for ranks in 1..=ranks {
            let logits = |checkpoint: &Checkpoint| {
                let (cuts, ranks) = (vec![0, 1, 2], vec![ranks, ranks]);
                let setup = Setup { cuts, ranks, ..Setup::plain(checkpoint.spec()) };
                Chain::load(checkpoint, &setup).transcript(&tokens, 10, 20, &blocks())
            };
            assert_same_bits(&logits(&parts), &logits(&whole), &format!("{held}, {ranks} ranks"));
        }
    }
}

#[test]
fn experts_in_mxfp4_are_held_as_they_are_stored_and_the_rest_beside_them() {
    let case = case("gpt-oss-mxfp4");
    let checkpoint = case.checkpoint();
    assert_eq!(checkpoint.spec().stored, Precision::Mxfp4);
    let expected = transcript(&case, &checkpoint, Precision::F32);
    for held in [Precision::Mxfp4, Precision::Bf16] {
        let what = format!("MXFP4 held as {held}");
        assert_same_bits(&transcript(&case, &checkpoint, held), &expected, &what);
    }
    let all = LayerRange::new(0, checkpoint.spec().layers);
    let bytes = |held: Precision, experts: bool| -> u64 {
        let tensors = checkpoint.tensors(all).into_iter();
        let own = tensors.filter(|t| t.is_matrix && t.role.is_expert_matrix() == experts);
        own.map(|tensor| tensor.held_bytes(held).0).sum()
    };
    assert_eq!(bytes(Precision::Mxfp4, true) * 64, bytes(Precision::Bf16, true) * 17);
    assert_eq!(bytes(Precision::Mxfp4, false), bytes(Precision::Bf16, false));
}

#[test]
fn an_exponent_of_mxfp4_that_is_none_is_refused_with_its_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let from = fixtures().join("models/gpt-oss-mxfp4");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), folder.path().join(file)).unwrap();
    }
    let name = "model.layers.1.mlp.experts.down_proj";
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let location = checkpoint.locate(name).unwrap();
    let scales = location.scales.as_deref().unwrap().parts()[0].offset;
    let file = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[scales as usize] = 255;
    std::fs::write(&file, bytes).unwrap();
    for held in [Precision::Mxfp4, Precision::F32] {
        let setup = Setup { held, ..Setup::plain(checkpoint.spec()) };
        let loaded = load(&checkpoint, &assignment(&checkpoint, &setup, 0), 1, setup.isa);
        let refusal = loaded.map(drop).unwrap_err().to_string();
        assert!(refusal.contains(name) && refusal.contains("255 stands for"), "{refusal}");
    }
}
