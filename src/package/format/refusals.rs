//! What is said where a package and a base do not belong together: each sentence once, whoever finds out.

use super::container::TensorInfo;
use super::record::{BaseTensor, Entry};
use crate::error::{Error, Hint};
use crate::matrix::Digest;

/// The error for asking a delta of a tensor that has no base.
pub(crate) fn stored_alone() -> Error {
    Error::unsupported("is stored alone (the base has no tensor that it is a delta of), so it has no delta")
}

/// The error for a base of another digest.
pub(crate) fn another_base(want: &BaseTensor, found: Digest) -> Error {
    Error::mismatch(format!(
        "another base: it was packed against `{}` of digest {}, this one has digest {}; give the base that \
         it was packed against",
        want.name,
        want.digest_text(),
        want.as_much_of(found)
    ))
    .with_hint(Hint::OtherBase)
}

/// The error for a base without the tensor `name`.
pub(crate) fn missing_in_base(name: &str) -> Error {
    Error::mismatch(format!("the base has no tensor `{name}`; give the base that it was packed against"))
}

/// The error for a base tensor of another dtype or shape.
pub(crate) fn other_kind(entry: &Entry, base: &TensorInfo) -> Error {
    let what = if entry.dims == base.dims {
        "in the dtype that it was packed against"
    } else {
        "that it was packed against"
    };
    Error::mismatch(format!(
        "is a delta of {} {:?}, but the base has {} {:?}; give the base {what}",
        entry.dtype, entry.dims, base.dtype, base.dims
    ))
}
