//! Widths by exponent: what a table costs on the words counted, and which to take. Must read no words.
//!
//! A step of the optimizer moves a word by about the learning rate, so the width that a class asks for falls by one with every
//! step of its exponent: a table is given by where it begins and how. Tables are taken from that **canonical family** wherever it
//! is nearly as good as any, so that tenants of like learning rates come out with the same one, and their words are decoded
//! together (classes, widths and masks looked up once for all).
//!
//! The 32 widths stay in the header as they are, instead of the family's three numbers: kernels read them without arithmetic,
//! and other tables remain possible where the family costs more (of a bf16 model tuned at 1e-4 it would take 3.7 % more bits).

use super::plan::Plan;
use crate::codec::split::split;
use crate::codec::word::Word;
use crate::codec::{Encoding, Grid, exponent};
use crate::matrix::{Dtype, Shape};

/// A canonical table is taken if it costs at most this factor over the best one.
const CANONICAL_WORTH: f64 = 1.03;

/// The `a` and `p` of the family that most tunes of 16-bit words come near, in the order in which they are tried, and the
/// factor over the best table that they may cost.
const COMMON: [(u8, usize); 2] = [(3, 2), (3, 1)];
const COMMON_WORTH: f64 = 1.01;

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
        let cost =
            |table: &[u8; 32]| -> u64 { costs.iter().zip(table).map(|(c, w)| c[usize::from(*w)]).sum() };
        let free: [u8; 32] = std::array::from_fn(|c| {
            (0..=self.word_bits).min_by_key(|w| costs[c][usize::from(*w)]).unwrap_or(0)
        });
        let limit = cost(&free) as f64 * CANONICAL_WORTH;
        // What most tunes come out with, if it costs next to nothing: tables that differ little else change from tenant to
        // tenant by the chance of their words.
        let worth = cost(&free) as f64 * COMMON_WORTH;
        let common =
            COMMON.into_iter().map(|(a, p)| canonical_tables_of(self.word_bits, a, p).min_by_key(cost));
        if let Some(table) = common.flatten().find(|t| cost(t) as f64 <= worth) {
            return table;
        }
        // The first of equally cheap ones.
        let canonical = canonical_tables(self.word_bits).min_by_key(cost);
        canonical.filter(|t| cost(t) as f64 <= limit).unwrap_or(free)
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

/// The canonical family, in a fixed order. With `d` steps of the exponent from class `c` down to a word's own: above `c`
/// nothing; 2 bits for `p` classes; then `a`, `a + 1` and so on, up to six bits below the word's; from there on whole words.
/// `c` from 32 on is that of exponents beyond 127: no class lies above it then, since class 31 follows after class 0. And
/// one width for all, for words that are no floating-point numbers.
fn canonical_tables(word_bits: u8) -> impl Iterator<Item = [u8; 32]> {
    let steepest = 2..most_bits(word_bits) - 1;
    let family = (0..CLASSES_BEGIN).flat_map(move |c| {
        let steepest = steepest.clone();
        steepest.flat_map(move |a| (0..5).map(move |p| canonical_table(word_bits, c, a, p)))
    });
    family.chain((1..=word_bits).map(|w| [w; 32]))
}

/// Those of one `a` and `p`.
fn canonical_tables_of(word_bits: u8, a: u8, p: usize) -> impl Iterator<Item = [u8; 32]> {
    (0..CLASSES_BEGIN).map(move |c| canonical_table(word_bits, c, a, p))
}

/// Where a table may begin.
const CLASSES_BEGIN: usize = 48;

/// The widest difference that is not a whole word.
fn most_bits(word_bits: u8) -> u8 {
    (word_bits - 6).max(6)
}

fn canonical_table(word_bits: u8, c: usize, a: u8, p: usize) -> [u8; 32] {
    std::array::from_fn(|class| match if c < 32 { c.checked_sub(class) } else { Some((c - class) % 32) } {
        None => 0,
        Some(d) if d < p => 2,
        Some(d) => Some(a + (d - p) as u8).filter(|w| *w <= most_bits(word_bits)).unwrap_or(word_bits),
    })
}

