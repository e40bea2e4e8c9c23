//! The cost model of the resident encodings: what each would take, counted exactly but for the lanes' last units.

use super::encode::Source;
use super::header::Header;
use crate::codec::sparse::Builder;
use crate::codec::word::Word;
use crate::codec::{Encoding, GapKind, Grid, Prefer, exponent};
use crate::error::{Error, Result};
use crate::matrix::Shape;

/// `sparse` is worth its bytes below this share of the fine-tuned words' own: it decodes several times faster than
/// `exponent` (one add per change against a bit stream per word), but near `raw` it saves nothing.
const SPARSE_WORTH: f64 = 0.75;
/// A canonical width table is taken if it costs at most this factor over the best one: tenants of one batch that
/// share a table share its look-ups (research/cpu_kernels.md: 1.5 times the speed at 4 and 8 tenants).
const CANONICAL_WORTH: f64 = 1.03;

/// How a matrix will be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub encoding: Encoding,
    pub grid: Grid,
    pub gap: GapKind,
    pub widths: [u8; exponent::CLASSES],
}

impl Plan {
    pub(crate) fn unchanged(shape: Shape) -> Self {
        Self {
            encoding: Encoding::Unchanged,
            grid: Grid::for_sparse(shape),
            gap: GapKind::U8,
            widths: [0; 32],
        }
    }

    /// The plan of an existing delta, for a matrix of another shape.
    pub(crate) fn of(h: &Header, shape: Shape) -> Self {
        Self { encoding: h.encoding, grid: Grid { shape, ..h.grid() }, gap: h.gap, widths: h.widths }
    }

    /// Whether tiles of the two can be copied into one another.
    pub(crate) fn same_tiles(&self, h: &Header) -> bool {
        *self == Self::of(h, self.grid.shape)
    }
}

/// The plan for `prefer`; `raw` only where all else is larger.
pub(crate) fn plan<W: Word>(source: &mut dyn Source, prefer: Prefer) -> Result<Plan> {
    let shape = source.shape();
    let changed = count_changed::<W>(source)?;
    if changed == 0 {
        return Ok(Plan::unchanged(shape));
    }
    let raw_bytes = shape.bytes(source.dtype())? as u64;
    let fits = |(_, bytes): &(Plan, u64)| *bytes < u64::from(u32::MAX);
    // Not even without padding can it be the smaller one: spare the pass.
    let hopeless = changed.saturating_mul(1 + W::BYTES as u64) > raw_bytes;
    let sparse = if hopeless { None } else { Some(sparse::<W>(source)?).filter(fits) };
    if let Some((plan, bytes)) = sparse
        && prefer == Prefer::Speed
        && bytes as f64 <= raw_bytes as f64 * SPARSE_WORTH
    {
        return Ok(plan);
    }
    let exponent = Some(Widths::of::<W>(source)?.plan(shape)).filter(fits);
    let raw = Plan { encoding: Encoding::Raw, ..Plan::unchanged(shape) };
    let all = [sparse, exponent, Some((raw, raw_bytes))];
    let smallest = all.into_iter().flatten().min_by_key(|(_, bytes)| *bytes);
    smallest.map(|(plan, _)| plan).ok_or_else(|| Error::internal("no encoding"))
}

/// The plan for a given encoding; the cost model's by size for `Unchanged`, which cannot hold a change.
pub(crate) fn plan_for<W: Word>(source: &mut dyn Source, encoding: Encoding) -> Result<Plan> {
    let shape = source.shape();
    match encoding {
        Encoding::Unchanged => plan::<W>(source, Prefer::Memory),
        Encoding::Sparse => Ok(sparse::<W>(source)?.0),
        Encoding::Exponent => Ok(Widths::of::<W>(source)?.plan(shape).0),
        Encoding::Raw => Ok(Plan { encoding, ..Plan::unchanged(shape) }),
    }
}

/// Visit the words of every tile of 16 rows: grid, columns of the tile, base, fine_tuned.
fn visit<W: Word>(source: &mut dyn Source, mut f: impl FnMut(&Grid, usize, &[W], &[W])) -> Result<()> {
    let grid = Grid::for_sparse(source.shape());
    let (mut base, mut fine_tuned) = (Vec::<W>::new(), Vec::<W>::new());
    for index in 0..grid.tiles() {
        let rect = grid.rect(index);
        base.resize(rect.words(), W::default());
        fine_tuned.resize(rect.words(), W::default());
        let (b, t) = (bytemuck::cast_slice_mut(&mut base), bytemuck::cast_slice_mut(&mut fine_tuned));
        source.read(rect.r0..rect.r1, rect.c0..rect.c1, b, t)?;
        f(&grid, rect.cols(), &base, &fine_tuned);
    }
    Ok(())
}

