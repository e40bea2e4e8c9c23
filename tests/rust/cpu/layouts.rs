//! Promise: deltas of layout 0, which packages of version 1 hold, are read and computed on as ever; and what
//! layout 1 stores apart of `exponent`, entries and exceptions, gives the fine-tuned words and products
//! right, or an error.

use crate::common::data::{Rng, adversarial, matrix, perturbed, value, word};
use crate::common::layout0;
use crate::common::linear::{Case, DTYPES, MODES, first_difference, integers, isas};
use xorz::codec::{Encoding, GapKind, Grid, Tile};
use xorz::cpu::{Arena, EmbeddingArgs, delta_embedding_on};
use xorz::error::{Kind, Result};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{
    Assembler, DeltaPiece, HEADER_BYTES, Plan, Resident, concat, encode_tiles, restore, restore_rows, slice,
};
use xorz::vector::{Serial, delta_restore_rows_on, patch_on};

const OLD_TILES: [(usize, usize); 2] = [(64, 256), (16, 4096)];

/// Widths that few words of `words` ask for more than.
fn widths(rng: &mut Rng, bits: u64) -> [u8; 32] {
    std::array::from_fn(|_| [0, bits, 1 + rng.next() % bits][(rng.next() % 3) as usize] as u8)
}

/// Every way of reading a delta on the CPU gives the fine-tuned words.
fn assert_read(case: &Case, what: &str) {
    let (base, delta) = (matrix(case.dtype, case.shape, &case.base), Resident::parse(&case.blob).unwrap());
    delta.check_full(&base).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut out = vec![0xA5; case.base.len()];
    restore(&delta, &base, &mut out).unwrap();
    assert!(out == case.fine_tuned, "oracle, {what}");
    let (row, rows) = (base.row_bytes(), case.shape.n / 3..case.shape.n - case.shape.n / 4);
    let part = &case.fine_tuned[rows.start * row..rows.end * row];
    let mut out = vec![0xA5; part.len()];
    restore_rows(&delta, &base, rows.clone(), &mut out).unwrap();
    assert!(out == part, "oracle's rows, {what}");
    for isa in isas() {
        out.fill(0xA5);
        delta_restore_rows_on(isa, &delta, &base, rows.clone(), &mut out, &Serial).unwrap();
        assert!(out == part, "rows, {isa:?} {what}");
        let mut words = case.base.clone();
        patch_on(isa, &delta, &mut words).unwrap();
        assert!(words == case.fine_tuned, "patch, {isa:?} {what}");
        let indices: Vec<i64> = (0..case.shape.n as i64).rev().step_by(3).collect();
        let args = EmbeddingArgs {
            indices: &indices,
            base,
            arena: Arena { bytes: &case.blob, slots: &[[0, case.blob.len() as i64]] },
            tenant_of_row: &vec![0; indices.len()],
        };
        let mut out = vec![0xA5; indices.len() * row];
        delta_embedding_on(isa, &args, &mut out, &Serial).unwrap();
        let want = indices.iter().flat_map(|i| &case.fine_tuned[*i as usize * row..(*i as usize + 1) * row]);
        assert!(out.iter().eq(want), "embedding, {isa:?} {what}");
    }
}

fn old_case(rng: &mut Rng, dtype: Dtype, shape: Shape, tile: (usize, usize), pair: (&[u8], &[u8])) -> Case {
    let widths = widths(rng, 8 * dtype.word_bytes() as u64);
    let blob = layout0::exponent((dtype, shape), tile, &widths, pair, rng);
    let (base, fine_tuned) = (pair.0.to_vec(), pair.1.to_vec());
    Case { dtype, shape, base, fine_tuned, encoding: Encoding::Exponent, blob }
}

#[test]
fn layout_0_is_read_bit_for_bit() {
    let mut rng = Rng::new(61);
    for dtype in Dtype::ALL {
        for (n, k) in [(1, 300), (37, 95), (70, 4500)] {
            let shape = Shape { n, k };
            let base = if matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                adversarial(&mut rng, dtype, n * k)
            } else {
                rng.weights(dtype, n * k)
            };
            let fine_tuned = perturbed(&mut rng, dtype, &base, 0.3);
            for tile in OLD_TILES {
                let case = old_case(&mut rng, dtype, shape, tile, (&base, &fine_tuned));
                let h = *Resident::parse(&case.blob).unwrap().header();
                assert!(h.version == 0 && h.exceptions > 0 && h.entries == 0);
                assert_read(&case, &case.name());
            }
        }
    }
}

