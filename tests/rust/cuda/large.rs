//! Promise: products of many rows on CUDA (`cuda/linear_segments.cu`, `cuda/linear_large.cu`), run on the
//! host from their own source, are those of the fine-tuned weights, in any mix of tenants, whenever
//! asynchronous copies land.

use crate::common::data::{Rng, adversarial, perturbed, value, word};
use crate::common::device::{After, Device, Param};
use crate::common::kernels::{
    Fleet, LARGE_WORKSPACE, LINEAR_OUT, LINEAR_STATUS, Large, Linear, assert_streams, device, maps, nudged,
    on_tiles, run_large, status,
};
use crate::common::linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

#[test]
fn one_hot_x_gives_the_fine_tuned_column_exactly() {
    let (device, mut rng) = (device(), Rng::new(181));
    for dtype in DTYPES {
        let w = dtype.word_bytes();
        for (n, k) in [(70, 139), (67, 288)] {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            let far = perturbed(&mut rng, dtype, &base, 0.3);
            let near = nudged(&mut rng, w, &base, 4, 0);
            let x: Vec<u8> =
                (0..k * k).flat_map(|i| word(dtype, f64::from(u8::from(i / k == i % k)))).collect();
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
                .map(|(i, c)| Linear::of_one(c, &x, k).large(None, i % 2 == 0))
                .collect();
            for (after, case) in run_large(&device, &all).unwrap().iter().zip(&cases) {
                assert_eq!(status(after, LINEAR_STATUS), 0);
                for (i, y) in after[LINEAR_OUT].bytes.chunks(w).enumerate() {
                    let (j, r) = (i / n, i % n);
                    let want = value(dtype, &case.fine_tuned[(r * k + j) * w..][..w]);
                    assert!(value(dtype, y) == want, "{} row {r} column {j}", case.name());
                }
            }
        }
    }
}

/// Every map of `m` rows as a product, early and late, on few blocks or many.
fn mixes(fleet: &Fleet, rng: &mut Rng, m: usize, x: &[u8]) -> Vec<(Large, Vec<i32>)> {
    let one = |(i, map): (usize, Vec<i32>)| {
        let blocks = [None, Some(1), Some(3)][(rng.next() % 3) as usize];
        (fleet.large(x, &map, blocks, i % 2 == 0, rng.next() % 3), map)
    };
    maps(&mut Rng::new(m as u64), m).into_iter().enumerate().map(one).collect()
}

fn run(device: &Device, mixes: &[(Large, Vec<i32>)]) -> Vec<Vec<After>> {
    run_large(device, &mixes.iter().map(|m| m.0.clone()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn exact_sums_equal_float64_bit_for_bit_in_any_mix() {
    let (device, mut rng) = (device(), Rng::new(182));
    for dtype in DTYPES {
        for (n, k, m) in
            [(70, 259, 40), (1, 600, 3), (129, 33, 150), (16, 1, 260), (66, 1032, 20), (18, 4360, 17)]
        {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, m * k, 3);
            let mixes = mixes(&fleet, &mut rng, m, &x);
            for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
                assert_eq!(status(after, LINEAR_STATUS), 0, "{dtype} {shape} {map:?}");
                let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(&x, map));
                assert_eq!(difference, None, "{dtype} {shape} {map:?}");
            }
        }
    }
}

#[test]
fn errors_stay_within_the_documented_bound() {
    let (device, mut rng) = (device(), Rng::new(183));
    for dtype in DTYPES {
        let shape = Shape { n: 20, k: 4500 };
        let Shape { n, k } = shape;
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
        let m = 24;
        let x = rng.weights(dtype, m * k);
        let mixes: Vec<_> = mixes(&fleet, &mut rng, m, &x).into_iter().step_by(3).collect();
        for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
            let got = values(dtype, &after[LINEAR_OUT].bytes);
            let (want, xv) = (fleet.reference(&x, map), values(dtype, &x));
            for (i, &t) in map.iter().enumerate() {
                let weights = values(dtype, &fleet.case(t).fine_tuned);
                let bias = values(dtype, fleet.bias(t));
                for r in 0..n {
                    // sums.cuh: an mma in the emulation, or an FMA, rounds once; the products are the
                    // fine-tuned words'.
                    let chain = 1 + if dtype == Dtype::F32 { k } else { k.div_ceil(16) };
                    let size = (0..k).map(|c| (xv[i * k + c] * weights[r * k + c]).abs()).sum::<f64>()
                        + bias[r].abs();
                    let want = want[i * n + r];
                    let rounding = match dtype {
                        Dtype::F32 => 0.0,
                        Dtype::BF16 => 2f64.powi(-8) * want.abs() * 1.01,
                        _ => (2f64.powi(-11) * want.abs()).max(2f64.powi(-25)) * 1.01,
                    };
                    let bound = chain as f64 * 2f64.powi(-24) * size + k as f64 * 2f64.powi(-126) + rounding;
                    let error = (got[i * n + r] - want).abs();
                    assert!(error <= bound, "{dtype} tenant {t} {map:?}: {error} > {bound}");
                }
            }
        }
    }
}

