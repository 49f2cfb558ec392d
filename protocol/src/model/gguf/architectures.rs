//! What llama.cpp calls the families, and which of their metadata stand for what in `config.json`.
//!
//! What every architecture has is read in `config`; a row here says what else one has.

use serde_json::{Map, Value as Json, json};

use super::config::{Source, no_window, turn_window};
use crate::model::spec::Family;

/// One of llama.cpp's architectures.
pub(super) struct Architecture {
    /// What `general.architecture` calls it.
    pub(super) name: &'static str,
    /// The family; some architectures stand for two.
    pub(super) family: fn(&Source<'_>) -> Family,
    /// The key of what norms add, and its word in `config.json`.
    pub(super) eps: (&'static str, &'static str),
    /// Whether rows of q and k stand in the order of a rotation of neighbours, though the model's is not one.
    pub(super) is_turned: bool,
    /// The word for biases on queries, keys and values; empty: the family always or never has them.
    pub(super) bias: &'static str,
    /// What else there is.
    pub(super) more: fn(&Source<'_>, &mut Words) -> Result<(), String>,
}

/// A `config.json` in the making.
pub(super) type Words = Map<String, Json>;

const RMS: (&str, &str) = ("attention.layer_norm_rms_epsilon", "rms_norm_eps");
const LAYER: &str = "attention.layer_norm_epsilon";

impl Architecture {
    /// One that is much like Llama.
    const fn of(name: &'static str, family: fn(&Source<'_>) -> Family) -> Self {
        Self {
            name,
            family,
            eps: RMS,
            is_turned: false,
            bias: "attention_bias",
            more: |source, _| no_window(source),
        }
    }
}

/// All that are read.
pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { is_turned: true, more: llama, ..Architecture::of("llama", llama_family) },
    Architecture { bias: "", ..Architecture::of("qwen2", |_| Family::Qwen2) },
    Architecture::of("qwen3", |_| Family::Qwen3),
    Architecture {
        bias: "qkv_bias",
        more: qwen2_moe,
        ..Architecture::of("qwen2moe", |_| Family::Qwen2Moe)
    },
    Architecture { more: qwen3_moe, ..Architecture::of("qwen3moe", |_| Family::Qwen3Moe) },
    Architecture { bias: "", more: phi3, ..Architecture::of("phi3", |_| Family::Phi3) },
    Architecture::of("olmo2", |_| Family::Olmo2),
    Architecture {
        is_turned: true,
        more: granite,
        ..Architecture::of("granite", |_| Family::Granite)
    },
    Architecture {
        is_turned: true,
        more: smollm3,
        ..Architecture::of("smollm3", |_| Family::SmolLm3)
    },
    Architecture { more: gemma2, ..Architecture::of("gemma2", |_| Family::Gemma2) },
    Architecture { more: gemma3, ..Architecture::of("gemma3", |_| Family::Gemma3) },
    Architecture {
        eps: (LAYER, "layer_norm_eps"),
        more: cohere,
        ..Architecture::of("command-r", |_| Family::Cohere)
    },
    Architecture {
        eps: (LAYER, "layer_norm_eps"),
        more: cohere2,
        ..Architecture::of("cohere2", |_| Family::Cohere2)
    },
    Architecture {
        eps: (LAYER, "norm_epsilon"),
        bias: "use_bias",
        more: turn_window,
        ..Architecture::of("starcoder2", |_| Family::StarCoder2)
    },
    Architecture { more: gpt_oss, ..Architecture::of("gpt-oss", |_| Family::GptOss) },
    Architecture { bias: "", more: deepseek, ..Architecture::of("deepseek2", deepseek_family) },
];

/// Mistral's and Mixtral's files say `llama`, too. Mistral is one with a window; without one it is Llama.
fn llama_family(source: &Source<'_>) -> Family {
    match (source.number("expert_count"), source.window()) {
        (Some(experts), _) if experts > 0 => Family::Mixtral,
        (_, Some(_)) => Family::Mistral,
        _ => Family::Llama,
    }
}

fn llama(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    if (source.architecture.family)(source) == Family::Mixtral {
        words.insert("num_local_experts".into(), json!(source.whole("expert_count")?));
        words.insert("num_experts_per_tok".into(), json!(source.whole("expert_used_count")?));
    }
    turn_window(source, words)
}

