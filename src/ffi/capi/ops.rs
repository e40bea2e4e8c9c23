//! The ops of the C ABI.

use super::pointers::{
    XorzBuffer, XorzError, XorzExecutor, XorzMatrix, bytes, bytes_mut, call, executor, give, give_bytes,
    known_matrix, matrix, mode, null, parse, prefer, reference,
};
use crate::cpu;
use crate::cuda;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};
use crate::resident::{self, Resident};
use crate::vector;
use std::ffi::c_void;

/// `xorz_delta_info`: what the header of a resident delta says.
#[repr(C)]
pub struct XorzDeltaInfo {
    /// 0 unchanged, 1 sparse, 2 exponent, 3 raw.
    pub encoding: u32,
    /// Code of the dtype.
    pub dtype: u32,
    /// Rows.
    pub n: u64,
    /// Columns.
    pub k: u64,
    /// Rows of a tile.
    pub tile_rows: u64,
    /// Columns of a tile.
    pub tile_cols: u64,
    /// Words that differ from the base.
    pub changed: u64,
    /// Digest of the base.
    pub base_digest: [u8; 16],
}

/// `xorz_part`: one delta and its base, for `xorz_delta_concat`.
#[repr(C)]
pub struct XorzPart {
    /// Resident delta.
    pub delta: *const c_void,
    /// Its length.
    pub delta_bytes: usize,
    /// Its base.
    pub base: XorzMatrix,
}

/// What kernels on a device have reported: one report, as an error, which is then forgotten.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_cuda_status(device: i32, error: *mut XorzError) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe { call(error, || cuda::reported(device)) }
}

/// Whether a device's kernels can be launched, or why not.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_cuda_open(device: i32, error: *mut XorzError) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe { call(error, || cuda::open(device)) }
}

/// Read the header of a resident delta.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_info(
    delta: *const c_void,
    delta_bytes: usize,
    info: *mut XorzDeltaInfo,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let delta = parse(delta, delta_bytes)?;
            let header = delta.header();
            let out = XorzDeltaInfo {
                encoding: header.encoding as u32,
                dtype: header.dtype as u32,
                n: header.shape.n as u64,
                k: header.shape.k as u64,
                tile_rows: header.tile_rows as u64,
                tile_cols: header.tile_cols as u64,
                changed: header.changed,
                base_digest: header.base_digest.0,
            };
            give(info, out, "info")
        })
    }
}

/// `out [m, n] = input [m, k] @ (weight (+) delta)^T + bias`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_linear(
    input: *const XorzMatrix,
    weight: *const XorzMatrix,
    bias: *const c_void,
    delta: *const c_void,
    delta_bytes: usize,
    mode_code: i32,
    out: *mut c_void,
    out_bytes: usize,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (x, base) = (matrix(input, "input")?, matrix(weight, "weight")?);
            let (Shape { n: m, k }, weight) = (x.shape(), base.shape());
            same("input.k", k, "weight.k", weight.k)?;
            same("input.dtype", x.dtype() as usize, "weight.dtype", base.dtype() as usize)?;
            let row = times(weight.n, base.dtype().word_bytes())?;
            same("out_bytes", out_bytes, "input.n * weight.n words", times(m, row)?)?;
            let bias = if bias.is_null() { None } else { Some(bytes(bias, row, "bias")?) };
            let (delta, mode) = (parse(delta, delta_bytes)?, mode(mode_code)?);
            let product = cpu::LinearArgs { x: x.bytes(), m, base, delta, bias, mode };
            cpu::delta_linear(&product, bytes_mut(out, out_bytes, "out")?, executor(exec))
        })
    }
}

/// `out [m, k] = grad [m, n] @ (weight (+) delta)`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_linear_grad_input(
    grad: *const XorzMatrix,
    weight: *const XorzMatrix,
    delta: *const c_void,
    delta_bytes: usize,
    out: *mut c_void,
    out_bytes: usize,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (grad, base) = (matrix(grad, "grad")?, matrix(weight, "weight")?);
            let (Shape { n: m, k }, weight) = (grad.shape(), base.shape());
            same("grad.k", k, "weight.n", weight.n)?;
            same("grad.dtype", grad.dtype() as usize, "weight.dtype", base.dtype() as usize)?;
            let row = times(weight.k, base.dtype().word_bytes())?;
            same("out_bytes", out_bytes, "grad.n * weight.k words", times(m, row)?)?;
            let (delta, out) = (parse(delta, delta_bytes)?, bytes_mut(out, out_bytes, "out")?);
            cpu::delta_linear_grad_input(grad.bytes(), m, &base, &delta, out, executor(exec))
        })
    }
}

/// Restore the whole matrix.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_restore(
    base: *const XorzMatrix,
    delta: *const c_void,
    delta_bytes: usize,
    out: *mut c_void,
    out_bytes: usize,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, delta) = (matrix(base, "base")?, bytes(delta, delta_bytes, "delta")?);
            same("out_bytes", out_bytes, "base.bytes", base.bytes().len())?;
            let (delta, out) = (Resident::parse(delta)?, bytes_mut(out, out_bytes, "out")?);
            vector::delta_restore(&delta, &base, out, executor(exec))
        })
    }
}

