//! `slice` and `concat`: parts of deltas as a delta of their own. Whole tiles are copied, cut ones re-encoded from
//! one tile of words; the matrix is never restored.

use super::encode::{Source, planned, write};
use super::header::Header;
use super::plan::Plan;
use super::view::{Resident, read_tile};
use crate::codec::{Encoding, Prefer, Rect, Tile};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// A delta of rows (`dim` 0) or columns (`dim` 1) `range` of the matrix that `delta` and `base` describe; its base
/// digest is that of the base's slice. For tensor parallelism.
///
/// The result has digests of its own, which are right whatever went in. So what goes in is checked first, against its own
/// digests: else a damaged delta, or one of another base, would come out as a sound one.
///
/// # Errors
/// `InvalidArgument` for a dim or range out of bounds, `Mismatch` for another base, `Corrupt` for bad bytes.
pub fn slice(delta: &Resident<'_>, base: &Matrix<'_>, dim: usize, range: Range<usize>) -> Result<Vec<u8>> {
    delta.check_match(base)?;
    let shape = base.shape();
    let size = match dim {
        0 => shape.n,
        1 => shape.k,
        _ => return Err(Error::invalid(format!("dim must be 0 or 1, not {dim}"))),
    };
    if range.start > range.end || range.end > size {
        return Err(Error::invalid(format!("range {range:?} of dim {dim}, which has size {size}")));
    }
    let (rows, cols) = if dim == 0 { (range, 0..shape.k) } else { (0..shape.n, range) };
    let cut = Shape { n: rows.len(), k: cols.len() };
    let part = RegionPart { delta: delta.clone(), base: *base, rows, cols, at: (0, 0) };
    Regions { dtype: base.dtype(), shape: cut, parts: vec![part] }.encode()
}

/// One delta of matrices joined along rows (`dim` 0) or columns (`dim` 1), as in a fused qkv or gate_up projection; each
/// part is a delta with its base. Parts are checked as by [`slice()`], for the same reason.
///
/// # Errors
/// `InvalidArgument` without parts or for a bad dim; `Mismatch` where dtypes or the other dimension differ, or for another
/// base; `Corrupt` for bad bytes. Messages name the part.
pub fn concat(parts: &[(Resident<'_>, Matrix<'_>)], dim: usize) -> Result<Vec<u8>> {
    let [(_, first), ..] = parts else {
        return Err(Error::invalid("nothing to concatenate"));
    };
    if dim > 1 {
        return Err(Error::invalid(format!("dim must be 0 or 1, not {dim}")));
    }
    let mut joined = Regions { dtype: first.dtype(), shape: Shape { n: 0, k: 0 }, parts: Vec::new() };
    for (i, (delta, base)) in parts.iter().enumerate() {
        delta.check_match(base).map_err(|e| e.within(format!("part {i}")))?;
        let (shape, other) = (base.shape(), first.shape());
        let fits = if dim == 0 { shape.k == other.k } else { shape.n == other.n };
        if !fits || base.dtype() != first.dtype() {
            return Err(Error::mismatch(format!(
                "part {i} is {shape} of {}, but part 0 is {other} of {}",
                base.dtype(),
                first.dtype()
            )));
        }
        let total = joined.shape;
        let at = if dim == 0 { (total.n, 0) } else { (0, total.k) };
        joined.parts.push(RegionPart {
            delta: delta.clone(),
            base: *base,
            rows: 0..shape.n,
            cols: 0..shape.k,
            at,
        });
        joined.shape = if dim == 0 {
            Shape { n: total.n + shape.n, k: shape.k }
        } else {
            Shape { n: shape.n, k: total.k + shape.k }
        };
    }
    joined.encode()
}

/// A rectangle of one delta, placed at `at` of the result.
struct RegionPart<'a> {
    delta: Resident<'a>,
    base: Matrix<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    at: (usize, usize),
}

/// A matrix put together from parts that cover it without overlap.
struct Regions<'a> {
    dtype: Dtype,
    shape: Shape,
    parts: Vec<RegionPart<'a>>,
}

