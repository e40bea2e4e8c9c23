//! Bases of tensors that have gained or lost some of a dimension: rows (added tokens), columns (added inputs, tables that lie
//! on their side), channels, positions. The base is put together of what both have, with zeros where only the fine-tune has
//! something. Where it came or went is found by the words; a tensor whose words are the base's in more dimensions or fewer is found,
//! too. Where what both have is not alike all over, rows are looked for one by one (`moved.rs`).

use super::files::{Checkpoint, Found, TensorFile, words};
use super::likeness::{WordRun, likeness};
use super::moved::{Moved, moved_rows};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::format::container::TensorInfo;
use crate::package::format::parts::{BasePart, too_hollow};
use crate::package::format::words::TensorWords;
use std::collections::HashMap;
use std::ops::Range;

/// From here on two runs are surely one aligned with the other.
const SURELY: f64 = 0.9;
/// Bytes of rows that tell where rows were put in.
const PROBE_BYTES: usize = 1024;
/// And so many times they are there, at least.
const PROBES: usize = 8;
/// Parts of one base, at most.
const MOST_PARTS: usize = 1 << 16;
/// Bytes that a part must have, where there are many: what the table says of it takes about a tenth of that.
const LEAST_PART: u64 = 64;
/// Blocks of a dimension, and parts, that are looked at.
const LOOKED_AT: usize = 9;
/// Places of a tensor where it is held against its base.
const HELD: usize = 64;
/// Bytes at each.
const HELD_BYTES: u64 = 64;

/// The base of `t` in base tensor `b`, of which it has more or less.
pub(super) fn resized(
    base: &Checkpoint,
    file: &TensorFile,
    t: &TensorInfo,
    b: Found<'_>,
) -> Result<Option<Vec<BasePart>>> {
    let Some(mut parts) = resized_parts(t, TensorWords::File(&file.tensors, t), b.1, words(base, b))? else {
        return Ok(None);
    };
    let file = base.has_several(&b.1.name).then(|| base.files()[b.0].path.clone());
    parts.iter_mut().filter(|p| p.name.is_some()).for_each(|p| p.file.clone_from(&file));
    Ok(Some(parts))
}

/// Whether `t` may be `b` with more or less of some dimensions, or in more dimensions or fewer.
pub(super) fn resizable(t: &TensorInfo, b: &TensorInfo) -> bool {
    Resized::new(t, b).is_some() || reshaped(t, b)
}

/// The same words in more dimensions or fewer. As many others, such as those of a matrix that was turned, are other words.
fn reshaped(t: &TensorInfo, b: &TensorInfo) -> bool {
    let count = |dims: &[usize]| dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    t.dtype == b.dtype
        && t.dims.len() != b.dims.len()
        && t.bytes() == b.bytes()
        && count(&t.dims) == count(&b.dims)
}

/// The parts of tensor `b`, whose words are `old`, that make a base of `t`, whose words are `new`, if their words are alike in
/// what both have of each dimension.
pub(crate) fn resized_parts(
    t: &TensorInfo,
    new: TensorWords<'_>,
    b: &TensorInfo,
    old: TensorWords<'_>,
) -> Result<Option<Vec<BasePart>>> {
    let Some((dtype, _)) = t.matrix() else { return Ok(None) };
    let (new, old) = (WordRun::whole(new)?, WordRun::whole(old)?);
    if reshaped(t, b) {
        let alike = likeness(dtype, new, old)?.is_some() && t.bytes() > 0;
        return Ok(alike.then(|| vec![part_of(b, 0, b.bytes())]));
    }
    let mut placed = None;
    if let Some(mut resized) = Resized::new(t, b)
        && resized.place(dtype, new, old)?
    {
        placed = resized.parts(b).filter(|parts| !too_hollow(parts));
    }
    let alike = placed.as_ref().map_or(Ok(0.0), |parts| held(dtype, parts, new, old))?;
    if alike >= SURELY {
        return Ok(placed);
    }
    let share = |moved: &Moved| moved.found() as f64 / moved.from.len() as f64;
    let moved = moved_rows(t, new, b, old)?.filter(|moved| placed.is_none() || share(moved) > alike);
    Ok(moved.and_then(|moved| moved_parts(&moved, b)).or(placed))
}

/// The parts of a base in another order; `None` if there are too many, or hardly any words in them.
fn moved_parts(moved: &Moved, b: &TensorInfo) -> Option<Vec<BasePart>> {
    let mut parts = Vec::new();
    for from in &moved.from {
        push_part(b, from.map(|i| u64::from(i) * moved.row), moved.row, &mut parts);
        if parts.len() > MOST_PARTS {
            return None;
        }
    }
    (!too_hollow(&parts)).then_some(parts)
}

/// At how many of some places, spread over what is of the base, a tensor is like it.
fn held(dtype: Dtype, parts: &[BasePart], new: WordRun<'_>, old: WordRun<'_>) -> Result<f64> {
    let w = dtype.word_bytes() as u64;
    let sum: u64 = parts.iter().filter(|p| p.name.is_some()).map(|p| p.bytes).sum();
    let (mut start, mut seen, mut alike, mut here) = (0u64, 0u64, 0, 0);
    for part in parts {
        let there = if part.name.is_some() { part.bytes } else { 0 };
        while here < HELD as u64 && sum / HELD as u64 * here < seen + there {
            let within = (sum / HELD as u64 * here - seen) / w * w;
            let bytes = HELD_BYTES.min(there - within);
            let range = |at: u64| at as usize..(at + bytes) as usize;
            let (new, old) = (new.part(range(start + within)), old.part(range(part.at + within)));
            let found = likeness(dtype, new, old)?;
            (alike, here) = (alike + usize::from(found.is_some()), here + 1);
        }
        (start, seen) = (start + part.bytes, seen + there);
    }
    Ok(alike as f64 / here.max(1) as f64)
}

