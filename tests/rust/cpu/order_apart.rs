//! Promise: exceptions that do not ascend are refused, whoever reads them: the oracle, restores on every
//! instruction set, and products on restored panels. Words are never taken from the wrong place without a
//! word.

use crate::common::data::{Rng, adversarial, matrix, perturbed};
use crate::common::linear::{Case, isas};
use xorz::codec::{Encoding, Tile};
use xorz::cpu::{LinearArgs, Mode, delta_linear_on};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Resident, restore};
use xorz::vector::{Serial, delta_restore_region_on};

const SHAPE: Shape = Shape { n: 40, k: 300 };
/// Rows of x that are multiplied with restored panels.
const M: usize = 200;

/// The delta with the positions of the first two exceptions of a tile exchanged.
fn exchanged(case: &Case) -> Vec<u8> {
    let delta = Resident::parse(&case.blob).unwrap();
    let at = (0..delta.grid().tiles()).find_map(|index| {
        let positions = match delta.tile(index).unwrap() {
            Tile::Sparse(t) => t.exceptions.positions,
            Tile::Exponent(t) => t.exceptions.positions,
            Tile::Unchanged | Tile::Raw(_) => return None,
        };
        (positions.len() >= 4).then(|| positions.as_ptr() as usize - case.blob.as_ptr() as usize)
    });
    let (at, mut blob) = (at.expect("a tile with two exceptions"), case.blob.clone());
    blob[at..at + 4].rotate_left(2);
    blob
}

#[test]
fn exceptions_out_of_order_are_refused_by_whoever_reads_them() {
    let mut rng = Rng::new(161);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for encoding in [Encoding::Sparse, Encoding::Exponent] {
            let words = SHAPE.n * SHAPE.k;
            let base = rng.weights(dtype, words);
            let (near, odd) = (perturbed(&mut rng, dtype, &base, 0.1), adversarial(&mut rng, dtype, words));
            let fine_tuned = rng.mix(dtype, &near, &odd, 0.05);
            let case = Case::new(dtype, SHAPE, encoding, &base, &fine_tuned);
            let (blob, base) = (exchanged(&case), matrix(dtype, SHAPE, &case.base));
            let delta = Resident::parse(&blob).unwrap();
            let refused = |done: xorz::error::Result<()>, who: &str| {
                let e = done.expect_err(&format!("{who} of {}", case.name()));
                assert_eq!(e.kind(), Kind::Corrupt, "{who}: {e}");
                assert!(e.message().contains("exception 1, at "), "{who}: {e}");
                assert!(e.message().contains("is out of order"), "{who}: {e}");
            };
            let mut out = vec![0; case.base.len()];
            refused(restore(&delta, &base, &mut out), "the oracle");
            for isa in isas() {
                let whole = (0..SHAPE.n, 0..SHAPE.k);
                let done = delta_restore_region_on(isa, &delta, &base, whole, &mut out, &Serial);
                refused(done, "a restore");
                let x = vec![0; M * SHAPE.k * dtype.word_bytes()];
                let mut y = vec![0; M * SHAPE.n * dtype.word_bytes()];
                let args =
                    LinearArgs { x: &x, m: M, base, delta: delta.clone(), bias: None, mode: Mode::Fast };
                refused(delta_linear_on(isa, &args, &mut y, &Serial), "a product");
            }
        }
    }
}
