//! One tile's base words turned into its fine-tuned ones, in place: what restores, products and embeddings
//! share. Every dtype; equal to `codec::decode_tile` bit for bit. A word without an entry is copied, never
//! computed with.

use super::float::{BF16, F16, F32, Float};
use super::lanes::{Decoder, Lane, MICRO};
use super::records::Records;
use super::simd::Simd;
use crate::codec::word::{Word, with_word};
use crate::codec::{
    Change as WordChange, Changes, Entries, Exceptions, ExponentTile, GapKind, Grid, SparseTile, Tile,
    outside,
};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix};
use crate::resident::Resident;
use std::marker::PhantomData;
use std::ops::Range;

/// The fine-tuned words of tile `index`, row after row, into `words`.
pub(crate) fn tile_words<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    index: usize,
    words: &mut [u8],
) -> Result<()> {
    let rect = delta.grid().rect(index);
    let len = rect.cols() * base.dtype().word_bytes();
    let stripe = Stripe { stride: len, from: 0, to: len, rows: rect.rows() };
    fill_tile(s, delta, index, stripe, words, Some(base))
}

/// Where a tile lies in a buffer of words: bytes `from..to` of each of `rows` rows of `stride` bytes.
#[derive(Clone, Copy)]
pub(crate) struct Stripe {
    pub(crate) stride: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) rows: usize,
}

impl Stripe {
    pub(super) fn row<'a>(&self, words: &'a mut [u8], r: usize) -> &'a mut [u8] {
        &mut words[r * self.stride + self.from..r * self.stride + self.to]
    }
}

/// Where the words of a tile lie in a buffer.
pub(crate) trait Places: Copy {
    /// Rows of the tile.
    fn rows(&self) -> usize;
    /// Its columns, of words of type `W`.
    fn columns<W: Word>(&self) -> usize;
    /// The first byte of the word at a row and column that the tile has.
    fn byte<W: Word>(&self, r: usize, c: usize) -> usize;

    /// The word at a position in a tile of `tile_cols` nominal columns, if the tile has it.
    fn word<'a, W: Word>(
        &self,
        tile_cols: usize,
        position: usize,
        words: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        // Not a division: tiles have a power of two of columns.
        let (r, c) = (position >> tile_cols.trailing_zeros(), position & (tile_cols - 1));
        let from = (r < self.rows() && c < self.columns::<W>()).then(|| self.byte::<W>(r, c))?;
        words.get_mut(from..from + W::BYTES)
    }
}

impl Places for Stripe {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns<W: Word>(&self) -> usize {
        (self.to - self.from) / W::BYTES
    }

    #[inline(always)]
    fn byte<W: Word>(&self, r: usize, c: usize) -> usize {
        r * self.stride + self.from + c * W::BYTES
    }
}

/// Put a tile's fine-tuned words in their places; the base's are those of `base`, or there.
pub(super) fn fill_tile<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    index: usize,
    stripe: Stripe,
    words: &mut [u8],
    base: Option<&Matrix<'_>>,
) -> Result<()> {
    let (tile, dtype, tile_cols) = (delta.tile(index)?, delta.header().dtype, delta.grid().tile_cols);
    let rect = delta.grid().rect(index);
    let before = base.map(|base| move |r: usize| base.span(rect.r0 + r, rect.c0, rect.cols()));
    let decoded = matches!((&tile, dtype.word_bytes()), (Tile::Exponent(_), 2 | 4));
    if let Some(before) = before.filter(|_| !decoded && !matches!(tile, Tile::Raw(_))) {
        (0..stripe.rows).for_each(|r| stripe.row(words, r).copy_from_slice(before(r)));
    }
    let before = |r: usize| before.map(|before| before(r));
    let done = match tile {
        Tile::Unchanged => Ok(()),
        Tile::Raw(raw) => {
            (0..stripe.rows).for_each(|r| stripe.row(words, r).copy_from_slice(raw.row(r)));
            Ok(())
        }
        Tile::Sparse(t) => {
            with_word!(dtype, W => patch_sparse::<W, _>(&t, dtype, tile_cols, stripe, words))
        }
        Tile::Exponent(t) => match dtype.word_bytes() {
            2 => unpack::<S, u16>(s, &t, dtype, tile_cols, stripe, words, before),
            4 => unpack::<S, u32>(s, &t, dtype, tile_cols, stripe, words, before),
            _ => by_oracle(delta, index, stripe, words),
        },
    };
    done.map_err(|e| e.within(format!("delta, tile {index}")))
}

/// See [`super::restore::decode_exponent_on`].
pub(super) fn exponent<S: Simd>(
    s: S,
    tile: &ExponentTile<'_>,
    dtype: Dtype,
    cols: usize,
    tile_cols: usize,
    words: &mut [u8],
) -> Result<()> {
    let w = dtype.word_bytes();
    if cols == 0 || cols > tile_cols || !tile_cols.is_power_of_two() || !words.len().is_multiple_of(cols * w)
    {
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
        2 => unpack::<S, u16>(s, tile, dtype, tile_cols, stripe, words, |_| None),
        4 => unpack::<S, u32>(s, tile, dtype, tile_cols, stripe, words, |_| None),
        _ => Err(Error::unsupported(format!("no fast decoder of words of {dtype}"))),
    }
}

