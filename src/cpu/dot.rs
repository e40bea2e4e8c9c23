//! Dot products of word rows with f32 rows: the base product of small m, and the product of a restored panel.
//!
//! **Floor** (small m): n * k words read once from memory; per word and row of x one FMA lane. On Zen 3 (two
//! 256-bit FMA per cycle, 16 multiply-adds) that is 4096 * 4096 / 16 = 1.05 M cycles per row of x and core,
//! while 33.5 MB at 12 GB/s per core take 8 M cycles of 3 GHz: memory up to about 8 rows of x, then FMA.
//!
//! **Order** of one output's sum over the columns of a tile: sixteen partial sums; group after group of 32
//! words, the first vector of the group's split order, then the second, each by FMA; then halves are added
//! until one is left. Zero words pad the last group. Neither the rows beside it nor blocks of columns enter.
//!
//! **Tried**, with AVX2: two words by four or five rows of x, one register of each vector after the other
//! (twice the sums for the same registers), rows of x side by side in memory. In the cache with one thread 20
//! % faster at four rows, nothing at 8 and 16; 4096 x 4096 with two threads the same, large m 5 % slower.
//! Asking for the next rows of x of large m: 30 % slower.
#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what the unrolled loops keep in registers"
)]

use crate::vector::float::Float;
use crate::vector::simd::{GROUP, Kernel, SIMD_LANES, Simd};
use std::marker::PhantomData;

/// One group of an f32 row in split order.
pub(crate) type Split = [f32; GROUP];

/// Rows of words at a fixed distance: a tile of a wider matrix, or some rows of x.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// From the first row's first word on.
    pub(crate) bytes: &'a [u8],
    /// Bytes from row to row.
    pub(crate) stride: usize,
    /// Bytes of a row.
    pub(crate) len: usize,
}

impl<'a> Rows<'a> {
    /// Row `r`, columns from byte `from` to byte `to` (cut to the row).
    #[inline(always)]
    pub(crate) fn part(&self, r: usize, from: usize, to: usize) -> &'a [u8] {
        &self.bytes[r * self.stride + from..r * self.stride + to.min(self.len)]
    }

    /// Row `r`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &'a [u8] {
        self.part(r, 0, self.len)
    }
}

#[inline(always)]
fn halves(group: &Split) -> (&[f32; SIMD_LANES], &[f32; SIMD_LANES]) {
    let (halves, _) = group.as_chunks::<SIMD_LANES>();
    (&halves[0], &halves[1])
}

/// What is asked for while a group is used, by its distance from the rows of words.
#[derive(Clone, Copy)]
pub(crate) enum Ahead {
    Nothing,
    /// The same columns of each row, so many bytes on, soon to be used.
    Rows(usize),
    /// A run that begins so many bytes (wrapping) after the first row and is asked for evenly, `step` bytes
    /// per group, at most a line of cache; to be used after this block.
    Spread {
        at: usize,
        step: usize,
    },
}

/// Bytes of a cache line.
const LINE: usize = 64;

impl Ahead {
    #[inline(always)]
    fn ask<S: Simd, D: Float, const R: usize>(self, s: S, words: [&[u8]; R], g: usize) {
        match self {
            Self::Nothing => {}
            Self::Rows(ahead) => words.iter().for_each(|w| s.prefetch(w, g * GROUP * D::BYTES + ahead)),
            Self::Spread { at, step } => s.prefetch_far(words[0], at.wrapping_add(g * step)),
        }
    }
}

/// `acc[i][j] += words[i] . x[j]`, partial sums; the rows of words are equally long, `x[j]` covers them.
#[inline(always)]
pub(crate) fn dot_block<S: Simd, D: Float, const R: usize, const M: usize>(
    s: S,
    words: [&[u8]; R],
    ahead: Ahead,
    x: [&[Split]; M],
    acc: &mut [[S::F; M]; R],
) {
    let (first, rest) = D::groups(words[0]);
    let (full, tail) = (first.len(), !rest.is_empty());
    let mut groups: [&[D::Group]; R] = [first; R];
    for i in 0..R {
        groups[i] = &D::groups(words[i]).0[..full];
    }
    let mut xs = x;
    for j in 0..M {
        xs[j] = &x[j][..full + usize::from(tail)];
    }
    for g in 0..full {
        ahead.ask::<S, D, R>(s, words, g);
        let mut loaded = [D::load(s, &groups[0][g]); R];
        for i in 1..R {
            loaded[i] = D::load(s, &groups[i][g]);
        }
        step(s, &loaded, xs, g, acc);
    }
    if tail {
        let mut loaded = [(s.splat(0.0), s.splat(0.0)); R];
        for i in 0..R {
            let rest = D::groups(words[i]).1;
            let mut group = D::zeros();
            group.as_mut()[..rest.len()].copy_from_slice(rest);
            loaded[i] = D::load(s, &group);
        }
        step(s, &loaded, xs, full, acc);
    }
}

