//! Bases put together where no base tensor is as large as the fine-tuned one: of a tensor that has gained or lost rows, of
//! several in a stack, or of a piece of one. Found by the words, so that it matters little who joined or split them, and how
//! the names were changed.

use super::files::{Checkpoint, Found, TensorFile, words};
use super::likeness::{MarkPlaces, MarkTable, WordRun, likeness};
use super::renames::{Fitness, closeness};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::format::container::TensorInfo;
use crate::package::format::parts::{BasePart, too_hollow};
use crate::package::format::words::TensorWords;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// From here on two runs are surely one aligned with the other.
const SURELY: f64 = 0.9;
/// Bytes of rows that tell where rows were put in.
const PROBE_BYTES: usize = 1024;
/// Pieces of one base tensor that are looked at.
const PIECES: u64 = 1 << 14;

/// A piece of a base tensor.
type Piece<'a> = (Found<'a>, u64, u64);

/// Tables of base tensors by their first words, made when they are needed.
#[derive(Debug)]
pub(super) struct JoinTables<'a> {
    base: &'a Checkpoint,
    /// Whole tensors by dtype and last dimension.
    whole: HashMap<(&'a str, usize), MarkTable<Piece<'a>>>,
    /// Pieces of the length of a tensor, by dtype, last dimension and length.
    pieces: HashMap<(&'a str, usize, u64), MarkTable<Piece<'a>>>,
}

/// Bytes `at..at + bytes` of a base tensor, as a part.
fn part(base: &Checkpoint, (f, b): Found<'_>, at: u64, bytes: u64) -> BasePart {
    let file = base.has_several(&b.name).then(|| base.files()[f].path.clone());
    BasePart { name: Some(b.name.clone()), file, at, bytes }
}

/// The base of `t` in base tensor `b`, of which it has more rows or fewer.
pub(super) fn resized(
    base: &Checkpoint,
    file: &TensorFile,
    t: &TensorInfo,
    b: Found<'_>,
) -> Result<Option<Vec<BasePart>>> {
    let Some(mut parts) = row_parts(t, TensorWords::File(&file.tensors, t), b.1, words(base, b))? else {
        return Ok(None);
    };
    for p in parts.iter_mut().filter(|p| p.name.is_some()) {
        *p = part(base, b, p.at, p.bytes);
    }
    Ok(Some(parts))
}

/// The parts of tensor `b`, whose words are `old`, that make a base of `t`, whose words are `new`, if they differ in some rows
/// that one of them lacks.
pub(crate) fn row_parts(
    t: &TensorInfo,
    new: TensorWords<'_>,
    b: &TensorInfo,
    old: TensorWords<'_>,
) -> Result<Option<Vec<BasePart>>> {
    let Some((dtype, rows)) = row_counts(t, b) else { return Ok(None) };
    let row = b.bytes() / rows.1 as u64;
    let (new, old) = (WordRun::whole(new)?, WordRun::whole(old)?);
    let aligned = Rows { dtype, row: row as usize, new, old, rows };
    let parts = aligned.place()?.map(|place| {
        let of = |from: usize, count: usize| BasePart {
            name: Some(b.name.clone()),
            file: None,
            at: from as u64 * row,
            bytes: count as u64 * row,
        };
        let gap = rows.0.saturating_sub(rows.1);
        let lost = rows.1.saturating_sub(rows.0);
        let tail = rows.0.min(rows.1) - place;
        let parts = [of(0, place), BasePart::zeros(gap as u64 * row), of(place + lost, tail)];
        parts.into_iter().filter(|p| p.bytes > 0).collect::<Vec<_>>()
    });
    Ok(parts.filter(|p| !too_hollow(p)))
}

/// Rows of both, where that is all in which they differ.
fn row_counts(t: &TensorInfo, b: &TensorInfo) -> Option<(Dtype, (usize, usize))> {
    let ((n, of), (m, other)) = (t.dims.split_first()?, b.dims.split_first()?);
    let (n, m) = (*n, *m);
    if t.dtype != b.dtype || of != other || n == m || n == 0 || m == 0 {
        return None;
    }
    let each = |bytes: u64, rows: usize| bytes.is_multiple_of(rows as u64).then(|| bytes / rows as u64);
    let (row, same) = (each(t.bytes(), n)?, each(b.bytes(), m)?);
    (row == same && row > 0).then_some((t.matrix()?.0, (n, m)))
}

/// Two tensors of the same rows, but for some that one of them lacks.
struct Rows<'a> {
    dtype: Dtype,
    row: usize,
    new: WordRun<'a>,
    old: WordRun<'a>,
    /// How many rows they have.
    rows: (usize, usize),
}

