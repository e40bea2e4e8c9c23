//! Outer products of the gradient: rows of words, and the entries of a `sparse` tile, times sixteen rows of
//! grad. A lane is a row of grad, an accumulator sixteen lanes for each column.
#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what the unrolled loops keep in registers"
)]

use super::dot::Rows;
use crate::codec::{GapKind, SparseTile};
use crate::vector::float::Float;
use crate::vector::records::{Records, VectorColumns};
use crate::vector::simd::{Kernel, SIMD_LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of W of one step: a band of tiles is done in steps of these.
pub(super) const STEP: usize = SIMD_LANES;

/// `sums[c] += words[i][c] * g[i]` for every row i of words and column c, row after row.
pub(super) struct Outer<'a, D> {
    pub(super) words: Rows<'a>,
    pub(super) rows: usize,
    pub(super) g: &'a [[f32; SIMD_LANES]; STEP],
    pub(super) sums: &'a mut [[f32; SIMD_LANES]],
    pub(super) dtype: PhantomData<D>,
}

impl<D: Float> Kernel for Outer<'_, D> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let mut r = 0;
        while r + 4 <= self.rows {
            self.some::<S, 4>(s, r);
            r += 4;
        }
        while r < self.rows {
            self.some::<S, 1>(s, r);
            r += 1;
        }
    }
}

impl<D: Float> Outer<'_, D> {
    #[inline(always)]
    fn some<S: Simd, const R: usize>(&mut self, s: S, r: usize) {
        let mut g = [s.splat(0.0); R];
        for i in 0..R {
            g[i] = s.load(&self.g[r + i]);
        }
        let mut values = [[0f32; SIMD_LANES]; R];
        for (block, sums) in self.sums.chunks_mut(SIMD_LANES).enumerate() {
            for i in 0..R {
                let words = &self.words.row(r + i)[block * SIMD_LANES * D::BYTES..];
                if sums.len() == SIMD_LANES {
                    s.store(D::widen(s, words), &mut values[i]);
                } else {
                    (0..sums.len()).for_each(|c| values[i][c] = D::value_at(words, c));
                }
            }
            for (c, sums) in sums.iter_mut().enumerate() {
                let mut acc = s.load(sums);
                for i in 0..R {
                    acc = s.fma(s.splat(values[i][c]), g[i], acc);
                }
                s.store(acc, sums);
            }
        }
    }
}

/// `sums[column - from] += difference * g[lane]` for the entries of a tile. Gives the largest column named.
pub(super) struct OuterEntries<'a, D> {
    pub(super) tile: &'a SparseTile<'a>,
    pub(super) g: &'a [[f32; SIMD_LANES]; STEP],
    pub(super) sums: &'a mut [[f32; SIMD_LANES]],
    pub(super) from: u32,
    pub(super) rows: usize,
    /// The rows of grad that the tile's tenant has.
    pub(super) lanes: Range<usize>,
    pub(super) dtype: PhantomData<D>,
}

impl<D: Float> Kernel for OuterEntries<'_, D> {
    type Out = u32;

    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> u32 {
        match self.tile.gap {
            GapKind::U8 => self.entries::<S, 1>(s),
            GapKind::U16 => self.entries::<S, 2>(s),
        }
    }
}

impl<D: Float> OuterEntries<'_, D> {
    #[inline(always)]
    fn entries<S: Simd, const GAP: usize>(self, s: S) -> u32 {
        let mut records = Records::<_, GAP>::new(self.tile, D::BYTES, VectorColumns::new(s));
        let mut difference = [0f32; SIMD_LANES];
        while let Some((columns, differences)) = records.advance() {
            let at = columns.array();
            s.store(D::widen(s, differences), &mut difference);
            for lane in 0..self.rows.min(SIMD_LANES) {
                let column = at[lane].wrapping_sub(self.from) as usize;
                let Some(sums) = self.sums.get_mut(column) else { continue };
                if self.lanes.len() < SIMD_LANES {
                    // Other tenants' lanes stay as they are, bit for bit.
                    for j in self.lanes.clone() {
                        sums[j] = difference[lane].mul_add(self.g[lane][j], sums[j]);
                    }
                } else {
                    s.store(s.fma(s.splat(difference[lane]), s.load(&self.g[lane]), s.load(sums)), sums);
                }
            }
        }
        records.largest().greatest()
    }
}
