//! Packages of the C ABI.

use super::{
    XorzBuffer, XorzError, XorzMatrix, bytes, bytes_mut, call, give, give_bytes, matrix, null, prefer,
    reference, text,
};
use crate::codec::Prefer;
use crate::error::Result;
use crate::ffi::packages;
use crate::package::{Base, PackOptions, Package, Run, Tensor, Writer};
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `xorz_tensor`: a tensor of a checkpoint.
#[repr(C)]
pub struct XorzTensor {
    /// Name, zero-terminated UTF-8.
    pub name: *const c_char,
    /// safetensors dtype name, such as `BF16`.
    pub dtype: *const c_char,
    /// Dimensions.
    pub dims: *const usize,
    /// How many.
    pub rank: usize,
    /// Row-major bytes.
    pub data: *const c_void,
    /// How many.
    pub bytes: usize,
}

/// `xorz_options`: how to pack.
#[repr(C)]
pub struct XorzOptions {
    /// 0 speed, 1 memory.
    pub prefer: i32,
    /// -1 the smallest, or a codec's code.
    pub codec: i32,
    /// zstd level; 0 is the default.
    pub level: i32,
    /// Dropped from names on both sides before they are paired, or null.
    pub strip_prefix: *const c_char,
}

/// `xorz_run`: how a job over files runs.
#[repr(C)]
pub struct XorzRun {
    /// Threads; 0 takes one per core.
    pub jobs: u32,
    /// 0 or [`packages::NO_SHA256`].
    pub flags: u32,
}

/// `xorz_writer`: a package being written.
pub struct XorzWriter(Writer);

/// `xorz_package`: an open package.
pub struct XorzPackage(Package);

/// `xorz_base`: an open base on disk.
pub struct XorzBase(Base);

/// # Safety
/// `p` is null or a zero-terminated string for `'a`.
unsafe fn path<'a>(p: *const c_char, what: &str) -> Result<&'a Path> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null and the caller's promise.
    Ok(Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(p) }.to_bytes())))
}

/// # Safety
/// `p` is null or options whose strings are valid.
unsafe fn options(p: *const XorzOptions) -> Result<PackOptions> {
    // SAFETY: the caller's promise.
    unsafe {
        let o = reference(p, "options")?;
        let strip = if o.strip_prefix.is_null() { None } else { Some(text(o.strip_prefix, "strip_prefix")?) };
        packages::options(prefer(o.prefer)?, o.codec, o.level, strip)
    }
}

/// # Safety
/// `p` is null, for the defaults, or valid.
unsafe fn run(p: *const XorzRun) -> Result<Run<'static>> {
    // SAFETY: the caller's promise.
    match unsafe { p.as_ref() } {
        Some(r) => packages::run(r.jobs, r.flags),
        None => Ok(Run::default()),
    }
}

/// # Safety
/// `p` is null or a tensor whose pointers are valid for `'a`.
unsafe fn tensor<'a>(p: *const XorzTensor, what: &str) -> Result<Tensor<'a>> {
    // SAFETY: the caller's promise.
    unsafe {
        let t = reference(p, what)?;
        let dims = match t.rank {
            0 => &[],
            rank if t.dims.is_null() || rank > 64 => return Err(null(&format!("{what}.dims"))),
            rank => std::slice::from_raw_parts(t.dims, rank),
        };
        let (name, dtype) =
            (text(t.name, &format!("{what}.name"))?, text(t.dtype, &format!("{what}.dtype"))?);
        Ok(Tensor { name, dtype, dims, bytes: bytes(t.data, t.bytes, &format!("{what}.data"))? })
    }
}

fn prefer_or_stored(code: i32) -> Result<Option<Prefer>> {
    if code == -1 { Ok(None) } else { prefer(code).map(Some) }
}

/// Begin a package that will appear at `path` when it is finished.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_writer_new(
    file: *const c_char,
    how: *const XorzOptions,
    writer: *mut *mut XorzWriter,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let new = packages::create(path(file, "path")?, options(how)?)?;
            give(writer, Box::into_raw(Box::new(XorzWriter(new))), "writer")
        })
    }
}

/// Add a fine-tuned tensor, with the base tensor it is paired with, or null.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_writer_add(
    writer: *mut XorzWriter,
    fine_tuned: *const XorzTensor,
    base: *const XorzTensor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let writer = writer.as_mut().ok_or_else(|| null("writer"))?;
            let base = if base.is_null() { None } else { Some(tensor(base, "base")?) };
            packages::add(&mut writer.0, &tensor(fine_tuned, "fine_tuned")?, base.as_ref())
        })
    }
}

/// Note a base tensor that the fine-tune lacks.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_writer_removed(
    writer: *mut XorzWriter,
    name: *const c_char,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            writer.as_mut().ok_or_else(|| null("writer"))?.0.removed(text(name, "name")?);
            Ok(())
        })
    }
}

