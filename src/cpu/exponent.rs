//! Products with `exponent` tiles: words are decoded in step order, at most [`MICRO`] at a time on the stack,
//! and multiplied at once. No panel is made.
//!
//! **Order** of one output: the products of a tile's words are summed apart and added to the total (`dot`).
//! Entries are added to words of 16 bits before those are multiplied, which costs the same however many rows
//! of x there are; words of f32 may be multiplied in registers, so their tile's entries follow, in the order
//! of their positions, each by one FMA onto the total.
//!
//! **Tried**, with AVX2: tiles of up to four tenants decoded in one pass where their width tables are the
//! same (classes, widths and masks found once). 4096 x 4096 bf16, eight tenants: 45 -> 35 ms at 30 % changed
//! at random (3.0 bits, one table), but 55 -> 62 ms at 7.7 bits, where a pair's masks and tables no longer
//! fit the registers; and of 16 tenants with AdamW-like changes six different tables were chosen, few of them
//! side by side. To be tried again with AVX-512's registers and lookups.
#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what the unrolled loops keep in registers"
)]

use super::dot::{Ahead, Rows, Split, Strides, dot_block};
use crate::codec::word::Word;
use crate::codec::{Changes, Entries, Exceptions, ExponentTile, Grid, Overrides, Rect, outside};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::vector::float::{Float, padded};
use crate::vector::lanes::{Decoder, MICRO};
use crate::vector::simd::{GROUP, Kernel, SIMD_LANES, Simd};
use crate::vector::tile::with_entry;
use std::marker::PhantomData;

/// Bytes of a cache line. The next words' lines are asked for while these are decoded: decoding computes too
/// long at a time for the processor to look ahead.
const LINE: usize = 64;

/// Decodes a tile row after row, some columns at a time: the words that products multiply. In layout 0
/// exceptions are among them; since layout 1 entries make up for them, which are NaN where no exact
/// difference exists.
pub(super) struct Stream<'a, D: Float> {
    decoder: Decoder<'a, D::Word>,
    exceptions: Overrides<'a, D::Word>,
    /// Those that are not added to words yet.
    entries: Changes<'a, D::Word>,
    tile_cols: usize,
}

impl<'a, D: Float> Stream<'a, D> {
    pub(super) fn new(tile: &ExponentTile<'a>, tile_cols: usize) -> Self {
        let exceptions = if tile.additive { Exceptions::default() } else { tile.exceptions };
        let decoder = Decoder::new(tile, D::DTYPE);
        Self { decoder, exceptions: exceptions.overrides(), entries: tile.entries.changes(), tile_cols }
    }

    /// Words without the entries, which the caller adds to its sums.
    fn without_entries(tile: &ExponentTile<'a>, tile_cols: usize) -> Self {
        Self { entries: Entries::default().changes(), ..Self::new(tile, tile_cols) }
    }

    /// Decode columns `c..c + words.len()` of row `r` of the tile from their base words; in step order.
    pub(super) fn decode<S: Simd>(
        &mut self,
        s: S,
        (r, c): (usize, usize),
        base: &[u8],
        words: &mut [D::Word],
    ) -> Result<()> {
        self.decoder.advance(s, Some(base), words)?;
        let start = r * self.tile_cols + c;
        while let Some((position, word)) = self.exceptions.below(start + words.len())? {
            let at = position.checked_sub(start).ok_or_else(|| outside("exception", position))?;
            words[at] = D::Word::load(word);
        }
        while let Some(change) = self.entries.below(start + words.len())? {
            let at = change.position.checked_sub(start).ok_or_else(|| outside("entry", change.position))?;
            words[at] = with_entry::<D, _>(&change, words[at]);
        }
        Ok(())
    }

    /// Multiply words of a row as they are decoded, as far as the instance does so: up to four rows of x, in
    /// the order of the other way, bit for bit. Gives how many words.
    fn dots<S: Simd>(
        &mut self,
        s: S,
        row: &[u8],
        (x, groups): (&[Split], usize),
        partial: &mut [[f32; SIMD_LANES]],
    ) -> usize {
        // Only f32 words lie in their split order; and overriding words would have to be multiplied instead.
        if D::DTYPE != Dtype::F32 || !self.exceptions.is_empty() {
            return 0;
        }
        match partial.len() {
            1 => self.some_dots::<S, 1>(s, row, x, groups, partial),
            2 => self.some_dots::<S, 2>(s, row, x, groups, partial),
            3 => self.some_dots::<S, 3>(s, row, x, groups, partial),
            4 => self.some_dots::<S, 4>(s, row, x, groups, partial),
            _ => 0,
        }
    }

    fn some_dots<S: Simd, const M: usize>(
        &mut self,
        s: S,
        row: &[u8],
        x: &[Split],
        groups: usize,
        partial: &mut [[f32; SIMD_LANES]],
    ) -> usize {
        let x = std::array::from_fn(|j| &x[j * groups..(j + 1) * groups]);
        let mut acc = std::array::from_fn(|_| s.splat(0.0));
        let done = self.decoder.dots::<S, M>(s, row, x, &mut acc);
        if done > 0 {
            acc.iter().zip(partial).for_each(|(acc, partial)| s.store(*acc, partial));
        }
        done
    }

    /// To be called after the last word: checks that the stream, exceptions and entries end there.
    pub(super) fn finish(mut self) -> Result<()> {
        if let Some(left) = self.entries.below(usize::MAX)? {
            return Err(outside("entry", left.position));
        }
        if let Some((position, _)) = self.exceptions.below(usize::MAX)? {
            return Err(outside("exception", position));
        }
        self.decoder.finish()
    }
}

