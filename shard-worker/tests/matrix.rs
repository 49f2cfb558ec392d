//! Every family over every mesh in every precision against itself uncut: what `docs/MODELS.md` has as a matrix.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, Split};
use shoal_protocol::plan::{Activations, KvPrecision, Numerics, Precision};

use support::matrix::{MESHES, Mesh, Parity, models};
use support::{Chain, Dice, Setup, assert_close, assert_same_bits, blocks, cases, log_softmax};

/// By how much logarithms of probabilities may differ where ranks add up and rows are rounded to whole numbers behind it:
/// a sum that differs in its last bit may be rounded to the next number.
const ROUNDED_TOLERANCE: f64 = 0.1;

/// Compares one cell; `Refused` cannot be cut at all.
fn compare(
    checkpoint: &Checkpoint,
    (held, activations): (Precision, Activations),
    mesh: &Mesh,
    expected: &[Vec<f32>],
) -> Parity {
    let spec = checkpoint.spec();
    let parity = mesh.parity(spec, held);
    let what = format!("{:?} as {held}, rows as {activations}, on {}", spec.family, mesh.name);
    let ranks = mesh.ranks.iter().copied().max().unwrap();
    let part = |rank| spec.part(Split { rank, ranks }, mesh.reduction, held);
    let can_be = (0..ranks).all(|rank| part(rank).is_ok());
    assert_eq!(can_be, parity != Parity::Refused, "{what}");
    let numerics = Numerics::of(activations, mesh.reduction == Reduction::Sum, KvPrecision::F32);
    let (cuts, ranks) = (mesh.cuts(spec.layers), mesh.ranks.to_vec());
    let setup = Setup { held, cuts, ranks, numerics, ..Setup::plain(spec) };
    let said =
        |chunk| Chain::load(checkpoint, &setup).transcript(&tokens(), FROM, chunk, &blocks());
    match parity {
        Parity::Refused => {}
        Parity::Same => assert_same_bits(&said(7), expected, &what),
        Parity::Close => {
            let found = said(tokens().len());
            match activations {
                Activations::F32 => assert_close(&found, expected, &what),
                Activations::Int8 => assert_near(&found, expected, &what),
            }
            assert_same_bits(&said(7), &found, &format!("{what}, in chunks"));
        }
    }
    parity
}

fn assert_near(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    for (found, expected) in found.iter().zip(expected) {
        let pairs = log_softmax(found).into_iter().zip(log_softmax(expected));
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < ROUNDED_TOLERANCE, "{what}: {worst}");
    }
}

/// The position from which on logits are compared.
const FROM: usize = 12;

fn tokens() -> Vec<u32> {
    let mut dice = Dice(4);
    (0..24).map(|_| dice.below(1307) as u32).collect()
}

/// All families, so many at a time: they take their time.
fn compare_all(which: impl Fn(usize) -> bool) {
    let all = models(&cases());
    let mut found = [0; 3];
    for (_, _, checkpoint) in all.iter().enumerate().filter(|(i, _)| which(*i)).map(|(_, m)| m) {
        let of = |held| Activations::ALL.map(|activations| (held, activations));
        let kinds = Precision::ALL.into_iter().flat_map(of);
        // Rows of whole numbers with a format that has an offset and one that has none: the others are multiplied
        // by the same code (`backend/cpu/dots_test.rs`).
        let whole = |held| matches!(held, Precision::Q8_0 | Precision::Q4K);
        for kind in kinds.filter(|(held, rows)| whole(*held) || *rows == Activations::F32) {
            let numerics = Numerics::of(kind.1, false, KvPrecision::F32);
            let plain = Setup { held: kind.0, numerics, ..Setup::plain(checkpoint.spec()) };
            let mut uncut = Chain::load(checkpoint, &plain);
            let expected = uncut.transcript(&tokens(), FROM, tokens().len(), &blocks());
            for mesh in &MESHES {
                found[compare(checkpoint, kind, mesh, &expected) as usize] += 1;
            }
        }
    }
    let [same, close, refused] = found;
    let enough = same > 200 && close > 200 && refused > 50;
    assert!(enough, "{same} the same, {close} close, {refused} refused");
}

#[test]
fn the_first_half_of_the_families_is_what_it_is_uncut_on_every_mesh_in_every_precision() {
    compare_all(|i| i % 2 == 0);
}

#[test]
fn the_other_half_of_the_families_is_what_it_is_uncut_on_every_mesh_in_every_precision() {
    compare_all(|i| i % 2 == 1);
}
