//! What is counted of words before they are encoded, and which words of a tile are coded.

use super::dense::{DenseWords, differing};
use crate::codec::predicted::step::{OCTAVES, octave, octave_shift};
use crate::codec::predicted::{Predictor, StepCounts};
use crate::codec::word::{Word, with_word};
use crate::error::Result;
use crate::vector::bits::{BitTask, Masks, RUN};
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::simd::Simd;

/// Count the steps of words given as bytes.
///
/// # Errors
/// Those of [`Isa::active`].
pub(crate) fn count_steps(counts: &mut StepCounts, base: &[u8], fine_tuned: &[u8]) -> Result<()> {
    with_word!(counts.dtype(), W => with_words::<W, _>(base, fine_tuned, |base, fine_tuned| {
        on_isa!(Isa::active()?, s => s.with_bits(CountTask { counts, base, fine_tuned }))
    }))
}

/// Count the gaps of a tile given as bytes.
///
/// # Errors
/// Those of [`Isa::active`].
pub(crate) fn count_gaps(
    counts: &mut StepCounts,
    p: &Predictor,
    base: &[u8],
    fine_tuned: &[u8],
) -> Result<()> {
    let found = with_word!(p.dtype(), W => with_words::<W, _>(base, fine_tuned, |base, fine_tuned| {
        let dense = DenseWords::new::<W>(p);
        on_isa!(Isa::active()?, s => s.with_bits(FindTask { dense, base, fine_tuned }))
    }))?;
    let mut from = 0;
    for place in &found.rare {
        counts.add_gap(place - from);
        from = place + 1;
    }
    counts.add_gap((base.len() / p.dtype().word_bytes()) as u32 - from);
    Ok(())
}

/// Changed words of a run that are counted one by one.
const FEW: u32 = 12;

/// Words to be counted.
struct CountTask<'a, W> {
    counts: &'a mut StepCounts,
    base: &'a [W],
    fine_tuned: &'a [W],
}

impl<W: Word> BitTask for CountTask<'_, W> {
    type Out = ();

    #[inline(always)]
    fn call(self, masks: impl Masks) {
        let shift = octave_shift::<W>(self.counts.dtype());
        // Four tables, so that equal octaves in a row do not wait for one another.
        let mut unchanged = [[0i64; OCTAVES]; 4];
        for (b, f) in self.base.chunks(RUN).zip(self.fine_tuned.chunks(RUN)) {
            let mut differ = differing(masks, b, f);
            if differ.count_ones() > FEW {
                self.counts.add(b, f);
                continue;
            }
            b.iter().enumerate().for_each(|(i, b)| unchanged[i % 4][octave(*b, shift)] += 1);
            while differ != 0 {
                let i = differ.trailing_zeros() as usize;
                differ &= differ - 1;
                unchanged[0][octave(b[i], shift)] -= 1;
                self.counts.add(&b[i..=i], &f[i..=i]);
            }
        }
        for octave in 0..OCTAVES {
            let words: i64 = unchanged.iter().map(|table| table[octave]).sum();
            self.counts.add_unchanged(octave, words as u64);
        }
    }
}

/// A tile whose changes are to be found.
struct FindTask<'a, W> {
    dense: DenseWords,
    base: &'a [W],
    fine_tuned: &'a [W],
}

impl<W: Word> BitTask for FindTask<'_, W> {
    type Out = TileChanges;

    #[inline(always)]
    fn call(self, masks: impl Masks) -> TileChanges {
        let mut found = TileChanges::default();
        found.find(masks, self.dense, self.base, self.fine_tuned);
        found
    }
}

/// Both as words: in place where they lie as words must, else copied.
pub(super) fn with_words<W: Word, T>(
    base: &[u8],
    fine_tuned: &[u8],
    work: impl FnOnce(&[W], &[W]) -> T,
) -> T {
    let copied = |bytes: &[u8]| bytes.chunks_exact(W::BYTES).map(W::load).collect::<Vec<W>>();
    match (bytemuck::try_cast_slice::<u8, W>(base), bytemuck::try_cast_slice::<u8, W>(fine_tuned)) {
        (Ok(b), Ok(f)) => work(b, f),
        _ => work(&copied(base), &copied(fine_tuned)),
    }
}

/// Which words of a tile are coded.
#[derive(Default)]
pub(super) struct TileChanges {
    /// Of each run which words are dense.
    pub(super) masks: Vec<u64>,
    /// How many are.
    pub(super) dense: usize,
    /// Places of the other words that changed.
    pub(super) rare: Vec<u32>,
    pub(super) changed: u64,
}

impl TileChanges {
    #[inline(always)]
    pub(super) fn find<W: Word>(
        &mut self,
        masks: impl Masks,
        dense: DenseWords,
        base: &[W],
        fine_tuned: &[W],
    ) {
        self.masks.reserve_exact(base.len().div_ceil(RUN));
        for (i, (b, f)) in base.chunks(RUN).zip(fine_tuned.chunks(RUN)).enumerate() {
            let (mask, differ) = (dense.mask(masks, b), differing(masks, b, f));
            self.masks.push(mask);
            self.dense += mask.count_ones() as usize;
            self.changed += u64::from(differ.count_ones());
            let mut others = differ & !mask;
            while others != 0 {
                self.rare.push((i * RUN) as u32 + others.trailing_zeros());
                others &= others - 1;
            }
        }
    }
}
