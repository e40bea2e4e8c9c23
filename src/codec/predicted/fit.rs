//! The predictor that makes counted words small.

use super::predictor::{MAX_CONTEXTS, Predictor, Weights};
use super::step::{
    ESCAPE, GAP_SYMBOLS, OCTAVES, STEP_SYMBOLS, number, octave, octave_shift, step, step_symbol,
};
use super::table::{LOGS, weights_bits};
use super::tile::raw_bits;
use crate::codec::word::{Word, with_word};
use crate::error::Result;
use crate::matrix::Dtype;
use std::ops::Range;

/// How often words of each octave make each step, in all of a matrix or in a sample of it.
pub struct StepCounts {
    dtype: Dtype,
    /// By octave and symbol. The first symbol stands for words that are unchanged.
    steps: Vec<u64>,
    gaps: [u64; GAP_SYMBOLS],
}

/// Some octaves side by side, while contexts are made of them.
#[derive(Clone)]
struct Group {
    last: usize,
    counts: Vec<u64>,
    bits: f64,
}

/// What a word with a symbol of its own costs beyond its bits: time, counted in bits. Up to 0.18 no real pair of
/// `benches/pairs.rs` takes a bit more for it, and some take less: octaves whose words rarely change are where what is taken
/// for their share of changes is least true of every row. At 5 % changed half as many words have a symbol as at 0.02.
const DENSE_WORD_BITS: f64 = 0.15;

impl StepCounts {
    /// Nothing counted yet.
    pub fn new(dtype: Dtype) -> Self {
        let steps = vec![0; OCTAVES * STEP_SYMBOLS];
        Self { dtype, steps, gaps: [0; GAP_SYMBOLS] }
    }

    /// Count the words of a tile. Gaps are counted between all changed words, dense or not.
    #[inline(always)]
    pub fn add<W: Word>(&mut self, base: &[W], fine_tuned: &[W]) {
        let shift = octave_shift::<W>(self.dtype);
        for (b, f) in base.iter().zip(fine_tuned) {
            self.steps[octave(*b, shift) * STEP_SYMBOLS + step_symbol(step(*b, *f)).0] += 1;
        }
    }

    /// Count words of an octave that are unchanged.
    pub(crate) fn add_unchanged(&mut self, octave: usize, words: u64) {
        self.steps[octave * STEP_SYMBOLS] += words;
    }

    /// Count the gaps of a tile between changed words that are not dense by `p`.
    pub fn add_gaps<W: Word>(&mut self, p: &Predictor, base: &[W], fine_tuned: &[W]) {
        let (shift, dense, mut from) = (p.shift::<W>(), p.dense(), 0);
        for (i, (b, f)) in base.iter().zip(fine_tuned).enumerate() {
            if b != f && !dense.contains(&octave(*b, shift)) {
                self.add_gap((i - from) as u32);
                from = i + 1;
            }
        }
        self.add_gap((base.len() - from) as u32);
    }

    /// Count a gap of so many words.
    #[inline(always)]
    pub(crate) fn add_gap(&mut self, words: u32) {
        self.gaps[number(words).0] += 1;
    }

    /// Dtype of the words.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Words counted.
    pub fn words(&self) -> u64 {
        self.steps.iter().sum()
    }

    /// Words of each octave, and how many of them changed.
    fn totals(&self) -> [(u64, u64); OCTAVES] {
        std::array::from_fn(|octave| {
            let row = self.row(octave);
            (row.iter().sum(), row[1..].iter().sum())
        })
    }

    fn row(&self, octave: usize) -> &[u64] {
        &self.steps[octave * STEP_SYMBOLS..][..STEP_SYMBOLS]
    }

    /// The bytes of a predictor for a matrix of `words` words, and the bits it makes of the counted words.
    /// `tile_words` is the length of its tiles; `whole` says that every word was counted, so that nothing else can come.
    /// The first time it is made without gaps counted; with them it fits better.
    ///
    /// # Errors
    /// `Internal`: never but by a mistake here.
    pub fn fit(&self, words: usize, tile_words: usize, whole: bool) -> Result<(Vec<u8>, Predictor, f64)> {
        let precision = if words > 1 << 18 { 3 } else { 2 };
        let log = (usize::BITS - words.leading_zeros()).saturating_sub(6).clamp(8, 11);
        let log = log.min(words.max(32).ilog2()).max(*LOGS.start());
        let dense = self.dense_octaves();
        let mut groups = Vec::new();
        for (range, is_dense) in [(0..dense.start, false), (dense.clone(), true), (dense.end..OCTAVES, false)]
        {
            let from = groups.len();
            groups.extend(self.groups(range, is_dense, precision));
            debug_assert!(from <= groups.len());
        }
        let first = groups.iter().filter(|g| g.last < dense.start).count();
        let last = groups.iter().filter(|g| g.last < dense.end).count();
        let (gaps, gap_bits) = self.gap_weights(&dense, words, tile_words, whole);
        let bits = groups.iter().map(|g| g.bits).sum::<f64>() + gap_bits;
        let steps = groups.iter().enumerate().map(|(i, g)| {
            // A context that saw nothing may still see an escape, where not every word was counted.
            let escapes = u64::from(!whole) * (g.counts.iter().sum::<u64>() / 4096 + 1);
            weights(&g.counts, log, (first..last).contains(&i), escapes)
        });
        let model = Weights {
            log,
            precision,
            last: groups.iter().map(|g| g.last as u8).collect(),
            dense: first..last,
            steps: steps.collect(),
            gaps,
        };
        let bytes = model.bytes();
        let predictor = Predictor::read(self.dtype, words, &bytes)?;
        Ok((bytes, predictor, bits))
    }

