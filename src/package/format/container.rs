//! The container: safetensors files, read strictly. The only parser of a file's header.
//!
//! Knows names, dtypes, shapes and byte ranges, nothing of deltas. Reads by position, never a whole file, and allocates
//! nothing that the file's own length has not earned.

use super::kinds::{dtype_bits, words_of};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};
use crate::package::io::regular::open_regular;
use crate::package::io::shared::{ReadCache, SharedFile};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, de};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use xxhash_rust::xxh3::xxh3_128;

/// The longest header that is read, in bytes; the limit of the safetensors format itself.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes before the header text: its length, a little-endian u64.
pub(crate) const LENGTH_BYTES: u64 = 8;

/// One tensor of a file, as its header tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// safetensors dtype name, known to this crate or not.
    pub dtype: String,
    /// All dimensions.
    pub dims: Vec<usize>,
    /// Its bytes, relative to the start of the data.
    pub range: Range<u64>,
}

impl TensorInfo {
    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Words and matrix as which deltas see it; `None` if its size overflows.
    pub(crate) fn matrix(&self) -> Option<(Dtype, Shape)> {
        words_of(&self.dtype, &self.dims, self.bytes())
    }

    /// Whether a delta of the one may be laid on the other: dtype, dimensions and bytes are the same.
    pub(crate) fn same_kind(&self, other: &Self) -> bool {
        (&self.dtype, &self.dims, self.bytes()) == (&other.dtype, &other.dims, other.bytes())
    }
}

/// A parsed and checked safetensors header.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// The tensors, in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parse and check a header's text: no duplicate names or keys, ranges contiguous from 0 without overlap or hole,
    /// sizes equal to dtype times shape (for dtypes that have a known size).
    ///
    /// # Errors
    /// `Corrupt`, naming the tensor and both values.
    pub fn parse(text: &[u8]) -> Result<Self> {
        if text.first() != Some(&b'{') {
            return Err(Error::corrupt("the safetensors header does not begin with '{'"));
        }
        let raw: RawHeader = serde_json::from_slice(text)
            .map_err(|e| Error::corrupt(format!("the safetensors header is not valid: {e}")))?;
        let mut tensors = raw.tensors;
        tensors.sort_by_key(|t| (t.range.start, t.range.end));
        let mut at = 0;
        for t in &tensors {
            if t.range.start != at || t.range.end < at {
                return Err(Error::corrupt(format!(
                    "tensor `{}` has the data offsets {}..{}, but the data before it end at {at}",
                    t.name, t.range.start, t.range.end
                )));
            }
            check_size(t)?;
            // No words, but rows without end: nothing here could walk along them.
            Shape::of_dims(&t.dims).map_err(|e| e.of_tensor(&t.name))?;
            at = t.range.end;
        }
        Ok(Self { tensors, metadata: raw.metadata })
    }

    /// Total bytes of the tensors.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |t| t.range.end)
    }
}

fn check_size(t: &TensorInfo) -> Result<()> {
    let Some(bits) = dtype_bits(&t.dtype) else { return Ok(()) };
    // In wide numbers: two that both overflow are not equal.
    let want = t.dims.iter().try_fold(u128::from(bits), |a, &d| a.checked_mul(d as u128));
    if want != Some(u128::from(t.bytes()) * 8) {
        return Err(Error::corrupt(format!(
            "tensor `{}` of {} {:?} takes {} bytes, but its data offsets hold {}",
            t.name,
            t.dtype,
            t.dims,
            want.map_or("too many".into(), |w| w.div_ceil(8).to_string()),
            t.bytes()
        )));
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// A JSON object of strings that refuses duplicate keys (serde's maps keep the last one silently).
struct UniqueMap(BTreeMap<String, String>);

struct RawHeader {
    tensors: Vec<TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: de::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = UniqueMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<UniqueMap, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&key) {
                        return Err(de::Error::custom(format!("duplicate key `{key}` in __metadata__")));
                    }
                    out.insert(key, value);
                }
                Ok(UniqueMap(out))
            }
        }
        d.deserialize_map(V)
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: de::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut seen = HashSet::new();
                let mut out = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    // By digests, of which a name takes a whole copy less; two names of one digest are refused, too.
                    if !seen.insert(name_digest(&name)) {
                        return Err(de::Error::custom(format!("duplicate tensor `{name}`")));
                    }
                    if name == "__metadata__" {
                        out.metadata =
                            map.next_value::<Option<UniqueMap>>()?.map(|m| m.0).unwrap_or_default();
                        continue;
                    }
                    let info: RawInfo = map.next_value()?;
                    let range = info.data_offsets.0..info.data_offsets.1;
                    out.tensors.push(TensorInfo { name, dtype: info.dtype, dims: info.shape, range });
                }
                Ok(out)
            }
        }
        d.deserialize_map(V)
    }
}

