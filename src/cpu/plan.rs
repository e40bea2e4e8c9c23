//! The cost model of the products: which kernel computes which rows of x, and how many rows of W a task takes. Every such
//! choice is made here. But for `panel_above` and `decoded_above` in `mode = "fast"`, none changes a bit of the result.
//!
//! **Model**, 16-bit words on Zen 3 (AVX2, 3.3 GHz, two cores that read 20 GB/s): a product with few rows takes about
//! `max(bytes / 20 GB/s, m * n * k / 16 per cycle and core) + entries`, where `bytes` are those of the base, read once for
//! all tenants, and of the deltas; `entries` are `gathered_ns` a record of sixteen and row of x, or `transposed_ns` a
//! record whatever the rows. `exponent` adds 0.33 ns per word and block of sixteen rows for decoding, which no other tenant
//! shares; restoring a panel costs the same once, and 0.1 ns per word as f32. Both are computed, not waited for, so the second
//! core helps where memory does not.
//!
//! **Calibration.** The numbers are a [`Costs`]; `python benches/calibrate.py` times each of them beside other values of it on
//! the machine at hand and says what the defaults lose. `XORZ_COSTS="panel_above=64,cached_bytes=4194304"` in the environment
//! takes other values, in mode fast and beyond the caches the first thing to try on a machine unlike the one above.
//!
//! `XORZ_TRACE=1` in the environment prints one line per call to stderr: what was chosen, and why.

use super::job::Mode;
use super::linear::Segment;
use super::weights::Weights;
use crate::codec::{Encoding, Grid};
use crate::matrix::{Dtype, Shape};
use crate::vector::bf16dot;
use crate::vector::float::Float;
use crate::vector::simd::{SIMD_LANES, Simd};
use std::sync::OnceLock;

/// Rows of x of one block.
pub(super) const BLOCK: usize = SIMD_LANES;

/// Columns of the base of one dot product, whatever the grids of the deltas on it.
pub(super) const BASE_COLUMNS: usize = Grid::MAX_COLS;

/// Totals of one task on a restored panel (512 KiB); more rows of x are done in blocks.
pub(super) const PANEL_SUMS: usize = 1 << 17;

/// Rows of W of one small-m task, at most: their totals are scratch (64 KiB).
const MOST_ROWS: usize = 1024;

/// What the model knows of a machine. But for `panel_above` and `decoded_above` in `mode = "fast"`, no value changes a bit of a result.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Costs {
    /// Rows of x of one tenant above which a restored panel pays in `mode = "fast"`. Below, restoring costs as much as
    /// walking the entries once more for the second block of rows.
    pub(super) panel_above: usize,
    /// The same for `exponent`, where a second block of rows means decoding once more: 0.6 of the time at 24 rows.
    pub(super) decoded_above: usize,
    /// The same for panels that the bf16 dot product multiplies, of any encoding and of the base.
    pub(super) packed_above: usize,
    /// A record of sixteen entries and a row of x, gathered: ns.
    pub(super) gathered_ns: f64,
    /// A record of sixteen entries and up to sixteen rows of x, transposed: ns. More where changes are so rare that every
    /// entry finds its row of x outside of the second cache: not for less than one word in `rare`.
    pub(super) transposed_ns: f64,
    /// See `transposed_ns`.
    pub(super) rare: u64,
    /// So many bytes of a base stay in the cache from one block of rows of x to the next.
    pub(super) cached_bytes: usize,
    /// Words of W that a small-m task takes at least: some 5 us. Waking another thread for less takes longer.
    pub(super) least_words: usize,
}

impl Costs {
    /// Measured on Zen 3 with AVX2. AVX-512 takes the same until it has been timed.
    const DEFAULT: Self = Self {
        panel_above: 2 * BLOCK,
        decoded_above: BLOCK,
        packed_above: BLOCK,
        gathered_ns: 6.5,
        transposed_ns: 25.0,
        rare: 64,
        cached_bytes: 8 << 20,
        least_words: 1 << 15,
    };

