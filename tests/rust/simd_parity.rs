//! Every instruction set gives the bits of the portable code, and every fast path of restoring gives those of the oracle.

mod common;
#[path = "common/linear.rs"]
mod linear;

use common::{Rng, matrix, unaligned};
use linear::{Case, DTYPES, ENCODINGS, MODES, Shuffled, isas};
use xorz::cpu::{
    Isa, LinearArgs, Mode, Serial, delta_apply, delta_linear, delta_restore, delta_restore_rows,
};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Resident, restore};

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let mut rng = Rng::new(21);
    // Under emulation a product of 17 rows is worth its minutes, one of 40 is not.
    let most = if std::env::var_os("XORZ_TEST_ISA").is_some() { 17 } else { 40 };
    for (n, k) in [(35, 301), (3, 4200), (260, 40)] {
        for dtype in DTYPES {
            for encoding in ENCODINGS {
                let shape = Shape { n, k };
                let base = rng.weights(dtype, n * k);
                let fine_tuned = common::perturbed(&mut rng, dtype, &base, 0.1);
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                for m in [1, 3, 4, 8, 13, 16, 17, 40].into_iter().filter(|m| *m <= most) {
                    let x = rng.weights(dtype, m * k);
                    let bias = rng.weights(dtype, n);
                    let grad = rng.weights(dtype, m * n);
                    let run = |isa: Isa| {
                        let y = MODES.map(|mode| case.linear(isa, &x, m, Some(&bias), mode));
                        (y, case.grad(isa, &grad, m, &Serial))
                    };
                    let want = run(Isa::Scalar);
                    for isa in isas() {
                        assert!(run(isa) == want, "{isa:?} {} m {m}", case.name());
                    }
                }
            }
        }
    }
}

#[test]
fn every_address_is_read_alike() {
    let mut rng = Rng::new(22);
    let shape = Shape { n: 19, k: 333 };
    for dtype in DTYPES {
        for encoding in ENCODINGS {
            let base = rng.weights(dtype, shape.n * shape.k);
            let fine_tuned = common::perturbed(&mut rng, dtype, &base, 0.1);
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            for m in [1, 10, 40] {
                let x = rng.weights(dtype, m * shape.k);
                let bias = rng.weights(dtype, shape.n);
                let want = case.linear(Isa::active().unwrap(), &x, m, Some(&bias), Mode::Fast);
                let (b, d, x, bias) =
                    (unaligned(&case.base), unaligned(&case.blob), unaligned(&x), unaligned(&bias));
                let args = LinearArgs {
                    x: &x[1..],
                    m,
                    base: matrix(dtype, shape, &b[1..]),
                    delta: Resident::parse(&d[1..]).unwrap(),
                    bias: Some(&bias[1..]),
                    mode: Mode::Fast,
                };
                let mut out = vec![0; want.len()];
                delta_linear(&args, &mut out, &Serial).unwrap();
                assert!(out == want, "{} m {m}", case.name());
            }
        }
    }
}

#[test]
fn restore_and_apply_equal_the_oracle_on_every_dtype() {
    let mut rng = Rng::new(23);
    for dtype in Dtype::ALL {
        for (n, k) in [(1, 1), (35, 301), (17, 4500), (300, 40), (0, 3), (3, 0)] {
            for encoding in ENCODINGS {
                let shape = Shape { n, k };
                let base = match dtype {
                    Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 => {
                        common::adversarial(&mut rng, dtype, n * k)
                    }
                    _ => rng.weights(dtype, n * k),
                };
                let fresh = rng.bytes(base.len());
                let moved = common::perturbed(&mut rng, dtype, &base, 0.2);
                let fine_tuned = rng.mix(dtype, &moved, &fresh, 0.02);
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                check_words(&mut rng, &case);
            }
        }
    }
}

fn check_words(rng: &mut Rng, case: &Case) {
    let (n, row) = (case.shape.n, case.shape.k * case.dtype.word_bytes());
    let (b, d) = (unaligned(&case.base), unaligned(&case.blob));
    let base = matrix(case.dtype, case.shape, &b[1..]);
    let delta = Resident::parse(&d[1..]).unwrap();
    let mut oracle = vec![0; case.base.len()];
    restore(&delta, &base, &mut oracle).unwrap();
    assert!(oracle == case.fine_tuned, "{}", case.name());

    let mut out = unaligned(&vec![0xA5; oracle.len()]);
    delta_restore(&delta, &base, &mut out[1..], &Shuffled(2)).unwrap();
    assert!(out[1..] == oracle, "restore {}", case.name());

    let mut weight = unaligned(&case.base);
    delta_apply(&delta, case.dtype, case.shape, &mut weight[1..], &Shuffled(3)).unwrap();
    assert!(weight[1..] == oracle, "apply {}", case.name());

    for _ in 0..3 {
        let start = (rng.next() % (n as u64 + 1)) as usize;
        let end = start + (rng.next() % ((n - start) as u64 + 1)) as usize;
        let mut out = vec![0xA5; (end - start) * row];
        delta_restore_rows(&delta, &base, start..end, &mut out, &Serial).unwrap();
        assert!(out == oracle[start * row..end * row], "rows {start}..{end} of {}", case.name());
    }
    let e = delta_restore_rows(&delta, &base, 0..n + 1, &mut out, &Serial).unwrap_err();
    assert_eq!(e.kind(), Kind::InvalidArgument);
}

#[test]
fn apply_changes_nothing_when_the_delta_is_corrupt() {
    let mut rng = Rng::new(24);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 64, k: 300 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = common::perturbed(&mut rng, dtype, &base, 0.1);
    for encoding in ENCODINGS {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let mut blob = case.blob.clone();
        let at = blob.len() - 70;
        blob[at] ^= 0x55;
        let Ok(delta) = Resident::parse(&blob) else { continue };
        if delta.check().is_ok() {
            continue;
        }
        let mut weight = case.base.clone();
        assert!(delta_apply(&delta, dtype, shape, &mut weight, &Serial).is_err());
        assert!(weight == case.base, "{}", case.name());
    }
}
