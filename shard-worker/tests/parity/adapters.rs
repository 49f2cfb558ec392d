//! Adapters against `peft`, and every way to compute them against the plain one.

use serde::Deserialize;
use shoal_protocol::id::AdapterId;
use shoal_protocol::model::{Adapter, Checkpoint, ModelSpec};
use shoal_protocol::plan::{Numerics, Precision};

use super::LOGPROB_TOLERANCE;
use super::support::{
    Chain, Dice, LIMITS, Prompt, Rows, Setup, argmax, assert_same_bits, blocks, fixtures,
    log_softmax,
};

const ATTENTION: &str = "llama-attention";
const EVERYTHING: &str = "llama-everything";
const SOME_LAYERS: &str = "llama-some-layers";
const ALL: [&str; 5] = [ATTENTION, EVERYTHING, SOME_LAYERS, "qwen2-everything", "phi3-fused"];

/// What the reference says with an adapter.
#[derive(Deserialize)]
struct Adapted {
    model: String,
    prompts: Vec<AdaptedPrompt>,
}

#[derive(Deserialize)]
struct AdaptedPrompt {
    #[serde(flatten)]
    prompt: Prompt,
    /// Of the same tokens, with the adapter merged into the weights.
    merged_logprobs: Vec<f64>,
}

impl Adapted {
    fn read(name: &str) -> Self {
        let file = fixtures().join("adapters").join(name).join("case.json");
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    }

    fn base(&self) -> Checkpoint {
        Checkpoint::open(&fixtures().join("models").join(&self.model)).unwrap()
    }
}

fn adapter(name: &str, base: &Checkpoint) -> Adapter {
    Adapter::open(&fixtures().join("adapters").join(name), base.spec()).unwrap()
}

/// A chain with one adapter, whose number is 1.
fn chain(name: &str, base: &Checkpoint, setup: &Setup) -> Chain {
    let mut chain = Chain::load(base, setup);
    chain.load_adapter((base, setup), AdapterId(1), &adapter(name, base));
    chain
}

fn transcript(
    chain: &mut Chain,
    id: Option<AdapterId>,
    prompt: &Prompt,
    chunk: usize,
) -> Vec<Vec<f32>> {
    chain.transcript_with(id, (&prompt.inputs(), prompt.first_sampled()), chunk, &blocks())
}

#[test]
fn greedy_continuations_and_logprobs_are_those_of_peft_and_of_the_merged_weights() {
    for name in ALL {
        let case = Adapted::read(name);
        let base = case.base();
        let mut chain = chain(name, &base, &Setup::plain(base.spec()));
        for (index, AdaptedPrompt { prompt, merged_logprobs }) in case.prompts.iter().enumerate() {
            let what = format!("{name} prompt {index}");
            let found = transcript(&mut chain, Some(AdapterId(1)), prompt, 64);
            let tokens: Vec<u32> = found.iter().map(|logits| argmax(logits)).collect();
            assert_eq!(tokens, prompt.continuation_ids, "{what}");
            let first = log_softmax(&found[0]);
            for &(token, expected) in &prompt.first_logprobs {
                let distance = (first[token] - expected).abs();
                assert!(distance < LOGPROB_TOLERANCE, "{what}: token {token}: {distance}");
            }
            for (nth, (logits, token)) in found.iter().zip(&tokens).enumerate() {
                let logprob = log_softmax(logits)[*token as usize];
                for expected in [prompt.chosen_logprobs[nth], merged_logprobs[nth]] {
                    let distance = (logprob - expected).abs();
                    assert!(distance < LOGPROB_TOLERANCE, "{what}: token {nth}: {distance}");
                }
            }
        }
    }
}

/// Pipeline cuts, chunks, threads and the exact reduction over ranks.
fn ways(spec: &ModelSpec) -> Vec<(Setup, usize)> {
    let (plain, layers) = (Setup::plain(spec), spec.layers);
    let cut = |cuts: Vec<u32>| Setup { cuts, ..plain.clone() };
    let ranks = |cuts: Vec<u32>, ranks: Vec<u32>| Setup { ranks, ..cut(cuts) };
    let mut ways = vec![
        (plain.clone(), 1),
        (Setup { threads: 3, ..plain.clone() }, 17),
        (cut(vec![0, layers / 2, layers]), 5),
        (cut(vec![0, 1, layers - 1, layers]), 64),
    ];
    if spec.ranks_max().0 >= 2 {
        ways.push((ranks(vec![0, layers], vec![2]), 7));
        ways.push((ranks(vec![0, 1, layers], vec![2, 1]), 64));
    }
    ways
}

