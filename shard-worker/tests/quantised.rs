//! FP8, GPTQ and AWQ checkpoints give the bits of what they stand for. They are packed here by the
//! formats' definitions, with other code than what reads them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::ops::Range;
use std::path::Path;

use serde_json::json;
use shoal_protocol::model::{Checkpoint, ModelSpec, TensorSpec};
use shoal_protocol::plan::{Numerics, Precision};
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::collective::Alone;
use shoal_shard_worker::model::{Batch, Span};
use shoal_shard_worker::stored::e4m3;

use support::stored::{OVER, PACKED};
use support::{Chain, Dice, Setup, assert_close, assert_same_bits, assignment, blocks, load};

/// Sizes that are words of eight, but no whole groups or blocks.
fn llama() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 296,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "vocab_size": 67, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "torch_dtype": "float16", "tie_word_embeddings": false,
    })
}

/// Compressed keys and values, of which the model takes each head's two halves out of one matrix, the first the
/// other way round.
fn deepseek(nope: u32, value: u32) -> serde_json::Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "vocab_size": 67, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "kv_lora_rank": 48, "q_lora_rank": 32, "qk_nope_head_dim": nope, "qk_rope_head_dim": 8,
        "v_head_dim": value, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "torch_dtype": "float16",
    })
}

fn config(quantization: Option<serde_json::Value>) -> String {
    quantised(llama(), quantization)
}

fn quantised(mut config: serde_json::Value, quantization: Option<serde_json::Value>) -> String {
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    config.to_string()
}

