//! Which base tensor a fine-tuned tensor is a delta of. In this order: the one of its name, in the file of its path where several
//! have that name; the one whose name differs as wrappers and loaders change names; the one that its words are most like, so that
//! untied heads stay small; several, or a piece of one, where rows came or went and where experts were stacked or split. And
//! which tensors of the fine-tune are one.

use super::files::{Checkpoint, Found, TensorFile, words};
use super::joined::JoinTables;
use super::likeness::{MarkPlaces, MarkTable, WordRun, likeness};
use super::lonely::Lonely;
use super::renames::{Fitness, RenameTable, closeness};
use super::resized::{resizable, resized};
use crate::error::{Error, Result};
use crate::package::format::container::{SafeTensors, TensorInfo};
use crate::package::format::frames::cut;
use crate::package::format::parts::BaseParts;
use crate::package::format::words::TensorWords;
use crate::package::io::aligned::Aligned;
use std::cell::OnceCell;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use xxhash_rust::xxh3::xxh3_128;

/// Tensors below this are not worth a search among words: names decide.
const WORTH: u64 = 4096;

/// The base of a fine-tuned tensor.
#[derive(Clone, Debug)]
pub(crate) enum Paired<'a> {
    /// A tensor of its dtype and dimensions.
    Whole(Found<'a>),
    /// Put together.
    Parts(BaseParts),
}

impl Paired<'_> {
    /// The name of the base tensor, or of the first one that it is put together of; empty if that is none.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Whole((_, b)) => &b.name,
            Self::Parts(parts) => parts.iter().find_map(|p| p.name.as_deref()).unwrap_or_default(),
        }
    }

    /// Its words in `base`.
    pub(crate) fn words<'w>(&'w self, base: &'w Checkpoint) -> TensorWords<'w> {
        match self {
            Self::Whole(found) => words(base, *found),
            Self::Parts(parts) => TensorWords::Parts(base, parts),
        }
    }
}

/// The base tensor of every fine-tuned tensor, file after file, and the base tensors that are left over.
pub(crate) struct Pairs<'a> {
    pub(crate) bases: FoundBases<'a>,
    /// For every fine-tuned tensor the name of an earlier one with the same bytes.
    pub(crate) same: Vec<Vec<Option<&'a str>>>,
    pub(crate) removed: Vec<&'a str>,
    /// The tensors to which no base tensor belongs.
    pub(crate) lonely: Lonely,
}

fn strip<'n>(name: &'n str, prefix: Option<&str>) -> &'n str {
    prefix.and_then(|p| name.strip_prefix(p)).unwrap_or(name)
}

/// Pair the tensors of two checkpoints; `prefix` is dropped from names on both sides.
pub(crate) fn pair<'a>(base: &'a Checkpoint, ft: &'a Checkpoint, prefix: Option<&str>) -> Result<Pairs<'a>> {
    let mut search = Search::new(base, prefix)?;
    let (bases, used, lonely) = search.all(ft)?;
    let mut removed: Vec<&str> = base.tensors().map(|(_, t)| t.name.as_str()).collect();
    let mut once = HashSet::new();
    removed.retain(|name| !used.contains(name) && once.insert(*name));
    let named = |f: usize, t: &'a TensorInfo| search.named(&ft.files()[f], t);
    Ok(Pairs { bases, same: same(base, ft, &named)?, removed, lonely })
}

/// The base tensors of every file's tensors.
pub(crate) type FoundBases<'a> = Vec<Vec<Option<Paired<'a>>>>;

/// [`pair`] without what else is to be known in order to pack.
pub(crate) fn find_bases<'a>(
    base: &'a Checkpoint,
    ft: &'a Checkpoint,
    prefix: Option<&str>,
) -> Result<FoundBases<'a>> {
    Ok(Search::new(base, prefix)?.all(ft)?.0)
}

/// The ways of finding a base tensor. What they need is made when the first tensor needs it.
struct Search<'a> {
    base: &'a Checkpoint,
    prefix: Option<String>,
    stripped: HashMap<&'a str, Found<'a>>,
    renames: OnceCell<RenameTable<'a>>,
    /// By dtype and dimensions.
    alike: HashMap<(&'a str, &'a [usize]), MarkTable<Found<'a>>>,
    joined: JoinTables<'a>,
}

impl<'a> Search<'a> {
    fn new(base: &'a Checkpoint, prefix: Option<&str>) -> Result<Self> {
        let (stripped, prefix) = (stripped(base, prefix)?, prefix.map(str::to_owned));
        let (renames, alike, joined) = (OnceCell::new(), HashMap::new(), JoinTables::new(base));
        Ok(Self { base, prefix, stripped, renames, alike, joined })
    }