#[test]
fn parts_of_layout_0_become_layout_1() {
    let mut rng = Rng::new(62);
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::U16] {
        let shape = Shape { n: 128, k: 600 };
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.2);
        let case = old_case(&mut rng, dtype, shape, (64, 256), (&base, &fine_tuned));
        let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
        let delta = Resident::parse(&case.blob).unwrap();
        // A whole tile, which is copied where layouts are the same.
        let cut = slice(&delta, &b, 0, 64..128).unwrap();
        let (base, fine_tuned) = (b.rows(64, 128), f.rows(64, 128));
        let part = |blob: Vec<u8>, base: &[u8], fine_tuned: &[u8], n: usize| Case {
            shape: Shape { n, ..shape },
            base: base.to_vec(),
            fine_tuned: fine_tuned.to_vec(),
            blob,
            ..Case {
                dtype,
                shape,
                base: vec![],
                fine_tuned: vec![],
                encoding: Encoding::Exponent,
                blob: vec![],
            }
        };
        assert_eq!(Resident::parse(&cut).unwrap().header().version, 1);
        let new = part(cut, base.bytes(), fine_tuned.bytes(), 64);
        assert_read(&new, "a slice of layout 0");
        let joined = concat(&[(Resident::parse(&new.blob).unwrap(), base), (delta, b)], 0).unwrap();
        assert_eq!(Resident::parse(&joined).unwrap().header().version, 1);
        let both = |a: &[u8], b: &[u8]| [a, b].concat();
        let (base, fine_tuned) = (both(base.bytes(), b.bytes()), both(fine_tuned.bytes(), f.bytes()));
        assert_read(&part(joined, &base, &fine_tuned, 192), "layouts 1 and 0 joined");
    }
}

#[test]
fn products_and_gradients_on_layout_0_equal_float64_bit_for_bit() {
    let mut rng = Rng::new(63);
    for dtype in DTYPES {
        for (n, k) in [(5, 4099), (130, 70)] {
            let shape = Shape { n, k };
            let base = integers(&mut rng, dtype, n * k, 8);
            let other = integers(&mut rng, dtype, n * k, 8);
            let fine_tuned = rng.mix(dtype, &base, &other, 0.2);
            for tile in OLD_TILES {
                let case = old_case(&mut rng, dtype, shape, tile, (&base, &fine_tuned));
                assert!(Resident::parse(&case.blob).unwrap().header().exceptions > 0);
                assert_products(&mut rng, &case);
            }
        }
    }
}

/// Products and gradients with small integers are those of the fine-tuned words in f64.
fn assert_products(rng: &mut Rng, case: &Case) {
    let (dtype, Shape { n, k }) = (case.dtype, case.shape);
    for m in [1, 2, 5, 16, 19] {
        let (x, grad) = (integers(rng, dtype, m * k, 3), integers(rng, dtype, m * n, 3));
        for isa in isas() {
            for mode in MODES {
                let got = case.linear(isa, &x, m, None, mode);
                let difference = first_difference(dtype, &got, &case.reference(&x, m, None));
                assert_eq!(difference, None, "{isa:?} {} m {m} {mode:?}", case.name());
            }
            let got = case.grad(isa, &grad, m, &Serial);
            let difference = first_difference(dtype, &got, &case.reference_grad(&grad, m));
            assert_eq!(difference, None, "gradients, {isa:?} {} m {m}", case.name());
        }
    }
}

/// A delta of layout 1 with a table and tiles of the caller's choice.
fn planned(dtype: Dtype, shape: Shape, tile: (usize, usize), widths: [u8; 32], pair: (&[u8], &[u8])) -> Case {
    let grid = Grid { shape, tile_rows: tile.0, tile_cols: tile.1 };
    let plan = Plan { encoding: Encoding::Exponent, grid, gap: GapKind::U8, widths };
    let (mut piece, mut assembler) = (DeltaPiece::default(), Assembler::new(dtype, &plan).unwrap());
    encode_tiles(&plan, dtype, 0..grid.tiles(), pair.0, pair.1, &mut piece).unwrap();
    assembler.add(&piece).unwrap();
    let done = assembler.finish(matrix(dtype, shape, pair.0).digest()).unwrap();
    let blob = [&done.head[..], &piece.payload, &done.tail].concat();
    let (base, fine_tuned) = (pair.0.to_vec(), pair.1.to_vec());
    Case { dtype, shape, base, fine_tuned, encoding: Encoding::Exponent, blob }
}

