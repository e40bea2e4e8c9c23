//! Every instruction set gives the bits of the portable code, and every fast path of restoring gives those of
//! the oracle.

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped, unaligned};
use crate::common::linear::{Case, DTYPES, ENCODINGS, MODES, Shuffled, isas};
use xorz::codec::exponent::mantissa_bits;
use xorz::codec::{Encoding, Entries, Exceptions, ExponentTile, Tile, decode_tile};
use xorz::cpu::{LinearArgs, Mode, delta_linear};
use xorz::error::{Hint, Kind, Result};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Resident, restore};
use xorz::vector::{
    Isa, Serial, decode_exponent_on, delta_apply, delta_restore, delta_restore_rows, delta_restore_rows_on,
};

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let mut rng = Rng::new(21);
    // Under emulation a product of 17 rows is worth its minutes, one of 40 is not.
    let most = if std::env::var_os("XORZ_TEST_ISA").is_some() { 17 } else { 40 };
    for (n, k) in [(35, 301), (3, 4200), (260, 40)] {
        for dtype in DTYPES {
            for encoding in ENCODINGS {
                let shape = Shape { n, k };
                let base = rng.weights(dtype, n * k);
                let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                for m in [1, 3, 4, 8, 13, 16, 17, 40].into_iter().filter(|m| *m <= most) {
                    let x = rng.weights(dtype, m * k);
                    let bias = rng.weights(dtype, n);
                    let grad = rng.weights(dtype, m * n);
                    let run = |isa: Isa| {
                        let y = MODES.map(|mode| case.linear(isa, &x, m, Some(&bias), mode));
                        (y, case.grad(isa, &grad, m, &Serial))
                    };
                    let want = run(Isa::Scalar);
                    for isa in isas() {
                        let mut got = run(isa);
                        if isa == Isa::Avx512Bf16 && dtype == Dtype::BF16 {
                            // Its fast products sum in an order of their own, which linear_exactness holds to
                            // the bound.
                            assert_eq!(MODES[0], Mode::Fast);
                            got.0[0].clone_from(&want.0[0]);
                        }
                        assert!(got == want, "{isa:?} {} m {m}", case.name());
                    }
                }
            }
        }
    }
}

#[test]
fn every_address_is_read_alike() {
    let mut rng = Rng::new(22);
    let shape = Shape { n: 19, k: 333 };
    for dtype in DTYPES {
        for encoding in ENCODINGS {
            let base = rng.weights(dtype, shape.n * shape.k);
            let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            for m in [1, 10, 40] {
                let x = rng.weights(dtype, m * shape.k);
                let bias = rng.weights(dtype, shape.n);
                let want = case.linear(Isa::active().unwrap(), &x, m, Some(&bias), Mode::Fast);
                let (b, d, x, bias) =
                    (unaligned(&case.base), unaligned(&case.blob), unaligned(&x), unaligned(&bias));
                let args = LinearArgs {
                    x: &x[1..],
                    m,
                    base: matrix(dtype, shape, &b[1..]),
                    delta: Resident::parse(&d[1..]).unwrap(),
                    bias: Some(&bias[1..]),
                    mode: Mode::Fast,
                };
                let mut out = vec![0; want.len()];
                delta_linear(&args, &mut out, &Serial).unwrap();
                assert!(out == want, "{} m {m}", case.name());
            }
        }
    }
}

#[test]
fn restore_and_apply_equal_the_oracle_on_every_dtype() {
    let mut rng = Rng::new(23);
    for dtype in Dtype::ALL {
        for (n, k) in [(1, 1), (35, 301), (17, 4500), (300, 40), (0, 3), (3, 0)] {
            for encoding in ENCODINGS {
                let shape = Shape { n, k };
                let base = match dtype {
                    Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 => adversarial(&mut rng, dtype, n * k),
                    _ => rng.weights(dtype, n * k),
                };
                let fresh = rng.bytes(base.len());
                let moved = perturbed(&mut rng, dtype, &base, 0.2);
                let fine_tuned = rng.mix(dtype, &moved, &fresh, 0.02);
                let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
                check_words(&mut rng, &case);
            }
        }
    }
}