/// What a name is found by: no two tensors of a header have the same.
pub(crate) fn name_digest(name: &str) -> u128 {
    xxh3_128(name.as_bytes())
}

/// Where a container's bytes are.
#[derive(Debug)]
enum Store {
    File(File),
    /// A file that others read, too.
    Shared(SharedFile),
    Bytes(Vec<u8>),
}

impl Store {
    fn read(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let end = at + out.len() as u64;
        match self {
            Self::File(file) => file.read_exact_at(out, at).map_err(|e| cut_short(e, end)),
            Self::Shared(file) => file.read_exact_at(out, at).map_err(|e| cut_short(e, end)),
            Self::Bytes(bytes) => {
                let from = usize::try_from(at).ok().and_then(|a| bytes.get(a..a.checked_add(out.len())?));
                out.copy_from_slice(
                    from.ok_or_else(|| Error::truncated("the bytes end before what they announce"))?,
                );
                Ok(())
            }
        }
    }
}

fn cut_short(e: std::io::Error, end: u64) -> Error {
    match e.kind() {
        ErrorKind::UnexpectedEof => {
            Error::truncated(format!("the file ends before byte {end}: it was cut while it was read"))
        }
        _ => e.into(),
    }
}

/// A safetensors file (or its bytes), its header checked against its length; tensors are read one by one.
#[derive(Debug)]
pub struct SafeTensors {
    store: Store,
    header: Header,
    /// By the digest of their names; made when somebody asks for a name.
    index: OnceLock<HashMap<u128, u32>>,
    text: String,
    bytes: u64,
}

impl SafeTensors {
    /// Open a file and check its header.
    ///
    /// # Errors
    /// `Io` if it cannot be read, `InvalidArgument` for a directory, `Corrupt` or `Truncated` if it is no safetensors file.
    /// Every message names the path.
    pub fn open(path: &Path) -> Result<Self> {
        let within = |e: Error| e.within(path.display());
        // What is no regular file is refused before it is opened: opening a FIFO would wait for its writer.
        let meta = std::fs::metadata(path).map_err(|e| within(e.into()))?;
        if meta.is_dir() {
            return Err(within(Error::invalid("is a directory; name the .safetensors file in it")));
        }
        if !meta.is_file() {
            return Err(within(Error::invalid("is not a regular file")));
        }
        let file = open_regular(path).map_err(within)?;
        let bytes = file.metadata().map_err(|e| within(e.into()))?.len();
        Self::new(Store::File(file), bytes).map_err(within)
    }

