//! `exponent`: the wrapping difference of *every* word, in a width that follows from the base word's exponent.
//!
//! AdamW moves a weight by about the learning rate, so the base's exponent tells both whether a word changed and by how
//! many steps; positions cost nothing. 32 lanes, each a bit stream of its own, interleaved in the order in which a
//! decoder needs them (the scheme of interleaved entropy coders: Giesen, arXiv 1402.3392; widths instead of an entropy
//! code), so that 32 SIMD lanes, or a warp, decode 32 words at a time without prefix sums.
//!
//! Step order: for each row of the tile, for each group of 32 columns; lane `l` holds column `32 * group + l` and
//! sits out where that lies beyond the tile. With `w = widths[class(base)]`, a lane that holds fewer than `w` bits first
//! takes the next unit (one word of the matrix's word size) of the shared stream, lanes in order; then
//! `fine_tuned = base + (v - 2^(w-1))` for the lane's next `w` bits `v`, least significant bit first. `w = 0`: unchanged.
//! Lanes carry their bits through the whole tile and end it on a unit.
//!
//! A word whose difference does not fit is a *misfit*: its bits say that it is unchanged (`v = 2^(w-1)`), and entries
//! (dtypes that compute) or an exception make it right. So a product is right with the stream's words and the entries'
//! differences alone, in any order, and no word has to be looked at twice.

use super::apart::Apart;
use super::word::Word;
use super::{Entries, Exceptions};
use crate::error::{Error, Result};
use crate::matrix::Dtype;

/// Lanes of a step: 32 columns side by side.
pub const STREAM_LANES: usize = 32;
/// Classes of base words.
pub const CLASSES: usize = 32;

/// The bytes of one tile, as they are stored.
#[derive(Clone, Copy, Debug)]
pub struct ExponentTile<'a> {
    /// Bits by class of the base word; at most the word's bits (checked when the view is made).
    pub widths: &'a [u8; CLASSES],
    /// Units of all lanes in the order of use.
    pub stream: &'a [u8],
    /// Exact differences of misfits, to be added to what the stream gives. None in layout 0.
    pub entries: Entries<'a>,
    /// Words that stream and entries do not give bit for bit.
    pub exceptions: Exceptions<'a>,
    /// Whether products are right without the exceptions: where they would not be, a difference is NaN. Not in layout 0,
    /// where the stream holds unspecified bits for exceptions; nor for dtypes that do not compute.
    pub additive: bool,
}

/// Bits of a word below its exponent field; integers of the same size are treated alike.
pub fn mantissa_bits(dtype: Dtype) -> u32 {
    match (dtype, dtype.word_bytes()) {
        (Dtype::F16, _) => 10,
        (_, 1) => 3,
        (_, 2) => 7,
        (_, 4) => 23,
        _ => 52,
    }
}

/// The class of a base word: the low five bits of its exponent field.
#[inline]
pub fn class<W: Word>(word: W, mantissa_bits: u32) -> usize {
    ((word.to_u64() >> mantissa_bits) & 31) as usize
}

impl ExponentTile<'_> {
    pub(crate) fn decode<W: Word>(
        &self,
        dtype: Dtype,
        _rows: usize,
        cols: usize,
        words: &mut [W],
    ) -> Result<()> {
        let mut decoder = Decoder::<W>::new(self, dtype);
        for row in words.chunks_exact_mut(cols) {
            decoder.advance(row)?;
        }
        decoder.finish()
    }
}

/// Decodes a tile from its start, a run of columns at a time, in step order.
///
/// Runs must begin at a multiple of 32 columns and only a row's last run may end elsewhere.
pub struct Decoder<'a, W: Word> {
    widths: &'a [u8; CLASSES],
    stream: &'a [u8],
    mantissa_bits: u32,
    lanes: [W::Lane; STREAM_LANES],
    held: [u32; STREAM_LANES],
}

impl<'a, W: Word> Decoder<'a, W> {
    /// A decoder that stands at the tile's first word.
    pub fn new(tile: &ExponentTile<'a>, dtype: Dtype) -> Self {
        Self {
            widths: tile.widths,
            stream: tile.stream,
            mantissa_bits: mantissa_bits(dtype),
            lanes: [W::Lane::default(); STREAM_LANES],
            held: [0; STREAM_LANES],
        }
    }