fn check_words(rng: &mut Rng, case: &Case) {
    let (n, row) = (case.shape.n, case.shape.k * case.dtype.word_bytes());
    let (b, d) = (unaligned(&case.base), unaligned(&case.blob));
    let base = matrix(case.dtype, case.shape, &b[1..]);
    let delta = Resident::parse(&d[1..]).unwrap();
    let mut oracle = vec![0; case.base.len()];
    restore(&delta, &base, &mut oracle).unwrap();
    assert!(oracle == case.fine_tuned, "{}", case.name());

    let mut out = unaligned(&vec![0xA5; oracle.len()]);
    delta_restore(&delta, &base, &mut out[1..], &Shuffled(2)).unwrap();
    assert!(out[1..] == oracle, "restore {}", case.name());

    let mut weight = unaligned(&case.base);
    delta_apply(&delta, case.dtype, case.shape, &mut weight[1..], &Shuffled(3)).unwrap();
    assert!(weight[1..] == oracle, "apply {}", case.name());

    for _ in 0..3 {
        let start = (rng.next() % (n as u64 + 1)) as usize;
        let end = start + (rng.next() % ((n - start) as u64 + 1)) as usize;
        let mut out = vec![0xA5; (end - start) * row];
        delta_restore_rows(&delta, &base, start..end, &mut out, &Serial).unwrap();
        assert!(out == oracle[start * row..end * row], "rows {start}..{end} of {}", case.name());
    }
    let e = delta_restore_rows(&delta, &base, 0..n + 1, &mut out, &Serial).unwrap_err();
    assert_eq!(e.kind(), Kind::InvalidArgument);
}

#[test]
fn apply_changes_nothing_when_the_delta_is_corrupt() {
    let mut rng = Rng::new(24);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 64, k: 300 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
    for encoding in ENCODINGS {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let mut blob = case.blob.clone();
        let at = blob.len() - 70;
        blob[at] ^= 0x55;
        let Ok(delta) = Resident::parse(&blob) else { continue };
        if delta.check().is_ok() {
            continue;
        }
        let mut weight = case.base.clone();
        assert!(delta_apply(&delta, dtype, shape, &mut weight, &Serial).is_err());
        assert!(weight == case.base, "{}", case.name());
    }
}

#[test]
fn apply_refuses_another_base_untouched() {
    let mut rng = Rng::new(27);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 64, k: 300 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
    for encoding in ENCODINGS {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let delta = Resident::parse(&case.blob).unwrap();
        let refused = |weight: &[u8]| {
            let mut after = weight.to_vec();
            let e = delta_apply(&delta, dtype, shape, &mut after, &Serial).unwrap_err();
            assert_eq!((e.kind(), e.hint()), (Kind::Mismatch, Some(Hint::OtherBase)), "{}", case.name());
            assert!(after == weight, "{} was changed", case.name());
        };
        let mut other = case.base.clone();
        *other.last_mut().unwrap() ^= 1;
        refused(&other);
        // What the delta was applied to is its base no more.
        if case.fine_tuned != case.base {
            refused(&case.fine_tuned);
        }
    }
}

/// A tile of encoding `exponent` from chance: any widths, any base, any stream of the length that they ask
/// for.
struct Streamed {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    widths: [u8; 32],
    base: Vec<u8>,
    stream: Vec<u8>,
    entries: Apart,
    exceptions: Apart,
}

/// What a tile stores apart.
#[derive(Clone, Default)]
struct Apart {
    positions: Vec<u8>,
    words: Vec<u8>,
}

impl Apart {
    /// About one word in `one_in`; each entry twice, or once, if `twice`.
    fn new(rng: &mut Rng, dtype: Dtype, (rows, cols): (usize, usize), one_in: u64, twice: bool) -> Self {
        let mut apart = Self::default();
        for at in (0..rows * cols).filter(|_| rng.next().is_multiple_of(one_in)).collect::<Vec<_>>() {
            for _ in 0..1 + u64::from(twice) * (rng.next() % 2) {
                apart.positions.extend(((at / cols * TILE_COLS + at % cols) as u16).to_le_bytes());
            }
        }
        apart.words = rng.bytes(apart.positions.len() / 2 * dtype.word_bytes());
        apart
    }

    /// Differences must not be NaN: which of two NaN an addition keeps, no language says.
    fn finite(mut self, dtype: Dtype) -> Self {
        self.words.chunks_mut(dtype.word_bytes()).for_each(|word| *word.last_mut().unwrap() &= 0xBF);
        self
    }
}

/// Columns of the grid that the tiles below belong to.
const TILE_COLS: usize = 256;

impl Streamed {
    fn new(rng: &mut Rng, dtype: Dtype, rows: usize, cols: usize, widths: [u8; 32]) -> Self {
        let w = dtype.word_bytes();
        let base = rng.bytes(rows * cols * w);
        let stream = rng.bytes(units(dtype, cols, &widths, &base) * w);
        let exceptions = Apart::new(rng, dtype, (rows, cols), 50, false);
        let mut entries = Apart::default();
        if dtype.computes() {
            entries = Apart::new(rng, dtype, (rows, cols), 40, true).finite(dtype);
        }
        Self { dtype, rows, cols, widths, base, stream, entries, exceptions }
    }

