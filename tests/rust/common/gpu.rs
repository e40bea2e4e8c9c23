//! A GPU that a test has: the double of libcuda.so.1 (`tests/cuda_host/driver.cpp`), in a process a test, its
//! memory and streams, and the ops on them. Must hold no expectation but that the double is there.

use super::alone::test_name;
use super::data::Rng;
use super::device;
use super::kernels::{Fleet, tuned};
use super::linear::{Case, integers};
use super::lookups::Tables;
use cudarc::driver::{result, sys};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::process::{Command, Output};
use xorz::codec::Encoding;
use xorz::cuda::{self, BatchRows, DeviceDelta, DeviceMatrix, Embedding, Linear, Place};
use xorz::error::{Error, Kind, Result};
use xorz::matrix::{Digest, Dtype, Shape};

/// Run the ignored test `child` in a process of its own, on a machine as the double is told.
pub fn run<F: Fn()>(_child: F, machine: &str, change: impl Fn(&mut Command)) -> Output {
    let (folder, image) = device::double();
    let mut libraries = vec![folder];
    libraries.extend(std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &test_name::<F>(), "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap())
        .env("XORZ_DOUBLE", machine)
        .env("XORZ_CUDA_IMAGE", image);
    change(&mut command);
    command.output().unwrap()
}

pub fn passes_as<F: Fn()>(child: F, machine: &str, change: impl Fn(&mut Command)) {
    let out = run(child, machine, change);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success() && text.contains("1 passed"),
        "{} on {machine:?}: {}\n{text}",
        test_name::<F>(),
        out.status
    );
}

pub fn passes(child: impl Fn(), machine: &str) {
    passes_as(child, machine, |_| ());
}

/// The delta of `case`, which lies at `address`.
pub fn delta_of(address: u64, case: &Case) -> DeviceDelta {
    DeviceDelta { address, bytes: case.blob.len() }
}

/// A function of the double that is none of libcuda's.
fn of_double<F: Copy>(name: &CStr) -> F {
    // SAFETY: the double is loaded, or this ends the test; `F` is the function's type, as each caller here
    // says.
    unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        let at = libc::dlsym(library, name.as_ptr());
        assert!(!library.is_null() && !at.is_null(), "this libcuda is no double");
        std::mem::transmute_copy(&at)
    }
}

pub fn order_on(order: &str, stream: u64) {
    let double: extern "C" fn(*const c_char, *mut c_void) -> c_int = of_double(c"xorz_double");
    let order = CString::new(order).unwrap();
    assert_eq!(double(order.as_ptr(), stream as *mut c_void), 0, "{order:?}");
}

pub fn order(order: &str) {
    order_on(order, 0);
}

/// The calls so far.
pub fn log() -> Vec<String> {
    let double: extern "C" fn() -> *const c_char = of_double(c"xorz_double_log");
    // SAFETY: a string that lives until the next call of the driver.
    unsafe { CStr::from_ptr(double()) }.to_str().unwrap().lines().map(str::to_owned).collect()
}

pub fn calls(of: &str) -> usize {
    log().iter().filter(|l| l.split(' ').next() == Some(of)).count()
}

/// A device as a caller has it before any op: its primary context, current; memory; a stream.
pub struct Gpu {
    pub device: i32,
    pub context: sys::CUcontext,
    pub stream: u64,
}

impl Gpu {
    pub fn new(device: i32) -> Self {
        // SAFETY: plain calls of the driver, in order.
        unsafe {
            result::init().unwrap();
            let context = result::primary_ctx::retain(result::device::get(device).unwrap()).unwrap();
            result::ctx::set_current(context).unwrap();
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
            Self { device, context, stream: stream as u64 }
        }
    }

    pub fn place(&self) -> Place {
        Place { device: self.device, stream: self.stream }
    }

    pub fn enter(&self) {
        // SAFETY: a context that is never released.
        unsafe { result::ctx::set_current(self.context) }.unwrap();
    }

