//! What a C caller hands over, and what it gets: the structs that all functions share, pointers made into
//! references, and the one way in and out of a guarded call.

use crate::codec::Prefer;
use crate::cpu;
use crate::error::{Error, Result};
use crate::ffi::{Task, guard};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use crate::resident::Resident;
use crate::vector::{self, Executor, Serial};
use std::ffi::{CStr, c_char, c_void};

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

pub(super) fn null(what: &str) -> Error {
    Error::invalid(format!("{what} is NULL"))
}

/// Run `f` for a C caller: kind out, sentence in `error`.
///
/// # Safety
/// `error` is null or writable.
pub(super) unsafe fn call(error: *mut XorzError, f: impl FnOnce() -> Result<()>) -> i32 {
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
pub(super) unsafe fn bytes<'a>(data: *const c_void, length: usize, what: &str) -> Result<&'a [u8]> {
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
pub(super) unsafe fn bytes_mut<'a>(data: *mut c_void, length: usize, what: &str) -> Result<&'a mut [u8]> {
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
pub(super) unsafe fn reference<'a, T>(p: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { p.as_ref() }.ok_or_else(|| null(what))
}

/// # Safety
/// `p` is null or writable.
pub(super) unsafe fn give<T>(p: *mut T, value: T, what: &str) -> Result<()> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null and the caller's promise. What was there is not dropped: C says it is uninitialised.
    unsafe { p.write(value) };
    Ok(())
}

/// # Safety
/// `p` is null or writable.
pub(super) unsafe fn give_bytes(p: *mut XorzBuffer, value: Vec<u8>, what: &str) -> Result<()> {
    // Looked at first: what is made into a pointer has no owner who would free it.
    if p.is_null() {
        return Err(null(what));
    }
    let boxed = value.into_boxed_slice();
    let length = boxed.len();
    let buffer = XorzBuffer { data: Box::into_raw(boxed).cast(), length };
    // SAFETY: the caller's promise.
    unsafe { give(p, buffer, what) }
}

/// Hand `value` to the caller, who frees it with [`free`]. Dropped if there is nowhere to put the pointer.
///
/// # Safety
/// `p` is null or writable.
pub(super) unsafe fn give_box<T>(p: *mut *mut T, value: T, what: &str) -> Result<()> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: the caller's promise.
    unsafe { give(p, Box::into_raw(Box::new(value)), what) }
}

/// # Safety
/// `p` is null or a zero-terminated string for `'a`.
pub(super) unsafe fn text<'a>(p: *const c_char, what: &str) -> Result<&'a str> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null and the caller's promise.
    let bytes = unsafe { CStr::from_ptr(p) };
    bytes.to_str().map_err(|_| Error::invalid(format!("{what} is not UTF-8")))
}

/// # Safety
/// `p` is null or a matrix whose words are readable for `'a`.
pub(super) unsafe fn matrix<'a>(p: *const XorzMatrix, what: &str) -> Result<Matrix<'a>> {
    // SAFETY: the caller's promise, twice.
    let (m, data) = unsafe {
        let m = reference(p, what)?;
        (m, bytes(m.words, m.bytes, &format!("{what}.words"))?)
    };
    Matrix::new(Dtype::of_code(m.dtype)?, Shape { n: m.n, k: m.k }, data)
}

/// Dtype, shape and digest of a matrix whose words are elsewhere.
///
/// # Safety
/// `p` is null or a matrix, whose words are not looked at; `digest` is null or 16 readable bytes.
pub(super) unsafe fn known_matrix(p: *const XorzMatrix, digest: *const u8) -> Result<(Dtype, Shape, Digest)> {
    // SAFETY: the caller's promise, twice.
    let (m, digest) = unsafe { (reference(p, "base")?, reference(digest.cast::<[u8; 16]>(), "digest")?) };
    Ok((Dtype::of_code(m.dtype)?, Shape { n: m.n, k: m.k }, Digest(*digest)))
}

/// # Safety
/// `delta` is null or `delta_bytes` readable bytes for `'a`.
pub(super) unsafe fn parse<'a>(delta: *const c_void, delta_bytes: usize) -> Result<Resident<'a>> {
    // SAFETY: the caller's promise.
    Resident::parse(unsafe { bytes(delta, delta_bytes, "delta")? })
}

/// Free what [`give`] gave as a box: null is nothing.
///
/// # Safety
/// `p` is null or came from `Box::into_raw` and was not freed.
pub(super) unsafe fn free<T: ?Sized>(p: *mut T) {
    // Whoever frees has nobody to tell of a failure.
    let _ = guard(|| {
        if !p.is_null() {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(p) });
        }
        Ok(())
    });
}

/// # Safety
/// `p` is null (serial) or an executor valid for `'a`.
pub(super) unsafe fn executor<'a>(p: *const XorzExecutor) -> &'a dyn Executor {
    // SAFETY: the caller's promise.
    match unsafe { p.as_ref() } {
        Some(e) => e,
        None => &Serial,
    }
}

pub(super) fn prefer(code: i32) -> Result<Prefer> {
    match code {
        0 => Ok(Prefer::Speed),
        1 => Ok(Prefer::Memory),
        2 => vector::preference("auto"),
        _ => Err(Error::invalid(format!("prefer must be 0 (speed), 1 (memory) or 2 (auto), but is {code}"))),
    }
}

pub(super) fn mode(code: i32) -> Result<cpu::Mode> {
    match code {
        0 => Ok(cpu::Mode::Fast),
        1 => Ok(cpu::Mode::Deterministic),
        _ => Err(Error::invalid(format!("mode must be 0 (fast) or 1 (deterministic), but is {code}"))),
    }
}
