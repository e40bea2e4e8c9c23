//! Ops on the CPU: products, lookups and gradients are those of the fine-tuned weights, alike on every
//! instruction set.

#[path = "../common"]
#[allow(missing_docs, reason = "public only to the tests of this binary")]
pub mod common {
    pub mod alone;
    pub mod counting;
    pub mod data;
    pub mod layout0;
    pub mod linear;
}

mod embedding_lookup;
mod grouped_exactness;
mod layouts;
mod linear_exactness;
mod order_apart;
mod parts;
mod scratch_limits;
mod simd_parity;
mod small_work;
