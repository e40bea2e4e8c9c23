//! The products on the CPU: linear layers and embeddings on base + delta, their gradients, one tenant or
//! many.
//!
//! One algorithm, written over the vector machine ([`crate::vector`]); **every instruction set gives the same
//! bits**. Threads are the caller's. No `unsafe`; this module knows no package and no torch.
//!
//! | file | what |
//! |---|---|
//! | `linear` | products: which rows of x go where; `fused` few rows, of one tenant or many; `dot` base products, `sparse` entries, `exponent` decoding on the way |
//! | `bf16` | the same in `mode = "fast"` with a bf16 dot product |
//! | `plan` | the cost model: every choice of kernel and size; `costs` what it knows of a machine; `XORZ_TRACE` |
//! | `again_f64` | the decode path of outputs that are not finite |
//! | `grad` | `delta_linear_grad_input`; `outer` its kernels |
//! | `embedding` | `delta_embedding`: rows of the tenants' tables |
//! | `grouped` | `delta_linear_grouped` and its gradient; `arena` the deltas of many tenants, `weights` a base with one or none |
//! | `job`, `scratch`, `counters` | what a product is asked, and what a call of it comes to; its memory; what it counts |
#![forbid(unsafe_code)]

mod again_f64;
mod arena;
mod bf16;
mod costs;
pub mod counters;
mod dot;
mod embedding;
mod exponent;
mod finish;
mod fused;
mod grad;
mod grouped;
mod job;
mod linear;
mod outer;
mod plan;
mod scratch;
mod sparse;
mod weights;

pub use arena::{ARENA_ALIGN, Arena, Tenant, Tenants};
pub use costs::{least_torch_rows, torch_multiplies};
pub use embedding::{EmbeddingArgs, delta_embedding, delta_embedding_on};
pub use grad::{delta_linear_grad_input, delta_linear_grad_input_on};
pub use grouped::{
    Biases, GroupedArgs, GroupedGradArgs, delta_linear_grouped, delta_linear_grouped_grad_input,
    delta_linear_grouped_on,
};
pub use job::Mode;
pub use linear::{LinearArgs, delta_linear, delta_linear_on};
