//! Promise: gradients for the input on CUDA (`cuda/linear_grad.cu`), run on the host from their own source, are those of the
//! fine-tuned weights, in any mix of tenants; a row's bits are its own; what contradicts itself is NaN and reported.

use crate::common::data::{Rng, adversarial, matrix, perturbed, value, word};
use crate::common::device::{After, Device, Param, TSAN};
use crate::common::grads::{fleet_grad, fleet_reference, grad, grad_mixes, grad_of_one};
use crate::common::kernels::{
    Fleet, LINEAR_OUT, LINEAR_STATUS, Large, Linear, TENANTS, assert_streams, device, maps, nudged, on_tiles,
    restore, run_large, status, tuned,
};
use crate::common::linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, Resident};

fn run(device: &Device, mixes: &[(Large, Vec<i32>)]) -> Vec<Vec<After>> {
    run_large(device, &mixes.iter().map(|m| m.0.clone()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn one_hot_grad_gives_the_fine_tuned_row_exactly() {
    let (device, mut rng) = (device(), Rng::new(311));
    for dtype in DTYPES {
        let w = dtype.word_bytes();
        for (n, k) in [(70, 139), (67, 600)] {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            let odd = tuned(&mut rng, dtype, &base, 0.3);
            let finite = |b: &[u8]| if value(dtype, b).is_finite() { b.to_vec() } else { word(dtype, 0.75) };
            let far: Vec<u8> = odd.chunks(w).flat_map(finite).collect();
            let near = nudged(&mut rng, w, &base, 4, 0);
            let near = rng.mix(dtype, &near, &far, 0.1);
            let hot: Vec<u8> =
                (0..n * n).flat_map(|i| word(dtype, f64::from(u8::from(i / n == i % n)))).collect();
            let cases: Vec<_> = ENCODINGS
                .iter()
                .map(|&encoding| {
                    let fine_tuned = if encoding == Encoding::Exponent { &near } else { &far };
                    let case = Case::new(dtype, shape, encoding, &base, fine_tuned);
                    assert_streams(&case.blob);
                    case
                })
                .collect();
            let all: Vec<_> = cases
                .iter()
                .enumerate()
                .map(|(i, c)| grad_of_one(c, &c.blob, &hot, n, i % 2 == 0, 1))
                .collect();
            for (after, case) in run_large(&device, &all).unwrap().iter().zip(&cases) {
                assert_eq!(status(after, LINEAR_STATUS), 0);
                let (got, want) = (values(dtype, &after[LINEAR_OUT].bytes), values(dtype, &case.fine_tuned));
                let wrong = got.iter().zip(&want).position(|(g, w)| g != w);
                assert_eq!(wrong, None, "{}", case.name());
            }
        }
    }
}

#[test]
fn exact_sums_equal_float64_bit_for_bit_in_any_mix() {
    let (device, mut rng) = (device(), Rng::new(312));
    for dtype in DTYPES {
        for (n, k, m) in
            [(70, 259, 40), (1, 600, 3), (129, 33, 150), (260, 1, 16), (66, 1032, 20), (18, 4360, 9)]
        {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, m * n, 3);
            let mixes = grad_mixes(&fleet, &mut rng, m, &x);
            for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
                assert_eq!(status(after, LINEAR_STATUS), 0, "{dtype} {shape} {map:?}");
                let want = fleet_reference(&fleet, &x, map);
                let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &want);
                assert_eq!(difference, None, "{dtype} {shape} {map:?}");
            }
        }
    }
}