/// How many words of a delta take one entry, two, a NaN as entry, an exception.
fn kinds(blob: &[u8]) -> [usize; 4] {
    let delta = Resident::parse(blob).unwrap();
    let dtype = delta.header().dtype;
    let mut kinds = [0; 4];
    for index in 0..delta.grid().tiles() {
        let Tile::Exponent(tile) = delta.tile(index).unwrap() else { panic!("not exponent") };
        assert!(tile.additive);
        let all: Vec<_> = (0..tile.entries.len()).map(|i| tile.entries.get(i)).collect();
        for same in all.chunk_by(|a, b| a.0 == b.0) {
            kinds[same.len() - 1] += 1;
            let value = value(dtype, &same[0].1.to_le_bytes()[..dtype.word_bytes()]);
            kinds[2] += usize::from(value.is_nan());
        }
        kinds[3] += tile.exceptions.len();
    }
    kinds
}

/// Pairs of words whose difference is one word, two (the next two, if `far`), or none; the last two are equal
/// in value.
fn misfits(dtype: Dtype, far: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let two = match dtype {
        _ if !far => 2.0,
        Dtype::BF16 => 1024.0,
        Dtype::F16 => 2050.0,
        _ => 16_777_216.0,
    };
    let nan = f64::NAN;
    let pairs = [
        (1.0, 4.0),
        (-2.0, 0.0),
        (3.0, -96.0),
        (1.5, two),
        (-1.5, -two),
        (nan, 2.0),
        (f64::INFINITY, 1.0),
        (3.0, nan),
        (2.0, f64::NEG_INFINITY),
        (0.0, -0.0),
        (-0.0, 0.0),
    ];
    pairs.map(|(b, f)| (word(dtype, b), word(dtype, f))).to_vec()
}

#[test]
fn words_of_one_of_two_and_of_no_exact_difference_are_restored_and_multiplied_exactly() {
    let mut rng = Rng::new(64);
    for (dtype, far) in DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        for (n, k, tile) in [(1, 700, (16, 256)), (37, 301, (32, 256)), (40, 4100, (16, 4096))] {
            let shape = Shape { n, k };
            let (mut base, w) = (integers(&mut rng, dtype, n * k, 3), dtype.word_bytes());
            let mut fine_tuned = base.clone();
            let odd = misfits(dtype, far);
            let last = n * k - 1;
            for (i, at) in (0..n * k).step_by(5).chain([last]).enumerate() {
                // Most rows' outputs stay finite.
                let kinds = if at / k % 4 == 0 && n > 1 { odd.len() } else { 5 };
                let (b, f) = &odd[(i + rng.next() as usize % 3) % kinds];
                base[at * w..(at + 1) * w].copy_from_slice(b);
                fine_tuned[at * w..(at + 1) * w].copy_from_slice(f);
            }
            for widths in [[0; 32], [1; 32], [3; 32]] {
                let case = planned(dtype, shape, tile, widths, (&base, &fine_tuned));
                let kinds = kinds(&case.blob);
                assert!(kinds[0] > 0 && (kinds[1] > 0) == far, "{kinds:?}");
                assert!(n == 1 || (kinds[2] > 0 && kinds[3] > kinds[2]), "{kinds:?}");
                assert_read(&case, &format!("{} {widths:?}", case.name()));
                // Two entries far apart are exact in a word of f32, but not in a sum of f32.
                if !far || dtype != Dtype::F32 {
                    assert_products(&mut rng, &case);
                }
            }
        }
    }
}

