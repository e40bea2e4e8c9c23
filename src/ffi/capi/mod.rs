//! The plain C ABI, declared and explained for callers in `csrc/xorz.h`. No logic: pointers to slices, the guarded
//! functions of [`super::ops`] and [`super::packages`], results out.
//!
//! Every function trusts its caller as far as C has to: pointers are null or valid, lengths are true, outputs overlap
//! nothing. Everything that can be checked is.

mod ops;
mod packages;

use super::{Task, guard};
use crate::codec::Prefer;
use crate::cpu;
use crate::error::{Error, Result};
use crate::vector::{self, Executor, Serial};
use std::ffi::{CStr, c_char, c_void};

pub use ops::*;
pub use packages::*;

/// Bytes of an error's message, the closing zero among them.
pub const MESSAGE_BYTES: usize = 1020;

/// `xorz_error`.
#[repr(C)]
pub struct XorzError {
    /// 0, or an [`crate::error::Kind`].
    pub kind: i32,
    /// The sentence, zero-terminated UTF-8, cut if too long.
    pub message: [c_char; MESSAGE_BYTES],
}

/// `xorz_buffer`: bytes owned by the library until `xorz_buffer_free`.
#[repr(C)]
pub struct XorzBuffer {
    /// First byte.
    pub data: *mut u8,
    /// Number of bytes.
    pub length: usize,
}

/// `xorz_matrix`.
#[repr(C)]
pub struct XorzMatrix {
    /// Row-major little-endian words.
    pub words: *const c_void,
    /// Bytes at `words`.
    pub bytes: usize,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Code of the dtype.
    pub dtype: u32,
}

/// `xorz_task`: runs task `index`.
pub type XorzTask = unsafe extern "C" fn(task_context: *const c_void, index: usize);

/// `xorz_executor`: the caller's threads.
#[repr(C)]
pub struct XorzExecutor {
    /// Handed back to `run`.
    pub context: *mut c_void,
    /// Threads that `run` may use at once.
    pub threads: usize,
    /// Calls `task(task_context, i)` once for every `i` below `tasks`, waits for all, and gives 0.
    pub run: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            tasks: usize,
            task: XorzTask,
            task_context: *const c_void,
        ) -> i32,
    >,
}

// SAFETY: the header demands that `run` may be called from any thread.
unsafe impl Sync for XorzExecutor {}

unsafe extern "C" fn run_task(task_context: *const c_void, index: usize) {
    // SAFETY: the context is the `Task` that `XorzExecutor::run` passed, alive until that returns.
    unsafe { &*task_context.cast::<Task<'_>>() }.call(index);
}

impl Executor for XorzExecutor {
    fn threads(&self) -> usize {
        self.threads.max(1)
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        let run = self.run.ok_or_else(|| null("executor.run"))?;
        let task = Task::new(tasks, task);
        // SAFETY: the header demands a function of this signature that keeps no pointer after it returns.
        let code = unsafe { run(self.context, tasks, run_task, (&raw const task).cast()) };
        task.finish()?;
        if code == 0 { Ok(()) } else { Err(Error::internal(format!("the executor failed with code {code}"))) }
    }
}

fn null(what: &str) -> Error {
    Error::invalid(format!("{what} is NULL"))
}

/// Run `f` for a C caller: kind out, sentence in `error`.
///
/// # Safety
/// `error` is null or writable.
unsafe fn call(error: *mut XorzError, f: impl FnOnce() -> Result<()>) -> i32 {
    let (kind, text) = match guard(f) {
        Ok(()) => (0, String::new()),
        Err(e) => (e.kind() as i32, e.to_string()),
    };
    // SAFETY: the caller's promise.
    if let Some(error) = unsafe { error.as_mut() } {
        error.kind = kind;
        let mut length = text.len().min(MESSAGE_BYTES - 1);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        let bytes = text.as_bytes()[..length].iter().map(|&b| if b == 0 { b' ' } else { b });
        error.message.iter_mut().zip(bytes).for_each(|(to, b)| *to = b.cast_signed());
        error.message[length] = 0;
    }
    kind
}

/// # Safety
/// `data` is null or `length` readable bytes for `'a`.
unsafe fn bytes<'a>(data: *const c_void, length: usize, what: &str) -> Result<&'a [u8]> {
    match (data.is_null(), length) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(null(what)),
        (false, l) if isize::try_from(l).is_err() => {
            Err(Error::invalid(format!("{what} cannot have {l} bytes")))
        }
        // SAFETY: not null, a possible length, and the caller's promise.
        (false, l) => Ok(unsafe { std::slice::from_raw_parts(data.cast(), l) }),
    }
}

