//! Stages cut over tensor ranks against the same stage uncut: the same bits under `n1`, which gathers,
//! and within what float32 allows under `n1-sum`, which adds partial sums.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use bytes::Bytes;
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, ModelSpec, Split};
use shoal_protocol::plan::{Numerics, Precision};
use shoal_shard_worker::backend::cpu::CpuOps;
use shoal_shard_worker::collective::local::Local;
use shoal_shard_worker::collective::{Collective, CollectiveError};
use shoal_shard_worker::model::{Batch, Span};

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

/// Vocabularies of one block and of three, so that of two or three ranks one holds more rows than another or none at
/// all, in the families that do something of their own with an embedding or with logits.
#[test]
fn vocabularies_in_uneven_rows_say_the_same_scaled_tied_and_capped() {
    let common = r#""hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
        "head_dim": 12, "intermediate_size": 70, "max_position_embeddings": 512, "torch_dtype": "float32""#;
    let mut compared = 0;
    for (kind, more) in [
        // A scaled embedding which is the head too, and capped logits.
        (
            "Gemma2",
            r#""rms_norm_eps": 1e-5, "sliding_window": 20, "query_pre_attn_scalar": 14,
                "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0,
                "hidden_activation": "gelu_pytorch_tanh""#,
        ),
        (
            "Gemma3",
            r#""rms_norm_eps": 1e-5, "sliding_window": 19, "sliding_window_pattern": 2,
                "query_pre_attn_scalar": 10, "hidden_activation": "gelu_pytorch_tanh",
                "rope_local_base_freq": 10000.0"#,
        ),
        // Scaled logits of the tied embedding.
        ("Cohere", r#""layer_norm_eps": 1e-5, "logit_scale": 0.3, "use_qk_norm": false"#),
        ("Cohere2", r#""layer_norm_eps": 1e-5, "logit_scale": 0.3, "sliding_window": 18"#),
        // Multipliers on the embedding, on what is added to the stream, on scores and on logits.
        (
            "Granite",
            r#""rms_norm_eps": 1e-5, "embedding_multiplier": 1.5, "residual_multiplier": 0.8,
                "attention_multiplier": 0.2, "logits_scaling": 0.5, "tie_word_embeddings": true"#,
        ),
        (
            "Granite",
            r#""rms_norm_eps": 1e-5, "embedding_multiplier": 1.5, "residual_multiplier": 0.8,
                "attention_multiplier": 0.2, "logits_scaling": 0.5, "tie_word_embeddings": false"#,
        ),
    ] {
        for vocab in [1003, 3001] {
            let (_folder, checkpoint) = random_model(&format!(
                r#"{{"architectures": ["{kind}ForCausalLM"], "vocab_size": {vocab}, {common}, {more}}}"#
            ));
            let rows = |rank, ranks| {
                let setup = Setup { ranks: vec![ranks], ..Setup::plain(checkpoint.spec()) };
                setup.part(checkpoint.spec(), 0, rank).vocab.len()
            };
            for ranks in [2, 3] {
                let all: Vec<usize> = (0..ranks).map(|rank| rows(rank, ranks)).collect();
                assert_eq!(all.iter().sum::<usize>(), vocab, "{kind}");
                assert!(all.iter().any(|rows| *rows != all[0]), "{kind}: {all:?} rows are even");
            }
            let mut dice = Dice(21);
            let mut question = |len| (0..len).map(|_| dice.below(vocab) as u32).collect();
            let questions: Vec<Question> = vec![(question(30), 3), (question(17), 3)];
            compared += compare(&format!("{kind}, {vocab} tokens"), &checkpoint, &questions);
        }
    }
    assert_eq!(compared, 6 * 2 * 2 * 5, "meshes: of two and three ranks, and those of two stages");
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

/// Counts the rounds of a rank, and the bytes that came in them.
struct Counted {
    end: Local,
    rounds: u64,
    bytes: u64,
}

impl Collective for Counted {
    fn split(&self) -> Split {
        self.end.split()
    }

    fn exchange(&mut self, parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError> {
        let got = self.end.exchange(parts)?;
        self.rounds += 1;
        self.bytes += got.iter().map(|part| part.len() as u64).sum::<u64>();
        Ok(got)
    }
}

/// What the ranks of a stage tell each other for one token: rounds, and the bytes that come to all of them together.
fn told(checkpoint: &Checkpoint, ranks: u32, numerics: Numerics) -> (u64, u64) {
    let setup = Setup { ranks: vec![ranks], numerics, ..Setup::plain(checkpoint.spec()) };
    let one = |rank: u32, end: Local| {
        let assignment = support::assignment_of(checkpoint, &setup, 0, rank);
        let mut model = support::load(checkpoint, &assignment, 1, setup.isa).unwrap();
        let spans =
            [Span { first_row: 0, rows: 1, first_position: 0, blocks: &[0], adapter: None }];
        let batch = Batch { spans: &spans, rows: 1, sample_rows: &[0] };
        let mut hidden = vec![f32::NAN; model.hidden()];
        let mut logits = vec![f32::NAN; model.vocab().len()];
        let mut peers = Counted { end, rounds: 0, bytes: 0 };
        let out = Some(logits.as_mut_slice());
        model.forward(&batch, Some(&[5]), &mut hidden, out, &mut peers).unwrap();
        (peers.rounds, peers.bytes)
    };
    let counts: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let ends = (0..).zip(Local::stage(ranks));
        let threads: Vec<_> = ends.map(|(r, end)| scope.spawn(move || one(r, end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(counts.iter().all(|count| count.0 == counts[0].0), "ranks count other rounds");
    (counts[0].0, counts.iter().map(|count| count.1).sum())
}

/// What the guide and `docs/decisions/024` state, and the planner counts with: the rounds of a layer for one token, and
/// the numbers (of four bytes) that each rank gets the others' parts of, or the whole partial sums.
#[test]
fn a_layer_takes_the_rounds_and_the_bytes_that_are_stated() {
    let common = r#""hidden_size": 64, "vocab_size": 307, "num_attention_heads": 12, "num_key_value_heads": 6,
        "head_dim": 8, "intermediate_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "torch_dtype": "float32""#;
    let (hidden, query, keys, inner) = (64, 96, 48, 96);
    for (kind, more, exact, gathered, norm) in [
        ("Llama", "", 4, query + hidden + inner + hidden, 0),
        (
            "Mixtral",
            r#", "num_local_experts": 6, "num_experts_per_tok": 3"#,
            3,
            query + hidden + 3 * hidden,
            0,
        ),
        (
            "Qwen2Moe",
            r#", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 96"#,
            5,
            query + hidden + 2 * hidden + 96 + hidden,
            0,
        ),
        // One norm over all queries and keys, which are gathered under either contract.
        ("Olmo2", "", 4, query + hidden + inner + hidden, query + keys),
    ] {
        for ranks in [2, 3] {
            for (numerics, rounds, values) in [
                (Numerics::N1, exact, gathered),
                (Numerics::N1Sum, 2, u64::from(ranks) * 2 * hidden),
            ] {
                let of = |layers: u32| {
                    let (_folder, checkpoint) = random_model(&format!(
                        r#"{{"architectures": ["{kind}ForCausalLM"], "num_hidden_layers": {layers}, {common}{more}}}"#
                    ));
                    told(&checkpoint, ranks, numerics)
                };
                let (two, three) = (of(2), of(3));
                let of_layer = (three.0 - two.0, three.1 - two.1);
                let rounds = rounds + u64::from(norm > 0);
                let bytes = 4 * (values + norm) * u64::from(ranks - 1);
                assert_eq!(of_layer, (rounds, bytes), "{kind} on {ranks} ranks, {numerics}");
            }
        }
    }
}
