//! The vector machine: words and their bit streams at the speed of memory. What packages and products both stand on.
//!
//! One algorithm, written once over a sixteen-lane vector trait ([`simd`](self)), compiled per instruction set, chosen once at
//! run time; **every instruction set gives the same bits**. Threads are the caller's ([`Executor`]). `unsafe` lives in the
//! architecture folders only; this module knows no product, no package and no torch.
//!
//! | file | what |
//! |---|---|
//! | `simd`, `scalar`, `x86_64` | the vector trait and its instances; `dispatch` picks one |
//! | `float` | bf16, f16, f32 as lanes |
//! | `lanes` | the bit streams of `exponent`; `packer` what an instruction set gives to those who write them |
//! | `bf16dot` | dot products of bf16 words as they are, where the machine has them |
//! | `bits` | what instruction sets give to code of single registers |
//! | `check` | a delta and its base looked at in full; `digest` the base's digest alone |
//! | `encode` | words to tiles and whole deltas, and the estimates that choose how |
//! | `predicted` | tiles of packages whose changes the base predicts |
//! | `processor`, `preference`, `trace` | what CPUID says, what `prefer="auto"` comes to, and whether people are told |
//! | `restore` | fine-tuned words: restore, apply, patch; `region` some rows and columns, `tile` one tile, `packed` one in panels |
//! | `records` | the walk along the records of a `sparse` tile |
//! | `exchange` | two versions of words, made of each other in place by touching only what differs |
//! | `exec` | how ops run their tasks |

pub(crate) mod bf16dot;
pub(crate) mod bits;
mod check;
mod digest;
pub(crate) mod dispatch;
mod encode;
mod exchange;
pub(crate) mod exec;
pub(crate) mod float;
pub(crate) mod lanes;
pub(crate) mod packed;
mod packer;
pub(crate) mod predicted;
mod preference;
pub(crate) mod processor;
pub(crate) mod records;
pub(crate) mod region;
mod restore;
pub(crate) mod scalar;
pub(crate) mod simd;
pub(crate) mod tile;
pub(crate) mod trace;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

pub use check::{delta_check, delta_check_on, delta_matches};
pub use digest::delta_digest;
pub use dispatch::Isa;
pub use encode::{encode, encode_on, encode_tiles, encode_tiles_on, estimate, estimate_exactly, estimate_on};
pub use exchange::{exchange, exchange_apply, exchange_on};
pub use exec::{Executor, Serial};
pub use preference::{preference, preference_of};
pub use restore::{
    decode_exponent_on, delta_apply, delta_restore, delta_restore_region, delta_restore_region_on,
    delta_restore_rows, delta_restore_rows_on, patch, patch_on,
};
