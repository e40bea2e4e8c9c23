//! What a package's `__metadata__` says: the version, one record per tensor, the files it was made from, and a digest of
//! all that. SPEC.md is the meaning; this file is its only reader and writer.

use super::container::TensorInfo;
use super::kinds::{dtype_bits, words_of};
use super::parts::{BasePart, check_parts};
use crate::codec::{Encoding, Prefer};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use crate::package::options::Codec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Everything of ours in a package begins with this, so no tensor's name may.
pub(super) const RESERVED: &str = "xorz:";
pub(crate) const FORMAT: &str = "xorz";
/// The format version that this library writes.
pub(crate) const VERSION: u32 = 2;
/// Those that it reads, and the layout of the resident deltas that packages of each hold.
const LAYOUTS: [(u32, u16); 2] = [(1, 0), (VERSION, crate::resident::VERSION)];
pub(super) const CHECK: &str = "xorz:check";
pub(super) const REMOVED: &str = "xorz:removed";
pub(crate) const FILES: &str = "xorz:files";
pub(super) const SOURCE: &str = "xorz:source";
/// The value of [`SOURCE`] in a package made from a folder.
pub(super) const FOLDER: &str = "folder";
const TENSOR: &str = "xorz:tensor:";

/// The format version that a package's metadata names.
///
/// # Errors
/// `Unsupported` for one that this library does not read.
pub(crate) fn version(metadata: &BTreeMap<String, String>) -> Result<u32> {
    let text = metadata.get("format_version").map_or("none", String::as_str);
    let known = LAYOUTS.iter().map(|(version, _)| *version).find(|v| v.to_string() == text);
    known.ok_or_else(|| {
        Error::unsupported(format!(
            "package format version {text}, but this xorz reads versions 1 to {VERSION}"
        ))
    })
}

/// The metadata key of a tensor's record.
pub(super) fn tensor_key(name: &str) -> String {
    format!("{TENSOR}{name}")
}

/// The name of the entry that holds the safetensors header of source file `i`, or the whole file if it has no tensors.
pub(super) fn file_entry(i: usize) -> String {
    format!("{RESERVED}file:{i}")
}

/// The entry of tensor `name` of source file `i`, where an earlier file has a tensor of that name.
pub(crate) fn again_entry(i: usize, name: &str) -> String {
    format!("{RESERVED}again:{i}:{name}")
}

/// The tensor that an entry holds: its name, or `None` for an entry that holds none.
pub(super) fn tensor_of(entry: &str) -> Option<&str> {
    let Some(ours) = entry.strip_prefix(RESERVED) else { return Some(entry) };
    let (number, name) = ours.strip_prefix("again:")?.split_once(':')?;
    // As `again_entry` writes it, so that no tensor has two names.
    number.parse::<usize>().is_ok_and(|i| i.to_string() == number).then_some(name)
}

/// One tensor of a package.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name in the fine-tune.
    pub name: String,
    /// safetensors dtype name.
    pub dtype: String,
    /// All dimensions.
    pub dims: Vec<usize>,
    /// Bytes of the fine-tuned tensor.
    pub bytes: u64,
    /// How it is stored.
    pub codec: Codec,
    /// The base tensor it is a delta against; `None` where it is no delta.
    pub base: Option<BaseTensor>,
    /// The encoding of the stored resident delta; `None` for codecs that hold none.
    pub encoding: Option<Encoding>,
    /// What the resident delta was encoded for; `None` where it is no delta.
    pub prefer: Option<Prefer>,
    /// Words that differ from the base; `None` where it is no delta.
    pub changed: Option<u64>,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// The tensor of the fine-tune whose bytes these are, for codec `same`.
    pub same: Option<String>,
    pub(crate) key: String,
    pub(crate) range: Range<u64>,
    pub(crate) check: Digest,
    /// The format version of the package it is of.
    pub(crate) version: u32,
}

/// The base tensor that a delta belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseTensor {
    /// Its name in the base; of a base put together, that of the first tensor in it.
    pub name: String,
    /// The file of the base that has it, where several had a tensor of that name.
    pub file: Option<String>,
    /// What it is put together of, where it is not one whole tensor of the fine-tuned one's dtype and dimensions.
    pub parts: Vec<BasePart>,
    /// Its digest, of the words as the delta sees them.
    pub digest: Digest,
}

impl Entry {
    /// The words that deltas see in it: its dtype's, or words of that size where this crate does not know it. `None` for an
    /// unknown one in a package of version 1.
    pub fn word_dtype(&self) -> Option<Dtype> {
        self.matrix().map(|(dtype, _)| dtype)
    }

    /// Rows and columns of these words.
    ///
    /// # Errors
    /// `InvalidArgument` if the dimensions overflow.
    pub fn shape(&self) -> Result<Shape> {
        self.matrix().map_or_else(|| Shape::of_dims(&self.dims), |(_, shape)| Ok(shape))
    }

