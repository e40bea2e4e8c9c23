//! Promise: rows and columns of the fine-tuned matrix are restored alone, bit for bit: any encoding, dtype,
//! range, instruction set and threads. Only the tiles that they touch are read, of those no more than is
//! needed, and no bytes do harm.

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped, unaligned};
use crate::common::linear::{Case, ENCODINGS, Shuffled, isas};
use std::ops::Range;
use xorz::codec::{Encoding, GapKind, Tile};
use xorz::error::{Kind, Result};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Resident, restore};
use xorz::vector::{Executor, Isa, Serial, delta_restore_region, delta_restore_region_on};

type Part = (Range<usize>, Range<usize>);

/// The part of a matrix of `k` columns.
fn cut(words: &[u8], w: usize, k: usize, (rows, columns): &Part) -> Vec<u8> {
    rows.clone()
        .flat_map(|r| &words[(r * k + columns.start) * w..(r * k + columns.end) * w])
        .copied()
        .collect()
}

fn region(isa: Isa, case: &Case, blob: &[u8], part: &Part, exec: &dyn Executor) -> Result<Vec<u8>> {
    let bytes = part.0.len() * part.1.len() * case.dtype.word_bytes();
    let mut out = unaligned(&vec![0xA5; bytes]);
    let (base, delta) = (matrix(case.dtype, case.shape, &case.base), Resident::parse(blob)?);
    delta_restore_region_on(isa, &delta, &base, part.clone(), &mut out[1..], exec)?;
    Ok(out[1..].to_vec())
}

fn range(rng: &mut Rng, size: usize) -> Range<usize> {
    let at = |rng: &mut Rng, most: usize| (rng.next() % (most as u64 + 1)) as usize;
    let start = at(rng, size);
    match rng.next() % 5 {
        0 => 0..size,
        1 => start..(start + 1).min(size),
        2 => start / 16 * 16..(start / 16 * 16 + 64).min(size),
        _ => start..start + at(rng, size - start),
    }
}

/// Whole, empty in each way, corners, and any.
fn parts(rng: &mut Rng, Shape { n, k }: Shape, any: usize) -> Vec<Part> {
    let mut all =
        vec![(0..n, 0..k), (0..0, 0..k), (n..n, 3..k), (2..n, 5..5), (0..1, 0..1), (n - 1..n, k - 1..k)];
    all.extend((0..any).map(|_| (range(rng, n), range(rng, k))));
    all
}

fn assert_parts(case: &Case, rng: &mut Rng, any: usize) {
    let w = case.dtype.word_bytes();
    for part in parts(rng, case.shape, any) {
        let want = cut(&case.fine_tuned, w, case.shape.k, &part);
        for isa in isas() {
            let got = region(isa, case, &case.blob, &part, &Serial).unwrap();
            assert!(got == want, "{part:?} of {} on {isa:?}", case.name());
        }
        let got = region(Isa::active().unwrap(), case, &case.blob, &part, &Shuffled(3)).unwrap();
        assert!(got == want, "{part:?} of {} on threads", case.name());
    }
}

#[test]
fn any_part_is_that_of_the_whole() {
    let mut rng = Rng::new(151);
    for dtype in Dtype::ALL {
        for encoding in ENCODINGS {
            // Gaps of two bytes, of one, and words that arithmetic mishandles; tiles side by side and one
            // above another.
            for (shape, share) in [
                (Shape { n: 21, k: 5000 }, 0.004),
                (Shape { n: 150, k: 300 }, 0.1),
                (Shape { n: 37, k: 65 }, 0.3),
            ] {
                let words = shape.n * shape.k;
                let base = rng.weights(dtype, words);
                let near = perturbed(&mut rng, dtype, &base, share);
                let odd = if dtype.computes() {
                    adversarial(&mut rng, dtype, words)
                } else {
                    rng.bytes(words * dtype.word_bytes())
                };
                let fine_tuned = rng.mix(dtype, &near, &odd, share / 8.0);
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                assert_parts(&case, &mut rng, 12);
            }
        }
    }
}

#[test]
fn large_parts_are_shared_out() {
    let mut rng = Rng::new(152);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 500, k: 1500 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
    for encoding in ENCODINGS {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        assert_parts(&case, &mut rng, 6);
    }
}

/// Where the units of each tile lie.
fn payloads(blob: &[u8]) -> Vec<Range<usize>> {
    let start = blob.as_ptr() as usize;
    let within = |bytes: &[u8]| {
        let at = bytes.as_ptr() as usize - start;
        at..at + bytes.len()
    };
    let delta = Resident::parse(blob).unwrap();
    let tiles = (0..delta.grid().tiles()).map(|i| match delta.tile(i).unwrap() {
        Tile::Sparse(t) => within(t.gaps).start..within(t.differences).end,
        Tile::Exponent(t) => within(t.stream),
        _ => unreachable!(),
    });
    tiles.collect()
}

