//! The compiled kernels: embedded by `build.rs` where nvcc was there, or a file that `XORZ_CUDA_IMAGE` names.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use bytemuck::cast_slice_mut;

/// Names a fatbin or cubin of `cuda/` to load in place of the embedded one.
const IMAGE: &str = "XORZ_CUDA_IMAGE";
const FATBIN: [u8; 4] = 0xBA55_ED50_u32.to_le_bytes();
const ELF: [u8; 4] = *b"\x7FELF";

/// An image, aligned as the driver asks.
pub(super) struct Image {
    /// Bytes, zeros to the next multiple of 8.
    pub words: Vec<u64>,
    /// The CUDA version of the compiler, as the driver counts (13020), where that is known.
    pub toolkit: Option<i32>,
}

#[cfg(xorz_cuda)]
fn embedded() -> Option<(&'static [u8], i32)> {
    Some((include_bytes!(env!("XORZ_FATBIN")), env!("XORZ_CUDA_TOOLKIT").parse().ok()?))
}

#[cfg(not(xorz_cuda))]
fn embedded() -> Option<(&'static [u8], i32)> {
    None
}

fn aligned(bytes: &[u8]) -> Vec<u64> {
    let mut words = vec![0u64; bytes.len().div_ceil(8)];
    cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    words
}

/// The kernels.
///
/// # Errors
/// `Device` where this build has none; `Io` and `InvalidArgument` for a file that is not there, or is
/// something else.
pub(super) fn image() -> Result<Image> {
    if let Some(path) = std::env::var_os(IMAGE) {
        let name = path.to_string_lossy();
        let bytes = std::fs::read(&path).map_err(|e| Error::io(format!("{IMAGE} is {name}: {e}")))?;
        if !bytes.starts_with(&FATBIN) && !bytes.starts_with(&ELF) {
            return Err(Error::invalid(format!("{IMAGE} is {name}, which is neither a fatbin nor a cubin")));
        }
        return Ok(Image { words: aligned(&bytes), toolkit: None });
    }
    let (bytes, toolkit) = embedded().ok_or_else(|| {
        Error::device(
            "xorz was built without CUDA kernels; build it where nvcc is (`make build CUDA=1` fetches one; or set \
             XORZ_NVCC to its path), or move the tensors to the CPU",
        )
    })?;
    Ok(Image { words: aligned(bytes), toolkit: Some(toolkit) })
}
