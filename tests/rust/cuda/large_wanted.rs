//! Products of many rows that a mutant of their kernels (`large_mutants.rs`) must get wrong: tenants of every kind, sums that
//! overflow on the way, entries that few are, differences of two entries, deltas that contradict themselves.

use crate::common::data::{Rng, adversarial, perturbed, value, word};
use crate::common::device::Device;
use crate::common::kernels::{
    Fleet, LINEAR_OUT, LINEAR_STATUS, Large, Linear, all_apart, nudged, on_tiles, run_large, status,
};
use crate::common::linear::{Case, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::codec::split::split;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::Resident;

/// Products that are launched together, and what each shall give.
pub(crate) struct Wanted {
    dtype: Dtype,
    /// [`WAYS`] of each.
    pub(crate) all: Vec<(Large, Vec<f64>)>,
    exact: bool,
}

/// How many [`ways`] there are.
pub(crate) const WAYS: usize = 3;

/// Early and late, in two orders of threads.
fn ways(large: impl Fn(bool, u64) -> Large) -> [Large; WAYS] {
    [(false, 1), (true, 2), (true, 0)].map(|(late, seed)| large(late, seed))
}

/// Tenants of every kind; of slot 10 a step has more differences than a row has lanes, some words two of
/// them.
pub(crate) fn of_fleet(rng: &mut Rng, dtype: Dtype, (n, k, m): (usize, usize, usize), odd: f64) -> Wanted {
    let shape = Shape { n, k };
    let words = |r: &mut Rng, words: usize| {
        let plain = integers(r, dtype, words, 6);
        let special = adversarial(r, dtype, words);
        r.mix(dtype, &plain, &special, odd)
    };
    let mut fleet = Fleet::new(rng, dtype, shape, words, 0.2);
    let exact = odd == 0.0;
    if exact {
        let (base, w) = (fleet.cases[0].base.clone(), dtype.word_bytes());
        // 300 less a small integer takes two bf16.
        let far = |i: usize| match i % 7 {
            0..3 => word(dtype, 64.0),
            3..5 => word(dtype, 300.0),
            _ => base[i * w..][..w].to_vec(),
        };
        let many: Vec<u8> = (0..n * k).flat_map(far).collect();
        let case = Case::new(dtype, shape, Encoding::Exponent, &base, &many);
        let blob = on_tiles(&case, 16, 256);
        replace(&mut fleet, 10, case, &blob);
        // Widths that depend on the base's word.
        let moved = nudged(rng, w, &base, 3, if dtype == Dtype::F32 { 16 } else { 0 });
        let small = |b: &[u8]| value(dtype, b).abs() < 2.5;
        let near = |(b, m): (&[u8], &[u8])| if small(b) { b } else { m }.to_vec();
        let near: Vec<u8> = base.chunks(w).zip(moved.chunks(w)).flat_map(near).collect();
        let case = Case::new(dtype, shape, Encoding::Exponent, &base, &near);
        let blob = case.blob.clone();
        replace(&mut fleet, 3, case, &blob);
    }
    let x = integers(rng, dtype, m * k, 2);
    let distinct: Vec<i32> = (0..m as i32).map(|i| i % 12 - 1).collect();
    let uneven = (0..m).map(|i| [3, 0, 4, 0, 0, 9, 10, 8, 0, 7, 2, 0][i % 12]).collect();
    let mut all = vec![];
    for map in [distinct, uneven] {
        let want = fleet.reference(&x, &map);
        let launched = ways(|late, seed| fleet.large(&x, &map, Some(5), late, seed));
        all.extend(launched.into_iter().map(|large| (large, want.clone())));
    }
    Wanted { dtype, all, exact }
}

fn replace(fleet: &mut Fleet, slot: usize, case: Case, blob: &[u8]) {
    fleet.slots[slot] = [fleet.arena.len() as i64, blob.len() as i64];
    fleet.arena.extend_from_slice(blob);
    fleet.cases[slot] = case;
}

/// Sums that overflow f32 on the way, in some rows of x, and come back.
pub(crate) fn of_overflows(dtype: Dtype) -> Wanted {
    let shape = Shape { n: 18, k: 128 };
    let m = 6;
    let large = f64::from(f32::from_bits(0x7F00_0000));
    let column = |c: usize| [1.0, 1.0, 0.0, -1.5][c / 32] * large * f64::from(u8::from(c % 32 == 5));
    let fine_tuned: Vec<u8> = (0..shape.n * shape.k).flat_map(|i| word(dtype, column(i % shape.k))).collect();
    let base = vec![0; fine_tuned.len()];
    let x: Vec<u8> =
        (0..m * shape.k).flat_map(|i| word(dtype, [1.0, -1.0, 0.25, -1.0, 0.5, 1.0][i / shape.k])).collect();
    let mut all = vec![];
    for encoding in [Encoding::Raw, Encoding::Exponent] {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let want = case.reference(&x, m, None);
        all.push((alone(&case, &case.blob, &x, m, 1).large(None, false), want));
    }
    Wanted { dtype, all, exact: true }
}

/// Columns of fine-tuned words of f32, many of which the sum of base word and differences, each rounded, is
/// not.
pub(crate) fn of_columns(rng: &mut Rng) -> Wanted {
    let (dtype, shape) = (Dtype::F32, Shape { n: 40, k: 96 });
    let k = shape.k;
    let base = rng.weights(dtype, shape.n * k);
    let bits = |word: &[u8]| u64::from(u32::from_le_bytes(word.try_into().unwrap()));
    let rounded = |base: &[u8], word: &[u8]| split(dtype, bits(base), bits(word)).exception;
    let mut fine_tuned = vec![];
    for (i, base) in base.chunks(4).enumerate() {
        let mut word = rng.weights(dtype, 1);
        // One word in 25 is such a one by chance, but not of every base word.
        for _ in 0..if i % 3 == 0 { 0 } else { 200 } {
            if !rounded(base, &word) {
                word = rng.weights(dtype, 1);
            }
        }
        fine_tuned.extend(word);
    }
    let x: Vec<u8> = (0..k * k).flat_map(|i| word(dtype, f64::from(u8::from(i / k == i % k)))).collect();
    let mut all = vec![];
    for encoding in [Encoding::Sparse, Encoding::Exponent] {
        let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        if encoding == Encoding::Exponent {
            case.blob = all_apart(&case, 32, 256);
        }
        assert!(Resident::parse(&case.blob).unwrap().header().exceptions > 1500, "{encoding}");
        let want = case.reference(&x, k, None);
        let launched = ways(|late, seed| alone(&case, &case.blob, &x, k, seed).large(None, late));
        all.extend(launched.into_iter().map(|large| (large, want.clone())));
    }
    Wanted { dtype, all, exact: true }
}

/// Differences that one bf16 cannot hold, so many of all, side by side or alone; `m` rows of x.
pub(crate) fn of_pairs(rng: &mut Rng, dtype: Dtype, encoding: Encoding, share: f64, m: usize) -> Wanted {
    let shape = Shape { n: 20, k: 96 };
    let base: Vec<u8> =
        (0..shape.n * shape.k).flat_map(|_| word(dtype, (rng.next() % 9 + 1) as f64 / 512.0)).collect();
    let near: Vec<u8> =
        (0..shape.n * shape.k).flat_map(|_| word(dtype, 1.0 + (rng.next() % 64) as f64 / 128.0)).collect();
    let single: Vec<u8> =
        base.chunks(dtype.word_bytes()).flat_map(|b| word(dtype, 2.0 * value(dtype, b))).collect();
    let near = rng.mix(dtype, &single, &near, share);
    let fine_tuned = rng.mix(dtype, &base, &near, 0.7);
    let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
    if encoding == Encoding::Exponent {
        case.blob = all_apart(&case, 32, 256);
    }
    let x = integers(rng, dtype, m * shape.k, 1);
    let want = case.reference(&x, m, None);
    let all = ways(|late, seed| alone(&case, &case.blob, &x, m, seed).large(Some(2), late));
    Wanted { dtype, all: all.into_iter().map(|large| (large, want.clone())).collect(), exact: true }
}

/// So few differences, some of two entries, that gaps are columns.
pub(crate) fn of_few(rng: &mut Rng, dtype: Dtype) -> Wanted {
    let (shape, m) = (Shape { n: 36, k: 3000 }, 2);
    let base: Vec<u8> = (0..shape.n * shape.k).flat_map(|_| word(dtype, 1.0 / 512.0)).collect();
    let other = |i: usize| word(dtype, if i.is_multiple_of(2) { 1.0 + 3.0 / 128.0 } else { 2.0 / 512.0 });
    let other: Vec<u8> = (0..shape.n * shape.k).flat_map(other).collect();
    let mut fine_tuned = rng.mix(dtype, &base, &other, 0.0015);
    // Whose column is the last one of a window, and of the matrix.
    for at in [63, shape.k - 1, 2 * shape.k + 127] {
        fine_tuned[at * 2..][..2].copy_from_slice(&word(dtype, 3.0));
    }
    let mut case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
    assert_eq!(case.blob[14], 2, "gaps of two bytes");
    padding_in_column_0(&mut case.blob, shape.n.div_ceil(16));
    let x = integers(rng, dtype, m * shape.k, 1);
    let want = case.reference(&x, m, None);
    let all = ways(|late, seed| alone(&case, &case.blob, &x, m, seed).large(None, late));
    Wanted { dtype, all: all.into_iter().map(|large| (large, want.clone())).collect(), exact: true }
}

/// Padding of one tile column of records with gaps of two bytes, whose column says nothing.
fn padding_in_column_0(blob: &mut [u8], tiles: usize) {
    let number = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
    let (directory, payload) = (number(64), number(72));
    let spans: Vec<_> =
        (0..tiles).map(|t| (number(directory + 4 * t), number(directory + 4 * t + 4))).collect();
    let mut padded = 0;
    for (from, to) in spans {
        let (gaps, differences) = (payload + from * 64, payload + from * 64 + (to - from) * 32);
        for at in (0..(to - from) * 32).step_by(2) {
            if blob[differences + at..][..2] == [0x00, 0x80] {
                blob[gaps + at..][..2].fill(0);
                padded += 1;
            }
        }
    }
    assert!(padded > 0);
}

fn alone<'a>(case: &'a Case, blob: &'a [u8], x: &'a [u8], m: usize, seed: u64) -> Linear<'a> {
    Linear { arena: blob, seed, ..Linear::of_one(case, x, m) }
}

