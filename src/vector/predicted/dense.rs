//! Which words are dense or changed, 64 at a time.

use crate::codec::predicted::Predictor;
use crate::codec::predicted::step::octave;
use crate::codec::word::Word;
use crate::vector::bits::{Masks, RUN};

/// Heads of words: their bits from the octave up, the sign included.
pub(super) const HEADS: usize = 512;

/// What `of` says of the context of each head.
pub(super) fn heads<W: Word>(p: &Predictor, of: impl Fn(usize) -> u32) -> [u32; HEADS] {
    let shift = p.shift::<W>();
    std::array::from_fn(|head| {
        let word = W::from_u64((head as u64) << shift);
        of(usize::from(p.context[octave(word, shift)]))
    })
}

/// Which words are dense, as a comparison: those whose bits without the sign lie in a range.
#[derive(Clone, Copy)]
pub(super) struct DenseWords {
    pub(super) shift: u32,
    low: u32,
    len: u32,
    all: bool,
}

impl DenseWords {
    pub(super) fn new<W: Word>(p: &Predictor) -> Self {
        let (shift, sign) = (p.shift::<W>(), 1u32 << (W::BITS - 1));
        let edge = |octave: usize| ((octave as u64) << shift).min(u64::from(sign)) as u32;
        let (low, high) = (edge(p.dense().start), edge(p.dense().end));
        Self { shift, low, len: high - low, all: low == 0 && high == sign }
    }

    /// Whether no word is.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A bit for each of at most 64 words: whether it is dense.
    #[inline(always)]
    pub(super) fn mask<W: Word>(&self, masks: impl Masks, words: &[W]) -> u64 {
        let there = u64::MAX >> (RUN - words.len());
        if self.all || self.len == 0 {
            return if self.all { there } else { 0 };
        }
        match words.try_into() {
            Ok(run) => masks.within(run, self.low, self.len),
            Err(_) => masks.within(&whole_run(words), self.low, self.len) & there,
        }
    }
}

/// A bit for each of at most 64 words: whether it changed.
#[inline(always)]
pub(super) fn differing<W: Word>(masks: impl Masks, base: &[W], fine_tuned: &[W]) -> u64 {
    match (base.try_into(), fine_tuned.try_into()) {
        (Ok(b), Ok(f)) => masks.differ(b, f),
        _ => masks.differ(&whole_run(base), &whole_run(fine_tuned)),
    }
}

/// A run that is not whole, followed by zeros.
#[cold]
fn whole_run<W: Word>(words: &[W]) -> [W; RUN] {
    let mut run = [W::default(); RUN];
    run[..words.len()].copy_from_slice(words);
    run
}

/// Places that are coded together.
const PLACES: usize = 1024;

/// Places of words of runs that are not dense throughout, until there are enough of them: a loop over few words of a run ends
/// where no machine foresees it, which costs more than those words.
pub(super) struct DensePlaces {
    list: [u32; PLACES + RUN + LISTED],
    count: usize,
}

/// Places listed at a time: about as many as a run has where few words are dense.
const LISTED: usize = 4;

impl DensePlaces {
    pub(super) fn new() -> Self {
        Self { list: [0; PLACES + RUN + LISTED], count: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether they had better be coded before more come.
    #[inline(always)]
    pub(super) fn is_full(&self) -> bool {
        self.count > PLACES
    }

    /// The places.
    #[inline(always)]
    pub(super) fn list(&self) -> &[u32] {
        &self.list[..self.count]
    }

    /// Forget the first `n`.
    #[inline(always)]
    pub(super) fn drop_first(&mut self, n: usize) {
        self.list.copy_within(n..self.count, 0);
        self.count -= n;
    }

    /// Append the places of the ones of `mask`, the first of which is `from`: ascending, or descending. Not to be called
    /// when full.
    #[inline(always)]
    pub(super) fn push<const ASCENDING: bool>(&mut self, from: u32, mask: u64) {
        let ones = mask.count_ones() as usize;
        // Zeros are counted from the same end, whichever way: those of a mask in reverse.
        let mut left = if ASCENDING { mask } else { mask.reverse_bits() };
        for at in (self.count..self.count + ones).step_by(LISTED) {
            for place in &mut self.list[at..at + LISTED] {
                let bit = left.trailing_zeros();
                *place = if ASCENDING { from + bit } else { (from + 63).wrapping_sub(bit) };
                left &= left.wrapping_sub(1);
            }
        }
        self.count += ones;
    }
}
