//! Bases put together where no base tensor is as large as the fine-tuned one: of several in a stack, or of a piece of one. Found
//! by the words, so that it matters little who joined or split them, and how the names were changed.

use super::files::{Checkpoint, Found, TensorFile, words};
use super::likeness::{MarkPlaces, MarkTable, WordRun, likeness};
use super::renames::{Fitness, closeness};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::format::container::TensorInfo;
use crate::package::format::parts::BasePart;
use crate::package::format::words::TensorWords;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

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
