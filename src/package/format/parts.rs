//! A base tensor put together: where a fine-tuned tensor has more rows or fewer than its base's, or is made of several base
//! tensors (experts in one stack, fused projections) or a piece of one, its base is a sequence of bytes of base tensors, with
//! zeros where the base has nothing.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::ops::Deref;
use std::sync::Arc;

/// A run of bytes of a delta's base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BasePart {
    /// The base tensor that they are of; `None` for zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The file of the base that has it, where several have a tensor of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The first byte taken of that tensor.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub at: u64,
    /// How many bytes.
    pub bytes: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(at: &u64) -> bool {
    *at == 0
}

impl BasePart {
    /// `bytes` bytes that the base does not have.
    pub(crate) fn zeros(bytes: u64) -> Self {
        Self { name: None, file: None, at: 0, bytes }
    }
}

/// All parts of a delta's base, one after the other; none where the base is one whole tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseParts(Option<Arc<PartList>>);

/// Parts, and the byte of the tensor that each of them ends before.
#[derive(Debug, PartialEq, Eq)]
struct PartList {
    parts: Vec<BasePart>,
    ends: Vec<u64>,
}

/// Those of a base that is one whole tensor.
pub(crate) static NO_PARTS: BaseParts = BaseParts(None);

impl From<Vec<BasePart>> for BaseParts {
    fn from(parts: Vec<BasePart>) -> Self {
        let mut at = 0u64;
        let end = |p: &BasePart| {
            at = at.saturating_add(p.bytes);
            at
        };
        let ends = parts.iter().map(end).collect();
        Self((!parts.is_empty()).then(|| Arc::new(PartList { parts, ends })))
    }
}

impl Deref for BaseParts {
    type Target = [BasePart];

    fn deref(&self) -> &[BasePart] {
        self.0.as_ref().map_or(&[], |list| &list.parts)
    }
}

impl BaseParts {
    /// Bytes that they make.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.as_ref().and_then(|list| list.ends.last().copied()).unwrap_or(0)
    }

    /// The parts from the one on that byte `at` of the tensor is in, and which of its bytes that is.
    pub(crate) fn at_byte(&self, at: u64) -> (&[BasePart], u64) {
        let Some(list) = &self.0 else { return (&[], 0) };
        // There may be a part for each row.
        let first = list.ends.partition_point(|end| *end <= at);
        let start = first.checked_sub(1).map_or(0, |before| list.ends[before]);
        (&list.parts[first..], at - start)
    }
}

/// What has base tensors by name.
pub(crate) trait PartSource: Debug + Sync {
    /// Fill `out` with the bytes of `part` from its byte `at` on, which has that many; a part of a name only.
    fn read_part(&self, part: &BasePart, at: u64, out: &mut [u8]) -> Result<()>;
}

/// Fill `out` with the bytes that `parts` make, from byte `at` on.
pub(crate) fn read_parts(
    source: &dyn PartSource,
    parts: &BaseParts,
    at: u64,
    mut out: &mut [u8],
) -> Result<()> {
    let (parts, mut at) = parts.at_byte(at);
    for part in parts {
        if out.is_empty() {
            return Ok(());
        }
        let n = (part.bytes - at).min(out.len() as u64) as usize;
        let (now, later) = out.split_at_mut(n);
        match &part.name {
            Some(_) => source.read_part(part, at, now)?,
            None => now.fill(0),
        }
        (out, at) = (later, 0);
    }
    if out.is_empty() { Ok(()) } else { Err(Error::internal("a base is shorter than its tensor")) }
}

/// Zeros for each byte of the base, at most: what a package may have made is bounded by the base that its user holds.
const HOLLOW: u64 = 16;

/// Whether there is too little of the base in them to be worth a delta.
pub(crate) fn too_hollow(parts: &[BasePart]) -> bool {
    let sum = |zeros: bool| -> u64 {
        parts.iter().filter(|p| p.name.is_none() == zeros).fold(0, |sum, p| sum.saturating_add(p.bytes))
    };
    sum(true) > sum(false).saturating_mul(HOLLOW) || sum(false) == 0
}

/// Parts make exactly the `bytes` of a tensor, and enough of them are of the base.
pub(super) fn check_parts(bytes: u64, parts: &[BasePart]) -> Result<()> {
    let bad = |what: String| Err(Error::corrupt(format!("its base's parts {what}")));
    let mut sum = 0u64;
    for part in parts {
        let nothing = part.name.is_none() && (part.file.is_some() || part.at > 0);
        if part.bytes == 0 || nothing || part.at.checked_add(part.bytes).is_none() {
            return bad(format!("hold one that is none: {part:?}"));
        }
        sum = sum.saturating_add(part.bytes);
    }
    if sum != bytes {
        return bad(format!("take {sum} bytes, but it has {bytes}"));
    }
    if too_hollow(parts) {
        return bad("are nearly all zeros".into());
    }
    Ok(())
}
