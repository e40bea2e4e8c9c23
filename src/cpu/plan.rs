//! The cost model of the products: which kernel computes which rows of x, and how many rows of W a task
//! takes. Every such choice is made here. In `mode = "deterministic"` none changes a bit of the result.
//!
//! **Model**, 16-bit words on Zen 3 (AVX2, 3.3 GHz, two cores that read 20 GB/s): a product with few rows
//! takes about `max(bytes / 20 GB/s, m * n * k / 16 per cycle and core) + entries`, where `bytes` are those
//! of the base, read once for all tenants, and of the deltas; `entries` are `gathered_ns` a record of sixteen
//! and row of x, or `transposed_ns` a record whatever the rows. `exponent` adds 0.33 ns per word and block of
//! sixteen rows for decoding, which no other tenant shares; restoring a panel costs the same once, and 0.1 ns
//! per word as f32. Both are computed, not waited for, so the second core helps where memory does not.
//!
//! What it knows of a machine is in `costs`.
//!
//! `XORZ_TRACE=1` in the environment prints one line per call to stderr: what was chosen, and why.

use super::costs::Costs;
use super::job::{Mode, Segment};
use super::weights::Weights;
use crate::codec::{Encoding, Grid};
use crate::matrix::{Dtype, Shape};
use crate::vector::bf16dot;
use crate::vector::float::Float;
use crate::vector::processor::Processor;
use crate::vector::simd::{SIMD_LANES, Simd};

/// Rows of x of one block.
pub(super) const BLOCK: usize = SIMD_LANES;

/// Columns of the base of one dot product, whatever the grids of the deltas on it.
pub(super) const BASE_COLUMNS: usize = Grid::MAX_COLS;

/// Totals of one task on a restored panel (512 KiB); more rows of x are done in blocks.
pub(super) const PANEL_SUMS: usize = 1 << 17;

/// Rows of W of one small-m task, at most: their totals are scratch (64 KiB).
const MOST_ROWS: usize = 1024;

/// How a call sums: what its mode comes to on a dtype and a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sums {
    /// In one order for every number of rows.
    Deterministic,
    /// In the fastest order, by f32 products.
    Fast,
    /// In the fastest order, by the machine's bf16 dot product.
    Bf16,
}

impl Sums {
    /// Of a mode and `rows` rows of x, on an instance and a dtype.
    pub(super) fn of<S: Simd, D: Float>(mode: Mode, rows: usize) -> Self {
        let dots = || rows < Costs::active().widen_from;
        match mode {
            Mode::Deterministic => Self::Deterministic,
            Mode::Fast if S::BF16_DOT && D::DTYPE == Dtype::BF16 && dots() => Self::Bf16,
            Mode::Fast => Self::Fast,
        }
    }
}

/// How the rows of a segment are computed; segments are to be in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ProductWay {
    /// Together with other tenants' rows, on the base's words.
    Shared,
    /// On tiles of the tenant's own words.
    Own,
    /// On restored panels.
    Panels,
}

impl ProductWay {
    /// Of `rows` rows of x with one tenant's weights.
    pub(super) fn of(weights: &Weights<'_>, rows: usize, sums: Sums) -> Self {
        match weights.encoding() {
            encoding if rows > panels_above(encoding, sums) => Self::Panels,
            Encoding::Unchanged | Encoding::Sparse => Self::Shared,
            Encoding::Exponent | Encoding::Raw => Self::Own,
        }
    }
}

/// Rows of x of one tenant above which panels are restored from an encoding.
fn panels_above(encoding: Encoding, sums: Sums) -> usize {
    let costs = Costs::active();
    match (sums, encoding) {
        (Sums::Deterministic, _) => usize::MAX,
        (Sums::Bf16, _) => costs.packed_above,
        (Sums::Fast, Encoding::Exponent) => costs.decoded_above,
        (Sums::Fast, _) => costs.panel_above,
    }
}

/// Whether the entries of `m` rows of x of one tenant go through the transposed kernel rather than the
/// gathering one.
pub(super) fn transposed(weights: &Weights<'_>, m: usize) -> bool {
    let words = weights.base.shape().n as u64 * weights.base.shape().k as u64;
    let costs = Costs::active();
    weights.encoding() == Encoding::Sparse
        && 2.0 * costs.transposed_ns <= m as f64 * costs.gathered_ns
        && weights.changed().saturating_mul(costs.rare) >= words
}

/// What the tasks of some segments of one way take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Rows of W of a task.
    pub(super) rows: usize,
    /// Rows of x of a task.
    pub(super) block: usize,
    /// Whether all blocks of x come one after another for the same rows of W, which are then read from memory
    /// once; else all rows of W for the same block of x, which is then converted to f32 once.
    pub(super) again_cached: bool,
}

impl Sizes {
    /// Of `rows` rows of x of `tenants` tenants, computed one way; `grid` is the first one's.
    pub(super) fn of(
        way: ProductWay,
        (base, word_bytes): (Shape, usize),
        grid: Grid,
        (tenants, rows): (usize, usize),
        threads: usize,
    ) -> Self {
        let Shape { n, k } = base;
        let row_bytes = (k * word_bytes).max(1);
        match way {
            ProductWay::Panels => {
                Self { rows: grid.tile_rows, block: PANEL_SUMS / grid.tile_rows, again_cached: false }
            }
            ProductWay::Shared if rows > BLOCK && n * row_bytes > Costs::active().cached_bytes => {
                // Many rows of W, since each block of x is converted anew for them (10 to 20 % of the time at
                // 256).
                let cached = Costs::active().cached_bytes / row_bytes;
                let rows = n.div_ceil(2 * threads.max(1)).min(cached).clamp(SIMD_LANES, MOST_ROWS);
                Self { rows: rows.next_multiple_of(SIMD_LANES), block: BLOCK, again_cached: true }
            }
            ProductWay::Shared => Self::chunks(base, tenants, SIMD_LANES),
            ProductWay::Own => Self::chunks(base, 1, grid.tile_rows),
        }
    }