fn count_changed<W: Word>(source: &mut dyn Source) -> Result<u64> {
    let mut changed = 0;
    visit::<W>(source, |_, _, base, fine_tuned| {
        changed += base.iter().zip(fine_tuned).filter(|(b, f)| b != f).count() as u64;
    })?;
    Ok(changed)
}

/// The plan of `sparse` with the smaller kind of gap, and its bytes.
fn sparse<W: Word>(source: &mut dyn Source) -> Result<(Plan, u64)> {
    const GAPS: [GapKind; 2] = [GapKind::U8, GapKind::U16];
    let dtype = source.dtype();
    let (mut records, mut exceptions) = ([0u64; 2], 0);
    let mut builder = Builder::<W>::default();
    visit::<W>(source, |grid, cols, base, fine_tuned| {
        builder.collect(dtype, cols, grid.tile_cols, base, fine_tuned);
        exceptions += builder.exceptions.len() as u64;
        records.iter_mut().zip(GAPS).for_each(|(r, gap)| *r += builder.records(gap) as u64);
    })?;
    let grid = Grid::for_sparse(source.shape());
    let w = W::BYTES as u64;
    let bytes = |i: usize| records[i].saturating_mul(Grid::LANES as u64 * (GAPS[i].bytes() as u64 + w));
    let i = usize::from(bytes(1) < bytes(0));
    let plan = Plan { encoding: Encoding::Sparse, grid, gap: GAPS[i], widths: [0; 32] };
    Ok((plan, bytes(i).saturating_add(overhead(&grid, exceptions, w))))
}

/// Words by class of the base word and width of the difference.
struct Widths {
    need: Vec<[u64; 65]>,
    word_bits: u64,
}

impl Widths {
    fn of<W: Word>(source: &mut dyn Source) -> Result<Self> {
        let mantissa_bits = exponent::mantissa_bits(source.dtype());
        let mut need = vec![[0; 65]; exponent::CLASSES];
        visit::<W>(source, |_, _, base, fine_tuned| {
            for (b, f) in base.iter().zip(fine_tuned) {
                let width = if b == f { 0 } else { f.minus(*b).width() };
                need[exponent::class(*b, mantissa_bits)][width as usize] += 1;
            }
        })?;
        Ok(Self { need, word_bits: u64::from(W::BITS) })
    }

    /// Bits of class `c` with width `w`, and the exceptions among them.
    fn class_bits(&self, c: usize, w: usize) -> (u64, u64) {
        let need = &self.need[c];
        let all: u64 = need.iter().sum();
        let exceptions: u64 = need[w + 1..].iter().sum();
        (all * w as u64, exceptions)
    }

    fn class_cost(&self, c: usize, w: u8) -> u64 {
        let (bits, exceptions) = self.class_bits(c, usize::from(w));
        bits + exceptions * (16 + self.word_bits)
    }

    fn table_cost(&self, widths: &[u8; 32]) -> u64 {
        widths.iter().enumerate().map(|(c, w)| self.class_cost(c, *w)).sum()
    }

    /// The cheapest table, or a canonical one that is nearly as cheap.
    fn table(&self) -> [u8; 32] {
        let word_bits = self.word_bits as u8;
        let free: [u8; 32] =
            std::array::from_fn(|c| (0..=word_bits).min_by_key(|w| self.class_cost(c, *w)).unwrap_or(0));
        let canonical = canonical_tables(word_bits).min_by_key(|t| self.table_cost(t));
        let limit = self.table_cost(&free) as f64 * CANONICAL_WORTH;
        canonical.filter(|t| self.table_cost(t) as f64 <= limit).unwrap_or(free)
    }

    fn plan(&self, shape: Shape) -> (Plan, u64) {
        let grid = Grid::for_exponent(shape);
        let w = self.word_bits / 8;
        let widths = self.table();
        let plan = Plan { encoding: Encoding::Exponent, grid, gap: GapKind::U8, widths };
        let classes = (0..32).map(|c| self.class_bits(c, usize::from(widths[c])));
        let (bits, exceptions) = classes.fold((0, 0), |a, c| (a.0 + c.0, a.1 + c.1));
        let tails = grid.tiles() as u64 * exponent::LANES as u64 * w / 2;
        (plan, bits / 8 + tails + overhead(&grid, exceptions, w))
    }
}

/// Directory, exceptions and padding.
fn overhead(grid: &Grid, exceptions: u64, word_bytes: u64) -> u64 {
    let directory = (grid.tiles() as u64 + 1) * 4;
    let apart = if exceptions > 0 { directory + exceptions * (2 + word_bytes) } else { 0 };
    directory + apart + 128
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
