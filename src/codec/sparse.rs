//! `sparse` (SELL-16): 16 rows side by side, the j-th change of every row together.
//!
//! Record j of a tile holds, for each of 16 lanes (lane = row of the tile), a column gap and a difference. Kernels add
//! `difference * x[column]` to the base product without touching the base again, and the 16 lanes of an accumulator
//! *are* the 16 row sums (sliced ELLPACK: Kreutzer et al., SIAM J. Sci. Comput. 36(5), 2014). Lanes shorter than the
//! longest are padded with entries that do nothing.

use super::split::{narrow, no_op, split, widen};
use super::word::Word;
use super::{Exceptions, Grid};
use crate::error::{Error, Result};
use crate::matrix::Dtype;

/// How an entry tells its column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapKind {
    /// One byte: columns since the lane's previous entry (the first one counts from column 0).
    U8,
    /// Two bytes little-endian: the column itself; smaller where changes are rarer than about one in a hundred.
    U16,
}

impl GapKind {
    /// Bytes of one gap.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
        }
    }
}

/// One tile of 16 rows.
#[derive(Clone, Copy, Debug)]
pub struct SparseTile<'a> {
    /// Records of 16 lanes.
    pub records: usize,
    /// What a gap is.
    pub gap: GapKind,
    /// `records * 16` gaps.
    pub gaps: &'a [u8],
    /// `records * 16` words: a difference in the matrix's dtype, or the XOR where that dtype does not compute.
    pub diffs: &'a [u8],
    /// Whether differences are added (f32, bf16, f16) or XORed.
    pub additive: bool,
    /// Words that `base + differences` does not give bit for bit.
    pub exceptions: Exceptions<'a>,
}

