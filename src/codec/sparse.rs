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
    pub differences: &'a [u8],
    /// Whether differences are added (f32, bf16, f16) or XORed.
    pub additive: bool,
    /// Words that `base + differences` does not give bit for bit.
    pub exceptions: Exceptions<'a>,
}

impl SparseTile<'_> {
    /// The gap field of record `j`, lane `lane`.
    #[inline]
    pub fn gap_at(&self, j: usize, lane: usize) -> usize {
        let i = j * Grid::TILE_ROWS + lane;
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
            let at = (j * Grid::TILE_ROWS + lane) * W::BYTES;
            let difference = W::load(&self.differences[at..at + W::BYTES]);
            (difference != nothing).then_some((column, difference))
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
            for (column, difference) in self.lane::<W>(dtype, lane) {
                let word = row
                    .get(column)
                    .ok_or_else(|| Error::corrupt(format!("lane {lane} names column {column} of {cols}")))?;
                if !self.additive {
                    row[column] = W::from_u64(word.to_u64() ^ difference.to_u64());
                    continue;
                }
                let d = widen(dtype, difference.to_u64());
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
        for lane in 0..Grid::TILE_ROWS {
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

/// A tile being encoded, and the sizes it would take. Reused from tile to tile.
#[derive(Default)]
pub(crate) struct Builder<W: Word> {
    lanes: [Vec<(u32, W)>; Grid::TILE_ROWS],
    /// Records with gaps of one byte and of two.
    records: [usize; 2],
    /// Position and word of each exception.
    pub(crate) exceptions: Vec<(u16, u64)>,
    pub(crate) changed: u64,
}

impl<W: Word> Builder<W> {
    /// Collect the changes of a tile, in place of what was held: words of base and fine_tuned in rows of `cols`.
    pub(crate) fn collect(
        &mut self,
        dtype: Dtype,
        cols: usize,
        tile_cols: usize,
        base: &[W],
        fine_tuned: &[W],
    ) {
        self.clear();
        let rows = base.chunks_exact(cols).zip(fine_tuned.chunks_exact(cols));
        for (r, (br, fr)) in rows.enumerate().filter(|(_, (br, fr))| br != fr) {
            let words = br.iter().zip(fr).enumerate().filter(|(_, (b, f))| b != f);
            self.row(dtype, r, tile_cols, words.map(|(c, (b, f))| (c, *b, *f)));
        }
    }

    /// Begin a tile.
    pub(crate) fn clear(&mut self) {
        (self.records, self.changed) = ([0; 2], 0);
        self.exceptions.clear();
        self.lanes.iter_mut().for_each(Vec::clear);
    }

    /// The changes of row `r` (column, base word, fine-tuned word); to be called once per row.
    #[inline]
    pub(crate) fn row(
        &mut self,
        dtype: Dtype,
        r: usize,
        tile_cols: usize,
        changes: impl Iterator<Item = (usize, W, W)>,
    ) {
        let lane = &mut self.lanes[r];
        let (mut last, mut skipped) = (0, 0);
        for (c, bw, fw) in changes {
            let s = split(dtype, bw.to_u64(), fw.to_u64());
            self.changed += 1;
            for term in &s.terms[..s.count] {
                skipped += skips(c - last);
                last = c;
                lane.push((c as u32, W::from_u64(*term)));
            }
            if s.exception {
                self.exceptions.push(((r * tile_cols + c) as u16, fw.to_u64()));
            }
        }
        self.records[0] = self.records[0].max(lane.len() + skipped);
        self.records[1] = self.records[1].max(lane.len());
    }

    /// Records with gaps of one byte, of two, and exceptions.
    pub(crate) fn sizes(&self) -> [u64; 3] {
        [self.records[0] as u64, self.records[1] as u64, self.exceptions.len() as u64]
    }

    /// Records the tile takes with gaps of `kind`.
    pub(crate) fn records(&self, kind: GapKind) -> usize {
        self.records[kind.bytes() - 1]
    }

    /// Append the tile's records: all gaps, then all differences. Returns how many.
    pub(crate) fn write(&self, dtype: Dtype, kind: GapKind, out: &mut Vec<u8>) -> usize {
        let records = self.records(kind);
        let start = out.len();
        let differences_at = start + records * Grid::TILE_ROWS * kind.bytes();
        out.resize(differences_at + records * Grid::TILE_ROWS * W::BYTES, 0);
        let (gaps, differences) = out[start..].split_at_mut(differences_at - start);
        let nothing = W::from_u64(no_op(dtype));
        let mut put = |j: usize, lane: usize, gap: usize, difference: W| {
            let i = j * Grid::TILE_ROWS + lane;
            match kind {
                GapKind::U8 => gaps[i] = gap as u8,
                GapKind::U16 => gaps[2 * i..2 * i + 2].copy_from_slice(&(gap as u16).to_le_bytes()),
            }
            differences[i * W::BYTES..(i + 1) * W::BYTES].copy_from_slice(bytemuck::bytes_of(&difference));
        };
        for (lane, changes) in self.lanes.iter().enumerate() {
            let (mut last, mut j) = (0, 0);
            for &(c, difference) in changes {
                let c = c as usize;
                let mut gap = c;
                if kind == GapKind::U8 {
                    let skipped = skips(c - last);
                    (0..skipped).for_each(|s| put(j + s, lane, MAX_GAP, nothing));
                    j += skipped;
                    gap = c - last - skipped * MAX_GAP;
                }
                put(j, lane, gap, difference);
                last = c;
                j += 1;
            }
            let padding = if kind == GapKind::U16 { last } else { 0 };
            (j..records).for_each(|j| put(j, lane, padding, nothing));
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