/// Name, type, shape, bytes.
type Entry = (String, &'static str, Vec<u64>, Vec<u8>);

fn write(folder: &Path, config: &str, entries: &[Entry]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in entries {
        let start = data.len();
        data.extend(bytes);
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(folder.join("config.json"), config).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn halves_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect()
}

/// Writes a model twice, its layers' matrices as `quantise` says, and compares.
fn check(
    quantization: serde_json::Value,
    stored: Precision,
    quantise: impl Fn(&mut Dice, &TensorSpec) -> (Vec<Entry>, Vec<f32>),
) {
    check_model(llama(), quantization, stored, quantise);
}

fn check_model(
    model: serde_json::Value,
    quantization: serde_json::Value,
    stored: Precision,
    quantise: impl Fn(&mut Dice, &TensorSpec) -> (Vec<Entry>, Vec<f32>),
) {
    let what = format!("{} {quantization}", model["architectures"]);
    let config = |quantization| quantised(model.clone(), quantization);
    let spec = ModelSpec::from_config_json(&config(None)).unwrap();
    let (mut packed, mut plain, mut dice) = (Vec::new(), Vec::new(), Dice(9));
    let mut names = std::collections::BTreeSet::new();
    for part in spec.tensors(LayerRange::new(0, spec.layers)) {
        // Several may be parts of one.
        let shape = part.stored_shape().to_vec();
        let tensor = TensorSpec { shape, excerpt: None, ..part };
        if !names.insert(tensor.name.clone()) {
            continue;
        }
        let elements = tensor.elements() as usize;
        // Published models leave embedding and head as they are.
        if tensor.is_matrix && tensor.layer.is_some() {
            let (entries, values) = quantise(&mut dice, &tensor);
            packed.extend(entries);
            plain.push((tensor.name, "F32", tensor.shape, bytes_of(&values)));
        } else {
            let values: Vec<f32> =
                (0..elements).map(|_| dice.below(2001) as f32 / 1000.0 - 1.0).collect();
            let entry = (tensor.name, "F32", tensor.shape, bytes_of(&values));
            packed.push(entry.clone());
            plain.push(entry);
        }
    }
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    write(folders[0].path(), &config(Some(quantization)), &packed);
    write(folders[1].path(), &config(None), &plain);
    let [packed, plain] = folders.each_ref().map(|folder| Checkpoint::open(folder.path()).unwrap());
    assert_eq!(packed.spec().stored, stored, "{what}");
    let tokens: Vec<u32> = (0..30).map(|_| dice.below(67) as u32).collect();
    let logits = |checkpoint: &Checkpoint, held| {
        let setup = Setup { held, threads: 2, ..Setup::plain(checkpoint.spec()) };
        Chain::load(checkpoint, &setup).transcript(&tokens, 20, 30, &blocks())
    };
    for held in [Precision::F32, Precision::F16, Precision::Q8_0] {
        let (found, expected) = (logits(&packed, held), logits(&plain, held));
        assert_same_bits(&found, &expected, &format!("{what} as {held}"));
    }
    // Each rank reads its rows and columns.
    let ranks = |checkpoint: &Checkpoint, numerics| {
        let setup = Setup {
            held: Precision::F32,
            ranks: vec![2],
            numerics,
            ..Setup::plain(checkpoint.spec())
        };
        Chain::load(checkpoint, &setup).transcript(&tokens, 20, 30, &blocks())
    };
    for numerics in [Numerics::N1, Numerics::N1Sum] {
        let what = format!("{what} over two ranks, {numerics}");
        assert_same_bits(&ranks(&packed, numerics), &ranks(&plain, numerics), &what);
    }
    assert_close(&ranks(&packed, Numerics::N1Sum), &logits(&plain, Precision::F32), &what);
    // Embedding and head are rounded to the precision, too, so those of the layers alone are compared.
    if stored == Precision::Fp8 {
        assert_layer_same(&packed, &plain, 1..2, &what);
    }
}

/// A middle layer held as it is stored has the bits of its values as `f32`.
fn assert_layer_same(packed: &Checkpoint, plain: &Checkpoint, layer: Range<u32>, what: &str) {
    let hidden = |checkpoint: &Checkpoint, held| {
        // Three stages, so that the one in the middle has neither embedding nor head.
        let layers = checkpoint.spec().layers;
        let mut cuts = vec![0, layer.start, layer.end, layers];
        cuts.dedup();
        let setup = Setup { cuts, held, ..Setup::plain(checkpoint.spec()) };
        let stage = setup.cuts.iter().position(|cut| *cut == layer.start).unwrap();
        let assignment = assignment(checkpoint, &setup, stage);
        let mut shard = load(checkpoint, &assignment, 1, setup.isa).unwrap();
        let rows = 5;
        let mut hidden: Vec<f32> = (0..rows * 64).map(|i| (i % 83) as f32 / 41.0 - 1.0).collect();
        let spans =
            [Span { first_row: 0, rows, first_position: 0, blocks: &blocks(), adapter: None }];
        let batch = Batch { spans: &spans, rows, sample_rows: &[] };
        shard.forward(&batch, None, &mut hidden, None, &mut Alone).unwrap();
        hidden
    };
    let (found, expected) = (hidden(packed, Precision::Fp8), hidden(plain, Precision::F32));
    assert_same_bits(&[found], &[expected], what);
}

fn sizes(tensor: &TensorSpec) -> (usize, usize) {
    (tensor.shape[0] as usize, tensor.shape[1] as usize)
}

/// FP8 with one scale for each so many rows and columns.
fn check_fp8(
    model: serde_json::Value,
    quantization: serde_json::Value,
    stored: Precision,
    name: &str,
    block: fn(usize, usize) -> (usize, usize),
) {
    check_model(model, quantization, stored, |dice, tensor| {
        let (rows, columns) = sizes(tensor);
        let (height, width) = block(rows, columns);
        let (down, across) = (rows.div_ceil(height), columns.div_ceil(width));
        let bits: Vec<u8> =
            (0..rows * columns).map(|_| (dice.below(0x78) + dice.below(2) * 0x80) as u8).collect();
        let scales: Vec<f32> =
            (0..down * across).map(|_| (1 + dice.below(999)) as f32 / 60_000.0).collect();
        let value = |i: usize| {
            let (row, column) = (i / columns, i % columns);
            e4m3(bits[i]) * scales[row / height * across + column / width]
        };
        let values = (0..bits.len()).map(value).collect();
        let shape = match (down, across) {
            (1, 1) => vec![],
            _ => vec![down as u64, across as u64],
        };
        let scale_name = tensor.name.replace("weight", name);
        let entries = vec![
            (tensor.name.clone(), "F8_E4M3", tensor.shape.clone(), bits.clone()),
            (scale_name, "F32", shape, bytes_of(&scales)),
        ];
        (entries, values)
    });
}

#[test]
fn fp8_weights_are_their_bits_times_the_scale_of_their_block() {
    let compressed = |strategy: &str| {
        json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups":
            {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": strategy}}}})
    };
    let blocks = json!({"quant_method": "fp8", "weight_block_size": [16, 32]});
    check_fp8(llama(), blocks, Precision::F16, "weight_scale_inv", |_, _| (16, 32));
    let wide = json!({"quant_method": "fp8", "weight_block_size": [16, 128]});
    check_fp8(llama(), wide, Precision::Fp8, "weight_scale_inv", |_, _| (16, 128));
    let (rows, all) = (compressed("channel"), compressed("tensor"));
    check_fp8(llama(), rows, Precision::Fp8, "weight_scale", |_, columns| (1, columns));
    check_fp8(llama(), all, Precision::Fp8, "weight_scale", |rows, columns| (rows, columns));
}

/// As DeepSeek-V3 is published, whose `kv_b_proj` is read head by head.
#[test]
fn parts_of_an_fp8_matrix_have_the_scales_of_where_they_are_in_it() {
    let small = json!({"quant_method": "fp8", "weight_block_size": [16, 32]});
    check_fp8(deepseek(12, 10), small, Precision::F16, "weight_scale_inv", |_, _| (16, 32));
    // A head is one block high, so that both of its halves are held number by number.
    let whole = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    check_fp8(deepseek(72, 56), whole, Precision::Fp8, "weight_scale_inv", |_, _| (128, 128));
    let rows = json!({"quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"weights":
            {"num_bits": 8, "type": "float", "strategy": "tensor"}}}});
    check_fp8(deepseek(12, 10), rows, Precision::Fp8, "weight_scale", |rows, columns| {
        (rows, columns)
    });
}

#[test]
fn an_fp8_weight_that_is_no_number_is_refused_with_its_tensor() {
    let spec = ModelSpec::from_config_json(&config(None)).unwrap();
    let bad = "model.layers.1.mlp.up_proj.weight";
    for (byte, held) in [
        (0x7F, Precision::Fp8),
        (0xFF, Precision::Fp8),
        (0x7F, Precision::F32),
        (0xFF, Precision::Q8_0),
    ] {
        let mut entries = Vec::new();
        for tensor in spec.tensors(LayerRange::new(0, spec.layers)) {
            let elements = tensor.elements() as usize;
            if tensor.name == bad {
                let mut bits = vec![0x38; elements];
                bits[elements / 2] = byte;
                let scale = tensor.name.replace("weight", "weight_scale");
                entries.push((scale, "F32", vec![1], bytes_of(&[0.01])));
                entries.push((tensor.name, "F8_E4M3", tensor.shape, bits));
            } else {
                entries.push((tensor.name, "F32", tensor.shape, bytes_of(&vec![0.5; elements])));
            }
        }
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config(Some(json!({"quant_method": "fp8"}))), &entries);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let setup = Setup { held, ..Setup::plain(checkpoint.spec()) };
        let loaded = load(&checkpoint, &assignment(&checkpoint, &setup, 0), 1, setup.isa);
        let refusal = loaded.map(drop).unwrap_err().to_string();
        assert!(refusal.contains(bad) && refusal.contains("is not a number"), "{refusal}");
    }
}

