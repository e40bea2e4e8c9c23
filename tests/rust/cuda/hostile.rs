//! Promise: whatever a delta's bytes, an arena's slots and a map of rows say, the kernels of `cuda/` give the
//! right words, or NaN and a status; they touch no byte that is not theirs, and no two of their threads race.

use crate::common::data::{Rng, adversarial, matrix, word};
use crate::common::device::{Device, Launch, TSAN};
use crate::common::kernels::{
    APPLY_STATUS, APPLY_WEIGHT, Fleet, LINEAR_OUT, LINEAR_STATUS, Large, Linear, assert_streams, device,
    maps, mixes, nudged, restore, run_applies, run_large, status, tuned,
};
use crate::common::linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, Resident};

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
        launches.push(with_base(&broken, &fleet, &x, &map(0), both));
        codes.push((if i < 6 { 3 } else { 5 }, 0));
    }
    for (blob, code) in bytes.into_iter().zip([6, 6, 5]) {
        let (mut slots, mut arena) = (fleet.slots.clone(), fleet.arena.clone());
        slots[0] = [arena.len() as i64, blob.len() as i64];
        arena.extend_from_slice(blob);
        let broken = Fleet { slots, cases: vec![], biases: fleet.biases.clone(), arena, ..fleet };
        launches.push(with_base(&broken, &fleet, &x, &map(0), both));
        codes.push((code, 0));
    }
    for bad in [-2, fleet.slots.len() as i32, i32::MAX, i32::MIN] {
        launches.push(with_base(&fleet, &fleet, &x, &map(bad), both));
        codes.push((2, bad as u32 & 0xFF_FFFF));
    }
    let want = fleet.reference(&x[shape.k * 2..], &good[1..]);
    let (small, large): (Vec<_>, Vec<_>) = launches.into_iter().unzip();
    let after = [device.run(&small).unwrap(), run_large(&device, &large).unwrap()].concat();
    for (after, (code, slot)) in after.iter().zip(codes.iter().chain(&codes)) {
        assert_eq!(status(after, LINEAR_STATUS), code << 24 | slot);
        let y = &after[LINEAR_OUT].bytes;
        let row = shape.n * 2;
        assert!(y[..row].iter().chain(&y[4 * row..]).all(|b| *b == 0xFF), "{code}");
        assert_eq!(first_difference(dtype, &y[row..4 * row], &want), None, "{code}");
    }
}

#[test]
fn exceptions_that_do_not_ascend_give_nan_and_a_status_in_products_of_few_rows_and_of_many() {
    let (device, mut rng) = (device(), Rng::new(92));
    let shape = Shape { n: 20, k: 300 };
    for dtype in [Dtype::F32, Dtype::BF16] {
        // Infinities turned to other words have no difference, and are stored apart.
        let size = dtype.word_bytes();
        let (mut base, infinite) =
            (integers(&mut rng, dtype, shape.n * shape.k, 3), word(dtype, f64::INFINITY));
        for c in [3, 4, 90, 91, 92, 200] {
            base[(shape.k + c) * size..][..size].copy_from_slice(&infinite);
        }
        let mut fine_tuned = base.clone();
        for c in [3, 4, 90, 91, 92, 200] {
            fine_tuned[(shape.k + c) * size..][..size].copy_from_slice(&word(dtype, f64::from(c as u32)));
        }
        let x = integers(&mut rng, dtype, 2 * shape.k, 2);
        for encoding in [Encoding::Sparse, Encoding::Exponent] {
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            let at = u64::from_le_bytes(case.blob[88..96].try_into().unwrap()) as usize;
            let count = u64::from_le_bytes(case.blob[48..56].try_into().unwrap());
            assert_eq!(count, 6, "{dtype} {encoding:?}");
            let mut blobs = vec![(case.blob.clone(), 0)];
            for (to, from) in [(1, 0), (5, 2), (0, 5)] {
                let mut bad = case.blob.clone();
                bad.copy_within(at + 2 * from..at + 2 * from + 2, at + 2 * to);
                blobs.push((bad, 1));
            }
            for (blob, code) in blobs {
                let linear = Linear {
                    dtype,
                    shape,
                    base: &base,
                    x: &x,
                    m: 2,
                    arena: &blob,
                    slots: None,
                    tenant_of_row: None,
                    biases: None,
                    rows: 4,
                    seed: 1,
                };
                let small = device.run(&[linear.launch()]).unwrap().remove(0);
                let large = run_large(&device, &[linear.large(None, true)]).unwrap().remove(0);
                for (after, name) in [(small, "few"), (large, "many")] {
                    assert_eq!(
                        status(&after, LINEAR_STATUS) >> 24,
                        code,
                        "{dtype} {encoding:?}, {name} rows"
                    );
                    let y = values(dtype, &after[LINEAR_OUT].bytes);
                    for m in 0..2 {
                        assert_eq!(
                            y[m * shape.n + 1].is_nan(),
                            code == 1,
                            "{dtype} {encoding:?}, {name} rows"
                        );
                    }
                }
            }
        }
    }
}

/// As a product of few rows, and of many.
fn both(linear: &Linear<'_>) -> (Launch, Large) {
    (linear.launch(), linear.large(None, true))
}

