//! The plain C ABI, declared for callers in `csrc/xorz.h`. No logic: pointers to slices, [`super::ops`], results out.

use std::ffi::c_char;

/// The version of this C ABI; it grows when a declaration changes.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_abi_version() -> u32 {
    0
}

/// The library's version, a static string.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