/// How many experts, of how many rows; layers without are dense.
fn qwen_experts(source: &Source<'_>, words: &mut Words, normalise: bool) -> Result<(), String> {
    no_window(source)?;
    words.insert("num_experts".into(), json!(source.whole("expert_count")?));
    words.insert("num_experts_per_tok".into(), json!(source.whole("expert_used_count")?));
    words.insert("moe_intermediate_size".into(), json!(source.expert_width()?));
    // Not in the metadata but for a few: as the published models of the family.
    let normalise = source.flag("expert_weights_norm").unwrap_or(normalise);
    words.insert("norm_topk_prob".into(), json!(normalise));
    words.insert("decoder_sparse_step".into(), json!(1));
    let layers = source.layers()?;
    let dense = |layer: &u64| !source.has(&format!("blk.{layer}.ffn_gate_inp.weight"));
    words.insert("mlp_only_layers".into(), (0..layers).filter(dense).collect());
    Ok(())
}

fn qwen2_moe(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    let shared = source.rows_of("ffn_gate_shexp.weight");
    let shared = source.number("expert_shared_feed_forward_length").or(shared);
    words.insert("shared_expert_intermediate_size".into(), json!(shared));
    qwen_experts(source, words, false)
}

fn qwen3_moe(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    qwen_experts(source, words, true)
}

fn phi3(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    let original = source.number("rope.scaling.original_context_length");
    words.insert("original_max_position_embeddings".into(), json!(original));
    let head_dim = source.head_dim()?;
    if let Some(rotated) = source.number("rope.dimension_count").filter(|dim| *dim != head_dim) {
        // The quarter keeps the product over its whole number.
        let partial = (rotated as f64 + 0.25) / head_dim as f64;
        words.insert("partial_rotary_factor".into(), json!(partial));
    }
    turn_window(source, words)
}

fn granite(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    no_window(source)?;
    for (key, word) in
        [("embedding_scale", "embedding_multiplier"), ("residual_scale", "residual_multiplier")]
    {
        words.insert(word.into(), json!(source.real(key)));
    }
    words.insert("attention_multiplier".into(), source.needed("attention.scale")?);
    words.insert("logits_scaling".into(), source.needed("logit_scale")?);
    Ok(())
}

fn smollm3(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    words.insert("no_rope_layer_interval".into(), json!(4));
    no_window(source)
}

/// Which layers see a window alone: as the file lists them, else all but every so-many-th.
fn windows(source: &Source<'_>, words: &mut Words, every: u64) -> Result<(), String> {
    turn_window(source, words)?;
    let layers = source.layers()?;
    let has_window = source.window().is_some();
    let of = |is_local: bool| if is_local && has_window { "sliding" } else { "full" };
    let types: Vec<String> = source
        .window_pattern(layers, every)?
        .into_iter()
        .map(|is_local| format!("{}_attention", of(is_local)))
        .collect();
    words.insert("layer_types".into(), json!(types));
    Ok(())
}

/// What Gemma's scores are scaled by, which the format has no key for: the width of a head, and in the
/// largest model of either generation what a head has of the stream.
fn gemma(source: &Source<'_>, words: &mut Words, largest: u64) -> Result<(), String> {
    let scalar = match source.layers()? == largest {
        true => source.whole("embedding_length")? / source.whole("attention.head_count")?.max(1),
        false => source.head_dim()?,
    };
    words.insert("query_pre_attn_scalar".into(), json!(scalar));
    for (key, word) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ] {
        let cap = source.real(key).filter(|cap| *cap > 0.0);
        words.insert(word.into(), json!(cap));
    }
    Ok(())
}

fn gemma2(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    source.whole("attention.sliding_window")?;
    gemma(source, words, 46)?;
    windows(source, words, 2)
}

fn gemma3(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    gemma(source, words, 62)?;
    let local = source.real("rope.freq_base_swa").unwrap_or(10_000.0);
    words.insert("rope_local_base_freq".into(), json!(local));
    windows(source, words, 6)
}

fn cohere(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    words.insert("logit_scale".into(), source.needed("logit_scale")?);
    words.insert("use_qk_norm".into(), json!(source.has("blk.0.attn_q_norm.weight")));
    no_window(source)
}

fn cohere2(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    words.insert("logit_scale".into(), source.needed("logit_scale")?);
    source.whole("attention.sliding_window")?;
    windows(source, words, 4)
}

