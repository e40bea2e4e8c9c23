//! Promise: the kernels of `cuda/`, run on the host from their own source, give back every word bit for bit,
//! and products as docs/numerics.md promises; under random orders of threads, in any mix of tenants.

use crate::common::data::{Rng, adversarial, perturbed, value, word};
use crate::common::device::{After, Device, Launch, Param, root};
use crate::common::kernels::{
    APPLY_STATUS, APPLY_WEIGHT, Fleet, LINEAR_OUT, LINEAR_STATUS, Linear, assert_streams, blocks_of, device,
    maps, mixes, nudged, on_tiles, restore, run_applies, status, tuned,
};
use crate::common::linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, MAGIC, VERSION};

/// A launch of restore and one of apply for each case, and that each gives the fine-tuned words.
fn check_restores(device: &Device, cases: &[(Case, Vec<u8>)], rng: &mut Rng) {
    let mut launches = vec![];
    for (case, blob) in cases {
        let any = u32::from(!rng.next().is_multiple_of(4));
        let dtype = (case.dtype as u32 * any, case.shape);
        for apply in [false, true] {
            let blocks = 1 + (rng.next() % 5) as u32;
            let seed = rng.next() % 3;
            launches.push(restore(apply, dtype, case.dtype.word_bytes(), &case.base, blob, blocks, seed));
        }
    }
    let mut after = device.run(&launches).unwrap();
    let applies: Vec<_> = launches.iter().skip(1).step_by(2).cloned().collect();
    let checked = run_applies(device, &applies, 3).unwrap();
    after.iter_mut().skip(1).step_by(2).zip(checked).for_each(|(after, checked)| *after = checked);
    for (i, after) in after.iter().enumerate() {
        let (case, _) = &cases[i / 2];
        let (out, at) = [(1, 7), (APPLY_WEIGHT, APPLY_STATUS)][i % 2];
        let name = format!("{} of {}", launches[i].kernel, case.name());
        assert_eq!(status(after, at), 0, "{name}");
        let w = case.dtype.word_bytes();
        let wrong = after[out].bytes.chunks(w).zip(case.fine_tuned.chunks(w)).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{name}");
    }
}

const SHAPES: [(usize, usize); 11] = [
    (1, 1),
    (1, 1000),
    (33, 1),
    (19, 131),
    (5, 4099),
    (300, 64),
    (9, 8200),
    (17, 4096),
    (40, 512),
    (0, 5),
    (3, 0),
];

#[test]
fn restore_and_apply_are_bit_exact_for_every_dtype_encoding_and_shape() {
    let (device, mut rng) = (device(), Rng::new(71));
    for dtype in Dtype::ALL {
        let mut cases = vec![];
        for (n, k) in SHAPES {
            let shape = Shape { n, k };
            let base = if n % 2 == 1 && dtype.computes() {
                adversarial(&mut rng, dtype, n * k)
            } else {
                rng.weights(dtype, n * k)
            };
            let share = [0.004, 0.05, 0.5][(rng.next() % 3) as usize];
            let fine_tuned = tuned(&mut rng, dtype, &base, share);
            for encoding in ENCODINGS {
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                let blob = case.blob.clone();
                cases.push((case, blob));
            }
            // Streams of narrow and of wide steps, a few exceptions among them.
            let w = dtype.word_bytes();
            for bits in [1, 3, 7, 8 * w as u32 - 3] {
                let near = nudged(&mut rng, w, &base, bits, 0);
                let fine_tuned = rng.mix(dtype, &near, &fine_tuned, 0.01);
                let case = Case::new(dtype, shape, Encoding::Exponent, &base, &fine_tuned);
                if n * k > 1000 {
                    assert_streams(&case.blob);
                }
                let blob = case.blob.clone();
                cases.push((case, blob));
            }
        }
        check_restores(&device, &cases, &mut rng);
    }
}

#[test]
fn tiles_of_every_size_are_restored() {
    let (device, mut rng) = (device(), Rng::new(72));
    let mut cases = vec![];
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::U8, Dtype::F64] {
        for (n, k) in [(70, 700), (33, 5000)] {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            let fine_tuned = tuned(&mut rng, dtype, &base, 0.1);
            for (encoding, rows, cols) in [
                (Encoding::Sparse, 16, 256),
                (Encoding::Sparse, 16, 1024),
                (Encoding::Exponent, 16, 256),
                (Encoding::Exponent, 64, 512),
                (Encoding::Exponent, 256, 256),
            ] {
                let near = nudged(&mut rng, dtype.word_bytes(), &base, 4, 0);
                let fine_tuned = if encoding == Encoding::Exponent {
                    rng.mix(dtype, &near, &fine_tuned, 0.02)
                } else {
                    fine_tuned.clone()
                };
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                assert_streams(&case.blob);
                let blob = on_tiles(&case, rows, cols);
                cases.push((case, blob));
            }
        }
    }
    check_restores(&device, &cases, &mut rng);
}

