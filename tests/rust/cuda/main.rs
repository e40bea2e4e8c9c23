//! The CUDA kernels and their host side, on machines without a GPU: the kernels' source compiled for the
//! host, and a double of libcuda that runs it.

#[path = "../common"]
#[allow(missing_docs, reason = "public only to the tests of this binary")]
pub mod common {
    pub mod alone;
    pub mod data;
    pub mod device;
    pub mod gpu;
    pub mod grads;
    pub mod kernels;
    pub mod layout0;
    pub mod linear;
    pub mod lookups;
    pub mod mutants;
}

mod budget;
mod bytes;
mod digest;
mod digest_mutants;
mod edges;
mod embedding;
mod forged;
mod grad;
mod grad_mutants;
mod hostile;
mod kernels;
mod large;
mod large_mutants;
mod large_wanted;
mod launch;
mod layout0;
mod mutants;
mod offsets;
mod panels;
mod plan;
mod refusals;