    /// The base of every tensor of `ft`, the base tensors in use, and the tensors that have none.
    fn all(&mut self, ft: &'a Checkpoint) -> Result<(FoundBases<'a>, HashSet<&'a str>, Lonely)> {
        let base = self.base;
        let mut used: HashSet<&str> = HashSet::new();
        let (mut bases, mut lonely) = (Vec::new(), Lonely::default());
        for file in ft.files() {
            let mut list = Vec::new();
            for t in &file.tensors.header().tensors {
                let named = self.named(file, t);
                let found = self.find(file, t, named).map_err(|e| e.of_tensor(&t.name))?;
                used.extend(named.map(|(_, b)| b.name.as_str()));
                match &found {
                    Some(Paired::Whole((_, b))) => drop(used.insert(&b.name)),
                    Some(Paired::Parts(parts)) => {
                        let names = parts.iter().filter_map(|p| base.find(p.name.as_deref()?));
                        used.extend(names.map(|(_, b)| b.name.as_str()));
                    }
                    None => {}
                }
                match &found {
                    // Whatever its base is made of, it has one.
                    Some(_) => lonely.count_info(t, Some(t)),
                    None => lonely.count_info(t, named.map(|(_, b)| b)),
                }
                list.push(found);
            }
            bases.push(list);
        }
        Ok((bases, used, lonely))
    }

    /// The base tensor of the name of `t`, of whatever kind.
    fn named(&self, file: &TensorFile, t: &TensorInfo) -> Option<Found<'a>> {
        let exact = self.base.find_near(&t.name, Some(&file.path), |b| b.same_kind(t));
        exact.or_else(|| self.stripped.get(strip(&t.name, self.prefix.as_deref())).copied())
    }

    fn find(
        &mut self,
        file: &'a TensorFile,
        t: &'a TensorInfo,
        named: Option<Found<'a>>,
    ) -> Result<Option<Paired<'a>>> {
        let fitting = named.filter(|(_, b)| b.same_kind(t));
        if t.bytes() < WORTH {
            return self.small(file, t, named);
        }
        let new = WordRun::whole(TensorWords::File(&file.tensors, t))?;
        if let Some(found) = fitting
            && self.share(t, new, found)?.is_some()
        {
            return Ok(Some(Paired::Whole(found)));
        }
        // A name that says nothing of the words, as after layers were left out, or none.
        let meant = self.renames().meant(t, |b| b.same_kind(t));
        let mut best = self.most_alike(t, new, meant)?;
        if best.is_none() {
            let near = self.marked(t)?.near(new)?;
            best = self.most_alike(t, new, near)?;
        }
        if let Some(found) = best.or(fitting) {
            return Ok(Some(Paired::Whole(found)));
        }
        if let Some(parts) = self.resized(file, t, named)? {
            return Ok(Some(Paired::Parts(parts)));
        }
        Ok(self.joined.find(file, t)?.map(|parts| Paired::Parts(parts.into())))
    }

    /// By names alone.
    fn small(
        &mut self,
        file: &TensorFile,
        t: &TensorInfo,
        named: Option<Found<'a>>,
    ) -> Result<Option<Paired<'a>>> {
        if let Some(found) = named.filter(|(_, b)| b.same_kind(t)) {
            return Ok(Some(Paired::Whole(found)));
        }
        if named.is_none()
            && let [found] = self.renames().meant(t, |b| b.same_kind(t))[..]
        {
            return Ok(Some(Paired::Whole(found)));
        }
        Ok(self.resized(file, t, named)?.map(Paired::Parts))
    }

    fn resized(
        &self,
        file: &TensorFile,
        t: &TensorInfo,
        named: Option<Found<'a>>,
    ) -> Result<Option<BaseParts>> {
        let meant = match named {
            Some(found) => vec![found],
            None => self.renames().meant(t, |b| resizable(t, b)),
        };
        for found in meant {
            if let Some(parts) = resized(self.base, file, t, found)? {
                return Ok(Some(parts.into()));
            }
        }
        Ok(None)
    }

    fn renames(&self) -> &RenameTable<'a> {
        self.renames.get_or_init(|| RenameTable::new(self.base))
    }

    /// How alike `t`, whose words are `new`, and a base tensor of its kind are.
    fn share(&self, t: &TensorInfo, new: WordRun<'_>, found: Found<'a>) -> Result<Option<f64>> {
        let Some((dtype, _)) = t.matrix() else { return Ok(None) };
        likeness(dtype, new, WordRun::whole(words(self.base, found))?)
    }

    /// The most alike of some base tensors; of those that are equally so the one of the closest name.
    fn most_alike(
        &self,
        t: &TensorInfo,
        new: WordRun<'_>,
        among: Vec<Found<'a>>,
    ) -> Result<Option<Found<'a>>> {
        let mut best: Option<(Fitness, Found<'a>)> = None;
        for found in among {
            let Some(share) = self.share(t, new, found)? else { continue };
            let rank = (share, closeness(&t.name, &found.1.name));
            if best.as_ref().is_none_or(|(b, _)| rank > *b) {
                best = Some((rank, found));
            }
        }
        Ok(best.map(|(_, found)| found))
    }

    /// All base tensors of the kind of `t`, by their words.
    fn marked(&mut self, t: &'a TensorInfo) -> Result<&MarkTable<Found<'a>>> {
        let key = (t.dtype.as_str(), t.dims.as_slice());
        match self.alike.entry(key) {
            Entry::Occupied(made) => Ok(made.into_mut()),
            Entry::Vacant(room) => {
                let (dtype, _) = t.matrix().ok_or_else(|| Error::internal("a tensor without words"))?;
                let mut table = MarkTable::new(dtype, MarkPlaces::Spread);
                for found in self.base.tensors().filter(|(_, b)| b.same_kind(t)) {
                    table.add(WordRun::whole(words(self.base, found))?, found)?;
                }
                Ok(room.insert(table))
            }
        }
    }
}