#[test]
fn two_entries_of_a_column_add_up_wherever_runs_of_records_end() {
    let (device, mut rng) = (device(), Rng::new(73));
    // Differences that one bf16 cannot hold: tiny bases, large fine-tuned words. Every length of lane near 16
    // runs.
    let mut cases = vec![];
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for changed in 1..=40 {
            let shape = Shape { n: 3, k: 300 };
            let base: Vec<u8> = (0..900).flat_map(|i| word(dtype, [1e-3, 0.73, -0.011][i % 3])).collect();
            let mut fine_tuned = base.clone();
            for r in 0..3 {
                for c in 0..changed {
                    let at = (r * 300 + c * (r + 1)) * dtype.word_bytes();
                    let new = word(dtype, 1.37 + 0.19 * rng.normal());
                    fine_tuned[at..at + new.len()].copy_from_slice(&new);
                }
            }
            let case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
            let blob = case.blob.clone();
            cases.push((case, blob));
        }
    }
    check_restores(&device, &cases, &mut rng);
}

fn run_one(device: &Device, launch: Launch) -> Vec<After> {
    device.run(std::slice::from_ref(&launch)).unwrap().remove(0)
}

#[test]
fn one_hot_x_gives_the_fine_tuned_column_exactly() {
    let (device, mut rng) = (device(), Rng::new(81));
    let shape = Shape { n: 37, k: 307 };
    let Shape { n, k } = shape;
    for dtype in [Dtype::BF16, Dtype::F16] {
        let base = rng.weights(dtype, n * k);
        let far = perturbed(&mut rng, dtype, &base, 0.3);
        let near = nudged(&mut rng, 2, &base, 4, 0);
        for encoding in ENCODINGS {
            let fine_tuned = if encoding == Encoding::Exponent { &near } else { &far };
            let case = Case::new(dtype, shape, encoding, &base, fine_tuned);
            assert_streams(&case.blob);
            let x: Vec<u8> =
                (0..k * k).flat_map(|i| word(dtype, f64::from(u8::from(i / k == i % k)))).collect();
            for &rows in blocks_of(dtype) {
                let launch = Linear {
                    dtype,
                    shape,
                    base: &case.base,
                    x: &x,
                    m: k,
                    arena: &case.blob,
                    slots: None,
                    tenant_of_row: None,
                    biases: None,
                    rows,
                    seed: 1,
                };
                let after = run_one(&device, launch.launch());
                assert_eq!(status(&after, LINEAR_STATUS), 0);
                let (y, want) = (&after[LINEAR_OUT].bytes, &case.fine_tuned);
                for j in 0..k {
                    for r in 0..n {
                        let got = value(dtype, &y[(j * n + r) * 2..][..2]);
                        let want = value(dtype, &want[(r * k + j) * 2..][..2]);
                        assert!(got == want, "{} m{rows}: {got} {want}", case.name());
                    }
                }
            }
        }
    }
}

#[test]
fn exact_sums_equal_float64_bit_for_bit_in_any_mix() {
    let (device, mut rng) = (device(), Rng::new(82));
    for dtype in DTYPES {
        for (n, k) in [(35, 259), (18, 4099), (1, 600), (33, 1), (70, 1032), (2, 20_001)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let numbers: &[usize] = match k {
                259 => &[1, 4, 16, 19],
                20_001 => &[1],
                _ => &[1, 16],
            };
            let mixes = mixes(&mut rng, &fleet, numbers, |r, w| integers(r, dtype, w, 3));
            let launches: Vec<_> = mixes.iter().map(|m| m.0.clone()).collect();
            for (after, (_, x, map)) in device.run(&launches).unwrap().iter().zip(&mixes) {
                assert_eq!(status(after, LINEAR_STATUS), 0, "{dtype} {shape} {map:?}");
                let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(x, map));
                assert_eq!(difference, None, "{dtype} {shape} {map:?}");
            }
        }
    }
}