/// Words of eight numbers of four bits.
fn words(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
    let numbers: Vec<u32> = numbers.collect();
    let word = |eight: &[u32]| (0..8).fold(0_u32, |word, i| word | eight[i] << (4 * i));
    numbers.chunks_exact(8).flat_map(|eight| word(eight).to_le_bytes()).collect()
}

/// `order`: which of eight rows the numbers of a word are.
fn four_bits(
    dice: &mut Dice,
    tensor: &TensorSpec,
    (order, is_gptq, group): ([usize; 8], bool, usize),
    has_groups: bool,
) -> (Vec<Entry>, Vec<f32>) {
    let (rows, columns) = sizes(tensor);
    let groups = columns.div_ceil(group);
    let numbers: Vec<u32> = (0..rows * columns).map(|_| dice.below(16) as u32).collect();
    let zeros: Vec<u32> = (0..groups * rows).map(|_| dice.below(16) as u32).collect();
    let scales: Vec<f32> = (0..groups * rows)
        .map(|_| half::f16::from_f32((1 + dice.below(500)) as f32 / 10_000.0).to_f32())
        .collect();
    let group_of = |column: usize| match has_groups {
        true => (column * 7) % groups,
        false => column / group,
    };
    let offset = if is_gptq { 1.0 } else { 0.0 };
    let value = |i: usize| {
        let (row, column) = (i / columns, i % columns);
        let at = group_of(column) * rows + row;
        (numbers[i] as f32 - (zeros[at] as f32 + offset)) * scales[at]
    };
    let values = (0..rows * columns).map(value).collect();
    let at = |row: usize, column: usize| numbers[row * columns + column];
    let (packed, shape) = if is_gptq {
        let eights = (0..columns / 8).flat_map(|b| (0..rows).map(move |row| (b, row)));
        let numbers = eights.flat_map(|(b, row)| (0..8).map(move |i| (row, b * 8 + i)));
        let packed = words(numbers.map(|(row, column)| at(row, column)));
        (packed, vec![columns as u64 / 8, rows as u64])
    } else {
        let eights = (0..columns).flat_map(|column| (0..rows / 8).map(move |b| (column, b)));
        let numbers =
            eights.flat_map(|(column, b)| (0..8).map(move |i| (b * 8 + order[i], column)));
        let packed = words(numbers.map(|(row, column)| at(row, column)));
        (packed, vec![columns as u64, rows as u64 / 8])
    };
    let zero_order =
        (0..groups).flat_map(|g| (0..rows).map(move |i| (g, i / 8 * 8 + order[i % 8])));
    let zero_words = words(zero_order.map(|(g, row)| zeros[g * rows + row]));
    let name = |end: &str| tensor.name.replace("weight", end);
    let groups_u64 = groups as u64;
    let mut entries = vec![
        (name("qweight"), "I32", shape, packed),
        (name("qzeros"), "I32", vec![groups_u64, rows as u64 / 8], zero_words),
        (name("scales"), "F16", vec![groups_u64, rows as u64], halves_of(&scales)),
    ];
    if has_groups {
        let of: Vec<u8> = (0..columns).flat_map(|c| (group_of(c) as i32).to_le_bytes()).collect();
        entries.push((name("g_idx"), "I32", vec![columns as u64], of));
    }
    (entries, values)
}

