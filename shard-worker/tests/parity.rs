//! The families against their reference implementation, and every way to compute them against the
//! plain one: the first within what float32 allows, the second in every bit.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "parity/adapters.rs"]
mod adapters;
mod support;

use shoal_protocol::model::ModelSpec;
use shoal_protocol::plan::{KvPrecision, Numerics, Precision};
use shoal_shard_worker::backend::cpu::Isa;

use support::{
    Case, Chain, Dice, FEW_BITS, Prompt, Rows, Setup, argmax, assert_same_bits, blocks, cases,
    cuts_of, log_softmax, random_model, stands_for_family,
};

/// How far a log-probability may be from the reference's.
const LOGPROB_TOLERANCE: f64 = 1e-4;

/// What the plain setup says, by prompt: one row of logits for each token of the continuation.
fn plain(case: &Case) -> Vec<Vec<Vec<f32>>> {
    plain_under(case, Numerics::N1)
}

/// The same under another contract.
fn plain_under(case: &Case, numerics: Numerics) -> Vec<Vec<Vec<f32>>> {
    let checkpoint = case.checkpoint();
    plain_as(case, &Setup { numerics, ..Setup::plain(checkpoint.spec()) })
}

fn plain_as(case: &Case, setup: &Setup) -> Vec<Vec<Vec<f32>>> {
    let mut chain = Chain::load(&case.checkpoint(), setup);
    let transcript = |prompt: &Prompt| {
        let tokens = prompt.inputs();
        chain.transcript(&tokens, prompt.first_sampled(), tokens.len(), &blocks())
    };
    case.prompts.iter().map(transcript).collect()
}

/// Compares other ways to compute every case, each a setup and a chunk size, with the plain one.
fn compare(ways: impl Fn(&Setup) -> Vec<(Setup, usize)>) {
    for case in cases() {
        let expected = plain(&case);
        let checkpoint = case.checkpoint();
        for (setup, chunk) in ways(&Setup::plain(checkpoint.spec())) {
            let mut chain = Chain::load(&checkpoint, &setup);
            for (prompt, expected) in case.prompts.iter().zip(&expected) {
                let tokens = prompt.inputs();
                let found = chain.transcript(&tokens, prompt.first_sampled(), chunk, &blocks());
                let what = format!("{} {setup:?} in chunks of {chunk}", case.name);
                assert_same_bits(&found, expected, &what);
            }
        }
    }
}

#[test]
fn greedy_continuations_and_logprobs_are_those_of_the_reference() {
    for case in cases() {
        let checkpoint = case.checkpoint();
        let mut chain = Chain::load(&checkpoint, &Setup::plain(checkpoint.spec()));
        for (index, prompt) in case.prompts.iter().enumerate() {
            let what = format!("{} prompt {index}", case.name);
            let blocks = blocks();
            let mut step = |tokens: &[u32], first_position, last: usize| {
                let rows = Rows {
                    tokens,
                    first_position,
                    blocks: &blocks,
                    sample_from: last,
                    adapter: None,
                };
                chain.step(&[rows]).remove(0)
            };
            let mut position = prompt.first_sampled();
            let mut logits = step(&prompt.prompt_ids, 0, position);
            let logprobs = log_softmax(&logits);
            for &(token, expected) in &prompt.first_logprobs {
                let distance = (logprobs[token] - expected).abs();
                assert!(distance < LOGPROB_TOLERANCE, "{what}: token {token}: {distance}");
            }
            let mut continuation = Vec::new();
            for &expected in &prompt.chosen_logprobs {
                let token = argmax(&logits);
                let distance = (log_softmax(&logits)[token as usize] - expected).abs();
                let nth = continuation.len();
                assert!(distance < LOGPROB_TOLERANCE, "{what}: token {nth}: {distance}");
                continuation.push(token);
                position += 1;
                logits = step(&[token], position, position);
            }
            assert_eq!(continuation, prompt.continuation_ids, "{what}");
        }
    }
}

#[test]
fn every_split_gives_the_same_bits() {
    let splits = |plain: &Setup| {
        let setups = cuts_of(plain.cuts[1]).into_iter().map(|cuts| Setup { cuts, ..plain.clone() });
        setups.flat_map(|setup| [(setup.clone(), 1), (setup, 64)]).collect()
    };
    compare(splits);
}

#[test]
fn every_chunk_size_gives_the_same_bits() {
    compare(|plain| [1, 3, 7, 16, 50, 256].map(|chunk| (plain.clone(), chunk)).to_vec());
}

#[test]
fn every_number_of_threads_gives_the_same_bits() {
    // The last step of some prompts is then one row, as in decoding.
    let threads = |plain: &Setup| {
        let way = |(threads, chunk)| (Setup { threads, ..plain.clone() }, chunk);
        [(2, 13), (3, 29)].map(way).to_vec()
    };
    compare(threads);
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    assert!(Isa::all().count() >= 2 || cfg!(not(target_arch = "x86_64")));
    let isas = |plain: &Setup| Isa::all().map(|isa| (Setup { isa, ..plain.clone() }, 13)).collect();
    compare(isas);
}

