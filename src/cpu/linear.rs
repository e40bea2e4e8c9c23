//! `delta_linear` and `delta_linear_grouped`: which rows of x go to which kernel. One tenant is a batch of
//! one.
//!
//! Few rows of a tenant (any number when deterministic): tiles are not restored, see `fused`. Many rows of
//! one tenant in `mode = "fast"`: a tile is restored into scratch as f32, then multiplied with every row of x
//! of that tenant. Either way an output that is not finite is computed again from the fine-tuned words
//! themselves, in f64 (see `again_f64`).
//!
//! **Longest chain of roundings** of one output (D of docs/numerics.md): small m: `4096 / 16 + 4` for a base
//! product, one per 4096 columns of the base, one per record of its lane (two bytes of gap or one, padding
//! adds none), one for the bias; for `exponent` and `raw` the columns of their own tiles count. Large m:
//! `1024 / 16 + 4` for a block of 1024 columns, one per block, one for the bias.

use super::costs::Costs;
use super::counters;
use super::dot::{PanelProduct, Rows, Split, Strides, ToSplit};
use super::job::{Block, LinearJob, Mode, Segment, check_words};
use super::plan::{self, BLOCK, ProductWay, Sizes, Sums};
use super::scratch::{self, Scratch};
use super::weights::Weights;
use crate::codec::Encoding;
use crate::error::Result;
use crate::matrix::{Matrix, Shape};
use crate::resident::Resident;
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::exec::{Executor, Tasks, try_run};
use crate::vector::float::{Float, padded, with_float};
use crate::vector::simd::{GROUP, Simd};
use crate::vector::trace::traces;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What [`delta_linear`] multiplies.
#[derive(Clone, Debug)]
pub struct LinearArgs<'a> {
    /// x, `[m, k]` words of the base's dtype, any alignment.
    pub x: &'a [u8],
    /// Rows of x.
    pub m: usize,
    /// The base, `[n, k]` of f32, bf16 or f16, any alignment.
    pub base: Matrix<'a>,
    /// The delta of a matrix of the base's dtype and shape. Its base digest is not checked here.
    pub delta: Resident<'a>,
    /// Bias, `[n]` words of the base's dtype, any alignment.
    pub bias: Option<&'a [u8]>,
    /// The order of summing.
    pub mode: Mode,
}

impl LinearArgs<'_> {
    pub(super) fn check(&self, out: &[u8]) -> Result<()> {
        self.delta.check_base(&self.base)?;
        let Shape { n, k } = self.base.shape();
        check_words("x", self.x, Shape { n: self.m, k }, self.base.dtype())?;
        check_words("out", out, Shape { n: self.m, k: n }, self.base.dtype())?;
        self.bias.map_or(Ok(()), |b| check_words("bias", b, Shape { n: 1, k: n }, self.base.dtype()))
    }
}

/// `y = x @ W_ft^T + bias` on base and delta: `out` takes `[m, n]` words of the base's dtype, aligned to
/// them.
///
/// f32 sums of the fine-tuned weights' products, one rounding to the dtype at the end; outputs that are not
/// finite in f32 are computed again in f64. At most 2 MiB of scratch per thread. The bits depend on the
/// arguments only: not on `exec`, not on the machine's instruction set.
///
/// # Errors
/// `Unsupported` for another dtype than f32, bf16, f16; `Mismatch` where base, delta, x, bias and out do not
/// fit; `InvalidArgument` for a misaligned `out`; `Corrupt` or `Truncated` for bad delta bytes, `out` then
/// holds unspecified words.
pub fn delta_linear(args: &LinearArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    delta_linear_on(Isa::active()?, args, out, exec)
}

/// [`delta_linear`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_linear`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_linear_on(isa: Isa, args: &LinearArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    on_isa!(isa, s => with_float!(args.base.dtype(), D => {
        args.check(out)?;
        let weights = Weights::new(args.base, Some(&args.delta));
        let segment = Segment { weights, bias: args.bias, rows: 0..args.m, slot: None };
        let (x, base, segments) = (args.x, args.base, &[segment]);
        let call = ProductCall { x, base, order: None, segments, mode: args.mode };
        if out.is_empty() { Ok(()) } else { run_linear::<_, D>(s, &call, out, exec) }
    }))?
}

/// What one call multiplies.
pub(super) struct ProductCall<'a> {
    pub(super) x: &'a [u8],
    pub(super) base: Matrix<'a>,
    /// The row of x at each place; as they are if none.
    pub(super) order: Option<&'a [usize]>,
    /// Place after place, one [`ProductWay`] after the other.
    pub(super) segments: &'a [Segment<'a>],
    pub(super) mode: Mode,
}

