//! Stages cut over tensor ranks against the same stage uncut: the same bits under `n1`, which gathers,
//! and within what float32 allows under `n1-sum`, which adds partial sums.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, ModelSpec};
use shoal_protocol::plan::{Numerics, Precision};
use shoal_shard_worker::backend::cpu::CpuOps;

use support::{
    Case, Chain, Dice, Setup, assert_close, assert_same_bits, blocks, cases, random_model,
};

/// A sequence and the position from which on its logits are compared.
type Question = (Vec<u32>, usize);

/// Numbers of ranks, by stage, that a model can have.
fn meshes(spec: &ModelSpec) -> Vec<(Vec<u32>, Vec<u32>)> {
    let (most, _) = spec.ranks_max();
    let mut meshes: Vec<_> = (2..=most).map(|ranks| (vec![0, spec.layers], vec![ranks])).collect();
    if spec.layers >= 2 && most >= 2 {
        let cuts = vec![0, 1, spec.layers];
        meshes.extend([
            (cuts.clone(), vec![2, 2]),
            (cuts.clone(), vec![1, most]),
            (cuts, vec![most, 1]),
        ]);
    }
    meshes
}

fn setups(spec: &ModelSpec, numerics: Numerics) -> Vec<Setup> {
    let setup = |(cuts, ranks)| Setup { cuts, ranks, numerics, ..Setup::plain(spec) };
    meshes(spec).into_iter().map(setup).collect()
}

fn transcripts(
    checkpoint: &Checkpoint,
    setup: &Setup,
    questions: &[Question],
    chunk: usize,
) -> Vec<Vec<Vec<f32>>> {
    let mut chain = Chain::load(checkpoint, setup);
    let of = |(tokens, from): &Question| chain.transcript(tokens, *from, chunk, &blocks());
    questions.iter().map(of).collect()
}

fn questions(case: &Case) -> Vec<Question> {
    case.prompts.iter().map(|p| (p.inputs(), p.first_sampled())).collect()
}

/// Compares every mesh of a model with the uncut one.
fn compare(name: &str, checkpoint: &Checkpoint, questions: &[Question]) -> usize {
    let spec = checkpoint.spec();
    let plain = transcripts(checkpoint, &Setup::plain(spec), questions, 64);
    let mut compared = 0;
    for setup in setups(spec, Numerics::N1) {
        let found = transcripts(checkpoint, &setup, questions, 5);
        for (found, expected) in found.iter().zip(&plain) {
            assert_same_bits(found, expected, &format!("{name}, {:?} exact", setup.ranks));
        }
        compared += 1;
    }
    for setup in setups(spec, Numerics::N1Sum) {
        let what = format!("{name}, {:?} summed", setup.ranks);
        let found = transcripts(checkpoint, &setup, questions, 64);
        for (found, expected) in found.iter().zip(&plain) {
            assert_close(found, expected, &what);
        }
        // The same mesh repeats itself, however the prompt is cut.
        for (again, first) in transcripts(checkpoint, &setup, questions, 7).iter().zip(&found) {
            assert_same_bits(again, first, &what);
        }
        compared += 1;
    }
    compared
}

#[test]
fn every_mesh_of_the_reference_models_says_what_the_uncut_one_says() {
    let compared: usize =
        cases().iter().map(|case| compare(&case.name, &case.checkpoint(), &questions(case))).sum();
    assert!(compared >= 40, "only {compared} meshes were compared");
}

/// Seven groups on two to five ranks, panels that do not divide, a vocabulary of 5,003: five blocks.
#[test]
fn shares_that_are_not_equal_say_the_same() {
    for (tied, kind) in [(false, "Llama"), (true, "Qwen2")] {
        let (_folder, checkpoint) = random_model(&format!(
            r#"{{"architectures": ["{kind}ForCausalLM"], "hidden_size": 112, "head_dim": 16,
                "intermediate_size": 300, "num_attention_heads": 14, "num_key_value_heads": 7,
                "num_hidden_layers": 2, "vocab_size": 5003, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 512, "tie_word_embeddings": {tied},
                "torch_dtype": "float32"}}"#
        ));
        let mut dice = Dice(5);
        let questions: Vec<Question> =
            [30, 17].map(|len| ((0..len).map(|_| dice.below(5003) as u32).collect(), 3)).to_vec();
        assert!(compare(kind, &checkpoint, &questions) >= 12);
    }
}

