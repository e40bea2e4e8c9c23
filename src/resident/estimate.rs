//! The cost model of the resident encodings: what each would take, from a sample of the tiles or from all of
//! them.

use super::encode::Source;
use super::header::HEADER_BYTES;
use super::plan::Plan;
use super::widths::{Need, Widths};
use crate::codec::sparse::Builder;
use crate::codec::word::with_word;
use crate::codec::{Encoding, GapKind, Grid, Prefer, Rect, exponent};
use crate::error::Result;
use crate::matrix::Dtype;

/// `sparse` is worth its bytes below this share of the fine-tuned words' own: it decodes several times faster
/// than `exponent` (one add per change against a bit stream per word), but near `raw` it saves nothing.
const SPARSE_WORTH: f64 = 0.75;
/// One tile in this many is read,
const ONE_IN: usize = 64;
/// but at least this many tiles,
const LEAST_TILES: usize = 8;
/// and this many words.
const LEAST_WORDS: usize = 1 << 18;
/// Of a sampled tile of more words, only every n-th row counts for widths, which need far fewer words than
/// `sparse`, whose padding shows in whole tiles alone; n is 4 at most.
const ROW_WORDS: usize = 1 << 13;

/// A plan, and what it is thought to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// How to store the matrix.
    pub plan: Plan,
    /// Bytes of the whole resident delta, scaled from the tiles read. At most one tile's padding off where
    /// `exact`, but for the ends of `exponent` tiles, which are taken as half full.
    pub bytes: u64,
    /// Whether every tile was read.
    pub exact: bool,
}

impl Estimate {
    /// Whether a delta that took `actual_bytes` shows that the sample misled, so that another plan may be
    /// much better: it differs by more than a fifth and 4 KiB. Never after [`estimate_exactly`], nor if
    /// nothing changed after all.
    pub fn is_off(&self, actual_bytes: u64) -> bool {
        let slack = (self.bytes / 5).saturating_add(4096);
        !self.exact && actual_bytes > HEADER_BYTES as u64 && actual_bytes.abs_diff(self.bytes) > slack
    }
}

/// Plan how to store what turns the source's base into its fine_tuned, from a sample: the same tiles every
/// time, about one in 64, spread over the matrix; all of a small matrix (8 tiles, or 262144 words). Where the
/// sample shows no change, any change will be an exception: free for an unchanged matrix, and
/// [`Estimate::is_off`] tells surprises.
///
/// # Errors
/// Those of the source.
pub fn estimate(source: &mut dyn Source, prefer: Prefer) -> Result<Estimate> {
    estimate_by(&mut Oracle, source, prefer, false)
}

/// [`estimate`] from every tile.
///
/// # Errors
/// Those of the source.
pub fn estimate_exactly(source: &mut dyn Source, prefer: Prefer) -> Result<Estimate> {
    estimate_by(&mut Oracle, source, prefer, true)
}

/// [`estimate`], or [`estimate_exactly`], with words counted by `count`.
pub(crate) fn estimate_by(
    count: &mut dyn Count,
    source: &mut dyn Source,
    prefer: Prefer,
    exactly: bool,
) -> Result<Estimate> {
    Survey::new(count, source, exactly).choose(prefer)
}

/// The plan for a given encoding, exactly; the cost model's by size for `Unchanged`, which cannot hold a
/// change.
pub(crate) fn plan_for(source: &mut dyn Source, encoding: Encoding) -> Result<Plan> {
    let shape = source.shape();
    let mut count = Oracle;
    let mut survey = Survey::new(&mut count, source, true);
    match encoding {
        Encoding::Unchanged => Ok(survey.choose(Prefer::Memory)?.plan),
        Encoding::Sparse => Ok(survey.sparse()?.0),
        Encoding::Exponent => Ok(survey.widths()?.plan(shape).0),
        Encoding::Raw => Ok(Plan { encoding, ..Plan::unchanged(shape) }),
    }
}

/// Which of `tiles` tiles of at most `tile_words` words are read: one of each of as many equal runs, at a
/// place that shifts from run to run (by the golden section), so that no period of the matrix hides from it.
fn sample(tiles: usize, tile_words: usize) -> Vec<usize> {
    let least = LEAST_TILES.max(LEAST_WORDS.div_ceil(tile_words.max(1)));
    if tiles <= least {
        return (0..tiles).collect();
    }
    let count = (tiles / ONE_IN).max(least);
    let place = |i: usize| {
        let (start, end) =
            (i * (tiles / count), if i + 1 == count { tiles } else { (i + 1) * (tiles / count) });
        let shift = (i as f64 * 0.618_033_988_749_895).fract();
        start + ((end - start) as f64 * shift) as usize
    };
    (0..count).map(place).collect()
}