#[test]
fn only_what_is_needed_is_read() {
    let (mut rng, isa) = (Rng::new(153), Isa::active().unwrap());
    let (dtype, shape) = (Dtype::BF16, Shape { n: 96, k: 9000 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = stepped(&mut rng, dtype, &base, 1e-3);
    for encoding in [Encoding::Sparse, Encoding::Exponent] {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let grid = Resident::parse(&case.blob).unwrap().grid();
        let (tiles, across) = (payloads(&case.blob), grid.tile_cols_count());
        assert!(tiles.len() > 2 * across && across > 1, "{grid:?}");
        // Some words of the second tile of the second band, and none of its last row.
        let (r0, c0) = (grid.tile_rows, grid.tile_cols);
        let part = (r0 + 2..r0 + grid.tile_rows - 1, c0 + 7..c0 + 100);
        let want = cut(&fine_tuned, 2, shape.k, &part);
        let mut damaged = case.blob.clone();
        for (i, tile) in tiles.iter().enumerate().filter(|(i, _)| *i != across + 1) {
            damaged[tile.clone()].fill(0xFF);
            let rest = region(isa, &case, &damaged, &(0..shape.n, 0..shape.k), &Serial);
            assert!(rest.ok().as_ref() != Some(&fine_tuned), "damage to tile {i} has no effect");
        }
        // Of an `exponent` tile the stream of rows that nobody asks for, too.
        if encoding == Encoding::Exponent {
            let tile = &tiles[across + 1];
            damaged[tile.end - tile.len() / grid.tile_rows / 4..tile.end].fill(0xFF);
        }
        assert!(region(isa, &case, &damaged, &part, &Serial).unwrap() == want, "{encoding}");
    }
}

#[test]
fn columns_in_any_order_are_the_oracles() {
    let (mut rng, isa) = (Rng::new(154), Isa::active().unwrap());
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::I16] {
        let shape = Shape { n: 16, k: 4096 };
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.001);
        let case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
        let header = *Resident::parse(&case.blob).unwrap().header();
        assert_eq!(header.gap, GapKind::U16);
        let (tile, w) = (payloads(&case.blob)[0].clone(), dtype.word_bytes());
        let records = tile.len() / (16 * (2 + w));
        let mut any = case.blob.clone();
        for _ in 0..200 {
            // Entries of a lane change places, gap and difference; some go where another of the lane is.
            let pick = |rng: &mut Rng| (rng.next() % (16 * records as u64)) as usize;
            let (a, lane) = (pick(&mut rng), pick(&mut rng) % 16);
            let (a, b) = (a / 16 * 16 + lane, pick(&mut rng) / 16 * 16 + lane);
            let (gap, diff) = (|i: usize| tile.start + 2 * i, |i: usize| tile.start + 32 * records + w * i);
            (0..w).for_each(|byte| any.swap(diff(a) + byte, diff(b) + byte));
            match rng.next() % 3 {
                0 => any.copy_within(gap(a)..gap(a) + 2, gap(b)),
                _ => (0..2).for_each(|byte| any.swap(gap(a) + byte, gap(b) + byte)),
            }
        }
        let mut whole = vec![0; base.len()];
        restore(&Resident::parse(&any).unwrap(), &matrix(dtype, shape, &base), &mut whole).unwrap();
        assert!(whole != fine_tuned);
        for part in parts(&mut rng, shape, 60) {
            let got = region(isa, &case, &any, &part, &Serial).unwrap();
            assert!(got == cut(&whole, w, shape.k, &part), "{dtype} {part:?}");
        }
    }
}

#[test]
fn no_bytes_do_harm() {
    let (mut rng, isa) = (Rng::new(155), Isa::active().unwrap());
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::U8] {
        for encoding in ENCODINGS {
            let shape = Shape { n: 40, k: 300 };
            let base = rng.weights(dtype, shape.n * shape.k);
            let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            let (mut refused, head) = (0, 160.min(case.blob.len()));
            for i in 0..3000 {
                let mut bad = case.blob.clone();
                for _ in 0..=rng.next() % 4 {
                    // Half of them past the header, which is checked first.
                    let from = if i % 2 == 0 { 0 } else { head };
                    let at = from as u64 + rng.next() % (bad.len() - from).max(1) as u64;
                    bad[(at as usize).min(case.blob.len() - 1)] = rng.next() as u8;
                }
                let part = (range(&mut rng, shape.n), range(&mut rng, shape.k));
                refused += usize::from(region(isa, &case, &bad, &part, &Serial).is_err());
            }
            assert!(refused > 10, "{}: only {refused} were refused", case.name());
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let mut rng = Rng::new(156);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 40, k: 300 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
    let case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
    let (base, delta) = (matrix(dtype, shape, &base), Resident::parse(&case.blob).unwrap());
    let refused = |(rows, columns): Part, bytes: usize, kind: Kind, words: &[&str]| {
        let error =
            delta_restore_region(&delta, &base, rows, columns, &mut vec![0; bytes], &Serial).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{text} does not say {word}"));
    };
    refused((0..41, 0..300), 0, Kind::InvalidArgument, &["rows 0..41", "0..40", "[40, 300]"]);
    refused((0..40, 7..301), 0, Kind::InvalidArgument, &["columns 7..301", "0..300", "[40, 300]"]);
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    refused((5..4, 0..300), 0, Kind::InvalidArgument, &["rows 5..4"]);
    refused((usize::MAX..usize::MAX, 0..1), 0, Kind::InvalidArgument, &["rows"]);
    refused((1..3, 2..5), 11, Kind::Mismatch, &["11 bytes", "rows 1..3", "columns 2..5", "take 12"]);
}
