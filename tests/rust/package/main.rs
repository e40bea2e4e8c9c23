//! Packages and the `xorz` command: what goes in comes out, of files and of folders; broken ones; what users are told.

#[path = "../common"]
#[allow(missing_docs, reason = "public only to the tests of this binary")]
pub mod common {
    pub mod alone;
    pub mod counting;
    pub mod data;
    pub mod disk;
    pub mod exchanged;
    pub mod forge;
    pub mod mapping;
    pub mod packed;
    pub mod seal;
    pub mod tables;
}

mod checkpoint_folders;
mod checkpoint_golden;
mod checkpoint_hostile;
mod checkpoint_pairing;
mod checkpoint_resized;
mod checkpoint_roundtrip;
mod cli;
mod digest_cache;
mod estimate;
mod fleet;
mod golden;
mod golden_tables;
mod hostile;
mod hostile_names;
mod hostile_tables;
mod loads;
mod messages;
mod page;
mod roundtrip;
mod small_inputs;
mod smallest;
mod trust;
