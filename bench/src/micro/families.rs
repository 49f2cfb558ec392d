//! What a token costs in each family of decoders, against Llama's at equal bytes.
//!
//! Models of random weights, all as wide and as deep: one MLP of the same width, or as many experts of a row as are
//! as wide together. What cannot be equal (a compressed cache, an MLP without a gate) is divided out by the bytes
//! that a token reads, to which its arithmetic is proportional.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use half::bf16;
use serde_json::{Map, Value, json};
use shoal_coordinator::control::shape::ModelShape;
use shoal_protocol::model::{Checkpoint, Family, ModelSpec};
use shoal_protocol::plan::{BLOCK_TOKENS, Numerics, Precision, ReplicaLimits};
use shoal_protocol::units::LayerRange;

use super::whole::Whole;
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;

/// Tokens of the prompt, and those that are decoded behind it in each round.
const PROMPT: usize = 16;
const TOKENS: usize = 12;

/// How much longer than Llama's a token may take without a reason.
const GOAL: f64 = 1.1;

const LAYERS: u32 = 6;
const HIDDEN: u32 = 1024;
const HEADS: u32 = 16;
const WIDTH: u32 = 2816;
const VOCAB: u32 = 4099;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 4,
    context_max: 4 * BLOCK_TOKENS,
    step_rows_max: PROMPT as u32,
    sequences_max: 1,
    steps_in_flight_max: 1,
};

/// Why a family's tokens take longer, where they do.
fn reason(family: Family) -> Option<&'static str> {
    match family {
        Family::DeepSeek2 | Family::DeepSeek3 => Some(
            "each head reads the compressed cache in its whole width, and takes its query and its values there and \
             back with two small products",
        ),
        _ => None,
    }
}

/// The fields of a family's `config.json` beside the sizes that all have.
fn fields(family: Family) -> Value {
    match family {
        Family::Mixtral | Family::GptOss => {
            json!({"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": WIDTH / 2})
        }
        Family::Qwen2Moe => json!({
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH / 4,
            "shared_expert_intermediate_size": WIDTH / 2
        }),
        Family::Qwen3Moe => json!({
            "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": WIDTH / 4
        }),
        Family::DeepSeek2 | Family::DeepSeek3 => json!({
            "num_key_value_heads": HEADS, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH / 4, "n_shared_experts": 2,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1
        }),
        Family::Granite => json!({"attention_multiplier": 0.125, "logits_scaling": 8.0}),
        _ => json!({}),
    }
}

fn config(family: Family) -> Value {
    let mut config = json!({
        "architectures": [family.architecture()], "model_type": family.model_type(),
        "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS / 2, "head_dim": HIDDEN / HEADS, "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "layer_norm_eps": 1e-5, "norm_epsilon": 1e-5, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16"
    });
    if let (Some(config), Value::Object(fields)) = (config.as_object_mut(), fields(family)) {
        config.extend(fields);
    }
    config
}

/// Writes a model of a family with random weights.
fn write(family: Family, folder: &Path) -> Result<()> {
    let config = config(family).to_string();
    std::fs::write(folder.join("config.json"), &config)?;
    let spec = ModelSpec::from_config_json(&config)?;
    let (mut header, mut names, mut offset) = (Map::new(), BTreeSet::new(), 0u64);
    let mut lengths: Vec<(u64, u64)> = Vec::new();
    for tensor in spec.tensors(LayerRange::new(0, spec.layers)) {
        // Several may be parts of one that is stored.
        if !names.insert(tensor.name.clone()) {
            continue;
        }
        let shape = tensor.stored_shape();
        let elements: u64 = shape.iter().product();
        let inputs = if tensor.is_matrix { shape.last().copied().unwrap_or(1) } else { 1 };
        let (data, end) = (offset, offset + 2 * elements);
        header.insert(
            tensor.name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [data, end]}),
        );
        lengths.push((elements, inputs));
        offset = end;
    }
    let header = Value::Object(header).to_string();
    let file = std::fs::File::create(folder.join("model.safetensors"))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut bits = 0x9E37_79B9_7F4A_7C15_u64;
    for (elements, inputs) in lengths {
        // What goes through a matrix keeps its size; vectors are small numbers.
        let scale = if inputs > 1 { (3.0 / inputs as f32).sqrt() } else { 0.1 };
        for _ in 0..elements {
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            let unit = (bits >> 40) as f32 / (1 << 23) as f32 - 1.0;
            out.write_all(&bf16::from_f32(unit * scale).to_le_bytes())?;
        }
    }
    out.flush()?;
    Ok(())
}

