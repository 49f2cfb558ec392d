//! ○ In turn, whatever happens.

/// The next one.
pub fn choose(candidates: &[u32], turn: &mut u64) -> u32 {
    let chosen = candidates[(*turn % candidates.len() as u64) as usize];
    *turn += 1;
    chosen
}

#[cfg(test)]
mod tests {
    #[test]
    fn each_gets_its_turn() {
        let mut turn = 0;
        let chosen: Vec<u32> = (0..5).map(|_| super::choose(&[4, 6, 7], &mut turn)).collect();
        assert_eq!(chosen, [4, 6, 7, 4, 6]);
    }
}
