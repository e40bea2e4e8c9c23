//! libcuda, through cudarc, which looks it up when it is first used: this library links nothing of CUDA.
//!
//! A [`Device`] is made when an op first needs it and kept for the life of the process: the device's primary
//! context (that of the runtime API, so torch's), the kernels, loaded once, and the pinned page of status
//! words. After that a launch is `cuLaunchKernel` and no other call that could wait. Making a device may
//! wait, and would be forbidden while a stream of this thread is captured; the driver's own exchange of
//! capture modes allows it.
//!
//! cudarc panics where libcuda or a function of it is missing, so both are looked for before the first call.
//! Its enum of error codes must know every code that a driver returns: the newest version of its bindings is
//! asked for in Cargo.toml.

use super::image::{self, Image};
use super::params::{MOST, Packed};
use super::plan::{ENTRIES, Launch, THREADS};
use super::status::{self, Op};
use crate::error::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Every function of libcuda that is called below, or by cudarc.
const FUNCTIONS: [&str; 17] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuLaunchKernel",
    "cuGetErrorName",
    "cuGetErrorString",
];

/// The oldest driver that is worth asking, as it counts: CUDA 12.0.
const OLDEST_DRIVER: c_int = 12000;
/// The oldest architecture that the kernels are compiled for.
const OLDEST_CAPABILITY: (c_int, c_int) = (8, 0);

/// What the driver said, and what to do about it where that is known.
fn failed(what: &str, error: DriverError) -> Error {
    use sys::CUresult::{
        CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_LAUNCH_FAILED,
        CUDA_ERROR_NO_DEVICE, CUDA_ERROR_NOT_INITIALIZED, CUDA_ERROR_OUT_OF_MEMORY,
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
    };
    let hint = match error.0 {
        CUDA_ERROR_NO_DEVICE => "; check nvidia-smi, and that CUDA_VISIBLE_DEVICES names a device",
        CUDA_ERROR_NOT_INITIALIZED => {
            "; a process that was forked after CUDA was used cannot use it, start it anew"
        }
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => "; libcuda and the kernel's driver differ, restart the machine",
        CUDA_ERROR_OUT_OF_MEMORY => "; free memory of the device",
        CUDA_ERROR_INVALID_HANDLE => "; the stream must be one of the device's primary context",
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED => "; call it once before the capture begins",
        CUDA_ERROR_ILLEGAL_ADDRESS | CUDA_ERROR_LAUNCH_FAILED => {
            "; an earlier kernel of this process failed, start it anew"
        }
        _ => "",
    };
    let (name, says) = (text(error.error_name()), text(error.error_string()));
    Error::device(format!("{what}: {name} ({says}){hint}"))
}

/// What the driver calls an error, where it knows it.
fn text(c: std::result::Result<&CStr, DriverError>) -> String {
    c.map_or("?".into(), |c| c.to_string_lossy().into_owned())
}

fn version(v: c_int) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

/// Drivers run what compilers of their own major version made, or of an older one.
fn check_driver(driver: c_int, toolkit: Option<c_int>) -> Result<()> {
    let needed = toolkit.map_or(OLDEST_DRIVER, |t| (t / 1000 * 1000).max(OLDEST_DRIVER));
    if driver >= needed {
        return Ok(());
    }
    Err(Error::device(format!(
        "the NVIDIA driver is of CUDA {}, but these kernels need one of CUDA {} or newer; update the driver, or build xorz with \
         an older nvcc (XORZ_NVCC)",
        version(driver),
        version(needed)
    )))
}

/// The driver's version, once libcuda is there with all that is called.
fn open_libcuda() -> Result<c_int> {
    // SAFETY: loading libcuda runs its initialisers, which any CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::device(
            "no libcuda.so.1 on this machine; install NVIDIA's driver, or move the tensors to the CPU",
        ));
    }
    // SAFETY: as above; it is present, so this does not panic.
    let library = unsafe { sys::culib() };
    let missing = FUNCTIONS.iter().find(|name| {
        // SAFETY: the address is asked for and not used.
        unsafe { library.get::<*const c_void>(name.as_bytes()) }.is_err()
    });
    if let Some(name) = missing {
        return Err(Error::device(format!(
            "libcuda has no {name}; update NVIDIA's driver to one of CUDA 12.0 or newer"
        )));
    }
    result::init().map_err(|e| failed("CUDA cannot be used", e))?;
    let mut driver = 0;
    // SAFETY: an out parameter.
    unsafe { sys::cuDriverGetVersion(&mut driver) }
        .result()
        .map_err(|e| failed("the driver's version", e))?;
    check_driver(driver, None)?;
    Ok(driver)
}

/// Whether functions can be loaded before their first launch, which may be inside of a capture, where the driver's lazy
/// loading must not wait: drivers of CUDA 12.4 and newer.
fn has_func_load() -> bool {
    // SAFETY: libcuda is there, or no device would be made; the address is asked for and not used.
    unsafe { sys::culib().get::<*const c_void>(b"cuFuncLoad") }.is_ok()
}

