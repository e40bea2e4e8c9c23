//! What products may take: at most 2 MiB of scratch a thread and no restored panel at small m, measured by an
//! allocator that counts and by the crate's own counters. The counters are the process's,
//! so tests that read them have a process of their own.

use crate::common::alone::alone;
use crate::common::counting::held_by;
use crate::common::data::{Rng, matrix, perturbed, word};
use crate::common::linear::{Case, DTYPES, ENCODINGS, MODES};
use xorz::codec::{Encoding, Prefer};
use xorz::cpu::{
    Arena, GroupedArgs, LinearArgs, Mode, counters, delta_linear, delta_linear_grad_input,
    delta_linear_grouped,
};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Resident, encode_pair};
use xorz::vector::{Isa, Serial};

/// The most that `f` held beyond what was held before; on a thread of its own, whose scratch starts empty.
fn peak_of(f: impl FnOnce() + Send) -> usize {
    std::thread::scope(|s| s.spawn(|| held_by(f).1.most).join().unwrap())
}

const LIMIT: usize = 2 << 20;

#[test]
fn products_take_at_most_2_mib_of_scratch_a_thread() {
    alone(|| {
        let mut rng = Rng::new(31);
        // Wide tiles, many tiles, many rows of x; NaN in x sends everything through the decode path too.
        for (n, k, m) in [(16, 4096, 16), (8, 70_000, 9), (256, 256, 16), (40, 300, 9000), (3, 4096, 300)] {
            for dtype in DTYPES.into_iter().filter(|d| m < 1000 || *d == Dtype::BF16) {
                for encoding in ENCODINGS {
                    let base = rng.weights(dtype, n * k);
                    let fresh = rng.weights(dtype, n * k);
                    let fine_tuned = rng.mix(dtype, &base, &fresh, 0.1);
                    let case = Case::new(dtype, Shape { n, k }, encoding, &base, &fine_tuned);
                    let mut x = rng.weights(dtype, k).repeat(m);
                    x[..dtype.word_bytes()].copy_from_slice(&word(dtype, f64::NAN));
                    let grad = rng.weights(dtype, n).repeat(m);
                    let (mut y, mut gx) =
                        (vec![0; m * n * dtype.word_bytes()], vec![0; m * k * dtype.word_bytes()]);
                    counters::reset();
                    for mode in MODES.into_iter().take(if m > 1000 { 1 } else { 2 }) {
                        let peak =
                            peak_of(|| delta_linear(&case.args(&x, m, None, mode), &mut y, &Serial).unwrap());
                        assert!(peak <= LIMIT, "{} m {m} {mode:?}: {peak} bytes", case.name());
                    }
                    if m <= 300 {
                        let args = case.args(&x, m, None, Mode::Fast);
                        let peak = peak_of(|| {
                            delta_linear_grad_input(&grad, m, &args.base, &args.delta, &mut gx, &Serial)
                                .unwrap();
                        });
                        assert!(peak <= LIMIT, "{} m {m} gradient: {peak} bytes", case.name());
                    }
                    let counted = counters::scratch_peak_bytes();
                    assert!(counted > 0 && counted <= LIMIT as u64, "{counted}");
                }
            }
        }
    });
}

#[test]
fn no_panel_is_restored_at_small_m() {
    alone(|| {
        let mut rng = Rng::new(32);
        let shape = Shape { n: 48, k: 600 };
        for dtype in DTYPES {
            let base = rng.weights(dtype, shape.n * shape.k);
            for share in [0.0, 0.002, 0.01, 0.1, 0.3] {
                let fine_tuned = perturbed(&mut rng, dtype, &base, share);
                for prefer in [Prefer::Speed, Prefer::Memory] {
                    let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
                    let blob = encode_pair(&b, &f, prefer).unwrap();
                    let encoding = Resident::parse(&blob).unwrap().header().encoding;
                    let case = Case {
                        dtype,
                        shape,
                        base: base.clone(),
                        fine_tuned: fine_tuned.clone(),
                        encoding,
                        blob,
                    };
                    for m in 1..=16 {
                        assert_eq!(panels(&case, &mut rng, m, Mode::Fast), 0, "{} m {m}", case.name());
                    }
                    assert_eq!(panels(&case, &mut rng, 40, Mode::Deterministic), 0, "{}", case.name());
                    // The counter counts: a large m restores each tile once, but for the base's own words,
                    // which the bf16 dot product multiplies as they are.
                    let as_they_are = encoding == Encoding::Unchanged
                        && dtype == Dtype::BF16
                        && Isa::active().unwrap() == Isa::Avx512Bf16;
                    let tiles = Resident::parse(&case.blob).unwrap().grid().tiles() as u64;
                    let tiles = if as_they_are { 0 } else { tiles };
                    assert_eq!(panels(&case, &mut rng, 40, Mode::Fast), tiles, "{}", case.name());
                }
            }
        }
    });
}