impl RegionPart<'_> {
    /// The result's rows and columns that it covers.
    fn covers(&self) -> (Range<usize>, Range<usize>) {
        let (r, c) = self.at;
        (r..r + self.rows.len(), c..c + self.cols.len())
    }

    /// Fill what it covers of the result's rectangle.
    fn read(
        &self,
        rows: &Range<usize>,
        cols: &Range<usize>,
        base: &mut [u8],
        fine_tuned: &mut [u8],
    ) -> Result<()> {
        let (pr, pc) = self.covers();
        let (r, c) = (meet(rows, &pr), meet(cols, &pc));
        if r.is_empty() || c.is_empty() {
            return Ok(());
        }
        // The same rectangle in the part's own matrix.
        let own_r = r.start - pr.start + self.rows.start..r.end - pr.start + self.rows.start;
        let own_c = c.start - pc.start + self.cols.start..c.end - pc.start + self.cols.start;
        let grid = self.delta.grid();
        let w = self.base.dtype().word_bytes();
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for tr in own_r.start / grid.tile_rows..own_r.end.div_ceil(grid.tile_rows) {
            for tc in own_c.start / grid.tile_cols..own_c.end.div_ceil(grid.tile_cols) {
                let index = tr * grid.tile_cols_count() + tc;
                let tile = grid.rect(index);
                read_tile(&self.base, &grid, index, &mut before);
                after.clone_from(&before);
                self.delta.decode(index, &mut after)?;
                let (yr, yc) = (meet(&own_r, &(tile.r0..tile.r1)), meet(&own_c, &(tile.c0..tile.c1)));
                for y in yr {
                    let from = ((y - tile.r0) * tile.cols() + yc.start - tile.c0) * w;
                    let row = y - own_r.start + r.start - rows.start;
                    let to = (row * cols.len() + yc.start - own_c.start + c.start - cols.start) * w;
                    let len = yc.len() * w;
                    base[to..to + len].copy_from_slice(&before[from..from + len]);
                    fine_tuned[to..to + len].copy_from_slice(&after[from..from + len]);
                }
            }
        }
        Ok(())
    }
}

fn meet(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

impl Regions<'_> {
    fn encode(mut self) -> Result<Vec<u8>> {
        self.shape.bytes(self.dtype)?;
        // The parts' bytes outlive the closure, while `self` is lent to the writer.
        let tiles: Vec<_> =
            self.parts.iter().map(|p| (p.delta.clone(), p.covers(), p.rows.start, p.cols.start)).collect();
        let written = |source: &mut dyn Source, plan: &Plan| {
            write(source, plan, &|rect: &Rect| copied_tile(plan, &tiles, rect))
        };
        match self.common_plan() {
            Some(plan) => written(&mut self, &plan),
            None => {
                let prefer = self.prefer();
                planned(&mut self, prefer, &written)
            }
        }
    }

    /// The headers of the parts that change anything.
    fn changing(&self) -> impl Iterator<Item = Header> {
        self.parts.iter().map(|p| *p.delta.header()).filter(|h| h.encoding != Encoding::Unchanged)
    }

    /// The parts' common plan, if they have one, so that tiles can be copied.
    fn common_plan(&self) -> Option<Plan> {
        let Some(first) = self.changing().next() else {
            return Some(Plan::unchanged(self.shape));
        };
        let plan = Plan::of(&first, self.shape);
        self.changing().all(|h| plan.same_tiles(&h)).then_some(plan)
    }

    fn prefer(&self) -> Prefer {
        let fast = self.changing().any(|h| h.encoding == Encoding::Sparse);
        if fast { Prefer::Speed } else { Prefer::Memory }
    }
}

type Tiles<'a> = (Resident<'a>, (Range<usize>, Range<usize>), usize, usize);

/// The part's tile that is exactly `rect` of the result, if the part is stored as the plan asks.
fn copied_tile<'a>(plan: &Plan, parts: &[Tiles<'a>], rect: &Rect) -> Result<Option<Tile<'a>>> {
    if !matches!(plan.encoding, Encoding::Sparse | Encoding::Exponent) {
        return Ok(None);
    }
    let inside =
        |(rows, cols): &(Range<usize>, Range<usize>)| rows.contains(&rect.r0) && cols.contains(&rect.c0);
    let Some((delta, (rows, cols), r, c)) = parts.iter().find(|p| inside(&p.1)) else {
        return Ok(None);
    };
    let grid = delta.grid();
    let (r0, c0) = (rect.r0 - rows.start + r, rect.c0 - cols.start + c);
    if !plan.same_tiles(delta.header()) || r0 % grid.tile_rows != 0 || c0 % grid.tile_cols != 0 {
        return Ok(None);
    }
    let index = r0 / grid.tile_rows * grid.tile_cols_count() + c0 / grid.tile_cols;
    let tile = grid.rect(index);
    if (tile.rows(), tile.cols()) != (rect.rows(), rect.cols()) {
        return Ok(None);
    }
    delta.tile(index).map(Some)
}

impl Source for Regions<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn base_digest(&self) -> Digest {
        let leaf = |i: usize| {
            let mut h = Xxh3::new();
            for r in i * Digest::LEAF_ROWS..((i + 1) * Digest::LEAF_ROWS).min(self.shape.n) {
                for p in self.parts.iter().filter(|p| p.covers().0.contains(&r)) {
                    h.update(p.base.span(r - p.at.0 + p.rows.start, p.cols.start, p.cols.len()));
                }
            }
            h.digest128().to_le_bytes()
        };
        let leaves = (0..self.shape.n.div_ceil(Digest::LEAF_ROWS)).map(leaf);
        Digest::of_leaves(self.dtype, self.shape, leaves)
    }

    fn read(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        base: &mut [u8],
        fine_tuned: &mut [u8],
    ) -> Result<()> {
        self.parts.iter().try_for_each(|p| p.read(&rows, &cols, base, fine_tuned))
    }
}
