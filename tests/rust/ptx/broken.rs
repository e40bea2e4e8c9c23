//! Promise: whatever bytes a delta has, what nvcc makes of the kernels touches nothing that is not theirs and gives the words of
//! the library's own reading of it, or a status and NaN. Races of two writes are forgiven here: of positions that are out of order
//! several threads mark the beginning of a row (cuda/patch_marks.cuh), in a tile that they all find corrupt.

use crate::common::data::{Rng, adversarial, matrix, value};
use crate::common::grads::grad_of_one;
use crate::common::kernels::{
    APPLY_STATUS, APPLY_WEIGHT, LINEAR_OUT, Linear, assert_streams, nudged, restore, status, tuned,
};
use crate::common::linear::{Case, integers};
use crate::machine::Machine;
use crate::oracle::{machine, product_status, run, run_large};
use crate::restores::apply;
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, Resident};

/// Bytes here and there turned, and deltas cut short.
fn spoilt(rng: &mut Rng, blob: &[u8], every: usize) -> Vec<Vec<u8>> {
    let mut all = vec![];
    for at in (0..HEADER_BYTES).step_by(3).chain((HEADER_BYTES..blob.len()).step_by(every)) {
        let mut bad = blob.to_vec();
        bad[at] ^= [0x01, 0x80, 0xFF][(rng.next() % 3) as usize];
        all.push(bad);
    }
    all.extend([0, 64, 191, 192, blob.len() - 64].map(|len| blob[..len].to_vec()));
    all
}

/// The words that the library makes of a delta, if it takes it.
fn accepted(case: &Case, blob: &[u8]) -> Option<Vec<u8>> {
    let base = matrix(case.dtype, case.shape, &case.base);
    let mut words = vec![0; case.base.len()];
    let delta = Resident::parse(blob).ok().filter(|delta| delta.check_base(&base).is_ok())?;
    xorz::resident::restore(&delta, &base, &mut words).ok().map(|()| words)
}

/// The same words; a NaN that was computed, as of a difference that is broken, may have any payload.
fn alike(dtype: Dtype, got: &[u8], want: &[u8]) -> bool {
    let w = dtype.word_bytes();
    let is_nan = |word| value(dtype, word).is_nan();
    got.chunks(w).zip(want.chunks(w)).all(|(a, b)| a == b || (is_nan(a) && is_nan(b)))
}

fn check_broken(machine: &Machine, case: &Case, bad: &[u8], x: &[u8], way: usize) -> Result<(), String> {
    let (which, w) = ((case.dtype as u32, case.shape), case.dtype.word_bytes());
    let restored = run(machine, &restore(false, which, w, &case.base, bad, 2, 0))?;
    let applied = apply(machine, &restore(true, which, w, &case.base, bad, 2, 0), 2)?;
    let code = status(&restored, 7);
    let agree = match accepted(case, bad) {
        Some(words) if code == 0 => [&restored[1].bytes, &applied[APPLY_WEIGHT].bytes]
            .iter()
            .all(|got| alike(case.dtype, got, &words)),
        _ if code == 0 => false,
        _ => applied[APPLY_WEIGHT].bytes == case.base,
    };
    let nan = code >> 24 <= 1 || restored[1].bytes.iter().all(|b| *b == 0xFF);
    if !agree || !nan || code != status(&applied, APPLY_STATUS) {
        return Err(format!("{}: status {code:#x}, other words or no NaN", case.name()));
    }
    let linear =
        |rows, m: usize| Linear { arena: bad, rows, ..Linear::of_one(case, &x[..m * case.shape.k * w], m) };
    let after = match way % 4 {
        0 => run(machine, &linear(4, 2).launch())?,
        1 => run(machine, &linear(16, 5).launch())?,
        2 => run_large(machine, &linear(16, 5).large(None, true))?,
        _ => run_large(machine, &grad_of_one(case, bad, &x[..3 * case.shape.n * w], 3, true, 0))?,
    };
    // Products of few rows look at exceptions only where a sum asks for it.
    let (found, y) = (product_status(&after), &after[LINEAR_OUT].bytes);
    if (way % 4 >= 2 && found != code) || (found != 0 && !y.contains(&0xFF)) {
        return Err(format!("{} way {way}: status {found:#x} for {code:#x}, or no NaN", case.name()));
    }
    Ok(())
}

#[test]
fn broken_deltas_give_words_or_a_status_and_harm_no_memory() {
    let Some(machine) = machine("broken_deltas_give_words_or_a_status_and_harm_no_memory") else { return };
    let mut rng = Rng::new(91);
    let shape = Shape { n: 19, k: 300 };
    for dtype in [Dtype::BF16, Dtype::F32] {
        for encoding in [Encoding::Sparse, Encoding::Exponent, Encoding::Raw] {
            let base = if encoding == Encoding::Exponent {
                rng.weights(dtype, shape.n * shape.k)
            } else {
                adversarial(&mut rng, dtype, shape.n * shape.k)
            };
            let mut fine_tuned = tuned(&mut rng, dtype, &base, 0.05);
            if encoding == Encoding::Exponent {
                let near = nudged(&mut rng, dtype.word_bytes(), &base, 4, 0);
                fine_tuned = rng.mix(dtype, &near, &fine_tuned, 0.02);
            }
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            assert_streams(&case.blob);
            let x = integers(&mut rng, dtype, 5 * shape.k, 2);
            let every = case.blob.len() / 60;
            let forgiving = machine.forgiving();
            for (i, bad) in spoilt(&mut rng, &case.blob, every).iter().enumerate() {
                check_broken(&forgiving, &case, bad, &x, i).unwrap_or_else(|e| panic!("blob {i}: {e}"));
            }
        }
    }
}