impl SparseTile<'_> {
    /// The gap field of record `j`, lane `lane`.
    #[inline]
    pub fn gap_at(&self, j: usize, lane: usize) -> usize {
        let i = j * Grid::LANES + lane;
        match self.gap {
            GapKind::U8 => usize::from(self.gaps[i]),
            GapKind::U16 => usize::from(u16::load(&self.gaps[2 * i..2 * i + 2])),
        }
    }

    /// The entries of one lane that do something: column and difference, in stream order.
    pub fn lane<'b, W: Word>(&'b self, dtype: Dtype, lane: usize) -> impl Iterator<Item = (usize, W)> + 'b {
        let nothing = W::from_u64(no_op(dtype));
        let mut column = 0usize;
        (0..self.records).filter_map(move |j| {
            let gap = self.gap_at(j, lane);
            column = if self.gap == GapKind::U16 { gap } else { column + gap };
            let at = (j * Grid::LANES + lane) * W::BYTES;
            let diff = W::load(&self.diffs[at..at + W::BYTES]);
            (diff != nothing).then_some((column, diff))
        })
    }

    pub(crate) fn decode<W: Word>(
        &self,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        words: &mut [W],
    ) -> Result<()> {
        for (lane, row) in words.chunks_exact_mut(cols).enumerate().take(rows) {
            let mut pending: Option<(usize, f32)> = None;
            for (column, diff) in self.lane::<W>(dtype, lane) {
                let word = row
                    .get(column)
                    .ok_or_else(|| Error::corrupt(format!("lane {lane} names column {column} of {cols}")))?;
                if !self.additive {
                    row[column] = W::from_u64(word.to_u64() ^ diff.to_u64());
                    continue;
                }
                let d = widen(dtype, diff.to_u64());
                match &mut pending {
                    Some((at, sum)) if *at == column => *sum += d,
                    _ => {
                        let start = widen(dtype, word.to_u64());
                        if let Some((at, sum)) = pending.replace((column, start + d)) {
                            row[at] = W::from_u64(narrow(dtype, sum));
                        }
                    }
                }
            }
            if let Some((at, sum)) = pending {
                row[at] = W::from_u64(narrow(dtype, sum));
            }
        }
        Ok(())
    }

    /// Check what can be checked without the base: columns within the tile, nothing in lanes beyond its rows.
    ///
    /// # Errors
    /// `Corrupt`, with the lane and the column.
    pub(crate) fn check<W: Word>(&self, dtype: Dtype, rows: usize, cols: usize) -> Result<()> {
        for lane in 0..Grid::LANES {
            for (column, _) in self.lane::<W>(dtype, lane) {
                if lane >= rows || column >= cols {
                    return Err(Error::corrupt(format!(
                        "an entry at row {lane}, column {column} lies outside its tile of {rows} x {cols}"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A tile being encoded, and the sizes it would take.
#[derive(Default)]
pub(crate) struct Builder {
    lanes: [Vec<(usize, u64)>; Grid::LANES],
    pub(crate) exceptions: Vec<(u16, u64)>,
    pub(crate) changed: u64,
}

impl Builder {
    /// Collect the changes of a tile: `rows` x `cols` words of base and fine_tuned.
    pub(crate) fn collect<W: Word>(
        dtype: Dtype,
        cols: usize,
        tile_cols: usize,
        base: &[W],
        fine_tuned: &[W],
    ) -> Self {
        let mut b = Self::default();
        for (r, (br, fr)) in base.chunks_exact(cols).zip(fine_tuned.chunks_exact(cols)).enumerate() {
            if br == fr {
                continue;
            }
            for (c, (&bw, &fw)) in br.iter().zip(fr).enumerate().filter(|(_, (b, f))| b != f) {
                let s = split(dtype, bw.to_u64(), fw.to_u64());
                b.changed += 1;
                b.lanes[r].extend(s.terms[..s.count].iter().map(|t| (c, *t)));
                if s.exception {
                    b.exceptions.push(((r * tile_cols + c) as u16, fw.to_u64()));
                }
            }
        }
        b
    }

    /// Records the tile takes with gaps of `kind`.
    pub(crate) fn records(&self, kind: GapKind) -> usize {
        let entries = |lane: &Vec<(usize, u64)>| match kind {
            GapKind::U16 => lane.len(),
            GapKind::U8 => {
                let mut last = 0;
                lane.iter().map(|&(c, _)| 1 + skips(c - std::mem::replace(&mut last, c))).sum()
            }
        };
        self.lanes.iter().map(entries).max().unwrap_or(0)
    }

    /// Append the tile's records: all gaps, then all differences.
    pub(crate) fn write<W: Word>(&self, dtype: Dtype, kind: GapKind, out: &mut Vec<u8>) -> usize {
        let records = self.records(kind);
        let start = out.len();
        let diffs_at = start + records * Grid::LANES * kind.bytes();
        out.resize(diffs_at + records * Grid::LANES * W::BYTES, 0);
        let mut put = |j: usize, lane: usize, gap: usize, diff: u64| {
            let i = j * Grid::LANES + lane;
            let g = start + i * kind.bytes();
            out[g..g + kind.bytes()].copy_from_slice(&(gap as u16).to_le_bytes()[..kind.bytes()]);
            let d = diffs_at + i * W::BYTES;
            out[d..d + W::BYTES].copy_from_slice(&diff.to_le_bytes()[..W::BYTES]);
        };
        for (lane, changes) in self.lanes.iter().enumerate() {
            let (mut last, mut j) = (0, 0);
            for &(c, diff) in changes {
                let skipped = if kind == GapKind::U8 { skips(c - last) } else { 0 };
                (0..skipped).for_each(|s| put(j + s, lane, MAX_GAP, no_op(dtype)));
                j += skipped;
                put(j, lane, if kind == GapKind::U8 { c - last - skipped * MAX_GAP } else { c }, diff);
                last = c;
                j += 1;
            }
            let padding = if kind == GapKind::U16 { last } else { 0 };
            (j..records).for_each(|j| put(j, lane, padding, no_op(dtype)));
        }
        records
    }
}

/// The longest gap of one byte.
const MAX_GAP: usize = 255;

/// Entries that do nothing but step 255 columns, needed before an entry `gap` columns on.
fn skips(gap: usize) -> usize {
    gap.saturating_sub(1) / MAX_GAP
}
