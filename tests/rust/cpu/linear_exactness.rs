//! The promises of `delta_linear` and `delta_linear_grad_input` about their numbers (docs/numerics.md),
//! over encodings, dtypes and instruction sets; and mutants, which the comparisons used here must catch.

use crate::common::data::{Rng, adversarial, matrix, perturbed, value, word};
use crate::common::linear::{
    Case, DTYPES, ENCODINGS, MODES, Shuffled, first_difference, integers, isas, values,
};
use xorz::codec::{Encoding, Tile};
use xorz::cpu::{Mode, delta_linear};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::Resident;
use xorz::vector::{Isa, Serial};

/// A case of small integers, a share of whose words changed.
fn exact_case(rng: &mut Rng, dtype: Dtype, shape: Shape, encoding: Encoding, share: f64) -> Case {
    let words = shape.n * shape.k;
    let base = integers(rng, dtype, words, 8);
    let other = integers(rng, dtype, words, 8);
    let fine_tuned = rng.mix(dtype, &base, &other, share);
    Case::new(dtype, shape, encoding, &base, &fine_tuned)
}

fn each(mut check: impl FnMut(Isa, Dtype, Encoding)) {
    for isa in isas() {
        for dtype in DTYPES {
            ENCODINGS.into_iter().for_each(|encoding| check(isa, dtype, encoding));
        }
    }
}

#[test]
fn one_hot_x_gives_the_fine_tuned_column_exactly() {
    let mut rng = Rng::new(1);
    let shape = Shape { n: 37, k: 307 };
    each(|isa, dtype, encoding| {
        if dtype == Dtype::F32 {
            return;
        }
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.3);
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let identity: Vec<u8> = (0..shape.k * shape.k)
            .flat_map(|i| word(dtype, f64::from(u8::from(i / shape.k == i % shape.k))))
            .collect();
        let row = shape.k * 2;
        for (m, from) in [(1, 5), (3, 100), (4, 200), (16, 250), (33, 270), (shape.k, 0)] {
            for mode in MODES {
                let y = case.linear(isa, &identity[from * row..(from + m) * row], m, None, mode);
                for j in 0..m {
                    for r in 0..shape.n {
                        let got = value(dtype, &y[(j * shape.n + r) * 2..][..2]);
                        let want = value(dtype, &case.fine_tuned[r * row + (from + j) * 2..][..2]);
                        assert!(got == want, "{isa:?} {} m {m} {mode:?}: {got} {want}", case.name());
                    }
                }
            }
        }
    });
}

#[test]
fn denormal_words_cost_no_more_than_documented() {
    let mut rng = Rng::new(12);
    let shape = Shape { n: 21, k: 75 };
    let denormal = |rng: &mut Rng| (rng.next() as u16 & 0x807F | 1).to_le_bytes();
    let large = |rng: &mut Rng| word(Dtype::BF16, rng.normal() * 1e30);
    each(|isa, dtype, encoding| {
        if dtype != Dtype::BF16 {
            return;
        }
        let words = shape.n * shape.k;
        let base: Vec<u8> = (0..words).flat_map(|_| denormal(&mut rng)).collect();
        let fine_tuned: Vec<u8> = base.chunks(2).flat_map(|w| [w[0] ^ 2, w[1]]).collect();
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        for m in [1, 2, 4, 9, 16, 40] {
            let x: Vec<u8> = (0..m * shape.k).flat_map(|_| large(&mut rng)).collect();
            let (exact, rows) = (case.reference(&x, m, None), values(dtype, &x));
            let y = case.linear(isa, &x, m, None, Mode::Fast);
            for (i, (got, want)) in values(dtype, &y).iter().zip(&exact).enumerate() {
                let size: f64 = rows[i / shape.n * shape.k..][..shape.k].iter().map(|x| x.abs()).sum();
                // Each weight counts as itself or, with the bf16 dot product, as zero; and the output is
                // rounded.
                let bound = (size + 1.0) * 2f64.powi(-126) + want.abs() / 128.0;
                assert!((got - want).abs() <= bound, "{isa:?} {} m {m}: {got:e} {want:e}", case.name());
                if isa != Isa::Avx512Bf16 {
                    let slack = want.abs() / 128.0 + size * 2f64.powi(-126) * 1e-4;
                    assert!((got - want).abs() <= slack, "{isa:?} {} m {m}: {got:e} {want:e}", case.name());
                }
            }
        }
    });
}

