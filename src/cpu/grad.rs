//! `delta_linear_grad_input`: `gx = grad @ W_ft` without a dense W_ft.
//!
//! A task is sixteen rows of grad, of one tenant or of many on the base's words, and a strip of columns; it
//! walks all rows of W. A lane is a row of grad, an accumulator is sixteen lanes per column. **Order** of one
//! output: rows of W by tile band; in a band first the words of its rows, top down, then (`sparse`,
//! `exponent`) its entries in the order of the stream, all by FMA. So the longest chain of roundings is n
//! plus the entries of the column. Outputs that are not finite are computed again in f64 from the fine-tuned
//! words.
#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what the unrolled loops keep in registers"
)]

use super::costs::Costs;
use super::dot::Rows;
use super::exponent::Stream;
use super::job::{Segment, check_words};
use super::outer::{Outer, OuterEntries, STEP};
use super::plan::{ProductWay, Sums};
use super::scratch::{self, Scratch};
use super::weights::Weights;
use crate::codec::{Encoding, Grid, Rect, SparseTile, Tile};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Shape};
use crate::resident::Resident;
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::exec::{Executor, try_run};
use crate::vector::float::{Float, with_float};
use crate::vector::lanes::MICRO;
use crate::vector::records::within_tile;
use crate::vector::simd::{SIMD_LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a strip where a tile can be cut; the decode path takes no more at a time either.
const STRIP: usize = 1024;

/// `gx = grad @ W_ft` on base and delta: `grad` is `[m, n]`, `out` takes `[m, k]`, words of the base's dtype.
///
/// f32 sums, one rounding at the end, outputs that are not finite in f32 computed again in f64; no dense
/// matrix.
///
/// # Errors
/// `Mismatch` where base, delta, `grad` and `out` do not fit; `Unsupported` for a dtype that does not
/// compute; `InvalidArgument` for a misaligned `out`; `Corrupt` or `Truncated` for bad delta bytes, `out`
/// then holds unspecified words.
pub fn delta_linear_grad_input(
    grad: &[u8],
    m: usize,
    base: &Matrix<'_>,
    delta: &Resident<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_linear_grad_input_on(Isa::active()?, (grad, m), base, delta, out, exec)
}

/// [`delta_linear_grad_input`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_linear_grad_input`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_linear_grad_input_on(
    isa: Isa,
    (grad, m): (&[u8], usize),
    base: &Matrix<'_>,
    delta: &Resident<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    on_isa!(isa, s => with_float!(base.dtype(), D => {
        delta.check_base(base)?;
        let Shape { n, k } = base.shape();
        check_words("grad", grad, Shape { n: m, k: n }, base.dtype())?;
        check_words("out", out, Shape { n: m, k }, base.dtype())?;
        if out.is_empty() {
            return Ok(());
        }
        let out = <D as Float>::share(out, "out")?;
        let weights = Weights::new(*base, Some(delta));
        let segment = Segment { weights, bias: None, rows: 0..m, slot: None };
        run_grad::<_, D>(s, &GradJob { grad, base: *base, order: None, out }, &[segment], exec)
    }))?
}

pub(super) struct GradJob<'a, D: Float> {
    pub(super) grad: &'a [u8],
    pub(super) base: Matrix<'a>,
    /// Which row of `grad` and of `out` is at each place; None: row i is at place i.
    pub(super) order: Option<&'a [usize]>,
    pub(super) out: &'a [D::Shared],
}

/// Tasks of one kind: strips of columns by blocks of rows of grad.
struct GradStrips<'a> {
    segments: &'a [Segment<'a>],
    /// Columns of a strip: within one tile of every segment.
    width: usize,
    /// Which of all tasks are these.
    tasks: Range<usize>,
}

