//! Jobs over files of the C ABI, and what a caller says of them: paths, options, how they run.

use super::pointers::{XorzBuffer, XorzError, call, give_bytes, null, prefer, reference, text};
use crate::error::{Error, Result};
use crate::package::{
    Codec, Destination, PackOptions, Progress, Run, Trust, pack_files, pack_fleet, unpack_files, verify_files,
};
use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// `xorz_options`: how to pack.
#[repr(C)]
pub struct XorzOptions {
    /// 0 speed, 1 memory.
    pub prefer: i32,
    /// -2 the smallest of those that are quickly made and loaded, -1 the smallest, or a codec's code.
    pub codec: i32,
    /// zstd level; 0 is the default.
    pub level: i32,
    /// 0 digest, 1 sha256: what the package says of its base.
    pub trust: i32,
    /// Dropped from names on both sides before they are paired, or null.
    pub strip_prefix: *const c_char,
}

/// `xorz_run`: how a job over files runs.
#[repr(C)]
pub struct XorzRun {
    /// Threads; 0 takes one per core.
    pub jobs: u32,
    /// 0, or the sum of some of [`NO_SHA256`], [`TRUST_SHA256`] and [`WATCHED`].
    pub flags: u32,
    /// Ends the job when it is no longer 0, or null.
    pub stop: *const u32,
}

/// Flag of [`XorzRun`]: unpack and verify do not compare the sha256 of restored files.
pub const NO_SHA256: u32 = 1;

/// Flag of [`XorzRun`]: unpack and verify compare the sha256 of each base tensor before they take anything of it.
pub const TRUST_SHA256: u32 = 2;

/// Flag of [`XorzRun`]: `stop` is that of a [`XorzWatch`].
pub const WATCHED: u32 = 4;

/// `xorz_watch`: how far a job is, for the caller's other threads.
#[repr(C)]
#[derive(Debug, Default)]
pub struct XorzWatch {
    /// Ends the job when it is no longer 0.
    pub stop: AtomicU32,
    /// Stages that have begun.
    pub stages: AtomicU32,
    /// Bytes of the last one that has begun.
    pub total: AtomicU64,
    /// How many of them are done.
    pub done: AtomicU64,
}

impl Progress for XorzWatch {
    fn begin(&self, _: &str, bytes: u64) {
        // Who reads between two of these sees a stage of which nothing is done.
        self.done.store(0, Ordering::Release);
        self.total.store(bytes, Ordering::Release);
        self.stages.fetch_add(1, Ordering::Release);
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// # Safety
/// `p` is null or a zero-terminated string for `'a`.
pub(super) unsafe fn path<'a>(p: *const c_char, what: &str) -> Result<&'a Path> {
    if p.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null and the caller's promise.
    Ok(Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(p) }.to_bytes())))
}

/// # Safety
/// `p` is null or options whose strings are valid.
pub(super) unsafe fn options(p: *const XorzOptions) -> Result<PackOptions> {
    // SAFETY: the caller's promise.
    unsafe {
        let o = reference(p, "options")?;
        let strip = if o.strip_prefix.is_null() { None } else { Some(text(o.strip_prefix, "strip_prefix")?) };
        let ((codec, fast), level) = (codec(o.codec)?, (o.level != 0).then_some(o.level));
        Ok(PackOptions {
            prefer: prefer(o.prefer)?,
            codec,
            fast,
            level,
            strip_prefix: strip.map(str::to_owned),
            trust: trust(o.trust)?,
        })
    }
}

pub(super) fn trust(code: i32) -> Result<Trust> {
    match code {
        0 => Ok(Trust::Digest),
        1 => Ok(Trust::Sha256),
        _ => Err(Error::invalid(format!("trust must be 0 (digest) or 1 (sha256), but is {code}"))),
    }
}

/// Stands for the smallest codec of those that are quickly made and loaded.
pub const CODEC_FAST: i32 = -2;

/// Stands for the smallest codec.
pub const CODEC_SMALLEST: i32 = -1;

/// The codec that is asked for, and whether some are left out where none is.
fn codec(code: i32) -> Result<(Option<Codec>, bool)> {
    let known = Codec::ALL.into_iter().find(|c| *c as i32 == code && c.on_request());
    match (code, known) {
        (CODEC_FAST, _) => Ok((None, true)),
        (CODEC_SMALLEST, _) => Ok((None, false)),
        (_, Some(codec)) => Ok((Some(codec), false)),
        _ => {
            Err(Error::invalid(format!("codec must be -2 (fast), -1 (smallest), 0 to 3 or 6, but is {code}")))
        }
    }
}