#[test]
fn errors_stay_within_the_documented_bound() {
    let (device, mut rng) = (device(), Rng::new(83));
    for dtype in DTYPES {
        let shape = Shape { n: 17, k: 4500 };
        let Shape { n, k } = shape;
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
        let x_of = |r: &mut Rng, w: usize| r.weights(dtype, w);
        let mixes = mixes(&mut rng, &fleet, &[1, 9], x_of);
        let launches: Vec<_> = mixes.iter().map(|m| m.0.clone()).collect();
        for (after, (_, x, map)) in device.run(&launches).unwrap().iter().zip(&mixes) {
            let got = values(dtype, &after[LINEAR_OUT].bytes);
            let (want, xv) = (fleet.reference(x, map), values(dtype, x));
            for (i, &t) in map.iter().enumerate() {
                let case = fleet.case(t);
                let (wb, wf) = (values(dtype, &case.base), values(dtype, &case.fine_tuned));
                let bias = values(dtype, fleet.bias(t));
                for r in 0..n {
                    let (w0, w1) = (&wb[r * k..(r + 1) * k], &wf[r * k..(r + 1) * k]);
                    let changed = w0.iter().zip(w1).filter(|(a, b)| a != b).count();
                    // product.cuh; or streams.cuh, whose narrowest tile here has 256 columns; and
                    // entries.cuh.
                    let product = k.div_ceil(256) * 8 + 7;
                    let stream = k / 32 + 6 * k.div_ceil(256);
                    let entries = if case.encoding == Encoding::Sparse { 2 * changed + 17 } else { 0 };
                    let chain = product.max(stream) + entries + 1;
                    let size: f64 = (0..k)
                        .map(|c| xv[i * k + c].abs() * (w0[c].abs() + 3.0 * (w1[c] - w0[c]).abs()))
                        .sum::<f64>()
                        + bias[r].abs();
                    let want = want[i * n + r];
                    let rounding = match dtype {
                        Dtype::F32 => 0.0,
                        Dtype::BF16 => 2f64.powi(-8) * want.abs() * 1.01,
                        _ => (2f64.powi(-11) * want.abs()).max(2f64.powi(-25)) * 1.01,
                    };
                    let bound = chain as f64 * 2f64.powi(-24) * size + k as f64 * 2f64.powi(-126) + rounding;
                    let error = (got[i * n + r] - want).abs();
                    assert!(error <= bound, "{} {map:?}: {error} > {bound}", case.name());
                }
            }
        }
    }
}

#[test]
fn a_row_never_depends_on_the_values_of_another_nor_bits_on_the_order_of_threads() {
    let (device, mut rng) = (device(), Rng::new(84));
    for dtype in DTYPES {
        let shape = Shape { n: 21, k: 270 };
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
        let row = shape.n * dtype.word_bytes();
        let mut launches = vec![];
        let mut kept = vec![];
        for m in [2, 9, 16] {
            let clean = rng.weights(dtype, m * shape.k);
            for map in maps(&mut rng, m) {
                let keep = (rng.next() % m as u64) as usize;
                let mut dirty = clean.clone();
                for (i, w) in dirty.chunks_mut(dtype.word_bytes()).enumerate() {
                    if i / shape.k != keep {
                        w.copy_from_slice(&word(dtype, [f64::NAN, f64::INFINITY, 1e30, 0.0][i % 4]));
                    }
                }
                launches.push(fleet.launch(&clean, &map, 16, 0));
                launches.push(fleet.launch(&dirty, &map, 16, 7));
                launches.push(fleet.launch(&clean, &map, 16, 8));
                kept.push((keep, map));
            }
        }
        let after = device.run(&launches).unwrap();
        for (three, (keep, map)) in after.chunks(3).zip(&kept) {
            let out = |i: usize| &three[i][LINEAR_OUT].bytes;
            assert!(
                out(0)[keep * row..][..row] == out(1)[keep * row..][..row],
                "{dtype} row {keep} of {map:?}"
            );
            assert!(out(0) == out(2), "{dtype} {map:?}: the order of threads shows");
        }
    }
}

#[test]
fn non_finite_results_are_those_of_the_tenants_weights() {
    let (device, mut rng) = (device(), Rng::new(85));
    for dtype in DTYPES {
        let shape = Shape { n: 40, k: 290 };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 4);
            let odd = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &odd, 0.002)
        };
        let fleet = Fleet::new(&mut rng, dtype, shape, words, 0.01);
        let x_of = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 2);
            let odd = adversarial(r, dtype, words);
            let mut x = r.mix(dtype, &plain, &odd, 0.001);
            x[..dtype.word_bytes()].copy_from_slice(&word(dtype, f64::INFINITY));
            x
        };
        let mixes = mixes(&mut rng, &fleet, &[1, 9, 20], x_of);
        let launches: Vec<_> = mixes.iter().map(|m| m.0.clone()).collect();
        let largest = if dtype == Dtype::F16 { 65504.0 } else { f64::from(f32::MAX) };
        let (mut nans, mut infinities) = (0, 0);
        for (after, (_, x, map)) in device.run(&launches).unwrap().iter().zip(&mixes) {
            assert_eq!(status(after, LINEAR_STATUS), 0);
            let got = values(dtype, &after[LINEAR_OUT].bytes);
            for (i, (g, w)) in got.iter().zip(fleet.reference(x, map)).enumerate() {
                assert_eq!(g.is_nan(), w.is_nan(), "{dtype} output {i}: {g} for {w} {map:?}");
                if w.abs() > 1.01 * largest {
                    assert!(
                        g.is_infinite() && g.signum() == w.signum(),
                        "{dtype} output {i}: {g} for {w} {map:?}"
                    );
                }
                nans += usize::from(w.is_nan());
                infinities += usize::from(w.is_infinite());
            }
        }
        assert!(nans > 100 && infinities > 10, "only {nans} NaN and {infinities} infinities");
    }
}

