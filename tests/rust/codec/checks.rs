//! Promise: the fast `delta_check` says of every delta and base what the oracle says, in the same words: of right ones, of
//! every damage, forged or not, and of other bases; on every instruction set, whoever runs which task.

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped, unaligned};
use crate::common::linear::{Shuffled, isas};
use crate::common::seal::{reseal, reseal_for};
use xorz::codec::Encoding;
use xorz::error::Result;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, encode_as};
use xorz::vector::{self, Isa, Serial};

/// Both outcomes, of one instruction set.
fn both(isa: Isa, blob: &[u8], base: &Matrix<'_>) -> [Result<()>; 2] {
    let parse = || Resident::parse(blob);
    [
        parse().and_then(|d| vector::delta_check_on(isa, &d, base, &Serial)),
        parse().and_then(|d| d.check_full(base)),
    ]
}

fn same(isa: Isa, blob: &[u8], base: &Matrix<'_>, what: &str) -> bool {
    let [fast, oracle] = both(isa, blob, base);
    assert_eq!(fast, oracle, "{what} {isa:?}");
    fast.is_ok()
}

const SHAPES: [(usize, usize); 8] =
    [(0, 3), (3, 0), (1, 1), (1, 9000), (35, 301), (130, 77), (200, 64), (70, 5000)];

#[test]
fn right_deltas_pass_and_other_bases_do_not() {
    let mut rng = Rng::new(61);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::I8, Dtype::F64] {
        for (n, k) in SHAPES {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            let floating = !matches!(dtype, Dtype::I8);
            let odd = if floating { adversarial(&mut rng, dtype, n * k) } else { rng.bytes(base.len()) };
            let near = if floating { stepped(&mut rng, dtype, &base, 1e-3) } else { base.clone() };
            let near = perturbed(&mut rng, dtype, &near, 0.02);
            for encoding in Encoding::ALL {
                for tuned in [&near, &rng.mix(dtype, &near, &odd, 0.02)] {
                    let tuned = if encoding == Encoding::Unchanged { &base } else { tuned };
                    let pair = Pair::new(matrix(dtype, shape, &base), matrix(dtype, shape, tuned));
                    let blob = encode_as(&mut pair.unwrap(), encoding).unwrap();
                    let what = format!("{dtype} {shape} {encoding}");
                    let copy = unaligned(&base);
                    let mut other = base.clone();
                    other.iter_mut().last().into_iter().for_each(|b| *b ^= 1);
                    for isa in isas() {
                        assert!(same(isa, &blob, &matrix(dtype, shape, &base), &what));
                        assert!(same(isa, &blob, &matrix(dtype, shape, &copy[1..]), &what));
                        assert!(!same(isa, &blob, &matrix(dtype, shape, &other), &what) || base.is_empty());
                    }
                    let delta = Resident::parse(&blob).unwrap();
                    vector::delta_check(&delta, &matrix(dtype, shape, &base), &Shuffled(3)).unwrap();
                }
            }
        }
    }
}

#[test]
fn damage_is_told_in_the_oracles_words_forged_or_not() {
    let mut rng = Rng::new(62);
    let (mut refused, mut passed) = (0, 0);
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::I8] {
        let shape = Shape { n: 66, k: 45 };
        let base = rng.weights(dtype, 66 * 45);
        let tuned = perturbed(&mut rng, dtype, &base, 0.1);
        for encoding in Encoding::ALL {
            let tuned = if encoding == Encoding::Unchanged { &base } else { &tuned };
            let pair = Pair::new(matrix(dtype, shape, &base), matrix(dtype, shape, tuned));
            let blob = encode_as(&mut pair.unwrap(), encoding).unwrap();
            let mut other = base.clone();
            other[1000] ^= 3;
            let digest = matrix(dtype, shape, &other).digest().0;
            for i in 0..600 {
                let mut bad = blob.clone();
                let at = if i < 192 { i } else { rng.next() as usize % bad.len() };
                bad[at] ^= 1 << (rng.next() % 8);
                let what = format!("{dtype} {encoding} byte {at}");
                let isa = isas()[i % isas().len()];
                assert!(!same(isa, &bad, &matrix(dtype, shape, &base), &what), "{what}");
                // With digests made good again: of the damaged delta, and of another base.
                reseal(&mut bad);
                let ok = same(isa, &bad, &matrix(dtype, shape, &base), &what);
                reseal_for(&mut bad, digest);
                let also = same(isa, &bad, &matrix(dtype, shape, &other), &what);
                passed += usize::from(ok) + usize::from(also);
                refused += usize::from(!ok) + usize::from(!also);
            }
        }
    }
    // A flip of a word's bits makes another right delta, if it is sealed.
    assert!(refused > 1000 && passed > 100, "{refused} refused, {passed} passed");
}

#[test]
fn a_digest_by_itself_is_that_of_the_matrix_for_every_dtype_and_shape() {
    let mut rng = Rng::new(27);
    for dtype in Dtype::ALL {
        for (n, k) in [
            (0, 0),
            (0, 7),
            (5, 0),
            (1, 1),
            (1, 4097),
            (63, 3),
            (64, 3),
            (65, 3),
            (256, 5),
            (257, 40),
            (1027, 33),
        ] {
            let shape = Shape { n, k };
            let words = rng.weights(dtype, n * k);
            let base = matrix(dtype, shape, &words);
            assert_eq!(vector::delta_digest(&base, &Serial).unwrap(), base.digest(), "{dtype} {shape}");
            assert_eq!(
                vector::delta_digest(&base, &Shuffled(3)).unwrap(),
                base.digest(),
                "{dtype} {shape}, threads"
            );
        }
    }
}
