//! Deltas themselves: that they give back their words, how small they are, what broken ones do. And what holds for the
//! whole tree: its layers, its documents, and the contract of its C ABI.

#[path = "../common"]
#[allow(missing_docs, reason = "public only to the tests of this binary")]
pub mod common {
    pub mod counting;
    pub mod data;
    pub mod linear;
    pub mod seal;
}

mod arithmetic;
mod checks;
mod documents;
mod encode_parity;
mod exchanges;
mod ffi_contract;
mod ffi_leaks;
mod golden;
mod hostile;
mod layers;
mod predicted;
mod regions;
mod roundtrip;
mod sizes;
mod words;
