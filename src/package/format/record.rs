//! What is known of each tensor of a package, and of the files it was made from, whichever version of the format says it
//! (`version1`, `table`); and what of it must agree.

use super::kinds::{dtype_bits, words_of};
use super::parts::{BaseParts, check_parts};
use super::sums::Sum;
use crate::codec::{Encoding, Prefer};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use crate::package::options::Codec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_128;

/// Everything of ours in a package begins with this, so no tensor's name may.
pub(super) const RESERVED: &str = "xorz:";
pub(crate) const FORMAT: &str = "xorz";
/// The format version that this library writes.
pub(crate) const VERSION: u32 = 2;
/// Those that it reads, and the layout of the resident deltas that packages of each hold.
const LAYOUTS: [(u32, u16); 2] = [(1, 0), (VERSION, crate::resident::VERSION)];
/// The two entries of a package of version 2: all that is stored, and what it is.
pub(super) const DATA: &str = "xorz:data";
pub(super) const TABLE: &str = "xorz:table";

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
    /// The source file that it is of, where an earlier one has a tensor of that name.
    pub(crate) again: Option<usize>,
    /// Its bytes in the package's data; of codec `joint` its share of the frame.
    pub(crate) range: Range<u64>,
    /// Of its stored bytes; of codec `joint` that of the whole frame.
    pub(crate) check: Digest,
    /// Of codec `joint`: which frame, and the first of its words among those that the frame holds.
    pub(crate) joint: Option<(usize, u64)>,
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
    pub parts: BaseParts,
    /// Its digest, of the words as the delta sees them; only the first 8 bytes of it, zeros behind them, where
    /// a package keeps no more.
    pub digest: Digest,
    pub(crate) short: bool,
    /// The sha256 of the same words, whole, where the package was made with [`crate::package::Trust::Sha256`].
    pub sha256: Option<Sum>,
}

/// Bytes that are kept of a small tensor's base digest, where a whole one would be most of what the tensor takes.
pub(crate) const SHORT_DIGEST: usize = 8;
/// Bytes of the largest tensor of which no more are kept.
const SHORT_BYTES: u64 = 4096;

/// Whether a package keeps a short digest of the base of such a tensor.
pub(super) fn short_digest(codec: Codec, bytes: u64) -> bool {
    matches!(codec, Codec::Joint | Codec::Unchanged) && bytes <= SHORT_BYTES
}

impl BaseTensor {
    /// Whether a tensor of this digest is the one, as far as the package knows.
    pub(crate) fn is(&self, found: Digest) -> bool {
        let known = if self.short { SHORT_DIGEST } else { found.0.len() };
        self.digest.0[..known] == found.0[..known]
    }

    /// What is known of the digest, in hexadecimal digits.
    pub fn digest_text(&self) -> String {
        self.as_much_of(self.digest)
    }

    /// As many digits of another digest.
    pub(super) fn as_much_of(&self, digest: Digest) -> String {
        let mut text = digest.to_string();
        text.truncate(if self.short { 2 * SHORT_DIGEST } else { text.len() });
        text
    }
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

/// A frame that holds the words of several small tensors, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JointFrame {
    /// Where it lies in the package's data.
    pub(crate) range: Range<u64>,
    /// Bytes of its tensors together.
    pub(crate) bytes: u64,
    pub(crate) check: Digest,
}

/// All that a package says of what it stores.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) entries: Vec<Entry>,
    pub(crate) joints: Vec<JointFrame>,
    pub(crate) removed: Vec<String>,
    /// The files that it was made from, and where what is stored of each lies.
    pub(crate) files: Vec<(SourceFile, Range<u64>)>,
    pub(crate) folder: bool,
}

impl Records {
    /// Whether the sha256 of bases are kept.
    pub(super) fn has_sums(&self) -> bool {
        self.entries.iter().filter_map(|e| e.base.as_ref()).any(|base| base.sha256.is_some())
    }
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

pub(crate) fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::internal(format!("json: {e}")))
}

/// What must agree between the fields of one record.
pub(super) fn check_entry(e: &Entry) -> Result<()> {
    // In wide numbers: two that both overflow are not equal.
    let bits = dtype_bits(&e.dtype)
        .map(|bits| e.dims.iter().try_fold(u128::from(bits), |a, &d| a.checked_mul(d as u128)));
    if bits.is_some_and(|bits| bits != Some(u128::from(e.bytes) * 8)) {
        return Err(Error::corrupt(format!("{} {:?} does not take {} bytes", e.dtype, e.dims, e.bytes)));
    }
    if e.codec > Codec::Same && e.version < 2 {
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
    if matches!(e.codec, Codec::Same | Codec::Unchanged) && e.stored_bytes > 0 {
        return Err(Error::corrupt(format!("codec `{}` stores {} bytes", e.codec.name(), e.stored_bytes)));
    }
    if e.codec == Codec::Unchanged && e.changed != Some(0) {
        return Err(Error::corrupt(format!("codec `unchanged` of {:?} changed words", e.changed)));
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
