#![doc = "The map; filled in below."]
pub mod error;
pub mod matrix;

pub mod ffi;
