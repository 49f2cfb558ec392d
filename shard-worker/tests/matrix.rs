//! Every family over every mesh, number by number and in blocks, against itself uncut: what `docs/MODELS.md` has as a matrix.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, Split};
use shoal_protocol::plan::{Activations, KvPrecision, Numerics, Precision};

use support::matrix::{MESHES, Mesh, Parity, models, precisions};
use support::{
    Chain, Dice, Setup, assert_close, assert_same_bits, blocks, cases, log_softmax, random_model,
};

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
    if parity == Parity::Refused {
        return parity;
    }
    let mut chain = Chain::load(checkpoint, &setup);
    let mut said = |chunk| chain.transcript(&tokens(), FROM, chunk, &blocks());
    let found = said(tokens().len());
    match parity {
        Parity::Same => assert_same_bits(&found, expected, &what),
        _ if activations == Activations::Int8 => assert_near(&found, expected, &what),
        _ => assert_close(&found, expected, &what),
    }
    assert_same_bits(&said(5), &found, &format!("{what}, in chunks"));
    parity
}

fn assert_near(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: rows");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.len(), expected.len(), "{what}: tokens");
        for (a, b) in log_softmax(found).into_iter().zip(log_softmax(expected)) {
            // What is no number is not near.
            assert!((a - b).abs() < ROUNDED_TOLERANCE, "{what}: {a} and {b}");
        }
    }
}

/// The position from which on logits are compared.
const FROM: usize = 6;

fn tokens() -> Vec<u32> {
    let mut dice = Dice(4);
    (0..14).map(|_| dice.below(1307) as u32).collect()
}

/// All families, so many at a time: they take their time.
fn compare_all(which: impl Fn(usize) -> bool) {
    let all = models(&cases());
    let mut found = [0; 3];
    let mine = all.iter().enumerate().filter(|(i, _)| which(*i)).map(|(_, model)| model);
    for (spec, config) in mine {
        let (_folder, checkpoint) = random_model(config);
        let of = |held| Activations::ALL.map(|activations| (held, activations));
        let kinds = precisions(spec.family).into_iter().flat_map(of);
        // Where weights are no whole numbers, rows are as they are under either contract.
        for kind in kinds.filter(|(held, rows)| held.has_numbers() || *rows == Activations::F32) {
            let numerics = Numerics::of(kind.1, false, KvPrecision::F32);
            let plain = Setup { held: kind.0, numerics, ..Setup::plain(spec) };
            let mut uncut = Chain::load(&checkpoint, &plain);
            let expected = uncut.transcript(&tokens(), FROM, tokens().len(), &blocks());
            for mesh in &MESHES {
                found[compare(&checkpoint, kind, mesh, &expected) as usize] += 1;
            }
        }
    }
    let [same, close, refused] = found;
    let enough = same > 150 && close > 110 && refused > 20;
    assert!(enough, "{same} the same, {close} close, {refused} refused");
}

#[test]
fn the_first_half_of_the_families_is_on_every_mesh_what_it_is_uncut() {
    compare_all(|i| i < 10);
}

#[test]
fn the_other_half_of_the_families_is_on_every_mesh_what_it_is_uncut() {
    compare_all(|i| i >= 10);
}