#[inline(always)]
fn step<S: Simd, const R: usize, const M: usize>(
    s: S,
    words: &[(S::F, S::F); R],
    x: [&[Split]; M],
    g: usize,
    acc: &mut [[S::F; M]; R],
) {
    for j in 0..M {
        let low = s.load(halves(&x[j][g]).0);
        for i in 0..R {
            acc[i][j] = s.fma(words[i].0, low, acc[i][j]);
        }
    }
    for j in 0..M {
        let high = s.load(halves(&x[j][g]).1);
        for i in 0..R {
            acc[i][j] = s.fma(words[i].1, high, acc[i][j]);
        }
    }
}

/// Where the sums of a tile go: output of row `r` and row `j` of x lies at `r * row + j * column`.
#[derive(Clone, Copy)]
pub(crate) struct Strides {
    pub(crate) row: usize,
    pub(crate) column: usize,
}

/// Add a tile's product with all rows of x to `sums`.
pub(crate) struct TileProduct<'a, D> {
    /// The tile's rows of words.
    pub(crate) words: Rows<'a>,
    /// How many.
    pub(crate) rows: usize,
    /// x in split order, `groups` per row.
    pub(crate) x: &'a [Split],
    /// Groups of a row of x.
    pub(crate) groups: usize,
    /// Rows of x, at most 16.
    pub(crate) m: usize,
    /// Sixteen partial sums per row and row of x: `rows * m` at least; only for `m > 1`.
    pub(crate) partial: &'a mut [[f32; SIMD_LANES]],
    /// Totals, added to.
    pub(crate) sums: &'a mut [f32],
    pub(crate) strides: Strides,
    /// Bytes from this tile's first row to that of the one to come next; 0 if none is.
    pub(crate) ahead: usize,
    /// Bytes that a pair of a row and a row of x asks for: see [`TileProduct::share`].
    pub(crate) share: usize,
    pub(crate) dtype: PhantomData<D>,
}

/// Groups of x columns of one block: two rows of it (16 KiB) stay in L1 while the tile's rows pass by.
const BLOCK_GROUPS: usize = 64;

impl<D: Float> Kernel for TileProduct<'_, D> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        if self.m == 1 {
            let mut r = 0;
            while r + 4 <= self.rows {
                self.rows_by_one::<S, 4>(s, r);
                r += 4;
            }
            while r < self.rows {
                self.rows_by_one::<S, 1>(s, r);
                r += 1;
            }
            return;
        }
        for from in (0..self.groups).step_by(BLOCK_GROUPS) {
            let mut j = 0;
            while S::REGISTERS_4X4 && j + 4 <= self.m {
                self.block::<S, 4>(s, from, j);
                j += 4;
            }
            while j + 2 <= self.m {
                self.block::<S, 2>(s, from, j);
                j += 2;
            }
            if j < self.m {
                self.block::<S, 1>(s, from, j);
            }
        }
        for r in 0..self.rows {
            for j in 0..self.m {
                let at = r * self.strides.row + j * self.strides.column;
                self.sums[at] += s.sum(s.load(&self.partial[r * self.m + j]));
            }
        }
    }
}