    /// Decode the next `words.len()` columns in place: base words in, fine-tuned ones out (what is stored apart aside).
    ///
    /// # Errors
    /// `Truncated` where the stream ends early: it is cut, or belongs to another base.
    #[inline]
    pub fn advance(&mut self, words: &mut [W]) -> Result<()> {
        for group in words.chunks_mut(STREAM_LANES) {
            for (l, word) in group.iter_mut().enumerate() {
                let w = u32::from(self.widths[class(*word, self.mantissa_bits)]);
                if w == 0 {
                    continue;
                }
                if self.held[l] < w {
                    let (unit, rest) = self.stream.split_at_checked(W::BYTES).ok_or_else(ended)?;
                    self.stream = rest;
                    W::load(unit).refill(&mut self.lanes[l], self.held[l]);
                    self.held[l] += W::BITS;
                }
                self.held[l] -= w;
                *word = word.plus(W::take(&mut self.lanes[l], w).minus(W::from_u64(1 << (w - 1))));
            }
        }
        Ok(())
    }

    /// To be called after the tile's last word: checks that the stream ends there.
    ///
    /// # Errors
    /// `Corrupt` if units are left over.
    pub fn finish(self) -> Result<()> {
        match self.stream.len() {
            0 => Ok(()),
            left => Err(Error::corrupt(format!(
                "a tile of encoding exponent leaves {left} bytes of its stream unused: corrupt, or of another base"
            ))),
        }
    }
}

#[cold]
fn ended() -> Error {
    Error::truncated("a tile of encoding exponent needs more bits than it has: cut, or of another base")
}

/// Append a tile's units for `rows` x `cols` words; what does not fit goes to `apart`. Returns how many words differ.
pub(crate) fn encode<W: Word>(
    dtype: Dtype,
    widths: &[u8; CLASSES],
    (cols, tile_cols): (usize, usize),
    (base, fine_tuned): (&[W], &[W]),
    (units, apart): (&mut Vec<u8>, &mut Apart),
) -> u64 {
    let mantissa_bits = mantissa_bits(dtype);
    let mut lanes = Lanes::<W>::new(units);
    let mut changed = 0u64;
    for (r, (br, fr)) in base.chunks_exact(cols).zip(fine_tuned.chunks_exact(cols)).enumerate() {
        for (c, (&b, &f)) in br.iter().zip(fr).enumerate() {
            let w = u32::from(widths[class(b, mantissa_bits)]);
            changed += u64::from(b != f);
            let coded = code(f.minus(b), w);
            if coded.is_none() {
                apart.misfit(dtype, (r * tile_cols + c) as u16, b, f);
            }
            if w > 0 {
                lanes.put(c % STREAM_LANES, coded.unwrap_or(1 << (w - 1)), w);
            }
        }
    }
    lanes.finish();
    changed
}

/// A wrapping difference in `w` bits, if it fits.
#[inline]
fn code<W: Word>(difference: W, w: u32) -> Option<u64> {
    if w == 0 {
        return (difference == W::default()).then_some(0);
    }
    let v = difference.plus(W::from_u64(1 << (w - 1))).to_u64();
    (v >> (w - 1) < 2).then_some(v)
}

/// The encoder's side of the lanes: a unit gets its place when a decoder would take it, its bits when it is full.
struct Lanes<'a, W: Word> {
    units: &'a mut Vec<u8>,
    /// Where each lane's open unit lies.
    place: [usize; STREAM_LANES],
    /// The open unit's bits so far.
    open: [u64; STREAM_LANES],
    /// How many bits the open unit has; `W::BITS` before the first unit.
    used: [u32; STREAM_LANES],
    word: std::marker::PhantomData<W>,
}

impl<'a, W: Word> Lanes<'a, W> {
    fn new(units: &'a mut Vec<u8>) -> Self {
        let word = std::marker::PhantomData;
        Self {
            units,
            place: [usize::MAX; STREAM_LANES],
            open: [0; STREAM_LANES],
            used: [W::BITS; STREAM_LANES],
            word,
        }
    }

    /// Append the `width` low bits of `value`, whose other bits are zero.
    #[inline]
    fn put(&mut self, lane: usize, value: u64, width: u32) {
        let used = self.used[lane];
        let free = W::BITS - used;
        if free > 0 {
            self.open[lane] |= value << used;
        }
        if width <= free {
            self.used[lane] = used + width;
            return;
        }
        self.close(lane);
        self.place[lane] = self.units.len();
        self.units.extend_from_slice(&[0; 8][..W::BYTES]);
        self.open[lane] = value >> free;
        self.used[lane] = width - free;
    }

    fn close(&mut self, lane: usize) {
        // A lane without a unit has no place yet.
        if let Some(unit) = self.units.get_mut(self.place[lane]..).and_then(|u| u.get_mut(..W::BYTES)) {
            unit.copy_from_slice(&self.open[lane].to_le_bytes()[..W::BYTES]);
        }
    }

    fn finish(mut self) {
        (0..STREAM_LANES).for_each(|l| self.close(l));
    }
}