/// Write the package and free the writer, whatever comes of it.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_writer_finish(
    writer: *mut XorzWriter,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract; the pointer came from `xorz_writer_new`.
    unsafe {
        call(error, || {
            if writer.is_null() {
                return Err(null("writer"));
            }
            let json = packages::finish(Box::from_raw(writer).0)?;
            if report.is_null() { Ok(()) } else { give_bytes(report, json.into_bytes(), "report") }
        })
    }
}

/// Free a writer without writing a package.
///
/// # Safety
/// `writer` is null or came from `xorz_writer_new` and was neither finished nor freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_writer_free(writer: *mut XorzWriter) {
    if !writer.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(writer) });
    }
}

/// Open a package.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_open(
    file: *const c_char,
    package: *mut *mut XorzPackage,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let opened = packages::open(path(file, "path")?)?;
            give(package, Box::into_raw(Box::new(XorzPackage(opened))), "package")
        })
    }
}

/// Close a package.
///
/// # Safety
/// `package` is null or came from `xorz_package_open` and was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_close(package: *mut XorzPackage) {
    if !package.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(package) });
    }
}

/// What a package holds, as JSON.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_describe(
    package: *const XorzPackage,
    json: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let text = packages::describe(&reference(package, "package")?.0)?;
            give_bytes(json, text.into_bytes(), "json")
        })
    }
}

/// One tensor's resident delta.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_resident(
    package: *const XorzPackage,
    name: *const c_char,
    base: *const XorzMatrix,
    prefer_code: i32,
    delta: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let package = &reference(package, "package")?.0;
            let (name, base) = (text(name, "name")?, matrix(base, "base")?);
            let made = packages::resident(package, name, base, prefer_or_stored(prefer_code)?)?;
            give_bytes(delta, made, "delta")
        })
    }
}

/// Open a base on disk, to load packages against.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_base_open(
    file: *const c_char,
    job: *const XorzRun,
    base: *mut *mut XorzBase,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let opened = packages::base(path(file, "path")?, &run(job)?)?;
            give(base, Box::into_raw(Box::new(XorzBase(opened))), "base")
        })
    }
}

/// Close a base.
///
/// # Safety
/// `base` is null or came from `xorz_base_open` and was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_base_close(base: *mut XorzBase) {
    if !base.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(base) });
    }
}

/// One tensor's resident delta against a base on disk.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_resident_from(
    package: *const XorzPackage,
    name: *const c_char,
    base: *const XorzBase,
    prefer_code: i32,
    delta: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (package, base) = (&reference(package, "package")?.0, &reference(base, "base")?.0);
            let prefer = prefer_or_stored(prefer_code)?;
            let made = packages::resident_from(package, text(name, "name")?, base, prefer)?;
            give_bytes(delta, made, "delta")
        })
    }
}

/// One tensor's fine-tuned bytes.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_restore(
    package: *const XorzPackage,
    name: *const c_char,
    base: *const XorzMatrix,
    out: *mut c_void,
    out_bytes: usize,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let package = &reference(package, "package")?.0;
            let base = if base.is_null() { None } else { Some(matrix(base, "base")?) };
            packages::restore(package, text(name, "name")?, base, bytes_mut(out, out_bytes, "out")?)
        })
    }
}

/// Pack a checkpoint.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_pack_files(
    base: *const c_char,
    fine_tuned: *const c_char,
    package: *const c_char,
    how: *const XorzOptions,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, fine_tuned) = (path(base, "base")?, path(fine_tuned, "fine_tuned")?);
            let json = packages::pack_files(
                base,
                fine_tuned,
                path(package, "package")?,
                &options(how)?,
                &run(job)?,
            )?;
            give_bytes(report, json.into_bytes(), "report")
        })
    }
}

/// Unpack a checkpoint.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_unpack_files(
    base: *const c_char,
    package: *const c_char,
    out: *const c_char,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, package) = (path(base, "base")?, path(package, "package")?);
            give_bytes(
                report,
                packages::unpack_files(base, package, path(out, "out")?, &run(job)?)?.into_bytes(),
                "report",
            )
        })
    }
}

/// Check a package against its base, and against the fine-tuned checkpoint if one is given.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_verify_files(
    base: *const c_char,
    package: *const c_char,
    fine_tuned: *const c_char,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let fine_tuned = if fine_tuned.is_null() { None } else { Some(path(fine_tuned, "fine_tuned")?) };
            let (base, package) = (path(base, "base")?, path(package, "package")?);
            give_bytes(
                report,
                packages::verify_files(base, package, fine_tuned, &run(job)?)?.into_bytes(),
                "report",
            )
        })
    }
}