    /// The open file, if it is one.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.store {
            Store::File(file) | Store::Shared(SharedFile { file, .. }) => Some(file),
            Store::Bytes(_) => None,
        }
    }

    /// Read through `cache` from now on, as file `number` of those that share it.
    pub(crate) fn share(mut self, number: u32, cache: &Arc<ReadCache>) -> Self {
        self.store = match self.store {
            Store::File(file) => Store::Shared(SharedFile::new(file, number, self.bytes, cache)),
            other => other,
        };
        self
    }

    /// Check the header of a file's bytes.
    ///
    /// # Errors
    /// `Corrupt` or `Truncated`.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        let len = bytes.len() as u64;
        Self::new(Store::Bytes(bytes), len)
    }

    fn new(store: Store, bytes: u64) -> Result<Self> {
        if bytes < LENGTH_BYTES {
            return Err(Error::truncated(format!(
                "{bytes} bytes are too few for a safetensors file; fetch or write it again"
            )));
        }
        let mut head = [0u8; LENGTH_BYTES as usize];
        store.read(0, &mut head)?;
        let length = u64::from_le_bytes(head);
        if length > MAX_HEADER_BYTES {
            return Err(Error::corrupt(not_safetensors(&head, length)));
        }
        if length > bytes - LENGTH_BYTES {
            return Err(Error::truncated(format!(
                "the header takes {length} bytes, but only {} follow; the file was cut: fetch or write it again",
                bytes - LENGTH_BYTES
            )));
        }
        let mut text = vec![0u8; length as usize];
        store.read(LENGTH_BYTES, &mut text)?;
        let header = Header::parse(&text)?;
        let text =
            String::from_utf8(text).map_err(|_| Error::corrupt("the safetensors header is not UTF-8"))?;
        let (want, have) = (header.data_bytes(), bytes - LENGTH_BYTES - length);
        if have < want {
            return Err(Error::truncated(format!(
                "the tensors take {want} bytes, but only {have} follow the header; the file was cut: fetch or write it \
                 again"
            )));
        }
        if have > want {
            return Err(Error::corrupt(format!(
                "{} bytes follow the last tensor, which no reader of safetensors allows; fetch the file again, or write it \
                 anew without them (they begin at byte {})",
                have - want,
                LENGTH_BYTES + length + want
            )));
        }
        Ok(Self { store, header, index: OnceLock::new(), text, bytes })
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The header as it stands in the file, padding included.
    pub fn header_text(&self) -> &str {
        &self.text
    }

    /// Length of the whole file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<&TensorInfo> {
        let tensors = &self.header.tensors;
        let digests = || (0..).zip(tensors).map(|(i, t)| (name_digest(&t.name), i)).collect();
        let i = self.index.get_or_init(digests).get(&name_digest(name))?;
        tensors.get(*i as usize).filter(|t| t.name == name)
    }

    /// Read one tensor's bytes.
    ///
    /// # Errors
    /// `Io` or `Truncated` (a file that shrank since it was opened), naming the tensor.
    pub fn read(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        let read = || {
            let len = usize::try_from(tensor.bytes())
                .map_err(|_| Error::unsupported("too large for this machine"))?;
            let mut out = vec![0u8; len];
            self.read_at(tensor.range.start, &mut out)?;
            Ok(out)
        };
        read().map_err(|e: Error| e.of_tensor(&tensor.name))
    }

    /// Offset of the data in the file.
    pub(crate) fn data_at(&self) -> u64 {
        LENGTH_BYTES + self.text.len() as u64
    }

    /// Fill `out` with the data from byte `at` on.
    pub(crate) fn read_at(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let end = at.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.header.data_bytes()) {
            return Err(Error::invalid(format!("{} bytes from {at} are not in the file", out.len())));
        }
        self.store.read(self.data_at() + at, out)
    }

    /// The same of a piece of a tensor, which is read as a whole and not for a sample.
    pub(crate) fn read_piece(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let end = at.checked_add(out.len() as u64);
        match &self.store {
            Store::Shared(file) if end.is_some_and(|end| end <= self.header.data_bytes()) => {
                let from = self.data_at() + at;
                file.long(out, from).map_err(|e| cut_short(e, from + out.len() as u64))
            }
            _ => self.read_at(at, out),
        }
    }
}

/// What a file is that begins like this, where it is something that people take for a checkpoint.
const LOOKALIKES: [(&[u8], &str); 5] = [
    (
        b"PK",
        "is a zip file, probably a pickled PyTorch checkpoint, which xorz does not open; \
         save it with safetensors.torch.save_file first",
    ),
    (
        b"\x80",
        "is probably pickled, which xorz does not open; save it with safetensors.torch.save_file first",
    ),
    (
        b"version ",
        "is a text, probably a Git LFS pointer in place of the weights; fetch them with `git lfs pull` or `hf download`",
    ),
    (b"<", "is a text, probably a web page in place of the file; download the file itself"),
    (b"GGUF", "is a GGUF file, which xorz does not read; take the model's .safetensors files"),
];

fn not_safetensors(head: &[u8], length: u64) -> String {
    if let Some((_, what)) = LOOKALIKES.iter().find(|(start, _)| head.starts_with(start)) {
        return (*what).into();
    }
    format!(
        "announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed: no safetensors file? \
         `save_pretrained` and `safetensors.torch.save_file` write them"
    )
}
