//! What files say beside what the models in `tests/fixtures/gguf` say, which `shard-worker/tests/gguf_families.rs`
//! reads.

use std::collections::BTreeMap;

use super::architectures::ARCHITECTURES;
use super::tests::{Writer, text};
use crate::model::{Checkpoint, Family, LayerRope, ModelSpec};

/// Metadata and tensors of F32 of a model that is made up.
#[derive(Clone)]
struct Model {
    architecture: &'static str,
    numbers: BTreeMap<&'static str, u32>,
    reals: BTreeMap<&'static str, f32>,
    tensors: Vec<(String, Vec<u64>)>,
}

impl Model {
    /// Llama of one layer, 8 wide.
    fn llama() -> Self {
        let layer = [
            ("attn_norm", vec![8]),
            ("attn_q", vec![8, 8]),
            ("attn_k", vec![4, 8]),
            ("attn_v", vec![4, 8]),
            ("attn_output", vec![8, 8]),
            ("ffn_norm", vec![8]),
            ("ffn_gate", vec![12, 8]),
            ("ffn_up", vec![12, 8]),
            ("ffn_down", vec![8, 12]),
        ];
        let layer = layer.into_iter().map(|(name, shape)| (format!("blk.0.{name}.weight"), shape));
        let ends = [("token_embd", vec![10, 8]), ("output_norm", vec![8])];
        let ends = ends.into_iter().map(|(name, shape)| (format!("{name}.weight"), shape));
        Self {
            architecture: "llama",
            numbers: BTreeMap::from([
                ("block_count", 1),
                ("context_length", 64),
                ("embedding_length", 8),
                ("feed_forward_length", 12),
                ("attention.head_count", 2),
                ("attention.head_count_kv", 1),
            ]),
            reals: BTreeMap::from([("attention.layer_norm_rms_epsilon", 1e-5)]),
            tensors: ends.chain(layer).collect(),
        }
    }

    fn of(architecture: &'static str) -> Self {
        Self { architecture, ..Self::llama() }
    }

    fn number(mut self, key: &'static str, value: u32) -> Self {
        self.numbers.insert(key, value);
        self
    }

    fn real(mut self, key: &'static str, value: f32) -> Self {
        self.reals.insert(key, value);
        self
    }

    fn tensor(mut self, name: &str, shape: &[u64]) -> Self {
        self.tensors.push((name.to_owned(), shape.to_vec()));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|(tensor, _)| !tensor.contains(name));
        self
    }

    fn open(&self) -> Result<ModelSpec, String> {
        let mut writer = Writer::default().key("general.architecture", 8, &text(self.architecture));
        for (key, value) in &self.numbers {
            writer = writer.key(&format!("{}.{key}", self.architecture), 4, &value.to_le_bytes());
        }
        for (key, value) in &self.reals {
            writer = writer.key(&format!("{}.{key}", self.architecture), 6, &value.to_le_bytes());
        }
        for (name, shape) in &self.tensors {
            let elements: u64 = shape.iter().product();
            writer = writer.tensor(name, shape, 0, 4 * elements as usize);
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        std::fs::write(&file, writer.bytes()).unwrap();
        let opened = Checkpoint::open(&file).map_err(|error| error.to_string())?;
        Ok(opened.spec().clone())
    }

    fn refusal(&self) -> String {
        self.open().expect_err("a refusal")
    }
}

/// Some lists are as long as there are layers: nothing is made of what a file claims.
#[test]
fn more_layers_than_any_model_has_are_refused_before_they_are_counted() {
    for architecture in ARCHITECTURES {
        let reason = Model::of(architecture.name).number("block_count", u32::MAX).refusal();
        assert!(reason.contains("block_count` is 4294967295; at most 1024"), "{reason}");
    }
}

#[test]
fn a_llama_with_a_window_is_a_mistral() {
    assert_eq!(Model::llama().open().unwrap().family, Family::Llama);
    let mistral = Model::llama().number("attention.sliding_window", 21).open().unwrap();
    assert_eq!((mistral.family, mistral.layer(0).window), (Family::Mistral, Some(21)));
}

