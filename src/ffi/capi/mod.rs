//! The plain C ABI, declared and explained for callers in `csrc/xorz.h`. No logic: pointers are made into the
//! core's arguments, guarded once, and results go out.
//!
//! Every function trusts its caller as far as C has to: pointers are null or valid, lengths are true, outputs
//! overlap nothing. Everything that can be checked is.

mod exchanges;
mod files;
mod ops;
mod packages;
mod pointers;

use super::guard;
use crate::codec::Prefer;
use crate::cpu;
use crate::vector;
use pointers::free;
use std::ffi::c_char;

pub use exchanges::*;
pub use files::*;
pub use ops::*;
pub use packages::*;
pub use pointers::{MESSAGE_BYTES, XorzBuffer, XorzError, XorzExecutor, XorzMatrix, XorzTask};

/// The version of this C ABI; it grows when a declaration changes.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_abi_version() -> u32 {
    4
}

/// What `XORZ_PREFER_AUTO` comes to on this machine: 0 (speed) or 1 (memory); speed where `XORZ_ISA` is
/// refused.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_prefer_auto() -> i32 {
    i32::from(guard(|| vector::preference("auto")).is_ok_and(|p| p == Prefer::Memory))
}

/// The library's version, a static string.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Free a buffer of the library and make it empty.
///
/// # Safety
/// `buffer` is null, empty or filled by this library and not freed since.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_buffer_free(buffer: *mut XorzBuffer) {
    // SAFETY: the caller's promise; the pair came from `Box::into_raw` in `give_bytes`.
    unsafe {
        let Some(buffer) = buffer.as_mut() else { return };
        free(std::ptr::slice_from_raw_parts_mut(buffer.data, buffer.length));
        *buffer = XorzBuffer { data: std::ptr::null_mut(), length: 0 };
    }
}

/// Panels of fine-tuned weights restored into scratch by products since the last reset.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_panels_restored() -> u64 {
    cpu::counters::panels_restored()
}

/// The most scratch, in bytes, that an op has held since the last reset.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_scratch_peak_bytes() -> u64 {
    cpu::counters::scratch_peak_bytes()
}

/// Set the counters to zero.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_reset_counters() {
    cpu::counters::reset();
}
