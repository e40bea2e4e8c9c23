//! The doors to [`crate::cuda`]: addresses of device memory, as the shim has them.

use super::door::{CudaLinear, CudaLookup, CudaPlace, CudaWords};
use crate::error::Result;
use crate::ffi::cuda;

impl From<&CudaPlace> for cuda::Place {
    fn from(p: &CudaPlace) -> Self {
        Self { device: p.device, stream: p.stream as u64 }
    }
}

fn device_words(w: &CudaWords) -> Result<crate::cuda::DeviceMatrix> {
    cuda::words(w.dtype, w.bits, w.n, w.k, w.address as u64)
}

pub(super) unsafe fn cuda_delta_restore(
    place: &CudaPlace,
    base: &CudaWords,
    out: usize,
    delta: usize,
    delta_bytes: usize,
) -> Result<()> {
    // SAFETY: the shim's promise.
    unsafe { cuda::delta_restore(place.into(), device_words(base)?, out as u64, (delta as u64, delta_bytes)) }
}

pub(super) unsafe fn cuda_delta_apply(
    place: &CudaPlace,
    weight: &CudaWords,
    delta: usize,
    delta_bytes: usize,
) -> Result<()> {
    // SAFETY: the shim's promise.
    unsafe { cuda::delta_apply(place.into(), device_words(weight)?, (delta as u64, delta_bytes)) }
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
    // SAFETY: the shim's promise.
    unsafe { cuda::delta_linear(place.into(), &device_linear(args)?, workspace as u64, out as u64) }
}

pub(super) fn cuda_linear_workspace(args: &CudaLinear) -> Result<usize> {
    cuda::workspace_bytes(&device_linear(args)?)
}

pub(super) unsafe fn cuda_delta_embedding(place: &CudaPlace, args: &CudaLookup, out: usize) -> Result<()> {
    let rows = cuda::BatchRows {
        slots: args.slots as u64,
        slot_count: args.slot_count,
        tenant_of_row: args.tenant_of_row as u64,
    };
    let lookup = cuda::Embedding {
        indices: args.indices as u64,
        m: args.m,
        weight: device_words(&args.weight)?,
        arena: args.arena as u64,
        arena_bytes: args.arena_bytes,
        rows,
    };
    // SAFETY: the shim's promise.
    unsafe { cuda::delta_embedding(place.into(), &lookup, out as u64) }
}
