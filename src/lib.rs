//! xorz: exact fine-tunes of one base model. One base in memory, a small lossless delta per tenant, linear
//! layers computed on base + delta.
//!
//! | module | what it is |
//! |---|---|
//! | [`error`] | the one error type |
//! | [`matrix`] | dtypes, shapes, digests: all arithmetic on sizes |
//! | [`codec`] | what a delta is, tile by tile, in scalar code: the oracle |
//! | [`resident`] | a delta of one matrix in memory: layout, writer, view, slice, concat |
//! | [`vector`] | words at the speed of memory: bit streams, encoders, restore, apply; one algorithm per instruction set |
//! | [`cpu`] | the products on the CPU: linear layers and embeddings on base + delta |
//! | [`cuda`] | the ops on a CUDA device: the host side of the kernels in `cuda/` at the root |
//! | [`package`] | a delta of a checkpoint at rest: one `.xorz` file, written, read, packed, unpacked |
//! | [`report`] | what packages hold and what fine-tunes take, told to people |
//! | [`ffi`] | the doors: ops, the plain C ABI, the typed bridge to the shim; the only exports |
//!
//! Dependencies point one way: `error, matrix <- codec <- resident <- vector <- {cpu, package} <- ffi <- csrc
//! <- python`. `cpu` and `package` stand side by side and do not know each other. `report` stands on
//! `package`, for the binary alone. `cuda` stands on `matrix` alone: its kernels read a resident delta's
//! bytes on the device. `unsafe` lives in `vector/<arch>`, `cuda` and `ffi` only.

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::unimplemented)
)]

pub mod codec;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod ffi;
pub mod matrix;
pub mod package;
pub mod report;
pub mod resident;
pub mod vector;