/// Deltas that contradict themselves, each of which must be reported and give NaN.
pub(crate) fn of_contradictions(rng: &mut Rng) -> Vec<Large> {
    let dtype = Dtype::BF16;
    let offset = |blob: &[u8], at: usize| u64::from_le_bytes(blob[at..at + 8].try_into().unwrap()) as usize;
    let mut all = vec![];
    // A step ends beyond the last column, and with it.
    for k in [200, 192] {
        let shape = Shape { n: 64, k };
        let base = rng.weights(dtype, shape.n * k);
        let far = perturbed(rng, dtype, &base, 0.05);
        let near = nudged(rng, 2, &base, 4, 0);
        let near = rng.mix(dtype, &near, &far, 0.05);
        let x = rng.weights(dtype, k);
        let entries = Case::new(dtype, shape, Encoding::Sparse, &base, &far);
        let streams = Case::new(dtype, shape, Encoding::Exponent, &base, &near);
        let mut beyond = entries.blob.clone();
        // The first gap of a row of the last tile: all its entries move on, the last ones out of the matrix.
        let directory = offset(&beyond, 64);
        let records = u32::from_le_bytes(beyond[directory + 12..directory + 16].try_into().unwrap()) as usize;
        let at = offset(&beyond, 72) + records * 16 * 3;
        beyond[at] += 60;
        let mut disordered = streams.blob.clone();
        let at = offset(&disordered, 184);
        (0..2).for_each(|i| disordered.swap(at + i, at + 2 + i));
        let mut three = streams.blob.clone();
        (2..6).for_each(|i| three[at + i] = three[at + i % 2]);
        let mut left_over = streams.blob.clone();
        left_over[128..160].iter_mut().for_each(|w| *w -= u8::from(*w > 1));
        let of_streams = [disordered, three, left_over].map(|blob| (blob, &streams));
        for (blob, case) in [(beyond, &entries)].into_iter().chain(of_streams) {
            all.extend([0, 1, 2].map(|seed| alone(case, &blob, &x, 1, seed).large(None, true)));
        }
    }
    all
}

