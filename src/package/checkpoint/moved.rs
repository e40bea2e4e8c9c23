//! Bases of tensors of another number of rows, which went anywhere: taken out or put in at many places, as where a
//! vocabulary or a layer was pruned, or put in another order. Each row is looked for among those of the base by a few of
//! its words without their low bits, first of all behind the one that the row before it was.
//!
//! Where a tensor has as many rows as before, the base tensor itself is its base, though they be in another order: vLLM and
//! weight syncs take deltas of whole tensors only.
//!
//! A row is what both tensors have of their last dimension, or of the last few where that is short. Rows that the base does not
//! have, and those of one value, are rows of zeros.

use super::likeness::{MARK_WORDS, WordRun, likeness, mark};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::format::container::TensorInfo;
use std::cmp::Reverse;

/// Rows of one tensor, at most: their marks are kept in memory, 32 bytes for each row of both and 64 for finding the base's.
const MOST_ROWS: u64 = 1 << 19;
/// Bytes of a row, at least: what a table says of a part is a tenth of that.
const LEAST_ROW: u64 = 64;
/// Places of a row where a mark is taken.
const PLACES: usize = 4;
/// Rows that share a mark and are looked at. Where there are more, they are padding or were never trained, and one is like
/// another.
const SHARED: usize = 8;
/// A share of the rows, 1 in so many, that must be found.
const WORTH: usize = 16;

/// Says of a place that its words tell nothing: they are all the same.
const MUTE: u64 = 0;

/// For each row of the fine-tuned tensor the row of the base that it was.
pub(super) struct Moved {
    /// Bytes of a row.
    pub(super) row: u64,
    pub(super) from: Vec<Option<u32>>,
}

impl Moved {
    /// How many rows were found.
    pub(super) fn found(&self) -> usize {
        self.from.iter().flatten().count()
    }
}

/// Bytes of a row of both.
fn row_bytes(t: &TensorInfo, b: &TensorInfo) -> Option<u64> {
    let none = [t, b].iter().any(|x| x.dims.len() < 2 || x.dims.contains(&0));
    if t.dtype != b.dtype || none {
        return None;
    }
    let alike = t.dims.iter().rev().zip(b.dims.iter().rev()).take_while(|(n, m)| n == m).count();
    let rows = |x: &TensorInfo, last: usize| -> Option<u64> {
        let outer = &x.dims[..x.dims.len() - last];
        outer.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).filter(|&n| x.bytes().is_multiple_of(n))
    };
    // The shortest rows that are long enough, so that they may have moved within and between those of outer dimensions.
    (1..=alike.min(t.dims.len() - 1).min(b.dims.len() - 1)).find_map(|last| {
        let (n, m) = rows(t, last).zip(rows(b, last))?;
        let row = t.bytes() / n;
        (n.max(m) <= MOST_ROWS && row == b.bytes() / m && row >= LEAST_ROW).then_some(row)
    })
}

/// Where the rows of `t`, whose words are `new`, are among those of `b`; `None` if too few are there.
pub(super) fn moved_rows(
    t: &TensorInfo,
    new: WordRun<'_>,
    b: &TensorInfo,
    old: WordRun<'_>,
) -> Result<Option<Moved>> {
    let Some((row, (dtype, _))) = row_bytes(t, b).zip(t.matrix()) else { return Ok(None) };
    let rows = RowReader { dtype, row: row as usize };
    let (marks, before) = (rows.marks(new)?, rows.marks(old)?);
    let index = MarkIndex::new(&before);
    let (mut from, mut next) = (Vec::with_capacity(marks.len()), 0usize);
    for (i, mark) in marks.iter().enumerate() {
        let follows = before.get(next).is_some_and(|there| votes(mark, there) > 0);
        let found = if follows { Some(next) } else { rows.find((i, mark, new), &before, &index, old)? };
        next = found.map_or(next, |at| at + 1);
        from.push(found.map(|at| at as u32));
    }
    let moved = Moved { row, from };
    Ok((moved.found() * WORTH >= moved.from.len()).then_some(moved))
}

type Marks = [u64; PLACES];

/// Places whose words are alike and tell something.
fn votes(a: &Marks, b: &Marks) -> usize {
    a.iter().zip(b).filter(|(x, y)| x == y && **x != MUTE).count()
}

/// Marks, and the rows that have them.
struct MarkIndex(Vec<(u64, u32)>);

impl MarkIndex {
    fn new(marks: &[Marks]) -> Self {
        let of = |(i, mark): (usize, &Marks)| mark.map(|place| (place, i as u32));
        let mut all: Vec<_> =
            marks.iter().enumerate().flat_map(of).filter(|(place, _)| *place != MUTE).collect();
        all.sort_unstable();
        Self(all)
    }

    /// The first rows that have a mark.
    fn sharing(&self, mark: u64) -> impl Iterator<Item = u32> {
        let from = self.0.partition_point(|(m, _)| *m < mark);
        self.0[from..].iter().take(SHARED).take_while(move |(m, _)| *m == mark).map(|(_, row)| *row)
    }
}

/// What reads rows of one length.
struct RowReader {
    dtype: Dtype,
    row: usize,
}

impl RowReader {
    /// The marks of every row.
    fn marks(&self, run: WordRun<'_>) -> Result<Vec<Marks>> {
        let w = self.dtype.word_bytes();
        // No longer than the shortest row.
        let len = MARK_WORDS * w;
        let mut room = vec![0; len];
        let mut out = Vec::with_capacity(run.bytes / self.row);
        for start in (0..run.bytes).step_by(self.row) {
            let mut marks = [MUTE; PLACES];
            for (i, here) in marks.iter_mut().enumerate() {
                let at = (self.row - len) / w * i / (PLACES - 1) * w;
                run.words.read(run.at + start + at, &mut room)?;
                *here = mark(self.dtype, &room).unwrap_or(MUTE);
            }
            out.push(marks);
        }
        Ok(out)
    }

    /// The row that is most like row `i`, wherever it is.
    fn find(
        &self,
        (i, mark, new): (usize, &Marks, WordRun<'_>),
        before: &[Marks],
        index: &MarkIndex,
        old: WordRun<'_>,
    ) -> Result<Option<usize>> {
        let sharing = mark.iter().flat_map(|place| index.sharing(*place));
        let best = sharing.max_by_key(|&at| (votes(mark, &before[at as usize]), Reverse(at)));
        let Some(at) = best else { return Ok(None) };
        let of = |i: usize| i * self.row..(i + 1) * self.row;
        let alike = likeness(self.dtype, new.part(of(i)), old.part(of(at as usize)))?.is_some();
        Ok(alike.then_some(at as usize))
    }
}
