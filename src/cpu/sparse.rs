//! Products with the entries of `sparse` tiles: what a delta adds to the base product, without touching the
//! base.
//!
//! **Floor**: an entry is 3 bytes (bf16, u8 gap). At 3 % changed and 15 % padding that is 0.10 bytes per
//! element beside the base's 2: 5 % more bytes. With few rows of x a record of 16 entries is 16 loads from x
//! in L1, 4 shuffles of each eight, two FMAs per row of x: 6 to 7 ns measured on a busy Zen 3 (7 to 10 with
//! the gather instruction), 36 k records of a 4096 x 4096 matrix, 0.25 ms per row of x beside the base
//! product's 2.2 ms. With many rows of x an entry is one broadcast and one vector FMA over them: 20 to 25 ns
//! per record whatever m.
//!
//! **Order** of one output: it starts at its total so far, then `total = fma(difference, x[column], total)`
//! for the lane's entries in the order of the stream. Both kernels keep it, so a row of x gives the same bits
//! in any company.

use crate::codec::{GapKind, SparseTile};
use crate::vector::float::Float;
use crate::vector::records::{Records, VectorColumns};
use crate::vector::simd::{Kernel, SIMD_LANES, Simd};
use std::marker::PhantomData;

/// Few rows of x, or few entries: a lane is a row of the tile, x is gathered. Gives the largest column named.
pub(crate) struct Gathered<'a, D> {
    pub(crate) tile: &'a SparseTile<'a>,
    /// x in natural order, a row every `width` values.
    pub(crate) x: &'a [f32],
    /// Columns of the tile.
    pub(crate) width: usize,
    /// Rows of x.
    pub(crate) m: usize,
    /// Totals: 16 for row 0 of x, those of the next row `stride` further on.
    pub(crate) sums: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) dtype: PhantomData<D>,
}

impl<D: Float> Kernel for Gathered<'_, D> {
    type Out = u32;

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) -> u32 {
        let mut largest = 0;
        for j in 0..self.m {
            largest = match (self.tile.gap, j) {
                (GapKind::U8, 0) => self.row::<S, 1, true>(s, j),
                (GapKind::U8, _) => self.row::<S, 1, false>(s, j),
                (GapKind::U16, 0) => self.row::<S, 2, true>(s, j),
                (GapKind::U16, _) => self.row::<S, 2, false>(s, j),
            };
        }
        largest
    }
}

impl<D: Float> Gathered<'_, D> {
    /// One row of x; the first asks for the next tile's records, which lie behind this one's, as far on as
    /// they are long. (A tile is a few pages, and the processor's own look-ahead ends with each.)
    #[inline(always)]
    fn row<S: Simd, const GAP: usize, const FIRST: bool>(&mut self, s: S, j: usize) -> u32 {
        let x = &self.x[j * self.width..(j + 1) * self.width];
        let Some(sums) = self.sums[j * self.stride..].first_chunk_mut::<SIMD_LANES>() else { return 0 };
        let mut total = s.load(sums);
        let mut next = self.tile.gaps.len() + self.tile.differences.len();
        let mut records = Records::<_, GAP>::new(self.tile, D::BYTES, VectorColumns::new(s));
        while let Some((columns, differences)) = records.advance() {
            if FIRST {
                s.prefetch(self.tile.gaps, next);
                next += SIMD_LANES * (GAP + D::BYTES);
            }
            total = s.fma(D::widen(s, differences), s.gather(x, columns.lanes), total);
        }
        s.store(total, sums);
        records.largest().greatest()
    }
}

/// Many rows of x, at most sixteen: a lane is a row of x, x is transposed. Gives the largest column named.
pub(crate) struct Transposed<'a, D> {
    pub(crate) tile: &'a SparseTile<'a>,
    /// x by column of the tile; unused lanes hold anything finite.
    pub(crate) x: &'a [[f32; SIMD_LANES]],
    /// Totals by row of the tile: 16.
    pub(crate) sums: &'a mut [[f32; SIMD_LANES]],
    pub(crate) dtype: PhantomData<D>,
}

impl<D: Float> Kernel for Transposed<'_, D> {
    type Out = u32;

    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> u32 {
        match self.tile.gap {
            GapKind::U8 => self.entries::<S, 1>(s),
            GapKind::U16 => self.entries::<S, 2>(s),
        }
    }
}

impl<D: Float> Transposed<'_, D> {
    #[inline(always)]
    fn entries<S: Simd, const GAP: usize>(self, s: S) -> u32 {
        let mut records = Records::<_, GAP>::new(self.tile, D::BYTES, VectorColumns::new(s));
        let mut difference = [0f32; SIMD_LANES];
        while let Some((columns, differences)) = records.advance() {
            let at = columns.array();
            s.store(D::widen(s, differences), &mut difference);
            for (lane, sums) in self.sums.iter_mut().enumerate().take(SIMD_LANES) {
                // A column beyond the tile: the caller refuses the tile, by the largest column.
                let Some(x) = self.x.get(at[lane] as usize) else { continue };
                s.store(s.fma(s.splat(difference[lane]), s.load(x), s.load(sums)), sums);
            }
        }
        records.largest().greatest()
    }
}

/// Rows of words in natural order, as f32: row after row, or transposed (16 values per column).
pub(crate) struct Natural<'a, D> {
    pub(crate) words: super::dot::Rows<'a>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Whether to transpose.
    pub(crate) transposed: bool,
    pub(crate) to: &'a mut [f32],
    pub(crate) dtype: PhantomData<D>,
}

impl<D: Float> Kernel for Natural<'_, D> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (across, down) = if self.transposed { (1, SIMD_LANES) } else { (self.columns, 1) };
        for r in 0..self.rows {
            let words = self.words.row(r);
            let to = &mut self.to[r * across..];
            let full = self.columns / SIMD_LANES * SIMD_LANES;
            let mut values = [0f32; SIMD_LANES];
            for c in (0..full).step_by(SIMD_LANES) {
                s.store(D::widen(s, &words[c * D::BYTES..]), &mut values);
                if self.transposed {
                    for (i, v) in values.iter().enumerate() {
                        to[(c + i) * down] = *v;
                    }
                } else {
                    to[c..c + SIMD_LANES].copy_from_slice(&values);
                }
            }
            for c in full..self.columns {
                to[c * down] = D::value_at(words, c);
            }
        }
    }
}