#[test]
fn a_batch_of_many_tenants_takes_no_more_and_restores_no_panel() {
    alone(|| {
        let mut rng = Rng::new(34);
        let (dtype, n, k) = (Dtype::F32, 32, 9000);
        let base = rng.weights(dtype, n * k);
        let (mut arena, mut slots) = (Vec::new(), Vec::new());
        for encoding in
            [Encoding::Sparse, Encoding::Sparse, Encoding::Exponent, Encoding::Raw, Encoding::Sparse]
        {
            let fresh = rng.weights(dtype, n * k);
            let fine_tuned = rng.mix(dtype, &base, &fresh, 0.1);
            let case = Case::new(dtype, Shape { n, k }, encoding, &base, &fine_tuned);
            slots.push([arena.len() as i64, case.blob.len() as i64]);
            arena.extend_from_slice(&case.blob);
            arena.resize(arena.len().next_multiple_of(64), 0);
        }
        for m in [1, 8, 16, 300] {
            let mut x = rng.weights(dtype, m * k);
            let clean = x.clone();
            x[..4].copy_from_slice(&word(dtype, f64::NAN));
            let mixed: Vec<i32> = (0..m).map(|i| (i * 7 % 6) as i32 - 1).collect();
            // Three tenants of whole blocks of rows, so that entries go through both kernels.
            let runs: Vec<i32> = (0..m).map(|i| [0, 1, 4][i * 3 / m]).collect();
            for map in [mixed, runs] {
                for mode in MODES {
                    let mut args = GroupedArgs {
                        x: &x,
                        m,
                        base: matrix(dtype, Shape { n, k }, &base),
                        arena: Arena { bytes: &arena, slots: &slots },
                        tenant_of_row: &map,
                        biases: None,
                        mode,
                    };
                    let mut y = vec![0; m * n * 4];
                    let peak = peak_of(|| delta_linear_grouped(&args, &mut y, &Serial).unwrap());
                    assert!(peak <= LIMIT, "m {m} {mode:?}: {peak} bytes");
                    args.x = &clean;
                    counters::reset();
                    delta_linear_grouped(&args, &mut y, &Serial).unwrap();
                    let counted = counters::panels_restored();
                    assert!(
                        counted == 0 || (m > 16 && mode == Mode::Fast),
                        "m {m} {mode:?}: {counted} panels"
                    );
                }
            }
        }
    });
}

fn panels(case: &Case, rng: &mut Rng, m: usize, mode: Mode) -> u64 {
    let x = rng.weights(case.dtype, m * case.shape.k);
    counters::reset();
    case.linear(Isa::active().unwrap(), &x, m, None, mode);
    counters::panels_restored()
}

#[test]
fn scratch_does_not_grow_with_n() {
    let mut rng = Rng::new(33);
    let peak = |rng: &mut Rng, n: usize| {
        let (dtype, shape) = (Dtype::BF16, Shape { n, k: 512 });
        let base = rng.weights(dtype, n * 512);
        let fine_tuned = perturbed(rng, dtype, &base, 0.05);
        let case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
        let x = rng.weights(dtype, 8 * 512);
        let mut y = vec![0; 8 * n * 2];
        let args: LinearArgs<'_> = case.args(&x, 8, None, Mode::Fast);
        peak_of(|| delta_linear(&args, &mut y, &Serial).unwrap())
    };
    let (small, large) = (peak(&mut rng, 1024), peak(&mut rng, 8192));
    assert!(small == large, "{small} bytes for 1024 rows, {large} for 8192");
}
