//! Fine-tuned words: `delta_restore`, `delta_restore_rows`, `delta_apply`, and the tiles that products restore into
//! scratch. Every dtype; equal to `resident::restore` bit for bit. A word without an entry is copied, never computed with.

use super::exec::{Executor, try_run};
use super::exponent::MICRO;
use super::float::{BF16, F16, F32, Float};
use super::lanes::{Decoder, Lane};
use super::simd::Simd;
use crate::codec::word::{Word, with_word};
use crate::codec::{Encoding, Exceptions, ExponentTile, GapKind, Grid, SparseTile, Tile};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix, Shape};
use crate::resident::Resident;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;

/// See [`super::delta_restore_rows`].
pub(super) fn rows<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta.check_base(base)?;
    let (shape, row_bytes) = (base.shape(), base.row_bytes());
    if rows.start > rows.end || rows.end > shape.n {
        return Err(Error::invalid(format!("rows {rows:?} of a matrix of {} rows", shape.n)));
    }
    let want = rows.len() * row_bytes;
    if out.len() != want {
        return Err(Error::mismatch(format!("out has {} bytes, but rows {rows:?} take {want}", out.len())));
    }
    if want == 0 {
        return Ok(());
    }
    let tile_rows = delta.grid().tile_rows;
    let (first, last) = (rows.start / tile_rows, rows.end.div_ceil(tile_rows));
    // The rows of out that each band of tiles covers: the first and the last band may be cut.
    let mut rest = out;
    let mut parts = Vec::with_capacity(last - first);
    for band in first..last {
        let from = (band * tile_rows).max(rows.start);
        let to = ((band + 1) * tile_rows).min(rows.end);
        let (part, tail) = rest.split_at_mut((to - from) * row_bytes);
        rest = tail;
        parts.push(Mutex::new((from..to, part)));
    }
    try_run(exec, parts.len(), |task| {
        let mut part = parts[task].lock().unwrap_or_else(|p| p.into_inner());
        let (rows, out) = &mut *part;
        let band = first + task;
        let whole = band * tile_rows..((band + 1) * tile_rows).min(shape.n);
        if *rows == whole {
            out.copy_from_slice(base.rows(whole.start, whole.end).bytes());
            return apply_band(s, delta, band, out);
        }
        let mut words = base.rows(whole.start, whole.end).bytes().to_vec();
        apply_band(s, delta, band, &mut words)?;
        out.copy_from_slice(
            &words[(rows.start - whole.start) * row_bytes..(rows.end - whole.start) * row_bytes],
        );
        Ok(())
    })
}

/// See [`super::delta_apply`].
pub(super) fn apply<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    dtype: Dtype,
    shape: Shape,
    weight: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta.check_base(&Matrix::new(dtype, shape, weight)?)?;
    // All that can be refused without decoding is refused before the first word changes.
    delta.check()?;
    if weight.is_empty() {
        return Ok(());
    }
    let band_bytes = delta.grid().tile_rows * shape.k * dtype.word_bytes();
    let bands: Vec<_> = weight.chunks_mut(band_bytes).map(Mutex::new).collect();
    try_run(exec, bands.len(), |band| {
        let mut words = bands[band].lock().unwrap_or_else(|p| p.into_inner());
        apply_band(s, delta, band, &mut words)
    })
}

/// See [`super::patch`].
pub(super) fn patch_all<S: Simd>(s: S, delta: &Resident<'_>, words: &mut [u8]) -> Result<()> {
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
    words.chunks_mut(band_bytes).enumerate().try_for_each(|(band, words)| apply_band(s, delta, band, words))
}

/// Turn the base words of row band `band` into the fine-tuned ones; `words` holds the band's whole rows.
fn apply_band<S: Simd>(s: S, delta: &Resident<'_>, band: usize, words: &mut [u8]) -> Result<()> {
    let (grid, dtype) = (delta.grid(), delta.header().dtype);
    let across = grid.tile_cols_count();
    (band * across..(band + 1) * across).try_for_each(|index| {
        let rect = grid.rect(index);
        let (w, k) = (dtype.word_bytes(), grid.shape.k);
        let stripe = Stripe { stride: k * w, from: rect.c0 * w, to: rect.c1 * w, rows: rect.rows() };
        apply_tile(s, delta, index, stripe, words)
    })
}

/// The fine-tuned words of tile `index`, row after row, into `words`.
pub(super) fn tile_words<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    index: usize,
    words: &mut [u8],
) -> Result<()> {
    let rect = delta.grid().rect(index);
    let len = rect.cols() * base.dtype().word_bytes();
    for (r, row) in words.chunks_exact_mut(len).enumerate() {
        row.copy_from_slice(base.span(rect.r0 + r, rect.c0, rect.cols()));
    }
    let stripe = Stripe { stride: len, from: 0, to: len, rows: rect.rows() };
    apply_tile(s, delta, index, stripe, words)
}

