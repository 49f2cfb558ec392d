//! Every family over every mesh, number by number and in blocks, against itself uncut: what `docs/MODELS.md` has as a matrix.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, Split};
use shoal_protocol::plan::{Numerics, Precision};

use support::matrix::{MESHES, Mesh, Parity, models, precisions};
use support::{Chain, Dice, Setup, assert_close, assert_same_bits, blocks, cases, random_model};

/// Compares one cell; `Refused` cannot be cut at all.
fn compare(checkpoint: &Checkpoint, held: Precision, mesh: &Mesh, expected: &[Vec<f32>]) -> Parity {
    let spec = checkpoint.spec();
    let parity = mesh.parity(spec, held);
    let what = format!("{:?} as {held} on {}", spec.family, mesh.name);
    let ranks = mesh.ranks.iter().copied().max().unwrap();
    let part = |rank| spec.part(Split { rank, ranks }, mesh.reduction, held);
    let can_be = (0..ranks).all(|rank| part(rank).is_ok());
    assert_eq!(can_be, parity != Parity::Refused, "{what}");
    let numerics = match mesh.reduction {
        Reduction::Exact => Numerics::N1,
        Reduction::Sum => Numerics::N1Sum,
    };
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
        _ => assert_close(&found, expected, &what),
    }
    assert_same_bits(&said(5), &found, &format!("{what}, in chunks"));
    parity
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
        for held in precisions(spec.family) {
            let plain = Setup { held, ..Setup::plain(spec) };
            let mut uncut = Chain::load(&checkpoint, &plain);
            let expected = uncut.transcript(&tokens(), FROM, tokens().len(), &blocks());
            for mesh in &MESHES {
                found[compare(&checkpoint, held, mesh, &expected) as usize] += 1;
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
