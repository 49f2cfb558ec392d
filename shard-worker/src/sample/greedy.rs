//! The best token, in one pass that also finds logits that are no numbers.

use shoal_protocol::id::TokenId;

use super::SampleError;

/// Logits compared at once. Any number gives the same answer; 16 fills the widest registers.
const LANES: usize = 16;

/// Logits whose maximum is taken before their place is looked for.
const CHUNK: usize = 1024;

/// The token with the largest logit; of equal ones the lowest id.
pub fn argmax(logits: &[f32]) -> Result<TokenId, SampleError> {
    let mut best: Option<(TokenId, f32)> = None;
    for (chunk_index, chunk) in logits.chunks(CHUNK).enumerate() {
        let (max, finite) = chunk_max(chunk);
        if !finite {
            return Err(first_non_finite(logits));
        }
        // Strictly larger: an equal one in a later chunk has a higher id.
        if best.is_none_or(|(_, value)| max > value) {
            let at = chunk.iter().position(|&x| x == max).unwrap_or(0);
            best = Some(((chunk_index * CHUNK + at) as TokenId, max));
        }
    }
    best.map(|(token, _)| token).ok_or(SampleError::NoLogits)
}

/// The maximum of a chunk, and whether all of it is finite.
fn chunk_max(chunk: &[f32]) -> (f32, bool) {
    let mut max = [f32::NEG_INFINITY; LANES];
    // x * 0 is 0 for a finite x and NaN for any other, and NaN stays in a sum.
    let mut zeros = [0f32; LANES];
    let mut groups = chunk.chunks_exact(LANES);
    for group in &mut groups {
        for lane in 0..LANES {
            max[lane] = if group[lane] > max[lane] { group[lane] } else { max[lane] };
            zeros[lane] += group[lane] * 0.0;
        }
    }
    for (lane, &x) in groups.remainder().iter().enumerate() {
        max[lane] = if x > max[lane] { x } else { max[lane] };
        zeros[lane] += x * 0.0;
    }
    let top = max.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    (top, zeros.iter().all(|z| *z == 0.0))
}

/// Names the first logit that is no number.
fn first_non_finite(logits: &[f32]) -> SampleError {
    let token = logits.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let value = logits.get(token).copied().unwrap_or(f32::NAN);
    SampleError::NonFinite { token: token as TokenId, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_wins_and_ties_go_to_the_lower_id() {
        for (logits, token) in [
            (vec![1.0], 0),
            (vec![-3.0, -1.0, -2.0], 1),
            (vec![0.0, -0.0], 0),
            (vec![-0.0, 0.0], 0),
            (vec![2.0; 5000], 0),
            ((0..5000).map(|i| i as f32).collect(), 4999),
            ((0..5000).map(|i| if i == 1030 || i == 3000 { 7.0 } else { 1.0 }).collect(), 1030),
            (vec![f32::MIN; 17], 0),
        ] {
            assert_eq!(argmax(&logits), Ok(token));
        }
    }

    #[test]
    fn what_is_no_number_is_an_error_wherever_it_stands() {
        for len in [1, 15, 16, 17, 1024, 1025, 3000] {
            for at in [0, len / 2, len - 1] {
                for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut logits = vec![0.5; len];
                    logits[at] = value;
                    match argmax(&logits) {
                        Err(SampleError::NonFinite { token, .. }) => assert_eq!(token, at as u32),
                        other => panic!("{value} at {at} of {len}: {other:?}"),
                    }
                }
            }
        }
        assert_eq!(argmax(&[]), Err(SampleError::NoLogits));
    }
}
