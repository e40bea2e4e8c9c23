//! The ops on a CUDA device: the host side of the kernels in `cuda/` at the root of the repository.
//!
//! | module | what it is |
//! |---|---|
//! | [`plan`] | from dtype, shape and rows to entry, grid, block, workspace; pure |
//! | [`params`] | every kernel's parameters, in order: the one table that packs them |
//! | [`status`] | the words in which kernels report, and their sentences |
//! | `image` | the compiled kernels, embedded or from `XORZ_CUDA_IMAGE` |
//! | `driver` | libcuda, loaded when a device is first used; nothing links it |
//! | `launch` | the ops: plan, pack, launch |
//! | `restore` | those that restore words, of the whole matrix or a panel |
//! | `apply` | `delta_apply_` and digests: as `launch` |
//!
//! Nothing here reads or allocates device memory, copies or synchronises: a call checks what the host knows,
//! and puts kernels on the caller's stream. The first call on a device loads the kernels. Everything after
//! it, and everything at all on a stream that is being captured, can be part of a CUDA graph.
//!
//! What only a kernel can find out (a delta of another matrix, a slot that does not exist) comes out as NaN,
//! and as an error of the *next* call on that device: see [`status`].

mod apply;
mod driver;
mod image;
mod launch;
pub mod params;
pub mod plan;
mod restore;
pub mod status;

pub use apply::{apply_workspace_bytes, delta_apply, delta_digest, digest_workspace_bytes};
pub use launch::{
    BatchRows, DeviceMatrix, Embedding, Linear, Place, delta_embedding, delta_linear,
    delta_linear_grad_input, open, reported,
};
pub use restore::{DeviceDelta, delta_linear_panel, delta_restore};