/// Pieces of work of one kind: chunks of rows of W by blocks of rows of x.
struct LinearTasks<'a> {
    way: ProductWay,
    segments: &'a [Segment<'a>],
    sizes: Sizes,
    /// Places of rows of x.
    places: Range<usize>,
    /// Which of all pieces are these.
    tasks: Range<usize>,
}

impl LinearTasks<'_> {
    /// Words of W of each piece of work, once for every block of rows of x: what its tasks are made up by.
    fn words(&self, w: Shape) -> impl Iterator<Item = usize> + Clone {
        let blocks = self.sizes.block.min(self.places.len()).div_ceil(BLOCK);
        std::iter::repeat_n(self.sizes.rows.min(w.n) * w.k * blocks, self.tasks.len())
    }
}

/// Run a checked call.
pub(super) fn run_linear<S: Simd, D: Float>(
    s: S,
    call: &ProductCall<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let (shape, sums) =
        (call.base.shape(), Sums::of::<S, D>(call.mode, call.segments.last().map_or(0, |s| s.rows.end)));
    let job = LinearJob::<D> {
        id: CALLS.fetch_add(1, Relaxed),
        x: call.x,
        base: call.base,
        order: call.order,
        out: D::share(out, "out")?,
        n: shape.n,
        k: shape.k,
        bf16: sums == Sums::Bf16,
    };
    let parts = job.parts(call, sums, exec.threads());
    let (least, words) = (Costs::active().least_words, parts.iter().flat_map(|part| part.words(shape)));
    if traces() {
        let chosen: Vec<_> = parts.iter().map(|part| (part.segments, part.sizes)).collect();
        let tasks = Tasks::of(least, words.clone()).len();
        eprintln!("{}", plan::describe::<S>((shape, D::DTYPE), sums, (tasks, exec.threads()), &chosen));
    }
    try_run(exec, least, words, |task| {
        let part = &parts[parts.partition_point(|part| part.tasks.end <= task)];
        scratch::with(|sc| job.task(s, part, task - part.tasks.start, sc))
    })
}

impl<D: Float> LinearJob<'_, D> {
    fn parts<'a>(&self, call: &ProductCall<'a>, sums: Sums, threads: usize) -> Vec<LinearTasks<'a>> {
        let mut parts: Vec<LinearTasks<'a>> = Vec::new();
        let way = |s: &Segment<'_>| ProductWay::of(&s.weights, s.rows.len(), sums);
        let alike = |a: &Segment<'_>, b: &Segment<'_>| {
            let raw = |s: &Segment<'_>| s.weights.encoding() == Encoding::Raw;
            way(a) == way(b)
                && (way(a) == ProductWay::Shared
                    || self.bf16 && !(way(a) == ProductWay::Own && (raw(a) || raw(b))))
        };
        for segments in call.segments.chunk_by(alike) {
            let (first, last) = (&segments[0], &segments[segments.len() - 1]);
            let (way, places) = (way(first), first.rows.start..last.rows.end);
            let base = (self.base.shape(), D::BYTES);
            let sizes = if self.bf16 {
                Sizes::of_bf16(way, base.0, segments, threads)
            } else {
                Sizes::of(way, base, first.weights.grid(), (segments.len(), places.len()), threads)
            };
            let start = parts.last().map_or(0, |part| part.tasks.end);
            let tasks = start..start + self.n.div_ceil(sizes.rows) * places.len().div_ceil(sizes.block);
            parts.push(LinearTasks { way, segments, sizes, places, tasks });
        }
        parts
    }

    fn task<S: Simd>(&self, s: S, part: &LinearTasks<'_>, task: usize, sc: &mut Scratch) -> Result<()> {
        let Sizes { rows, block, again_cached } = part.sizes;
        let (blocks, chunks) = (part.places.len().div_ceil(block), self.n.div_ceil(rows));
        let (chunk, at) =
            if again_cached { (task / blocks, task % blocks) } else { (task % chunks, task / chunks) };
        let (r0, m0) = (chunk * rows, part.places.start + at * block);
        let r1 = (r0 + rows).min(self.n);
        let block = Block { r0, r1, m0, m: block.min(part.places.end - m0) };
        let within = || {
            let first = part.segments.partition_point(|s| s.rows.end <= m0);
            let end = part.segments.partition_point(|s| s.rows.start < m0 + block.m);
            &part.segments[first..end]
        };
        match part.way {
            ProductWay::Panels if self.bf16 => self.packed(s, block, within(), sc),
            ProductWay::Panels => self.panels(s, block, &part.segments[0], sc),
            ProductWay::Own if self.bf16 && part.segments[0].weights.encoding() == Encoding::Exponent => {
                self.decoded(s, block, within(), sc)
            }
            ProductWay::Own => self.own(s, block, &part.segments[0], sc),
            ProductWay::Shared => self.shared(s, block, within(), sc),
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
            let panel: &mut [Split] = sc.vectors.get(rows * groups * GROUP).as_chunks_mut().0;
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