impl<'a> GradStrips<'a> {
    fn new(segments: &'a [Segment<'a>], k: usize, start: usize) -> Self {
        let tile_cols = segments.iter().map(|s| s.weights.grid().tile_cols).min().unwrap_or(STRIP);
        // Lanes of `exponent` carry bits from column to column, so its tiles are not cut.
        let cut = segments[0].weights.encoding() != Encoding::Exponent;
        let width = if cut { STRIP.min(tile_cols) } else { tile_cols };
        let mut part = Self { segments, width, tasks: start..start };
        part.tasks.end += k.div_ceil(width) * part.places().len().div_ceil(SIMD_LANES);
        part
    }

    fn places(&self) -> Range<usize> {
        self.segments[0].rows.start..self.segments[self.segments.len() - 1].rows.end
    }
}

/// A strip of columns and up to sixteen rows of grad, by their places in the order of the call.
struct Strip<'a> {
    columns: Range<usize>,
    m0: usize,
    m: usize,
    /// The segments, one per tenant, that the rows belong to.
    segments: &'a [Segment<'a>],
}

impl Strip<'_> {
    /// The lanes of a segment.
    fn lanes(&self, segment: &Segment<'_>) -> Range<usize> {
        let from = segment.rows.start.max(self.m0) - self.m0;
        from..segment.rows.end.min(self.m0 + self.m) - self.m0
    }
}

