//! Fine-tuned words on the device: of a matrix, or of a panel of its rows that torch then multiplies.

use std::ops::Range;

use super::driver::Device;
use super::launch::{DELTA_ALIGN, DeviceMatrix, Linear, Place, check_aligned, check_linear};
use super::params::{Params, Restore};
use super::plan;
use super::status::Op;
use crate::error::{Error, Result};

/// A resident delta in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceDelta {
    /// Address, aligned to 16.
    pub address: u64,
    /// Bytes.
    pub bytes: usize,
}

/// `out [rows, k]`, words of `base`'s dtype at an address of the device, becomes those rows of the fine-tuned matrix, bit for
/// bit. `rows` begin and end at multiples of [`plan::TALLEST_TILE`], or at the last row.
///
/// # Errors
/// `Device`, `Unsupported` for a matrix too large, `InvalidArgument` for a misaligned address or other rows; and what an
/// earlier call reported (see [`super::status`]).
///
/// # Safety
/// `base`, `out` and `delta.bytes` bytes at `delta.address` are memory that the device can reach until the stream has
/// passed this call; `out` overlaps nothing. Their contents may be anything.
pub unsafe fn delta_restore(
    place: Place,
    base: DeviceMatrix,
    rows: Range<usize>,
    out: u64,
    delta: DeviceDelta,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { restore_rows(place, base, rows, out, delta, Op::Restore) }
}

/// [`delta_restore`] of rows of the matrix that `args` are to be multiplied by, of one tenant: what is wrong with its delta is
/// reported as the product's.
///
/// # Errors
/// As [`delta_restore`]; `InvalidArgument` for a product of several tenants.
///
/// # Safety
/// As [`delta_restore`].
pub unsafe fn delta_linear_panel(place: Place, args: &Linear, rows: Range<usize>, out: u64) -> Result<()> {
    check_linear(args, out)?;
    if args.rows.is_some() {
        return Err(Error::invalid("a panel is of one tenant's words"));
    }
    let delta = DeviceDelta { address: args.arena, bytes: args.arena_bytes };
    // SAFETY: the caller's promise.
    unsafe { restore_rows(place, args.weight, rows, out, delta, Op::Linear) }
}

/// # Safety
/// As [`delta_restore`].
unsafe fn restore_rows(
    place: Place,
    base: DeviceMatrix,
    rows: Range<usize>,
    out: u64,
    delta: DeviceDelta,
    op: Op,
) -> Result<()> {
    let launch = plan::restore(base.dtype, base.shape, &rows)?;
    let word = base.dtype.word_bytes() as u64;
    check_aligned("base", base.address, word)?;
    check_aligned("out", out, word)?;
    check_aligned("delta", delta.address, DELTA_ALIGN)?;
    let device = Device::get(place.device)?;
    device.raise()?;
    let params = Restore {
        base: base.address,
        out,
        delta: delta.address,
        delta_bytes: delta.bytes as u64,
        n: base.shape.n as u64,
        k: base.shape.k as u64,
        dtype: base.accepted(),
        status: device.status(op),
        row_from: rows.start as u64,
        rows: rows.len() as u64,
    };
    // SAFETY: the parameters of that kernel, by its table; the memory is the caller's promise.
    unsafe { device.launch(launch, place.stream, params.pack()) }
}