    /// Those in force, read once.
    pub(super) fn active() -> &'static Self {
        static ACTIVE: OnceLock<Costs> = OnceLock::new();
        ACTIVE.get_or_init(|| {
            let asked = std::env::var("XORZ_COSTS").unwrap_or_default();
            Self::parse(&asked).unwrap_or_else(|wrong| {
                eprintln!("xorz: XORZ_COSTS is ignored: {wrong}");
                Self::DEFAULT
            })
        })
    }

    /// The defaults, but for what `name=value,name=value` says.
    fn parse(asked: &str) -> Result<Self, String> {
        let mut costs = Self::DEFAULT;
        for part in asked.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (name, value) =
                part.split_once('=').ok_or_else(|| format!("\"{part}\" is not name=value"))?;
            let wrong = |range| format!("{name} is \"{value}\", not {range}");
            let count = |least: usize| {
                value.parse().ok().filter(|v| *v >= least).ok_or_else(|| wrong("a count in range"))
            };
            let ns = || {
                value.parse().ok().filter(|v: &f64| *v > 0.0 && v.is_finite()).ok_or_else(|| wrong("above 0"))
            };
            match name {
                "panel_above" => costs.panel_above = count(0)?,
                "decoded_above" => costs.decoded_above = count(0)?,
                "packed_above" => costs.packed_above = count(0)?,
                "gathered_ns" => costs.gathered_ns = ns()?,
                "transposed_ns" => costs.transposed_ns = ns()?,
                "rare" => costs.rare = count(1)? as u64,
                "cached_bytes" => costs.cached_bytes = count(0)?,
                "least_words" => costs.least_words = count(1)?,
                _ => return Err(format!("there is no \"{name}\"")),
            }
        }
        Ok(costs)
    }
}

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
    /// Of a mode, on an instance and a dtype.
    pub(super) fn of<S: Simd, D: Float>(mode: Mode) -> Self {
        match mode {
            Mode::Deterministic => Self::Deterministic,
            Mode::Fast if S::BF16_DOT && D::DTYPE == Dtype::BF16 => Self::Bf16,
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

/// Whether the entries of `m` rows of x of one tenant go through the transposed kernel rather than the gathering one.
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
    /// Whether all blocks of x come one after another for the same rows of W, which are then read from memory once;
    /// else all rows of W for the same block of x, which is then converted to f32 once.
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
                // Many rows of W, since each block of x is converted anew for them (10 to 20 % of the time at 256).
                let cached = Costs::active().cached_bytes / row_bytes;
                let rows = n.div_ceil(2 * threads.max(1)).min(cached).clamp(SIMD_LANES, MOST_ROWS);
                Self { rows: rows.next_multiple_of(SIMD_LANES), block: BLOCK, again_cached: true }
            }
            ProductWay::Shared => Self::chunks(base, tenants, BASE_COLUMNS, SIMD_LANES),
            ProductWay::Own => Self::chunks(base, 1, grid.tile_cols, grid.tile_rows),
        }
    }

    /// Of segments that are computed one way by the bf16 dot product: no row of x is converted, and tiles of every segment
    /// begin and end with a task.
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
    fn chunks(base: Shape, tenants: usize, columns: usize, tile_rows: usize) -> Self {
        // A thread keeps x as f32 from task to task only if nothing else takes its place.
        let most = match (base.k <= columns, tenants) {
            (true, 1) => 64,
            (true, _) => 128,
            _ => 256,
        };
        let least = (Costs::active().least_words / base.k.max(1)).min(MOST_ROWS);
        let rows = base.n.div_ceil(16).min(most).max(least.min(base.n)).next_multiple_of(tile_rows);
        Self { rows, block: BLOCK, again_cached: false }
    }
}

/// Whether `XORZ_TRACE` asks for a line per call; it is read once.
pub(super) fn traces() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("XORZ_TRACE").is_some_and(|v| !v.is_empty() && v != "0"))
}

/// The choices of one call, for people: `(segments, sizes)` of each of its parts.
pub(super) fn describe<S: Simd>(
    (base, dtype): (Shape, Dtype),
    sums: Sums,
    threads: usize,
    parts: &[(&[Segment<'_>], Sizes)],
) -> String {
    let mut out = format!("xorz: {base} {dtype}, {sums:?}, {}, {threads} threads", S::NAME);
    for (segments, sizes) in parts {
        let rows: usize = segments.iter().map(|s| s.rows.len()).sum();
        let way = ProductWay::of(&segments[0].weights, segments[0].rows.len(), sums);
        let tasks = base.n.div_ceil(sizes.rows.max(1)) * rows.div_ceil(sizes.block.max(1));
        out += &format!("; rows {rows}, tenants {}, {}", segments.len(), why(way, segments, sums));
        out += &format!(", {tasks} tasks of {} rows of W", sizes.rows);
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
    fn costs_are_read_by_name_and_refused_by_name() {
        assert_eq!(Costs::parse(""), Ok(Costs::DEFAULT));
        let two = Costs::parse("panel_above=64, rare=7").unwrap();
        assert_eq!(two, Costs { panel_above: 64, rare: 7, ..Costs::DEFAULT });
        for (asked, named) in [
            ("rare", "\"rare\" is not name=value"),
            ("rare=0", "rare is \"0\""),
            ("gathered_ns=inf", "gathered_ns is \"inf\""),
            ("transposed_ns=-1", "transposed_ns is \"-1\""),
            ("least_words=x", "least_words is \"x\""),
            ("speed=1", "no \"speed\""),
        ] {
            assert!(Costs::parse(asked).unwrap_err().contains(named), "{asked}");
        }
    }

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
