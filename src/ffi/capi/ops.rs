//! The ops of the C ABI.

use super::{
    XorzBuffer, XorzError, XorzExecutor, XorzMatrix, bytes, bytes_mut, call, executor, give, give_bytes,
    matrix, mode, null, prefer, reference,
};
use crate::error::{Error, Result};
use crate::ffi::ops;
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
            let i = ops::delta_info(bytes(delta, delta_bytes, "delta")?)?;
            let out = XorzDeltaInfo {
                encoding: i.encoding as u32,
                dtype: i.dtype as u32,
                n: i.shape.n as u64,
                k: i.shape.k as u64,
                tile_rows: i.tile_rows as u64,
                tile_cols: i.tile_cols as u64,
                changed: i.changed,
                base_digest: i.base_digest.0,
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
            let (x, weight) = (matrix(input, "input")?, matrix(weight, "weight")?);
            same("input.k", x.k, "weight.k", weight.k)?;
            same("input.dtype", x.dtype as usize, "weight.dtype", weight.dtype as usize)?;
            x.matrix()?;
            let word = weight.matrix()?.dtype().word_bytes();
            let bias = if bias.is_null() { None } else { Some(bytes(bias, times(weight.n, word)?, "bias")?) };
            let args = ops::Linear {
                input: x.bytes,
                m: x.n,
                weight,
                bias,
                delta: bytes(delta, delta_bytes, "delta")?,
                mode: mode(mode_code)?,
            };
            same("out_bytes", out_bytes, "input.n * weight.n words", times(x.n, times(weight.n, word)?)?)?;
            ops::delta_linear(&args, bytes_mut(out, out_bytes, "out")?, executor(exec))
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
            let (g, weight) = (matrix(grad, "grad")?, matrix(weight, "weight")?);
            same("grad.k", g.k, "weight.n", weight.n)?;
            same("grad.dtype", g.dtype as usize, "weight.dtype", weight.dtype as usize)?;
            g.matrix()?;
            let word = weight.matrix()?.dtype().word_bytes();
            same("out_bytes", out_bytes, "grad.n * weight.k words", times(g.n, times(weight.k, word)?)?)?;
            let (delta, out) = (bytes(delta, delta_bytes, "delta")?, bytes_mut(out, out_bytes, "out")?);
            ops::delta_linear_grad_input(g.bytes, g.n, weight, delta, out, executor(exec))
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
            same("out_bytes", out_bytes, "base.bytes", base.bytes.len())?;
            ops::delta_restore(base, delta, bytes_mut(out, out_bytes, "out")?, executor(exec))
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
            let (base, delta) = (matrix(base, "base")?, bytes(delta, delta_bytes, "delta")?);
            ops::delta_restore_rows(
                base,
                delta,
                first..end,
                bytes_mut(out, out_bytes, "out")?,
                executor(exec),
            )
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
            let (base, delta) = (matrix(base, "base")?, bytes(delta, delta_bytes, "delta")?);
            let region = (first_row..end_row, first_column..end_column);
            ops::delta_restore_region(base, delta, region, bytes_mut(out, out_bytes, "out")?, executor(exec))
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
            let (w, delta) = (reference(weight, "weight")?, bytes(delta, delta_bytes, "delta")?);
            let words = bytes_mut(w.words.cast_mut(), w.bytes, "weight.words")?;
            ops::delta_apply(w.dtype, w.n, w.k, words, delta, executor(exec))
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
            let encoded = ops::delta_encode(base, fine_tuned, prefer(prefer_code)?, executor(exec))?;
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
            let (delta, base) = (bytes(delta, delta_bytes, "delta")?, matrix(base, "base")?);
            give_bytes(out, ops::delta_slice(delta, base, dim, start..end)?, "out")
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
                Ok((bytes(p.delta, p.delta_bytes, "delta")?, matrix(&raw const p.base, "base")?))
            };
            let parts = (0..count)
                .map(|i| part(i).map_err(|e: Error| e.within(format_args!("parts[{i}]"))))
                .collect::<Result<Vec<_>>>()?;
            give_bytes(out, ops::delta_concat(&parts, dim)?, "out")
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
    unsafe { call(error, || ops::delta_check(bytes(delta, delta_bytes, "delta")?, matrix(base, "base")?)) }
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
    unsafe { call(error, || ops::delta_matches(bytes(delta, delta_bytes, "delta")?, matrix(base, "base")?)) }
}

fn same(what: &str, a: usize, other: &str, b: usize) -> Result<()> {
    if a == b { Ok(()) } else { Err(Error::mismatch(format!("{what} is {a}, but {other} is {b}"))) }
}

fn times(a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::invalid(format!("{a} * {b} bytes are too many")))
}
