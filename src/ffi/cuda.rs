//! The ops on a CUDA device, guarded: addresses and sizes in. For the typed door only; the C ABI has none of them yet.

use super::guard;
use crate::cuda;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};
pub use cuda::{BatchRows, Embedding, Linear, Place};

/// A matrix in device memory, by its dtype's code.
///
/// # Errors
/// `InvalidArgument` for an unknown code.
pub fn words(dtype: u8, bits: bool, n: usize, k: usize, address: u64) -> Result<cuda::DeviceMatrix> {
    let known =
        Dtype::from_code(dtype).ok_or_else(|| Error::invalid(format!("no dtype has the code {dtype}")))?;
    Ok(cuda::DeviceMatrix { dtype: known, bits, shape: Shape { n, k }, address })
}

/// See [`cuda::delta_restore`].
///
/// # Errors
/// As there; `Internal` for a panic.
///
/// # Safety
/// As there.
pub unsafe fn delta_restore(
    place: Place,
    base: cuda::DeviceMatrix,
    out: u64,
    delta: (u64, usize),
) -> Result<()> {
    // SAFETY: the caller's promise.
    guard(|| unsafe { cuda::delta_restore(place, base, out, delta.0, delta.1) })
}

/// See [`cuda::delta_apply`].
///
/// # Errors
/// As there; `Internal` for a panic.
///
/// # Safety
/// As there.
pub unsafe fn delta_apply(place: Place, weight: cuda::DeviceMatrix, delta: (u64, usize)) -> Result<()> {
    // SAFETY: the caller's promise.
    guard(|| unsafe { cuda::delta_apply(place, weight, delta.0, delta.1) })
}

/// See [`cuda::delta_linear`].
///
/// # Errors
/// As there; `Internal` for a panic.
///
/// # Safety
/// As there.
pub unsafe fn delta_linear(place: Place, args: &Linear, workspace: u64, out: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    guard(|| unsafe { cuda::delta_linear(place, args, workspace, out) })
}

/// See [`cuda::Linear::workspace_bytes`].
///
/// # Errors
/// As there; `Internal` for a panic.
pub fn workspace_bytes(args: &Linear) -> Result<usize> {
    guard(|| args.workspace_bytes())
}

/// See [`cuda::delta_embedding`].
///
/// # Errors
/// As there; `Internal` for a panic.
///
/// # Safety
/// As there.
pub unsafe fn delta_embedding(place: Place, args: &Embedding, out: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    guard(|| unsafe { cuda::delta_embedding(place, args, out) })
}