fn part_of(b: &TensorInfo, at: u64, bytes: u64) -> BasePart {
    BasePart { name: Some(b.name.clone()), file: None, at, bytes }
}

/// One dimension of both tensors.
#[derive(Clone, Copy, Debug)]
struct Axis {
    new: usize,
    old: usize,
    /// After how many of those in common the others come.
    place: usize,
    /// Bytes of one index of it in each tensor.
    step: (u64, u64),
}

impl Axis {
    fn common(&self) -> usize {
        self.new.min(self.old)
    }
}

/// Two tensors of one dtype and number of dimensions.
struct Resized {
    /// Up to the last dimension in which they differ.
    axes: Vec<Axis>,
}

impl Resized {
    fn new(t: &TensorInfo, b: &TensorInfo) -> Option<Self> {
        if t.dtype != b.dtype || t.dims.len() != b.dims.len() || [t, b].iter().any(|x| x.dims.contains(&0)) {
            return None;
        }
        let last = t.dims.iter().zip(&b.dims).rposition(|(n, m)| n != m)?;
        let (mut axes, mut step) = (Vec::new(), (t.bytes(), b.bytes()));
        for (&new, &old) in t.dims.iter().zip(&b.dims).take(last + 1) {
            let each = |bytes: u64, n: usize| bytes.is_multiple_of(n as u64).then(|| bytes / n as u64);
            step = (each(step.0, new)?, each(step.1, old)?);
            axes.push(Axis { new, old, place: new.min(old), step });
        }
        let inner = axes.last()?;
        let many = axes[..last].iter().any(|a| a.new > 1);
        let run = inner.common() as u64 * inner.step.0;
        (inner.step.0 == inner.step.1 && run > 0 && (run >= LEAST_PART || !many)).then_some(Self { axes })
    }

    /// Find where the dimensions in which they differ came or went; whether the two have words in common.
    fn place(&mut self, dtype: Dtype, new: WordRun<'_>, old: WordRun<'_>) -> Result<bool> {
        let Some((inner, outer)) = self.axes.split_last_mut() else { return Ok(false) };
        let blocks = outer.iter().try_fold(1usize, |n, a| n.checked_mul(a.common())).unwrap_or(usize::MAX);
        // Blocks of the last dimension: where its indices came or went in most of them. Of dimensions before it, if they differ,
        // too, those in common come first.
        let mut votes: HashMap<usize, usize> = HashMap::new();
        let looked_at = blocks.min(LOOKED_AT);
        for i in 0..looked_at {
            let (mut index, mut at) = (blocks / looked_at * i, (0, 0));
            for a in outer.iter().rev() {
                let here = (index % a.common()) as u64;
                (index, at) = (index / a.common(), (at.0 + here * a.step.0, at.1 + here * a.step.1));
            }
            let block = |at: u64, n: usize| at as usize..at as usize + n * inner.step.0 as usize;
            let rows = Rows {
                dtype,
                row: inner.step.0 as usize,
                new: new.part(block(at.0, inner.new)),
                old: old.part(block(at.1, inner.old)),
                rows: (inner.new, inner.old),
            };
            if let Some(place) = rows.place()? {
                *votes.entry(place).or_default() += 1;
            }
        }
        let aligned: usize = votes.values().sum();
        let most = votes.into_iter().max_by_key(|&(place, votes)| (votes, place));
        inner.place = most.map_or(inner.place, |(place, _)| place);
        Ok(2 * aligned > looked_at)
    }

    /// The parts, one after the other; `None` if there are too many.
    fn parts(&self, b: &TensorInfo) -> Option<Vec<BasePart>> {
        let mut out = Vec::new();
        self.add(b, 0, 0, &mut out).then_some(out)
    }

    /// Those of dimension `axis` from byte `at` of the base on.
    fn add(&self, b: &TensorInfo, axis: usize, at: u64, out: &mut Vec<BasePart>) -> bool {
        let a = self.axes[axis];
        let (more, fewer) = (a.new.saturating_sub(a.old), a.old.saturating_sub(a.new));
        let kept = |mut range: Range<usize>, out: &mut Vec<BasePart>| {
            let from = |i: usize| at + i as u64 * a.step.1;
            if axis + 1 < self.axes.len() {
                return range.all(|i| self.add(b, axis + 1, from(i), out));
            }
            push_part(b, Some(from(range.start)), range.len() as u64 * a.step.0, out);
            out.len() <= MOST_PARTS
        };
        if !kept(0..a.place, out) {
            return false;
        }
        push_part(b, None, more as u64 * a.step.0, out);
        kept(a.place + fewer..a.common() + fewer, out)
    }
}

/// Append `bytes` bytes of the base from `at` on, or as many zeros.
fn push_part(b: &TensorInfo, at: Option<u64>, bytes: u64, out: &mut Vec<BasePart>) {
    if bytes == 0 {
        return;
    }
    match (out.last_mut(), at) {
        (Some(last), None) if last.name.is_none() => last.bytes += bytes,
        (Some(last), Some(at)) if last.name.is_some() && last.at + last.bytes == at => last.bytes += bytes,
        (_, None) => out.push(BasePart::zeros(bytes)),
        (_, Some(at)) => out.push(part_of(b, at, bytes)),
    }
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
        let probe = (PROBE_BYTES / self.row).min(common / PROBES).clamp(1, common);
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