fn libcuda() -> Result<c_int> {
    static DRIVER: OnceLock<Result<c_int>> = OnceLock::new();
    DRIVER.get_or_init(open_libcuda).clone()
}

/// Allows this thread what a capture forbids, until dropped.
struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    fn enter() -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges a value with the thread's own.
        let done = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
        done.result().map_err(|e| failed("the thread's capture mode", e))?;
        Ok(Self(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as in `enter`. A failure would have shown there.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

/// Makes a context the thread's current one, until dropped.
struct Current {
    before: Option<sys::CUcontext>,
    changed: bool,
}

impl Current {
    fn enter(context: sys::CUcontext) -> Result<Self> {
        let before = result::ctx::get_current().map_err(|e| failed("the current context", e))?;
        let changed = before != Some(context);
        if changed {
            // SAFETY: a primary context that is never released.
            unsafe { result::ctx::set_current(context) }.map_err(|e| failed("the device's context", e))?;
        }
        Ok(Self { before, changed })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.changed {
            // SAFETY: what was current before; null is none. A failure leaves ours, which every call tests
            // for.
            let _ = unsafe { result::ctx::set_current(self.before.unwrap_or(ptr::null_mut())) };
        }
    }
}

/// A page of pinned memory with one word per op.
struct StatusWords {
    host: &'static [AtomicU32; Op::ALL.len()],
    /// Where the device sees it.
    device: u64,
}

impl StatusWords {
    /// In the current context.
    fn new() -> Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: an allocation, never freed.
        let host = unsafe { result::malloc_host(size_of::<[AtomicU32; Op::ALL.len()]>(), flags) }
            .map_err(|e| failed("pinned memory for status words", e))?;
        let mut device = 0;
        // SAFETY: `host` is mapped memory of the current context.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut device, host, 0) }
            .result()
            .map_err(|e| failed("mapping of the status words", e))?;
        // SAFETY: page-aligned memory of that size, which nobody else has; zeros before anyone reads them.
        let host = unsafe {
            host.write_bytes(0, size_of::<[AtomicU32; Op::ALL.len()]>());
            &*host.cast()
        };
        Ok(Self { host, device })
    }
}

/// A device with the kernels on it.
pub(super) struct Device {
    ordinal: c_int,
    context: sys::CUcontext,
    /// The kernels, in the order of `ENTRIES`.
    functions: Vec<sys::CUfunction>,
    status: StatusWords,
    multiprocessors: u32,
}

// SAFETY: the driver takes its handles from any thread, and they are never destroyed; status words are
// atomics.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

fn attribute(device: sys::CUdevice, of: sys::CUdevice_attribute) -> Result<c_int> {
    // SAFETY: a device that `cuDeviceGet` gave.
    unsafe { result::device::get_attribute(device, of) }.map_err(|e| failed("the device's attributes", e))
}

/// The device's number at the driver, if its architecture will do.
fn find(ordinal: c_int) -> Result<sys::CUdevice> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    let count = result::device::get_count().map_err(|e| failed("the number of devices", e))?;
    if !(0..count).contains(&ordinal) {
        return Err(Error::device(format!("there is no cuda:{ordinal}; the driver sees {count} devices")));
    }
    let device = result::device::get(ordinal).map_err(|e| failed(&format!("cuda:{ordinal}"), e))?;
    let major = attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if (major, minor) < OLDEST_CAPABILITY {
        let name = result::device::get_name(device).unwrap_or_default();
        return Err(Error::device(format!(
            "cuda:{ordinal} ({name}) is of compute capability {major}.{minor}, but the kernels need {}.{} or newer (A100, \
             RTX 30); move the tensors to the CPU",
            OLDEST_CAPABILITY.0, OLDEST_CAPABILITY.1
        )));
    }
    Ok(device)
}

/// The kernels in the current context.
fn load(ordinal: c_int, driver: c_int, image: &Image) -> Result<Vec<sys::CUfunction>> {
    use sys::CUresult::{
        CUDA_ERROR_INVALID_IMAGE, CUDA_ERROR_INVALID_PTX, CUDA_ERROR_NO_BINARY_FOR_GPU,
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
    };
    // SAFETY: a whole image, whose beginning was checked, or which this library was built with.
    let module = unsafe { result::module::load_data(image.words.as_ptr().cast()) }.map_err(|e| {
        let plain = failed(&format!("loading the kernels on cuda:{ordinal}"), e);
        let refused = [
            CUDA_ERROR_NO_BINARY_FOR_GPU,
            CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
            CUDA_ERROR_INVALID_PTX,
            CUDA_ERROR_INVALID_IMAGE,
        ];
        if !refused.contains(&e.0) {
            return plain;
        }
        let made = image.toolkit.map_or(String::new(), |t| format!(", the kernels are of {}", version(t)));
        Error::device(format!(
            "{}; they hold no code for this device that this driver can load (the driver is of CUDA {}{made}): update the \
             driver, or build xorz with an nvcc that is no newer and knows the device (XORZ_NVCC)",
            plain.message(),
            version(driver)
        ))
    })?;
    let function = |name: &&str| {
        let name = CString::new(*name).map_err(|e| Error::internal(e.to_string()))?;
        let text = format!("the kernels have no {}", name.to_string_lossy());
        // SAFETY: a module that was just loaded and is never unloaded.
        let function = unsafe { result::module::get_function(module, name) }.map_err(|e| failed(&text, e))?;
        if has_func_load() {
            // SAFETY: a function of that module; libcuda has `cuFuncLoad`.
            unsafe { sys::cuFuncLoad(function) }.result().map_err(|e| failed(&text, e))?;
        }
        Ok(function)
    };
    ENTRIES.iter().map(function).collect()
}