/// Something that counts what a tile would take. A tile here has 16 rows at most; its words are packed and
/// aligned to 8 bytes.
pub(crate) trait Count {
    /// Add each word to its class and the width of its difference.
    fn widths(&mut self, dtype: Dtype, base: &[u8], fine_tuned: &[u8], need: &mut Need);
    /// Records with gaps of one byte, of two, and exceptions that `sparse` would take.
    fn records(
        &mut self,
        dtype: Dtype,
        cols: usize,
        tile_cols: usize,
        base: &[u8],
        fine_tuned: &[u8],
    ) -> [u64; 3];
}

/// The plain way of counting, which every fast one must equal.
pub(crate) struct Oracle;

impl Count for Oracle {
    fn widths(&mut self, dtype: Dtype, base: &[u8], fine_tuned: &[u8], need: &mut Need) {
        let mantissa_bits = exponent::mantissa_bits(dtype);
        with_word!(dtype, W => {
            let (base, fine_tuned) = (bytemuck::cast_slice::<_, W>(base), bytemuck::cast_slice::<_, W>(fine_tuned));
            base.iter().zip(fine_tuned).for_each(|(b, f)| need.add(dtype, mantissa_bits, *b, *f));
        });
    }

    fn records(
        &mut self,
        dtype: Dtype,
        cols: usize,
        tile_cols: usize,
        base: &[u8],
        fine_tuned: &[u8],
    ) -> [u64; 3] {
        with_word!(dtype, W => {
            let mut builder = Builder::<W>::default();
            let (base, fine_tuned) = (bytemuck::cast_slice::<_, W>(base), bytemuck::cast_slice::<_, W>(fine_tuned));
            builder.collect(dtype, cols, tile_cols, base, fine_tuned);
            builder.sizes()
        })
    }
}

/// A source that is read tile by tile, and the counter that counts in it.
struct Survey<'a> {
    count: &'a mut dyn Count,
    source: &'a mut dyn Source,
    grid: Grid,
    /// The tiles of that grid that are read.
    tiles: Vec<usize>,
    /// Words of the matrix for each word of the tiles.
    scale: f64,
    exact: bool,
}

impl<'a> Survey<'a> {
    fn new(count: &'a mut dyn Count, source: &'a mut dyn Source, exactly: bool) -> Self {
        let grid = Grid::for_sparse(source.shape());
        let tile_words = grid.tile_rows.min(grid.shape.n) * grid.tile_cols.min(grid.shape.k);
        let tiles = if exactly { (0..grid.tiles()).collect() } else { sample(grid.tiles(), tile_words) };
        let exact = tiles.len() == grid.tiles();
        let read: usize = tiles.iter().map(|t| grid.rect(*t).words()).sum();
        let scale = if exact { 1.0 } else { grid.shape.n as f64 * grid.shape.k as f64 / read as f64 };
        Self { count, source, grid, tiles, scale, exact }
    }

    /// The plan for `prefer`; `raw` only where all else is larger.
    fn choose(&mut self, prefer: Prefer) -> Result<Estimate> {
        let (shape, exact) = (self.grid.shape, self.exact);
        let widths = self.widths()?;
        let word = self.source.dtype().word_bytes() as u64;
        let raw_bytes = shape.bytes(self.source.dtype())? as u64;
        if widths.changed == 0 {
            let plan = if exact { Plan::unchanged(shape) } else { Plan::quiet(shape) };
            return Ok(Estimate { bytes: whole(&plan, word, 0, [0, 0]), plan, exact });
        }
        let (plan, payload, apart) = widths.plan(shape);
        let exponent = Estimate { bytes: whole(&plan, word, payload, apart), plan, exact };
        let plan = Plan { encoding: Encoding::Raw, ..Plan::unchanged(shape) };
        let raw = Estimate { bytes: whole(&plan, word, raw_bytes, [0, 0]), plan, exact };
        let fits = |e: &Estimate| e.bytes < u64::from(u32::MAX);
        let fast = (raw_bytes as f64 * SPARSE_WORTH) as u64;

        // `sparse` would be too large even without padding, so that its pass can be saved.
        let least = (widths.changed as f64 * widths.scale) as u64 * (1 + word);
        let limit = if prefer == Prefer::Speed { fast } else { 0 };
        let smaller = if fits(&exponent) { exponent } else { raw };
        let smaller = if smaller.bytes <= raw.bytes { smaller } else { raw };
        if least > limit.max(smaller.bytes) {
            return Ok(smaller);
        }
        let (plan, payload, exceptions) = self.sparse()?;
        let sparse = Estimate { bytes: whole(&plan, word, payload, [0, exceptions]), plan, exact };
        let taken = sparse.bytes <= limit.max(smaller.bytes) && fits(&sparse);
        Ok(if taken { sparse } else { smaller })
    }