#[test]
fn sums_that_f32_holds_equal_float64_bit_for_bit() {
    let mut rng = Rng::new(2);
    // Odd sizes, one row, one column, a column tile more, 256-row tiles of exponent, more than 65536 columns.
    let shapes = [(19, 131), (1, 1000), (33, 1), (5, 4099), (300, 64), (9, 8200), (2, 70_001)];
    let mut m_of = [1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 40].into_iter().cycle();
    each(|isa, dtype, encoding| {
        // The portable code is slow, and `simd_parity` ties it to the others.
        for (n, k) in shapes.into_iter().filter(|(n, k)| isa != Isa::Scalar || n * k < 20_000) {
            let shape = Shape { n, k };
            let share = [0.002, 0.03, 0.3][(rng.next() % 3) as usize];
            let case = exact_case(&mut rng, dtype, shape, encoding, share);
            let m = m_of.next().unwrap();
            let x = integers(&mut rng, dtype, m * k, 3);
            let bias = integers(&mut rng, dtype, n, 64);
            let bias = (m % 2 == 1).then_some(&bias[..]);
            let want = case.reference(&x, m, bias);
            for mode in MODES {
                let got = case.linear(isa, &x, m, bias, mode);
                let difference = first_difference(dtype, &got, &want);
                assert_eq!(difference, None, "{isa:?} {} m {m} {mode:?}", case.name());
            }
        }
    });
}

#[test]
fn every_number_of_rows_equals_float64_on_exact_sums() {
    let mut rng = Rng::new(3);
    let shape = Shape { n: 35, k: 259 };
    let isa = Isa::active().unwrap();
    for dtype in DTYPES {
        for encoding in ENCODINGS {
            let case = exact_case(&mut rng, dtype, shape, encoding, 0.1);
            let x = integers(&mut rng, dtype, 300 * shape.k, 3);
            let want = case.reference(&x, 300, None);
            for m in (1..=40).chain([63, 64, 65, 128, 255, 257, 300]) {
                for mode in MODES {
                    let got = case.linear(isa, &x[..m * shape.k * dtype.word_bytes()], m, None, mode);
                    let difference = first_difference(dtype, &got, &want[..m * shape.n]);
                    assert_eq!(difference, None, "{} m {m} {mode:?}", case.name());
                }
            }
        }
    }
}