/// Those that were made ready, for the life of the process.
static DEVICES: Mutex<Vec<&'static Device>> = Mutex::new(Vec::new());

impl Device {
    fn open(ordinal: c_int) -> Result<Self> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let driver = libcuda()?;
        let device = find(ordinal)?;
        let image = image::image()?;
        check_driver(driver, image.toolkit)?;
        let _relaxed = Relaxed::enter()?;
        // SAFETY: a device that `cuDeviceGet` gave. Never released.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(|e| failed(&format!("the primary context of cuda:{ordinal}"), e))?;
        let _current = Current::enter(context)?;
        let functions = load(ordinal, driver, &image)?;
        let multiprocessors = attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        Ok(Self { ordinal, context, functions, status: StatusWords::new()?, multiprocessors })
    }

    /// Device `ordinal`, made ready where it is asked for the first time.
    ///
    /// # Errors
    /// `Device`, with what to do: no libcuda, no such device, too old a driver or device, no kernels. Asked
    /// anew next time.
    pub(super) fn get(ordinal: c_int) -> Result<&'static Self> {
        // Held while a device is made: another thread that wants it waits, and loads nothing.
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.iter().find(|d| d.ordinal == ordinal) {
            return Ok(device);
        }
        let device: &'static Self = Box::leak(Box::new(Self::open(ordinal)?));
        devices.push(device);
        Ok(device)
    }

    /// Device `ordinal` if it was made ready before; nothing is asked of the driver.
    pub(super) fn made(ordinal: c_int) -> Option<&'static Self> {
        DEVICES.lock().unwrap_or_else(PoisonError::into_inner).iter().find(|d| d.ordinal == ordinal).copied()
    }

    /// Its multiprocessors.
    pub(super) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Where kernels report for `op`, an address of the device.
    pub(super) fn status(&self, op: Op) -> u64 {
        self.status.device + 4 * op as u64
    }

    /// What kernels have reported since the last call: one report, which is then forgotten.
    ///
    /// # Errors
    /// The report.
    pub(super) fn raise(&self) -> Result<()> {
        for op in Op::ALL {
            let word = &self.status.host[op as usize];
            if word.load(Ordering::Relaxed) != 0 {
                let reported = word.swap(0, Ordering::Relaxed);
                return Err(status::error(op, self.ordinal, reported));
            }
        }
        Ok(())
    }

    /// Put a kernel on `stream` (a `CUstream`; 0 the default stream).
    ///
    /// # Safety
    /// `params` are those of the kernel, and the memory that they name stays valid until the kernel has
    /// ended.
    ///
    /// # Errors
    /// What the driver said.
    pub(super) unsafe fn launch(&self, launch: Launch, stream: u64, mut params: Packed) -> Result<()> {
        let _current = Current::enter(self.context)?;
        let mut at = [ptr::null_mut::<c_void>(); MOST];
        let words = params.words_mut();
        let count = words.len();
        for (at, word) in at.iter_mut().zip(words) {
            *at = ptr::from_mut(word).cast();
        }
        let ((x, y), stream) = (launch.grid, stream as usize as sys::CUstream);
        let function = self.functions[launch.entry.index()];
        // SAFETY: the driver reads each parameter from a word of its own before this returns; the rest is the
        // caller's.
        unsafe { result::launch_kernel(function, (x, y, 1), (THREADS, 1, 1), 0, stream, &mut at[..count]) }
            .map_err(|e| failed(&format!("launching {} on cuda:{}", launch.entry.name(), self.ordinal), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_of_an_older_major_version_than_the_compiler_is_refused() {
        for (driver, toolkit, ok) in [
            (11080, None, false),
            (12000, None, true),
            (12090, Some(13020), false),
            (13000, Some(13020), true),
            (13000, Some(12080), true),
            (12040, Some(12080), true),
        ] {
            let said = check_driver(driver, toolkit);
            assert_eq!(said.is_ok(), ok, "{driver} {toolkit:?}");
            if let Err(e) = said {
                assert!(e.message().contains(&version(driver)) && e.message().contains("update"), "{e}");
            }
        }
    }
}