/// A family's model.
struct Model {
    whole: Whole,
    /// What a token reads of weights.
    bytes: u64,
}

impl Model {
    fn load(folder: &Path, held: Precision) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let mut whole = Whole::load(&checkpoint, (held, Numerics::N1), LIMITS)?;
        let shape = ModelShape::Checkpoint(checkpoint.spec().clone());
        let bytes = (0..LAYERS).map(|layer| shape.step_bytes(layer, held).0).sum();
        let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| 7 * i + 1).collect();
        whole.step(&prompt, 0, PROMPT - 1)?;
        Ok(Self { whole, bytes })
    }

    /// Milliseconds a token, decoded one by one behind the prompt.
    fn token_ms(&mut self) -> Result<f64> {
        let start = Instant::now();
        for token in 0..TOKENS {
            // Not the same experts each time.
            self.whole.step(&[(131 * token as u32 + 17) % VOCAB], PROMPT + token, 0)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e3 / TOKENS as f64)
    }
}

/// Runs it.
pub fn run(pairs: usize) -> Result<Section> {
    let mut section = Section::new(
        "Families",
        format!(
            "Random models of {LAYERS} layers, {HIDDEN} wide, {HEADS} heads of {}, an MLP of {WIDTH} or experts of a row that are as \
             wide together; one thread, {TOKENS} tokens decoded behind {PROMPT}, taken in turn with Llama's. The ratio is that of \
             milliseconds a token and byte of weights that it reads. The goal is {GOAL} at most, or a reason.",
            HIDDEN / HEADS
        ),
    );
    let root = tempfile::tempdir()?;
    let folder = |family: Family| root.path().join(family.model_type());
    let make = |family: Family| -> Result<()> {
        std::fs::create_dir_all(folder(family))?;
        write(family, &folder(family)).with_context(|| format!("{family:?}"))
    };
    make(Family::Llama)?;
    let precisions = [Precision::F32, Precision::Q8_0];
    let mut llamas = precisions
        .iter()
        .map(|held| Model::load(&folder(Family::Llama), *held))
        .collect::<Result<Vec<_>>>()?;
    let others = |family: &&Family| !matches!(family, Family::Llama | Family::Encoder);
    for family in Family::ALL.iter().filter(others) {
        make(*family)?;
        for (llama, held) in llamas.iter_mut().zip(precisions) {
            let mut other = Model::load(&folder(*family), held)
                .with_context(|| format!("{family:?}, {held}"))?;
            compare(&mut section, (*family, held), [llama, &mut other], pairs)?;
        }
        std::fs::remove_dir_all(folder(*family))?;
    }
    Ok(section)
}

fn compare(
    section: &mut Section,
    (family, held): (Family, Precision),
    mut models: [&mut Model; 2],
    pairs: usize,
) -> Result<()> {
    let mut series = [Series::default(), Series::default()];
    for model in &mut models {
        model.token_ms()?;
    }
    for pair in 0..pairs {
        for which in [pair % 2, 1 - pair % 2] {
            series[which].push(models[which].token_ms()?);
        }
    }
    let [llama, other] = series;
    let bytes = models[1].bytes as f64 / models[0].bytes as f64;
    let ratio = other.over(&llama).map(|ratio| ratio / bytes);
    let seen = format!(
        "{ratio} ({} ms, Llama {} ms; {} of its bytes)",
        significant(other.median()),
        significant(llama.median()),
        significant(bytes)
    );
    let what = format!("{}, {held}", family.model_type());
    let met = ratio.median() <= GOAL;
    match reason(family).filter(|_| !met) {
        Some(reason) => section.judged(what, seen, format!("≤ {GOAL}, or: {reason}"), true),
        None => section.judged(what, seen, format!("≤ {GOAL}"), met),
    }
    Ok(())
}
