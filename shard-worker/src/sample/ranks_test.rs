#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use super::*;

const BLOCK: usize = logsumexp::BLOCK;

fn sampling(temperature: f32, top_k: u32, top_p: f32) -> SamplingRecord {
    SamplingRecord {
        seed: 7,
        temperature,
        top_k,
        top_p,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logprobs: NO_LOGPROBS,
        stream: 3,
    }
}

/// A row of some shape; `flat` ones need the whole row for a top-p.
fn row(seed: u32, len: usize, size: f32) -> Vec<f32> {
    let mixed = |i: u32| i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(97_003)) >> 9;
    (0..len as u32).map(|i| (mixed(i) % 4001) as f32 / 4000.0 * size).collect()
}

/// Draws five tokens one after the other, whole and cut at `borders`.
fn compare(sampling: SamplingRecord, size: f32, len: usize, borders: &[usize]) -> usize {
    let (mut whole, mut cut) = {
        let open = || SamplerState::open(3, &[5, 9, 5], sampling);
        (open(), open())
    };
    let mut scratch = Scratch::default();
    let mut gathered = 0;
    for position in 2..7 {
        let logits = row(position, len, size);
        let expected = whole.draw(&mut scratch, &logits, position).unwrap();
        let mut told = Vec::new();
        for border in borders.windows(2) {
            let own = (border[0] as u32, &logits[border[0]..border[1]]);
            let summary = cut.summarise(&mut scratch, own, position).unwrap();
            told.push(summary);
        }
        let found = cut.decide(&mut scratch, &told).unwrap().unwrap_or_else(|| {
            gathered += 1;
            cut.draw(&mut scratch, &logits, position).unwrap()
        });
        assert_eq!(found.token, expected.token, "{sampling:?} cut at {borders:?}");
        assert_eq!(found.logprob.to_bits(), expected.logprob.to_bits());
        assert_eq!(found.candidates, expected.candidates);
    }
    assert_eq!(whole, cut);
    gathered
}

#[test]
fn every_cut_draws_what_the_whole_row_draws() {
    let len = 5 * BLOCK + 300;
    let cuts: [&[usize]; 4] = [
        &[0, len],
        &[0, 2 * BLOCK, len],
        &[0, 0, BLOCK, 4 * BLOCK, len],
        &[0, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK, 5 * BLOCK, len],
    ];
    let mut gathered = 0;
    for cut in cuts {
        for (temperature, top_k, top_p) in [
            (0.0, 0, 1.0),
            (1.0, 0, 1.0),
            (0.7, 40, 1.0),
            (1.3, 40, 0.8),
            (0.2, 0, 0.9),
            (1.0, 0, 0.5),
            (1.0, 4000, 0.99),
        ] {
            for (penalty, logprobs) in [(false, NO_LOGPROBS), (true, 5), (false, 20), (true, 0)] {
                let plain = sampling(temperature, top_k, top_p);
                let penalised = SamplingRecord {
                    repetition_penalty: 1.3,
                    presence_penalty: 0.5,
                    frequency_penalty: 0.1,
                    ..plain
                };
                let asked = if penalty { penalised } else { plain };
                for size in [1.0, 30.0] {
                    gathered += compare(SamplingRecord { logprobs, ..asked }, size, len, cut);
                }
            }
        }
    }
    assert!(gathered > 0, "no top-p of a flat row needed the row");
}

#[test]
fn equal_logits_of_two_ranks_go_to_the_lower_id() {
    let logits = vec![1.0; 3 * BLOCK];
    let mut state = SamplerState::open(1, &[0], sampling(0.0, 0, 1.0));
    let mut scratch = Scratch::default();
    let told: Vec<Summary> = (0..3)
        .map(|rank| {
            let own = (rank * BLOCK as u32, &logits[..BLOCK]);
            state.summarise(&mut scratch, own, 0).unwrap()
        })
        .collect();
    assert_eq!(state.decide(&mut scratch, &told).unwrap().unwrap().token, 0);
}

#[test]
fn a_logit_that_is_no_number_is_found_at_any_rank() {
    let mut logits = row(1, 2 * BLOCK, 1.0);
    logits[BLOCK + 7] = f32::NAN;
    let mut state = SamplerState::open(1, &[0], sampling(1.0, 0, 1.0));
    let mut scratch = Scratch::default();
    let told: Vec<Summary> = [0, 1]
        .map(|rank| {
            let own = ((rank * BLOCK) as u32, &logits[rank * BLOCK..(rank + 1) * BLOCK]);
            state.summarise(&mut scratch, own, 0).unwrap()
        })
        .to_vec();
    match state.decide(&mut scratch, &told) {
        Err(SampleError::NonFinite { token, value }) => {
            assert!(token == BLOCK as u32 + 7 && value.is_nan());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(state.decide(&mut scratch, &[Summary::default()]), Err(SampleError::NoLogits));
}

#[test]
fn what_a_rank_tells_is_whole_and_of_its_own_part_or_refused() {
    let part = BLOCK as u32..3 * BLOCK as u32 + 100;
    let logits = row(5, part.len(), 4.0);
    let mut scratch = Scratch::default();
    let plain = [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 40, 1.0), (1.0, 4000, 1.0), (1.0, 0, 0.9)];
    for ((temperature, top_k, top_p), logprobs) in
        plain.into_iter().flat_map(|rule| [(rule, NO_LOGPROBS), (rule, 0), (rule, 7)])
    {
        let asked = SamplingRecord { logprobs, ..sampling(temperature, top_k, top_p) };
        let state = SamplerState::open(1, &[0], asked);
        let told = state.summarise(&mut scratch, (part.start, &logits), 0).unwrap();
        let check = |told: &Summary| state.check_told(told, part.clone());
        assert_eq!(check(&told), Ok(()), "{asked:?}");
        assert!(check(&Summary::default()).is_err(), "{asked:?}");
        let nothing = state.check_told(&Summary::default(), part.end..part.end);
        assert_eq!(nothing, Ok(()), "{asked:?}");
        // A part that is shorter is seen where anything of it is counted; one that is elsewhere, always.
        let short = state.summarise(&mut scratch, (part.start, &logits[..BLOCK]), 0).unwrap();
        let is_counted = top_p < 1.0 || logprobs != NO_LOGPROBS;
        assert!(!is_counted || check(&short).is_err(), "{asked:?}");
        let shifted = state.summarise(&mut scratch, (part.end, &logits), 0).unwrap();
        assert!(check(&shifted).unwrap_err().contains("names token"), "{asked:?}");
        assert_eq!(check(&Summary::of_non_finite(part.start, f32::NAN)), Ok(()));
        assert!(check(&Summary::of_non_finite(part.end, f32::NAN)).is_err());
        for cut in [
            Summary { ranked: told.ranked[..told.ranked.len().min(3)].to_vec(), ..told.clone() },
            Summary { mass: told.mass[..told.mass.len().min(1)].to_vec(), ..told.clone() },
            Summary { evidence: vec![(0.0, 1.0); told.evidence.len() + 1], ..told.clone() },
            Summary { alternatives: vec![(part.start, 0.0); 9], ..told.clone() },
        ] {
            assert_eq!(check(&cut).is_ok(), cut == told, "{asked:?}: {cut:?}");
        }
    }
}