#[test]
fn weights_held_wider_than_stored_give_the_same_bits() {
    compare(|plain| vec![(Setup { held: Precision::F32, ..plain.clone() }, 40)]);
}

/// A sequence that is on its way through a chain in company.
struct Traveller {
    tokens: Vec<u32>,
    sample_from: usize,
    done: usize,
    blocks: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

impl Traveller {
    fn new(tokens: Vec<u32>, sample_from: usize) -> Self {
        Self { tokens, sample_from, done: 0, blocks: Vec::new(), logits: Vec::new() }
    }
}

#[test]
fn company_in_a_batch_changes_no_bit() {
    for (seed, case) in cases().into_iter().enumerate() {
        let setup = Setup { threads: 2, ..Setup::plain(case.checkpoint().spec()) };
        check_company(&case, &plain(&case), &setup, seed as u64);
    }
}

/// Takes the prompts of a case through two stages in company with strangers.
/// Two stages, where there are layers for two.
fn halves(spec: &ModelSpec) -> Vec<u32> {
    match spec.layers {
        1 => vec![0, 1],
        layers => vec![0, layers.div_ceil(2), layers],
    }
}

/// Neither what ranks gather nor what they add depends on who else is in a step, nor on their threads.
#[test]
fn company_changes_no_bit_over_ranks() {
    let all = cases();
    let mut compared = 0;
    for (seed, case) in all.iter().enumerate() {
        let checkpoint = case.checkpoint();
        let spec = checkpoint.spec();
        if !stands_for_family(case, &all) || spec.ranks_max().0 < 2 {
            continue;
        }
        for numerics in [Numerics::N1, Numerics::N1Sum] {
            let setup = Setup { ranks: vec![2, 2], numerics, ..Setup::plain(spec) };
            let mut chain =
                Chain::load(&checkpoint, &Setup { cuts: halves(spec), ..setup.clone() });
            let alone =
                |p: &Prompt| chain.transcript(&p.inputs(), p.first_sampled(), 64, &blocks());
            let expected: Vec<_> = case.prompts.iter().map(alone).collect();
            check_company(case, &expected, &Setup { threads: 2, ..setup }, seed as u64);
            compared += 1;
        }
    }
    assert!(compared >= 30, "only {compared} meshes had company");
}

fn check_company(case: &Case, expected: &[Vec<Vec<f32>>], setup: &Setup, seed: u64) {
    let checkpoint = case.checkpoint();
    let spec = checkpoint.spec();
    let mut chain = Chain::load(&checkpoint, &Setup { cuts: halves(spec), ..setup.clone() });
    let mut dice = Dice(seed);
    let mut free: Vec<u32> = (0..support::LIMITS.kv_blocks).collect();
    dice.shuffle(&mut free);
    let mut travellers: Vec<Traveller> =
        case.prompts.iter().map(|p| Traveller::new(p.inputs(), p.first_sampled())).collect();
    for length in [90, 33] {
        let tokens = (0..length).map(|_| dice.below(spec.vocab as usize) as u32).collect();
        travellers.push(Traveller::new(tokens, dice.below(length)));
    }
    while travellers.iter().any(|t| t.done < t.tokens.len()) {
        travel(&mut chain, &mut travellers, &mut free, &mut dice);
    }
    for (index, expected) in expected.iter().enumerate() {
        // The order of the travellers changes on the way; the tokens tell who is who.
        let tokens = case.prompts[index].inputs();
        let found = travellers.iter().find(|t| t.tokens == tokens).unwrap();
        assert_same_bits(&found.logits, expected, &format!("{} prompt {index}", case.name));
    }
}

/// One model of each way to attend: grouped heads, windows, sinks, a compressed cache.
const CACHES: [&str; 5] =
    ["llama2-gqa3-bf16", "qwen3-tied-bf16", "gemma3-bf16", "gpt-oss-bf16", "deepseek2-lite"];

#[test]
fn a_cache_of_fewer_bits_gives_the_same_bits_in_every_way() {
    let cases: Vec<Case> = cases().into_iter().filter(|c| CACHES.contains(&&*c.name)).collect();
    assert_eq!(cases.len(), CACHES.len());
    for (seed, case) in cases.iter().enumerate() {
        let whole = plain(case);
        let checkpoint = case.checkpoint();
        let spec = checkpoint.spec();
        for kv in [KvPrecision::Bf16, KvPrecision::Q8_0] {
            let numerics = Numerics::N1.with_kv(kv);
            let expected = plain_under(case, numerics);
            assert!(expected != whole, "{}: nothing was rounded to {kv}", case.name);
            let setup = Setup { numerics, ..Setup::plain(spec) };
            let mut ways = vec![
                (Setup { cuts: (0..=spec.layers).collect(), ..setup.clone() }, 1),
                (Setup { threads: 3, ..setup.clone() }, 29),
                (Setup { cuts: vec![0, 1, spec.layers], ..setup.clone() }, 64),
            ];
            if spec.ranks_max().0 > 1 {
                ways.push((Setup { ranks: vec![2], ..setup.clone() }, 16));
            }
            ways.extend(Isa::all().map(|isa| (Setup { isa, ..setup.clone() }, 13)));
            for (setup, chunk) in ways {
                let mut chain = Chain::load(&checkpoint, &setup);
                for (prompt, expected) in case.prompts.iter().zip(&expected) {
                    let tokens = prompt.inputs();
                    let first = prompt.first_sampled();
                    let found = chain.transcript(&tokens, first, chunk, &blocks());
                    assert_same_bits(&found, expected, &format!("{} {setup:?}", case.name));
                }
            }
            check_company(case, &expected, &setup, seed as u64);
        }
    }
}

/// One step with a random part of each sequence, in random order, on blocks granted as they come.
fn travel(chain: &mut Chain, travellers: &mut [Traveller], free: &mut Vec<u32>, dice: &mut Dice) {
    dice.shuffle(travellers);
    let mut parts = Vec::new();
    for traveller in travellers.iter_mut() {
        let rows = dice.below(12).min(traveller.tokens.len() - traveller.done);
        while traveller.blocks.len() * 16 < traveller.done + rows {
            traveller.blocks.push(free.pop().unwrap());
        }
        parts.push(rows);
    }
    let batch: Vec<Rows<'_>> = travellers
        .iter()
        .zip(&parts)
        .filter(|(_, rows)| **rows > 0)
        .map(|(t, rows)| Rows {
            tokens: &t.tokens[t.done..t.done + rows],
            first_position: t.done,
            blocks: &t.blocks,
            sample_from: t.sample_from,
            adapter: None,
        })
        .collect();
    if batch.is_empty() {
        return;
    }
    let mut logits = chain.step(&batch).into_iter();
    for (traveller, rows) in travellers.iter_mut().zip(parts) {
        let sampled = (traveller.done + rows).saturating_sub(traveller.sample_from).min(rows);
        traveller.logits.extend(logits.by_ref().take(sampled));
        traveller.done += rows;
    }
    assert!(logits.next().is_none());
}

#[test]
fn every_family_in_few_bits_gives_the_same_bits_over_stages_ranks_and_in_company() {
    let (held, kv) = FEW_BITS;
    let all = cases();
    for case in all.iter().filter(|case| stands_for_family(case, &all)) {
        let checkpoint = case.checkpoint();
        let spec = checkpoint.spec();
        let numerics = Numerics::N1.with_kv(kv);
        let setup = Setup { held, numerics, ..Setup::plain(spec) };
        let expected = plain_as(case, &setup);
        let mut ways = vec![(Setup { cuts: (0..=spec.layers).collect(), ..setup.clone() }, 7)];
        if spec.ranks_max().0 > 1 {
            ways.push((Setup { ranks: vec![2], ..setup.clone() }, 33));
        }
        for (setup, chunk) in ways {
            let mut chain = Chain::load(&checkpoint, &setup);
            for (prompt, expected) in case.prompts.iter().zip(&expected) {
                let tokens = prompt.inputs();
                let found = chain.transcript(&tokens, prompt.first_sampled(), chunk, &blocks());
                assert_same_bits(&found, expected, &format!("{} {setup:?}", case.name));
            }
        }
        check_company(case, &expected, &setup, 4);
    }
}

/// Large enough that every operation is shared between threads and every cut of the kernels is
/// taken, which the fixtures are not.
#[test]
fn a_wider_model_gives_the_same_bits_in_every_way() {
    let config = r#"{
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 328, "intermediate_size": 1100,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "num_hidden_layers": 2, "vocab_size": 2001, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "dtype": "bfloat16", "tie_word_embeddings": true
    }"#;
    let (_folder, checkpoint) = random_model(config);
    let mut dice = Dice(3);
    let tokens: Vec<u32> = (0..60).map(|_| dice.below(2001) as u32).collect();
    let sample_from = tokens.len() - 4;
    let plain = Setup::plain(checkpoint.spec());
    let transcript = |setup: &Setup, chunk| {
        Chain::load(&checkpoint, setup).transcript(&tokens, sample_from, chunk, &blocks())
    };
    let expected = transcript(&plain, 60);
    let fastest = Isa::best();
    for (cuts, threads, isa, chunk) in [
        (vec![0, 2], 2, fastest, 60),
        (vec![0, 1, 2], 3, fastest, 60),
        (vec![0, 2], 3, fastest, 17),
        (vec![0, 1, 2], 2, fastest, 1),
    ]
    .into_iter()
    .chain(Isa::all().map(|isa| (vec![0, 2], 2, isa, 60)))
    {
        let setup = Setup { cuts, threads, isa, ..plain.clone() };
        let what = format!("{setup:?} in chunks of {chunk}");
        assert_same_bits(&transcript(&setup, chunk), &expected, &what);
    }
}