/// Decode an `exponent` tile's words row after row, from the base's words of a row that `before` gives, or in
/// place; then entries, then exceptions.
fn unpack<'b, S: Simd, W: Lane>(
    s: S,
    tile: &ExponentTile<'_>,
    dtype: Dtype,
    tile_cols: usize,
    stripe: Stripe,
    words: &mut [u8],
    before: impl Fn(usize) -> Option<&'b [u8]>,
) -> Result<()> {
    let mut decoder = Decoder::<W>::new(tile, dtype);
    for r in 0..stripe.rows {
        let row = stripe.row(words, r);
        let before = before(r);
        if let Ok(row) = bytemuck::try_cast_slice_mut(row) {
            decoder.advance(s, before, row)?;
            continue;
        }
        // Words at an odd address: out and back.
        let mut aligned = [W::default(); MICRO];
        for (i, part) in row.chunks_mut(MICRO * W::BYTES).enumerate() {
            let aligned = &mut aligned[..part.len() / W::BYTES];
            let from = i * MICRO * W::BYTES;
            let before = before.map_or(&*part, |row| &row[from..from + part.len()]);
            decoder.advance(s, Some(before), aligned)?;
            part.copy_from_slice(bytemuck::cast_slice(aligned));
        }
    }
    decoder.finish()?;
    add::<W, _>(&tile.entries, dtype, tile_cols, stripe, words)?;
    overwrite::<W, _>(&tile.exceptions, tile_cols, stripe, words)
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
pub(super) fn patch_sparse<W: Word, P: Places>(
    tile: &SparseTile<'_>,
    dtype: Dtype,
    tile_cols: usize,
    places: P,
    words: &mut [u8],
) -> Result<()> {
    match dtype {
        Dtype::BF16 => walk(tile, places, words, &mut Sums::<BF16>::new())?,
        Dtype::F16 => walk(tile, places, words, &mut Sums::<F16>::new())?,
        Dtype::F32 => walk(tile, places, words, &mut Sums::<F32>::new())?,
        _ => walk::<W, _, P>(tile, places, words, &mut Xor)?,
    }
    overwrite::<W, P>(&tile.exceptions, tile_cols, places, words)
}

/// What is stored apart of one row, or of a run of columns of it: the entries, then the exceptions at
/// positions `places`. `words` holds the words from the first position on; a position beyond them is an
/// error.
pub(crate) fn set_apart<W: Word>(
    entries: &Entries<'_>,
    exceptions: &Exceptions<'_>,
    dtype: Dtype,
    places: Range<usize>,
    words: &mut [u8],
) -> Result<()> {
    let count = words.len() / W::BYTES;
    let place = |position: usize| {
        let c = position.checked_sub(places.start)?;
        (c < count).then_some(c * W::BYTES..(c + 1) * W::BYTES)
    };
    let mut changes = entries.within(places.clone()).changes::<W>();
    while let Some(change) = changes.below(usize::MAX)? {
        let at = place(change.position).ok_or_else(|| outside("entry", change.position))?;
        let now = change.apply(dtype, W::load(&words[at.clone()]));
        words[at].copy_from_slice(bytemuck::bytes_of(&now));
    }
    let mut overrides = exceptions.within(places.clone()).overrides::<W>();
    while let Some((position, word)) = overrides.below(usize::MAX)? {
        let at = place(position).ok_or_else(|| outside("exception", position))?;
        words[at].copy_from_slice(word);
    }
    Ok(())
}

/// Add a tile's entries to the words that its stream gave.
fn add<W: Word, P: Places>(
    entries: &Entries<'_>,
    dtype: Dtype,
    tile_cols: usize,
    places: P,
    words: &mut [u8],
) -> Result<()> {
    let mut changes = entries.changes::<W>();
    add_some(&mut changes, dtype, tile_cols, places, words)?;
    changes.below(usize::MAX)?.map_or(Ok(()), |left| Err(outside("entry", left.position)))
}

/// Add the next entries, those of the rows that `places` has.
pub(super) fn add_some<W: Word, P: Places>(
    changes: &mut Changes<'_, W>,
    dtype: Dtype,
    tile_cols: usize,
    places: P,
    words: &mut [u8],
) -> Result<()> {
    match dtype {
        Dtype::BF16 => each(changes, tile_cols, places, words, with_entry::<BF16, W>),
        Dtype::F16 => each(changes, tile_cols, places, words, with_entry::<F16, W>),
        Dtype::F32 => each(changes, tile_cols, places, words, with_entry::<F32, W>),
        _ => each(changes, tile_cols, places, words, |change, word| change.apply(dtype, word)),
    }
}

/// [`WordChange::apply`] for a dtype that is known when this is compiled; `W` is its word.
#[inline(always)]
pub(crate) fn with_entry<D: Float, W: Word>(change: &WordChange<'_, W>, word: W) -> W {
    let value = |w: W| D::value(D::Word::from_u64(w.to_u64()));
    let sum = value(word) + value(change.first);
    W::from_u64(D::narrow(change.second().map_or(sum, |second| sum + value(second))).to_u64())
}

/// Change every word that has an entry, row by row, as far as there are rows.
#[inline(always)]
fn each<W: Word, P: Places>(
    changes: &mut Changes<'_, W>,
    tile_cols: usize,
    places: P,
    words: &mut [u8],
    apply: impl Fn(&WordChange<'_, W>, W) -> W,
) -> Result<()> {
    while let Some(change) = changes.below(places.rows() * tile_cols)? {
        let word = places.word::<W>(tile_cols, change.position, words);
        let word = word.ok_or_else(|| outside("entry", change.position))?;
        let now = apply(&change, W::load(word));
        word.copy_from_slice(bytemuck::bytes_of(&now));
    }
    Ok(())
}

/// Put a tile's exceptions in place.
pub(super) fn overwrite<W: Word, P: Places>(
    exceptions: &Exceptions<'_>,
    tile_cols: usize,
    places: P,
    words: &mut [u8],
) -> Result<()> {
    let mut overrides = exceptions.overrides::<W>();
    while let Some((position, word)) = overrides.below(usize::MAX)? {
        let place = places.word::<W>(tile_cols, position, words);
        place.ok_or_else(|| outside("exception", position))?.copy_from_slice(word);
    }
    Ok(())
}

/// What an entry does to a word.
pub(crate) trait Change<W> {
    /// The difference that does nothing.
    const NOTHING: u64;
    /// The word after the difference `difference` of lane `lane` at column `c`.
    fn change(&mut self, lane: usize, c: usize, word: W, difference: W) -> W;
    /// The next difference of `lane` does not add to the one before.
    fn forget(&mut self, lane: usize);
}

/// Dtypes that do not compute.
pub(crate) struct Xor;

impl<W: Word> Change<W> for Xor {
    const NOTHING: u64 = 0;
    fn change(&mut self, _: usize, _: usize, word: W, difference: W) -> W {
        W::from_u64(word.to_u64() ^ difference.to_u64())
    }
    fn forget(&mut self, _: usize) {}
}

/// Dtypes that compute. Per lane: the column of the last entry and its exact sum, since a second entry there
/// adds to the sum and not to the word, which may not hold it.
pub(crate) struct Sums<D> {
    last: [(usize, f32); Grid::TILE_ROWS],
    dtype: PhantomData<D>,
}

impl<D: Float> Sums<D> {
    pub(crate) fn new() -> Self {
        Self { last: [(usize::MAX, 0.0); Grid::TILE_ROWS], dtype: PhantomData }
    }
}

impl<D: Float> Change<D::Word> for Sums<D> {
    /// -0.0: x + -0.0 = x for every x.
    const NOTHING: u64 = 1 << (8 * D::BYTES - 1);

    #[inline(always)]
    fn change(&mut self, lane: usize, c: usize, word: D::Word, difference: D::Word) -> D::Word {
        let (at, sum) = self.last[lane];
        let from = if at == c { sum } else { D::value(word) };
        let sum = from + D::value(difference);
        self.last[lane] = (c, sum);
        D::narrow(sum)
    }

    fn forget(&mut self, lane: usize) {
        self.last[lane].0 = usize::MAX;
    }
}

/// Every entry of a tile that does something, record after record.
fn walk<W: Word, C: Change<W>, P: Places>(
    tile: &SparseTile<'_>,
    places: P,
    words: &mut [u8],
    change: &mut C,
) -> Result<()> {
    match tile.gap {
        GapKind::U8 => walk_gaps::<W, C, P, 1>(tile, places, words, change),
        GapKind::U16 => walk_gaps::<W, C, P, 2>(tile, places, words, change),
    }
}

fn walk_gaps<W: Word, C: Change<W>, P: Places, const GAP: usize>(
    tile: &SparseTile<'_>,
    places: P,
    words: &mut [u8],
    change: &mut C,
) -> Result<()> {
    let nothing = W::from_u64(C::NOTHING);
    let (rows, columns) = (places.rows(), places.columns::<W>());
    let mut records = Records::<_, GAP>::new(tile, W::BYTES, [0u16; Grid::TILE_ROWS]);
    while let Some((at, differences)) = records.advance() {
        for lane in 0..Grid::TILE_ROWS {
            let difference = W::load(&differences[lane * W::BYTES..(lane + 1) * W::BYTES]);
            if difference == nothing || lane >= rows {
                continue;
            }
            let c = usize::from(at[lane]);
            if c >= columns {
                return Err(Error::corrupt(format!("lane {lane} names column {c} of {columns}")));
            }
            let from = places.byte::<W>(lane, c);
            let word = &mut words[from..from + W::BYTES];
            let now = change.change(lane, c, W::load(word), difference);
            word.copy_from_slice(bytemuck::bytes_of(&now));
        }
    }
    Ok(())
}
