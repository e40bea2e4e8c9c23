//! Widths by exponent: what a table costs on the words counted, and which to take. Must read no words.
//!
//! A step of the optimizer moves a word by about the learning rate, so the width that a class asks for falls
//! by one with every step of its exponent: a table is given by where it begins and how. Tables are taken from
//! that **canonical family** wherever it is nearly as good as any, so that tenants of like learning rates
//! come out with the same one, and their words are decoded together (classes, widths and masks looked up once
//! for all). On small real pairs (`tests/rust/codec/sizes.rs`) 5 of 7 matrices of a tune take one table, from
//! learning rates of 5e-6 to 1e-4, at 0.2 % more bits than free tables; at 1e-6 3 of 7, at 1.2 %.
//!
//! The 32 widths stay in the header as they are, instead of the family's four numbers: kernels read them
//! without arithmetic, and other tables remain possible where the family costs more, and where a later
//! encoder knows better.
//!
//! **Tried**: one class more or less for all of a batch costs 1.25 to 1.9 times the bits; a ramp that does
//! not leap near its end (8, 9, 10, 16) 2 to 6 %, since what a step takes through zero costs two entries in
//! the classes that lie just above; without `less` no table came within 3 % at a learning rate of 1e-4.

use super::plan::Plan;
use super::tiles::{grid, lane_ends};
use crate::codec::split::split;
use crate::codec::word::Word;
use crate::codec::{Encoding, exponent};
use crate::matrix::{Dtype, Shape};

/// A canonical table is taken if it costs at most this factor over the best one.
const CANONICAL_WORTH: f64 = 1.03;

/// `first` and `twos` of the ramps that most tunes of 16-bit words come near, in the order in which they are
/// tried, and the factor over the best table that they may cost.
const COMMON: [(u8, usize); 2] = [(3, 2), (3, 1)];
const COMMON_WORTH: f64 = 1.01;

/// How many classes a ramp may begin at.
const TOPS: usize = 48;

/// What was counted, by class of the base word and width of the difference (0: unchanged).
pub(crate) struct Need {
    /// Words.
    pub(crate) words: [[u64; 65]; exponent::CLASSES],
    /// Entries and exceptions that those words take where their difference does not fit.
    entries: [[u64; 65]; exponent::CLASSES],
    exceptions: [[u64; 65]; exponent::CLASSES],
}

impl Need {
    pub(super) fn new() -> Box<Self> {
        let none = [[0; 65]; exponent::CLASSES];
        Box::new(Self { words: none, entries: none, exceptions: none })
    }

    /// Count a word.
    #[inline]
    pub(crate) fn add<W: Word>(&mut self, dtype: Dtype, mantissa_bits: u32, base: W, fine_tuned: W) {
        let class = exponent::class(base, mantissa_bits);
        let width = fine_tuned.minus(base).width();
        let at = width as usize;
        self.words[class][at] += 1;
        // Words less than half a binade apart: their difference is a word (unless one of them is infinite).
        let (mut entries, mut exceptions) = (u64::from(width > 0), 0);
        if !dtype.computes() {
            (entries, exceptions) = (0, entries);
        } else if width > mantissa_bits {
            let split = split(dtype, base.to_u64(), fine_tuned.to_u64());
            (entries, exceptions) = (split.count as u64, u64::from(split.exception));
        }
        self.entries[class][at] += entries;
        self.exceptions[class][at] += exceptions;
    }
}

/// What a width of a class takes: bits of stream, entries, exceptions.
type Parts = [u64; 3];

/// What every width of every class costs.
pub(super) struct Widths {
    word_bits: u8,
    /// By class and width.
    parts: Vec<[Parts; 65]>,
    /// Words that differ.
    pub(super) changed: u64,
    /// Words of the matrix for each word counted.
    pub(super) scale: f64,
}

impl Widths {
    pub(super) fn of(need: &Need, word_bits: u32, scale: f64) -> Self {
        let parts = (0..exponent::CLASSES).map(|c| {
            let all: u64 = need.words[c].iter().sum();
            let apart = [&need.entries[c], &need.exceptions[c]];
            let mut left = apart.map(|counts| counts.iter().sum::<u64>());
            std::array::from_fn(|w| {
                left.iter_mut().zip(apart).for_each(|(left, counts)| *left -= counts[w]);
                [all * w as u64, left[0], left[1]]
            })
        });
        let changed = need.words.iter().flat_map(|n| &n[1..]).sum();
        Self { word_bits: word_bits as u8, parts: parts.collect(), changed, scale }
    }

    fn class_cost(&self, c: usize, w: u8) -> u64 {
        let [bits, entries, exceptions] = self.parts[c][usize::from(w)];
        bits + (entries + exceptions) * (16 + u64::from(self.word_bits))
    }