#[test]
fn errors_stay_within_the_documented_bound() {
    let mut rng = Rng::new(4);
    let shape = Shape { n: 17, k: 4500 };
    let Shape { n, k } = shape;
    each(|isa, dtype, encoding| {
        let base = rng.weights(dtype, n * k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let (wb, wf) = (values(dtype, &case.base), values(dtype, &case.fine_tuned));
        for m in [1, 5, 10, 35].into_iter().filter(|m| isa != Isa::Scalar || *m < 10) {
            let x = rng.weights(dtype, m * k);
            let bias = rng.weights(dtype, n);
            let want = case.reference(&x, m, Some(&bias));
            let (xv, bv) = (values(dtype, &x), values(dtype, &bias));
            for mode in MODES {
                let got = values(dtype, &case.linear(isa, &x, m, Some(&bias), mode));
                for i in 0..m * n {
                    let (j, r) = (i / n, i % n);
                    let (w0, w1) = (&wb[r * k..(r + 1) * k], &wf[r * k..(r + 1) * k]);
                    // A changed word is at most two entries; gaps over 255 columns add one each to `sparse`.
                    // Of `exponent` a word may be its stream's as well, and then it is no entry.
                    let changed = w0.iter().zip(w1).filter(|(a, b)| a != b).count();
                    let added = matches!(encoding, Encoding::Sparse | Encoding::Exponent);
                    let entries = if added { 2 * changed + k / 255 } else { 0 };
                    let chain = 4096 / 16 + 4 + 9 + entries + 1;
                    let size: f64 = (0..k)
                        .map(|c| {
                            let x = xv[j * k + c].abs();
                            let d = (w1[c] - w0[c]).abs();
                            x * if added { w0[c].abs() + 3.0 * d } else { w1[c].abs() }
                        })
                        .sum::<f64>()
                        + bv[r].abs();
                    let rounding = match dtype {
                        Dtype::F32 => 0.0,
                        Dtype::BF16 => 2f64.powi(-8) * want[i].abs() * 1.01,
                        _ => (2f64.powi(-11) * want[i].abs()).max(2f64.powi(-25)) * 1.01,
                    };
                    let bound = chain as f64 * 2f64.powi(-24) * size + k as f64 * 2f64.powi(-126) + rounding;
                    let error = (got[i] - want[i]).abs();
                    assert!(error <= bound, "{isa:?} {} m {m} {mode:?}: {error} > {bound}", case.name());
                }
            }
        }
    });
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut rng = Rng::new(5);
    let shape = Shape { n: 83, k: 1100 };
    let isa = Isa::active().unwrap();
    for dtype in DTYPES {
        for encoding in ENCODINGS {
            let base = rng.weights(dtype, shape.n * shape.k);
            let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            for m in [1, 7, 40] {
                let x = rng.weights(dtype, m * shape.k);
                let grad = rng.weights(dtype, m * shape.n);
                let gx = case.grad(isa, &grad, m, &Serial);
                for threads in [1, 2, 3, 7] {
                    for mode in MODES {
                        let want = case.linear(isa, &x, m, None, mode);
                        let got = case.linear_by(isa, &x, m, None, mode, &Shuffled(threads)).unwrap();
                        assert!(got == want, "{} m {m} {threads} threads {mode:?}", case.name());
                    }
                    assert!(case.grad(isa, &grad, m, &Shuffled(threads)) == gx, "grad {}", case.name());
                }
            }
        }
    }
}

#[test]
fn a_row_never_depends_on_the_values_of_another() {
    let mut rng = Rng::new(6);
    let shape = Shape { n: 21, k: 270 };
    each(|isa, dtype, encoding| {
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        for m in [2, 3, 9, 18, 37] {
            let row = shape.k * dtype.word_bytes();
            let clean = rng.weights(dtype, m * shape.k);
            let mut dirty = clean.clone();
            let keep = (rng.next() % m as u64) as usize;
            for (i, w) in dirty.chunks_mut(dtype.word_bytes()).enumerate() {
                if i / shape.k != keep {
                    w.copy_from_slice(&word(dtype, [f64::NAN, f64::INFINITY, 1e30, 0.0][i % 4]));
                }
            }
            let out = shape.n * dtype.word_bytes();
            for mode in MODES {
                let (a, b) =
                    (case.linear(isa, &clean, m, None, mode), case.linear(isa, &dirty, m, None, mode));
                let at = keep * out..(keep + 1) * out;
                assert!(a[at.clone()] == b[at], "{isa:?} {} m {m} {mode:?}", case.name());
            }
            let grad = |x: &[u8]| {
                let g: Vec<u8> = x.chunks(row).flat_map(|r| r[..out].to_vec()).collect();
                case.grad(isa, &g, m, &Serial)[keep * row..(keep + 1) * row].to_vec()
            };
            assert!(grad(&clean) == grad(&dirty), "{isa:?} grad {} m {m}", case.name());
        }
    });
}

#[test]
fn deterministic_bits_are_the_same_in_any_company() {
    let mut rng = Rng::new(7);
    let shape = Shape { n: 21, k: 4200 };
    each(|isa, dtype, encoding| {
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let row = shape.k * dtype.word_bytes();
        let out = shape.n * dtype.word_bytes();
        let x = rng.weights(dtype, shape.k);
        let want = case.linear(isa, &x, 1, None, Mode::Deterministic);
        // The portable code is slow, and `simd_parity` ties it to the others.
        let most = if isa == Isa::Scalar { 4 } else { 40 };
        let strangers = rng.weights(dtype, 50_000);
        for m in 2..=most {
            let mut company: Vec<u8> = strangers.iter().copied().cycle().take(m * row).collect();
            let at = (rng.next() % m as u64) as usize;
            company[at * row..(at + 1) * row].copy_from_slice(&x);
            let got = case.linear(isa, &company, m, None, Mode::Deterministic);
            assert!(got[at * out..(at + 1) * out] == want, "{isa:?} {} row {at} of {m}", case.name());
        }
    });
}

#[test]
fn non_finite_results_are_those_of_the_fine_tuned_weights() {
    let mut rng = Rng::new(8);
    let shape = Shape { n: 40, k: 290 };
    each(|isa, dtype, encoding| {
        // Rows of W: words of every kind on either side, at few places, so that some outputs stay finite.
        let plain = integers(&mut rng, dtype, shape.n * shape.k, 4);
        let odd = adversarial(&mut rng, dtype, shape.n * shape.k);
        let base = rng.mix(dtype, &plain, &odd, 0.002);
        let fine_tuned = rng.mix(dtype, &base, &odd, 0.002);
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        for m in [1, 3, 9, 36] {
            let x = integers(&mut rng, dtype, m * shape.k, 2);
            let specials = adversarial(&mut rng, dtype, m * shape.k);
            let x = rng.mix(dtype, &x, &specials, [0.0, 0.002][m % 2]);
            let want = case.reference(&x, m, None);
            let gy: Vec<u8> = integers(&mut rng, dtype, m * shape.n, 2);
            let want_grad = case.reference_grad(&gy, m);
            for mode in MODES {
                check_class(&case, isa, &case.linear(isa, &x, m, None, mode), &want, m);
            }
            check_class(&case, isa, &case.grad(isa, &gy, m, &Serial), &want_grad, m);
        }
    });
}

/// NaN where the reference has NaN, infinities where it overflows the dtype; finite ones close.
fn check_class(case: &Case, isa: Isa, got: &[u8], want: &[f64], m: usize) {
    let largest = match case.dtype {
        Dtype::F32 => f64::from(f32::MAX),
        Dtype::BF16 => 3.389_531_389_251_535_5e38,
        _ => 65504.0,
    };
    for (i, (g, &w)) in values(case.dtype, got).iter().zip(want).enumerate() {
        let fits = if w.is_nan() {
            g.is_nan()
        } else if w.abs() > largest * 1.01 {
            g.is_infinite() && g.signum() == w.signum()
        } else if w.abs() > largest * 0.99 {
            !g.is_nan()
        } else {
            // The terms may be huge and cancel; what remains is a matter of the bound, not of this test.
            !g.is_nan()
        };
        assert!(fits, "{isa:?} {} m {m}: output {i} is {g} instead of {w}", case.name());
    }
}

#[test]
fn a_finite_fine_tune_of_a_non_finite_base_is_computed_exactly() {
    let mut rng = Rng::new(9);
    let shape = Shape { n: 18, k: 64 };
    each(|isa, dtype, encoding| {
        if encoding == Encoding::Unchanged {
            return;
        }
        let fine_tuned = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let mut base = fine_tuned.clone();
        let w = dtype.word_bytes();
        for r in 0..shape.n {
            let special = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 3e38, -0.0][r % 5];
            base[(r * shape.k + r) * w..][..w].copy_from_slice(&word(dtype, special));
        }
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        for m in [1, 5, 10, 35] {
            let x = integers(&mut rng, dtype, m * shape.k, 3);
            let want = case.reference(&x, m, None);
            for mode in MODES {
                let got = case.linear(isa, &x, m, None, mode);
                // 3e38 - d is rounded to 3e38: exact only where it did not enter an f32 sum.
                let rows: Vec<_> = (0..m * shape.n).filter(|i| i % shape.n % 5 != 3).collect();
                let got: Vec<u8> = rows.iter().flat_map(|i| got[i * w..(i + 1) * w].to_vec()).collect();
                let want: Vec<f64> = rows.iter().map(|&i| want[i]).collect();
                let difference = first_difference(dtype, &got, &want);
                assert_eq!(difference, None, "{isa:?} {} m {m} {mode:?}", case.name());
            }
        }
    });
}