fn with_base<T>(broken: &Fleet, fleet: &Fleet, x: &[u8], map: &[i32], f: impl Fn(&Linear<'_>) -> T) -> T {
    f(&Linear {
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
    })
}

/// `y` is about `x` times the fine-tuned words, or as far from finite.
fn check_near(case: &Case, x: &[u8], y: &[u8], name: &str) {
    let m = x.len() / (case.shape.k * case.dtype.word_bytes()).max(1);
    let sizes = |words: &[u8]| -> Vec<u8> {
        values(case.dtype, words).iter().flat_map(|v| word(case.dtype, v.abs())).collect()
    };
    let want = case.reference(x, m, None);
    let absolute = Case { fine_tuned: sizes(&case.fine_tuned), base: vec![], blob: vec![], ..*case };
    let size = absolute.reference(&sizes(x), m, None);
    for (i, (got, (want, size))) in values(case.dtype, y).iter().zip(want.iter().zip(size)).enumerate() {
        let near = (got - want).abs() <= 0.005 * size;
        let far = got.is_nan() == want.is_nan() && (want.is_nan() || want.abs() > 3e38 && got.is_infinite());
        assert!(near || far, "{name}: {got} for {want} at {i}");
    }
}

/// Blobs broken byte by byte, for `restore`, `apply` and `linear`, run on `device`: the right words, or NaN
/// and a status.
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
            let (mut launches, mut applies, mut large) = (vec![], vec![], vec![]);
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
                applies.push(restore(true, which, dtype.word_bytes(), &base, bad, 2, 0));
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
                large.push(linear.large(None, large.len() % 2 == 0));
            }
            let after = device.run(&launches).unwrap();
            let applied = run_applies(device, &applies, 3).unwrap();
            // A third of them: these take longest.
            let large: Vec<_> = large.into_iter().step_by(3).collect();
            let large = run_large(device, &large).unwrap();
            for (i, two) in after.chunks(2).enumerate() {
                let oracle = Resident::parse(&blobs[i])
                    .ok()
                    .filter(|d| d.check_base(&matrix(dtype, shape, &base)).is_ok());
                let mut words = vec![0; base.len()];
                let want = oracle
                    .filter(|d| xorz::resident::restore(d, &matrix(dtype, shape, &base), &mut words).is_ok());
                let code = status(&two[0], 7);
                if code == 0 {
                    assert!(want.is_some(), "{} blob {i}: accepted", case.name());
                    assert!(two[0][1].bytes == words, "{} blob {i}: other words", case.name());
                    assert!(
                        applied[i][APPLY_WEIGHT].bytes == words,
                        "{} blob {i}: apply gives other words",
                        case.name()
                    );
                } else if code >> 24 > 1 {
                    assert!(
                        two[0][1].bytes.iter().all(|b| *b == 0xFF),
                        "{} blob {i}: refused, no NaN",
                        case.name()
                    );
                }
                if code != 0 {
                    let kept = applied[i][APPLY_WEIGHT].bytes == base;
                    assert!(kept, "{} blob {i}: apply touched the weight", case.name());
                }
                assert_eq!(code, status(&applied[i], APPLY_STATUS), "{} blob {i}", case.name());
                let Some(large) = large.get(i / 3).filter(|_| i % 3 == 0) else { continue };
                let name = format!("{} blob {i}, many rows", case.name());
                assert_eq!(code, status(large, LINEAR_STATUS), "{name}");
                let y = &large[LINEAR_OUT].bytes;
                if code == 0 {
                    let restored = Case { fine_tuned: words, base: base.clone(), blob: vec![], ..case };
                    check_near(&restored, &x, y, &name);
                } else {
                    let refused = y.iter().all(|b| *b == 0xFF);
                    assert!(refused || (code >> 24 == 1 && y.contains(&0xFF)), "{name}: no NaN");
                }
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
    run_large(&device, &large_mixes(&mut rng, Shape { n: 70, k: 300 }, 0.0)).unwrap();
}

/// Products of many rows of each dtype and map, copies early and late.
fn large_mixes(rng: &mut Rng, shape: Shape, odd: f64) -> Vec<Large> {
    let mut all = vec![];
    for dtype in DTYPES {
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 6);
            let special = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &special, odd)
        };
        let fleet = Fleet::new(rng, dtype, shape, words, 0.1);
        let x = integers(rng, dtype, 20 * shape.k, 3);
        for (i, map) in maps(rng, 20).iter().enumerate() {
            // Each map once a dtype, each way once a map.
            if i % 3 == dtype as usize % 3 {
                all.extend([false, true].map(|late| fleet.large(&x, map, Some(2), late, 1)));
            }
        }
    }
    all
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
        let mut applies = vec![];
        for case in fleet.cases.iter().step_by(every) {
            launches.push(restore(false, (0, shape), 2, &case.base, &case.blob, 2, 1));
            applies.push(restore(true, (0, shape), 2, &case.base, &case.blob, 2, 1));
        }
        device.run(&launches).unwrap();
        run_applies(&device, &applies, 2).unwrap();
    }
    run_large(&device, &large_mixes(&mut rng, Shape { n: 66, k: 300 }, 0.0002)).unwrap();
}