    fn tile(&self) -> ExponentTile<'_> {
        let (entries, exceptions) = (&self.entries, &self.exceptions);
        ExponentTile {
            widths: &self.widths,
            stream: &self.stream,
            entries: Entries { positions: &entries.positions, differences: &entries.words },
            exceptions: Exceptions { positions: &exceptions.positions, words: &exceptions.words },
            additive: self.dtype.computes(),
        }
    }

    fn oracle(&self) -> Result<Vec<u8>> {
        let mut words = self.base.clone();
        let tile = Tile::Exponent(self.tile());
        decode_tile(&tile, self.dtype, self.rows, self.cols, TILE_COLS, &mut words).map(|()| words)
    }

    fn fast(&self, isa: Isa) -> Result<Vec<u8>> {
        let mut words = self.base.clone();
        decode_exponent_on(isa, &self.tile(), self.dtype, (self.cols, TILE_COLS), &mut words).map(|()| words)
    }

    /// The same words, or the same error.
    fn check(&self, isa: Isa, what: &str) {
        let (got, want) = (self.fast(isa), self.oracle());
        let context =
            || format!("{what}: {isa:?} {} {} x {}, {:?}", self.dtype, self.rows, self.cols, self.widths);
        match (got, want) {
            (Ok(got), Ok(want)) => {
                let w = self.dtype.word_bytes();
                let at = got.chunks(w).zip(want.chunks(w)).position(|(a, b)| a != b);
                assert_eq!(at, None, "first wrong word; {}", context());
            }
            (Err(got), Err(want)) => {
                assert_eq!((got.kind(), got.message()), (want.kind(), want.message()), "{}", context());
            }
            (got, want) => panic!("{:?} for {:?}; {}", got.err(), want.err(), context()),
        }
    }
}

/// How many units the tile takes: one whenever a lane holds fewer bits than the word asks for.
fn units(dtype: Dtype, cols: usize, widths: &[u8; 32], base: &[u8]) -> usize {
    let (w, shift) = (dtype.word_bytes(), mantissa_bits(dtype));
    let mut held = [0u32; 32];
    let mut units = 0;
    for (i, word) in base.chunks(w).enumerate() {
        let mut bits = [0; 8];
        bits[..w].copy_from_slice(word);
        let width = u32::from(widths[(u64::from_le_bytes(bits) >> shift & 31) as usize]);
        let held = &mut held[i % cols % 32];
        if *held < width {
            units += 1;
            *held += 8 * w as u32;
        }
        *held -= width;
    }
    units
}

/// Tables of widths: any mix, one width everywhere, few changes, and those at the ends.
fn tables(rng: &mut Rng, most: u8) -> Vec<[u8; 32]> {
    let mut tables: Vec<[u8; 32]> = (0..=most).map(|w| [w; 32]).collect();
    for _ in 0..6 {
        tables.push(std::array::from_fn(|_| (rng.next() % (u64::from(most) + 1)) as u8));
        tables.push(std::array::from_fn(|_| if rng.next().is_multiple_of(4) { 1 } else { 0 }));
        tables.push(std::array::from_fn(|_| if rng.next().is_multiple_of(2) { most } else { 0 }));
        tables.push(std::array::from_fn(|_| most - (rng.next() % 2) as u8));
    }
    tables
}

const STREAMED: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::U16];

#[test]
fn exponent_is_decoded_as_the_oracle_does_on_every_instruction_set() {
    let mut rng = Rng::new(25);
    for dtype in STREAMED {
        for widths in tables(&mut rng, 8 * dtype.word_bytes() as u8) {
            let cols = [1 + (rng.next() % 31) as usize, 32 + (rng.next() % 224) as usize];
            for cols in [31, 32, 33, 63, 64, 65, 95, 96, 97, 256].into_iter().chain(cols) {
                let rows = 1 + (rng.next() % 24) as usize;
                let case = Streamed::new(&mut rng, dtype, rows, cols, widths);
                assert!(case.oracle().is_ok());
                isas().into_iter().for_each(|isa| case.check(isa, "whole"));
            }
        }
    }
}

#[test]
fn exponent_streams_that_end_early_or_late_are_the_oracles_errors() {
    let mut rng = Rng::new(26);
    let mut kinds = [0; 2];
    for dtype in STREAMED {
        let w = dtype.word_bytes();
        for widths in tables(&mut rng, 8 * w as u8) {
            let (rows, cols) = (1 + (rng.next() % 9) as usize, 1 + (rng.next() % 130) as usize);
            let mut case = Streamed::new(&mut rng, dtype, rows, cols, widths);
            let whole = case.stream.clone();
            for units in [1, 2, 31, 32, 33, 63, 64, 65, whole.len() / w] {
                if let Some(len) = whole.len().checked_sub(units * w).filter(|_| units > 0) {
                    case.stream = whole[..len].to_vec();
                    assert_eq!(case.oracle().unwrap_err().kind(), Kind::Truncated);
                    isas().into_iter().for_each(|isa| case.check(isa, "cut"));
                    kinds[0] += 1;
                }
                case.stream = [&whole[..], &rng.bytes(units * w)].concat();
                if units > 0 {
                    assert_eq!(case.oracle().unwrap_err().kind(), Kind::Corrupt);
                    kinds[1] += 1;
                }
                isas().into_iter().for_each(|isa| case.check(isa, "overlong"));
            }
            // Half a unit, which only a caller without a resident delta can have.
            case.stream = whole[..whole.len().saturating_sub(1)].to_vec();
            isas().into_iter().for_each(|isa| case.check(isa, "half a unit"));
        }
    }
    assert!(kinds.iter().all(|k| *k > 100), "{kinds:?}");
}