impl<D: Float> TileProduct<'_, D> {
    /// Bytes of a block of a row's columns for each of `m` rows of x, rounded up.
    pub(crate) fn share(groups: usize, m: usize) -> usize {
        (BLOCK_GROUPS.min(groups) * GROUP * D::BYTES).div_ceil(m.max(1))
    }

    #[inline(always)]
    fn rows_by_one<S: Simd, const R: usize>(&mut self, s: S, r: usize) {
        let mut words: [&[u8]; R] = [&[]; R];
        for (i, w) in words.iter_mut().enumerate() {
            *w = self.words.row(r + i);
        }
        let mut acc = [[s.splat(0.0)]; R];
        dot_block::<S, D, R, 1>(s, words, Ahead::Rows(R * self.words.stride), [self.x], &mut acc);
        for (i, a) in acc.iter().enumerate() {
            self.sums[(r + i) * self.strides.row] += s.sum(a[0]);
        }
    }

    /// One block of columns of all rows, with `M` rows of x.
    #[inline(always)]
    fn block<S: Simd, const M: usize>(&mut self, s: S, from: usize, j: usize) {
        let mut x: [&[Split]; M] = [&[]; M];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(j + i) * self.groups + from..(j + i + 1) * self.groups];
        }
        let mut r = 0;
        while S::REGISTERS_4X4 && r + 4 <= self.rows {
            self.piece::<S, 4, M>(s, from, (r, j), x);
            r += 4;
        }
        while r + 2 <= self.rows {
            self.piece::<S, 2, M>(s, from, (r, j), x);
            r += 2;
        }
        if r < self.rows {
            self.piece::<S, 1, M>(s, from, (r, j), x);
        }
    }

    /// What the piece of `rows` rows from `r` on with `columns` rows of x from `j` on asks for, of the next
    /// block of columns or of the next tile: each pair of a row and a row of x the same share, since all rows
    /// of x pass by before any of it is used. (The processor's look-ahead ends with a page: a block of a row.)
    #[inline(always)]
    fn ahead(&self, from: usize, (r, j): (usize, usize), (rows, columns): (usize, usize)) -> Ahead {
        let group = GROUP * D::BYTES;
        let next = from + BLOCK_GROUPS;
        let origin = if next < self.groups { next * group } else { self.ahead };
        if origin == 0 {
            return Ahead::Nothing;
        }
        let width = BLOCK_GROUPS.min(self.groups);
        // All pieces take rows * m pairs of rows, and a pair takes this much of rows * width groups.
        let pair = self.share;
        let at = (j * self.rows + r * columns) * pair;
        let step = rows * columns * pair / width;
        if step > LINE {
            // So few rows of x that the words are always waited for: asking further ahead costs 8 % at two.
            return Ahead::Nothing;
        }
        let to = origin + at / (width * group) * self.words.stride + at % (width * group);
        Ahead::Spread { at: to.wrapping_sub(r * self.words.stride + from * group), step }
    }

    #[inline(always)]
    fn piece<S: Simd, const R: usize, const M: usize>(
        &mut self,
        s: S,
        from: usize,
        (r, j): (usize, usize),
        x: [&[Split]; M],
    ) {
        let group = GROUP * D::BYTES;
        let mut words: [&[u8]; R] = [&[]; R];
        for (i, w) in words.iter_mut().enumerate() {
            *w = self.words.part(r + i, from * group, (from + BLOCK_GROUPS) * group);
        }
        let mut acc = [[s.splat(0.0); M]; R];
        if from > 0 {
            for (i, acc) in acc.iter_mut().enumerate() {
                for (l, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load(&self.partial[(r + i) * self.m + j + l]);
                }
            }
        }
        dot_block::<S, D, R, M>(s, words, self.ahead(from, (r, j), (R, M)), x, &mut acc);
        for (i, acc) in acc.iter().enumerate() {
            for (l, acc) in acc.iter().enumerate() {
                s.store(*acc, &mut self.partial[(r + i) * self.m + j + l]);
            }
        }
    }
}

/// Add the product of a restored panel (split order) with many rows of x (words) to `sums`, `[m, rows]`.
pub(crate) struct PanelProduct<'a, D, F> {
    /// Rows of x, the panel's columns.
    pub(crate) x: Rows<'a>,
    /// Which row of `x` the i-th one of the product is.
    pub(crate) row: F,
    /// How many.
    pub(crate) m: usize,
    /// The panel, `groups` per row.
    pub(crate) panel: &'a [Split],
    /// Groups of a row of the panel.
    pub(crate) groups: usize,
    /// Rows of the panel.
    pub(crate) rows: usize,
    /// Totals, added to.
    pub(crate) sums: &'a mut [f32],
    pub(crate) dtype: PhantomData<D>,
}