#[test]
fn gptq_words_are_columns_of_a_row_and_zeros_are_stored_less_one() {
    for has_groups in [false, true] {
        let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 16});
        let order = [0, 1, 2, 3, 4, 5, 6, 7];
        check(gptq, Precision::F16, |dice, tensor| {
            four_bits(dice, tensor, (order, true, 16), has_groups)
        });
    }
}

#[test]
fn awq_words_are_rows_of_a_column_the_even_ones_first() {
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"});
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    check(awq, Precision::F16, |dice, tensor| four_bits(dice, tensor, (order, false, 8), false));
}

/// What auto-gptq, autoawq and compressed-tensors have packed, and what they unpack of it themselves
/// (`tests/fixtures/make_packed.py`).
#[test]
fn what_the_tools_have_packed_has_the_values_that_they_unpack() {
    let all = support::fixtures().join("packed");
    let folders = std::fs::read_dir(&all).unwrap().map(|folder| folder.unwrap().file_name());
    let mut names: Vec<String> = folders.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, PACKED.map(|(name, _)| name));
    let mut dice = Dice(8);
    let tokens: Vec<u32> = (0..40).map(|_| dice.below(67) as u32).collect();
    for name in names {
        let packed = Checkpoint::open(&all.join(&name)).unwrap();
        let plain = Checkpoint::open(&all.join(&name).join("values")).unwrap();
        let said = |checkpoint: &Checkpoint, ranks, numerics| {
            let held = Precision::F32;
            let ranks = vec![ranks];
            let setup = Setup { held, ranks, numerics, ..Setup::plain(checkpoint.spec()) };
            Chain::load(checkpoint, &setup).transcript(&tokens, 3, 40, &blocks())
        };
        for (over, ranks, numerics) in OVER {
            let (found, expected) = (said(&packed, ranks, numerics), said(&plain, ranks, numerics));
            assert_same_bits(&found, &expected, &format!("{name} over {over}"));
        }
    }
}

#[test]
fn what_does_not_fit_its_weights_is_refused_with_the_arithmetic() {
    let folder = tempfile::tempdir().unwrap();
    let spec = ModelSpec::from_config_json(&config(None)).unwrap();
    let quantization = json!({"quant_method": "fp8", "weight_block_size": [16, 32]});
    let mut entries = Vec::new();
    for tensor in spec.tensors(LayerRange::new(0, spec.layers)) {
        let elements = tensor.elements() as usize;
        if tensor.is_matrix && tensor.layer.is_some() {
            entries.push((tensor.name.clone(), "F8_E4M3", tensor.shape.clone(), vec![0; elements]));
            let name = tensor.name.replace("weight", "weight_scale_inv");
            entries.push((name, "F32", vec![2, 2], vec![0; 16]));
        } else {
            entries.push((tensor.name, "F32", tensor.shape, vec![0; 4 * elements]));
        }
    }
    let refusal = |entries: &[Entry]| {
        write(folder.path(), &config(Some(quantization.clone())), entries);
        Checkpoint::open(folder.path()).unwrap_err().to_string()
    };
    let words = refusal(&entries);
    assert!(words.contains("64 x 64 in blocks of 16 x 32") && words.contains("[4, 2]"), "{words}");
    entries.retain(|(name, ..)| !name.ends_with("scale_inv"));
    let words = refusal(&entries);
    assert!(words.contains("q_proj.weight_scale` is missing"), "{words}");
}