#[test]
fn products_with_a_mutant_of_an_entry_are_noticed() {
    let mut rng = Rng::new(67);
    let shape = Shape { n: 20, k: 300 };
    for dtype in [Dtype::BF16, Dtype::F16] {
        let w = dtype.word_bytes();
        let fine_tuned = integers(&mut rng, dtype, shape.n * shape.k, 3);
        // From far away to near zero: without its second difference a word is another word, not only another
        // sum.
        let (mut base, odd) = (fine_tuned.clone(), misfits(dtype, true));
        for (i, word) in base.chunks_mut(w).enumerate().filter(|(i, _)| i % 7 == 0) {
            word.copy_from_slice(&odd[i / 7 % 5].1);
        }
        let case = planned(dtype, shape, (32, 256), [0; 32], (&base, &fine_tuned));
        let Tile::Exponent(tile) = Resident::parse(&case.blob).unwrap().tile(0).unwrap() else { panic!() };
        let at = |part: &[u8]| part.as_ptr().addr() - case.blob.as_ptr().addr();
        let (positions, differences) = (at(tile.entries.positions), at(tile.entries.differences));
        let position = |i: usize| tile.entries.get(i).0;
        let twos: Vec<usize> = (1..tile.entries.len()).filter(|i| position(*i) == position(i - 1)).collect();
        let ones: Vec<usize> = (1..tile.entries.len() - 1)
            .filter(|i| position(i - 1) + 1 < position(*i) && position(*i) + 1 < position(i + 1))
            .collect();
        for m in [1, 2, 5, 16, 40] {
            // Every row of x is 1 at the column of an entry, 0 elsewhere.
            let hot = |entry: usize| -> Vec<u8> {
                let column = position(entry) % 256;
                (0..m * shape.k)
                    .flat_map(|i| word(dtype, f64::from(u8::from(i % shape.k == column))))
                    .collect()
            };
            for mode in MODES {
                let caught = |what: &str, x: Vec<u8>, change: &dyn Fn(&mut [u8])| {
                    let want = case.reference(&x, m, None);
                    let mut blob = case.blob.clone();
                    for mutant in [false, true] {
                        let of = Case { blob: blob.clone(), base: base.clone(), fine_tuned: vec![], ..case };
                        let got = of.linear(xorz::vector::Isa::active().unwrap(), &x, m, None, mode);
                        let noticed = first_difference(dtype, &got, &want);
                        assert_eq!(noticed.is_some(), mutant, "{what}, {dtype} m {m} {mode:?}: {noticed:?}");
                        change(&mut blob);
                    }
                };
                let mut any = |list: &[usize]| list[rng.next() as usize % list.len()];
                let (one, two) = (any(&ones), any(&twos));
                let no_op = word(dtype, -0.0);
                let dropped = |i: usize| {
                    let no_op = no_op.clone();
                    move |blob: &mut [u8]| blob[differences + i * w..][..w].copy_from_slice(&no_op)
                };
                caught("a dropped entry", hot(one), &dropped(one));
                caught("a dropped second entry", hot(two), &dropped(two));
                caught("an entry of the next column", hot(one), &|blob| blob[positions + 2 * one] ^= 1);
            }
        }
    }
}

/// Everything that decodes the words or adds entries, on bytes that were not checked.
fn every_use(case: &Case) -> Vec<(&'static str, Result<()>)> {
    let delta = Resident::parse(&case.blob).unwrap();
    let base = matrix(case.dtype, case.shape, &case.base);
    let (isa, Shape { n, k }) = (xorz::vector::Isa::active().unwrap(), case.shape);
    let mut out = vec![0; case.base.len()];
    let x = vec![0; 40 * k * case.dtype.word_bytes()];
    let linear = |m: usize| {
        let x = &x[..m * k * case.dtype.word_bytes()];
        case.linear_by(isa, x, m, None, xorz::cpu::Mode::Fast, &Serial).map(drop)
    };
    let grad = {
        let g = vec![0; 2 * n * case.dtype.word_bytes()];
        let mut out = vec![0; 2 * k * case.dtype.word_bytes()];
        xorz::cpu::delta_linear_grad_input(&g, 2, &base, &delta, &mut out, &Serial)
    };
    let indices: Vec<i64> = (0..n as i64).collect();
    let args = EmbeddingArgs {
        indices: &indices,
        base,
        arena: Arena { bytes: &case.blob, slots: &[[0, case.blob.len() as i64]] },
        tenant_of_row: &vec![0; n],
    };
    vec![
        ("check", delta.check()),
        ("restore", restore(&delta, &base, &mut out)),
        ("patch", patch_on(isa, &delta, &mut out)),
        ("one row", linear(1)),
        ("five rows", linear(5)),
        ("forty rows", linear(40)),
        ("gradient", grad),
        ("embedding", delta_embedding_on(isa, &args, &mut vec![0; case.base.len()], &Serial)),
    ]
}

