//! How a tensor is cut for threads: pieces of about half a MiB that are whole bands of tiles of every encoding and whole
//! leaves of the digest, so that each can be encoded, restored and hashed alone.

use crate::codec::Grid;
use crate::matrix::{Digest, Dtype, Shape};
use std::ops::Range;

/// Bytes of a piece: base, fine-tuned words and what is made of them stay in a core's caches.
const PIECE_BYTES: usize = 512 << 10;
/// The longest piece. A matrix whose 64 rows take more is cut without regard to rows, and so stored by flat codecs.
const MAX_PIECE_BYTES: usize = 16 << 20;

/// The pieces of one tensor. They depend on dtype and dimensions alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces {
    shape: Shape,
    word_bytes: usize,
    bytes: usize,
    /// Bytes of a full piece.
    step: usize,
    /// Whether pieces are whole bands of tiles (or runs of tiles of one row).
    tiled: bool,
}

impl Pieces {
    /// The pieces of a tensor of `bytes` bytes that may become a delta.
    pub(crate) fn new(dtype: Dtype, shape: Shape, bytes: usize) -> Self {
        let word_bytes = dtype.word_bytes();
        let row = shape.k * word_bytes;
        let flat = Self { shape, word_bytes, bytes, step: PIECE_BYTES, tiled: shape.n == 1 };
        if shape.n <= 1 || row == 0 {
            return Self { tiled: true, ..flat };
        }
        let rows = Grid::for_exponent(shape).tile_rows.max(Digest::LEAF_ROWS);
        match rows.checked_mul(row) {
            Some(band) if band <= MAX_PIECE_BYTES => {
                Self { step: band * PIECE_BYTES.div_ceil(band), tiled: true, ..flat }
            }
            _ if bytes <= MAX_PIECE_BYTES => Self { step: bytes, tiled: true, ..flat },
            _ => flat,
        }
    }

    /// The pieces of bytes whose dtype deltas do not know.
    pub(crate) fn flat(bytes: usize) -> Self {
        Self { shape: Shape { n: 1, k: bytes }, word_bytes: 1, bytes, step: PIECE_BYTES, tiled: false }
    }

    /// Whether pieces are whole tiles, so that a resident delta can be made of them.
    pub(crate) fn tiled(&self) -> bool {
        self.tiled
    }

    /// How many pieces there are: at least one, which is empty for an empty tensor.
    pub(crate) fn count(&self) -> usize {
        self.bytes.div_ceil(self.step.max(1)).max(1)
    }

    /// The bytes of piece `i`.
    pub(crate) fn bytes(&self, i: usize) -> Range<usize> {
        (i * self.step).min(self.bytes)..((i + 1) * self.step).min(self.bytes)
    }

    /// The piece that byte `at` is in.
    pub(crate) fn find(&self, at: usize) -> usize {
        at / self.step.max(1)
    }

    /// The tiles of `grid` that piece `i` covers.
    pub(crate) fn tiles(&self, grid: &Grid, i: usize) -> Range<usize> {
        let bytes = self.bytes(i);
        if bytes.is_empty() {
            return 0..0;
        }
        let (from, to) = (bytes.start / self.word_bytes, bytes.end / self.word_bytes);
        if self.shape.n == 1 {
            return from / grid.tile_cols..to.div_ceil(grid.tile_cols);
        }
        let (r0, r1) = (from / self.shape.k, to / self.shape.k);
        let across = grid.tile_cols_count();
        r0 / grid.tile_rows * across..r1.div_ceil(grid.tile_rows) * across
    }

    /// Whether every piece is a run of whole leaves of the digest.
    pub(crate) fn whole_leaves(&self) -> bool {
        self.count() == 1 || (self.tiled && self.shape.n > 1)
    }

    /// Shape of the matrix that piece `i` is, where pieces are tiled.
    pub(crate) fn shape(&self, i: usize) -> Shape {
        let words = self.bytes(i).len() / self.word_bytes;
        match self.shape {
            Shape { n: 1, .. } => Shape { n: 1, k: words },
            Shape { k: 0, n } => Shape { n, k: 0 },
            Shape { k, .. } => Shape { n: words / k, k },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_byte_and_every_tile_once() {
        let shapes = [
            (1, 1),
            (1, 700_000),
            (5, 3),
            (64, 4096),
            (100, 11008),
            (4096, 4096),
            (3, 0),
            (0, 7),
            (50257, 768),
        ];
        for (n, k) in shapes.into_iter().chain([(300_000, 1), (1000, 128_256), (2, 9_000_000), (17, 65_536)])
        {
            let shape = Shape { n, k };
            for dtype in [Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::F64] {
                let bytes = shape.bytes(dtype).unwrap();
                let c = Pieces::new(dtype, shape, bytes);
                let mut at = 0;
                (0..c.count()).for_each(|i| {
                    assert_eq!(c.bytes(i).start, at);
                    assert!(c.bytes(i).len() <= MAX_PIECE_BYTES);
                    at = c.bytes(i).end;
                });
                assert_eq!(at, bytes, "{shape} {dtype}");
                if !c.tiled() {
                    continue;
                }
                for grid in [Grid::for_sparse(shape), Grid::for_exponent(shape)] {
                    let mut tile = 0;
                    for i in 0..c.count() {
                        let tiles = c.tiles(&grid, i);
                        assert_eq!(
                            tiles.start,
                            if tiles.is_empty() { 0 } else { tile },
                            "{shape} {dtype} {i}"
                        );
                        let words: usize = tiles.clone().map(|t| grid.rect(t).words()).sum();
                        assert_eq!(words * dtype.word_bytes(), c.bytes(i).len(), "{shape} {dtype} {i}");
                        tile = tiles.end.max(tile);
                    }
                    assert_eq!(tile, grid.tiles());
                }
            }
        }
    }
}