#[test]
fn exponent_tiles_of_chance_are_decoded_or_refused_as_the_oracle_does() {
    let mut rng = Rng::new(27);
    for dtype in STREAMED {
        let w = dtype.word_bytes();
        for _ in 0..150 {
            let widths = std::array::from_fn(|_| (rng.next() % (8 * w as u64 + 1)) as u8);
            let (rows, cols) = (1 + (rng.next() % 40) as usize, 1 + (rng.next() % 100) as usize);
            let mut case = Streamed::new(&mut rng, dtype, rows, cols, widths);
            let len = (rng.next() % 3000) as usize;
            case.stream = rng.bytes(len);
            // Entries and exceptions anywhere, in any order.
            let any = |rng: &mut Rng| {
                let count = (rng.next() % 4) as usize;
                Apart { positions: rng.bytes(2 * count), words: rng.bytes(w * count) }
            };
            if dtype.computes() {
                case.entries = any(&mut rng).finite(dtype);
            }
            case.exceptions = any(&mut rng);
            isas().into_iter().for_each(|isa| case.check(isa, "chance"));
            // Decoded, and only then what is stored apart judged.
            case.stream = rng.bytes(units(dtype, cols, &widths, &case.base) * w);
            isas().into_iter().for_each(|isa| case.check(isa, "entries and exceptions of chance"));
        }
        let mut case = Streamed::new(&mut rng, dtype, 1, 40, [1; 32]);
        case.widths[7] = 8 * w as u8 + 1;
        for isa in isas() {
            assert_eq!(case.fast(isa).unwrap_err().kind(), Kind::InvalidArgument);
        }
    }
}

#[test]
fn exponent_streams_of_another_delta_are_noticed() {
    // What the tests above must not let pass: a bit of the stream, a width, or a lane more or less.
    let mut rng = Rng::new(28);
    for dtype in STREAMED {
        let widths = [5; 32];
        let case = Streamed::new(&mut rng, dtype, 3, 77, widths);
        let want = case.oracle().unwrap();
        for isa in isas() {
            let caught = |mutant: &Streamed, what: &str| {
                assert!(
                    mutant.fast(isa).ok().as_ref() != Some(&want),
                    "{what} went unnoticed, {isa:?} {dtype}"
                );
            };
            let like = |stream: Vec<u8>, widths: [u8; 32]| Streamed {
                stream,
                widths,
                base: case.base.clone(),
                entries: Apart::default(),
                exceptions: Apart::default(),
                ..case
            };
            let plain = like(case.stream.clone(), widths).fast(isa).unwrap();
            let mut stream = case.stream.clone();
            stream[0] ^= 1;
            let flipped = like(stream, widths).fast(isa).unwrap();
            let differ = plain.iter().zip(&flipped).filter(|(a, b)| a != b).count();
            assert!((1..=dtype.word_bytes()).contains(&differ), "one bit changed {differ} bytes");
            caught(&like(case.stream.clone(), [4; 32]), "another width");
            let mut swapped = case.stream.clone();
            swapped.rotate_left(dtype.word_bytes());
            caught(&like(swapped, widths), "another order of units");
        }
    }
}

#[test]
fn restored_rows_are_alike_on_every_instruction_set() {
    let mut rng = Rng::new(29);
    for dtype in DTYPES {
        let shape = Shape { n: 70, k: 4500 };
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = stepped(&mut rng, dtype, &base, 1e-4);
        let case = Case::new(dtype, shape, Encoding::Exponent, &base, &fine_tuned);
        let row = shape.k * dtype.word_bytes();
        for isa in isas() {
            for skip in [0, 1] {
                let mut out = vec![0xA5; 50 * row + skip];
                let (delta, base) = (Resident::parse(&case.blob).unwrap(), matrix(dtype, shape, &base));
                delta_restore_rows_on(isa, &delta, &base, 7..57, &mut out[skip..], &Serial).unwrap();
                assert!(out[skip..] == case.fine_tuned[7 * row..57 * row], "{isa:?} {dtype}");
            }
        }
    }
}