    fn matrix(&self) -> Option<(Dtype, Shape)> {
        match (self.version, Dtype::from_name(&self.dtype)) {
            (1, None) => None,
            _ => words_of(&self.dtype, &self.dims, self.bytes),
        }
    }

    /// The layout that a resident delta of its package has.
    pub(crate) fn layout(&self) -> Option<u16> {
        LAYOUTS.iter().find(|(version, _)| *version == self.version).map(|(_, layout)| *layout)
    }
}

/// A source file that `unpack` gives back byte for byte.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Path within the folder that was packed, `/` between its parts; a name where a single file was.
    pub path: String,
    /// sha256 of the whole file, 64 hexadecimal digits.
    pub sha256: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Whether it may be executed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
    /// Length of its safetensors header in bytes, padding included; `None` for a file that was carried along as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_bytes: Option<u64>,
    /// Digest of the stored entry.
    pub check: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    codec: String,
    check: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_file: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    base_parts: Vec<BasePart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    changed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    same: Option<String>,
}

/// Digest of stored bytes; it finds accidents, not forgeries.
pub(crate) fn check_of(stored: &[u8]) -> Digest {
    Digest(xxh3_128(stored).to_le_bytes())
}

/// The name that `Prefer`'s parser reads.
pub(super) fn prefer_name(prefer: Prefer) -> &'static str {
    match prefer {
        Prefer::Speed => "speed",
        Prefer::Memory => "memory",
    }
}

/// The JSON record of an entry.
pub(crate) fn encode(e: &Entry) -> Result<String> {
    let record = Record {
        dtype: e.dtype.clone(),
        shape: e.dims.clone(),
        bytes: e.bytes,
        codec: e.codec.name().into(),
        check: e.check.to_string(),
        base: e.base.as_ref().map(|b| b.digest.to_string()),
        base_name: e.base.as_ref().filter(|b| b.name != e.name && b.parts.is_empty()).map(|b| b.name.clone()),
        base_file: e.base.as_ref().and_then(|b| b.file.clone()),
        base_parts: e.base.as_ref().map(|b| b.parts.clone()).unwrap_or_default(),
        prefer: e.prefer.map(|p| prefer_name(p).into()),
        encoding: e.encoding.map(|x| x.name().into()),
        changed: e.changed,
        same: e.same.clone(),
    };
    to_json(&record)
}

pub(crate) fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::internal(format!("json: {e}")))
}

/// Parse one metadata value.
pub(super) fn from_json<'a, T: Deserialize<'a>>(key: &str, text: &'a str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::corrupt(format!("metadata `{key}` is not valid: {e}")))
}

/// Parse and check the record of the stored tensor `info`.
pub(crate) fn decode(version: u32, info: &TensorInfo, text: &str) -> Result<Entry> {
    let key = tensor_key(&info.name);
    let r: Record = from_json(&key, text)?;
    let bad =
        |what: &str, value: &str| Error::corrupt(format!("metadata `{key}`: {what} `{value}` is unknown"));
    let codec = Codec::from_name(&r.codec).ok_or_else(|| bad("codec", &r.codec))?;
    let digest = |hex: &str| Digest::from_hex(hex).ok_or_else(|| bad("digest", hex));
    let name = tensor_of(&info.name).ok_or_else(|| Error::corrupt(format!("`{}` is reserved", info.name)))?;
    let renamed = r.base_name.is_some() || r.base_file.is_some() || !r.base_parts.is_empty();
    if (r.base_name.is_some() || r.base_file.is_some()) && !r.base_parts.is_empty() {
        return Err(Error::corrupt(format!("metadata `{key}`: a base of parts has a name or a file, too")));
    }
    let base = match &r.base {
        Some(hex) => {
            let first = r.base_parts.iter().find_map(|p| p.name.clone());
            Some(BaseTensor {
                name: r.base_name.or(first).unwrap_or_else(|| name.to_owned()),
                file: r.base_file,
                parts: r.base_parts,
                digest: digest(hex)?,
            })
        }
        None => None,
    };
    let prefer = r.prefer.as_deref().map(|p| p.parse().map_err(|_| bad("prefer", p))).transpose()?;
    let encoding = r
        .encoding
        .as_deref()
        .map(|n| Encoding::ALL.into_iter().find(|e| e.name() == n).ok_or_else(|| bad("encoding", n)))
        .transpose()?;
    let entry = Entry {
        name: name.to_owned(),
        key: info.name.clone(),
        same: r.same,
        dtype: r.dtype,
        dims: r.shape,
        bytes: r.bytes,
        codec,
        base,
        encoding,
        prefer,
        changed: r.changed,
        stored_bytes: info.bytes(),
        range: info.range.clone(),
        check: digest(&r.check)?,
        version,
    };
    check_entry(&entry, info, renamed).map_err(|e| e.within(format_args!("metadata `{key}`")))?;
    Ok(entry)
}

