//! The doors to [`crate::cuda`]: addresses of device memory, as the shim has them.

use super::door::{CudaLinear, CudaLookup, CudaMatrix, CudaPlace};
use crate::cuda;
use crate::error::Result;
use crate::ffi::guard;
use crate::matrix::{Dtype, Shape};

impl From<&CudaPlace> for cuda::Place {
    fn from(p: &CudaPlace) -> Self {
        Self { device: p.device, stream: p.stream as u64 }
    }
}

fn device_words(w: &CudaMatrix) -> Result<cuda::DeviceMatrix> {
    let (dtype, shape) = (Dtype::of_code(w.dtype.into())?, Shape { n: w.n, k: w.k });
    Ok(cuda::DeviceMatrix { dtype, bits: w.bits, shape, address: w.address as u64 })
}

pub(super) unsafe fn cuda_delta_restore(
    place: &CudaPlace,
    base: &CudaMatrix,
    from: usize,
    to: usize,
    out: usize,
    delta: usize,
    delta_bytes: usize,
) -> Result<()> {
    guard(|| {
        let base = device_words(base)?;
        let delta = cuda::DeviceDelta { address: delta as u64, bytes: delta_bytes };
        // SAFETY: the shim's promise.
        unsafe { cuda::delta_restore(place.into(), base, from..to, out as u64, delta) }
    })
}

pub(super) fn cuda_panel_rows(args: &CudaLinear) -> Result<usize> {
    guard(|| Ok(device_linear(args)?.panel_rows().unwrap_or(0)))
}

pub(super) unsafe fn cuda_delta_linear_panel(
    place: &CudaPlace,
    args: &CudaLinear,
    from: usize,
    to: usize,
    out: usize,
) -> Result<()> {
    guard(|| {
        let product = device_linear(args)?;
        // SAFETY: the shim's promise.
        unsafe { cuda::delta_linear_panel(place.into(), &product, from..to, out as u64) }
    })
}

pub(super) unsafe fn cuda_delta_apply(
    place: &CudaPlace,
    weight: &CudaMatrix,
    delta: usize,
    delta_bytes: usize,
    workspace: usize,
) -> Result<()> {
    guard(|| {
        let weight = device_words(weight)?;
        // SAFETY: the shim's promise.
        unsafe { cuda::delta_apply(place.into(), weight, delta as u64, delta_bytes, workspace as u64) }
    })
}

pub(super) fn cuda_digest_workspace(base: &CudaMatrix) -> Result<usize> {
    guard(|| cuda::digest_workspace_bytes(device_words(base)?))
}

pub(super) unsafe fn cuda_delta_digest(
    place: &CudaPlace,
    base: &CudaMatrix,
    workspace: usize,
    out: usize,
) -> Result<()> {
    guard(|| {
        let base = device_words(base)?;
        // SAFETY: the shim's promise.
        unsafe { cuda::delta_digest(place.into(), base, workspace as u64, out as u64) }
    })
}

pub(super) fn cuda_open(device: i32) -> Result<()> {
    guard(|| cuda::open(device))
}

pub(super) fn cuda_apply_workspace(weight: &CudaMatrix) -> Result<usize> {
    guard(|| cuda::apply_workspace_bytes(device_words(weight)?))
}

fn device_linear(args: &CudaLinear) -> Result<cuda::Linear> {
    let rows = cuda::BatchRows {
        slots: args.slots as u64,
        slot_count: args.slot_count,
        tenant_of_row: args.tenant_of_row as u64,
    };
    Ok(cuda::Linear {
        x: args.input as u64,
        m: args.m,
        weight: device_words(&args.weight)?,
        biases: args.biases as u64,
        bias_stride: args.bias_stride,
        arena: args.arena as u64,
        arena_bytes: args.arena_bytes,
        rows: args.grouped.then_some(rows),
        deterministic: args.deterministic,
    })
}

pub(super) unsafe fn cuda_delta_linear(
    place: &CudaPlace,
    args: &CudaLinear,
    workspace: usize,
    out: usize,
) -> Result<()> {
    guard(|| {
        let product = device_linear(args)?;
        let (workspace, out) = (workspace as u64, out as u64);
        if args.grad {
            // SAFETY: the shim's promise.
            return unsafe { cuda::delta_linear_grad_input(place.into(), &product, workspace, out) };
        }
        // SAFETY: the shim's promise.
        unsafe { cuda::delta_linear(place.into(), &product, workspace, out) }
    })
}

pub(super) fn cuda_linear_workspace(args: &CudaLinear) -> Result<usize> {
    guard(|| {
        let product = device_linear(args)?;
        if args.grad { product.grad_workspace_bytes() } else { product.workspace_bytes() }
    })
}

pub(super) unsafe fn cuda_delta_embedding(place: &CudaPlace, args: &CudaLookup, out: usize) -> Result<()> {
    guard(|| {
        let lookup = device_embedding(args)?;
        // SAFETY: the shim's promise.
        unsafe { cuda::delta_embedding(place.into(), &lookup, out as u64) }
    })
}

fn device_embedding(args: &CudaLookup) -> Result<cuda::Embedding> {
    let rows = cuda::BatchRows {
        slots: args.slots as u64,
        slot_count: args.slot_count,
        tenant_of_row: args.tenant_of_row as u64,
    };
    Ok(cuda::Embedding {
        indices: args.indices as u64,
        m: args.m,
        weight: device_words(&args.weight)?,
        arena: args.arena as u64,
        arena_bytes: args.arena_bytes,
        rows,
    })
}
