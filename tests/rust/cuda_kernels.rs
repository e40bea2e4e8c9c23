//! Promise: the kernels of `cuda/`, run on the host from their own source, give back every word bit for bit, and products
//! as DESIGN section 5 promises; under random orders of threads, in any mix of tenants, on any bytes.

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/kernels.rs"]
mod kernels;
#[path = "common/linear.rs"]
mod linear;

use common::{Rng, adversarial, matrix, perturbed, value, word};
use device::{After, Device, Launch, Param, TSAN};
use kernels::{Fleet, LINEAR_OUT, LINEAR_STATUS, Linear, assert_streams, maps, nudged, on_tiles, restore};
use linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, MAGIC, Resident, VERSION};

fn device() -> Device {
    Device::new("plain", &["-O2"])
}

fn status(after: &[After], at: usize) -> u32 {
    u32::from_le_bytes(after[at].bytes[..].try_into().unwrap())
}

/// Fine-tuned words with everything that arithmetic mishandles in a few places.
fn tuned(rng: &mut Rng, dtype: Dtype, base: &[u8], share: f64) -> Vec<u8> {
    let floating = matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64);
    let near = perturbed(rng, dtype, base, share);
    let words = base.len() / dtype.word_bytes();
    let odd = if floating { adversarial(rng, dtype, words) } else { rng.bytes(base.len()) };
    rng.mix(dtype, &near, &odd, share / 8.0)
}

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
    let after = device.run(&launches).unwrap();
    for (i, after) in after.iter().enumerate() {
        let (case, _) = &cases[i / 2];
        let (out, last) = (1 - i % 2, after.len() - 1);
        let name = format!("{} of {}", launches[i].kernel, case.name());
        assert_eq!(status(after, last), 0, "{name}");
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
    // Differences that one bf16 cannot hold: tiny bases, large fine-tuned words. Every length of lane near 16 runs.
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
            for rows in [4, 16] {
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

/// Every map of some numbers of rows, as launches, and what each shall give.
fn mixes(
    rng: &mut Rng,
    fleet: &Fleet,
    numbers: &[usize],
    x_of: impl Fn(&mut Rng, usize) -> Vec<u8>,
) -> Vec<(Launch, Vec<u8>, Vec<i32>)> {
    let mut all = vec![];
    for &m in numbers {
        let x = x_of(rng, m * fleet.shape.k);
        for map in maps(rng, m) {
            let rows = if m <= 4 { 4 } else { 16 };
            all.push((fleet.launch(&x, &map, rows, rng.next() % 3), x.clone(), map));
        }
    }
    all
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
                    // product.cuh; or streams.cuh, whose narrowest tile here has 256 columns; and entries.cuh.
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
fn what_does_not_fit_gives_nan_and_a_status_and_leaves_the_others_alone() {
    let (device, mut rng) = (device(), Rng::new(87));
    let dtype = Dtype::BF16;
    let shape = Shape { n: 20, k: 300 };
    let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 4), 0.1);
    let x = integers(&mut rng, dtype, 5 * shape.k, 2);
    let good = [0, 3, -1, 4];
    let other_dtype = Case::new(Dtype::F16, shape, Encoding::Raw, &fleet.cases[0].base, &fleet.cases[1].base);
    let small = Shape { n: 20, k: 299 };
    let other_shape = Case::new(
        dtype,
        small,
        Encoding::Raw,
        &fleet.cases[0].base[..11960],
        &fleet.cases[0].fine_tuned[..11960],
    );
    let mut magic = fleet.cases[0].blob.clone();
    magic[3] ^= 1;
    // Slot 0 spoilt in each way: the slot, or the bytes in it; and tenants that there are not.
    let [at, len] = fleet.slots[0];
    let total = fleet.arena.len() as i64;
    let slots = [
        [at, -len],
        [-64, len],
        [at + 8, len],
        [total - 64, len],
        [at, i64::MAX],
        [i64::MAX - 63, 64],
        [at, 64],
        [at, len - 64],
    ];
    let bytes = [&other_dtype.blob, &other_shape.blob, &magic];
    let mut launches = vec![];
    let mut codes = vec![];
    let map = |bad: i32| vec![bad, 3, -1, 4, bad];
    for (i, slot) in slots.into_iter().enumerate() {
        let mut slots = fleet.slots.clone();
        slots[0] = slot;
        let broken =
            Fleet { slots, cases: vec![], biases: fleet.biases.clone(), arena: fleet.arena.clone(), ..fleet };
        launches.push(with_base(&broken, &fleet, &x, &map(0)));
        codes.push((if i < 6 { 3 } else { 5 }, 0));
    }
    for (blob, code) in bytes.into_iter().zip([6, 6, 5]) {
        let (mut slots, mut arena) = (fleet.slots.clone(), fleet.arena.clone());
        slots[0] = [arena.len() as i64, blob.len() as i64];
        arena.extend_from_slice(blob);
        let broken = Fleet { slots, cases: vec![], biases: fleet.biases.clone(), arena, ..fleet };
        launches.push(with_base(&broken, &fleet, &x, &map(0)));
        codes.push((code, 0));
    }
    for bad in [-2, fleet.slots.len() as i32, i32::MAX, i32::MIN] {
        launches.push(with_base(&fleet, &fleet, &x, &map(bad)));
        codes.push((2, bad as u32 & 0xFF_FFFF));
    }
    let want = fleet.reference(&x[shape.k * 2..], &good[1..]);
    for (after, (code, slot)) in device.run(&launches).unwrap().iter().zip(codes) {
        assert_eq!(status(after, LINEAR_STATUS), code << 24 | slot);
        let y = &after[LINEAR_OUT].bytes;
        let row = shape.n * 2;
        assert!(y[..row].iter().chain(&y[4 * row..]).all(|b| *b == 0xFF), "{code}");
        assert_eq!(first_difference(dtype, &y[row..4 * row], &want), None, "{code}");
    }
}

fn with_base(broken: &Fleet, fleet: &Fleet, x: &[u8], map: &[i32]) -> Launch {
    Linear {
        dtype: fleet.dtype,
        shape: fleet.shape,
        base: &fleet.cases[0].base,
        x,
        m: map.len(),
        arena: &broken.arena,
        slots: Some(&broken.slots),
        tenant_of_row: Some(map),
        biases: Some(&fleet.biases),
        rows: 16,
        seed: 3,
    }
    .launch()
}

/// Blobs broken byte by byte, for `restore`, `apply` and `linear`, run on `device`: the right words, or NaN and a status.
fn hostile(device: &Device, seed: u64, every: usize) {
    let mut rng = Rng::new(seed);
    let shape = Shape { n: 18, k: 300 };
    for dtype in [Dtype::BF16, Dtype::F32] {
        let base = rng.weights(dtype, 5400);
        let fine_tuned = tuned(&mut rng, dtype, &base, 0.05);
        let x = rng.weights(dtype, 2 * shape.k);
        let near = nudged(&mut rng, dtype.word_bytes(), &base, 3, 0);
        let near = rng.mix(dtype, &near, &fine_tuned, 0.01);
        for encoding in ENCODINGS {
            let fine_tuned = if encoding == Encoding::Exponent { &near } else { &fine_tuned };
            let case = Case::new(dtype, shape, encoding, &base, fine_tuned);
            assert_streams(&case.blob);
            let mut launches = vec![];
            let mut blobs = vec![];
            let head = 0..HEADER_BYTES.min(case.blob.len());
            let spots = head.chain((HEADER_BYTES..case.blob.len()).step_by(every));
            for at in spots {
                for flip in [0x01, 0x80, 0xFF] {
                    if !rng.next().is_multiple_of(3) {
                        continue;
                    }
                    let mut bad = case.blob.clone();
                    bad[at] ^= flip;
                    blobs.push(bad);
                }
            }
            blobs.extend([0, 64, 191, 192, case.blob.len() - 64].map(|len| case.blob[..len].to_vec()));
            for bad in &blobs {
                let which = (dtype as u32, shape);
                launches.push(restore(false, which, dtype.word_bytes(), &base, bad, 2, 0));
                launches.push(restore(true, which, dtype.word_bytes(), &base, bad, 2, 0));
                let linear = Linear {
                    dtype,
                    shape,
                    base: &base,
                    x: &x,
                    m: 2,
                    arena: bad,
                    slots: None,
                    tenant_of_row: None,
                    biases: None,
                    rows: 4,
                    seed: 0,
                };
                launches.push(linear.launch());
            }
            let after = device.run(&launches).unwrap();
            for (i, three) in after.chunks(3).enumerate() {
                let oracle = Resident::parse(&blobs[i])
                    .ok()
                    .filter(|d| d.check_base(&matrix(dtype, shape, &base)).is_ok());
                let mut words = vec![0; base.len()];
                let want = oracle
                    .filter(|d| xorz::resident::restore(d, &matrix(dtype, shape, &base), &mut words).is_ok());
                let code = status(&three[0], 7);
                if code == 0 {
                    assert!(want.is_some(), "{} blob {i}: accepted", case.name());
                    assert!(three[0][1].bytes == words, "{} blob {i}: other words", case.name());
                    assert!(three[1][0].bytes == words, "{} blob {i}: apply gives other words", case.name());
                } else if code >> 24 > 1 {
                    assert!(
                        three[0][1].bytes.iter().all(|b| *b == 0xFF),
                        "{} blob {i}: refused, no NaN",
                        case.name()
                    );
                    assert!(three[1][0].bytes == base, "{} blob {i}: apply touched the weight", case.name());
                }
                assert_eq!(code, status(&three[1], 6), "{} blob {i}", case.name());
            }
        }
    }
}

#[test]
fn broken_bytes_give_the_oracles_words_or_nan_and_a_status() {
    hostile(&device(), 91, 17);
}

#[test]
fn broken_bytes_harm_no_memory() {
    let flags = [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=xorz_shared",
    ];
    let device = Device::new("sanitized", &flags);
    hostile(&device, 92, 97);
    let mut rng = Rng::new(93);
    let shape = Shape { n: 35, k: 259 };
    let fleet = Fleet::new(&mut rng, Dtype::BF16, shape, |r, w| integers(r, Dtype::BF16, w, 8), 0.1);
    let mixes = mixes(&mut rng, &fleet, &[3, 16], |r, w| integers(r, Dtype::BF16, w, 3));
    device.run(&mixes.iter().map(|m| m.0.clone()).collect::<Vec<_>>()).unwrap();
}

#[test]
fn no_two_threads_race() {
    let device = Device::new("raced", &["-O1", "-g1", TSAN]);
    let mut rng = Rng::new(94);
    let dtype = Dtype::BF16;
    for (n, k, every) in [(19, 1030, 1), (18, 4400, 4)] {
        let shape = Shape { n, k };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 6);
            let special = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &special, 0.0002)
        };
        let fleet = Fleet::new(&mut rng, dtype, shape, words, 0.1);
        let mixes = mixes(&mut rng, &fleet, &[16], |r, w| integers(r, dtype, w, 3));
        let mut launches: Vec<_> = mixes.into_iter().map(|m| m.0).step_by(every).collect();
        for case in fleet.cases.iter().step_by(every) {
            launches.push(restore(false, (0, shape), 2, &case.base, &case.blob, 2, 1));
            launches.push(restore(true, (0, shape), 2, &case.base, &case.blob, 2, 1));
        }
        device.run(&launches).unwrap();
    }
}

#[test]
fn constants_of_the_kernels_are_those_of_the_core() {
    let text = std::fs::read_to_string(device::root("cuda/resident.cuh")).unwrap()
        + &std::fs::read_to_string(device::root("cuda/word.cuh")).unwrap();
    let is = |name: &str, value: usize| {
        let found =
            text.split(&format!(" {name} = ")).nth(1).map(|t| t.split([';', ',', ' ', '}']).next().unwrap());
        assert_eq!(found, Some(&value.to_string()[..]), "{name}");
    };
    is("kHeaderBytes", HEADER_BYTES);
    is("kVersion", usize::from(VERSION));
    is("kArenaAlign", xorz::cpu::ARENA_ALIGN);
    is("kTileLanes", xorz::codec::Grid::LANES);
    is("kStreamLanes", xorz::codec::exponent::LANES);
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