/// Run a checked call; no dimension is zero but n. The segments are in the order of their places and of their
/// ways.
pub(super) fn run_grad<S: Simd, D: Float>(
    s: S,
    job: &GradJob<'_, D>,
    segments: &[Segment<'_>],
    exec: &dyn Executor,
) -> Result<()> {
    let shared = |s: &Segment<'_>| ProductWay::of(&s.weights, 0, Sums::Deterministic) == ProductWay::Shared;
    let k = job.base.shape().k;
    let mut parts: Vec<GradStrips<'_>> = Vec::new();
    for segments in segments.chunk_by(|a, b| shared(a) && shared(b)) {
        parts.push(GradStrips::new(segments, k, parts.last().map_or(0, |part| part.tasks.end)));
    }
    let words =
        parts.iter().flat_map(|part| part.tasks.clone().map(|_| part.width.min(k) * job.base.shape().n));
    try_run(exec, Costs::active().least_words, words, |task| {
        let part = &parts[parts.partition_point(|part| part.tasks.end <= task)];
        let (strips, task) = (k.div_ceil(part.width), task - part.tasks.start);
        let (c0, m0) = (task % strips * part.width, part.places().start + task / strips * SIMD_LANES);
        let m = SIMD_LANES.min(part.places().end - m0);
        let first = part.segments.partition_point(|s| s.rows.end <= m0);
        let end = part.segments.partition_point(|s| s.rows.start < m0 + m);
        let (columns, segments) = (c0..(c0 + part.width).min(k), &part.segments[first..end]);
        let strip = Strip { columns, m0, m, segments };
        scratch::with(|sc| {
            sc.vectors.zeroed(strip.columns.len() * SIMD_LANES);
            if shared(&segments[0]) {
                job.shared(s, &strip, sc)?;
            } else {
                job.own(s, &strip, &segments[0], sc)?;
            }
            job.finish(s, &strip, sc)
        })
    })
}

impl<D: Float> GradJob<'_, D> {
    fn row(&self, at: usize) -> usize {
        self.order.map_or(at, |order| order[at])
    }

    /// Rows on the base's words: each word once for all tenants, then each tenant's entries of the same rows
    /// of W.
    fn shared<S: Simd>(&self, s: S, strip: &Strip<'_>, sc: &mut Scratch) -> Result<()> {
        let n = self.base.shape().n;
        let (mut g, columns) = ([[0f32; SIMD_LANES]; STEP], &strip.columns);
        let sums = sc.vectors.get(columns.len() * SIMD_LANES).as_chunks_mut::<SIMD_LANES>().0;
        for r in (0..n).step_by(STEP) {
            let rows = STEP.min(n - r);
            self.grads(strip, r, rows, &mut g);
            let at = r * self.base.row_bytes() + columns.start * D::BYTES;
            let (bytes, stride) = (&self.base.bytes()[at..], self.base.row_bytes());
            let words = Rows { bytes, stride, len: columns.len() * D::BYTES };
            s.run(Outer::<D> { words, rows, g: &g, sums, dtype: PhantomData });
            for segment in strip.segments.iter().filter(|s| s.weights.encoding() == Encoding::Sparse) {
                let grid = segment.weights.grid();
                let index = r / STEP * grid.tile_cols_count() + columns.start / grid.tile_cols;
                let added = segment.weights.tile(index).and_then(|tile| match tile {
                    Tile::Sparse(t) => {
                        add_entries::<S, D>(s, &t, &grid.rect(index), strip, strip.lanes(segment), &g, sums)
                    }
                    _ => Err(Error::internal("a sparse delta with a tile that is not")),
                });
                added.map_err(|e| e.within(format_args!("{}, tile {index}", segment.name())))?;
            }
        }
        Ok(())
    }

    /// Rows of one tenant, on words of its own.
    fn own<S: Simd>(&self, s: S, strip: &Strip<'_>, segment: &Segment<'_>, sc: &mut Scratch) -> Result<()> {
        let grid = segment.weights.grid();
        let sums = sc.vectors.get(strip.columns.len() * SIMD_LANES).as_chunks_mut::<SIMD_LANES>().0;
        for band in 0..grid.tile_rows_count() {
            let index = band * grid.tile_cols_count() + strip.columns.start / grid.tile_cols;
            let tile = segment.weights.tile(index);
            tile.and_then(|tile| self.tile(s, &grid, &tile, &grid.rect(index), strip, sums))
                .map_err(|e| e.within(format_args!("{}, tile {index}", segment.name())))?;
        }
        Ok(())
    }

    /// Add one tile's rows to the strip.
    fn tile<S: Simd>(
        &self,
        s: S,
        grid: &Grid,
        tile: &Tile<'_>,
        rect: &Rect,
        strip: &Strip<'_>,
        sums: &mut [[f32; SIMD_LANES]],
    ) -> Result<()> {
        let mut g = [[0f32; SIMD_LANES]; STEP];
        match tile {
            Tile::Exponent(t) => {
                let mut stream = Stream::<D>::new(t, grid.tile_cols);
                let mut words = [D::Word::default(); MICRO];
                for r in 0..rect.rows() {
                    self.grads(strip, rect.r0 + r, 1, &mut g);
                    for c in (0..rect.cols()).step_by(MICRO) {
                        let words = &mut words[..MICRO.min(rect.cols() - c)];
                        let base = self.base.span(rect.r0 + r, rect.c0 + c, words.len());
                        stream.decode(s, (r, c), base, words)?;
                        let bytes: &[u8] = bytemuck::cast_slice(words);
                        let rows = Rows { bytes, stride: bytes.len(), len: bytes.len() };
                        let sums = &mut sums[c..c + words.len()];
                        s.run(Outer::<D> { words: rows, rows: 1, g: &g, sums, dtype: PhantomData });
                    }
                }
                stream.finish()
            }
            Tile::Raw(raw) => {
                let offset = (strip.columns.start - rect.c0) * D::BYTES;
                for r in (0..rect.rows()).step_by(STEP) {
                    let rows = STEP.min(rect.rows() - r);
                    self.grads(strip, rect.r0 + r, rows, &mut g);
                    let bytes = &raw.bytes[r * raw.stride + offset..];
                    let words = Rows { bytes, stride: raw.stride, len: strip.columns.len() * D::BYTES };
                    s.run(Outer::<D> { words, rows, g: &g, sums, dtype: PhantomData });
                }
                Ok(())
            }
            Tile::Unchanged | Tile::Sparse(_) => Err(Error::internal("a tile without words of its own")),
        }
    }

    /// `to[i][j]`: the row of grad of lane j at row `r0 + i` of W; zero beyond the strip's.
    fn grads(&self, strip: &Strip<'_>, r0: usize, rows: usize, to: &mut [[f32; SIMD_LANES]; STEP]) {
        let n = self.base.shape().n;
        for j in 0..strip.m {
            let row = &self.grad[(self.row(strip.m0 + j) * n + r0) * D::BYTES..];
            (0..rows).for_each(|i| to[i][j] = D::value_at(row, i));
        }
    }

    /// Round the sums and write them.
    fn finish<S: Simd>(&self, s: S, strip: &Strip<'_>, sc: &mut Scratch) -> Result<()> {
        let (k, columns) = (self.base.shape().k, &strip.columns);
        let mut again = 0u16;
        for (c, sums) in
            sc.vectors.get(columns.len() * SIMD_LANES).as_chunks::<SIMD_LANES>().0.iter().enumerate()
        {
            for (j, v) in sums.iter().enumerate().take(strip.m) {
                D::put(&self.out[self.row(strip.m0 + j) * k + columns.start + c], D::round(*v));
                again |= u16::from(!v.is_finite()) << j;
            }
        }
        for segment in strip.segments {
            let lanes = strip.lanes(segment).filter(|j| again >> j & 1 == 1).fold(0, |all, j| all | 1 << j);
            for c in columns.clone().step_by(STRIP).filter(|_| lanes != 0) {
                self.again_f64(s, segment, c..(c + STRIP).min(columns.end), strip, lanes, sc)?;
            }
        }
        Ok(())
    }

    /// Compute a segment's non-finite outputs of `columns` again; bit j of `again` says that lane j has some.
    fn again_f64<S: Simd>(
        &self,
        s: S,
        segment: &Segment<'_>,
        columns: Range<usize>,
        strip: &Strip<'_>,
        again: u16,
        sc: &mut Scratch,
    ) -> Result<()> {
        let grid = segment.weights.grid();
        let across = grid.tile_cols_count();
        let sums_f64 = sc.sums_f64.zeroed(columns.len() * SIMD_LANES);
        let (n, k) = (grid.shape.n, grid.shape.k);
        for band in 0..grid.tile_rows_count() {
            let index = band * across + columns.start / grid.tile_cols;
            let rect = grid.rect(index);
            let words = sc.words.bytes_mut(rect.words() * D::BYTES);
            segment.restore(s, index, words)?;
            for (r, row) in words.chunks_exact(rect.cols() * D::BYTES).enumerate() {
                let row = &row[(columns.start - rect.c0) * D::BYTES..];
                for j in (0..SIMD_LANES).filter(|j| again >> j & 1 == 1) {
                    let grad = &self.grad[self.row(strip.m0 + j) * n * D::BYTES..];
                    let g = f64::from(D::value_at(grad, rect.r0 + r));
                    for c in 0..columns.len() {
                        sums_f64[c * SIMD_LANES + j] += g * f64::from(D::value_at(row, c));
                    }
                }
            }
        }
        let sums = sc.vectors.get(strip.columns.len() * SIMD_LANES).as_chunks::<SIMD_LANES>().0;
        for c in columns.clone() {
            for j in (0..SIMD_LANES).filter(|j| again >> j & 1 == 1) {
                if !sums[c - strip.columns.start][j].is_finite() {
                    let value = D::round_f64(sums_f64[(c - columns.start) * SIMD_LANES + j]);
                    D::put(&self.out[self.row(strip.m0 + j) * k + c], value);
                }
            }
        }
        Ok(())
    }
}

/// Add the entries of a tile to some lanes of a strip.
fn add_entries<S: Simd, D: Float>(
    s: S,
    tile: &SparseTile<'_>,
    rect: &Rect,
    strip: &Strip<'_>,
    lanes: Range<usize>,
    g: &[[f32; SIMD_LANES]; STEP],
    sums: &mut [[f32; SIMD_LANES]],
) -> Result<()> {
    let from = (strip.columns.start - rect.c0) as u32;
    // Lanes beyond the strip's rows are not used.
    let lanes = if lanes.len() == strip.m { 0..SIMD_LANES } else { lanes };
    let entries = OuterEntries::<D> { tile, g, sums, from, rows: rect.rows(), lanes, dtype: PhantomData };
    within_tile(tile, rect.cols(), || s.run(entries))
}
