//! Writes a resident delta tile by tile: one pass to choose, one to write; never a dense matrix.

use super::analyze::{self, Plan};
use super::header::{ALIGN, CONTENT_AT, HEADER_BYTES, Header, content_digest};
use crate::codec::sparse::Builder;
use crate::codec::word::{Word, with_word};
use crate::codec::{Encoding, Prefer, Rect, Tile, exponent};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use std::ops::Range;

/// Where an encoder reads base and fine_tuned words from, a rectangle at a time.
pub trait Source {
    /// Element type of both.
    fn dtype(&self) -> Dtype;
    /// Rows and columns of both.
    fn shape(&self) -> Shape;
    /// Digest of the base, to be kept in the header.
    fn base_digest(&self) -> Digest;
    /// Fill `base` and `fine_tuned` with the words of the rectangle, little-endian, row after row, packed.
    ///
    /// # Errors
    /// Whatever reading may meet; encoding stops with it.
    fn read(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        base: &mut [u8],
        fine_tuned: &mut [u8],
    ) -> Result<()>;
}

/// Two matrices in memory.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    base: Matrix<'a>,
    fine_tuned: Matrix<'a>,
}

impl<'a> Pair<'a> {
    /// A pair of one dtype and shape.
    ///
    /// # Errors
    /// `Mismatch`, naming both.
    pub fn new(base: Matrix<'a>, fine_tuned: Matrix<'a>) -> Result<Self> {
        if (base.dtype(), base.shape()) != (fine_tuned.dtype(), fine_tuned.shape()) {
            return Err(Error::mismatch(format!(
                "base is a {} matrix of {}, but fine_tuned a {} matrix of {}",
                base.shape(),
                base.dtype(),
                fine_tuned.shape(),
                fine_tuned.dtype()
            )));
        }
        Ok(Self { base, fine_tuned })
    }
}

impl Source for Pair<'_> {
    fn dtype(&self) -> Dtype {
        self.base.dtype()
    }

    fn shape(&self) -> Shape {
        self.base.shape()
    }

    fn base_digest(&self) -> Digest {
        self.base.digest()
    }

    fn read(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        base: &mut [u8],
        fine_tuned: &mut [u8],
    ) -> Result<()> {
        let width = cols.len() * self.base.dtype().word_bytes();
        for (i, r) in rows.enumerate() {
            let to = i * width..(i + 1) * width;
            base[to.clone()].copy_from_slice(self.base.span(r, cols.start, cols.len()));
            fine_tuned[to].copy_from_slice(self.fine_tuned.span(r, cols.start, cols.len()));
        }
        Ok(())
    }
}

/// Encode what turns the source's base into its fine_tuned: a resident delta of layout version 0.
///
/// # Errors
/// Those of the source.
pub fn encode(source: &mut dyn Source, prefer: Prefer) -> Result<Vec<u8>> {
    with_word!(source.dtype(), W => {
        let plan = analyze::plan::<W>(source, prefer)?;
        write::<W>(source, &plan, &|_| Ok(None))
    })
}

/// [`encode`] with the encoding given and its parameters chosen: for conversions and tests.
/// `Unchanged` asks for the cost model's choice by size, since it cannot hold a change.
///
/// # Errors
/// Those of the source; `Unsupported` if the encoding would take more than 2^32 units.
pub fn encode_as(source: &mut dyn Source, encoding: Encoding) -> Result<Vec<u8>> {
    with_word!(source.dtype(), W => {
        let plan = analyze::plan_for::<W>(source, encoding)?;
        write::<W>(source, &plan, &|_| Ok(None))
    })
}

/// [`encode`] for two matrices in memory.
///
/// # Errors
/// `Mismatch` if their dtypes or shapes differ.
pub fn encode_pair(base: &Matrix<'_>, fine_tuned: &Matrix<'_>, prefer: Prefer) -> Result<Vec<u8>> {
    encode(&mut Pair::new(*base, *fine_tuned)?, prefer)
}

/// A tile that is already encoded as the plan asks, if there is one for a rectangle.
pub(crate) type Copied<'f, 'a> = &'f dyn Fn(&Rect) -> Result<Option<Tile<'a>>>;

/// Write `source` as `plan` says, taking encoded tiles from `copied` where it has them.
pub(crate) fn write<W: Word>(
    source: &mut dyn Source,
    plan: &Plan,
    copied: Copied<'_, '_>,
) -> Result<Vec<u8>> {
    let mut writer = Writer::<W>::new(source.dtype(), *plan)?;
    let (mut base, mut fine_tuned) = (Vec::<W>::new(), Vec::<W>::new());
    let tiles = if plan.encoding == Encoding::Unchanged { 0 } else { plan.grid.tiles() };
    for index in 0..tiles {
        let rect = plan.grid.rect(index);
        base.resize(rect.words(), W::default());
        fine_tuned.resize(rect.words(), W::default());
        let (b, f) = (bytemuck::cast_slice_mut(&mut base), bytemuck::cast_slice_mut(&mut fine_tuned));
        source.read(rect.r0..rect.r1, rect.c0..rect.c1, b, f)?;
        match copied(&rect)? {
            Some(tile) => writer.copy(&tile, &base, &fine_tuned)?,
            None => writer.tile(&rect, &base, &fine_tuned)?,
        }
    }
    writer.finish(source.base_digest())
}

struct Writer<W: Word> {
    dtype: Dtype,
    plan: Plan,
    /// Header, directory and payload grow in place, so that a delta is never held twice.
    out: Vec<u8>,
    payload_at: usize,
    directory: Vec<u32>,
    exception_directory: Vec<u32>,
    exceptions: Vec<(u16, u64)>,
    builder: Builder<W>,
    units: u64,
    changed: u64,
}

