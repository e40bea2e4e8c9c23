//! Words stored apart because the compact code cannot hold them: *entries* change a word by an exact difference, which a
//! product can add without knowing the word; *exceptions* are the words themselves, which only a restore can use.

use super::split::{narrow, split, widen};
use super::word::Word;
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use std::marker::PhantomData;
use std::ops::Range;

/// Exact differences of single words of a tile, on top of what the compact code gives.
///
/// `fine_tuned = word + difference (+ second difference)` in f32, as in `sparse`; products add `difference * x[column]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entries<'a> {
    /// `u16` little-endian each: `row * tile_cols + column`, ascending; two in succession may be equal, three not.
    pub positions: &'a [u8],
    /// The differences, little-endian words of the dtype, in the order of the positions.
    pub differences: &'a [u8],
}

impl<'a> Entries<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.positions.len() / 2
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Entry `i`: its position in the tile and its difference. Panics if `i >= len()`.
    pub fn get(&self, i: usize) -> (usize, u64) {
        listed(self.positions, self.differences, i)
    }

    /// Those at positions within `places`.
    pub(crate) fn within(&self, places: Range<usize>) -> Self {
        let (positions, differences) = within(self.positions, self.differences, places);
        Self { positions, differences }
    }

    /// All entries, word by word, in order. `W` is the word of the dtype.
    pub(crate) fn changes<W: Word>(&self) -> Changes<'a, W> {
        Changes { places: Ascending::new(self.positions), differences: self.differences, word: PhantomData }
    }

    pub(super) fn apply<W: Word>(
        &self,
        dtype: Dtype,
        (cols, tile_cols): (usize, usize),
        words: &mut [W],
    ) -> Result<()> {
        let mut changes = self.changes::<W>();
        while let Some(change) = changes.below(usize::MAX)? {
            let (r, c) = (change.position / tile_cols, change.position % tile_cols);
            let word = words
                .get_mut(r * cols + c)
                .filter(|_| c < cols)
                .ok_or_else(|| outside("entry", change.position))?;
            *word = change.apply(dtype, *word);
        }
        Ok(())
    }
}

/// What the entries do to one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change<'a, W> {
    /// Which word of the tile.
    pub(crate) position: usize,
    /// The first difference.
    pub(crate) first: W,
    /// The second one's bytes, or none. Not an `Option<W>`: a compiler writes two bytes of that to the stack and reads four
    /// back, which waits for the store, 20 cycles per entry.
    second: &'a [u8],
}

impl<W: Word> Change<'_, W> {
    /// The second difference, where one is not enough.
    #[inline(always)]
    pub(crate) fn second(&self) -> Option<W> {
        (!self.second.is_empty()).then(|| W::load(self.second))
    }

    /// The word that the entries make of the given one: sums in f32, first to last.
    #[inline]
    pub(crate) fn apply(&self, dtype: Dtype, word: W) -> W {
        let value = |w: W| widen(dtype, w.to_u64());
        let sum = value(word) + value(self.first);
        W::from_u64(narrow(dtype, self.second().map_or(sum, |second| sum + value(second))))
    }
}

/// A walk along the entries of a tile that stops wherever it is asked to.
#[derive(Clone, Copy)]
pub(crate) struct Changes<'a, W> {
    places: Ascending<'a>,
    differences: &'a [u8],
    word: PhantomData<W>,
}

impl<'a, W: Word> Changes<'a, W> {
    #[inline(always)]
    fn difference(&self, i: usize) -> &'a [u8] {
        &self.differences[i * W::BYTES..(i + 1) * W::BYTES]
    }

    /// The next one, if it lies at a position below `end`.
    ///
    /// # Errors
    /// `Corrupt` where positions do not ascend.
    #[inline]
    pub(crate) fn below(&mut self, end: usize) -> Result<Option<Change<'a, W>>> {
        let Some((i, position)) = self.places.below("entry", end)? else { return Ok(None) };
        let two = self.places.twice();
        let (first, second) = (W::load(self.difference(i)), if two { self.difference(i + 1) } else { &[] });
        Ok(Some(Change { position, first, second }))
    }
}

/// The positions of what is stored apart, one after the other: what both walks have in common.
#[derive(Clone, Copy)]
struct Ascending<'a> {
    positions: &'a [[u8; 2]],
    next: usize,
    last: Option<usize>,
}

impl<'a> Ascending<'a> {
    fn new(positions: &'a [u8]) -> Self {
        Self { positions: positions.as_chunks().0, next: 0, last: None }
    }

    #[inline(always)]
    fn position(&self) -> Option<usize> {
        self.positions.get(self.next).map(|p| usize::from(u16::from_le_bytes(*p)))
    }

    /// The next one, and which of the list it is, if it is below `end`.
    #[inline(always)]
    fn below(&mut self, what: &str, end: usize) -> Result<Option<(usize, usize)>> {
        let i = self.next;
        let Some(position) = self.position().filter(|p| *p < end) else { return Ok(None) };
        if self.last >= Some(position) {
            return Err(disorder(what, i, position));
        }
        (self.next, self.last) = (i + 1, Some(position));
        Ok(Some((i, position)))
    }

