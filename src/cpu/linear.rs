//! `delta_linear` and `delta_linear_grouped`: which rows of x go to which kernel. One tenant is a batch of one.
//!
//! Few rows of a tenant (any number when deterministic): tiles are not restored, see `fused`. Many rows of one tenant in
//! `mode = "fast"`: a tile is restored into scratch as f32, then multiplied with every row of x of that tenant. Either
//! way an output that is not finite is computed again from the fine-tuned words themselves, in f64 (see `wide`).
//!
//! **Longest chain of roundings** of one output (D of DESIGN section 5): small m: `4096 / 16 + 4` for a base product,
//! one per 4096 columns of the base, one per record of its lane (two bytes of gap or one, padding adds none), one for the
//! bias; for `exponent` and `raw` the columns of their own tiles count. Large m: `1024 / 16 + 4` for a block of 1024
//! columns, one per block, one for the bias.

use super::Mode;
use super::counters;
use super::dot::{PanelProduct, Rows, Split, Strides, ToSplit};
use super::exec::{Executor, try_run};
use super::float::{Float, padded};
use super::fused::{BASE_COLUMNS, Block};
use super::scratch::{self, Scratch};
use super::simd::{GROUP, LANES, Simd};
use super::weights::Weights;
use crate::codec::Encoding;
use crate::error::Result;
use crate::matrix::Matrix;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Rows of x of one block.
pub(super) const BLOCK: usize = LANES;

/// Rows of x above which a restored panel pays in `mode = "fast"`. Below, restoring costs as much as walking the entries
/// once more for the second block of rows (measured at 4096 x 4096 bf16, AVX2: equal at 32 rows from 3 to 30 % changed,
/// 10 to 30 % faster at 64).
const PANEL_ABOVE: usize = 2 * BLOCK;

/// Totals of one task on a restored panel (512 KiB); more rows of x are done in blocks.
const PANEL_SUMS: usize = 1 << 17;

/// So many bytes of a base stay in the cache from one block of rows of x to the next.
const CACHED_BYTES: usize = 8 << 20;

/// Rows of W of one small-m task, at most: their totals are scratch (64 KiB).
const MOST_ROWS: usize = 1024;

/// The rows of x of one tenant.
pub(super) struct Segment<'a> {
    pub(super) weights: Weights<'a>,
    pub(super) bias: Option<&'a [u8]>,
    /// Their places in the order of the call.
    pub(super) rows: Range<usize>,
    /// The slot that the delta comes from, if it is one of many.
    pub(super) slot: Option<usize>,
}

impl Segment<'_> {
    /// What errors call the delta.
    pub(super) fn name(&self) -> String {
        self.slot.map_or_else(|| "delta".into(), |slot| format!("slots[{slot}]"))
    }

    /// The fine-tuned words of tile `index`, row after row.
    pub(super) fn restore<S: Simd>(&self, s: S, index: usize, words: &mut [u8]) -> Result<()> {
        self.weights.words(s, index, words).map_err(|e| match self.slot {
            Some(slot) => e.within(format_args!("slots[{slot}]")),
            None => e,
        })
    }
}

/// How the rows of a segment are computed; segments are to be in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// Together with other tenants' rows, on the base's words.
    Shared,
    /// On tiles of the tenant's own words.
    Own,
    /// On restored panels.
    Panels,
}

impl Way {
    pub(super) fn of(weights: &Weights<'_>, rows: usize, mode: Mode) -> Self {
        match weights.encoding() {
            _ if rows > PANEL_ABOVE && mode == Mode::Fast => Self::Panels,
            Encoding::Unchanged | Encoding::Sparse => Self::Shared,
            Encoding::Exponent | Encoding::Raw => Self::Own,
        }
    }
}

/// What one call multiplies.
pub(super) struct Call<'a> {
    pub(super) x: &'a [u8],
    pub(super) base: Matrix<'a>,
    /// The row of x at each place; as they are if none.
    pub(super) order: Option<&'a [usize]>,
    /// Place after place, [`Way`] after way.
    pub(super) segments: &'a [Segment<'a>],
    pub(super) mode: Mode,
}

/// One call, in the dtype of its words.
pub(super) struct Job<'a, D: Float> {
    /// No other call's.
    pub(super) id: u64,
    pub(super) x: &'a [u8],
    pub(super) base: Matrix<'a>,
    order: Option<&'a [usize]>,
    pub(super) out: &'a [D::Shared],
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Tasks of one kind: chunks of rows of W by blocks of rows of x.
struct Part<'a> {
    way: Way,
    segments: &'a [Segment<'a>],
    /// Rows of W of a task.
    rows: usize,
    /// Places of rows of x.
    places: Range<usize>,
    /// Rows of x of a task.
    block: usize,
    /// Whether all blocks of x come one after another for the same rows of W, which are then read from memory once;
    /// else all rows of W for the same block of x, which is then converted to f32 once.
    again_cached: bool,
    /// Which of all tasks are these.
    tasks: Range<usize>,
}

/// Run a checked call.
pub(super) fn run<S: Simd, D: Float>(
    s: S,
    call: &Call<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let shape = call.base.shape();
    let job = Job::<D> {
        id: CALLS.fetch_add(1, Relaxed),
        x: call.x,
        base: call.base,
        order: call.order,
        out: D::share(out, "out")?,
        n: shape.n,
        k: shape.k,
    };
    let parts = job.parts(call, exec.threads());
    let tasks = parts.last().map_or(0, |part| part.tasks.end);
    try_run(exec, tasks, |task| {
        let part = &parts[parts.partition_point(|part| part.tasks.end <= task)];
        scratch::with(|sc| job.task(s, part, task - part.tasks.start, sc))
    })
}

