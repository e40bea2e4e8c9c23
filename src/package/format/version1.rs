//! Version 1 of the format, which is only read: an entry of the safetensors file for each tensor and each source file, a
//! record in `__metadata__` for each tensor, and a digest of all that.

use super::container::{SafeTensors, TensorInfo};
use super::parts::BaseParts;
use super::paths::check_files;
use super::record::{BaseTensor, Entry, RESERVED, Records, SourceFile, check_entry};
use crate::codec::Encoding;
use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::options::Codec;
use serde::Deserialize;
use std::collections::BTreeMap;
use xxhash_rust::xxh3::Xxh3;

const CHECK: &str = "xorz:check";
const REMOVED: &str = "xorz:removed";
const FILES: &str = "xorz:files";
const SOURCE: &str = "xorz:source";
/// The value of [`SOURCE`] in a package made from a folder.
const FOLDER: &str = "folder";
const VERSION: u32 = 1;

/// The metadata key of a tensor's record.
fn tensor_key(name: &str) -> String {
    format!("xorz:tensor:{name}")
}

/// The entry that holds the safetensors header of source file `i`, or the whole file if it has no tensors.
fn file_entry(i: usize) -> String {
    format!("xorz:file:{i}")
}

/// The tensor that an entry holds: the source file where an earlier one has a tensor of that name, and the name. `None` for
/// an entry that holds none.
fn tensor_of(entry: &str) -> Option<(Option<usize>, &str)> {
    let Some(ours) = entry.strip_prefix(RESERVED) else { return Some((None, entry)) };
    let (number, name) = ours.strip_prefix("again:")?.split_once(':')?;
    // In its one form, so that no tensor has two names.
    let i = number.parse::<usize>().ok().filter(|i| i.to_string() == number)?;
    Some((Some(i), name))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    codec: String,
    check: String,
    base: Option<String>,
    base_name: Option<String>,
    prefer: Option<String>,
    encoding: Option<String>,
    changed: Option<u64>,
    same: Option<String>,
}

/// Read and check what a package of version 1 says.
pub(super) fn read_version1(container: &SafeTensors) -> Result<Records> {
    let (tensors, metadata) = (&container.header().tensors, &container.header().metadata);
    check_digest(tensors, metadata)?;
    let mut records = Records { removed: optional(metadata, REMOVED)?, ..Records::default() };
    let files: Vec<SourceFile> = optional(metadata, FILES)?;
    records.folder = match metadata.get(SOURCE).map(String::as_str) {
        None => false,
        Some(FOLDER) => true,
        Some(other) => return Err(Error::corrupt(format!("made from a `{other}`, which is unknown"))),
    };
    check_files(&files, records.folder)?;
    for info in tensors {
        let Some(of) = tensor_of(&info.name) else { continue };
        let key = tensor_key(&info.name);
        let text =
            metadata.get(&key).ok_or_else(|| Error::corrupt(format!("metadata `{key}` is missing")))?;
        records.entries.push(decode(info, of, &key, text)?);
    }
    let known = [REMOVED, FILES, SOURCE].into_iter().filter(|k| metadata.contains_key(*k)).count();
    let unknown = || Error::corrupt("metadata or entries that version 1 does not know");
    for (i, file) in files.into_iter().enumerate() {
        let stored = container.find(&file_entry(i)).ok_or_else(unknown)?;
        records.files.push((file, stored.range.clone()));
    }
    if metadata.len() != 3 + records.entries.len() + known
        || tensors.len() != records.entries.len() + records.files.len()
    {
        return Err(unknown());
    }
    Ok(records)
}

fn optional<T: serde::de::DeserializeOwned>(
    metadata: &BTreeMap<String, String>,
    key: &str,
) -> Result<Vec<T>> {
    metadata.get(key).map_or(Ok(Vec::new()), |text| from_json(key, text))
}

/// Parse one metadata value.
fn from_json<'a, T: Deserialize<'a>>(key: &str, text: &'a str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::corrupt(format!("metadata `{key}` is not valid: {e}")))
}

/// Parse and check the record of the stored tensor `info`.
fn decode(info: &TensorInfo, (again, name): (Option<usize>, &str), key: &str, text: &str) -> Result<Entry> {
    let r: Record = from_json(key, text)?;
    let bad =
        |what: &str, value: &str| Error::corrupt(format!("metadata `{key}`: {what} `{value}` is unknown"));
    let codec = Codec::from_name(&r.codec).ok_or_else(|| bad("codec", &r.codec))?;
    let digest = |hex: &str| Digest::from_hex(hex).ok_or_else(|| bad("digest", hex));
    let renamed = r.base_name.is_some();
    let base = r.base.as_deref().map(|hex| -> Result<BaseTensor> {
        let of = r.base_name.clone().unwrap_or_else(|| name.to_owned());
        Ok(BaseTensor {
            name: of,
            file: None,
            parts: BaseParts::default(),
            digest: digest(hex)?,
            short: false,
            sha256: None,
        })
    });
    let prefer = r.prefer.as_deref().map(|p| p.parse().map_err(|_| bad("prefer", p))).transpose()?;
    let encoding = r
        .encoding
        .as_deref()
        .map(|n| Encoding::ALL.into_iter().find(|e| e.name() == n).ok_or_else(|| bad("encoding", n)))
        .transpose()?;
    let entry = Entry {
        name: name.to_owned(),
        again,
        same: r.same,
        dtype: r.dtype,
        dims: r.shape,
        bytes: r.bytes,
        codec,
        base: base.transpose()?,
        encoding,
        prefer,
        changed: r.changed,
        stored_bytes: info.bytes(),
        range: info.range.clone(),
        check: digest(&r.check)?,
        joint: None,
        version: VERSION,
    };
    let within = |e: Error| e.within(format_args!("metadata `{key}`"));
    if info.dtype != "U8" || info.dims.len() != 1 {
        let what = format!("stored as {} {:?}, not as one row of U8", info.dtype, info.dims);
        return Err(within(Error::corrupt(what)));
    }
    if renamed && !codec.delta() {
        return Err(within(Error::corrupt("a tensor that is no delta has the field `base_name`")));
    }
    check_entry(&entry).map_err(within)?;
    Ok(entry)
}

/// The header's own digest: every metadata pair but itself in key order, then every tensor in data order.
fn check_digest(tensors: &[TensorInfo], metadata: &BTreeMap<String, String>) -> Result<()> {
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
    let want = Digest(h.digest128().to_le_bytes()).to_string();
    match metadata.get(CHECK).map_or("", String::as_str) {
        found if found == want => Ok(()),
        found => {
            Err(Error::corrupt(format!("the header is damaged: its digest is {want}, it says `{found}`")))
        }
    }
}