impl Rows<'_> {
    /// How alike `count` rows from row `a` of the one and from row `b` of the other are.
    fn alike(&self, a: usize, b: usize, count: usize) -> Result<f64> {
        let (a, b, bytes) = (a * self.row, b * self.row, count * self.row);
        let found = likeness(self.dtype, self.new.part(a..a + bytes), self.old.part(b..b + bytes))?;
        Ok(found.unwrap_or(0.0))
    }

    /// After how many rows the other ones were put in, or taken out; `None` if the two have nothing in common.
    fn place(&self) -> Result<Option<usize>> {
        let (n, m) = self.rows;
        let common = n.min(m);
        let (front, back) = (self.alike(0, 0, common)?, self.alike(n - common, m - common, common)?);
        if front.max(back) < SURELY
            && let Some(place) = self.middle(common)?
        {
            return Ok(Some(place));
        }
        Ok((front.max(back) > 0.0).then_some(if front >= back { common } else { 0 }))
    }

    /// The same, where it is neither at the end nor at the front.
    fn middle(&self, common: usize) -> Result<Option<usize>> {
        let (n, m) = self.rows;
        let probe = (PROBE_BYTES / self.row).clamp(1, common);
        let (mut low, mut high) = (probe, common);
        if self.alike(0, 0, probe)? == 0.0 {
            return Ok(None);
        }
        // The rows before `low` are aligned from the front, those before `high` are not.
        while high - low > 1 {
            let half = low.midpoint(high);
            let aligned = self.alike(half - probe.min(half), half - probe.min(half), probe.min(half))? > 0.0;
            (low, high) = if aligned { (half, high) } else { (low, half) };
        }
        // The last probe may reach over the place by as many rows as half of it.
        let start = low.saturating_sub(probe);
        let mut place = start;
        while place < low && self.alike(place, place, 1)? > 0.0 {
            place += 1;
        }
        let tail = common - place;
        Ok((tail > 0 && self.alike(n - tail, m - tail, tail)? > 0.0).then_some(place))
    }
}

impl<'a> JoinTables<'a> {
    pub(super) fn new(base: &'a Checkpoint) -> Self {
        Self { base, whole: HashMap::new(), pieces: HashMap::new() }
    }

    /// The base of `t`, a stack of base tensors, or a piece of one.
    pub(super) fn find(&mut self, file: &'a TensorFile, t: &'a TensorInfo) -> Result<Option<Vec<BasePart>>> {
        let (Some((dtype, _)), Some(&last)) = (t.matrix(), t.dims.last().filter(|_| t.dims.len() > 1)) else {
            return Ok(None);
        };
        let new = WordRun::whole(TensorWords::File(&file.tensors, t))?;
        if let Some(parts) = self.stack(dtype, last, t, new)? {
            return Ok(Some(parts));
        }
        let table = self.pieces_of(dtype, last, t)?;
        let table = &self.pieces[&table];
        let best = self.best(dtype, t, new, table.near(new)?)?;
        Ok(best.map(|(found, at, bytes)| vec![part(self.base, found, at, bytes)]))
    }