    /// Bytes in device memory. Never freed.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        self.enter();
        // SAFETY: an allocation of that size.
        unsafe {
            let at = result::malloc_sync(bytes.len().max(1)).unwrap();
            result::memcpy_htod_sync(at, bytes).unwrap();
            at
        }
    }

    pub fn get(&self, at: u64, bytes: usize) -> Vec<u8> {
        self.enter();
        let mut out = vec![0u8; bytes];
        // SAFETY: the double compares with its allocations.
        unsafe { result::memcpy_dtoh_sync(&mut out, at) }.unwrap();
        out
    }

    pub fn words(&self, case: &Case) -> DeviceMatrix {
        DeviceMatrix { dtype: case.dtype, bits: false, shape: case.shape, address: self.put(&case.base) }
    }

    pub fn restore(&self, case: &Case, blob: &[u8]) -> Result<Vec<u8>> {
        let (base, delta) = (self.words(case), self.put(blob));
        let out = self.put(&vec![0x5A; case.base.len()]);
        // SAFETY: allocations of those sizes, none freed.
        unsafe {
            let delta = DeviceDelta { address: delta, bytes: blob.len() };
            cuda::delta_restore(self.place(), base, 0..case.shape.n, out, delta)
        }?;
        Ok(self.get(out, case.base.len()))
    }

    pub fn apply(&self, case: &Case, blob: &[u8]) -> Result<Vec<u8>> {
        let (weight, delta) = (self.words(case), self.put(blob));
        // SAFETY: as above.
        unsafe { cuda::delta_apply(self.place(), weight, delta, blob.len(), self.between(weight)) }?;
        Ok(self.get(weight.address, case.base.len()))
    }

    /// The digest of words in its memory.
    pub fn digest(&self, words: DeviceMatrix) -> Result<Digest> {
        let workspace = self.put(&vec![0xA5; cuda::digest_workspace_bytes(words)?]);
        let out = self.put(&[0x5A; 16]);
        // SAFETY: allocations of those sizes, none freed.
        unsafe { cuda::delta_digest(self.place(), words, workspace, out) }?;
        Ok(Digest(self.get(out, 16).try_into().unwrap()))
    }

    /// What an apply works in.
    pub fn between(&self, weight: DeviceMatrix) -> u64 {
        self.put(&vec![0xA5; cuda::apply_workspace_bytes(weight).unwrap()])
    }

    /// One tenant's rows.
    pub fn linear(&self, case: &Case, x: &[u8], m: usize, bias: Option<&[u8]>) -> Result<Vec<u8>> {
        self.product(&Linear {
            biases: bias.map_or(0, |b| self.put(b)),
            ..self.one_tenant(case, x, m, &case.blob)
        })
    }

    /// Of the delta that `blob` is.
    pub fn one_tenant(&self, case: &Case, x: &[u8], m: usize, blob: &[u8]) -> Linear {
        Linear {
            x: self.put(x),
            m,
            weight: self.words(case),
            biases: 0,
            bias_stride: 0,
            arena: self.put(blob),
            arena_bytes: blob.len(),
            rows: None,
            deterministic: false,
        }
    }

    /// Many tenants' rows. Biases are further apart than they are long.
    pub fn grouped_args(&self, fleet: &Fleet, x: &[u8], map: &[i32]) -> Linear {
        let row = fleet.shape.n * fleet.dtype.word_bytes();
        let apart: Vec<u8> = fleet.biases.chunks(row.max(1)).flat_map(|b| [b, &[0xFF; 8]].concat()).collect();
        let slots: Vec<u8> = fleet.slots.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        let map: Vec<u8> = map.iter().flat_map(|v| v.to_le_bytes()).collect();
        Linear {
            x: self.put(x),
            m: map.len() / 4,
            weight: self.words(&fleet.cases[0]),
            biases: self.put(&apart),
            bias_stride: fleet.shape.n + 8 / fleet.dtype.word_bytes(),
            arena: self.put(&fleet.arena),
            arena_bytes: fleet.arena.len(),
            rows: Some(BatchRows {
                slots: self.put(&slots),
                slot_count: fleet.slots.len(),
                tenant_of_row: self.put(&map),
            }),
            deterministic: false,
        }
    }

    pub fn lookup_args(&self, tables: &Tables, indices: &[i64], map: &[i32]) -> Embedding {
        let le = |words: &[i64]| words.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let weight = DeviceMatrix {
            dtype: tables.dtype,
            bits: false,
            shape: tables.shape,
            address: self.put(&tables.base),
        };
        Embedding {
            indices: self.put(&le(indices)),
            m: indices.len(),
            weight,
            arena: self.put(&tables.arena),
            arena_bytes: tables.arena.len(),
            rows: BatchRows {
                slots: self.put(&le(tables.slots.as_flattened())),
                slot_count: tables.slots.len(),
                tenant_of_row: self.put(&map.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()),
            },
        }
    }

    pub fn look_up(&self, args: &Embedding) -> Result<Vec<u8>> {
        let bytes = args.m * args.weight.shape.k * args.weight.dtype.word_bytes();
        let out = self.put(&vec![0x5A; bytes]);
        // SAFETY: allocations of those sizes, none freed.
        unsafe { cuda::delta_embedding(self.place(), args, out) }?;
        Ok(self.get(out, bytes))
    }

    /// The gradient of a product's input: `args.x` is that of its output.
    pub fn grad(&self, args: &Linear) -> Result<Vec<u8>> {
        let bytes = args.m * args.weight.shape.k * args.weight.dtype.word_bytes();
        let (out, workspace) =
            (self.put(&vec![0x5A; bytes]), self.put(&vec![0xA5; args.grad_workspace_bytes()?]));
        // SAFETY: allocations of those sizes, none freed.
        unsafe { cuda::delta_linear_grad_input(self.place(), args, workspace, out) }?;
        Ok(self.get(out, bytes))
    }

    pub fn product(&self, args: &Linear) -> Result<Vec<u8>> {
        let bytes = args.m * args.weight.shape.n * args.weight.dtype.word_bytes();
        let out = self.put(&vec![0x5A; bytes]);
        let workspace = match args.workspace_bytes()? {
            0 => 0,
            bytes => self.put(&vec![0xA5; bytes]),
        };
        // SAFETY: allocations of those sizes, none freed.
        unsafe { cuda::delta_linear(self.place(), args, workspace, out) }?;
        Ok(self.get(out, bytes))
    }
}

pub fn case(rng: &mut Rng, dtype: Dtype, shape: Shape, encoding: Encoding) -> Case {
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = tuned(rng, dtype, &base, 0.1);
    Case::new(dtype, shape, encoding, &base, &fine_tuned)
}

pub fn exact_case(rng: &mut Rng, dtype: Dtype, shape: Shape, encoding: Encoding) -> Case {
    let base = integers(rng, dtype, shape.n * shape.k, 8);
    let other = integers(rng, dtype, shape.n * shape.k, 8);
    let fine_tuned = rng.mix(dtype, &base, &other, 0.2);
    Case::new(dtype, shape, encoding, &base, &fine_tuned)
}

/// An error of that kind, with those words.
pub fn said<T: std::fmt::Debug>(r: Result<T>, kind: Kind, words: &[&str]) {
    let e: Error = r.expect_err(&format!("no error: {words:?}"));
    assert!(e.kind() == kind && words.iter().all(|w| e.message().contains(w)), "{:?}: {e}", e.kind());
}