#[test]
fn every_cut_chunk_and_exact_mesh_gives_the_same_bits_with_an_adapter() {
    let mut over_ranks = 0;
    for name in ALL {
        let case = Adapted::read(name);
        let base = case.base();
        let of = |setup: &Setup, chunk| -> Vec<_> {
            let mut chain = chain(name, &base, setup);
            let prompts = case.prompts.iter();
            prompts.map(|p| transcript(&mut chain, Some(AdapterId(1)), &p.prompt, chunk)).collect()
        };
        let expected = of(&Setup::plain(base.spec()), 64);
        for (setup, chunk) in ways(base.spec()) {
            over_ranks += usize::from(setup.ranks.contains(&2));
            for (found, expected) in of(&setup, chunk).iter().zip(&expected) {
                assert_same_bits(
                    found,
                    expected,
                    &format!("{name} {setup:?} in chunks of {chunk}"),
                );
            }
        }
    }
    assert!(over_ranks >= 6, "only {over_ranks} meshes with ranks were compared");
}

#[test]
fn summed_meshes_say_what_the_uncut_model_says_with_an_adapter() {
    let case = Adapted::read(EVERYTHING);
    let base = case.base();
    let plain = Setup::plain(base.spec());
    let summed = Setup { ranks: vec![2], numerics: Numerics::N1Sum, ..plain.clone() };
    let (mut whole, mut cut) =
        (chain(EVERYTHING, &base, &plain), chain(EVERYTHING, &base, &summed));
    for AdaptedPrompt { prompt, .. } in &case.prompts {
        let expected = transcript(&mut whole, Some(AdapterId(1)), prompt, 64);
        let found = transcript(&mut cut, Some(AdapterId(1)), prompt, 64);
        for (found, expected) in found.iter().zip(&expected) {
            let pairs = log_softmax(found).into_iter().zip(log_softmax(expected));
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < LOGPROB_TOLERANCE, "{worst}");
            assert_eq!(argmax(found), argmax(expected));
        }
    }
}

/// A sequence on its way.
struct Sequence {
    adapter: Option<AdapterId>,
    tokens: Vec<u32>,
    blocks: Vec<u32>,
    done: usize,
    logits: Vec<Vec<f32>>,
}

#[test]
fn three_adapters_and_the_base_in_one_batch_each_have_the_bits_that_they_have_alone() {
    let case = Adapted::read(ATTENTION);
    let base = case.base();
    let layers = base.spec().layers;
    let ids = [None, Some(AdapterId(1)), Some(AdapterId(5)), Some(AdapterId(9))];
    let names = [ATTENTION, EVERYTHING, SOME_LAYERS];
    let mut dice = Dice(11);
    for cuts in [vec![0, layers], vec![0, 1, layers], vec![0, 1, 2, layers]] {
        let setup = Setup { cuts, threads: 2, ..Setup::plain(base.spec()) };
        let mut chain = Chain::load(&base, &setup);
        for (id, name) in ids.iter().flatten().zip(names) {
            chain.load_adapter((&base, &setup), *id, &adapter(name, &base));
        }
        let mut sequences: Vec<Sequence> = (0..8)
            .map(|i| Sequence {
                adapter: ids[i % 4],
                tokens: (0..20 + 3 * i).map(|_| dice.below(500) as u32).collect(),
                blocks: (4 * i as u32..4 * i as u32 + 4).collect(),
                done: 0,
                logits: Vec::new(),
            })
            .collect();
        assert!(4 * sequences.len() <= LIMITS.kv_blocks as usize);
        while sequences.iter().any(|s| s.done < s.tokens.len()) {
            dice.shuffle(&mut sequences);
            step(&mut chain, &mut sequences, &mut dice);
        }
        let mut bare = Chain::load(&base, &setup);
        for s in &sequences {
            let chain = if s.adapter.is_none() { &mut bare } else { &mut chain };
            let alone = chain.transcript_with(s.adapter, (&s.tokens, 0), 64, &blocks());
            assert_same_bits(&s.logits, &alone, &format!("{:?} {setup:?}", s.adapter));
        }
    }
}

/// Some rows of each, in one batch.
fn step(chain: &mut Chain, sequences: &mut [Sequence], dice: &mut Dice) {
    let left = |s: &Sequence| s.tokens.len() - s.done;
    let parts: Vec<usize> = sequences.iter().map(|s| dice.below(6).min(left(s))).collect();
    let batch: Vec<Rows<'_>> = sequences
        .iter()
        .zip(&parts)
        .filter(|(_, part)| **part > 0)
        .map(|(s, part)| Rows {
            tokens: &s.tokens[s.done..s.done + part],
            first_position: s.done,
            blocks: &s.blocks,
            sample_from: 0,
            adapter: s.adapter,
        })
        .collect();
    if batch.is_empty() {
        return;
    }
    let mut logits = chain.step(&batch).into_iter();
    for (s, part) in sequences.iter_mut().zip(parts) {
        s.logits.extend(logits.by_ref().take(part));
        s.done += part;
    }
}

