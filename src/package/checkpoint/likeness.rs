//! Whether two runs of words are alike, and which of very many a run is most like: a table of short marks, so that every base
//! tensor of a kind is looked at and none is compared but those that share a mark.

use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::format::words::TensorWords;
use std::collections::HashMap;
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_64;

/// Places of a run that are read to tell whether two are alike, and bytes at each.
const SPOTS: usize = 32;
const SPOT_BYTES: usize = 64;
/// Share of alike words from which a tensor is taken for another one's successor. Unrelated weights reach a few percent.
const ALIKE: f64 = 0.5;
/// Words of a mark: few enough that a mark outlives a training that changes many words in their lowest bits.
pub(super) const MARK_WORDS: usize = 8;
/// Runs that may share a mark. Where more do (zeros, ones), it says nothing.
const SHARED: usize = 32;
/// Runs that are compared, those that share the most marks first.
const COMPARED: usize = 8;

/// Words of a tensor: which, and from which byte to which.
#[derive(Clone, Copy, Debug)]
pub(super) struct WordRun<'a> {
    pub(super) words: TensorWords<'a>,
    pub(super) at: usize,
    pub(super) bytes: usize,
}

impl<'a> WordRun<'a> {
    /// A whole tensor.
    pub(super) fn whole(words: TensorWords<'a>) -> Result<Self> {
        Ok(Self { words, at: 0, bytes: words.len()? })
    }

    /// Bytes `range` of it.
    pub(super) fn part(self, range: Range<usize>) -> Self {
        Self { words: self.words, at: self.at + range.start, bytes: range.len() }
    }

    /// Its bytes at evenly spread places: all of them, if they are few.
    pub(super) fn spots(self) -> Result<Vec<u8>> {
        let mut out = vec![0; self.bytes.min(SPOTS * SPOT_BYTES)];
        if self.bytes <= SPOTS * SPOT_BYTES {
            self.words.read(self.at, &mut out)?;
            return Ok(out);
        }
        for (i, spot) in out.chunks_exact_mut(SPOT_BYTES).enumerate() {
            let at = (self.bytes - SPOT_BYTES) / (SPOTS - 1) * i / SPOT_BYTES * SPOT_BYTES;
            self.words.read(self.at + at, spot)?;
        }
        Ok(out)
    }

    /// Its first bytes, a spot or two.
    fn start(self) -> Result<Vec<u8>> {
        let mut out = vec![0; self.bytes.min(2 * SPOT_BYTES)];
        self.words.read(self.at, &mut out)?;
        Ok(out)
    }
}

/// Low bits of a word that training changes most, which do not count.
fn low_bits(word_bytes: usize) -> u32 {
    match word_bytes {
        1 => 0,
        2 => 4,
        w => w as u32 * 4,
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0u64, |v, x| (v << 8) | u64::from(*x))
}

/// Share of words that agree in sign, exponent and the first bits after it; `None` of words that are nearly all one value,
/// which say nothing.
fn alike(dtype: Dtype, a: &[u8], b: &[u8]) -> f64 {
    let w = dtype.word_bytes();
    let cut = low_bits(w);
    let agree = a.chunks_exact(w).zip(b.chunks_exact(w)).filter(|(x, y)| word(x) >> cut == word(y) >> cut);
    agree.count() as f64 / (a.len() / w).max(1) as f64
}

/// The share of the bits of `a` that lie below the highest one in which a word differs from that of `b`, that one included.
pub(super) fn differing_bits(dtype: Dtype, a: &[u8], b: &[u8]) -> f64 {
    let w = dtype.word_bytes();
    let bits = |(x, y): (&[u8], &[u8])| u64::from(u64::BITS - (word(x) ^ word(y)).leading_zeros());
    let sum: u64 = a.chunks_exact(w).zip(b.chunks_exact(w)).map(bits).sum();
    sum as f64 / (8 * a.len()).max(1) as f64
}

/// Whether `a` and `b`, of the same length, are alike, and how much; `None` if they are not.
pub(super) fn likeness(dtype: Dtype, a: WordRun<'_>, b: WordRun<'_>) -> Result<Option<f64>> {
    let share = alike(dtype, &a.spots()?, &b.spots()?);
    Ok((share >= ALIKE).then_some(share))
}

/// What at most [`MARK_WORDS`] words are but for their low bits. `None` of words that are one and the same, such as zeros: they
/// mark nothing.
pub(super) fn mark(dtype: Dtype, words: &[u8]) -> Option<u64> {
    let w = dtype.word_bytes();
    let (mut high, mut count) = ([0u64; MARK_WORDS], 0);
    for (to, x) in high.iter_mut().zip(words.chunks_exact(w)) {
        (*to, count) = (word(x) >> low_bits(w), count + 1);
    }
    let high = &high[..count];
    high.iter().any(|x| *x != high[0]).then(|| xxh3_64(bytemuck::cast_slice(high)))
}

/// Where marks are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum MarkPlaces {
    /// All over a run: it is to be found as a whole.
    Spread,
    /// At its start: how long what it is found in goes on is not known.
    Start,
}

/// Many runs of one dtype, to be found by their words.
#[derive(Debug)]
pub(super) struct MarkTable<T> {
    dtype: Dtype,
    places: MarkPlaces,
    runs: Vec<T>,
    marks: HashMap<(u32, u64), Vec<u32>>,
}

impl<T: Copy> MarkTable<T> {
    pub(super) fn new(dtype: Dtype, places: MarkPlaces) -> Self {
        Self { dtype, places, runs: Vec::new(), marks: HashMap::new() }
    }

    /// The marks of a run: which place, and what is there but for the low bits.
    fn marks(&self, run: WordRun<'_>) -> Result<Vec<(u32, u64)>> {
        let bytes = match self.places {
            MarkPlaces::Spread => run.spots()?,
            MarkPlaces::Start => run.start()?,
        };
        let each = bytes.chunks(MARK_WORDS * self.dtype.word_bytes()).enumerate();
        Ok(each.filter_map(|(i, words)| Some((i as u32, mark(self.dtype, words)?))).collect())
    }

    /// Add a run, which is found as `what`.
    pub(super) fn add(&mut self, run: WordRun<'_>, what: T) -> Result<()> {
        let number = self.runs.len() as u32;
        for mark in self.marks(run)? {
            let sharing = self.marks.entry(mark).or_default();
            // One more than counts: it is known then that there are too many.
            if sharing.len() <= SHARED {
                sharing.push(number);
            }
        }
        self.runs.push(what);
        Ok(())
    }

    /// Those that share marks with `run`, the most first.
    pub(super) fn near(&self, run: WordRun<'_>) -> Result<Vec<T>> {
        let mut votes: HashMap<u32, u32> = HashMap::new();
        for mark in self.marks(run)? {
            for number in self.marks.get(&mark).filter(|s| s.len() <= SHARED).into_iter().flatten() {
                *votes.entry(*number).or_default() += 1;
            }
        }
        let mut order: Vec<(u32, u32)> = votes.into_iter().map(|(number, votes)| (votes, number)).collect();
        order.sort_by_key(|&(votes, number)| (std::cmp::Reverse(votes), number));
        Ok(order.into_iter().take(COMPARED).map(|(_, number)| self.runs[number as usize]).collect())
    }
}