    /// Of segments that are computed one way by the bf16 dot product: no row of x is converted, and tiles of
    /// every segment begin and end with a task.
    pub(super) fn of_bf16(way: ProductWay, base: Shape, segments: &[Segment<'_>], threads: usize) -> Self {
        let tallest = segments.iter().map(|s| s.weights.grid().tile_rows).max().unwrap_or(SIMD_LANES);
        let least = (Costs::active().least_words / base.k.max(1)).min(MOST_ROWS).min(base.n);
        let places = segments.iter().map(|s| s.rows.len()).sum::<usize>().max(1);
        if way == ProductWay::Panels {
            return Self { rows: tallest.max(bf16dot::PANEL_ROWS), block: places, again_cached: false };
        }
        // Eight tasks per thread, so that none waits long for another.
        let rows = base.n.div_ceil(8 * threads.max(1)).clamp(1, MOST_ROWS).max(least);
        Self { rows: rows.next_multiple_of(tallest.max(SIMD_LANES)), block: BLOCK, again_cached: false }
    }

    /// Enough rows of W to pay for converting x, few enough for every thread to have some.
    fn chunks(base: Shape, tenants: usize, tile_rows: usize) -> Self {
        // A thread keeps x as f32 from task to task only if nothing else takes its place.
        let most = match (base.k <= BASE_COLUMNS, tenants) {
            (true, 1) => 64,
            (true, _) => 128,
            _ => 256,
        };
        let least = (Costs::active().least_words / base.k.max(1)).min(MOST_ROWS);
        let rows = base.n.div_ceil(16).min(most).max(least.min(base.n)).next_multiple_of(tile_rows);
        Self { rows, block: BLOCK, again_cached: false }
    }
}

/// The choices of one call, for people: `(segments, sizes)` of each of its parts.
pub(super) fn describe<S: Simd>(
    (base, dtype): (Shape, Dtype),
    sums: Sums,
    (tasks, threads): (usize, usize),
    parts: &[(&[Segment<'_>], Sizes)],
) -> String {
    let (machine, isa) = (Processor::here(), S::NAME);
    let mut out =
        format!("xorz: {base} {dtype}, {sums:?}, {isa}, {machine}, {tasks} tasks on {threads} threads");
    for (segments, sizes) in parts {
        let rows: usize = segments.iter().map(|s| s.rows.len()).sum();
        let way = ProductWay::of(&segments[0].weights, segments[0].rows.len(), sums);
        let pieces = base.n.div_ceil(sizes.rows.max(1)) * rows.div_ceil(sizes.block.max(1));
        out += &format!("; rows {rows}, tenants {}, {}", segments.len(), why(way, segments, sums));
        out += &format!(", {pieces} pieces of {} rows of W", sizes.rows);
        out += if sizes.again_cached { ", each for all blocks of x in turn" } else { "" };
    }
    out
}

fn why(way: ProductWay, segments: &[Segment<'_>], sums: Sums) -> String {
    let encoding = segments[0].weights.encoding();
    match way {
        ProductWay::Panels => {
            let above = panels_above(encoding, sums);
            format!("on panels restored from {encoding:?} (more than {above} rows of one tenant)")
        }
        ProductWay::Own => format!("on words decoded from {encoding:?} on the way"),
        ProductWay::Shared => {
            let m = |s: &Segment<'_>| s.rows.len().min(BLOCK);
            let changes = |s: &&Segment<'_>| s.weights.encoding() == Encoding::Sparse;
            let many = segments.iter().filter(|s| transposed(&s.weights, m(s))).count();
            let all = segments.iter().filter(changes).count();
            let not = if sums == Sums::Deterministic { " (never panels: deterministic)" } else { "" };
            format!("on the base's words{not}, then entries: {} gathered, {many} transposed", all - many)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_whole_tiles_within_scratch() {
        for way in [ProductWay::Shared, ProductWay::Own, ProductWay::Panels] {
            for (n, k) in [(1, 1), (17, 70_000), (4096, 4096), (11_008, 4096), (1 << 20, 64), (3, 0)] {
                let base = Shape { n, k };
                for grid in [Grid::for_sparse(base), Grid::for_exponent(base)] {
                    for rows in [1, 16, 17, 33, 100_000] {
                        let s = Sizes::of(way, (base, 2), grid, (3, rows), 4);
                        let tile = if way == ProductWay::Shared { SIMD_LANES } else { grid.tile_rows };
                        assert!(
                            s.rows > 0 && s.rows.is_multiple_of(tile) && s.block > 0,
                            "{way:?} {base} {rows} {s:?}"
                        );
                        assert!(s.rows * s.block <= PANEL_SUMS, "{way:?} {base} {rows} {s:?}");
                        assert!(!s.again_cached || (way == ProductWay::Shared && rows > BLOCK));
                    }
                }
            }
        }
    }
}