/// It went while its sequence was on the way: the sequence must fail, and nobody else.
#[test]
fn rows_of_an_adapter_that_is_not_there_become_no_numbers_and_the_others_keep_their_bits() {
    let case = Adapted::read(ATTENTION);
    let base = case.base();
    let layers = base.spec().layers;
    let setup = Setup { cuts: vec![0, 1, layers], ..Setup::plain(base.spec()) };
    let mut chain = chain(ATTENTION, &base, &setup);
    let tokens: Vec<u32> = (3..20).collect();
    let alone = transcript_of(&mut chain, AdapterId(1), &tokens);
    let others: Vec<u32> = (30..32).collect();
    let rows = |adapter, blocks| Rows {
        tokens: &tokens,
        first_position: 0,
        blocks,
        sample_from: 0,
        adapter: Some(AdapterId(adapter)),
    };
    let logits = chain.step(&[rows(1, &blocks()), rows(2, &others)]);
    assert_same_bits(&logits[..tokens.len()], &alone, "the one that is there");
    assert!(logits[tokens.len()..].iter().flatten().all(|logit| logit.is_nan()));
    // Its blocks serve the next sequence.
    let again = chain.transcript_with(Some(AdapterId(1)), (&tokens, 0), 64, &others);
    assert_same_bits(&again, &alone, "in the same blocks");
}

/// Where one rank alone has forgotten it, and nobody reads that rank's own stream: what the ranks exchange
/// must tell, or sums without its part would look like an answer.
#[test]
fn rows_of_an_adapter_that_one_rank_has_not_become_no_numbers_at_all_ranks() {
    let case = Adapted::read(ATTENTION);
    let base = case.base();
    let layers = base.spec().layers;
    for numerics in [Numerics::N1, Numerics::N1Sum] {
        let cuts = vec![0, 1, layers];
        let setup = Setup { cuts, ranks: vec![2, 1], numerics, ..Setup::plain(base.spec()) };
        let mut chain = chain(ATTENTION, &base, &setup);
        let tokens: Vec<u32> = (3..20).collect();
        let there = transcript_of(&mut chain, AdapterId(1), &tokens);
        assert!(there.iter().flatten().all(|logit| logit.is_finite()));
        assert!(chain.0[0][1].0.unload_adapter(AdapterId(1)));
        let lost = transcript_of(&mut chain, AdapterId(1), &tokens);
        assert!(lost.iter().flatten().all(|logit| logit.is_nan()), "{numerics:?}");
    }
}

/// Over weights in whole numbers, with rows in whole numbers too: an adapter's own products are of values, and its rows
/// have their bits in any chunk, beside others, and over ranks that sum exactly.
#[test]
fn an_adapter_over_whole_numbers_has_the_same_bits_however_it_is_cut() {
    let case = Adapted::read(ATTENTION);
    let base = case.base();
    let numerics = Numerics::N2;
    let plain = Setup { held: Precision::Q8_0, numerics, ..Setup::plain(base.spec()) };
    let tokens: Vec<u32> = (3..40).collect();
    let mut whole = chain(ATTENTION, &base, &plain);
    let expected = transcript_of(&mut whole, AdapterId(1), &tokens);
    let without = whole.transcript_with(None, (&tokens, 0), 64, &blocks());
    assert_ne!(without, expected);
    let chunks = whole.transcript_with(Some(AdapterId(1)), (&tokens, 0), 5, &blocks());
    assert_same_bits(&chunks, &expected, "in chunks");
    let others: Vec<u32> = (30..40).collect();
    let rows = |adapter, blocks| Rows {
        tokens: &tokens,
        first_position: 0,
        blocks,
        sample_from: 0,
        adapter,
    };
    let logits = whole.step(&[rows(None, &blocks()), rows(Some(AdapterId(1)), &others)]);
    assert_same_bits(&logits[..tokens.len()], &without, "without it, beside it");
    assert_same_bits(&logits[tokens.len()..], &expected, "beside another");
    let layers = base.spec().layers;
    let cut = Setup { cuts: vec![0, 1, layers], ranks: vec![2, 1], ..plain.clone() };
    let found = transcript_of(&mut chain(ATTENTION, &base, &cut), AdapterId(1), &tokens);
    assert_same_bits(&found, &expected, "over two ranks and one");
}

fn transcript_of(chain: &mut Chain, id: AdapterId, tokens: &[u32]) -> Vec<Vec<f32>> {
    chain.transcript_with(Some(id), (tokens, 0), 64, &blocks())
}

#[test]
fn an_adapter_that_goes_leaves_the_others_and_the_base_as_they_were() {
    let case = Adapted::read(ATTENTION);
    let base = case.base();
    let setup = Setup::plain(base.spec());
    let prompt = &case.prompts[1].prompt;
    let mut bare = Chain::load(&base, &setup);
    let without = transcript(&mut bare, None, prompt, 64);
    let mut one = chain(ATTENTION, &base, &setup);
    let with = transcript(&mut one, Some(AdapterId(1)), prompt, 64);
    assert_ne!(without, with);
    one.load_adapter((&base, &setup), AdapterId(2), &adapter(EVERYTHING, &base));
    assert_same_bits(
        &transcript(&mut one, Some(AdapterId(1)), prompt, 64),
        &with,
        "a wider one came",
    );
    one.unload_adapter(AdapterId(2));
    assert_same_bits(&transcript(&mut one, Some(AdapterId(1)), prompt, 64), &with, "it went");
    one.unload_adapter(AdapterId(1));
    assert_same_bits(&transcript(&mut one, None, prompt, 64), &without, "all went");
}
