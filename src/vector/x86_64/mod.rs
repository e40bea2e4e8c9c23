//! The x86-64 instances of the vector trait, with their decoders (`lanes`) and encoders (`pack`) of
//! `exponent`. All intrinsics of this crate, and the `unsafe` that they need, are here. Algorithms are
//! elsewhere, written over the trait.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx512_more;
mod bf16dot;
mod bits;
pub(crate) mod cpuid;
mod differ;
mod lanes;
mod lanes512;
mod lanes512_four_byte;
mod pack;
mod right;
mod streams512;
