//! Writes a resident delta tile by tile: a sample to choose, one pass to write; never a dense matrix.

use super::assemble::Assembler;
use super::estimate;
use super::piece::{self, Coder, DeltaPiece};
use super::plan::Plan;
use crate::codec::word::{Word, with_word};
use crate::codec::{Encoding, Grid, Prefer, Rect, Tile};
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

/// Encode what turns the source's base into its fine_tuned: a resident delta of layout [`super::VERSION`].
///
/// # Errors
/// Those of the source.
pub fn encode(source: &mut dyn Source, prefer: Prefer) -> Result<Vec<u8>> {
    planned(source, prefer, &|source, plan| write(source, plan, &|_| Ok(None)))
}

/// [`encode`] with the encoding given and its parameters chosen: for conversions and tests.
/// `Unchanged` asks for the cost model's choice by size, since it cannot hold a change.
///
/// # Errors
/// Those of the source; `Unsupported` if the encoding would take more than 2^32 units.
pub fn encode_as(source: &mut dyn Source, encoding: Encoding) -> Result<Vec<u8>> {
    let plan = estimate::plan_for(source, encoding)?;
    write(source, &plan, &|_| Ok(None))
}

/// [`encode`] for two matrices in memory.
///
/// # Errors
/// `Mismatch` if their dtypes or shapes differ.
pub fn encode_pair(base: &Matrix<'_>, fine_tuned: &Matrix<'_>, prefer: Prefer) -> Result<Vec<u8>> {
    encode(&mut Pair::new(*base, *fine_tuned)?, prefer)
}

/// Writes a source as a plan says.
pub(crate) type Write<'f> = &'f dyn Fn(&mut dyn Source, &Plan) -> Result<Vec<u8>>;

/// Write by the sample's plan, and once more by an exact one if the sample misled.
pub(crate) fn planned(source: &mut dyn Source, prefer: Prefer, write: Write<'_>) -> Result<Vec<u8>> {
    let sampled = estimate::estimate(source, prefer)?;
    let delta = write(source, &sampled.plan)?;
    if !sampled.is_off(delta.len() as u64) {
        return Ok(delta);
    }
    drop(delta);
    let exact = estimate::estimate_exactly(source, prefer)?;
    write(source, &exact.plan)
}

/// How many bytes [`encode`] would give, which are made and dropped.
///
/// # Errors
/// Those of the source.
pub(crate) fn encoded_bytes(source: &mut dyn Source, prefer: Prefer) -> Result<u64> {
    let count = |source: &mut dyn Source, plan: &Plan| -> Result<u64> {
        let mut writer = Writer { keep: false, ..Writer::new(source.dtype(), plan)? };
        writer.read(source, &|_| Ok(None))?;
        Ok(writer.assembler.bytes())
    };
    let sampled = estimate::estimate(source, prefer)?;
    let bytes = count(source, &sampled.plan)?;
    if !sampled.is_off(bytes) {
        return Ok(bytes);
    }
    let exact = estimate::estimate_exactly(source, prefer)?;
    count(source, &exact.plan)
}

/// A tile that is already encoded as the plan asks, if there is one for a rectangle.
pub(crate) type Copied<'f, 'a> = &'f dyn Fn(&Rect) -> Result<Option<Tile<'a>>>;

/// Write `source` as `plan` says, taking encoded tiles from `copied` where it has them.
pub(crate) fn write(source: &mut dyn Source, plan: &Plan, copied: Copied<'_, '_>) -> Result<Vec<u8>> {
    let mut writer = Writer::new(source.dtype(), plan)?;
    writer.read(source, copied)?;
    writer.finish(source.base_digest())
}

/// A delta growing in memory, in place, so that it is never held twice.
struct Writer {
    dtype: Dtype,
    plan: Plan,
    assembler: Assembler,
    out: Vec<u8>,
    piece: DeltaPiece,
    /// Whether what is written is wanted, or only how much.
    keep: bool,
}

impl Writer {
    fn new(dtype: Dtype, plan: &Plan) -> Result<Self> {
        let assembler = Assembler::new(dtype, plan)?;
        let out = vec![0; assembler.head_bytes()];
        Ok(Self { dtype, plan: *plan, assembler, out, piece: DeltaPiece::default(), keep: true })
    }

    /// Every word, as the plan says.
    fn read(&mut self, source: &mut dyn Source, copied: Copied<'_, '_>) -> Result<()> {
        match self.plan.encoding {
            // Whoever planned this has read every word.
            Encoding::Unchanged => Ok(()),
            Encoding::Raw => self.raw(source),
            Encoding::Sparse | Encoding::Exponent => {
                with_word!(self.dtype, W => self.tiles::<W>(source, copied))
            }
        }
    }

    /// Rows, as many as a tile has words, or parts of one.
    fn raw(&mut self, source: &mut dyn Source) -> Result<()> {
        let (shape, w) = (self.plan.grid.shape, self.dtype.word_bytes());
        if shape.n == 0 || shape.k == 0 {
            return Ok(());
        }
        let (rows, cols) = ((Grid::MAX_WORDS / shape.k).clamp(1, shape.n), shape.k.min(Grid::MAX_WORDS));
        let (mut base, mut fine_tuned) = (vec![0; rows * cols * w], vec![0; rows * cols * w]);
        for r in (0..shape.n).step_by(rows) {
            let rows = r..(r + rows).min(shape.n);
            for c in (0..shape.k).step_by(cols) {
                let cols = c..(c + cols).min(shape.k);
                let bytes = rows.len() * cols.len() * w;
                let (b, f) = (&mut base[..bytes], &mut fine_tuned[..bytes]);
                source.read(rows.clone(), cols, b, f)?;
                self.piece.payload.extend_from_slice(f);
                self.piece.changed += piece::count_changed(self.dtype, b, f);
                self.take()?;
            }
        }
        Ok(())
    }

    fn tiles<W: Word>(&mut self, source: &mut dyn Source, copied: Copied<'_, '_>) -> Result<()> {
        let (mut base, mut fine_tuned) = (Vec::<W>::new(), Vec::<W>::new());
        let mut coder = Coder::<W>::default();
        for index in 0..self.plan.grid.tiles() {
            let rect = self.plan.grid.rect(index);
            base.resize(rect.words(), W::default());
            fine_tuned.resize(rect.words(), W::default());
            let (b, f) = (bytemuck::cast_slice_mut(&mut base), bytemuck::cast_slice_mut(&mut fine_tuned));
            source.read(rect.r0..rect.r1, rect.c0..rect.c1, b, f)?;
            match copied(&rect)? {
                Some(tile) => {
                    self.piece.copy(&tile, W::BYTES)?;
                    self.piece.changed += piece::count_changed(self.dtype, b, f);
                }
                None => {
                    coder.tile(&self.plan, self.dtype, rect.cols(), (&base, &fine_tuned), &mut self.piece)
                }
            }
            self.take()?;
        }
        Ok(())
    }

    fn take(&mut self) -> Result<()> {
        self.assembler.add(&self.piece)?;
        if self.keep {
            self.out.extend_from_slice(&self.piece.payload);
        }
        self.piece.clear();
        Ok(())
    }

    fn finish(mut self, base_digest: Digest) -> Result<Vec<u8>> {
        self.assembler.finish(base_digest).map(|done| done.around(&mut self.out)).map(|()| self.out)
    }
}