/// Smallest tile of a matrix that has as many words.
const LEAST_WORDS: usize = 16 * 1024;
/// What the ends of tiles may cost: this share of all bits,
const ENDS_SHARE: f64 = 0.015;
/// and so many bits a word.
const ENDS_BITS: f64 = 0.02;

/// Bits that a tile's lanes leave unused: half a word each, taken all together.
fn lane_ends(word_bits: u8) -> u64 {
    exponent::LANES as u64 * u64::from(word_bits) / 2
}

/// Tiles for `exponent` of `bits` bits in all: as small as their ends allow, since a GPU has a warp for each; of equally many
/// words the widest. A tile's ends are its lanes', and its places in the directories of units and of entries.
fn grid(shape: Shape, word_bits: u8, bits: f64) -> Grid {
    let largest = Grid::for_exponent(shape);
    let words = shape.n as f64 * shape.k as f64;
    let limit = (bits * ENDS_SHARE).min(words * ENDS_BITS);
    let columns =
        [1024, 2048, 4096].into_iter().filter(|c| *c < largest.tile_cols).chain([largest.tile_cols]);
    let rows = |columns: usize| {
        let most = largest.tile_rows * largest.tile_cols / columns;
        (4..17)
            .map(|log| 1usize << log)
            .take_while(move |rows| *rows <= most && rows * columns <= Grid::MAX_WORDS)
    };
    let grids = columns
        .flat_map(|tile_cols| rows(tile_cols).map(move |tile_rows| Grid { shape, tile_rows, tile_cols }));
    let ends = |grid: &Grid| grid.tiles() as f64 * (lane_ends(word_bits) + 2 * 32) as f64;
    let small = grids.filter(|g| g.tile_rows * g.tile_cols >= LEAST_WORDS && ends(g) <= limit);
    small
        .min_by_key(|g| (g.tile_rows * g.tile_cols, g.tiles(), Grid::MAX_COLS - g.tile_cols))
        .unwrap_or(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_small_as_their_ends_allow() {
        let of = |n, k, word_bits, bits_a_word: f64| {
            let grid = grid(Shape { n, k }, word_bits, n as f64 * k as f64 * bits_a_word);
            (grid.tile_rows, grid.tile_cols)
        };
        // 320 bits a tile of bf16: 0.0195 a word of 16 x 1024, and 1.5 % of 1.3 bits.
        assert_eq!(of(4096, 4096, 16, 3.0), (16, 1024));
        assert_eq!(of(4096, 4096, 16, 1.31), (16, 1024));
        assert_eq!(of(4096, 4096, 16, 1.29), (16, 2048));
        assert_eq!(of(4096, 4096, 16, 0.6), (16, 4096));
        assert_eq!(of(4096, 4096, 16, 0.01), (16, 4096));
        assert_eq!(of(4096, 1024, 16, 0.7), (32, 1024));
        assert_eq!(of(4096, 1024, 16, 0.01), (64, 1024));
        assert_eq!(of(4096, 4096, 32, 20.0), (16, 2048));
        // A column too many would begin a tile of its own in every band.
        assert_eq!(of(4096, 1025, 16, 3.0), (16, 2048));
        assert_eq!(of(4096, 300, 16, 3.0), (64, 512));
        // No more rows than there are.
        assert_eq!(of(1, 1 << 20, 16, 3.0), (16, 4096));
        assert_eq!(of(33, 100, 16, 3.0), (64, 256));
        assert_eq!(of(0, 0, 16, 0.0), (16, 256));
    }

    #[test]
    fn every_canonical_table_is_one_of_the_word() {
        for word_bits in [8, 16, 32, 64] {
            let tables: Vec<_> = canonical_tables(word_bits).collect();
            assert!(tables.iter().flatten().all(|w| *w <= word_bits));
        }
        let table = |c: usize, a: usize, p: usize| canonical_tables(16).nth((c * 7 + a - 2) * 5 + p).unwrap();
        let mut want = [16; 32];
        want[23..].fill(0);
        (want[22], want[21], want[20], want[19]) = (2, 8, 9, 10);
        assert_eq!(table(22, 8, 1), want);
        let mut want = [16; 32];
        (want[1], want[0], want[31], want[30]) = (7, 8, 9, 10);
        assert_eq!(table(33, 7, 0), want);
    }
}
