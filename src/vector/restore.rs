//! Fine-tuned words: `delta_restore`, `delta_restore_rows`, `delta_restore_region`, `delta_apply`, `patch`.
//! Every dtype; equal to `resident::restore` bit for bit.

use super::check::decodes;
use super::dispatch::{Isa, on_isa};
use super::exec::{Executor, LEAST_WORDS, try_run};
use super::region::region_of;
use super::simd::Simd;
use super::tile::{self, Stripe, fill_tile};
use crate::codec::{Encoding, ExponentTile};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix, Shape};
use crate::resident::Resident;
use std::ops::Range;
use std::sync::Mutex;

/// Restore the fine-tuned matrix: `out` takes its `n * k` words, any dtype, any alignment. Bit-exact.
///
/// # Errors
/// `Mismatch` where base, delta and out do not fit; `Corrupt` or `Truncated` for bad delta bytes, `out` then
/// holds unspecified words.
pub fn delta_restore(
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_restore_rows(delta, base, 0..base.shape().n, out, exec)
}

/// Restore rows `rows` of the fine-tuned matrix: `out` takes their words.
///
/// # Errors
/// As [`delta_restore`]; `InvalidArgument` for rows beyond the matrix.
pub fn delta_restore_rows(
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_restore_rows_on(Isa::active()?, delta, base, rows, out, exec)
}

/// [`delta_restore_rows`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_restore_rows`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_restore_rows_on(
    isa: Isa,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_restore_region_on(isa, delta, base, (rows, 0..base.shape().k), out, exec)
}

/// Restore the words of rows `rows` and columns `columns` of the fine-tuned matrix: `out` takes them row
/// after row, without gaps. Of a tile that is not asked as a whole, `sparse` and `raw` read little more than
/// what is asked, `exponent` all words before the last one asked.
///
/// Memory-safe on any bytes. What is not needed for the words asked is not looked at: `Resident::check` tells
/// whether a delta is whole.
///
/// # Errors
/// As [`delta_restore`]; `InvalidArgument` for rows or columns beyond the matrix.
pub fn delta_restore_region(
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_restore_region_on(Isa::active()?, delta, base, (rows, columns), out, exec)
}

/// [`delta_restore_region`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_restore_region`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_restore_region_on(
    isa: Isa,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    (rows, columns): (Range<usize>, Range<usize>),
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    on_isa!(isa, s => region_of(s, delta, base, (rows, columns), out, exec))?
}

/// `codec::decode_tile` of an `exponent` tile on an instruction set of the caller's choice, for tests and
/// benchmarks: `words` holds whole rows of `cols` base words on entry, fine-tuned ones on exit; `tile_cols`
/// is the grid's.
///
/// # Errors
/// As `codec::decode_tile`; `InvalidArgument` where `words` is not rows of `cols` words or a width is above
/// the word's; `Unsupported` for words of 1 or 8 bytes, and if the machine lacks `isa`.
pub fn decode_exponent_on(
    isa: Isa,
    tile: &ExponentTile<'_>,
    dtype: Dtype,
    (cols, tile_cols): (usize, usize),
    words: &mut [u8],
) -> Result<()> {
    on_isa!(isa, s => tile::exponent(s, tile, dtype, cols, tile_cols, words))?
}

/// Turn the base into the fine-tuned matrix in place: `weight` holds the words of a `shape` matrix of
/// `dtype`.
///
/// The delta's bytes and the digest of `weight` are checked before the first word changes
/// ([`Resident::check_match`]), and that every stream ends where its words do. So another base is refused untouched, and so is a
/// weight that the delta was applied to before, which is no longer the base; of a forged delta, too, no word is changed.
///
/// # Errors
/// `Mismatch` for another base, `Corrupt` or `Truncated` for bad delta bytes.
pub fn delta_apply(
    delta: &Resident<'_>,
    dtype: Dtype,
    shape: Shape,
    weight: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    on_isa!(Isa::active()?, s => apply(s, delta, dtype, shape, weight, exec))?
}

/// Turn base words into fine-tuned ones in place, on the calling thread: `words` holds the whole matrix of
/// the delta's dtype and shape, at any alignment. Memory-safe on any bytes; neither the delta's content nor
/// the base is checked against a digest ([`Resident::check`], [`Resident::check_digest`]).
///
/// # Errors
/// `Mismatch` for another length of `words`; `Corrupt` or `Truncated` for bad delta bytes, `words` then holds
/// unspecified words.
pub fn patch(delta: &Resident<'_>, words: &mut [u8]) -> Result<()> {
    patch_on(Isa::active()?, delta, words)
}

/// [`patch`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`patch`]; `Unsupported` if the machine lacks `isa`.
pub fn patch_on(isa: Isa, delta: &Resident<'_>, words: &mut [u8]) -> Result<()> {
    on_isa!(isa, s => patch_all(s, delta, words))?
}

/// See [`delta_apply`].
fn apply<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    dtype: Dtype,
    shape: Shape,
    weight: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    let base = Matrix::new(dtype, shape, weight)?;
    delta.check_match(&base)?;
    decodes(s, delta, &base, exec)?;
    if weight.is_empty() {
        return Ok(());
    }
    let band_bytes = delta.grid().tile_rows * shape.k * dtype.word_bytes();
    let bands: Vec<_> = weight.chunks_mut(band_bytes).map(Mutex::new).collect();
    let words = bands.iter().map(|_| delta.grid().tile_rows * shape.k);
    try_run(exec, LEAST_WORDS, words, |band| {
        let mut words = bands[band].lock().unwrap_or_else(|p| p.into_inner());
        apply_band(s, delta, band, &mut words, None)
    })
}

/// See [`patch`].
fn patch_all<S: Simd>(s: S, delta: &Resident<'_>, words: &mut [u8]) -> Result<()> {
    let (header, grid) = (delta.header(), delta.grid());
    let want = header.shape.bytes(header.dtype)?;
    if words.len() != want {
        return Err(Error::mismatch(format!(
            "words have {} bytes, but a {} matrix of {} takes {want}",
            words.len(),
            header.shape,
            header.dtype
        )));
    }
    if header.encoding == Encoding::Unchanged || words.is_empty() {
        return Ok(());
    }
    let band_bytes = grid.tile_rows * header.shape.k * header.dtype.word_bytes();
    words
        .chunks_mut(band_bytes)
        .enumerate()
        .try_for_each(|(band, words)| apply_band(s, delta, band, words, None))
}

/// Put the fine-tuned words of row band `band` into `words`, the band's whole rows: made from those of
/// `base`, or in place.
fn apply_band<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    band: usize,
    words: &mut [u8],
    base: Option<&Matrix<'_>>,
) -> Result<()> {
    let (grid, dtype) = (delta.grid(), delta.header().dtype);
    let across = grid.tile_cols_count();
    (band * across..(band + 1) * across).try_for_each(|index| {
        let rect = grid.rect(index);
        let (w, k) = (dtype.word_bytes(), grid.shape.k);
        let stripe = Stripe { stride: k * w, from: rect.c0 * w, to: rect.c1 * w, rows: rect.rows() };
        fill_tile(s, delta, index, stripe, words, base)
    })
}