/// What must agree between the fields of one record.
fn check_entry(e: &Entry, info: &TensorInfo, renamed: bool) -> Result<()> {
    if info.dtype != "U8" || info.dims.len() != 1 {
        return Err(Error::corrupt(format!(
            "stored as {} {:?}, not as one row of U8",
            info.dtype, info.dims
        )));
    }
    let bits = e.dims.iter().try_fold(dtype_bits(&e.dtype).unwrap_or(0), |a, &d| a.checked_mul(d as u64));
    if dtype_bits(&e.dtype).is_some() && bits != e.bytes.checked_mul(8) {
        return Err(Error::corrupt(format!("{} {:?} does not take {} bytes", e.dtype, e.dims, e.bytes)));
    }
    if e.codec == Codec::Predicted && e.version < 2 {
        return Err(Error::corrupt(format!(
            "codec `{}`, which packages of version {} do not have",
            e.codec.name(),
            e.version
        )));
    }
    let delta = e.codec.delta();
    let resident = matches!(e.codec, Codec::Resident | Codec::ResidentZstd);
    let fields = [
        ("base", e.base.is_some(), delta),
        ("prefer", e.prefer.is_some(), delta),
        ("changed", e.changed.is_some(), delta),
        ("encoding", e.encoding.is_some(), resident),
        ("same", e.same.is_some(), e.codec == Codec::Same),
    ];
    for (field, has, should) in fields {
        if has != should {
            let verb = if has { "has a" } else { "lacks the" };
            return Err(Error::corrupt(format!("codec `{}` {verb} field `{field}`", e.codec.name())));
        }
    }
    if renamed && !delta {
        return Err(Error::corrupt(
            "a tensor that is no delta has the field `base_name`, `base_file` or `base_parts`",
        ));
    }
    if e.same.is_some() && e.stored_bytes > 0 {
        return Err(Error::corrupt(format!("codec `same` stores {} bytes", e.stored_bytes)));
    }
    if delta {
        let dtype = e.word_dtype().ok_or_else(|| Error::corrupt(format!("a delta of dtype {}", e.dtype)))?;
        let shape = e.shape()?;
        if shape.bytes(dtype)? as u64 != e.bytes {
            return Err(Error::corrupt(format!("{} {:?} does not take {} bytes", e.dtype, e.dims, e.bytes)));
        }
        check_base(e)?;
        if e.changed.unwrap_or(0) > shape.words()? as u64 {
            return Err(Error::corrupt(format!("{:?} of {} words changed", e.changed, shape.words()?)));
        }
    }
    Ok(())
}

/// Where the base is said to be.
fn check_base(e: &Entry) -> Result<()> {
    let Some(base) = &e.base else { return Ok(()) };
    if (base.file.is_some() || !base.parts.is_empty()) && e.version < 2 {
        return Err(Error::corrupt(format!(
            "version {} has neither `base_file` nor `base_parts`",
            e.version
        )));
    }
    if base.parts.is_empty() { Ok(()) } else { check_parts(e.bytes, &base.parts) }
}

/// The digest of a package's header: every metadata pair but itself in key order, then every tensor in data order.
pub(super) fn header_check(metadata: &BTreeMap<String, String>, tensors: &[TensorInfo]) -> Digest {
    let mut h = Xxh3::new();
    let mut field = |bytes: &[u8]| {
        h.update(&(bytes.len() as u64).to_le_bytes());
        h.update(bytes);
    };
    for (key, value) in metadata.iter().filter(|(k, _)| *k != CHECK) {
        field(key.as_bytes());
        field(value.as_bytes());
    }
    for t in tensors {
        field(t.name.as_bytes());
        field(t.dtype.as_bytes());
        t.dims.iter().for_each(|&d| field(&(d as u64).to_le_bytes()));
        field(&t.range.start.to_le_bytes());
        field(&t.range.end.to_le_bytes());
    }
    Digest(h.digest128().to_le_bytes())
}

/// A resident delta of a package is what its record says.
pub(crate) fn check_delta(entry: &Entry, h: &crate::resident::Header) -> Result<()> {
    let (dtype, shape) = (entry.word_dtype(), entry.shape()?);
    if Some(h.version) != entry.layout() {
        return Err(Error::corrupt(format!(
            "the delta is of layout {}, which packages of version {} do not hold",
            h.version, entry.version
        )));
    }
    if (Some(h.dtype), h.shape) != (dtype, shape) {
        return Err(Error::corrupt(format!(
            "the delta is of a {} matrix of {}, its record says {shape} of {}",
            h.shape, h.dtype, entry.dtype
        )));
    }
    let expected = entry.base.as_ref().map(|b| b.digest);
    if Some(h.base_digest) != expected {
        return Err(Error::corrupt(format!("the delta names base {}, its record another", h.base_digest)));
    }
    if Some(h.changed) != entry.changed {
        return Err(Error::corrupt(format!(
            "the delta has {} changed words, its record says {:?}",
            h.changed, entry.changed
        )));
    }
    if entry.encoding.is_some_and(|e| e != h.encoding) {
        return Err(Error::corrupt(format!(
            "the delta is encoded as {}, its record says {:?}",
            h.encoding, entry.encoding
        )));
    }
    Ok(())
}
