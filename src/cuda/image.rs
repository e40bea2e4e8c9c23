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

/// The kernels and the CUDA version of their compiler, or why this build has none.
#[cfg(xorz_cuda)]
fn embedded() -> std::result::Result<(&'static [u8], i32), &'static str> {
    let toolkit = env!("XORZ_CUDA_TOOLKIT").parse().map_err(|_| "the compiler's version is no number")?;
    Ok((include_bytes!(env!("XORZ_FATBIN")), toolkit))
}

#[cfg(not(xorz_cuda))]
fn embedded() -> std::result::Result<(&'static [u8], i32), &'static str> {
    Err(env!("XORZ_WITHOUT_KERNELS"))
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
    let (bytes, toolkit) = embedded().map_err(|why| {
        Error::device(format!(
            "xorz was built without CUDA kernels: {why}; build it again with XORZ_CUDA=1, which fetches nvcc or says why \
             it cannot (XORZ_NVCC names one that is there), or move the tensors to the CPU"
        ))
    })?;
    Ok(Image { words: aligned(bytes), toolkit: Some(toolkit) })
}
