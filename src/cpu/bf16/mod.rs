//! `mode = "fast"` on bf16 words with a bf16 dot product ([`Bf16Dot`](crate::vector::bf16dot::Bf16Dot)):
//! words of W and x are multiplied as they are, nothing is widened. Where the machine has no such
//! instruction, and in the other modes, the kernels beside this folder compute.
//!
//! | file | what |
//! |---|---|
//! | `few` | up to sixteen rows of x on words as they lie in memory |
//! | `decode` | up to sixteen rows of x of tenants with `exponent` deltas, decoded on the way |
//! | `panels` | more rows, on packed panels of 64 rows of W |
//!
//! **Error.** As of the other kernels (two roundings for each instruction of a chain), but for denormals,
//! which count as zero: see [`Bf16Dot`](crate::vector::bf16dot).

mod decode;
mod few;
mod panels;

pub(super) use few::Few;
