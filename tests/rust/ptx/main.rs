//! The kernels of `cuda/` as nvcc makes them: their PTX, run by an interpreter that was written from the PTX ISA and from nothing
//! of this repository's emulation (`tests/cuda_host`). What a host compiler does not see is seen here: inline assembly and the
//! layouts of its fragments, masks and lanes of collectives, copies that nobody waits for, registers that nobody wrote.
//!
//! `make cuda-gate` compiles the PTX and runs this; by hand, `python3 tests/cuda_gate/ptx.py build/ptx` and
//! `XORZ_PTX=build/ptx cargo test --test ptx`. Without `XORZ_PTX` the tests say that they are skipped, and pass.
//!
//! What is modelled:
//!
//! - Warps in step; lanes that a branch parts meet at its immediate post-dominator. Collectives, and what is `.aligned`, need all 32
//!   lanes there, and a mask that names them.
//! - Bounds of each buffer and of the shared variable, alignment of each access, what may only be read, and what was never written:
//!   of every lane's registers and every byte. Such values may be computed with and thrown away, but decide
//!   no branch or address, and do not arrive in device memory. All bytes of an output are written.
//! - Races between any two threads, by what orders them and not by the order in which they happened to run (`races.rs`); loads past the
//!   coherent path (`.nc`) of what the launch writes.
//! - `cp.async`: nobody may touch its sixteen bytes before the lane that copies has waited for its group, and nobody else before a
//!   barrier after that.
//! - Division by zero, divergent barriers and collectives, warps that end at different barriers, more instructions than any kernel has.
//! - An instruction that is not known is an error that names it.
//!
//! What is not: time; the order and roundings inside an `mma` (sixteen exact products, one rounding); payloads of computed NaN; races
//! between launches; registers or code of a real machine (`make cuda-gate` looks at spills, `python -m xorz.gpu_check` at a GPU);
//! lanes that go on at different speeds where nothing makes them meet, but for the races that this would show.

#[path = "../common"]
#[allow(missing_docs, reason = "public only to the tests of this binary")]
pub mod common {
    pub mod data;
    pub mod device;
    pub mod grads;
    pub mod kernels;
    pub mod linear;
    pub mod lookups;
}

mod arith;
mod broken;
mod collective;
mod decode;
mod digests;
mod flow;
mod machine;
mod memory;
mod mutants;
mod ops;
mod oracle;
mod parse;
mod products;
mod races;
mod registers;
mod restores;
mod rows;
mod warp;