/// Five experts and a shared one, three heads of a compressed cache, norms over all heads, sinks: none of
/// which three ranks share evenly.
#[test]
fn experts_and_heads_that_are_not_shared_evenly_say_the_same() {
    let common = r#""hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 307, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "torch_dtype": "float32", "norm_topk_prob": true"#;
    let heads = r#""num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12"#;
    for (kind, more) in [
        ("Mixtral", format!(r#"{heads}, "intermediate_size": 36, "num_local_experts": 5, "num_experts_per_tok": 3"#)),
        (
            "Qwen2Moe",
            format!(
                r#"{heads}, "intermediate_size": 70, "num_experts": 7, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 20, "shared_expert_intermediate_size": 50, "mlp_only_layers": [0]"#
            ),
        ),
        (
            "GptOss",
            format!(r#"{heads}, "intermediate_size": 28, "num_local_experts": 4, "num_experts_per_tok": 2"#),
        ),
        ("Olmo2", format!(r#"{heads}, "intermediate_size": 70"#)),
        (
            "DeepseekV3",
            r#""num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 70,
                "kv_lora_rank": 24, "q_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
                "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
                "moe_intermediate_size": 20, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1"#
                .to_owned(),
        ),
    ] {
        let (_folder, checkpoint) = random_model(&format!(
            r#"{{"architectures": ["{kind}ForCausalLM"], {common}, {more}}}"#
        ));
        let mut dice = Dice(9);
        let questions: Vec<Question> =
            [30, 17].map(|len| ((0..len).map(|_| dice.below(307) as u32).collect(), 3)).to_vec();
        assert_eq!(checkpoint.spec().ranks_max().0, 3, "{kind}");
        assert!(compare(kind, &checkpoint, &questions) >= 10, "{kind}");
    }
}

/// Borders that panels would have inside of blocks: of 32 in the MLP, of 128 and 256 among heads, too.
#[test]
fn ranks_of_weights_in_blocks_hold_the_numbers_of_the_uncut_model() {
    let (_folder, checkpoint) = random_model(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "head_dim": 64,
            "intermediate_size": 800, "num_attention_heads": 6, "num_key_value_heads": 6,
            "num_hidden_layers": 2, "vocab_size": 307, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "torch_dtype": "float32"}"#,
    );
    let spec = checkpoint.spec();
    let mut dice = Dice(3);
    let question: Question = ((0..20).map(|_| dice.below(307) as u32).collect(), 3);
    let mut compared = 0;
    for held in Precision::ALL {
        let plain = Setup { held, ..Setup::plain(spec) };
        let expected = transcripts(&checkpoint, &plain, std::slice::from_ref(&question), 20);
        let (most, _) = spec.ranks_max_held(Reduction::Sum, held);
        for ranks in 2..=most.min(3) {
            let summed = Setup { ranks: vec![ranks], numerics: Numerics::N1Sum, ..plain.clone() };
            let found = transcripts(&checkpoint, &summed, std::slice::from_ref(&question), 20);
            assert_close(&found[0], &expected[0], &format!("{held} on {ranks} ranks"));
            compared += 1;
        }
    }
    assert!(compared >= 12, "only {compared} meshes were compared");
}

#[test]
fn a_rank_holds_its_part_and_what_was_planned_for_it() {
    let (_folder, checkpoint) = random_model(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 256, "head_dim": 32,
            "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
            "num_hidden_layers": 2, "vocab_size": 4096, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "torch_dtype": "bfloat16"}"#,
    );
    for numerics in [Numerics::N1, Numerics::N1Sum] {
        let setup = Setup { ranks: vec![2], numerics, ..Setup::plain(checkpoint.spec()) };
        let read = std::sync::atomic::AtomicU64::new(0);
        for rank in 0..2 {
            let assignment = support::assignment_of(&checkpoint, &setup, 0, rank);
            let options = shoal_shard_worker::model::LoadOptions {
                threads: std::num::NonZeroUsize::MIN,
                on_progress: &|done, total| {
                    if done == total {
                        read.fetch_add(done.0, std::sync::atomic::Ordering::Relaxed);
                    }
                },
                cancel: &std::sync::atomic::AtomicBool::new(false),
            };
            let ops = CpuOps::new(1, setup.isa).unwrap();
            shoal_shard_worker::model::load_shard(ops, &checkpoint, &assignment, &options).unwrap();
        }
        // Every matrix once: a rank reads its rows or columns and nothing else.
        let spec = checkpoint.spec();
        let all = spec.tensors(shoal_protocol::units::LayerRange::new(0, 2));
        let matrices: u64 = all.iter().filter(|t| t.is_matrix).map(|t| t.elements() * 2).sum();
        assert_eq!(read.into_inner(), matrices, "{numerics}");
    }
}
