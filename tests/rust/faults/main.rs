//! The `xorz` command where the world is against it: killed, out of disk or memory, refused, its input changed under it.
//! Each run is a process, whose limits are its own.

#[path = "../common"]
#[allow(missing_docs, reason = "public only to the tests of this binary")]
pub mod common {
    pub mod data;
    pub mod disk;
    pub mod mapping;
}

mod input;
mod kill;
mod limits;
mod memory_bound;
mod network;
mod signals;
mod system;