#[test]
fn errors_stay_within_the_bound_of_their_chain() {
    let (device, mut rng) = (device(), Rng::new(313));
    for dtype in DTYPES {
        let shape = Shape { n: 700, k: 40 };
        let Shape { n, k } = shape;
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
        let m = 12;
        let x = rng.weights(dtype, m * n);
        let mixes: Vec<_> = grad_mixes(&fleet, &mut rng, m, &x).into_iter().step_by(3).collect();
        for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
            let got = values(dtype, &after[LINEAR_OUT].bytes);
            let (want, xv) = (fleet_reference(&fleet, &x, map), values(dtype, &x));
            for (i, &t) in map.iter().enumerate() {
                let weights = values(dtype, &fleet.case(t).fine_tuned);
                for c in 0..k {
                    // grad_sums.cuh: an mma in the emulation, or an FMA, rounds once.
                    let chain = if dtype == Dtype::F32 { n } else { n.div_ceil(16) };
                    let size = (0..n).map(|r| (xv[i * n + r] * weights[r * k + c]).abs()).sum::<f64>();
                    let want = want[i * k + c];
                    let rounding = match dtype {
                        Dtype::F32 => 0.0,
                        Dtype::BF16 => 2f64.powi(-8) * want.abs() * 1.01,
                        _ => (2f64.powi(-11) * want.abs()).max(2f64.powi(-25)) * 1.01,
                    };
                    let bound = chain as f64 * 2f64.powi(-24) * size + n as f64 * 2f64.powi(-126) + rounding;
                    let error = (got[i * k + c] - want).abs();
                    assert!(error <= bound, "{dtype} tenant {t} {map:?}: {error} > {bound}");
                }
            }
        }
    }
}

#[test]
fn a_rows_bits_are_its_own_in_any_company() {
    let (device, mut rng) = (device(), Rng::new(314));
    for dtype in DTYPES {
        let shape = Shape { n: 90, k: 290 };
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
        let (x_row, y_row) = (shape.n * dtype.word_bytes(), shape.k * dtype.word_bytes());
        let m = 70;
        let x = rng.weights(dtype, m * shape.n);
        for map in maps(&mut rng, m).into_iter().step_by(3) {
            let keep = (rng.next() % m as u64) as usize;
            let turned: Vec<u8> = x.chunks(x_row).rev().flatten().copied().collect();
            let turned_map: Vec<i32> = map.iter().rev().copied().collect();
            let all = [
                fleet_grad(&fleet, &x, &map, None, false, 0),
                fleet_grad(&fleet, &x, &map, Some(2), true, 7),
                fleet_grad(&fleet, &x[keep * x_row..][..x_row], &map[keep..=keep], None, true, 0),
                fleet_grad(&fleet, &turned, &turned_map, Some(1), false, 9),
            ];
            let after = run_large(&device, &all).unwrap();
            let row = |i: usize, at: usize| &after[i][LINEAR_OUT].bytes[at * y_row..][..y_row];
            assert!(after[0][LINEAR_OUT].bytes == after[1][LINEAR_OUT].bytes, "{dtype} {map:?}: order shows");
            assert!(row(0, keep) == row(2, 0), "{dtype} row {keep} of {map:?}: alone");
            (0..m)
                .for_each(|i| assert!(row(0, i) == row(3, m - 1 - i), "{dtype} row {i} of {map:?}: turned"));
        }
    }
}

/// Outputs of which f32 sums are not finite.
fn check_far(dtype: Dtype, got: &[f64], want: &[f64], name: &str) -> (usize, usize) {
    let largest = if dtype == Dtype::F16 { 65504.0 } else { f64::from(f32::MAX) };
    let (mut nans, mut infinities) = (0, 0);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert_eq!(g.is_nan(), w.is_nan(), "{name} output {i}: {g} for {w}");
        let far = w.abs() > 1.01 * largest;
        assert!(!far || (g.is_infinite() && g.signum() == w.signum()), "{name} output {i}: {g} for {w}");
        let near = w.abs() < 0.99 * largest;
        assert!(!near || (g - w).abs() <= 0.005 * w.abs().max(1.0), "{name} output {i}: {g} for {w}");
        nans += usize::from(w.is_nan());
        infinities += usize::from(w.is_infinite());
    }
    (nans, infinities)
}