/// Columns (in groups) and rows of the panel that stay in L1 while the rows of x pass by: 16 KiB.
const PANEL_GROUPS: usize = 32;
const PANEL_ROWS: usize = 4;

impl<D: Float, F: Fn(usize) -> usize> Kernel for PanelProduct<'_, D, F> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        for from in (0..self.groups).step_by(PANEL_GROUPS) {
            for r in (0..self.rows).step_by(PANEL_ROWS) {
                let end = (r + PANEL_ROWS).min(self.rows);
                let mut j = 0;
                while S::REGISTERS_4X4 && j + 4 <= self.m {
                    self.block::<S, 4>(s, from, r..end, j);
                    j += 4;
                }
                while j + 2 <= self.m {
                    self.block::<S, 2>(s, from, r..end, j);
                    j += 2;
                }
                if j < self.m {
                    self.block::<S, 1>(s, from, r..end, j);
                }
            }
        }
    }
}

impl<D: Float, F: Fn(usize) -> usize> PanelProduct<'_, D, F> {
    #[inline(always)]
    fn block<S: Simd, const M: usize>(&mut self, s: S, from: usize, rows: std::ops::Range<usize>, j: usize) {
        let group = GROUP * D::BYTES;
        let mut x: [&[u8]; M] = [&[]; M];
        for (i, x) in x.iter_mut().enumerate() {
            *x = self.x.part((self.row)(j + i), from * group, (from + PANEL_GROUPS) * group);
        }
        let mut r = rows.start;
        while S::REGISTERS_4X4 && r + 4 <= rows.end {
            self.piece::<S, M, 4>(s, from, r, j, x);
            r += 4;
        }
        while r + 2 <= rows.end {
            self.piece::<S, M, 2>(s, from, r, j, x);
            r += 2;
        }
        if r < rows.end {
            self.piece::<S, M, 1>(s, from, r, j, x);
        }
    }

    #[inline(always)]
    fn piece<S: Simd, const M: usize, const R: usize>(
        &mut self,
        s: S,
        from: usize,
        r: usize,
        j: usize,
        x: [&[u8]; M],
    ) {
        let mut panel: [&[Split]; R] = [&[]; R];
        for (i, p) in panel.iter_mut().enumerate() {
            *p = &self.panel[(r + i) * self.groups + from..(r + i + 1) * self.groups];
        }
        let mut acc = [[s.splat(0.0); R]; M];
        dot_block::<S, D, M, R>(s, x, Ahead::Nothing, panel, &mut acc);
        // At most four by four sums, four at a time.
        for from in (0..M * R).step_by(4) {
            let mut four = [s.splat(0.0); 4];
            for i in 0..4.min(M * R - from) {
                four[i] = acc[(from + i) / R][(from + i) % R];
            }
            let totals = s.sum4(four);
            for i in 0..4.min(M * R - from) {
                let (l, i, total) = ((from + i) / R, (from + i) % R, totals[i]);
                self.sums[(j + l) * self.rows + r + i] += total;
            }
        }
    }
}

/// Rows of words as f32 in split order, zero-padded to whole groups.
pub(crate) struct ToSplit<'a, D> {
    pub(crate) words: Rows<'a>,
    pub(crate) rows: usize,
    /// `rows * groups`.
    pub(crate) to: &'a mut [Split],
    pub(crate) groups: usize,
    pub(crate) dtype: PhantomData<D>,
}

impl<D: Float> Kernel for ToSplit<'_, D> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        for (r, to) in self.to.chunks_exact_mut(self.groups.max(1)).enumerate().take(self.rows) {
            let (groups, rest) = D::groups(self.words.row(r));
            for (group, to) in groups.iter().zip(to.iter_mut()) {
                put::<S, D>(s, group, to);
            }
            if let Some(to) = to.get_mut(groups.len()) {
                let mut group = D::zeros();
                group.as_mut()[..rest.len()].copy_from_slice(rest);
                put::<S, D>(s, &group, to);
            }
        }
    }
}

#[inline(always)]
fn put<S: Simd, D: Float>(s: S, group: &D::Group, to: &mut Split) {
    let (low, high) = D::load(s, group);
    let (halves, _) = to.as_chunks_mut::<SIMD_LANES>();
    s.store(low, &mut halves[0]);
    s.store(high, &mut halves[1]);
}