/// Restore rows `first .. end`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_restore_rows(
    base: *const XorzMatrix,
    delta: *const c_void,
    delta_bytes: usize,
    first: usize,
    end: usize,
    out: *mut c_void,
    out_bytes: usize,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, delta) = (matrix(base, "base")?, parse(delta, delta_bytes)?);
            let out = bytes_mut(out, out_bytes, "out")?;
            vector::delta_restore_rows(&delta, &base, first..end, out, executor(exec))
        })
    }
}

/// Restore rows `first_row .. end_row` of columns `first_column .. end_column`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_restore_region(
    base: *const XorzMatrix,
    delta: *const c_void,
    delta_bytes: usize,
    first_row: usize,
    end_row: usize,
    first_column: usize,
    end_column: usize,
    out: *mut c_void,
    out_bytes: usize,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, delta) = (matrix(base, "base")?, parse(delta, delta_bytes)?);
            let (rows, columns, out) =
                (first_row..end_row, first_column..end_column, bytes_mut(out, out_bytes, "out")?);
            vector::delta_restore_region(&delta, &base, rows, columns, out, executor(exec))
        })
    }
}

/// Turn the base at `weight` into the fine-tune, in place.
///
/// # Safety
/// As `csrc/xorz.h` says; the words of `weight` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_apply(
    weight: *const XorzMatrix,
    delta: *const c_void,
    delta_bytes: usize,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (w, delta) = (reference(weight, "weight")?, parse(delta, delta_bytes)?);
            let words = bytes_mut(w.words.cast_mut(), w.bytes, "weight.words")?;
            let (dtype, shape) = (Dtype::of_code(w.dtype)?, Shape { n: w.n, k: w.k });
            vector::delta_apply(&delta, dtype, shape, words, executor(exec))
        })
    }
}

/// The resident delta from `base` to `fine_tuned`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_encode(
    base: *const XorzMatrix,
    fine_tuned: *const XorzMatrix,
    prefer_code: i32,
    delta: *mut XorzBuffer,
    exec: *const XorzExecutor,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, fine_tuned) = (matrix(base, "base")?, matrix(fine_tuned, "fine_tuned")?);
            let encoded = vector::encode(&base, &fine_tuned, prefer(prefer_code)?, executor(exec))?;
            give_bytes(delta, encoded, "delta")
        })
    }
}

/// The delta of some rows (`dim` 0) or columns (`dim` 1).
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_slice(
    delta: *const c_void,
    delta_bytes: usize,
    base: *const XorzMatrix,
    dim: usize,
    start: usize,
    end: usize,
    out: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (delta, base) = (parse(delta, delta_bytes)?, matrix(base, "base")?);
            give_bytes(out, resident::slice(&delta, &base, dim, start..end)?, "out")
        })
    }
}

/// The delta of matrices put one after another along `dim`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_concat(
    parts: *const XorzPart,
    count: usize,
    dim: usize,
    out: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract: `parts` has `count` items.
    unsafe {
        call(error, || {
            if parts.is_null() || count == 0 {
                return Err(null("parts"));
            }
            let part = |i: usize| {
                let p = reference(parts.add(i), "parts")?;
                Ok((parse(p.delta, p.delta_bytes)?, matrix(&raw const p.base, "base")?))
            };
            let parts = (0..count)
                .map(|i| part(i).map_err(|e: Error| e.within(format_args!("parts[{i}]"))))
                .collect::<Result<Vec<_>>>()?;
            give_bytes(out, resident::concat(&parts, dim)?, "out")
        })
    }
}

/// Validate a delta in full, and that it belongs to `base`.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_check(
    delta: *const c_void,
    delta_bytes: usize,
    base: *const XorzMatrix,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            vector::delta_check(&parse(delta, delta_bytes)?, &matrix(base, "base")?, &vector::Serial)
        })
    }
}

/// What `xorz_delta_apply` checks before the first word changes.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_matches(
    delta: *const c_void,
    delta_bytes: usize,
    base: *const XorzMatrix,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            vector::delta_matches(&parse(delta, delta_bytes)?, &matrix(base, "base")?, &vector::Serial)
        })
    }
}

/// The same of a base that is elsewhere.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_delta_matches_known(
    delta: *const c_void,
    delta_bytes: usize,
    base: *const XorzMatrix,
    digest: *const u8,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (dtype, shape, digest) = known_matrix(base, digest)?;
            parse(delta, delta_bytes)?.check_known(dtype, shape, digest)
        })
    }
}

fn same(what: &str, a: usize, other: &str, b: usize) -> Result<()> {
    if a == b { Ok(()) } else { Err(Error::mismatch(format!("{what} is {a}, but {other} is {b}"))) }
}

fn times(a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::invalid(format!("{a} * {b} bytes are too many")))
}
