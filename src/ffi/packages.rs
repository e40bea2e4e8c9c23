//! Packages for the C door: paths, names and bytes in, JSON and bytes out, guarded against panics.

use super::guard;
use super::ops::Words;
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::package::{self, Codec, PackOptions, Package, Tensor, Writer};
use std::path::Path;

/// Options from a C caller's numbers.
///
/// # Errors
/// `InvalidArgument` for a codec that does not exist or cannot be asked for.
pub fn options(prefer: Prefer, codec: i32, level: i32, strip_prefix: Option<&str>) -> Result<PackOptions> {
    let codec = match codec {
        -1 => None,
        _ => Some(Codec::ALL.into_iter().find(|c| *c as i32 == codec && !c.alone()).ok_or_else(|| {
            Error::invalid(format!("codec must be -1 (smallest) or 0 to 3, but is {codec}"))
        })?),
    };
    let level = (level != 0).then_some(level);
    Ok(PackOptions { prefer, codec, level, strip_prefix: strip_prefix.map(str::to_owned) })
}

/// Begin a package at `path`.
///
/// # Errors
/// As [`Writer::create`].
pub fn create(path: &Path, options: PackOptions) -> Result<Writer> {
    guard(|| Writer::create(path, options))
}

/// Add a tensor.
///
/// # Errors
/// As [`Writer::add`].
pub fn add(writer: &mut Writer, fine_tuned: &Tensor<'_>, base: Option<&Tensor<'_>>) -> Result<()> {
    guard(|| writer.add(fine_tuned, base))
}

/// Finish a package; gives the report as JSON.
///
/// # Errors
/// As [`Writer::finish`].
pub fn finish(writer: Writer) -> Result<String> {
    guard(|| writer.finish()?.to_json())
}

/// Open a package.
///
/// # Errors
/// As [`Package::open`].
pub fn open(path: &Path) -> Result<Package> {
    guard(|| Package::open(path))
}

/// What an open package holds, as JSON.
///
/// # Errors
/// `Internal` only.
pub fn describe(package: &Package) -> Result<String> {
    guard(|| package::describe_json(package))
}

/// One tensor's resident delta.
///
/// # Errors
/// As [`Package::resident`].
pub fn resident(package: &Package, name: &str, base: Words<'_>, prefer: Option<Prefer>) -> Result<Vec<u8>> {
    guard(|| package.resident(name, &base.matrix()?, prefer))
}

/// One tensor's fine-tuned bytes.
///
/// # Errors
/// As [`Package::restore`].
pub fn restore(package: &Package, name: &str, base: Option<Words<'_>>, out: &mut [u8]) -> Result<()> {
    guard(|| {
        let base = base.map(|b| b.matrix()).transpose()?;
        package.restore(name, base.as_ref(), out)
    })
}

/// Pack a file; gives the report as JSON.
///
/// # Errors
/// As [`package::pack_files`].
pub fn pack_files(base: &Path, fine_tuned: &Path, out: &Path, options: &PackOptions) -> Result<String> {
    guard(|| package::pack_files(base, fine_tuned, out, options)?.to_json())
}

/// Unpack to a file; gives the report as JSON.
///
/// # Errors
/// As [`package::unpack_files`].
pub fn unpack_files(base: &Path, package: &Path, out: &Path) -> Result<String> {
    guard(|| package::unpack_files(base, package, out)?.to_json())
}

/// Verify a package; gives the report as JSON.
///
/// # Errors
/// As [`package::verify_files`].
pub fn verify_files(base: &Path, package: &Path, fine_tuned: Option<&Path>) -> Result<String> {
    guard(|| package::verify_files(base, package, fine_tuned)?.to_json())
}
