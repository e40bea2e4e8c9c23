//! Packages for the C door: paths, names and bytes in, JSON and bytes out, guarded against panics.

use super::guard;
use super::ops::Words;
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::package::{self, Base, Codec, Destination, PackOptions, Package, Run, Tensor, Writer};
use std::path::Path;

/// Options from a C caller's numbers.
///
/// # Errors
/// `InvalidArgument` for a codec that does not exist or cannot be asked for.
pub fn options(prefer: Prefer, codec: i32, level: i32, strip_prefix: Option<&str>) -> Result<PackOptions> {
    let codec = match codec {
        -1 => None,
        _ => Some(Codec::ALL.into_iter().find(|c| *c as i32 == codec && c.delta()).ok_or_else(|| {
            Error::invalid(format!("codec must be -1 (smallest) or 0 to 3, but is {codec}"))
        })?),
    };
    let level = (level != 0).then_some(level);
    Ok(PackOptions { prefer, codec, level, strip_prefix: strip_prefix.map(str::to_owned) })
}

/// How a job over files runs, from a C caller's numbers.
///
/// # Errors
/// `InvalidArgument` for flags that do not exist.
pub fn run(jobs: u32, flags: u32) -> Result<Run<'static>> {
    if flags & !NO_SHA256 != 0 {
        return Err(Error::invalid(format!(
            "run.flags is {flags}, but only 0 and {NO_SHA256} have a meaning"
        )));
    }
    let jobs = usize::try_from(jobs).map_err(|_| Error::invalid(format!("run.jobs is {jobs}")))?;
    Ok(Run { jobs, progress: None, sha256: flags & NO_SHA256 == 0 })
}

/// Flag of [`run`]: unpack and verify do not compare the sha256 of restored files.
pub const NO_SHA256: u32 = 1;

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

/// Open a base on disk; its digests come from the user's cache or are computed.
///
/// # Errors
/// As [`Base::open`].
pub fn base(path: &Path, run: &Run<'_>) -> Result<Base> {
    guard(|| Base::open(path, run))
}

/// One tensor's resident delta against a base on disk.
///
/// # Errors
/// As [`Base::resident`].
pub fn resident_from(package: &Package, name: &str, base: &Base, prefer: Option<Prefer>) -> Result<Vec<u8>> {
    guard(|| base.resident(package, name, prefer))
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

/// Pack a checkpoint; gives the report as JSON.
///
/// # Errors
/// As [`package::pack_files`].
pub fn pack_files(
    base: &Path,
    fine_tuned: &Path,
    out: &Path,
    options: &PackOptions,
    run: &Run<'_>,
) -> Result<String> {
    guard(|| package::pack_files(base, fine_tuned, Destination::Path(out), options, run)?.to_json())
}

/// Unpack a checkpoint; gives the report as JSON.
///
/// # Errors
/// As [`package::unpack_files`].
pub fn unpack_files(base: &Path, package: &Path, out: &Path, run: &Run<'_>) -> Result<String> {
    guard(|| package::unpack_files(base, package, Destination::Path(out), run)?.to_json())
}

/// Verify a package; gives the report as JSON.
///
/// # Errors
/// As [`package::verify_files`].
pub fn verify_files(base: &Path, package: &Path, fine_tuned: Option<&Path>, run: &Run<'_>) -> Result<String> {
    guard(|| package::verify_files(base, package, fine_tuned, run)?.to_json())
}