#[test]
fn entries_out_of_order_or_out_of_their_tile_are_refused_by_every_reader() {
    let mut rng = Rng::new(65);
    for dtype in DTYPES {
        // One tile whose columns and rows are fewer than its grid's.
        let shape = Shape { n: 20, k: 200 };
        let base = integers(&mut rng, dtype, shape.n * shape.k, 3);
        let fine_tuned = integers(&mut rng, dtype, shape.n * shape.k, 3);
        let case = planned(dtype, shape, (32, 256), [1; 32], (&base, &fine_tuned));
        every_use(&case).into_iter().for_each(|(what, done)| assert!(done.is_ok(), "{what}"));
        let Tile::Exponent(tile) = Resident::parse(&case.blob).unwrap().tile(0).unwrap() else { panic!() };
        let count = tile.entries.len();
        assert!(count > 100 && kinds(&case.blob)[1] == 0);
        let at = tile.entries.positions.as_ptr().addr() - case.blob.as_ptr().addr();
        let position = |i: usize| tile.entries.get(i).0 as u16;
        for (what, i, to, by_rows) in [
            ("beyond the columns", count - 1, 19 * 256 + 200, true),
            // Rows are looked up one by one; nobody asks for these.
            ("beyond the rows", count - 1, 20 * 256, false),
            ("the last of all", count - 1, u16::MAX, false),
            ("below the one before", 7, position(6) - 1, true),
            ("before all", count - 1, 0, true),
        ] {
            let mut bad = Case { blob: case.blob.clone(), base: base.clone(), fine_tuned: vec![], ..case };
            bad.blob[at + 2 * i..at + 2 * i + 2].copy_from_slice(&to.to_le_bytes());
            assert_refused(&bad, what, by_rows);
        }
        let mut bad = Case { blob: case.blob.clone(), base: base.clone(), fine_tuned: vec![], ..case };
        (8..10).for_each(|i| {
            bad.blob[at + 2 * i..at + 2 * i + 2].copy_from_slice(&position(7).to_le_bytes());
        });
        assert_refused(&bad, "three of one position", true);
    }
}

fn assert_refused(bad: &Case, what: &str, by_rows: bool) {
    for (used, done) in every_use(bad).into_iter().filter(|(used, _)| by_rows || *used != "embedding") {
        let e = done.err().unwrap_or_else(|| panic!("{what} went through {used}, {}", bad.name()));
        assert_eq!(e.kind(), Kind::Corrupt, "{what} {used}: {e}");
    }
}

#[test]
fn headers_of_either_layout_are_held_to_it() {
    let mut rng = Rng::new(66);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 33, k: 300 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
    let old = layout0::exponent((dtype, shape), (64, 256), &[2; 32], (&base, &fine_tuned), &mut rng);
    let new = planned(dtype, shape, (64, 256), [2; 32], (&base, &fine_tuned)).blob;
    let refused = |blob: &[u8], at: usize, value: u64, bytes: usize| {
        let mut bad = blob.to_vec();
        bad[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        Resident::parse(&bad).err().map(|e| e.kind())
    };
    let number = |blob: &[u8], at: usize| u64::from_le_bytes(blob[at..at + 8].try_into().unwrap());
    // Versions beyond, and one under the other's name.
    assert_eq!(refused(&old, 8, 2, 2), Some(Kind::Unsupported));
    assert_eq!(refused(&new, 8, 0x100, 2), Some(Kind::Unsupported));
    assert_eq!(refused(&old, 8, 1, 2), Some(Kind::Corrupt));
    assert_eq!(refused(&new, 8, 0, 2), Some(Kind::Corrupt));
    // The number of entries and where they lie; zeros in layout 0.
    for at in [104, 176, 184] {
        assert_eq!(refused(&old, at, 64, 8), Some(Kind::Corrupt), "byte {at} of layout 0");
        assert_eq!(number(&old, at), 0);
        let value = number(&new, at);
        assert!(value > 0);
        assert!(refused(&new, at, value + 64, 8).is_some() && refused(&new, at, 0, 8).is_some());
    }
    assert!(refused(&new, 104, u64::MAX, 8).is_some());
    // Entries of dtypes that do not compute, and of other encodings.
    assert_eq!(refused(&new, 11, Dtype::U16 as u64, 1), Some(Kind::Corrupt));
    assert_eq!(refused(&new, 10, 1, 1), Some(Kind::Corrupt));
    // Sections as SPEC.md says: the first one begins after the header, each at the next multiple of 64.
    let tiles = Resident::parse(&new).unwrap().grid().tiles() as u64;
    let (entries, exceptions) = (number(&new, 104), number(&new, 48));
    let directory = 4 * (tiles + 1);
    let list = |count: u64| if count > 0 { [directory, 2 * count, 2 * count] } else { [0; 3] };
    let lengths = [&[directory, 2 * number(&new, 56)][..], &list(entries), &list(exceptions)].concat();
    let mut at = HEADER_BYTES as u64;
    let mut starts = vec![];
    for length in lengths {
        starts.push(at);
        at = (at + length).next_multiple_of(64);
    }
    let kept = [64, 72, 176, 184].map(|at| number(&new, at));
    assert_eq!(kept[..], starts[..4], "directory, payload, entries' directory and positions");
    assert_eq!([80, 88, 96].map(|at| number(&new, at))[..], starts[5..], "exceptions");
    assert_eq!(number(&new, 32), at);
}