#[test]
fn gradients_that_are_not_finite_are_those_of_the_tenants_weights() {
    let (device, mut rng) = (device(), Rng::new(315));
    for dtype in DTYPES {
        let shape = Shape { n: 70, k: 290 };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 4);
            let odd: Vec<u8> = (0..words)
                .flat_map(|_| {
                    word(dtype, [f64::INFINITY, f64::NEG_INFINITY, f64::NAN][(r.next() % 3) as usize])
                })
                .collect();
            r.mix(dtype, &plain, &odd, 0.002)
        };
        let fleet = Fleet::new(&mut rng, dtype, shape, words, 0.01);
        let m = 26;
        let mut x = integers(&mut rng, dtype, m * shape.n, 2);
        x[..dtype.word_bytes()].copy_from_slice(&word(dtype, f64::INFINITY));
        let mixes: Vec<_> = grad_mixes(&fleet, &mut rng, m, &x).into_iter().step_by(2).collect();
        let (mut nans, mut infinities) = (0, 0);
        for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
            assert_eq!(status(after, LINEAR_STATUS), 0);
            let (got, want) = (values(dtype, &after[LINEAR_OUT].bytes), fleet_reference(&fleet, &x, map));
            let found = check_far(dtype, &got, &want, &format!("{dtype} {map:?}"));
            nans += found.0;
            infinities += found.1;
        }
        assert!(nans > 100 && infinities > 10, "only {nans} NaN and {infinities} infinities");
    }
    // Sums that leave f32 on the way and come back: only f64 has them.
    for dtype in [Dtype::BF16, Dtype::F32] {
        let (shape, m) = (Shape { n: 70, k: 300 }, 6);
        let base = integers(&mut rng, dtype, shape.n * shape.k, 3);
        let mut far = base.clone();
        for (r, v) in [(0, 3e38), (1, 3e38), (20, -3e38), (21, -3e38)] {
            for c in (0..300).step_by(7) {
                far[(r * 300 + c) * dtype.word_bytes()..][..dtype.word_bytes()]
                    .copy_from_slice(&word(dtype, v));
            }
        }
        let x: Vec<u8> = (0..m * shape.n).flat_map(|_| word(dtype, 1.0)).collect();
        for encoding in [Encoding::Sparse, Encoding::Raw, Encoding::Exponent] {
            let case = Case::new(dtype, shape, encoding, &base, &far);
            let after =
                run_large(&device, &[grad_of_one(&case, &case.blob, &x, m, true, 1)]).unwrap().remove(0);
            let want = case.reference_grad(&x, m);
            assert_eq!(status(&after, LINEAR_STATUS), 0);
            assert_eq!(first_difference(dtype, &after[LINEAR_OUT].bytes, &want), None, "{}", case.name());
        }
    }
}

#[test]
fn words_at_any_address_and_empty_dimensions_have_gradients() {
    let (device, mut rng) = (device(), Rng::new(316));
    for dtype in DTYPES {
        let w = dtype.word_bytes() as u64;
        for (n, k) in [(19, 512), (70, 270)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, 6 * n, 3);
            let map = [0, 3, 4, -1, 8, 2];
            let mut all = vec![];
            for (i, (at, by)) in [(0, 1), (1, 3), (LINEAR_OUT, 5)].into_iter().enumerate() {
                let mut one = fleet_grad(&fleet, &x, &map, None, i % 2 == 0, 1);
                for launch in [&mut one.segments, &mut one.product] {
                    match &mut launch.params[at] {
                        Param::In(_, offset) | Param::Out(_, offset) => *offset = by * w,
                        _ => panic!("no bytes"),
                    }
                }
                all.push(one);
            }
            for after in run_large(&device, &all).unwrap() {
                let want = fleet_reference(&fleet, &x, &map);
                let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &want);
                assert_eq!((status(&after, LINEAR_STATUS), difference), (0, None), "{dtype} {shape}");
            }
        }
        for (n, k, m) in [(3, 0, 2), (0, 5, 2), (3, 5, 0), (0, 0, 0), (3, 5, 2)] {
            let fleet = Fleet::new(&mut rng, dtype, Shape { n, k }, |r, w| integers(r, dtype, w, 4), 0.5);
            let x = integers(&mut rng, dtype, m * n, 2);
            let map: Vec<i32> = (0..m).map(|i| [3, 0][i % 2]).collect();
            let one = fleet_grad(&fleet, &x, &map, None, true, 0);
            let after = run_large(&device, &[one]).unwrap().remove(0);
            let difference =
                first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet_reference(&fleet, &x, &map));
            assert_eq!((status(&after, LINEAR_STATUS), difference), (0, None), "{dtype} {n} x {k} m {m}");
        }
    }
}