#[test]
fn gradients_of_exact_sums_equal_float64_bit_for_bit() {
    let mut rng = Rng::new(10);
    each(|isa, dtype, encoding| {
        for (n, k) in [(19, 131), (1, 1030), (33, 1), (300, 67), (17, 4300)] {
            let case = exact_case(&mut rng, dtype, Shape { n, k }, encoding, 0.1);
            for m in [1, 2, 16, 19] {
                let grad = integers(&mut rng, dtype, m * n, 3);
                let got = case.grad(isa, &grad, m, &Serial);
                let difference = first_difference(dtype, &got, &case.reference_grad(&grad, m));
                assert_eq!(difference, None, "{isa:?} {} m {m}", case.name());
            }
        }
    });
}

#[test]
fn empty_dimensions_are_computed_on() {
    for dtype in DTYPES {
        let bias: Vec<u8> = (0..3).flat_map(|i| word(dtype, f64::from(i) + 0.5)).collect();
        for (n, k, m) in [(3, 0, 2), (0, 5, 2), (3, 5, 0), (0, 0, 0)] {
            let shape = Shape { n, k };
            let base = vec![0; n * k * dtype.word_bytes()];
            for encoding in ENCODINGS {
                let case = Case::new(dtype, shape, encoding, &base, &base);
                let x = vec![0; m * k * dtype.word_bytes()];
                for mode in MODES {
                    let b = &bias[..n * dtype.word_bytes()];
                    let y = case.linear(Isa::active().unwrap(), &x, m, Some(b), mode);
                    assert_eq!(y, b.repeat(m), "{}", case.name());
                    let y = case.linear(Isa::active().unwrap(), &x, m, None, mode);
                    assert!(y.iter().all(|b| *b == 0), "{}", case.name());
                }
                let grad = vec![0; m * n * dtype.word_bytes()];
                let gx = case.grad(Isa::active().unwrap(), &grad, m, &Serial);
                assert!(gx.iter().all(|b| *b == 0));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dtype = Dtype::BF16;
    let shape = Shape { n: 4, k: 8 };
    let words = vec![0; 64];
    let case = Case::new(dtype, shape, Encoding::Raw, &words, &words);
    let mut out = vec![0u32; 8];
    let out: &mut [u8] = bytemuck::cast_slice_mut(&mut out);
    let refused = |args: &xorz::cpu::LinearArgs<'_>, out: &mut [u8], kind: Kind, name: &str| {
        let e = delta_linear(args, out, &Serial).unwrap_err();
        assert!(e.kind() == kind && e.message().contains(name), "{e}");
    };
    let x = vec![0; 2 * 16];
    refused(&case.args(&x[..30], 2, None, Mode::Fast), &mut out[..16], Kind::Mismatch, "x has 30 bytes");
    refused(&case.args(&x, 2, None, Mode::Fast), &mut out[..14], Kind::Mismatch, "out has 14 bytes");
    refused(&case.args(&x, 2, Some(&x[..6]), Mode::Fast), &mut out[..16], Kind::Mismatch, "bias has 6 bytes");
    refused(&case.args(&x, 2, None, Mode::Fast), &mut out[1..17], Kind::InvalidArgument, "aligned");
    let mut other = case.args(&x, 2, None, Mode::Fast);
    other.base = matrix(dtype, Shape { n: 8, k: 4 }, &words);
    refused(&other, &mut out[..16], Kind::Mismatch, "[8, 4]");
    let ints = Case::new(Dtype::U16, shape, Encoding::Raw, &words, &words);
    refused(&ints.args(&x, 2, None, Mode::Fast), &mut out[..16], Kind::Unsupported, "U16");
    assert!(Isa::choose(Some("sse9")).unwrap_err().message().contains("sse9"));
    assert_eq!(Isa::choose(Some("scalar")).unwrap(), Isa::Scalar);
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        assert_eq!(Isa::choose(Some(isa.name())).unwrap_err().kind(), Kind::Unsupported);
    }
}

/// Where in the blob the gaps and the differences of tile 0 lie.
fn places(blob: &[u8]) -> (usize, usize, usize) {
    let delta = Resident::parse(blob).unwrap();
    let Tile::Sparse(t) = delta.tile(0).unwrap() else { panic!("not sparse") };
    let at = |part: &[u8]| part.as_ptr().addr() - blob.as_ptr().addr();
    (at(t.gaps), at(t.differences), t.records)
}

#[test]
fn mutants_are_caught() {
    let mut rng = Rng::new(11);
    let shape = Shape { n: 16, k: 200 };
    for dtype in DTYPES {
        let w = dtype.word_bytes();
        let case = exact_case(&mut rng, dtype, shape, Encoding::Sparse, 0.1);
        for m in [1, 5, 10, 40] {
            // Never zero, so that no wrong word can hide behind a zero of x; each value is its own power of
            // two times an odd number, so that no two columns weigh the same.
            let x: Vec<u8> = (0..m * shape.k)
                .flat_map(|i| word(dtype, f64::from([1, 3, 5, 7][i % 4]) * [1.0, 2.0, 4.0][i / 4 % 3]))
                .collect();
            let want = case.reference(&x, m, None);
            let caught = |blob: Vec<u8>, what: &str| {
                let mutant = Case { blob, base: case.base.clone(), fine_tuned: vec![], ..case_like(&case) };
                let got = mutant.linear(Isa::active().unwrap(), &x, m, None, Mode::Fast);
                assert!(
                    first_difference(dtype, &got, &want).is_some(),
                    "{what} went unnoticed, {dtype} m {m}"
                );
            };
            let got = case.linear(Isa::active().unwrap(), &x, m, None, Mode::Fast);
            assert_eq!(first_difference(dtype, &got, &want), None);

            let ignored = Case::new(dtype, shape, Encoding::Unchanged, &case.base, &case.base);
            caught(ignored.blob, "a delta ignored");

            let (gaps, differences, records) = places(&case.blob);
            let lane = (rng.next() % 16) as usize;
            let no_op = word(dtype, -0.0);
            let at = |j: usize| differences + (j * 16 + lane) * w;
            let real: Vec<usize> =
                (0..records).filter(|&j| case.blob[at(j)..at(j) + w] != no_op[..]).collect();
            let j = real[(rng.next() % real.len() as u64) as usize];
            let mut dropped = case.blob.clone();
            dropped[at(j)..at(j) + w].copy_from_slice(&no_op);
            caught(dropped, "a dropped change");

            // The last change of the lane, so that exactly one column moves.
            let j = *real.last().unwrap();
            let mut moved = case.blob.clone();
            let gap = &mut moved[gaps + j * 16 + lane];
            *gap = if *gap > 0 { *gap - 1 } else { *gap + 1 };
            caught(moved, "a gap off by one");
        }
    }
}

fn case_like(case: &Case) -> Case {
    Case {
        dtype: case.dtype,
        shape: case.shape,
        base: Vec::new(),
        fine_tuned: Vec::new(),
        encoding: case.encoding,
        blob: Vec::new(),
    }
}

#[test]
fn hostile_columns_are_refused_and_never_followed() {
    let mut rng = Rng::new(12);
    let shape = Shape { n: 20, k: 300 };
    for dtype in DTYPES {
        let case = exact_case(&mut rng, dtype, shape, Encoding::Sparse, 0.1);
        let (gaps, ..) = places(&case.blob);
        let mut blob = case.blob.clone();
        blob[gaps..gaps + 64].fill(255);
        let hostile = Case { blob, base: case.base.clone(), ..case_like(&case) };
        for isa in isas() {
            for m in [1, 8, 40] {
                let x = integers(&mut rng, dtype, m * shape.k, 3);
                let e = hostile.linear_by(isa, &x, m, None, Mode::Fast, &Serial).unwrap_err();
                assert!(e.kind() == Kind::Corrupt && e.message().contains("tile 0"), "{e}");
            }
        }
    }
}