#[test]
fn a_rows_bits_are_its_own_whatever_its_company() {
    let (device, mut rng) = (device(), Rng::new(184));
    for dtype in DTYPES {
        let shape = Shape { n: 66, k: 290 };
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
        let w = dtype.word_bytes();
        let (x_row, y_row) = (shape.k * w, shape.n * w);
        let m = 30;
        let clean = rng.weights(dtype, m * shape.k);
        for map in maps(&mut rng, m).into_iter().step_by(2) {
            let keep = (rng.next() % m as u64) as usize;
            let mut dirty = clean.clone();
            for (i, word_) in dirty.chunks_mut(w).enumerate() {
                if i / shape.k != keep {
                    word_.copy_from_slice(&word(dtype, [1e4, 1e30, 0.0][i % 3]));
                }
            }
            let alone = &clean[keep * x_row..][..x_row];
            // The same rows the other way round, among others.
            let turned: Vec<u8> = clean.chunks(x_row).rev().flatten().copied().collect();
            let turned = [&turned[..], &dirty[..]].concat();
            let turned_map: Vec<i32> = map.iter().rev().chain(&map).copied().collect();
            let all = [
                fleet.large(&clean, &map, None, false, 0),
                fleet.large(&clean, &map, Some(2), true, 7),
                fleet.large(&dirty, &map, None, true, 8),
                fleet.large(alone, &map[keep..=keep], None, true, 0),
                fleet.large(&turned, &turned_map, Some(1), false, 9),
            ];
            let after = run_large(&device, &all).unwrap();
            let row = |i: usize, at: usize| &after[i][LINEAR_OUT].bytes[at * y_row..][..y_row];
            assert!(after[0][LINEAR_OUT].bytes == after[1][LINEAR_OUT].bytes, "{dtype} {map:?}: order shows");
            assert!(row(0, keep) == row(2, keep), "{dtype} row {keep} of {map:?}: values of others");
            assert!(row(0, keep) == row(3, 0), "{dtype} row {keep} of {map:?}: alone");
            (0..m)
                .for_each(|i| assert!(row(0, i) == row(4, m - 1 - i), "{dtype} row {i} of {map:?}: turned"));
        }
    }
}

#[test]
fn non_finite_results_are_those_of_the_tenants_weights() {
    let (device, mut rng) = (device(), Rng::new(185));
    for dtype in DTYPES {
        let shape = Shape { n: 70, k: 290 };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 4);
            let odd = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &odd, 0.002)
        };
        let fleet = Fleet::new(&mut rng, dtype, shape, words, 0.01);
        let m = 26;
        let plain = integers(&mut rng, dtype, m * shape.k, 2);
        let odd = adversarial(&mut rng, dtype, m * shape.k);
        let mut x = rng.mix(dtype, &plain, &odd, 0.0002);
        x[..dtype.word_bytes()].copy_from_slice(&word(dtype, f64::INFINITY));
        let mixes: Vec<_> = mixes(&fleet, &mut rng, m, &x).into_iter().step_by(2).collect();
        let largest = if dtype == Dtype::F16 { 65504.0 } else { f64::from(f32::MAX) };
        let (mut nans, mut infinities) = (0, 0);
        for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
            assert_eq!(status(after, LINEAR_STATUS), 0);
            let got = values(dtype, &after[LINEAR_OUT].bytes);
            for (i, (g, w)) in got.iter().zip(fleet.reference(&x, map)).enumerate() {
                assert_eq!(g.is_nan(), w.is_nan(), "{dtype} output {i}: {g} for {w} {map:?}");
                let far = w.abs() > 1.01 * largest;
                assert!(
                    !far || (g.is_infinite() && g.signum() == w.signum()),
                    "{dtype} output {i}: {g} for {w} {map:?}"
                );
                nans += usize::from(w.is_nan());
                infinities += usize::from(w.is_infinite());
            }
        }
        assert!(nans > 100 && infinities > 10, "only {nans} NaN and {infinities} infinities");
    }
}