/// # Safety
/// `p` is null, for the defaults, or valid, and so is its `stop` for `'a`, written to by atomic stores alone; the whole of a
/// [`XorzWatch`] where it is said to be that of one.
pub(super) unsafe fn run<'a>(p: *const XorzRun) -> Result<Run<'a>> {
    // SAFETY: the caller's promise.
    let Some(&XorzRun { jobs, flags, stop }) = (unsafe { p.as_ref() }) else { return Ok(Run::default()) };
    if !stop.is_aligned() {
        return Err(Error::invalid("run.stop is not aligned to its 4 bytes"));
    }
    if flags & !(NO_SHA256 | TRUST_SHA256 | WATCHED) != 0 {
        return Err(Error::invalid(format!(
            "run.flags is {flags}, but only {NO_SHA256}, {TRUST_SHA256} and {WATCHED}, and sums of these, have a meaning"
        )));
    }
    let mut progress: Option<&'a dyn Progress> = None;
    if flags & WATCHED != 0 {
        let watch = stop.cast::<XorzWatch>();
        if watch.is_null() || !watch.is_aligned() {
            return Err(Error::invalid(
                "run.stop is that of no xorz_watch: it is NULL, or not aligned to 8 bytes",
            ));
        }
        // SAFETY: valid, as the caller promises, and aligned; its fields are atomics, laid out as their integers.
        progress = unsafe { watch.as_ref() }.map(|watch| watch as &dyn Progress);
    }
    // SAFETY: null or valid and aligned; an atomic is laid out as its integer, and is only loaded here.
    let stop = unsafe { stop.cast::<AtomicU32>().as_ref() };
    let trust = if flags & TRUST_SHA256 == 0 { Trust::Digest } else { Trust::Sha256 };
    let jobs = usize::try_from(jobs).map_err(|_| Error::invalid(format!("run.jobs is {jobs}")))?;
    Ok(Run { jobs, progress, stop, sha256: flags & NO_SHA256 == 0, trust })
}

/// Pack a checkpoint.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_pack_files(
    base: *const c_char,
    fine_tuned: *const c_char,
    package: *const c_char,
    how: *const XorzOptions,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, fine_tuned) = (path(base, "base")?, path(fine_tuned, "fine_tuned")?);
            let out = Destination::Path(path(package, "package")?);
            let done = pack_files(base, fine_tuned, out, &options(how)?, &run(job)?)?;
            give_bytes(report, done.to_json()?.into_bytes(), "report")
        })
    }
}

/// # Safety
/// `p` is null, or `count` pointers as [`path`] takes them.
unsafe fn paths(p: *const *const c_char, count: usize, what: &str) -> Result<Vec<PathBuf>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if p.is_null() {
        return Err(null(what));
    }
    if !p.is_aligned() {
        return Err(Error::invalid(format!("{what} is not aligned to its pointers")));
    }
    // SAFETY: not null, aligned, and the caller's promise for each of them.
    (0..count).map(|i| Ok(unsafe { path(*p.add(i), what) }?.to_owned())).collect()
}

/// Pack many checkpoints, each against the nearest of some bases.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_pack_fleet(
    bases: *const *const c_char,
    base_count: usize,
    fine_tuned: *const *const c_char,
    packages: *const *const c_char,
    count: usize,
    how: *const XorzOptions,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let bases = paths(bases, base_count, "bases")?;
            let (fine_tuned, packages) =
                (paths(fine_tuned, count, "fine_tuned")?, paths(packages, count, "packages")?);
            let fleet: Vec<_> = fine_tuned.into_iter().zip(packages).collect();
            let done = pack_fleet(&bases, &fleet, &options(how)?, &run(job)?)?;
            give_bytes(report, done.to_json()?.into_bytes(), "report")
        })
    }
}

/// Unpack a checkpoint.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_unpack_files(
    base: *const c_char,
    package: *const c_char,
    out: *const c_char,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (base, package) = (path(base, "base")?, path(package, "package")?);
            let out = Destination::Path(path(out, "out")?);
            let done = unpack_files(base, package, out, &run(job)?)?;
            give_bytes(report, done.to_json()?.into_bytes(), "report")
        })
    }
}

/// Check a package against its base, and against the fine-tuned checkpoint if one is given.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_verify_files(
    base: *const c_char,
    package: *const c_char,
    fine_tuned: *const c_char,
    job: *const XorzRun,
    report: *mut XorzBuffer,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let fine_tuned = if fine_tuned.is_null() { None } else { Some(path(fine_tuned, "fine_tuned")?) };
            let (base, package) = (path(base, "base")?, path(package, "package")?);
            let done = verify_files(base, package, fine_tuned, &run(job)?)?;
            give_bytes(report, done.to_json()?.into_bytes(), "report")
        })
    }
}