fn gpt_oss(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    words.insert("num_local_experts".into(), json!(source.whole("expert_count")?));
    words.insert("num_experts_per_tok".into(), json!(source.whole("expert_used_count")?));
    words.insert("intermediate_size".into(), json!(source.expert_width()?));
    if let Some(Json::Object(scaling)) = words.get_mut("rope_scaling") {
        // As all published models have it; the format has no key for it.
        scaling.insert("truncate".into(), json!(false));
    }
    source.whole("attention.sliding_window")?;
    windows(source, words, 2)
}

/// V3 scores its experts one by one. The format's numbers: 1 softmax, 2 sigmoid.
const SIGMOID: u64 = 2;

fn deepseek_family(source: &Source<'_>) -> Family {
    match source.number("expert_gating_func") {
        Some(SIGMOID) => Family::DeepSeek3,
        _ => Family::DeepSeek2,
    }
}

fn deepseek(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    no_window(source)?;
    if source.number("expert_gating_func").is_some_and(|func| func == 0 || func > SIGMOID) {
        let name = source.architecture.name;
        return Err(format!("`{name}.expert_gating_func` is neither 1 (softmax) nor 2 (sigmoid)"));
    }
    let is_third = deepseek_family(source) == Family::DeepSeek3;
    let (rope, heads) =
        (source.whole("rope.dimension_count")?, source.whole("attention.head_count")?);
    if !source.has("blk.0.attn_k_b.weight") && source.has("blk.0.attn_kv_b.weight") {
        return Err(
            "its `attn_kv_b` is not divided into `attn_k_b` and `attn_v_b`: it was made by a \
                    converter older than April 2025; download a newer file, or convert it again"
                .to_owned(),
        );
    }
    let key = source.whole("attention.key_length_mla")?;
    let nope = key.checked_sub(rope).ok_or("a head's keys are narrower than their rotated part")?;
    let q_rank = source.number("attention.q_lora_rank");
    for (word, value) in [
        // Compressed they are one head's in the file.
        ("num_key_value_heads", json!(heads)),
        ("q_lora_rank", json!(q_rank)),
        ("kv_lora_rank", json!(source.whole("attention.kv_lora_rank")?)),
        ("qk_rope_head_dim", json!(rope)),
        ("qk_nope_head_dim", json!(nope)),
        ("v_head_dim", json!(source.whole("attention.value_length_mla")?)),
        ("n_routed_experts", json!(source.whole("expert_count")?)),
        ("num_experts_per_tok", json!(source.whole("expert_used_count")?)),
        ("moe_intermediate_size", json!(source.expert_width()?)),
        ("n_shared_experts", json!(source.number("expert_shared_count").filter(|n| *n > 0))),
        ("first_k_dense_replace", json!(source.number("leading_dense_block_count").unwrap_or(0))),
        ("routed_scaling_factor", json!(source.real("expert_weights_scale"))),
        ("norm_topk_prob", json!(source.flag("expert_weights_norm").unwrap_or(false))),
    ] {
        words.insert(word.into(), value);
    }
    let groups = source.number("expert_group_count");
    let kept = source.number("expert_group_used_count");
    match (groups, kept) {
        // Small models of V2 have no groups, and older files do not say so.
        (None, _) if !is_third && q_rank.is_none() => {}
        (Some(1), _) if !is_third => {}
        (Some(groups), Some(kept)) => {
            words.insert("n_group".into(), json!(groups));
            words.insert("topk_group".into(), json!(kept));
            words.insert("topk_method".into(), json!("group_limited_greedy"));
        }
        _ => {
            return Err(format!(
                "it does not say in which groups experts are chosen (`{0}.expert_group_count` and \
                 `{0}.expert_group_used_count`): it was made by an older converter; download a newer \
                 file, or convert it again",
                source.architecture.name
            ));
        }
    }
    if let Some(Json::Object(scaling)) = words.get_mut("rope_scaling")
        && let Some(tenth) = source.real("rope.scaling.yarn_log_multiplier")
    {
        // A tenth of what config.json has, of which published models have at most three digits.
        let mscale = (tenth * 1e5).round() / 1e4;
        scaling.insert("mscale".into(), json!(mscale));
        scaling.insert("mscale_all_dim".into(), json!(mscale));
    }
    Ok(())
}