/// The parameter's bytes, so many past a multiple of 256.
fn moved(large: &mut Large, at: usize, by: u64) {
    for launch in [&mut large.segments, &mut large.product] {
        let (Param::In(_, offset) | Param::Out(_, offset)) = &mut launch.params[at] else {
            panic!("no bytes")
        };
        *offset = by;
    }
}

#[test]
fn words_at_any_address_are_computed_on() {
    let (device, mut rng) = (device(), Rng::new(186));
    for dtype in DTYPES {
        let w = dtype.word_bytes() as u64;
        for (n, k) in [(19, 512), (18, 270)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, 6 * k, 3);
            let map = [0, 3, 4, -1, 8, 2];
            let mut all = vec![];
            for (i, (at, by)) in [(0, 1), (1, 3), (9, 5), (2, 1)].into_iter().enumerate() {
                let mut large = fleet.large(&x, &map, None, i % 2 == 0, 1);
                moved(&mut large, at, by * w);
                all.push(large);
            }
            for after in run_large(&device, &all).unwrap() {
                assert_eq!(status(&after, LINEAR_STATUS), 0);
                let difference =
                    first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(&x, &map));
                assert_eq!(difference, None, "{dtype} {shape}");
            }
        }
    }
}

#[test]
fn empty_dimensions_and_no_slots_are_computed_on() {
    let (device, mut rng) = (device(), Rng::new(187));
    for dtype in DTYPES {
        for (n, k, m) in [(3, 0, 2), (0, 5, 2), (3, 5, 0), (0, 0, 0), (3, 5, 2)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 4), 0.5);
            let x = integers(&mut rng, dtype, m * k, 2);
            let map: Vec<i32> = (0..m).map(|i| [3, 0][i % 2]).collect();
            let after = run_large(&device, &[fleet.large(&x, &map, None, true, 0)]).unwrap().remove(0);
            assert_eq!(status(&after, LINEAR_STATUS), 0);
            let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(&x, &map));
            assert_eq!(difference, None, "{dtype} {shape} m {m}");
        }
        // One delta, a map of it and the base, and the one bias of both.
        let shape = Shape { n: 21, k: 70 };
        let base = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let near = nudged(&mut rng, dtype.word_bytes(), &base, 2, if dtype == Dtype::BF16 { 0 } else { 9 });
        let case = Case::new(dtype, shape, Encoding::Raw, &base, &near);
        let bias = integers(&mut rng, dtype, shape.n, 5);
        let x = integers(&mut rng, dtype, 5 * shape.k, 1);
        let map = [0, -1, 0, 0, -1];
        let linear =
            Linear { tenant_of_row: Some(&map), biases: Some(&bias), ..Linear::of_one(&case, &x, 5) };
        let after = run_large(&device, &[linear.large(None, false)]).unwrap().remove(0);
        let on_base = Case::new(dtype, shape, Encoding::Unchanged, &base, &base);
        let row = shape.k * dtype.word_bytes();
        let want: Vec<f64> = (0..5)
            .flat_map(|i| {
                let case = if map[i] == 0 { &case } else { &on_base };
                case.reference(&x[i * row..][..row], 1, Some(&bias))
            })
            .collect();
        assert_eq!(status(&after, LINEAR_STATUS), 0);
        assert_eq!(first_difference(dtype, &after[LINEAR_OUT].bytes, &want), None, "{dtype}");
    }
}