/// Where a tile lies in a buffer of words: bytes `from..to` of each of `rows` rows of `stride` bytes.
#[derive(Clone, Copy)]
struct Stripe {
    stride: usize,
    from: usize,
    to: usize,
    rows: usize,
}

impl Stripe {
    fn row<'a>(&self, words: &'a mut [u8], r: usize) -> &'a mut [u8] {
        &mut words[r * self.stride + self.from..r * self.stride + self.to]
    }
}

/// Turn a tile's base words into its fine-tuned ones, in place.
fn apply_tile<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    index: usize,
    stripe: Stripe,
    words: &mut [u8],
) -> Result<()> {
    let done = match delta.tile(index)? {
        Tile::Unchanged => Ok(()),
        Tile::Raw(raw) => {
            (0..stripe.rows).for_each(|r| stripe.row(words, r).copy_from_slice(raw.row(r)));
            Ok(())
        }
        Tile::Sparse(t) => {
            let (dtype, tile_cols) = (delta.header().dtype, delta.grid().tile_cols);
            with_word!(dtype, W => patch::<W>(&t, dtype, tile_cols, stripe, words))
        }
        Tile::Exponent(t) => {
            let (dtype, tile_cols) = (delta.header().dtype, delta.grid().tile_cols);
            match dtype.word_bytes() {
                2 => unpack::<S, u16>(s, &t, dtype, tile_cols, stripe, words),
                4 => unpack::<S, u32>(s, &t, dtype, tile_cols, stripe, words),
                _ => by_oracle(delta, index, stripe, words),
            }
        }
    };
    done.map_err(|e| e.within(format!("delta, tile {index}")))
}

/// See [`super::decode_exponent_on`].
pub(super) fn exponent<S: Simd>(
    s: S,
    tile: &ExponentTile<'_>,
    dtype: Dtype,
    cols: usize,
    tile_cols: usize,
    words: &mut [u8],
) -> Result<()> {
    let w = dtype.word_bytes();
    if cols == 0 || cols > tile_cols || !words.len().is_multiple_of(cols * w) {
        return Err(Error::invalid(format!(
            "{} bytes are not rows of {cols} words of {dtype}, of tiles of {tile_cols} columns",
            words.len()
        )));
    }
    if let Some(width) = tile.widths.iter().find(|&&width| usize::from(width) > 8 * w) {
        return Err(Error::invalid(format!("a width of {width} bits for words of {}", 8 * w)));
    }
    let stripe = Stripe { stride: cols * w, from: 0, to: cols * w, rows: words.len() / (cols * w) };
    match w {
        2 => unpack::<S, u16>(s, tile, dtype, tile_cols, stripe, words),
        4 => unpack::<S, u32>(s, tile, dtype, tile_cols, stripe, words),
        _ => Err(Error::unsupported(format!("no fast decoder of words of {dtype}"))),
    }
}

/// Decode an `exponent` tile's words row after row, then the exceptions.
fn unpack<S: Simd, W: Lane>(
    s: S,
    tile: &ExponentTile<'_>,
    dtype: Dtype,
    tile_cols: usize,
    stripe: Stripe,
    words: &mut [u8],
) -> Result<()> {
    let mut decoder = Decoder::<W>::new(tile, dtype);
    for r in 0..stripe.rows {
        let row = stripe.row(words, r);
        if let Ok(row) = bytemuck::try_cast_slice_mut(row) {
            decoder.advance(s, row)?;
            continue;
        }
        // Words at an odd address: out and back.
        let mut aligned = [W::default(); MICRO];
        for part in row.chunks_mut(MICRO * W::BYTES) {
            let aligned = &mut aligned[..part.len() / W::BYTES];
            bytemuck::cast_slice_mut(aligned).copy_from_slice(part);
            decoder.advance(s, aligned)?;
            part.copy_from_slice(bytemuck::cast_slice(aligned));
        }
    }
    decoder.finish()?;
    overwrite::<W>(&tile.exceptions, tile_cols, stripe, words)
}

/// Decode an `exponent` tile of words that no fast decoder takes.
fn by_oracle(delta: &Resident<'_>, index: usize, stripe: Stripe, words: &mut [u8]) -> Result<()> {
    if stripe.stride == stripe.to - stripe.from {
        return delta.decode(index, words);
    }
    // A tile of at most 65536 words, out and back.
    let mut tile = Vec::with_capacity((stripe.to - stripe.from) * stripe.rows);
    (0..stripe.rows).for_each(|r| tile.extend_from_slice(stripe.row(words, r)));
    delta.decode(index, &mut tile)?;
    let rows = tile.chunks_exact(stripe.to - stripe.from);
    rows.enumerate().for_each(|(r, row)| stripe.row(words, r).copy_from_slice(row));
    Ok(())
}