    /// Step over the position that comes next, if it is once more the last one. Says whether it was.
    #[inline(always)]
    fn twice(&mut self) -> bool {
        let two = self.position() == self.last;
        self.next += usize::from(two);
        two
    }
}

/// Something stored apart that does not follow the one before it.
#[cold]
pub(crate) fn disorder(what: &str, i: usize, position: usize) -> Error {
    Error::corrupt(format!("{what} {i}, at {position}, is out of order"))
}

/// Words stored apart because the compact code cannot hold them; they override what it gives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exceptions<'a> {
    /// `u16` little-endian each: `row * tile_cols + column`, ascending.
    pub positions: &'a [u8],
    /// The fine-tuned words, little-endian.
    pub words: &'a [u8],
}

impl<'a> Exceptions<'a> {
    /// Those at positions within `places`.
    pub(crate) fn within(&self, places: Range<usize>) -> Self {
        let (positions, words) = within(self.positions, self.words, places);
        Self { positions, words }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.positions.len() / 2
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Exception `i`: its position in the tile and its word. Panics if `i >= len()`.
    pub fn get(&self, i: usize) -> (usize, u64) {
        listed(self.positions, self.words, i)
    }

    /// All exceptions, in order. `W` is the word of the dtype.
    pub(crate) fn overrides<W: Word>(&self) -> Overrides<'a, W> {
        Overrides { places: Ascending::new(self.positions), words: self.words, word: PhantomData }
    }

    pub(super) fn apply<W: Word>(&self, (cols, tile_cols): (usize, usize), words: &mut [W]) -> Result<()> {
        let mut overrides = self.overrides::<W>();
        while let Some((position, word)) = overrides.below(usize::MAX)? {
            let (r, c) = (position / tile_cols, position % tile_cols);
            let at = words
                .get_mut(r * cols + c)
                .filter(|_| c < cols)
                .ok_or_else(|| outside("exception", position))?;
            *at = W::load(word);
        }
        Ok(())
    }
}

/// A walk along the exceptions of a tile that stops wherever it is asked to.
#[derive(Clone, Copy)]
pub(crate) struct Overrides<'a, W> {
    places: Ascending<'a>,
    words: &'a [u8],
    word: PhantomData<W>,
}

impl<'a, W: Word> Overrides<'a, W> {
    /// Whether the tile has none.
    pub(crate) fn is_empty(&self) -> bool {
        self.places.positions.is_empty()
    }

    /// The next one, its position and the bytes of its word, if it lies at a position below `end`.
    ///
    /// # Errors
    /// `Corrupt` where positions do not ascend.
    #[inline]
    pub(crate) fn below(&mut self, end: usize) -> Result<Option<(usize, &'a [u8])>> {
        let Some((i, position)) = self.places.below("exception", end)? else { return Ok(None) };
        Ok(Some((position, &self.words[i * W::BYTES..(i + 1) * W::BYTES])))
    }
}

/// Something stored apart names a word that its tile does not have.
#[cold]
pub(crate) fn outside(what: &str, position: usize) -> Error {
    Error::corrupt(format!("an {what} lies outside its tile, at {position}"))
}

/// The part of a list whose positions lie within `places`, found by halving; any part of one that is out of order.
fn within<'a>(positions: &'a [u8], words: &'a [u8], places: Range<usize>) -> (&'a [u8], &'a [u8]) {
    let (list, _) = positions.as_chunks::<2>();
    if list.is_empty() {
        return (&[], &[]);
    }
    let w = words.len() / list.len();
    let first = |place| list.partition_point(|p| usize::from(u16::from_le_bytes(*p)) < place);
    let start = first(places.start);
    let end = first(places.end).max(start);
    (list[start..end].as_flattened(), &words[w * start..w * end])
}

fn listed(positions: &[u8], words: &[u8], i: usize) -> (usize, u64) {
    let w = words.len() / (positions.len() / 2);
    let position = u16::load(&positions[2 * i..2 * i + 2]);
    let mut word = [0u8; 8];
    word[..w].copy_from_slice(&words[i * w..(i + 1) * w]);
    (usize::from(position), u64::from_le_bytes(word))
}

/// What a tile being encoded stores apart: (position, word) each.
#[derive(Debug, Default)]
pub(crate) struct Apart {
    /// Position and difference of each entry.
    pub(crate) entries: Vec<(u16, u64)>,
    /// Position and fine-tuned word of each exception.
    pub(crate) exceptions: Vec<(u16, u64)>,
}

impl Apart {
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.exceptions.clear();
    }

    /// A changed word that the compact code does not hold; words come in the order of their positions.
    pub(crate) fn misfit<W: Word>(&mut self, dtype: Dtype, position: u16, base: W, fine_tuned: W) {
        let (base, fine_tuned) = (base.to_u64(), fine_tuned.to_u64());
        if !dtype.computes() {
            self.exceptions.push((position, fine_tuned));
            return;
        }
        let split = split(dtype, base, fine_tuned);
        self.entries.extend(split.terms[..split.count].iter().map(|term| (position, *term)));
        if split.exception {
            self.exceptions.push((position, fine_tuned));
        }
    }
}