impl<D: Float> Job<'_, D> {
    /// The row of x at place `at`.
    pub(super) fn row(&self, at: usize) -> usize {
        self.order.map_or(at, |order| order[at])
    }

    fn parts<'a>(&self, call: &Call<'a>, threads: usize) -> Vec<Part<'a>> {
        let mut parts: Vec<Part<'a>> = Vec::new();
        let way = |s: &Segment<'_>| Way::of(&s.weights, s.rows.len(), call.mode);
        let alike = |a: &Segment<'_>, b: &Segment<'_>| way(a) == Way::Shared && way(b) == Way::Shared;
        for segments in call.segments.chunk_by(alike) {
            let (first, last) = (&segments[0], &segments[segments.len() - 1]);
            let (way, places) = (way(first), first.rows.start..last.rows.end);
            let grid = first.weights.grid();
            let again_cached =
                way == Way::Shared && places.len() > BLOCK && self.base.bytes().len() > CACHED_BYTES;
            let (rows, block) = match way {
                Way::Panels => (grid.tile_rows, PANEL_SUMS / grid.tile_rows),
                Way::Shared if again_cached => {
                    // Many rows of W, since each block of x is converted anew for them (10 to 20 % of the time at 256).
                    let cached = CACHED_BYTES / self.base.row_bytes();
                    let rows = self.n.div_ceil(2 * threads.max(1)).min(cached).clamp(LANES, MOST_ROWS);
                    (rows.next_multiple_of(LANES), BLOCK)
                }
                Way::Shared => (self.chunk_rows(segments.len(), BASE_COLUMNS, LANES), BLOCK),
                Way::Own => (self.chunk_rows(1, grid.tile_cols, grid.tile_rows), BLOCK),
            };
            let start = parts.last().map_or(0, |part| part.tasks.end);
            let tasks = start..start + self.n.div_ceil(rows) * places.len().div_ceil(block);
            parts.push(Part { way, segments, rows, places, block, again_cached, tasks });
        }
        parts
    }

    /// Rows of W of one small-m task: enough to pay for converting x, few enough for every thread to have some.
    fn chunk_rows(&self, tenants: usize, columns: usize, tile_rows: usize) -> usize {
        // A thread keeps x as f32 from task to task only if nothing else takes its place.
        let most = match (self.k <= columns, tenants) {
            (true, 1) => 64,
            (true, _) => 128,
            _ => 256,
        };
        self.n.div_ceil(16).min(most).next_multiple_of(tile_rows)
    }

    fn task<S: Simd>(&self, s: S, part: &Part<'_>, task: usize, sc: &mut Scratch) -> Result<()> {
        let (blocks, chunks) = (part.places.len().div_ceil(part.block), self.n.div_ceil(part.rows));
        let (chunk, at) =
            if part.again_cached { (task / blocks, task % blocks) } else { (task % chunks, task / chunks) };
        let (r0, m0) = (chunk * part.rows, part.places.start + at * part.block);
        let r1 = (r0 + part.rows).min(self.n);
        let block = Block { r0, r1, m0, m: part.block.min(part.places.end - m0) };
        match part.way {
            Way::Panels => self.panels(s, block, &part.segments[0], sc),
            Way::Own => self.own(s, block, &part.segments[0], sc),
            Way::Shared => {
                let first = part.segments.partition_point(|s| s.rows.end <= m0);
                let end = part.segments.partition_point(|s| s.rows.start < m0 + block.m);
                self.shared(s, block, &part.segments[first..end], sc)
            }
        }
    }

    /// Large m: one band of rows of W and many rows of x of one tenant, through restored tiles.
    fn panels<S: Simd>(&self, s: S, block: Block, segment: &Segment<'_>, sc: &mut Scratch) -> Result<()> {
        let grid = segment.weights.grid();
        let across = grid.tile_cols_count();
        let (rows, m) = (block.r1 - block.r0, block.m);
        sc.sums.zeroed(m * rows);
        for tc in 0..across {
            let index = block.r0 / grid.tile_rows * across + tc;
            let rect = grid.rect(index);
            let words = sc.words.bytes_mut(rect.words() * D::BYTES);
            segment.restore(s, index, words)?;
            counters::count_panel();
            let len = rect.cols() * D::BYTES;
            let groups = padded(rect.cols()) / GROUP;
            let panel: &mut [Split] = sc.panel.get(rows * groups * GROUP).as_chunks_mut().0;
            let words = Rows { bytes: words, stride: len, len };
            s.run(ToSplit::<D> { words, rows, to: panel, groups, dtype: PhantomData });
            let x = Rows { bytes: &self.x[rect.c0 * D::BYTES..], stride: self.k * D::BYTES, len };
            let (row, sums) = (|j| self.row(block.m0 + j), sc.sums.all_mut());
            s.run(PanelProduct::<D, _> { x, row, m, panel, groups, rows, sums, dtype: PhantomData });
        }
        let sums = std::mem::take(&mut sc.sums);
        let strides = Strides { row: 1, column: rows };
        let done = (0..m).step_by(BLOCK).try_for_each(|j| {
            let block = Block { m0: block.m0 + j, m: BLOCK.min(m - j), ..block };
            self.finish(s, block, std::slice::from_ref(segment), (&sums.all()[j * rows..], strides), sc)
        });
        sc.sums = sums;
        done
    }
}