/// The parameter's bytes, so many past a multiple of 256.
fn moved(param: &mut Param, by: u64) {
    match param {
        Param::In(_, offset) | Param::Out(_, offset) => *offset = by,
        _ => panic!("no bytes"),
    }
}

#[test]
fn words_at_any_address_are_computed_on_and_deltas_at_odd_ones_refused() {
    let (device, mut rng) = (device(), Rng::new(88));
    for dtype in DTYPES {
        let w = dtype.word_bytes() as u64;
        for (n, k) in [(19, 1024), (18, 270)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, 6 * k, 3);
            let map = [0, 3, 4, -1, 8, 2];
            let mut launches = vec![];
            for (at, by) in [(0, 1), (1, 3), (9, 5), (2, 1)] {
                let mut launch = fleet.launch(&x, &map, 16, 1);
                moved(&mut launch.params[at], by * w);
                launches.push(launch);
            }
            for after in device.run(&launches).unwrap() {
                assert_eq!(status(&after, LINEAR_STATUS), 0);
                let difference =
                    first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(&x, &map));
                assert_eq!(difference, None, "{dtype} {shape}");
            }
            for slot in [0, 3, 4] {
                let case = fleet.case(slot);
                for (from, to) in [(1, 1), (0, 3), (2, 5)] {
                    let mut launch = restore(false, (0, shape), w as usize, &case.base, &case.blob, 3, 1);
                    moved(&mut launch.params[0], from * w);
                    moved(&mut launch.params[1], to * w);
                    let mut odd = launch.clone();
                    moved(&mut odd.params[2], 8);
                    assert!(run_one(&device, launch)[1].bytes == case.fine_tuned, "{dtype} {shape}");
                    let odd = run_one(&device, odd);
                    assert!(status(&odd, 7) == 4 << 24 && odd[1].bytes.iter().all(|b| *b == 0xFF));
                }
            }
        }
    }
}

#[test]
fn empty_dimensions_are_computed_on() {
    let (device, mut rng) = (device(), Rng::new(86));
    for dtype in DTYPES {
        for (n, k, m) in [(3, 0, 2), (0, 5, 2), (3, 5, 0), (0, 0, 0), (3, 5, 2)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 4), 0.5);
            let x = integers(&mut rng, dtype, m * k, 2);
            let map: Vec<i32> = (0..m).map(|i| [3, 0][i % 2]).collect();
            let after = run_one(&device, fleet.launch(&x, &map, 4, 0));
            assert_eq!(status(&after, LINEAR_STATUS), 0);
            let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(&x, &map));
            assert_eq!(difference, None, "{dtype} {shape} m {m}");
        }
    }
}

#[test]
fn constants_of_the_kernels_are_those_of_the_core() {
    let text = std::fs::read_to_string(root("cuda/resident.cuh")).unwrap()
        + &std::fs::read_to_string(root("cuda/word.cuh")).unwrap();
    let is = |name: &str, value: usize| {
        let found =
            text.split(&format!(" {name} = ")).nth(1).map(|t| t.split([';', ',', ' ', '}']).next().unwrap());
        assert_eq!(found, Some(&value.to_string()[..]), "{name}");
    };
    is("kHeaderBytes", HEADER_BYTES);
    is("kVersion", usize::from(VERSION));
    is("kArenaAlign", xorz::cpu::ARENA_ALIGN);
    is("kTileLanes", xorz::codec::Grid::TILE_ROWS);
    is("kStreamLanes", xorz::codec::exponent::STREAM_LANES);
    is("kClasses", xorz::codec::exponent::CLASSES);
    is("kMaxTileCols", xorz::codec::Grid::MAX_COLS);
    is("kMaxTileWordsLog2", xorz::codec::Grid::MAX_WORDS.trailing_zeros() as usize);
    is("kUnchanged", Encoding::Unchanged as usize);
    is("kSparse", Encoding::Sparse as usize);
    is("kExponent", Encoding::Exponent as usize);
    is("kRaw", Encoding::Raw as usize);
    is("kF32", Dtype::F32 as usize);
    is("kBf16", Dtype::BF16 as usize);
    is("kF16", Dtype::F16 as usize);
    is("kF64", Dtype::F64 as usize);
    is("kDtypes", Dtype::ALL.len());
    assert!(text.contains(&format!("0x{:016X}ull", u64::from_le_bytes(MAGIC))));
}