impl<W: Word> Writer<W> {
    fn new(dtype: Dtype, plan: Plan) -> Result<Self> {
        let tiled = matches!(plan.encoding, Encoding::Sparse | Encoding::Exponent);
        let directory = if tiled { 4 * (plan.grid.tiles() + 1) } else { 0 };
        let payload_at = HEADER_BYTES + directory.next_multiple_of(ALIGN);
        let payload = if plan.encoding == Encoding::Raw { plan.grid.shape.bytes(dtype)? } else { 0 };
        let out = vec![0; payload_at + payload];
        let (directory, exception_directory) = (vec![0], vec![0]);
        Ok(Self {
            dtype,
            plan,
            out,
            payload_at,
            directory,
            exception_directory,
            exceptions: Vec::new(),
            builder: Builder::default(),
            units: 0,
            changed: 0,
        })
    }

    fn tile(&mut self, rect: &Rect, base: &[W], fine_tuned: &[W]) -> Result<()> {
        let (dtype, cols, tile_cols) = (self.dtype, rect.cols(), self.plan.grid.tile_cols);
        match self.plan.encoding {
            Encoding::Unchanged => {}
            Encoding::Raw => {
                self.changed += count_changed(base, fine_tuned);
                let k = self.plan.grid.shape.k;
                for (r, row) in fine_tuned.chunks_exact(cols).enumerate() {
                    let at = self.payload_at + ((rect.r0 + r) * k + rect.c0) * W::BYTES;
                    self.out[at..at + cols * W::BYTES].copy_from_slice(bytemuck::cast_slice(row));
                }
            }
            Encoding::Sparse => {
                self.builder.collect(dtype, cols, tile_cols, base, fine_tuned);
                self.units += self.builder.write(dtype, self.plan.gap, &mut self.out) as u64;
                self.changed += self.builder.changed;
                self.exceptions.extend(&self.builder.exceptions);
            }
            Encoding::Exponent => {
                let before = self.out.len();
                let to = (&mut self.out, &mut self.exceptions);
                self.changed +=
                    exponent::encode(dtype, &self.plan.widths, cols, tile_cols, (base, fine_tuned), to);
                self.units += ((self.out.len() - before) / W::BYTES) as u64;
            }
        }
        self.close_tile()
    }

    fn copy(&mut self, tile: &Tile<'_>, base: &[W], fine_tuned: &[W]) -> Result<()> {
        let exceptions = match tile {
            Tile::Sparse(t) => {
                self.out.extend_from_slice(t.gaps);
                self.out.extend_from_slice(t.diffs);
                self.units += t.records as u64;
                &t.exceptions
            }
            Tile::Exponent(t) => {
                self.out.extend_from_slice(t.stream);
                self.units += (t.stream.len() / W::BYTES) as u64;
                &t.exceptions
            }
            Tile::Unchanged | Tile::Raw(_) => return Err(Error::internal("nothing to copy in such a tile")),
        };
        let listed = (0..exceptions.len()).map(|i| exceptions.get(i)).map(|(p, w)| (p as u16, w));
        self.exceptions.extend(listed);
        self.changed += count_changed(base, fine_tuned);
        self.close_tile()
    }

    fn close_tile(&mut self) -> Result<()> {
        let small = |v: u64| {
            u32::try_from(v).map_err(|_| Error::unsupported("a matrix whose delta has more than 2^32 units"))
        };
        self.directory.push(small(self.units)?);
        self.exception_directory.push(small(self.exceptions.len() as u64)?);
        Ok(())
    }

    fn finish(mut self, base_digest: Digest) -> Result<Vec<u8>> {
        if self.changed == 0 {
            self.plan = Plan::unchanged(self.plan.grid.shape);
            (self.units, self.exceptions) = (0, Vec::new());
            self.out.truncate(HEADER_BYTES);
        }
        let header = Header {
            encoding: self.plan.encoding,
            dtype: self.dtype,
            shape: self.plan.grid.shape,
            tile_rows: self.plan.grid.tile_rows,
            tile_cols: self.plan.grid.tile_cols,
            gap: self.plan.gap,
            changed: self.changed,
            exceptions: self.exceptions.len() as u64,
            base_digest,
            widths: self.plan.widths,
            units: self.units,
        };
        let layout = header.layout()?;
        self.out.resize(layout.total, 0);
        self.out[..HEADER_BYTES].copy_from_slice(&header.write()?);
        if !layout.directory.is_empty() {
            self.out[layout.directory].copy_from_slice(bytemuck::cast_slice(&self.directory));
        }
        if !self.exceptions.is_empty() {
            let w = self.dtype.word_bytes();
            self.out[layout.exception_directory]
                .copy_from_slice(bytemuck::cast_slice(&self.exception_directory));
            let positions = self.out[layout.exception_positions].chunks_exact_mut(2);
            positions.zip(&self.exceptions).for_each(|(o, e)| o.copy_from_slice(&e.0.to_le_bytes()));
            let words = self.out[layout.exception_words].chunks_exact_mut(w);
            words.zip(&self.exceptions).for_each(|(o, e)| o.copy_from_slice(&e.1.to_le_bytes()[..w]));
        }
        let content = content_digest(&self.out);
        self.out[CONTENT_AT].copy_from_slice(&content.0);
        Ok(self.out)
    }
}

fn count_changed<W: Word>(base: &[W], fine_tuned: &[W]) -> u64 {
    base.iter().zip(fine_tuned).filter(|(b, f)| b != f).count() as u64
}