    /// The cheapest canonical table, unless the cheapest of all is cheaper by more than it is worth.
    fn table(&self) -> [u8; 32] {
        let costs: Vec<Vec<u64>> = (0..exponent::CLASSES)
            .map(|c| (0..=self.word_bits).map(|w| self.class_cost(c, w)).collect())
            .collect();
        let free: [u8; 32] = std::array::from_fn(|c| {
            (0..=self.word_bits).min_by_key(|w| costs[c][usize::from(*w)]).unwrap_or(0)
        });
        // What a class without words costs is nothing whatever its width; of a small matrix nearly all are such.
        let met: Vec<(usize, &Vec<u64>)> =
            costs.iter().enumerate().filter(|(_, costs)| costs.iter().any(|&c| c > 0)).collect();
        let cost = |table: &dyn Fn(usize) -> u8, limit: u64| {
            let mut sum = 0;
            for (class, costs) in &met {
                sum += costs[usize::from(table(*class))];
                // Most tables are far too dear, which soon shows.
                if sum > limit {
                    return None;
                }
            }
            Some(sum)
        };
        let cheapest = cost(&|class| free[class], u64::MAX).unwrap_or(0);
        // What most tunes come out with, if it costs next to nothing: tables that differ little else change
        // from tenant to tenant by the chance of their words.
        let worth = (cheapest as f64 * COMMON_WORTH) as u64;
        for (first, twos) in COMMON {
            let ramps = (0..TOPS).map(|top| Ramp { word_bits: self.word_bits, top, twos, first, less: 0 });
            let costs = ramps
                .filter_map(|ramp| cost(&|class| ramp.width(class), worth).map(|sum| (sum, ramp.top, ramp)));
            if let Some((_, _, ramp)) = costs.min_by_key(|(sum, top, _)| (*sum, *top)) {
                return std::array::from_fn(|class| ramp.width(class));
            }
        }
        let (mut limit, mut found) = ((cheapest as f64 * CANONICAL_WORTH) as u64, None);
        for table in canonical_tables(self.word_bits) {
            let Some(sum) = cost(&|class| table.width(class), limit) else { continue };
            // Of equally cheap ones the first.
            if found.is_none() || sum < limit {
                (limit, found) = (sum, Some(table));
            }
        }
        found.map_or(free, |table| std::array::from_fn(|class| table.width(class)))
    }

    /// The plan of `exponent`, the bytes of its streams, and the entries and exceptions of the whole matrix.
    pub(super) fn plan(&self, shape: Shape) -> (Plan, u64, [u64; 2]) {
        let widths = self.table();
        let classes = widths.iter().zip(&self.parts).map(|(w, parts)| parts[usize::from(*w)]);
        let sums: Parts = classes.fold([0; 3], |sum, parts| std::array::from_fn(|i| sum[i] + parts[i]));
        let [bits, entries, exceptions] = sums.map(|sum| sum as f64 * self.scale);
        let all = bits + (entries + exceptions) * f64::from(16 + self.word_bits);
        let grid = grid(shape, self.word_bits, all);
        let plan = Plan { encoding: Encoding::Exponent, grid, widths, ..Plan::quiet(shape) };
        let ends = if bits == 0.0 { 0 } else { grid.tiles() as u64 * lane_ends(self.word_bits) / 8 };
        (plan, (bits / 8.0) as u64 + ends, [entries as u64, exceptions as u64])
    }
}

/// A table of the canonical family, by the class of the base word. With `d` steps of the exponent from class
/// `top` down to a word's own: above `top` nothing; 2 bits for `twos` classes; then `first - less`, `first +
/// 1`, `first + 2` and so on up to eight bits below the word's; six below it; from there on whole words. (Of
/// a bf16 word: 7, 8, 10, 16. A word that a step takes through zero has no difference of few bits, whatever
/// the step.) `top` from 32 on is that of exponents beyond 127: no class lies above it then, since class 31
/// follows after class 0.
#[derive(Clone, Copy, Debug)]
struct Ramp {
    word_bits: u8,
    top: usize,
    twos: usize,
    first: u8,
    less: u8,
}

impl Ramp {
    /// The widest width before the leap to six bits below the word's.
    fn widest(word_bits: u8) -> u8 {
        word_bits.saturating_sub(8).max(4)
    }

    fn width(&self, class: usize) -> u8 {
        if self.top < 32 && class > self.top {
            return 0;
        }
        let d = (self.top - class) % 32;
        if d < self.twos {
            return 2;
        }
        let (step, widest) = ((d - self.twos) as u8, Self::widest(self.word_bits));
        match self.first + step {
            w if step == 0 => w - self.less,
            w if w <= widest => w,
            w if w == widest + 1 => widest + 2,
            _ => self.word_bits,
        }
    }
}

/// One of the tables that are preferred.
#[derive(Clone, Copy, Debug)]
enum Canonical {
    Ramp(Ramp),
    /// One width for all, for words that are no floating-point numbers.
    Flat(u8),
}

impl Canonical {
    #[inline]
    fn width(&self, class: usize) -> u8 {
        match self {
            Self::Ramp(ramp) => ramp.width(class),
            Self::Flat(width) => *width,
        }
    }
}

/// All of them, in a fixed order.
fn canonical_tables(word_bits: u8) -> impl Iterator<Item = Canonical> {
    let firsts = (0..TOPS).flat_map(move |top| (2..=Ramp::widest(word_bits)).map(move |first| (top, first)));
    let ramps = firsts.flat_map(move |(top, first)| {
        (0..10).map(move |i| Ramp { word_bits, top, twos: i / 2, first, less: (i % 2) as u8 })
    });
    ramps.map(Canonical::Ramp).chain((1..=word_bits).map(Canonical::Flat))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_tables_fall_with_the_exponent() {
        for word_bits in [8, 16, 32, 64] {
            let widths = canonical_tables(word_bits).flat_map(|t| (0..32).map(move |class| t.width(class)));
            assert!(widths.max() == Some(word_bits));
        }
        let table = |top, first, twos, less| {
            let ramp = Ramp { word_bits: 16, top, twos, first, less };
            std::array::from_fn::<u8, 32, _>(|class| ramp.width(class))
        };
        let mut want = [16; 32];
        want[23..].fill(0);
        (want[22], want[21], want[20], want[19]) = (2, 7, 8, 10);
        assert_eq!(table(22, 7, 1, 0), want);
        want[21] = 6;
        assert_eq!(table(22, 7, 1, 1), want);
        // Exponents beyond 127.
        let mut want = [16; 32];
        (want[1], want[0], want[31], want[30]) = (6, 7, 8, 10);
        assert_eq!(table(33, 6, 0, 0), want);
    }
}