/// # Errors
/// What is not as wanted, or a contradiction that is not reported.
pub(crate) fn check(device: &Device, wanted: &[Wanted], contradictions: &[Large]) -> Result<(), String> {
    for Wanted { dtype, all, exact } in wanted {
        let launches: Vec<_> = all.iter().map(|(large, _)| large.clone()).collect();
        for (after, (_, want)) in run_large(device, &launches)?.iter().zip(all) {
            if status(after, LINEAR_STATUS) != 0 {
                return Err("a status".into());
            }
            let got = &after[LINEAR_OUT].bytes;
            let wrong = if *exact {
                first_difference(*dtype, got, want)
            } else {
                let class = |v: f64| (v.is_nan(), v.abs() > 3.4e38, v.abs() > 3.4e38 && v < 0.0);
                let differs = values(*dtype, got).iter().zip(want).position(|(g, w)| class(*g) != class(*w));
                differs.map(|i| format!("output {i}"))
            };
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
        }
    }
    for (i, after) in run_large(device, contradictions)?.iter().enumerate() {
        let nan = after[LINEAR_OUT].bytes[2 * 48..].iter().all(|b| *b == 0xFF);
        if status(after, LINEAR_STATUS) >> 24 != 1 || !nan {
            return Err(format!("contradiction {i} not reported, or no NaN"));
        }
    }
    Ok(())
}
