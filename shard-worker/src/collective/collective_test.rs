#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use super::local::Local;
use super::*;

/// Runs `work` at every rank of a stage; what each has found, in rank order.
fn at_all<T: Send>(ranks: u32, work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let run = |mut end: Local| scope.spawn(move || work(&mut end));
        let threads: Vec<_> = Local::stage(ranks).into_iter().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn value(rank: u32, at: usize) -> f32 {
    let mixed = (at as u32).wrapping_mul(2_654_435_761).wrapping_add(rank.wrapping_mul(40_503));
    (mixed % 10_007) as f32 * 1e-3 - 5.0
}

#[test]
fn sums_are_added_in_rank_order_whatever_the_length() {
    for ranks in [1, 2, 3, 5] {
        for len in [1, 7, 1000, 3 * DIRECT_BYTES_MAX / 4 + 13] {
            let found = at_all(ranks, |end| {
                let rank = end.split().rank;
                let mut values: Vec<f32> = (0..len).map(|at| value(rank, at)).collect();
                end.all_reduce(&mut values).unwrap();
                values
            });
            let expected: Vec<f32> = (0..len)
                .map(|at| (1..ranks).fold(value(0, at), |sum, rank| sum + value(rank, at)))
                .collect();
            assert!(found.iter().all(|f| *f == expected), "{len} values on {ranks} ranks");
        }
    }
}

#[test]
fn columns_of_unequal_widths_stand_side_by_side() {
    let widths = [3, 0, 5];
    let found = at_all(3, |end| {
        let rank = end.split().rank;
        let own: Vec<f32> = (0..2 * widths[rank as usize]).map(|at| value(rank, at)).collect();
        let mut all = vec![0.0; 2 * 8];
        end.all_gather(&own, &widths, 2, &mut all).unwrap();
        all
    });
    let row = |row: usize| -> Vec<f32> {
        let of = |rank: u32| (0..widths[rank as usize]).map(move |c| (rank, c));
        let cells = (0..3).flat_map(of);
        cells.map(|(rank, c)| value(rank, row * widths[rank as usize] + c)).collect()
    };
    let expected = [row(0), row(1)].concat();
    assert!(found.iter().all(|all| *all == expected), "{found:?}");
}

#[test]
fn a_rank_that_is_gone_or_of_another_plan_is_named() {
    let mut ends = Local::stage(3);
    drop(ends.pop());
    let found = (&mut ends[0] as &mut dyn Collective).all_reduce(&mut [1.0]).unwrap_err();
    assert_eq!(found.to_string(), "rank 2 of this stage is gone: its thread has ended");

    let found = at_all(2, |end| {
        let mut values = vec![1.0; 1 + end.split().rank as usize];
        end.all_reduce(&mut values).unwrap_err()
    });
    assert_eq!(found[0].to_string(), "rank 1 of this stage sent 8 bytes where the plan has 4");
}
