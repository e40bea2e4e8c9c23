//! Promise: sizes are computed without overflow: every product and sum of what a header or a caller says is the one that wide
//! arithmetic gives, or an error. Numbers around every power of two that matters, in all pairs; and tiles of any shape cover each
//! word once.

use proptest::prelude::*;
use xorz::codec::Grid;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::Header;
use xorz::resident::{Resident, encode_pair};

/// Numbers at which arithmetic goes wrong.
fn edges() -> Vec<u64> {
    let mut out = vec![0, 1, 2, 3, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 65_535, 65_536, 65_537];
    for bit in [24, 31, 32, 33, 44, 47, 48, 60, 61, 62, 63] {
        out.extend([(1u64 << bit) - 1, 1 << bit, (1 << bit) + 1]);
    }
    out.extend([u64::MAX / 3, u64::MAX - 4095, u64::MAX - 64, u64::MAX - 63, u64::MAX - 1, u64::MAX]);
    out
}

#[test]
fn words_and_bytes_are_those_of_wide_arithmetic_or_refused() {
    for n in edges() {
        for k in edges() {
            let (shape, words) = (Shape { n: n as usize, k: k as usize }, u128::from(n) * u128::from(k));
            assert_eq!(
                shape.words().ok().map(|w| w as u128),
                Some(words).filter(|w| *w <= u128::from(u64::MAX))
            );
            let hollow = words == 0 && n.max(k) > Shape::MAX_EMPTY as u64;
            for dtype in Dtype::ALL {
                let bytes = words.saturating_mul(dtype.word_bytes() as u128);
                let fits = bytes <= isize::MAX as u128 && !hollow;
                assert_eq!(
                    shape.bytes(dtype).ok().map(|b| b as u128),
                    fits.then_some(bytes),
                    "{shape} {dtype}"
                );
                // Nothing is as long as that, so every other length is refused, too.
                assert_eq!(Matrix::new(dtype, shape, &[]).is_ok(), bytes == 0 && fits, "{shape} {dtype}");
            }
            for dims in [vec![n as usize, k as usize], vec![n as usize, 1, k as usize]] {
                let rest = dims[1..].iter().map(|d| *d as u128).product::<u128>();
                let fits = words <= u128::from(u64::MAX) && !hollow;
                let want = fits.then_some(Shape { n: n as usize, k: rest as usize });
                assert_eq!(Shape::of_dims(&dims).ok(), want, "{dims:?}");
            }
        }
    }
}

#[test]
fn tiles_are_counted_without_overflow_for_every_shape_that_has_bytes() {
    for n in edges() {
        for k in edges() {
            let shape = Shape { n: n as usize, k: k as usize };
            if shape.bytes(Dtype::U8).is_err() {
                continue;
            }
            for grid in [Grid::for_sparse(shape), Grid::for_exponent(shape)] {
                assert!(grid.tile_rows * grid.tile_cols <= Grid::MAX_WORDS, "{grid:?}");
                let wide = u128::from(n).div_ceil(grid.tile_rows as u128)
                    * u128::from(k).div_ceil(grid.tile_cols as u128);
                assert_eq!(grid.tiles() as u128, wide, "{grid:?}");
                if wide > 0 {
                    let (first, last) = (grid.rect(0), grid.rect(grid.tiles() - 1));
                    assert_eq!((first.r0, first.c0, last.r1, last.c1), (0, 0, shape.n, shape.k), "{grid:?}");
                    assert!(last.words() > 0 && last.words() <= Grid::MAX_WORDS, "{grid:?}");
                }
            }
        }
    }
}

#[test]
fn a_header_of_any_two_numbers_is_read_or_refused() {
    let words: Vec<u8> = (0..40 * 300 * 2).map(|i| (i * 7 + i / 300) as u8).collect();
    let mut tuned = words.clone();
    tuned.iter_mut().step_by(97).for_each(|b| *b ^= 3);
    let shape = Shape { n: 40, k: 300 };
    let matrix = |bytes| Matrix::new(Dtype::BF16, shape, bytes).unwrap();
    for prefer in [xorz::codec::Prefer::Speed, xorz::codec::Prefer::Memory] {
        let good = encode_pair(&matrix(&words), &matrix(&tuned), prefer).unwrap();
        let edges = edges();
        for a in (8..192).step_by(8) {
            for b in (a..192).step_by(8) {
                for (i, x) in edges.iter().enumerate() {
                    let y = edges[(i * 7 + a + b) % edges.len()];
                    let mut bad = good.clone();
                    bad[a..a + 8].copy_from_slice(&x.to_le_bytes());
                    bad[b..b + 8].copy_from_slice(&y.to_le_bytes());
                    // What is taken is within its bytes, whatever it says.
                    if let Ok(delta) = Resident::parse(&bad) {
                        let tiles = delta.grid().tiles();
                        (0..tiles.min(16))
                            .chain(tiles.saturating_sub(2)..tiles)
                            .for_each(|t| drop(delta.tile(t)));
                    }
                }
            }
        }
    }
}

#[test]
fn a_safetensors_header_of_any_numbers_is_what_wide_arithmetic_says_or_refused() {
    for n in edges() {
        for k in edges() {
            for (dtype, bits) in [("BF16", 16u128), ("F64", 64), ("F4", 4), ("U8", 8)] {
                let bits = (u128::from(n) * u128::from(k)).saturating_mul(bits);
                let bytes = bits / 8;
                for end in [bytes, bytes + 1, bytes.saturating_sub(1), bytes & u128::from(u64::MAX)] {
                    let text = format!(
                        r#"{{"w":{{"dtype":"{dtype}","shape":[{n},{k}],"data_offsets":[0,{end}]}}}}"#
                    );
                    let taken = Header::parse(text.as_bytes());
                    let right = bits % 8 == 0 && end == bytes && bytes <= u128::from(u64::MAX);
                    assert!(right || taken.is_err(), "{text} was taken");
                    assert!(taken.is_ok() || !right || n.max(k) > 1 << 24, "{text} was refused: {taken:?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn tiles_cover_every_word_once(n in 0usize..300, k in 0usize..5000, dense in any::<bool>()) {
        let shape = Shape { n, k };
        let grid = if dense { Grid::for_exponent(shape) } else { Grid::for_sparse(shape) };
        let mut seen = vec![0u8; n * k];
        for index in 0..grid.tiles() {
            let rect = grid.rect(index);
            prop_assert!(rect.rows() <= grid.tile_rows && rect.cols() <= grid.tile_cols && rect.words() > 0);
            for r in rect.r0..rect.r1 {
                seen[r * k + rect.c0..r * k + rect.c1].iter_mut().for_each(|count| *count += 1);
            }
        }
        prop_assert!(seen.iter().all(|&count| count == 1));
    }
}