    fn widths(&mut self) -> Result<Widths> {
        let dtype = self.source.dtype();
        let mut need = Need::new();
        let (mut buffers, mut words) = (Buffers::default(), 0);
        for (i, index) in self.tiles.iter().enumerate() {
            let rect = self.grid.rect(*index);
            let every = if self.exact { 1 } else { (rect.words() / ROW_WORDS).clamp(1, 4) };
            // Count in whole tiles, or in single rows, which are other ones in every tile.
            let (first, rows) = if every == 1 { (0, rect.rows()) } else { (i % every, 1) };
            for r in (rect.r0 + first..rect.r1).step_by(rows.max(every)) {
                let part = Rect { r0: r, r1: (r + rows).min(rect.r1), ..rect };
                let (base, fine_tuned) = buffers.read(self.source, &part)?;
                self.count.widths(dtype, base, fine_tuned, &mut need);
                words += part.words();
            }
        }
        let all = self.grid.shape.n as f64 * self.grid.shape.k as f64;
        let scale = if self.exact { 1.0 } else { all / words as f64 };
        Ok(Widths::of(&need, 8 * dtype.word_bytes() as u32, scale))
    }

    /// The plan of `sparse` with the smaller kind of gap, the bytes of its records and the exceptions.
    fn sparse(&mut self) -> Result<(Plan, u64, u64)> {
        const GAPS: [GapKind; 2] = [GapKind::U8, GapKind::U16];
        let (dtype, grid) = (self.source.dtype(), self.grid);
        let mut sums = [0u64; 3];
        let mut buffers = Buffers::default();
        for index in &self.tiles {
            let rect = grid.rect(*index);
            let (base, fine_tuned) = buffers.read(self.source, &rect)?;
            let tile = self.count.records(dtype, rect.cols(), grid.tile_cols, base, fine_tuned);
            sums.iter_mut().zip(tile).for_each(|(sum, n)| *sum += n);
        }
        let record = |i: usize| (Grid::TILE_ROWS * (GAPS[i].bytes() + dtype.word_bytes())) as u64;
        let bytes = |i: usize| sums[i].saturating_mul(record(i)) as f64 * self.scale;
        let i = usize::from(bytes(1) < bytes(0));
        let plan = Plan { encoding: Encoding::Sparse, gap: GAPS[i], ..Plan::unchanged(grid.shape) };
        Ok((plan, bytes(i) as u64, (sums[2] as f64 * self.scale) as u64))
    }
}

/// Words of one rectangle, at multiples of 8 bytes.
#[derive(Default)]
struct Buffers {
    base: Vec<u64>,
    fine_tuned: Vec<u64>,
}

impl Buffers {
    fn read(&mut self, source: &mut dyn Source, rect: &Rect) -> Result<(&[u8], &[u8])> {
        let bytes = rect.words() * source.dtype().word_bytes();
        self.base.resize(bytes.div_ceil(8), 0);
        self.fine_tuned.resize(bytes.div_ceil(8), 0);
        let base = &mut bytemuck::cast_slice_mut(&mut self.base)[..bytes];
        let fine_tuned = &mut bytemuck::cast_slice_mut(&mut self.fine_tuned)[..bytes];
        source.read(rect.r0..rect.r1, rect.c0..rect.c1, base, fine_tuned)?;
        Ok((base, fine_tuned))
    }
}

/// Bytes of a whole delta with so many of payload and so many entries and exceptions.
fn whole(plan: &Plan, word: u64, payload: u64, apart: [u64; 2]) -> u64 {
    let padded = |bytes: u64| bytes.saturating_add(63) / 64 * 64;
    let directory = if plan.tiled() { (plan.grid.tiles() as u64 + 1) * 4 } else { 0 };
    let listing = |count: u64| if count > 0 { [directory, 2 * count, word * count] } else { [0; 3] };
    let sections = [directory, payload].into_iter().chain(apart.into_iter().flat_map(listing)).map(padded);
    sections.fold(HEADER_BYTES as u64, u64::saturating_add)
}
