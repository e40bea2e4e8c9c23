//! Which base tensor a fine-tuned tensor is a delta of: that of its name; else, if its dtype and shape fit, the one that its
//! words are most like, so that renamed tensors and untied heads stay small. And which tensors of the fine-tune are one.

use super::files::Checkpoint;
use super::lonely::Lonely;
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use crate::package::format::container::{SafeTensors, TensorInfo};
use crate::package::format::frames::cut;
use crate::package::format::words::TensorWords;
use crate::package::io::aligned::Aligned;
use std::collections::{HashMap, HashSet};
use xxhash_rust::xxh3::xxh3_128;

/// Places of a tensor that are read to tell whether two are alike, and bytes at each.
const SPOTS: usize = 32;
const SPOT_BYTES: usize = 64;
/// Share of alike words from which a tensor is taken for another one's successor. Unrelated weights reach a few percent.
const ALIKE: f64 = 0.5;
/// Candidates that are looked at, those with the most similar names first.
const CANDIDATES: usize = 64;
/// Tensors below this are not worth a search.
const WORTH: u64 = 4096;

/// A base tensor: which file, and where in it.
pub(crate) type Found<'a> = (usize, &'a TensorInfo);

/// The base tensor of every fine-tuned tensor, file after file, and the base tensors that are left over.
pub(crate) struct Pairs<'a> {
    pub(crate) bases: Vec<Vec<Option<Found<'a>>>>,
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
    let stripped = stripped(base, prefix)?;
    let by_name = |name: &str| base.find(name).or_else(|| stripped.get(strip(name, prefix)).copied());
    let mut by_shape: HashMap<(&str, &[usize]), Vec<Found<'a>>> = HashMap::new();
    base.tensors().for_each(|(f, t)| by_shape.entry((&t.dtype, &t.dims)).or_default().push((f, t)));
    let mut used: HashSet<&str> = HashSet::new();
    let (mut bases, mut lonely) = (Vec::new(), Lonely::default());
    for file in ft.files() {
        let mut list = Vec::new();
        for t in &file.tensors.header().tensors {
            let named = by_name(&t.name);
            used.extend(named.map(|(_, b)| b.name.as_str()));
            let found = match named {
                Some(found) => Some(found),
                None => similar(base, &file.tensors, t, by_shape.get(&(t.dtype.as_str(), t.dims.as_slice())))
                    .map_err(|e| e.of_tensor(&t.name))?,
            };
            used.extend(found.map(|(_, b)| b.name.as_str()));
            lonely.count_info(t, found.map(|(_, b)| b));
            // A base of another dtype or shape is of no use.
            let fits = |b: &TensorInfo| (&b.dtype, &b.dims) == (&t.dtype, &t.dims);
            list.push(found.filter(|(_, b)| fits(b) && Dtype::from_name(&t.dtype).is_some()));
        }
        bases.push(list);
    }
    let removed = base.tensors().map(|(_, t)| t.name.as_str()).filter(|n| !used.contains(n)).collect();
    Ok(Pairs { bases, same: same(base, ft, &by_name)?, removed, lonely })
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

/// The candidate that `t` is most like, if it is alike enough.
fn similar<'a>(
    base: &'a Checkpoint,
    file: &SafeTensors,
    t: &TensorInfo,
    candidates: Option<&Vec<Found<'a>>>,
) -> Result<Option<Found<'a>>> {
    let (Some(dtype), Some(candidates)) = (Dtype::from_name(&t.dtype), candidates) else { return Ok(None) };
    if t.bytes() < WORTH {
        return Ok(None);
    }
    let ending = |b: &str| b.bytes().rev().zip(t.name.bytes().rev()).take_while(|(x, y)| x == y).count();
    let mut order: Vec<&Found<'a>> = candidates.iter().collect();
    order.sort_by_key(|(_, b)| std::cmp::Reverse(ending(&b.name)));
    let ours = spots(file, t)?;
    let mut best: Option<(f64, Found<'a>)> = None;
    for &&(f, b) in order.iter().take(CANDIDATES) {
        let alike = alike(dtype, &ours, &spots(&base.files()[f].tensors, b)?);
        if alike >= ALIKE && best.is_none_or(|(a, _)| alike > a) {
            best = Some((alike, (f, b)));
        }
    }
    Ok(best.map(|(_, found)| found))
}

/// Bytes of a tensor at evenly spread places.
fn spots(file: &SafeTensors, t: &TensorInfo) -> Result<Vec<u8>> {
    let words = TensorWords::File(file, t);
    let len = words.len()?;
    if len <= SPOTS * SPOT_BYTES {
        return file.read(t);
    }
    let mut out = vec![0; SPOTS * SPOT_BYTES];
    for (i, spot) in out.chunks_exact_mut(SPOT_BYTES).enumerate() {
        let at = (len - SPOT_BYTES) / (SPOTS - 1) * i / SPOT_BYTES * SPOT_BYTES;
        words.read(at, spot)?;
    }
    Ok(out)
}

/// Share of words that agree in sign, exponent and the first bits after it.
fn alike(dtype: Dtype, a: &[u8], b: &[u8]) -> f64 {
    let w = dtype.word_bytes();
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |v, x| (v << 8) | u64::from(*x));
    let cut = match w {
        1 => 0,
        2 => 4,
        _ => w as u32 * 4,
    };
    let agree = a.chunks_exact(w).zip(b.chunks_exact(w)).filter(|(x, y)| word(x) >> cut == word(y) >> cut);
    agree.count() as f64 / (a.len() / w).max(1) as f64
}

/// Tensors with the bytes of an earlier one, as a model with tied weights has them where it was saved with both. Where both
/// have a base of their own, those must be equal, too: the one delta then serves on either.
fn same<'a>(
    base: &'a Checkpoint,
    ft: &'a Checkpoint,
    by_name: &dyn Fn(&str) -> Option<Found<'a>>,
) -> Result<Vec<Vec<Option<&'a str>>>> {
    let bases_agree = |a: &str, b: &str| -> Result<bool> {
        match (by_name(a), by_name(b)) {
            (None, _) => Ok(true),
            (Some(_), None) => Ok(false),
            (Some((f, x)), Some((g, y))) => {
                let same_kind = (&x.dtype, &x.dims) == (&y.dtype, &y.dims);
                Ok(same_kind && equal(&base.files()[f].tensors, x, &base.files()[g].tensors, y)?)
            }
        }
    };
    let mut seen: HashMap<(u128, &str, &[usize]), Vec<Found<'_>>> = HashMap::new();
    let mut out = Vec::new();
    for (f, file) in ft.files().iter().enumerate() {
        let mut list = Vec::new();
        for t in &file.tensors.header().tensors {
            let first = ft.find(&t.name).is_some_and(|(at, _)| at == f);
            if t.bytes() < WORTH || !first {
                list.push(None);
                continue;
            }
            let key = (xxh3_128(&spots(&file.tensors, t)?), t.dtype.as_str(), t.dims.as_slice());
            let earlier = seen.entry(key).or_default();
            let mut found = None;
            for &(e, other) in earlier.iter() {
                if equal(&ft.files()[e].tensors, other, &file.tensors, t)?
                    && bases_agree(&t.name, &other.name)?
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