#[test]
fn strips_begin_and_end_anywhere_in_tiles_of_every_size() {
    let (device, mut rng) = (device(), Rng::new(317));
    for dtype in DTYPES {
        let shape = Shape { n: 150, k: 900 };
        let base = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let far = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let x = integers(&mut rng, dtype, 5 * shape.n, 3);
        let low = if dtype == Dtype::F32 { 16 } else { 3 * u32::from(dtype == Dtype::F16) };
        let mut cases = vec![];
        for (encoding, rows, cols, share) in [
            (Encoding::Sparse, 16, 256, 0.3),
            (Encoding::Sparse, 16, 4096, 0.3),
            (Encoding::Sparse, 16, 1024, 0.003),
            (Encoding::Exponent, 256, 256, 0.2),
            (Encoding::Exponent, 128, 512, 0.02),
            (Encoding::Exponent, 16, 4096, 0.02),
        ] {
            let steps = nudged(&mut rng, dtype.word_bytes(), &base, 2, low);
            let zero_kept: Vec<u8> = steps
                .chunks(dtype.word_bytes())
                .zip(base.chunks(dtype.word_bytes()))
                .flat_map(|(n, b)| if value(dtype, b) == 0.0 { b } else { n }.to_vec())
                .collect();
            let near = if encoding == Encoding::Exponent { &zero_kept } else { &base };
            let fine_tuned = rng.mix(dtype, near, &far, share);
            let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            assert_streams(&case.blob);
            case.blob = on_tiles(&case, rows, cols);
            cases.push(case);
        }
        let all: Vec<_> = cases
            .iter()
            .enumerate()
            .map(|(i, c)| grad_of_one(c, &c.blob, &x, 5, i % 2 == 0, i as u64))
            .collect();
        for (after, case) in run_large(&device, &all).unwrap().iter().zip(&cases) {
            let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &case.reference_grad(&x, 5));
            assert_eq!((status(after, LINEAR_STATUS), difference), (0, None), "{}", case.name());
        }
    }
}

#[test]
fn rows_of_tenants_that_do_not_fit_are_nan_and_no_others() {
    let (device, mut rng, dtype) = (device(), Rng::new(318), Dtype::BF16);
    let shape = Shape { n: 20, k: 300 };
    let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 4), 0.1);
    let x = integers(&mut rng, dtype, 5 * shape.n, 2);
    let row = 2 * shape.k;
    for (spoilt, bad, code) in [(None, 77, 2), (Some([-64, 64]), 0, 3), (Some([fleet.slots[0][0], 64]), 0, 5)]
    {
        let mut slots = fleet.slots.clone();
        spoilt.into_iter().for_each(|slot| slots[0] = slot);
        let map = [bad, 3, -1, 4, bad];
        let linear = Linear {
            arena: &fleet.arena,
            slots: Some(&slots),
            tenant_of_row: Some(&map),
            ..Linear::of_one(&fleet.cases[0], &x, 5)
        };
        let after = run_large(&device, &[grad(&linear, None, true)]).unwrap().remove(0);
        assert_eq!(status(&after, LINEAR_STATUS), code << 24 | bad as u32);
        let y = &after[LINEAR_OUT].bytes;
        assert!(y[..row].iter().chain(&y[4 * row..]).all(|b| *b == 0xFF), "{code}");
        let want = fleet_reference(&fleet, &x[2 * shape.n..8 * shape.n], &map[1..4]);
        assert_eq!(first_difference(dtype, &y[row..4 * row], &want), None, "{code}");
    }
    assert!(TENANTS.iter().all(|t| *t < 77));
}

