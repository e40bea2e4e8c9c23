//! What is said where a package and a base do not belong together: each sentence once, whoever finds out.

use super::container::TensorInfo;
use super::record::{BaseTensor, Entry};
use super::sums::Sum;
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

/// The error for a base of the right digest, but another sha256: no mistake makes one.
pub(crate) fn another_sum(name: &str, want: Sum, found: Sum) -> Error {
    Error::mismatch(format!(
        "another base: it was packed against `{name}` of sha256 {want}, this one has sha256 {found}; get the base from \
         where you trust it"
    ))
    .with_hint(Hint::OtherBase)
}

/// The error for asking the sha256 of a base where none was kept.
pub(crate) fn untold_sum(name: &str) -> Error {
    Error::mismatch(format!(
        "the package has no sha256 of the base's `{name}` to trust it by; `xorz pack --trust sha256` makes one that has"
    ))
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