#[test]
fn layers_see_windows_as_the_file_lists_them_or_as_the_family_has_them() {
    let gemma = Model::of("gemma2")
        .tensor("blk.0.post_attention_norm.weight", &[8])
        .tensor("blk.0.post_ffw_norm.weight", &[8])
        .number("attention.sliding_window", 16)
        .real("attn_logit_softcapping", 50.0);
    assert_eq!(gemma.open().unwrap().layer(0).window, Some(16));
    // Every first one sees all.
    let none = gemma.clone().number("attention.sliding_window_pattern", 1).open().unwrap();
    assert_eq!(none.layer(0).window, None);
    let mut without = gemma;
    without.numbers.remove("attention.sliding_window");
    assert!(without.refusal().contains("gemma2.attention.sliding_window"));
    let third = Model::of("gemma3")
        .tensor("blk.0.post_attention_norm.weight", &[8])
        .tensor("blk.0.post_ffw_norm.weight", &[8])
        .tensor("blk.0.attn_q_norm.weight", &[4])
        .tensor("blk.0.attn_k_norm.weight", &[4]);
    let all = third.open().unwrap();
    assert_eq!((all.layer(0).window, all.layer(0).rope), (None, LayerRope::Global));
    let local = third.number("attention.sliding_window", 16).open().unwrap();
    assert_eq!((local.layer(0).window, local.layer(0).rope), (Some(16), LayerRope::Local));
}

#[test]
fn experts_that_are_tensors_of_their_own_or_fused_are_found() {
    let mixtral = Model::llama()
        .without("ffn_gate")
        .without("ffn_up")
        .without("ffn_down")
        .tensor("blk.0.ffn_gate_inp.weight", &[2, 8])
        .number("expert_count", 2)
        .number("expert_used_count", 1);
    let mut old = mixtral.clone();
    for expert in 0..2 {
        old = old
            .tensor(&format!("blk.0.ffn_gate.{expert}.weight"), &[12, 8])
            .tensor(&format!("blk.0.ffn_up.{expert}.weight"), &[12, 8])
            .tensor(&format!("blk.0.ffn_down.{expert}.weight"), &[8, 12]);
    }
    assert_eq!(old.open().unwrap().family, Family::Mixtral);
    let fused = mixtral
        .tensor("blk.0.ffn_gate_up_exps.weight", &[2, 24, 8])
        .tensor("blk.0.ffn_down_exps.weight", &[2, 8, 12]);
    assert_eq!(fused.open().unwrap(), old.open().unwrap());
    let fused = Model::llama()
        .without("attn_q")
        .without("attn_k")
        .without("attn_v")
        .tensor("blk.0.attn_qkv.weight", &[16, 8]);
    assert_eq!(fused.open().unwrap(), Model::llama().open().unwrap());
}

#[test]
fn what_is_not_known_of_a_file_is_refused_by_name() {
    let deepseek = Model::of("deepseek2")
        .number("rope.dimension_count", 2)
        .number("attention.kv_lora_rank", 4);
    for (model, words) in [
        (Model::of("mamba"), "`general.architecture` is `mamba`; supported: `llama`, `qwen2`"),
        (
            Model::of("olmo2").number("attention.sliding_window", 4096),
            "`olmo2.attention.sliding_window` is 4096",
        ),
        (Model::llama().without("ffn_up"), "tensor `blk.0.ffn_up.weight` is missing"),
        (
            Model::llama().tensor("blk.0.attn_q_norm.weight", &[4]),
            "tensor `blk.0.attn_q_norm.weight`, and LlamaForCausalLM",
        ),
        (
            Model::llama().without("ffn_up").tensor("blk.0.ffn_up.weight", &[12, 9]),
            "tensor `blk.0.ffn_up.weight` has shape [12, 9]",
        ),
        (Model::of("granite"), "`granite.attention.scale` is missing"),
        (
            deepseek.clone().tensor("blk.0.attn_kv_b.weight", &[8, 4]),
            "a converter older than April 2025",
        ),
        (deepseek.clone().number("expert_gating_func", 3), "neither 1 (softmax) nor 2 (sigmoid)"),
        (
            deepseek
                .number("expert_gating_func", 2)
                .number("attention.key_length_mla", 6)
                .number("attention.value_length_mla", 4)
                .number("expert_count", 4)
                .number("expert_used_count", 2)
                .number("expert_feed_forward_length", 8),
            "`deepseek2.expert_group_count`",
        ),
    ] {
        let reason = model.refusal();
        assert!(reason.contains(words), "expected {words:?} in {reason:?}");
    }
    // Factors of rotations are read with the metadata; further predictions are left out.
    let more = Model::llama()
        .number("block_count", 2)
        .number("nextn_predict_layers", 1)
        .tensor("blk.1.nextn.eh_proj.weight", &[8, 16]);
    assert_eq!(more.open().unwrap().layers, 1);
}
