//! Tiles for `exponent`: how small a matrix can be cut at what cost. Must know no widths.

use crate::codec::{Grid, exponent};
use crate::matrix::Shape;

/// Smallest tile of a matrix that has as many words.
const LEAST_WORDS: usize = 16 * 1024;
/// What the ends of tiles may cost: this share of all bits,
const ENDS_SHARE: f64 = 0.015;
/// and so many bits per word.
const ENDS_BITS: f64 = 0.02;

/// Bits that the lanes of a tile leave unused at its end: half a word per lane, on average.
pub(super) fn lane_ends(word_bits: u8) -> u64 {
    exponent::STREAM_LANES as u64 * u64::from(word_bits) / 2
}

/// Tiles for `exponent` of `bits` bits in all: as small as their ends allow, since a GPU has a warp for each;
/// of equally many words the widest. A tile's ends are its lanes', and its places in the directories of units
/// and of entries.
pub(super) fn grid(shape: Shape, word_bits: u8, bits: f64) -> Grid {
    let largest = Grid::for_exponent(shape);
    let words = shape.n as f64 * shape.k as f64;
    let limit = (bits * ENDS_SHARE).min(words * ENDS_BITS);
    let columns =
        [1024, 2048, 4096].into_iter().filter(|c| *c < largest.tile_cols).chain([largest.tile_cols]);
    let rows = |columns: usize| {
        let most = largest.tile_rows * largest.tile_cols / columns;
        (4..17)
            .map(|log| 1usize << log)
            .take_while(move |rows| *rows <= most && rows * columns <= Grid::MAX_WORDS)
    };
    let grids = columns
        .flat_map(|tile_cols| rows(tile_cols).map(move |tile_rows| Grid { shape, tile_rows, tile_cols }));
    let ends = |grid: &Grid| grid.tiles() as f64 * (lane_ends(word_bits) + 2 * 32) as f64;
    let small = grids.filter(|g| g.tile_rows * g.tile_cols >= LEAST_WORDS && ends(g) <= limit);
    small
        .min_by_key(|g| (g.tile_rows * g.tile_cols, g.tiles(), Grid::MAX_COLS - g.tile_cols))
        .unwrap_or(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_small_as_their_ends_allow() {
        let of = |n, k, word_bits, bits_a_word: f64| {
            let grid = grid(Shape { n, k }, word_bits, n as f64 * k as f64 * bits_a_word);
            (grid.tile_rows, grid.tile_cols)
        };
        // 320 bits a tile of bf16: 0.0195 a word of 16 x 1024, and 1.5 % of 1.3 bits.
        assert_eq!(of(4096, 4096, 16, 3.0), (16, 1024));
        assert_eq!(of(4096, 4096, 16, 1.31), (16, 1024));
        assert_eq!(of(4096, 4096, 16, 1.29), (16, 2048));
        assert_eq!(of(4096, 4096, 16, 0.6), (16, 4096));
        assert_eq!(of(4096, 4096, 16, 0.01), (16, 4096));
        assert_eq!(of(4096, 1024, 16, 0.7), (32, 1024));
        assert_eq!(of(4096, 1024, 16, 0.01), (64, 1024));
        assert_eq!(of(4096, 4096, 32, 20.0), (16, 2048));
        // One column more than fits would begin another tile in every band.
        assert_eq!(of(4096, 1025, 16, 3.0), (16, 2048));
        assert_eq!(of(4096, 300, 16, 3.0), (64, 512));
        // No more rows than there are.
        assert_eq!(of(1, 1 << 20, 16, 3.0), (16, 4096));
        assert_eq!(of(33, 100, 16, 3.0), (64, 256));
        assert_eq!(of(0, 0, 16, 0.0), (16, 256));
    }
}