/// Patch a `sparse` tile's words: the entries of each lane, then the exceptions.
fn patch<W: Word>(
    tile: &SparseTile<'_>,
    dtype: Dtype,
    tile_cols: usize,
    stripe: Stripe,
    words: &mut [u8],
) -> Result<()> {
    match dtype {
        Dtype::BF16 => walk(tile, stripe, words, &mut Sums::<BF16>::new())?,
        Dtype::F16 => walk(tile, stripe, words, &mut Sums::<F16>::new())?,
        Dtype::F32 => walk(tile, stripe, words, &mut Sums::<F32>::new())?,
        _ => walk::<W, _>(tile, stripe, words, &mut Xor)?,
    }
    overwrite::<W>(&tile.exceptions, tile_cols, stripe, words)
}

/// Put a tile's exceptions in place.
fn overwrite<W: Word>(
    exceptions: &Exceptions<'_>,
    tile_cols: usize,
    stripe: Stripe,
    words: &mut [u8],
) -> Result<()> {
    // `Exceptions::get` divides to learn the size of a word; here it is known.
    let (positions, _) = exceptions.positions.as_chunks::<2>();
    for (i, (position, word)) in positions.iter().zip(exceptions.words.chunks_exact(W::BYTES)).enumerate() {
        let position = usize::from(u16::from_le_bytes(*position));
        let (r, c) = (position / tile_cols, position % tile_cols);
        let place = if r < stripe.rows {
            stripe.row(words, r).get_mut(c * W::BYTES..(c + 1) * W::BYTES)
        } else {
            None
        };
        place
            .ok_or_else(|| Error::corrupt(format!("exception {i} lies outside its tile, at {position}")))?
            .copy_from_slice(word);
    }
    Ok(())
}

/// What an entry does to a word.
pub(super) trait Change<W> {
    /// The difference that does nothing.
    const NOTHING: u64;
    /// The word after the difference `diff` of lane `lane` at column `c`.
    fn change(&mut self, lane: usize, c: usize, word: W, diff: W) -> W;
}

/// Dtypes that do not compute.
pub(super) struct Xor;

impl<W: Word> Change<W> for Xor {
    const NOTHING: u64 = 0;
    fn change(&mut self, _: usize, _: usize, word: W, diff: W) -> W {
        W::from_u64(word.to_u64() ^ diff.to_u64())
    }
}

/// Dtypes that compute. Per lane: the column of the last entry and its exact sum, since a second entry there adds to
/// the sum and not to the word, which may not hold it.
pub(super) struct Sums<D> {
    last: [(usize, f32); Grid::LANES],
    dtype: PhantomData<D>,
}

impl<D: Float> Sums<D> {
    pub(super) fn new() -> Self {
        Self { last: [(usize::MAX, 0.0); Grid::LANES], dtype: PhantomData }
    }
}

impl<D: Float> Change<D::Word> for Sums<D> {
    /// -0.0: x + -0.0 = x for every x.
    const NOTHING: u64 = 1 << (8 * D::BYTES - 1);

    #[inline(always)]
    fn change(&mut self, lane: usize, c: usize, word: D::Word, diff: D::Word) -> D::Word {
        let (at, sum) = self.last[lane];
        let from = if at == c { sum } else { D::value(word) };
        let sum = from + D::value(diff);
        self.last[lane] = (c, sum);
        D::narrow(sum)
    }
}

/// Every entry of a tile that does something, record after record.
fn walk<W: Word, C: Change<W>>(
    tile: &SparseTile<'_>,
    stripe: Stripe,
    words: &mut [u8],
    change: &mut C,
) -> Result<()> {
    match tile.gap {
        GapKind::U8 => walk_gaps::<W, C, 1>(tile, stripe, words, change),
        GapKind::U16 => walk_gaps::<W, C, 2>(tile, stripe, words, change),
    }
}

fn walk_gaps<W: Word, C: Change<W>, const GAP: usize>(
    tile: &SparseTile<'_>,
    stripe: Stripe,
    words: &mut [u8],
    change: &mut C,
) -> Result<()> {
    let nothing = W::from_u64(C::NOTHING);
    let columns = (stripe.to - stripe.from) / W::BYTES;
    let mut at = [0usize; Grid::LANES];
    let gaps = tile.gaps.chunks_exact(Grid::LANES * GAP);
    for (gaps, diffs) in gaps.zip(tile.diffs.chunks_exact(Grid::LANES * W::BYTES)) {
        for lane in 0..Grid::LANES {
            let gap = usize::from(gaps[lane * GAP]);
            at[lane] = if GAP == 1 { at[lane] + gap } else { gap | usize::from(gaps[lane * GAP + 1]) << 8 };
            let diff = W::load(&diffs[lane * W::BYTES..(lane + 1) * W::BYTES]);
            if diff == nothing || lane >= stripe.rows {
                continue;
            }
            let c = at[lane];
            if c >= columns {
                return Err(Error::corrupt(format!("lane {lane} names column {c} of {columns}")));
            }
            let from = lane * stripe.stride + stripe.from + c * W::BYTES;
            let word = &mut words[from..from + W::BYTES];
            let now = change.change(lane, c, W::load(word), diff);
            word.copy_from_slice(bytemuck::bytes_of(&now));
        }
    }
    Ok(())
}