/// The differences of a tile's entries in order: row, column, value.
///
/// # Errors
/// `Corrupt` for positions out of order or out of the tile; what was given out before is right.
fn entry_values<D: Float>(
    tile: &ExponentTile<'_>,
    tile_cols: usize,
    rect: &Rect,
    mut add: impl FnMut(usize, usize, f32),
) -> Result<()> {
    let mut changes = tile.entries.changes::<D::Word>();
    while let Some(change) = changes.below(usize::MAX)? {
        let (r, c) = (change.position / tile_cols, change.position % tile_cols);
        if r >= rect.rows() || c >= rect.cols() {
            return Err(outside("entry", change.position));
        }
        let (first, second) = (change.first, change.second());
        add(r, c, D::value(first));
        if let Some(second) = second {
            add(r, c, D::value(second));
        }
    }
    Ok(())
}

/// Add every row of the tile times every one of the `m` rows of x (split order) to `sums`, whose first one is
/// that of the tile's first row.
#[allow(clippy::too_many_arguments)]
pub(super) fn product<S: Simd, D: Float>(
    s: S,
    tile: &ExponentTile<'_>,
    base: Rows<'_>,
    grid: &Grid,
    rect: &Rect,
    (x, m): (&[Split], usize),
    partial: &mut [[f32; SIMD_LANES]],
    (sums, strides): (&mut [f32], Strides),
) -> Result<()> {
    let after = D::DTYPE == Dtype::F32;
    let mut stream = match after {
        true => Stream::<D>::without_entries(tile, grid.tile_cols),
        false => Stream::<D>::new(tile, grid.tile_cols),
    };
    let groups = padded(rect.cols()) / GROUP;
    let mut words = [D::Word::default(); MICRO];
    for r in 0..rect.rows() {
        let row = base.row(r);
        partial[..m].fill([0.0; SIMD_LANES]);
        let fused = stream.dots(s, row, (x, groups), &mut partial[..m]);
        for c in (fused..rect.cols()).step_by(MICRO) {
            let words = &mut words[..MICRO.min(rect.cols() - c)];
            let next = if c + MICRO < rect.cols() { c + MICRO } else { base.stride / D::BYTES };
            for line in (0..MICRO * D::BYTES).step_by(LINE) {
                s.prefetch(base.bytes, r * base.stride + next * D::BYTES + line);
            }
            stream.decode(s, (r, c), &row[c * D::BYTES..(c + words.len()) * D::BYTES], words)?;
            let words = bytemuck::cast_slice(words);
            s.run(WordsProduct::<D> { words, x, groups, from: c / GROUP, m, partial, dtype: PhantomData });
        }
        for j in 0..m {
            sums[r * strides.row + j * strides.column] += s.run(Sum(&partial[j]));
        }
    }
    stream.finish()?;
    if !after {
        return Ok(());
    }
    entry_values::<D>(tile, grid.tile_cols, rect, |r, c, difference| {
        let (group, at) = (c / GROUP, D::split_place(c % GROUP));
        let sums = &mut sums[r * strides.row..];
        s.run(TotalsEntry { difference, x: &x[group..], groups, at, m, sums, stride: strides.column });
    })
}

/// One entry's share in the totals of one row of the tile.
struct TotalsEntry<'a> {
    difference: f32,
    /// From the group of its column on, `groups` per row of x; the column's value lies at `at`.
    x: &'a [Split],
    groups: usize,
    at: usize,
    m: usize,
    sums: &'a mut [f32],
    /// From total to total.
    stride: usize,
}

impl Kernel for TotalsEntry<'_> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(self, _: S) {
        // The instance's own FMA instruction: called from elsewhere it would be a function of the C library.
        for j in 0..self.m {
            let sum = &mut self.sums[j * self.stride];
            *sum = self.difference.mul_add(self.x[j * self.groups][self.at], *sum);
        }
    }
}

/// `partial[j] += words . x[j]`, the columns from group `from` on.
struct WordsProduct<'a, D> {
    words: &'a [u8],
    x: &'a [Split],
    groups: usize,
    from: usize,
    m: usize,
    partial: &'a mut [[f32; SIMD_LANES]],
    dtype: PhantomData<D>,
}

impl<D: Float> Kernel for WordsProduct<'_, D> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let mut j = 0;
        while j + 4 <= self.m {
            self.rows::<S, 4>(s, j);
            j += 4;
        }
        while j < self.m {
            self.rows::<S, 1>(s, j);
            j += 1;
        }
    }
}

impl<D: Float> WordsProduct<'_, D> {
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&mut self, s: S, j: usize) {
        let mut x: [&[Split]; M] = [&[]; M];
        let mut acc = [[s.splat(0.0); M]];
        for i in 0..M {
            x[i] = &self.x[(j + i) * self.groups + self.from..(j + i + 1) * self.groups];
            acc[0][i] = s.load(&self.partial[j + i]);
        }
        dot_block::<S, D, 1, M>(s, [self.words], Ahead::Nothing, x, &mut acc);
        for i in 0..M {
            s.store(acc[0][i], &mut self.partial[j + i]);
        }
    }
}

/// The sum of sixteen partial sums.
struct Sum<'a>(&'a [f32; SIMD_LANES]);

impl Kernel for Sum<'_> {
    type Out = f32;

    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> f32 {
        s.sum(s.load(self.0))
    }
}
