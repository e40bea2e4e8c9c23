//! Promise: what nvcc makes of restore, verify and apply gives back every word bit for bit, and refuses broken deltas with a
//! status, never out of bounds.

use crate::common::data::{Rng, adversarial};
use crate::common::device::{After, Launch, Param};
use crate::common::kernels::{
    APPLY_STATUS, APPLY_VERDICTS, APPLY_WEIGHT, nudged, on_tiles, restore, status, tuned, verify,
};
use crate::common::linear::{Case, ENCODINGS};
use crate::machine::Machine;
use crate::oracle::{machine, run};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

/// Verify on some blocks, then apply as they say.
pub(crate) fn apply(machine: &Machine, one: &Launch, blocks: u32) -> Result<Vec<After>, String> {
    let mut left = run(machine, &verify(one, blocks))?;
    let mut one = one.clone();
    one.params[APPLY_STATUS] = Param::Out(std::mem::take(&mut left[APPLY_STATUS].bytes), 0);
    one.params[APPLY_VERDICTS] = Param::In(std::mem::take(&mut left[APPLY_VERDICTS].bytes), 0);
    one.params[APPLY_VERDICTS + 1] = Param::U64(blocks.into());
    run(machine, &one)
}

/// Both ways give the fine-tuned words.
pub(crate) fn check(machine: &Machine, case: &Case, rng: &mut Rng) -> Result<(), String> {
    let any = u32::from(!rng.next().is_multiple_of(4));
    let (dtype, w) = ((case.dtype as u32 * any, case.shape), case.dtype.word_bytes());
    let blocks = 1 + (rng.next() % 3) as u32;
    let one = |applies| restore(applies, dtype, w, &case.base, &case.blob, blocks, rng_seed(&case.blob));
    let restored = run(machine, &one(false))?;
    let applied = apply(machine, &one(true), 2)?;
    for (after, out, at) in [(restored, 1, 7), (applied, APPLY_WEIGHT, APPLY_STATUS)] {
        let wrong = after[out].bytes.chunks(w).zip(case.fine_tuned.chunks(w)).position(|(a, b)| a != b);
        if status(&after, at) != 0 || wrong.is_some() {
            return Err(format!("{}: status {:#x}, word {wrong:?}", case.name(), status(&after, at)));
        }
    }
    Ok(())
}

fn rng_seed(blob: &[u8]) -> u64 {
    blob.iter().take(64).map(|b| u64::from(*b)).sum()
}

const SHAPES: [(usize, usize); 7] = [(1, 1), (33, 31), (3, 4097), (130, 127), (17, 1000), (0, 5), (3, 0)];

/// Fine-tuned words of every kind for one base: steps that `exponent` takes, changes here and there, all that arithmetic mishandles.
pub(crate) fn cases(rng: &mut Rng, dtype: Dtype, shape: Shape) -> Vec<Case> {
    let words = shape.n * shape.k;
    let odd = dtype.computes() && words % 2 == 1;
    let base = if odd { adversarial(rng, dtype, words) } else { rng.weights(dtype, words) };
    let share = [0.004, 0.05, 0.5][(rng.next() % 3) as usize];
    let fine_tuned = tuned(rng, dtype, &base, share);
    let mut all: Vec<_> =
        ENCODINGS.into_iter().map(|e| Case::new(dtype, shape, e, &base, &fine_tuned)).collect();
    let w = dtype.word_bytes();
    for bits in [1, 4, 8 * w as u32 - 3] {
        let near = nudged(rng, w, &base, bits, 0);
        let near = rng.mix(dtype, &near, &fine_tuned, 0.01);
        all.push(Case::new(dtype, shape, Encoding::Exponent, &base, &near));
    }
    all
}

#[test]
fn restored_and_applied_words_are_bit_exact() {
    let Some(machine) = machine("restored_and_applied_words_are_bit_exact") else { return };
    let mut rng = Rng::new(171);
    for dtype in Dtype::ALL {
        for (n, k) in SHAPES {
            for case in cases(&mut rng, dtype, Shape { n, k }) {
                check(machine, &case, &mut rng).unwrap();
            }
        }
    }
}

#[test]
fn narrow_and_tall_tiles_are_restored() {
    let Some(machine) = machine("narrow_and_tall_tiles_are_restored") else { return };
    let mut rng = Rng::new(172);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::U8, Dtype::F64] {
        for (encoding, rows, cols) in [
            (Encoding::Sparse, 16, 256),
            (Encoding::Exponent, 16, 256),
            (Encoding::Exponent, 64, 512),
            (Encoding::Exponent, 256, 256),
        ] {
            let shape = Shape { n: 70, k: 700 };
            let base = rng.weights(dtype, shape.n * shape.k);
            let mut fine_tuned = tuned(&mut rng, dtype, &base, 0.1);
            if encoding == Encoding::Exponent {
                let near = nudged(&mut rng, dtype.word_bytes(), &base, 4, 0);
                fine_tuned = rng.mix(dtype, &near, &fine_tuned, 0.02);
            }
            let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            case.blob = on_tiles(&case, rows, cols);
            check(machine, &case, &mut rng).unwrap();
        }
    }
}
