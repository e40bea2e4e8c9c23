//! Packages of the C ABI: written and read tensor by tensor.

use super::files::{XorzOptions, XorzRun, options, path, run, trust};
use super::pointers::{
    XorzBuffer, XorzError, XorzMatrix, bytes, bytes_mut, call, free, give_box, give_bytes, known_matrix,
    matrix, null, prefer, reference, text,
};
use crate::codec::Prefer;
use crate::error::Result;
use crate::package::{Base, Package, Tensor, Writer, describe_json};
use std::ffi::{c_char, c_void};

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

/// `xorz_writer`: a package being written.
pub struct XorzWriter(Writer);

/// `xorz_package`: an open package.
pub struct XorzPackage(pub(super) Package);

/// `xorz_base`: an open base on disk.
pub struct XorzBase(Base);

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
            let new = Writer::create(path(file, "path")?, options(how)?)?;
            give_box(writer, XorzWriter(new), "writer")
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
            writer.0.add(&tensor(fine_tuned, "fine_tuned")?, base.as_ref())
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
            let json = Box::from_raw(writer).0.finish()?.to_json()?;
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
    // SAFETY: the caller's promise.
    unsafe { free(writer) }
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
            let opened = Package::open(path(file, "path")?)?;
            give_box(package, XorzPackage(opened), "package")
        })
    }
}

/// Close a package.
///
/// # Safety
/// `package` is null or came from `xorz_package_open` and was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_close(package: *mut XorzPackage) {
    // SAFETY: the caller's promise.
    unsafe { free(package) }
}

/// From now on the package gives nothing before `trust` speaks for the base.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_trust(
    package: *mut XorzPackage,
    trust_code: i32,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract: nothing else reads the package meanwhile.
    unsafe {
        call(error, || {
            let package = package.as_mut().ok_or_else(|| null("package"))?;
            package.0.trust_in(trust(trust_code)?)
        })
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
            let text = describe_json(&reference(package, "package")?.0)?;
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
            let made = package.resident(name, &base, prefer_or_stored(prefer_code)?)?;
            give_bytes(delta, made, "delta")
        })
    }
}

/// One tensor's resident delta, of a base that is elsewhere.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_resident_known(
    package: *const XorzPackage,
    name: *const c_char,
    base: *const XorzMatrix,
    digest: *const u8,
    prefer_code: i32,
    delta: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let package = &reference(package, "package")?.0;
            let (name, base) = (text(name, "name")?, known_matrix(base, digest)?);
            let made = package.resident_known(name, base, prefer_or_stored(prefer_code)?)?;
            give_bytes(delta, made.unwrap_or_default(), "delta")
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
            let opened = Base::open(path(file, "path")?, &run(job)?)?;
            give_box(base, XorzBase(opened), "base")
        })
    }
}

/// Close a base.
///
/// # Safety
/// `base` is null or came from `xorz_base_open` and was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_base_close(base: *mut XorzBase) {
    // SAFETY: the caller's promise.
    unsafe { free(base) }
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
            let made = base.resident(package, text(name, "name")?, prefer)?;
            give_bytes(delta, made, "delta")
        })
    }
}

/// One tensor's fine-tuned bytes, from a base on disk.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_restore_from(
    package: *const XorzPackage,
    name: *const c_char,
    base: *const XorzBase,
    out: *mut c_void,
    out_bytes: usize,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (package, base) = (&reference(package, "package")?.0, &reference(base, "base")?.0);
            base.restore(package, text(name, "name")?, bytes_mut(out, out_bytes, "out")?)
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
            package.restore(text(name, "name")?, base.as_ref(), bytes_mut(out, out_bytes, "out")?)
        })
    }
}
