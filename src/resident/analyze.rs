//! The cost model of the resident encodings: what each would take, counted exactly but for the lanes' last units.

use super::encode::Source;
use super::header::Header;
use crate::codec::sparse::Builder;
use crate::codec::word::Word;
use crate::codec::{Encoding, GapKind, Grid, Prefer, exponent};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};

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

/// What one pass over a matrix counts.
pub(crate) struct Stats {
    dtype: Dtype,
    shape: Shape,
    changed: u64,
    /// Words by class of the base word and width of the difference.
    need: Vec<[u64; 65]>,
    records: [u64; 2],
    sparse_exceptions: u64,
}

const GAPS: [GapKind; 2] = [GapKind::U8, GapKind::U16];

impl Stats {
    pub(crate) fn of<W: Word>(source: &mut dyn Source) -> Result<Self> {
        let (dtype, shape) = (source.dtype(), source.shape());
        let mut stats = Self {
            dtype,
            shape,
            changed: 0,
            need: vec![[0; 65]; exponent::CLASSES],
            records: [0; 2],
            sparse_exceptions: 0,
        };
        let grid = Grid::for_sparse(shape);
        let (mut base, mut fine_tuned) = (Vec::<W>::new(), Vec::<W>::new());
        for index in 0..grid.tiles() {
            let rect = grid.rect(index);
            base.resize(rect.words(), W::default());
            fine_tuned.resize(rect.words(), W::default());
            let (b, f) = (bytemuck::cast_slice_mut(&mut base), bytemuck::cast_slice_mut(&mut fine_tuned));
            source.read(rect.r0..rect.r1, rect.c0..rect.c1, b, f)?;
            stats.add(&grid, rect.cols(), &base, &fine_tuned);
        }
        Ok(stats)
    }

    fn add<W: Word>(&mut self, grid: &Grid, cols: usize, base: &[W], fine_tuned: &[W]) {
        let mantissa_bits = exponent::mantissa_bits(self.dtype);
        let builder = Builder::collect(self.dtype, cols, grid.tile_cols, base, fine_tuned);
        self.changed += builder.changed;
        self.sparse_exceptions += builder.exceptions.len() as u64;
        for (records, kind) in self.records.iter_mut().zip(GAPS) {
            *records += builder.records(kind) as u64;
        }
        let mut words = [0u64; exponent::CLASSES];
        base.iter().for_each(|b| words[exponent::class(*b, mantissa_bits)] += 1);
        if builder.changed > 0 {
            for (b, f) in base.iter().zip(fine_tuned).filter(|(b, f)| b != f) {
                let class = exponent::class(*b, mantissa_bits);
                self.need[class][f.minus(*b).width() as usize] += 1;
                words[class] -= 1;
            }
        }
        // What is left did not change and needs no bits.
        self.need.iter_mut().zip(words).for_each(|(need, words)| need[0] += words);
    }

    fn word_bits(&self) -> u64 {
        8 * self.dtype.word_bytes() as u64
    }

    /// Bits of class `c` with width `w`, and the exceptions among them.
    fn class_bits(&self, c: usize, w: usize) -> (u64, u64) {
        let need = &self.need[c];
        let all: u64 = need.iter().sum();
        let exceptions: u64 = need[w + 1..].iter().sum();
        (all * w as u64, exceptions)
    }

    fn table_bits(&self, widths: &[u8; 32]) -> u64 {
        let class = |(c, w): (usize, &u8)| {
            let (bits, exceptions) = self.class_bits(c, usize::from(*w));
            bits + exceptions * (16 + self.word_bits())
        };
        widths.iter().enumerate().map(class).sum()
    }

    /// The cheapest table, or a canonical one that is nearly as cheap.
    fn widths(&self) -> [u8; 32] {
        let best = |c: usize| {
            let cost = |w: &u8| {
                let (bits, exceptions) = self.class_bits(c, usize::from(*w));
                bits + exceptions * (16 + self.word_bits())
            };
            (0..=self.word_bits() as u8).min_by_key(cost).unwrap_or(0)
        };
        let free: [u8; 32] = std::array::from_fn(best);
        let canonical = canonical_tables(self.word_bits() as u8).min_by_key(|t| self.table_bits(t));
        let limit = self.table_bits(&free) as f64 * CANONICAL_WORTH;
        canonical.filter(|t| self.table_bits(t) as f64 <= limit).unwrap_or(free)
    }

    fn sparse(&self) -> (Plan, u64) {
        let grid = Grid::for_sparse(self.shape);
        let w = self.dtype.word_bytes() as u64;
        let bytes =
            |i: usize| self.records[i].saturating_mul(Grid::LANES as u64 * (GAPS[i].bytes() as u64 + w));
        let i = if bytes(0) <= bytes(1) { 0 } else { 1 };
        let plan = Plan { encoding: Encoding::Sparse, grid, gap: GAPS[i], widths: [0; 32] };
        (plan, bytes(i).saturating_add(overhead(&grid, self.sparse_exceptions, w)))
    }

    fn exponent(&self) -> (Plan, u64) {
        let grid = Grid::for_exponent(self.shape);
        let w = self.dtype.word_bytes() as u64;
        let widths = self.widths();
        let plan = Plan { encoding: Encoding::Exponent, grid, gap: GapKind::U8, widths };
        let classes = (0..32).map(|c| self.class_bits(c, usize::from(widths[c])));
        let (bits, exceptions) = classes.fold((0, 0), |a, c| (a.0 + c.0, a.1 + c.1));
        let tails = grid.tiles() as u64 * exponent::LANES as u64 * w / 2;
        (plan, bits / 8 + tails + overhead(&grid, exceptions, w))
    }

    /// The plan for a given encoding.
    pub(crate) fn plan_for(&self, encoding: Encoding) -> Result<Plan> {
        match encoding {
            Encoding::Unchanged => self.plan(Prefer::Memory),
            Encoding::Sparse => Ok(self.sparse().0),
            Encoding::Exponent => Ok(self.exponent().0),
            Encoding::Raw => Ok(Plan { encoding, ..Plan::unchanged(self.shape) }),
        }
    }

    /// The plan for `prefer`; `raw` only where all else is larger.
    pub(crate) fn plan(&self, prefer: Prefer) -> Result<Plan> {
        if self.changed == 0 {
            return Ok(Plan::unchanged(self.shape));
        }
        let raw_bytes = self.shape.bytes(self.dtype)? as u64;
        let raw = Plan { encoding: Encoding::Raw, ..Plan::unchanged(self.shape) };
        let fits = |(_, bytes): &(Plan, u64)| *bytes < u64::from(u32::MAX);
        let sparse = Some(self.sparse()).filter(fits);
        let exponent = Some(self.exponent()).filter(fits);
        if let Some((plan, bytes)) = sparse
            && prefer == Prefer::Speed
            && bytes as f64 <= raw_bytes as f64 * SPARSE_WORTH
        {
            return Ok(plan);
        }
        let all = [sparse, exponent, Some((raw, raw_bytes))];
        let smallest = all.into_iter().flatten().min_by_key(|(_, bytes)| *bytes);
        smallest.map(|(plan, _)| plan).ok_or_else(|| Error::internal("no encoding"))
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