fn stripped<'a>(base: &'a Checkpoint, prefix: Option<&str>) -> Result<HashMap<&'a str, Found<'a>>> {
    let mut out: HashMap<&str, Found<'a>> = HashMap::new();
    for (f, t) in base.tensors().filter(|_| prefix.is_some()) {
        match out.insert(strip(&t.name, prefix), (f, t)) {
            Some((_, other)) if other.name != t.name => {
                return Err(Error::invalid(format!(
                    "without the prefix, the base tensors `{}` and `{}` have one name",
                    other.name, t.name
                )));
            }
            _ => {}
        }
    }
    Ok(out)
}

/// Tensors with the bytes of an earlier one, as a model with tied weights has them where it was saved with both. Where both
/// have a base of their own, those must be equal, too: the one delta then serves on either.
fn same<'a>(
    base: &'a Checkpoint,
    ft: &'a Checkpoint,
    named: &dyn Fn(usize, &'a TensorInfo) -> Option<Found<'a>>,
) -> Result<Vec<Vec<Option<&'a str>>>> {
    let bases_agree = |a: Found<'a>, b: Found<'a>| -> Result<bool> {
        match (named(a.0, a.1), named(b.0, b.1)) {
            (None, _) => Ok(true),
            (Some(_), None) => Ok(false),
            (Some((f, x)), Some((g, y))) => {
                Ok(x.same_kind(y) && equal(&base.files()[f].tensors, x, &base.files()[g].tensors, y)?)
            }
        }
    };
    let mut seen: HashMap<(u128, &str, &[usize]), Vec<Found<'a>>> = HashMap::new();
    let mut out = Vec::new();
    for (f, file) in ft.files().iter().enumerate() {
        let mut list = Vec::new();
        for t in &file.tensors.header().tensors {
            let first = ft.find(&t.name).is_some_and(|(at, _)| at == f);
            if t.bytes() < WORTH || !first {
                list.push(None);
                continue;
            }
            let key = (
                xxh3_128(&WordRun::whole(TensorWords::File(&file.tensors, t))?.spots()?),
                t.dtype.as_str(),
                t.dims.as_slice(),
            );
            let earlier = seen.entry(key).or_default();
            let mut found = None;
            for &(e, other) in earlier.iter() {
                if other.bytes() == t.bytes()
                    && equal(&ft.files()[e].tensors, other, &file.tensors, t)?
                    && bases_agree((f, t), (e, other))?
                {
                    found = Some(other.name.as_str());
                    break;
                }
            }
            if found.is_none() {
                earlier.push((f, t));
            }
            list.push(found);
        }
        out.push(list);
    }
    Ok(out)
}

fn equal(a: &SafeTensors, ta: &TensorInfo, b: &SafeTensors, tb: &TensorInfo) -> Result<bool> {
    let (a, b) = (TensorWords::File(a, ta), TensorWords::File(b, tb));
    let (mut x, mut y) = (Aligned::default(), Aligned::default());
    for part in cut(0..a.len()?, 256 << 10) {
        if a.get(part.clone(), &mut x)? != b.get(part, &mut y)? {
            return Ok(false);
        }
    }
    Ok(true)
}
