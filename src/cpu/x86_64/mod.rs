//! The x86-64 instances of the vector trait. Intrinsics, and the `unsafe` that they take, live here and nowhere else
//! in this crate's CPU code; no algorithm does.

pub(super) mod avx2;
pub(super) mod avx512;
