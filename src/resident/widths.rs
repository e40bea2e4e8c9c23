//! Widths by exponent: what a table costs on the words counted, and which to take. Must read no words.

use super::plan::Plan;
use crate::codec::{Encoding, Grid, exponent};
use crate::matrix::Shape;

/// A canonical width table is taken if it costs at most this factor over the best one: tenants of one batch that
/// share a table share its look-ups (research/cpu_kernels.md: 1.5 times the speed at 4 and 8 tenants).
const CANONICAL_WORTH: f64 = 1.03;

/// Words by class of the base word and width of the difference (0: unchanged).
pub(crate) type Need = [[u64; 65]; exponent::CLASSES];

/// What every width of every class costs.
pub(super) struct Widths {
    word_bits: u8,
    /// By class and width: bits of stream, exceptions.
    parts: Vec<[(u64, u64); 65]>,
    /// Words that differ.
    pub(super) changed: u64,
    /// Words of the matrix for each word counted.
    pub(super) scale: f64,
}

impl Widths {
    pub(super) fn of(need: &Need, word_bits: u32, scale: f64) -> Self {
        let parts = need.iter().map(|need| {
            let all: u64 = need.iter().sum();
            let mut left = all;
            std::array::from_fn(|w| {
                left -= need[w];
                (all * w as u64, left)
            })
        });
        let changed = need.iter().flat_map(|n| &n[1..]).sum();
        Self { word_bits: word_bits as u8, parts: parts.collect(), changed, scale }
    }

    fn class_cost(&self, c: usize, w: u8) -> u64 {
        let (bits, exceptions) = self.parts[c][usize::from(w)];
        bits + exceptions * (16 + u64::from(self.word_bits))
    }

    fn table_cost(&self, widths: &[u8; 32]) -> u64 {
        widths.iter().enumerate().map(|(c, w)| self.class_cost(c, *w)).sum()
    }

    /// The cheapest table, or a canonical one that is nearly as cheap.
    fn table(&self) -> [u8; 32] {
        let free: [u8; 32] =
            std::array::from_fn(|c| (0..=self.word_bits).min_by_key(|w| self.class_cost(c, *w)).unwrap_or(0));
        let canonical = canonical_tables(self.word_bits).min_by_key(|t| self.table_cost(t));
        let limit = self.table_cost(&free) as f64 * CANONICAL_WORTH;
        canonical.filter(|t| self.table_cost(t) as f64 <= limit).unwrap_or(free)
    }

    /// The plan of `exponent`, the bytes of its streams and the exceptions of the whole matrix.
    pub(super) fn plan(&self, shape: Shape) -> (Plan, u64, u64) {
        let widths = self.table();
        let plan = Plan { encoding: Encoding::Exponent, widths, ..Plan::quiet(shape) };
        let classes = widths.iter().zip(&self.parts).map(|(w, parts)| parts[usize::from(*w)]);
        let (bits, exceptions) = classes.fold((0, 0), |a, c| (a.0 + c.0, a.1 + c.1));
        let ends = if bits == 0 { 0 } else { tails(&plan.grid, self.word_bits) };
        (plan, (bits as f64 / 8.0 * self.scale) as u64 + ends, (exceptions as f64 * self.scale) as u64)
    }
}

/// Every tile ends 32 lanes on a word: half a word each, taken all together.
fn tails(grid: &Grid, word_bits: u8) -> u64 {
    grid.tiles() as u64 * exponent::LANES as u64 * u64::from(word_bits / 8) / 2
}

/// Ramps: one bit less for each step of the exponent, as a step of constant size needs; nothing below `floor` bits.
fn canonical_tables(word_bits: u8) -> impl Iterator<Item = [u8; 32]> {
    let ramp = move |top: i32, floor: i32| -> [u8; 32] {
        std::array::from_fn(|c| match top - c as i32 {
            w if w < floor => 0,
            w => u8::try_from(w).unwrap_or(0).min(word_bits),
        })
    };
    let flat = move |w: u8| [w; 32];
    (2..64).flat_map(move |top| (1..5).map(move |floor| ramp(top, floor))).chain((1..=word_bits).map(flat))
}