    /// The run of octaves whose words had better have a symbol each: that saves most.
    fn dense_octaves(&self) -> Range<usize> {
        let (total, totals) = (self.words().max(1) as f64, self.totals());
        let mut dense = 0..0;
        for _ in 0..4 {
            let outside = (0..OCTAVES).filter(|o| !dense.contains(o)).map(|o| totals[o].1).sum::<u64>();
            // A gap takes about log2 of how far changes are apart, and a bit and a half.
            let gap = (total / outside.max(1) as f64).log2().max(0.5) + 1.5;
            let (mut best, mut sum, mut from) = (0.0, 0.0, 0);
            let before = dense.clone();
            dense = 0..0;
            for (octave, &(n, c)) in totals.iter().enumerate() {
                let (n, c) = (n as f64, c as f64);
                let told = entropy(n) - entropy(c) - entropy(n - c);
                sum += c * gap - told - DENSE_WORD_BITS * n;
                if sum <= 0.0 {
                    (sum, from) = (0.0, octave + 1);
                } else if sum > best {
                    (best, dense) = (sum, from..octave + 1);
                }
            }
            if dense == before {
                break;
            }
        }
        dense
    }

    /// Contexts of the octaves of `range`: neighbours are joined while that saves bits.
    fn groups(&self, range: Range<usize>, is_dense: bool, precision: u32) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for octave in range {
            let mut counts = self.row(octave).to_vec();
            if !is_dense {
                counts[0] = 0;
            }
            match groups.last_mut() {
                Some(g) if counts.iter().all(|c| *c == 0) => g.last = octave,
                _ => groups.push(self.group(octave, counts, precision)),
            }
        }
        loop {
            let joined = groups.windows(2).map(|w| {
                let counts = w[0].counts.iter().zip(&w[1].counts).map(|(a, b)| a + b).collect();
                let both = self.group(w[1].last, counts, precision);
                (both.bits - w[0].bits - w[1].bits, both)
            });
            let best = joined.enumerate().min_by(|a, b| a.1.0.total_cmp(&b.1.0));
            match best {
                Some((i, (gain, both))) if gain <= 0.0 || groups.len() > MAX_CONTEXTS / 3 => {
                    groups[i] = both;
                    groups.remove(i + 1);
                }
                _ => return groups,
            }
        }
    }

    /// What a context of these counts takes: its words and its table.
    fn group(&self, last: usize, counts: Vec<u64>, precision: u32) -> Group {
        let raw = |symbol: usize| with_word!(self.dtype, W => raw_bits::<W>(symbol));
        let n: u64 = counts.iter().sum();
        let mut bits = entropy(n as f64);
        let (mut present, mut end) = (0, 0);
        for (symbol, &c) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
            bits += c as f64 * f64::from(raw(symbol)) - entropy(c as f64);
            (present, end) = (present + 1, symbol + 1);
        }
        Group { last, bits: bits + 8.0 + weights_bits(present, end, precision), counts }
    }

    /// Weights of gaps: as counted; before they are, as changes at random places have them. And what they take.
    fn gap_weights(
        &self,
        dense: &Range<usize>,
        words: usize,
        tile_words: usize,
        whole: bool,
    ) -> (Vec<u16>, f64) {
        let totals = self.totals();
        let outside = (0..OCTAVES).filter(|o| !dense.contains(o)).map(|o| totals[o].1).sum::<u64>();
        if outside == 0 && whole {
            return (Vec::new(), 0.0);
        }
        let most = number(tile_words.min(words) as u32).0;
        let counted: u64 = self.gaps.iter().sum();
        let mut counts = self.gaps;
        if counted == 0 {
            counts[..=most].fill(1);
        } else if !whole {
            counts[..=most].iter_mut().for_each(|c| *c = (*c).max(1));
        }
        let n = counts.iter().sum::<u64>() as f64;
        let bits = counts.iter().enumerate().map(|(symbol, &c)| {
            let raw = super::step::number_of(symbol).0;
            c as f64 * f64::from(raw) - entropy(c as f64)
        });
        (weights(&counts, 12, true, 0), entropy(n) + bits.sum::<f64>() + weights_bits(12, most, 2))
    }
}

/// `n log2 n`.
fn entropy(n: f64) -> f64 {
    if n > 0.0 { n * n.log2() } else { 0.0 }
}

/// Counts scaled to weights of at most `2^log`; with `zero` the first counts, too. Symbols that leave a small table too
/// little room, the rarest ones, become escapes.
fn weights(counts: &[u64], log: u32, zero: bool, escapes: u64) -> Vec<u16> {
    let mut counts = counts.to_vec();
    if !zero {
        counts[0] = 0;
    }
    let room = (1usize << log) / 2;
    let steps = counts.len() == STEP_SYMBOLS;
    if steps {
        counts[ESCAPE] += escapes;
        while counts.iter().filter(|c| **c > 0).count() > room {
            let rarest = (2..counts.len()).filter(|&s| counts[s] > 0).min_by_key(|&s| counts[s]);
            let Some(rarest) = rarest else { break };
            counts[ESCAPE] += std::mem::take(&mut counts[rarest]);
        }
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let scale = |c: u64| if c == 0 { 0 } else { ((c << log) as f64 / most as f64).round().max(1.0) as u16 };
    counts.iter().map(|&c| scale(c)).collect()
}