/// # Safety
/// `data` is null or `length` writable bytes for `'a` that nothing else reads meanwhile.
unsafe fn bytes_mut<'a>(data: *mut c_void, length: usize, what: &str) -> Result<&'a mut [u8]> {
    // SAFETY: the caller's promise.
    unsafe { bytes(data, length, what)? };
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: checked by `bytes` not to be null or too long; the caller's promise for the rest.
    Ok(unsafe { std::slice::from_raw_parts_mut(data.cast(), length) })
}

/// # Safety
/// `p` is null or valid for `'a`.
unsafe fn reference<'a, T>(p: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { p.as_ref() }.ok_or_else(|| null(what))
}

/// # Safety
/// `p` is null or writable.
unsafe fn give<T>(p: *mut T, value: T, what: &str) -> Result<()> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null and the caller's promise. What was there is not dropped: C says it is uninitialised.
    unsafe { p.write(value) };
    Ok(())
}

/// # Safety
/// `p` is null or writable.
unsafe fn give_bytes(p: *mut XorzBuffer, value: Vec<u8>, what: &str) -> Result<()> {
    let boxed = value.into_boxed_slice();
    let length = boxed.len();
    let buffer = XorzBuffer { data: Box::into_raw(boxed).cast(), length };
    // SAFETY: the caller's promise. On failure the bytes leak, which is safe.
    unsafe { give(p, buffer, what) }
}

/// # Safety
/// `p` is null or a zero-terminated string for `'a`.
unsafe fn text<'a>(p: *const c_char, what: &str) -> Result<&'a str> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null and the caller's promise.
    let bytes = unsafe { CStr::from_ptr(p) };
    bytes.to_str().map_err(|_| Error::invalid(format!("{what} is not UTF-8")))
}

/// # Safety
/// `p` is null or a matrix whose words are readable for `'a`.
unsafe fn matrix<'a>(p: *const XorzMatrix, what: &str) -> Result<super::ops::Words<'a>> {
    // SAFETY: the caller's promise, twice.
    let (m, data) = unsafe {
        let m = reference(p, what)?;
        (m, bytes(m.words, m.bytes, &format!("{what}.words"))?)
    };
    Ok(super::ops::Words { dtype: m.dtype, n: m.n, k: m.k, bytes: data })
}

/// # Safety
/// `p` is null (serial) or an executor valid for `'a`.
unsafe fn executor<'a>(p: *const XorzExecutor) -> &'a dyn Executor {
    // SAFETY: the caller's promise.
    match unsafe { p.as_ref() } {
        Some(e) => e,
        None => &Serial,
    }
}

fn prefer(code: i32) -> Result<Prefer> {
    match code {
        0 => Ok(Prefer::Speed),
        1 => Ok(Prefer::Memory),
        2 => vector::preference("auto"),
        _ => Err(Error::invalid(format!("prefer must be 0 (speed), 1 (memory) or 2 (auto), but is {code}"))),
    }
}

fn mode(code: i32) -> Result<cpu::Mode> {
    match code {
        0 => Ok(cpu::Mode::Fast),
        1 => Ok(cpu::Mode::Deterministic),
        _ => Err(Error::invalid(format!("mode must be 0 (fast) or 1 (deterministic), but is {code}"))),
    }
}

/// The version of this C ABI; it grows when a declaration changes.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_abi_version() -> u32 {
    2
}

/// What [`XORZ_PREFER_AUTO`](prefer) comes to on this machine: 0 (speed) or 1 (memory); speed where `XORZ_ISA` is refused.
#[unsafe(no_mangle)]
pub extern "C" fn xorz_prefer_auto() -> i32 {
    i32::from(vector::preference("auto").is_ok_and(|p| p == Prefer::Memory))
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
        if !buffer.data.is_null() {
            drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(buffer.data, buffer.length)));
        }
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