    /// One base tensor after the other, as long as words are alike.
    fn stack(
        &mut self,
        dtype: Dtype,
        last: usize,
        t: &'a TensorInfo,
        new: WordRun<'a>,
    ) -> Result<Option<Vec<BasePart>>> {
        let table = self.whole_of(dtype, last, t)?;
        let (mut parts, mut at) = (Vec::new(), 0);
        while at < new.bytes {
            let rest = new.part(at..new.bytes);
            let near = self.whole[&table].near(rest)?;
            let near = near.into_iter().filter(|(_, _, bytes)| *bytes <= rest.bytes as u64).collect();
            match self.best(dtype, t, rest, near)? {
                Some((found, from, bytes)) => {
                    parts.push(part(self.base, found, from, bytes));
                    at += bytes as usize;
                }
                // What the base lacks: an expert more, some rows more.
                None if at >= new.bytes / 2 => {
                    parts.push(BasePart::zeros(rest.bytes as u64));
                    at = new.bytes;
                }
                None => return Ok(None),
            }
        }
        Ok((!parts.is_empty()).then_some(parts))
    }

    /// The piece that the start of `new` is most like; of those that are equally so the one of the closest name.
    fn best(
        &self,
        dtype: Dtype,
        t: &TensorInfo,
        new: WordRun<'_>,
        near: Vec<Piece<'a>>,
    ) -> Result<Option<Piece<'a>>> {
        let mut best: Option<(Fitness, Piece<'a>)> = None;
        for (found, at, bytes) in near {
            let old = WordRun::whole(words(self.base, found))?;
            let old = old.part(at as usize..(at + bytes) as usize);
            let Some(share) = likeness(dtype, new.part(0..bytes as usize), old)? else { continue };
            let rank = (share, closeness(&t.name, &found.1.name));
            if best.as_ref().is_none_or(|(b, _)| rank > *b) {
                best = Some((rank, (found, at, bytes)));
            }
        }
        Ok(best.map(|(_, piece)| piece))
    }

    /// Base tensors of the dtype and last dimension of `t`.
    fn like(base: &'a Checkpoint, last: usize, t: &TensorInfo) -> impl Iterator<Item = Found<'a>> {
        let dtype = t.dtype.clone();
        let fits = move |b: &TensorInfo| b.dtype == dtype && b.dims.len() > 1 && b.dims.last() == Some(&last);
        base.tensors().filter(move |(_, b)| fits(b) && b.bytes() > 0)
    }

    fn whole_of(&mut self, dtype: Dtype, last: usize, t: &'a TensorInfo) -> Result<(&'a str, usize)> {
        let key = (t.dtype.as_str(), last);
        if let Entry::Vacant(room) = self.whole.entry(key) {
            let mut table = MarkTable::new(dtype, MarkPlaces::Start);
            for found in Self::like(self.base, last, t) {
                table.add(WordRun::whole(words(self.base, found))?, (found, 0, found.1.bytes()))?;
            }
            room.insert(table);
        }
        Ok(key)
    }

    fn pieces_of(&mut self, dtype: Dtype, last: usize, t: &'a TensorInfo) -> Result<(&'a str, usize, u64)> {
        let bytes = t.bytes();
        let key = (t.dtype.as_str(), last, bytes);
        if let Entry::Vacant(room) = self.pieces.entry(key) {
            let mut table = MarkTable::new(dtype, MarkPlaces::Start);
            for found in Self::like(self.base, last, t) {
                let whole = WordRun::whole(words(self.base, found))?;
                let Some(rest) = found.1.bytes().checked_sub(bytes) else { continue };
                // From the front, and from the end where that is another place.
                let steps = (0..=rest / bytes.max(1)).take(PIECES as usize).map(|i| i * bytes);
                let again = !rest.is_multiple_of(bytes.max(1));
                for at in steps.clone().chain(steps.map(|at| rest - at).filter(|_| again)) {
                    table.add(whole.part(at as usize..(at + bytes) as usize), (found, at, bytes))?;
                }
            }
            room.insert(table);
        }
        Ok(key)
    }
}