/// Blobs broken byte by byte: what restore reports is reported, and then there is NaN; else the words are the oracle's.
fn hostile(device: &Device, seed: u64, every: usize) {
    let mut rng = Rng::new(seed);
    let shape = Shape { n: 40, k: 600 };
    for dtype in [Dtype::BF16, Dtype::F32] {
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
        let x = rng.weights(dtype, 2 * shape.n);
        let near = nudged(&mut rng, dtype.word_bytes(), &base, 3, 0);
        let near = rng.mix(dtype, &near, &fine_tuned, 0.05);
        for encoding in ENCODINGS {
            let fine_tuned = if encoding == Encoding::Exponent { &near } else { &fine_tuned };
            let mut case = Case::new(dtype, shape, encoding, &base, fine_tuned);
            if encoding == Encoding::Sparse {
                case.blob = on_tiles(&case, 16, 1024);
            }
            let every = if encoding == Encoding::Raw { case.blob.len() } else { every };
            let spots = (8..HEADER_BYTES).step_by(11).chain((HEADER_BYTES..case.blob.len()).step_by(every));
            let blobs: Vec<_> = spots
                .map(|at| {
                    let mut bad = case.blob.clone();
                    bad[at] ^= [0x01, 0x80, 0xFF][(rng.next() % 3) as usize];
                    bad
                })
                .collect();
            let which = (dtype as u32, shape);
            let restores: Vec<_> =
                blobs.iter().map(|b| restore(false, which, dtype.word_bytes(), &base, b, 5, 0)).collect();
            let grads: Vec<_> =
                blobs.iter().enumerate().map(|(i, b)| grad_of_one(&case, b, &x, 2, i % 2 == 0, 0)).collect();
            let restored = device.run(&restores).unwrap();
            for (i, (after, restored)) in run_large(device, &grads).unwrap().iter().zip(&restored).enumerate()
            {
                let name = format!("{} blob {i}", case.name());
                let code = status(after, LINEAR_STATUS);
                assert_eq!(code, status(restored, 7), "{name}");
                let got = values(dtype, &after[LINEAR_OUT].bytes);
                if code != 0 {
                    assert!(got.iter().any(|v| v.is_nan()), "{name}: no NaN");
                    assert!(code >> 24 == 1 || got.iter().all(|v| v.is_nan()), "{name}: refused, no NaN");
                    continue;
                }
                let mut words = vec![0; base.len()];
                let oracle = Resident::parse(&blobs[i]).unwrap();
                xorz::resident::restore(&oracle, &matrix(dtype, shape, &base), &mut words).unwrap();
                let sizes: Vec<u8> =
                    values(dtype, &words).iter().flat_map(|v| word(dtype, v.abs())).collect();
                let of = |fine_tuned: Vec<u8>| Case { fine_tuned, base: vec![], blob: vec![], ..case };
                let x_sizes: Vec<u8> = values(dtype, &x).iter().flat_map(|v| word(dtype, v.abs())).collect();
                let (want, size) = (of(words).reference_grad(&x, 2), of(sizes).reference_grad(&x_sizes, 2));
                for ((g, w), s) in got.iter().zip(want).zip(size) {
                    let near = (g - w).abs() <= 0.005 * s;
                    let far = g.is_nan() == w.is_nan() && (w.is_nan() || w.abs() > 3e38 && g.is_infinite());
                    assert!(near || far, "{name}: {g} for {w}");
                }
            }
        }
    }
}

#[test]
fn broken_bytes_give_the_gradient_of_the_oracles_words_or_nan_and_a_status() {
    hostile(&device(), 319, 307);
}

#[test]
fn gradients_harm_no_memory_and_no_two_threads_race() {
    let flags = [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=xorz_shared",
    ];
    let sanitized = Device::new("sanitized", &flags);
    hostile(&sanitized, 320, 3001);
    let raced = Device::new("raced", &["-O1", "-g1", TSAN]);
    let mut rng = Rng::new(321);
    for dtype in DTYPES {
        let shape = Shape { n: 66, k: 300 };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 6);
            let odd = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &odd, 0.0002)
        };
        let fleet = Fleet::new(&mut rng, dtype, shape, words, 0.1);
        let x = integers(&mut rng, dtype, 20 * shape.n, 3);
        let all: Vec<_> = maps(&mut rng, 20)
            .iter()
            .enumerate()
            .filter(|(i, _)| i % 3 == dtype as usize % 3)
            .map(|(i, map)| fleet_grad(&fleet, &x, map, Some(2), i % 2 == 0, 1))
            .collect();
        run_large(&sanitized, &all).unwrap();
        run_large(&raced, &all).unwrap();
    }
}
