//! The x86-64 instances of the vector trait, and what they decode (`lanes`) and encode (`pack`) `exponent` with. Intrinsics, and the
//! `unsafe` that they take, live here and nowhere else in this crate's CPU code; no algorithm of another file does.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx512_more;
mod bf16dot;
mod differ;
mod lanes;
mod lanes512;
mod lanes512_wide;
mod pack;
mod right;
mod streams512;
