//! Draws: that they follow the distribution, repeat exactly, and that filters cut where they should.

use super::*;

const LOGITS: [f32; 8] = [0.0, 1.5, -1.0, 0.5, 2.0, -3.0, 1.0, 0.0];

fn sampling(temperature: f32) -> SamplingRecord {
    SamplingRecord { seed: 7, temperature, ..SamplingRecord::GREEDY }
}

/// The token drawn at this position of a sequence that has known tokens up to there.
fn draw_at(sampling: SamplingRecord, logits: &[f32], position: u32) -> Drawn {
    let tokens = vec![0; position as usize + 1];
    let mut state = SamplerState::open(1, &tokens, sampling);
    state.draw(&mut Scratch::default(), logits, position).unwrap()
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> =
        logits.iter().map(|&x| (f64::from(x) / f64::from(temperature)).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// Checks that tokens at `n` positions follow `expected`: chi-square below the 99.9th percentile.
fn check_frequencies(sampling: SamplingRecord, expected: &[f64]) {
    let n = 20_000u32;
    let mut counts = vec![0u32; expected.len()];
    let mut state = SamplerState::open(1, &[0], sampling);
    let mut scratch = Scratch::default();
    for position in 0..n {
        counts[state.draw(&mut scratch, &LOGITS, position).unwrap().token as usize] += 1;
    }
    let mut chi_square = 0.0;
    let mut degrees = -1;
    for (count, p) in counts.iter().zip(expected) {
        if *p == 0.0 {
            assert_eq!(*count, 0, "a filtered token was drawn: {counts:?}");
            continue;
        }
        let mean = p * f64::from(n);
        chi_square += (f64::from(*count) - mean).powi(2) / mean;
        degrees += 1;
    }
    // The 99.9th percentiles of chi-square with 1 to 7 degrees of freedom.
    let limit = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][degrees as usize - 1];
    assert!(chi_square < limit, "chi-square {chi_square} with {degrees} degrees: {counts:?}");
}

/// The softmax with all but these tokens removed.
fn only(tokens: &[usize], temperature: f32) -> Vec<f64> {
    let mut p = softmax(&LOGITS, temperature);
    (0..p.len()).filter(|t| !tokens.contains(t)).for_each(|t| p[t] = 0.0);
    let total: f64 = p.iter().sum();
    p.iter().map(|x| x / total).collect()
}

#[test]
fn frequencies_are_the_probabilities() {
    for temperature in [0.5, 1.0, 2.5] {
        check_frequencies(sampling(temperature), &softmax(&LOGITS, temperature));
    }
    for (seed, stream) in [(0, 0), (1, 0), (1, 1), (u64::MAX, u32::MAX)] {
        let sampling = SamplingRecord { seed, stream, ..sampling(1.0) };
        check_frequencies(sampling, &softmax(&LOGITS, 1.0));
    }
}

#[test]
fn filters_keep_the_shape_of_what_they_leave() {
    let top_k = SamplingRecord { top_k: 3, ..sampling(1.0) };
    check_frequencies(top_k, &only(&[4, 1, 6], 1.0));
    // At temperature 1 the best have 0.42, 0.25, 0.15, 0.09 of the mass.
    let top_p = SamplingRecord { top_p: 0.7, ..sampling(1.0) };
    check_frequencies(top_p, &only(&[4, 1, 6], 1.0));
    // Top-p counts the mass that top-k has left: of the best three, two have 0.82.
    let both = SamplingRecord { top_k: 3, top_p: 0.8, ..sampling(1.0) };
    check_frequencies(both, &only(&[4, 1], 1.0));
    // Temperature comes before top-p: a high one spreads the mass over more tokens.
    let hot = SamplingRecord { top_p: 0.6, ..sampling(100.0) };
    check_frequencies(hot, &only(&[4, 1, 6, 3, 0], 100.0));
}

#[test]
fn filters_at_their_edges() {
    let all = sampling(1.0);
    for position in 0..200 {
        let token = draw_at(all, &LOGITS, position).token;
        // What keeps everything changes nothing.
        for same in [
            SamplingRecord { top_k: 8, ..all },
            SamplingRecord { top_k: u32::MAX, ..all },
            SamplingRecord { top_k: 8, top_p: 0.999_999, ..all },
        ] {
            assert_eq!(draw_at(same, &LOGITS, position).token, token);
        }
        // What keeps one token is greedy.
        for greedy in [
            SamplingRecord { top_k: 1, ..all },
            SamplingRecord { top_p: 1e-9, ..all },
            SamplingRecord { temperature: 0.0, ..all },
            SamplingRecord { temperature: f32::MIN_POSITIVE, ..all },
        ] {
            assert_eq!(draw_at(greedy, &LOGITS, position).token, 4);
        }
    }
    // Equal logits: the lower ids are kept.
    for position in 0..50 {
        let flat = [1.0; 8];
        let two = SamplingRecord { top_k: 2, ..all };
        assert!(draw_at(two, &flat, position).token < 2);
        let half = SamplingRecord { top_p: 0.25, ..all };
        assert!(draw_at(half, &flat, position).token < 2);
        assert_eq!(draw_at(sampling(0.0), &flat, position).token, 0);
    }
    assert_eq!(draw_at(all, &[5.0], 3).token, 0);
}

#[test]
fn choices_seeds_and_positions_differ_and_repeat() {
    let flat = [0.0f32; 100];
    let tokens = |sampling: SamplingRecord| -> Vec<u32> {
        (0..50).map(|position| draw_at(sampling, &flat, position).token).collect()
    };
    let base = sampling(1.0);
    assert_eq!(tokens(base), tokens(base));
    for other in [
        SamplingRecord { seed: 8, ..base },
        SamplingRecord { stream: SamplingRecord::stream_of(0, 1), ..base },
        SamplingRecord { stream: SamplingRecord::stream_of(1, 0), ..base },
    ] {
        let same = tokens(base).iter().zip(tokens(other)).filter(|(a, b)| *a == b).count();
        assert!(same < 8, "{same} of 50 draws from 100 tokens are equal");
    }
}

#[test]
fn a_stream_is_fixed_for_ever() {
    // Worked out apart from this code: an answer that began under one version goes on under the next.
    let sampling = SamplingRecord { stream: 3, ..sampling(1.0) };
    let tokens: Vec<u32> = (0..16).map(|p| draw_at(sampling, &LOGITS, p).token).collect();
    assert_eq!(tokens, [1, 1, 3, 7, 1, 7, 4, 1, 4, 4, 4, 5, 2, 4, 1, 4]);
}

#[test]
fn a_resumed_sequence_draws_what_it_would_have_drawn() {
    let sampling = SamplingRecord {
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        ..sampling(0.8)
    };
    let logits_at = |position: u32| -> Vec<f32> {
        (0..50).map(|t| ((t * 13 + position * 7) % 31) as f32 * 0.1).collect()
    };
    let mut tokens = vec![3, 1, 4];
    let mut state = SamplerState::open(3, &tokens, sampling);
    let mut scratch = Scratch::default();
    for position in 2..40 {
        let mut resumed = SamplerState::open(3, &tokens, sampling);
        assert_eq!(resumed, state);
        let drawn = state.draw(&mut scratch, &logits_at(position), position).unwrap();
        let again = resumed.draw(&mut Scratch::default(), &logits_at(position), position).unwrap();
        assert_eq!(drawn.token, again.token);
        tokens.push(drawn.token);
    }
}

#[test]
fn penalties_act_before_the_draw_and_not_on_logprobs() {
    let penalised =
        SamplingRecord { repetition_penalty: 100.0, logprobs: 2, ..SamplingRecord::GREEDY };
    let mut state = SamplerState::open(1, &[4], penalised);
    let mut scratch = Scratch::default();
    let p = softmax(&LOGITS, 1.0);
    let mut tokens = Vec::new();
    for position in 0..4 {
        let drawn = state.draw(&mut scratch, &LOGITS, position).unwrap();
        assert!((f64::from(drawn.logprob) - p[drawn.token as usize].ln()).abs() < 1e-6);
        let best: Vec<u32> = drawn.candidates.iter().map(|c| c.token).collect();
        assert_eq!(best, [4, 1], "alternatives are the model's own");
        tokens.push(drawn.token);
    }
    // 4 stands in the prompt; each drawn token is divided by 100 from then on.
    assert_eq!(tokens, [1, 6, 3, 4]);
}

#[test]
fn logprobs_are_reported_as_asked() {
    let p = softmax(&LOGITS, 1.0);
    for (logprobs, candidates) in [(0, 0), (1, 1), (5, 5), (20, 8)] {
        let drawn = draw_at(SamplingRecord { logprobs, ..sampling(0.7) }, &LOGITS, 9);
        assert!((f64::from(drawn.logprob) - p[drawn.token as usize].ln()).abs() < 1e-6);
        assert_eq!(drawn.candidates.len(), candidates);
        assert!(drawn.candidates.windows(2).all(|w| w[0].logprob >= w[1].logprob));
        // The two tokens with logit 0 in order of their ids.
        if candidates > 5 {
            let at: Vec<u32> = drawn.candidates.iter().map(|c| c.token).collect();
            assert_eq!(at, [4, 1, 6, 3, 0, 7, 2, 5]);
        }
    }
    let silent = draw_at(sampling(0.7), &LOGITS, 9);
    assert!(silent.logprob.is_nan() && silent.candidates.is_empty());
}

#[test]
fn what_cannot_be_drawn_changes_nothing() {
    let mut state = SamplerState::open(1, &[1, 2], sampling(1.0));
    let before = state.clone();
    let mut scratch = Scratch::default();
    let bad = [0.0, f32::NAN];
    assert!(matches!(
        state.draw(&mut scratch, &bad, 1),
        Err(SampleError::NonFinite { token: 1, .. })
    ));
    assert_eq!(state.draw(&mut scratch, &[], 1), Err(SampleError::NoLogits));
    for found in [0, 2, u32::MAX] {
        let expected = Err(SampleError::Position { found, expected: 1 });
        assert_eq!(state.draw(&mut scratch, &LOGITS, found), expected);
    }
    assert_eq!(state, before);
    assert!(state.draw(&mut scratch, &LOGITS, 1).is_ok());
}

#[test]
fn a_large_vocabulary_is_drawn_from_as_a_small_one() {
    // The pruned race over all tokens against the race over a top-k that keeps all of them, and
    // top-p's fetches against a p that needs several.
    let logits: Vec<f32> = (0..40_000).map(|t| ((t * 7919) % 1009) as f32 * 0.01).collect();
    for position in 0..3 {
        let plain = draw_at(sampling(1.0), &logits, position).token;
        let kept = SamplingRecord { top_k: 40_000, ..sampling(1.0) };
        assert_eq!(draw_at(kept, &logits, position).token, plain);
        let nearly = SamplingRecord { top_p: 0.999_999_9, ..sampling(1.0) };
        assert_eq!(draw_at(nearly, &logits, position).token, plain);
    }
}