#[test]
fn tiles_of_every_size_are_patched() {
    let (device, mut rng) = (device(), Rng::new(188));
    for dtype in DTYPES {
        let shape = Shape { n: 150, k: 520 };
        let base = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let far = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let x = integers(&mut rng, dtype, 5 * shape.k, 3);
        let mut cases = vec![];
        for (encoding, rows, cols, share) in [
            (Encoding::Sparse, 16, 256, 0.3),
            (Encoding::Sparse, 16, 4096, 0.003),
            (Encoding::Exponent, 256, 256, 0.2),
            (Encoding::Exponent, 128, 512, 0.02),
            (Encoding::Exponent, 64, 1024, 0.02),
            (Encoding::Exponent, 16, 4096, 0.02),
        ] {
            let near = match encoding {
                // Steps that keep seven bits of mantissa.
                Encoding::Exponent => nudged(
                    &mut rng,
                    dtype.word_bytes(),
                    &base,
                    2,
                    [16, 0, 3]
                        [[Dtype::F32, Dtype::BF16, Dtype::F16].iter().position(|d| *d == dtype).unwrap()],
                ),
                _ => base.clone(),
            };
            let zero = |b: &[u8]| value(dtype, b) == 0.0;
            let w = dtype.word_bytes();
            let near: Vec<u8> = near
                .chunks(w)
                .zip(base.chunks(w))
                .flat_map(|(n, b)| if zero(b) { b } else { n }.to_vec())
                .collect();
            let fine_tuned = rng.mix(dtype, &near, &far, share);
            let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            assert_streams(&case.blob);
            case.blob = on_tiles(&case, rows, cols);
            cases.push(case);
        }
        let all: Vec<_> =
            cases.iter().enumerate().map(|(i, c)| Linear::of_one(c, &x, 5).large(None, i % 2 == 0)).collect();
        for (after, case) in run_large(&device, &all).unwrap().iter().zip(&cases) {
            assert_eq!(status(after, LINEAR_STATUS), 0, "{}", case.name());
            let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &case.reference(&x, 5, None));
            assert_eq!(difference, None, "{}", case.name());
        }
    }
}

#[test]
fn rows_are_sorted_into_segments_whatever_the_map() {
    // Nothing of the order shows in a product; that every row is there once, and each tile of one tenant,
    // does here.
    let (device, mut rng) = (device(), Rng::new(189));
    let dtype = Dtype::F32;
    let shape = Shape { n: 1, k: 3 };
    let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 2), 0.3);
    let slots = fleet.slots.len();
    for m in [1, 31, 64, 65, 700] {
        let x = vec![0; m * 12];
        let mut maps = maps(&mut rng, m);
        maps.push((0..m).map(|i| [-2, 99, 5, i32::MIN][i % 4]).collect());
        let all: Vec<_> = maps.iter().map(|map| fleet.large(&x, map, None, false, 1).segments).collect();
        for (after, map) in device.run(&all).unwrap().iter().zip(&maps) {
            let work = &after[LARGE_WORKSPACE].bytes;
            let word = |at: usize| u32::from_le_bytes(work[at..at + 4].try_into().unwrap()) as usize;
            let tenants = m.min(slots + 2);
            let (tiles_at, tiles) = (64 + 128 * tenants, word(0));
            let order_at = tiles_at + 16 * (m / 64 + tenants) + 4 * (slots + 2);
            let mut seen = vec![false; m];
            let mut rows_of = std::collections::BTreeMap::new();
            for tile in 0..tiles {
                let [tenant, first, count] = [0, 4, 8].map(|i| word(tiles_at + 16 * tile + i));
                assert!((1..=64).contains(&count));
                for i in first..first + count {
                    let row = word(order_at + 4 * i);
                    assert!(!std::mem::replace(&mut seen[row], true), "row {row} twice of {map:?}");
                    let refused = map[row] < -1 || map[row] >= slots as i32;
                    rows_of.entry(tenant).or_insert_with(Vec::new).push(if refused { -2 } else { map[row] });
                }
            }
            assert!(seen.iter().all(|s| *s), "{map:?}");
            let mixed = rows_of.values().any(|rows| rows.iter().any(|r| r != &rows[0]));
            assert!(!mixed, "two tenants in a segment of {map:?}");
            let full: usize = rows_of.values().map(|rows| rows.len().div_ceil(64)).sum();
            assert_eq!(full, tiles, "{map:?}");
        }
    }
}
