//! Promise: every launch that `src/cuda` makes arrives at the driver as the kernel takes it, on the caller's stream and device,
//! with nothing that waits; and whatever is missing is said in words. Against a double of libcuda.so.1 that runs the kernels'
//! own source (`tests/cuda_host/driver.cpp`), in a process a test, since a process has one libcuda.

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/kernels.rs"]
mod kernels;
#[path = "common/linear.rs"]
mod linear;

use common::Rng;
use cudarc::driver::{result, sys};
use kernels::{Fleet, TENANTS, maps, tuned};
use linear::{Case, DTYPES, ENCODINGS, first_difference, integers};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::process::{Command, Output};
use xorz::codec::Encoding;
use xorz::cuda::{self, Linear, Place, Rows, Words};
use xorz::error::{Error, Kind, Result};
use xorz::matrix::{Dtype, Shape};

/// Run the ignored test `name` in a process of its own, on a machine as the double is told.
fn run(name: &str, machine: &str, change: impl Fn(&mut Command)) -> Output {
    let (folder, image) = device::double();
    let mut libraries = vec![folder];
    libraries.extend(std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap())
        .env("XORZ_DOUBLE", machine)
        .env("XORZ_CUDA_IMAGE", image);
    change(&mut command);
    command.output().unwrap()
}

fn passes_as(name: &str, machine: &str, change: impl Fn(&mut Command)) {
    let out = run(name, machine, change);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success() && text.contains("1 passed"),
        "{name} on {machine:?}: {}\n{text}",
        out.status
    );
}

fn passes(name: &str, machine: &str) {
    passes_as(name, machine, |_| ());
}

/// A function of the double that is none of libcuda's.
fn of_double<F: Copy>(name: &CStr) -> F {
    // SAFETY: the double is loaded, or this ends the test; `F` is the function's type, as each caller here says.
    unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        let at = libc::dlsym(library, name.as_ptr());
        assert!(!library.is_null() && !at.is_null(), "this libcuda is no double");
        std::mem::transmute_copy(&at)
    }
}

fn order_on(order: &str, stream: u64) {
    let double: extern "C" fn(*const c_char, *mut c_void) -> c_int = of_double(c"xorz_double");
    let order = CString::new(order).unwrap();
    assert_eq!(double(order.as_ptr(), stream as *mut c_void), 0, "{order:?}");
}

fn order(order: &str) {
    order_on(order, 0);
}

/// The calls so far.
fn log() -> Vec<String> {
    let double: extern "C" fn() -> *const c_char = of_double(c"xorz_double_log");
    // SAFETY: a string that lives until the next call of the driver.
    unsafe { CStr::from_ptr(double()) }.to_str().unwrap().lines().map(str::to_owned).collect()
}

fn calls(of: &str) -> usize {
    log().iter().filter(|l| l.split(' ').next() == Some(of)).count()
}

/// A device as a caller has it before any op: its primary context, current; memory; a stream.
struct Gpu {
    device: i32,
    context: sys::CUcontext,
    stream: u64,
}

impl Gpu {
    fn new(device: i32) -> Self {
        // SAFETY: plain calls of the driver, in order.
        unsafe {
            result::init().unwrap();
            let context = result::primary_ctx::retain(result::device::get(device).unwrap()).unwrap();
            result::ctx::set_current(context).unwrap();
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
            Self { device, context, stream: stream as u64 }
        }
    }

    fn place(&self) -> Place {
        Place { device: self.device, stream: self.stream }
    }

    fn enter(&self) {
        // SAFETY: a context that is never released.
        unsafe { result::ctx::set_current(self.context) }.unwrap();
    }

    /// Bytes in device memory. Never freed.
    fn put(&self, bytes: &[u8]) -> u64 {
        self.enter();
        // SAFETY: an allocation of that size.
        unsafe {
            let at = result::malloc_sync(bytes.len().max(1)).unwrap();
            result::memcpy_htod_sync(at, bytes).unwrap();
            at
        }
    }

    fn get(&self, at: u64, bytes: usize) -> Vec<u8> {
        self.enter();
        let mut out = vec![0u8; bytes];
        // SAFETY: the double compares with its allocations.
        unsafe { result::memcpy_dtoh_sync(&mut out, at) }.unwrap();
        out
    }

    fn words(&self, case: &Case) -> Words {
        Words { dtype: case.dtype, bits: false, shape: case.shape, address: self.put(&case.base) }
    }

    fn restore(&self, case: &Case, blob: &[u8]) -> Result<Vec<u8>> {
        let (base, delta) = (self.words(case), self.put(blob));
        let out = self.put(&vec![0x5A; case.base.len()]);
        // SAFETY: allocations of those sizes, none freed.
        unsafe { cuda::delta_restore(self.place(), base, out, delta, blob.len()) }?;
        Ok(self.get(out, case.base.len()))
    }

    fn apply(&self, case: &Case, blob: &[u8]) -> Result<Vec<u8>> {
        let (weight, delta) = (self.words(case), self.put(blob));
        // SAFETY: as above.
        unsafe { cuda::delta_apply(self.place(), weight, delta, blob.len()) }?;
        Ok(self.get(weight.address, case.base.len()))
    }

    /// One tenant's rows.
    fn linear(&self, case: &Case, x: &[u8], m: usize, bias: Option<&[u8]>) -> Result<Vec<u8>> {
        let args = Linear {
            x: self.put(x),
            m,
            weight: self.words(case),
            biases: bias.map_or(0, |b| self.put(b)),
            bias_stride: 0,
            arena: self.put(&case.blob),
            arena_bytes: case.blob.len(),
            rows: None,
            deterministic: false,
        };
        self.product(&args)
    }

    /// Many tenants' rows. Biases are further apart than they are long.
    fn grouped_args(&self, fleet: &Fleet, x: &[u8], map: &[i32]) -> Linear {
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
            rows: Some(Rows {
                slots: self.put(&slots),
                slot_count: fleet.slots.len(),
                tenant_of_row: self.put(&map),
            }),
            deterministic: false,
        }
    }

    fn product(&self, args: &Linear) -> Result<Vec<u8>> {
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

fn case(rng: &mut Rng, dtype: Dtype, shape: Shape, encoding: Encoding) -> Case {
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = tuned(rng, dtype, &base, 0.1);
    Case::new(dtype, shape, encoding, &base, &fine_tuned)
}

fn exact_case(rng: &mut Rng, dtype: Dtype, shape: Shape, encoding: Encoding) -> Case {
    let base = integers(rng, dtype, shape.n * shape.k, 8);
    let other = integers(rng, dtype, shape.n * shape.k, 8);
    let fine_tuned = rng.mix(dtype, &base, &other, 0.2);
    Case::new(dtype, shape, encoding, &base, &fine_tuned)
}

#[test]
fn every_launch_gives_what_the_oracle_gives() {
    passes("child_launches", "devices=2");
}

#[test]
#[ignore = "a child of every_launch_gives_what_the_oracle_gives"]
fn child_launches() {
    let (gpu, mut rng) = (Gpu::new(0), Rng::new(101));
    for dtype in Dtype::ALL {
        for (n, k) in [(37, 300), (3, 0), (1, 4099)] {
            for encoding in ENCODINGS {
                let case = case(&mut rng, dtype, Shape { n, k }, encoding);
                assert!(
                    gpu.restore(&case, &case.blob).unwrap() == case.fine_tuned,
                    "restore {}",
                    case.name()
                );
                assert!(gpu.apply(&case, &case.blob).unwrap() == case.fine_tuned, "apply {}", case.name());
            }
        }
    }
    for dtype in DTYPES {
        let shape = Shape { n: 35, k: 290 };
        let few = ENCODINGS.into_iter().zip([1, 4, 5, 17]);
        for (encoding, m) in few.chain(ENCODINGS.into_iter().zip([140, 33, 65, 40])) {
            let case = exact_case(&mut rng, dtype, shape, encoding);
            let (x, bias) =
                (integers(&mut rng, dtype, m * shape.k, 3), integers(&mut rng, dtype, shape.n, 9));
            for bias in [None, Some(&bias[..])] {
                let got = gpu.linear(&case, &x, m, bias).unwrap();
                let difference = first_difference(dtype, &got, &case.reference(&x, m, bias));
                assert_eq!(difference, None, "{} m {m}", case.name());
            }
        }
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
        for m in [3, 19, 150] {
            let x = integers(&mut rng, dtype, m * shape.k, 3);
            for map in maps(&mut rng, m) {
                let args = gpu.grouped_args(&fleet, &x, &map);
                let got = gpu.product(&Linear { deterministic: rng.next() % 4 == 0, ..args }).unwrap();
                let difference = first_difference(dtype, &got, &fleet.reference(&x, &map));
                assert_eq!(difference, None, "{dtype} {map:?}");
            }
        }
    }
    assert_eq!((calls("cuModuleLoadData"), calls("cuMemHostAlloc")), (1, 1));
    let kernels = plan_names().map(|name| (name, log().iter().any(|l| l.contains(&format!(" {name} grid")))));
    assert!(kernels.iter().all(|k| k.1), "not all were launched: {kernels:?}");
}

fn plan_names() -> [&'static str; xorz::cuda::plan::ENTRIES.len()] {
    xorz::cuda::plan::ENTRIES
}

#[test]
fn a_call_is_one_launch_on_the_callers_stream_and_device_and_nothing_else() {
    passes("child_streams", "devices=2");
}

#[test]
#[ignore = "a child of a_call_is_one_launch_on_the_callers_stream_and_device_and_nothing_else"]
fn child_streams() {
    let mut rng = Rng::new(102);
    let (first, second) = (Gpu::new(0), Gpu::new(1));
    let case = case(&mut rng, Dtype::BF16, Shape { n: 33, k: 5000 }, Encoding::Sparse);
    for gpu in [&first, &second, &first] {
        assert!(gpu.restore(&case, &case.blob).unwrap() == case.fine_tuned);
    }
    // Each device has its own: loaded when it is first used.
    assert_eq!((calls("cuModuleLoadData"), calls("cuMemHostAlloc")), (2, 2));
    let (base, delta) = (second.words(&case), second.put(&case.blob));
    let out = second.put(&case.base);
    for current in [&first, &second] {
        for stream in [0, second.stream] {
            current.enter();
            let before = log().len();
            let place = Place { device: 1, stream };
            // SAFETY: allocations of those sizes, none freed.
            unsafe { cuda::delta_restore(place, base, out, delta, case.blob.len()) }.unwrap();
            let log = log().split_off(before);
            // The context is changed and changed back where another is current, and only there.
            let others = log.iter().filter(|l| !l.starts_with("cuLaunchKernel"));
            let switches = if current.device == 0 { 2 } else { 0 };
            assert_eq!(others.collect::<Vec<_>>(), vec!["cuCtxSetCurrent"; switches], "{log:?}");
            let launch: Vec<_> = log.iter().filter(|l| l.starts_with("cuLaunchKernel")).collect();
            let stream = if stream == 0 { "0".into() } else { format!("{stream:#x}") };
            let wanted = format!(
                "cuLaunchKernel xorz_delta_restore_16 grid 6 1 1 block 256 1 1 shared 0 stream {stream} device 1 params {} {out} {delta} \
                 {} 33 5000 2 ",
                base.address,
                case.blob.len()
            );
            assert!(launch.len() == 1 && launch[0].starts_with(&wanted), "{launch:?} {wanted}");
            assert_eq!(result::ctx::get_current().unwrap(), Some(current.context));
        }
    }
    // Where no context is current, none is left.
    // SAFETY: none is always right.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    // SAFETY: as above.
    unsafe { cuda::delta_restore(second.place(), base, out, delta, case.blob.len()) }.unwrap();
    assert_eq!(result::ctx::get_current().unwrap(), None);
}

#[test]
fn arguments_of_products_arrive_in_order_and_rows_beyond_the_grid_in_further_launches() {
    passes("child_arguments", "");
}

#[test]
#[ignore = "a child of arguments_of_products_arrive_in_order_and_rows_beyond_the_grid_in_further_launches"]
fn child_arguments() {
    let gpu = Gpu::new(0);
    order("dry");
    let weight = Words { dtype: Dtype::F32, bits: false, shape: Shape { n: 100, k: 7 }, address: 0x2000 };
    let rows = Rows { slots: 0x5000, slot_count: 9, tenant_of_row: 0x6000 };
    // So many tenants that tiles of one would be empty.
    let crowd = Rows { slot_count: 1 << 20, ..rows };
    let mut args = Linear {
        x: 0x1000,
        m: 16 * 65535 + 5,
        weight,
        biases: 0x3000,
        bias_stride: 104,
        arena: 0x4000,
        arena_bytes: 77,
        rows: Some(crowd),
        deterministic: false,
    };
    let launches = |args: &Linear| {
        let before = log().len();
        // SAFETY: the double runs nothing.
        unsafe { cuda::delta_linear(gpu.place(), args, 0, 0x7000) }.unwrap();
        let lines = log().split_off(before);
        let numbers = |line: String| {
            let words = line.split(' ').filter_map(|w| w.parse::<u64>().ok()).collect::<Vec<_>>();
            (words[0], words[1], words[words.len() - 14..].to_vec())
        };
        lines
            .into_iter()
            .filter(|l| l.starts_with("cuLaunchKernel xorz_linear_small_f32_m16"))
            .map(numbers)
            .collect::<Vec<_>>()
    };
    let two = launches(&args);
    let status = two[0].2[13];
    let first = 16 * 65535;
    let head =
        vec![0x1000, 0x2000, 0x3000, 104, 0x4000, 77, 0x5000, 1 << 20, 0x6000, 0x7000, first, 100, 7, status];
    let tail = vec![
        0x1000 + first * 28,
        0x2000,
        0x3000,
        104,
        0x4000,
        77,
        0x5000,
        1 << 20,
        0x6000 + first * 4,
        0x7000 + first * 400,
        5,
        100,
        7,
        status,
    ];
    assert_eq!(two, [(7, 65535, head), (7, 1, tail)]);
    // One delta: no slots, no map.
    args.m = 17;
    args.rows = None;
    let one = launches(&args);
    assert_eq!((one.len(), &one[0].2[6..9]), (1, &[0, 0, 0][..]), "{one:?}");
    assert_ne!(one[0].2[13], status, "delta_linear reports in delta_linear_grouped's word");
    // No slots are not the same as no map: rows name tenants still.
    args.rows = Some(Rows { slots: 0, slot_count: 0, tenant_of_row: 0x6000 });
    let none = launches(&args);
    assert!(none.len() == 1 && none[0].2[6] != 0 && none[0].2[7..9] == [0, 0x6000], "{none:?}");
    // Many rows of few tenants: two launches, which take the same and the workspace.
    let mut many = Linear { m: 1000, rows: Some(rows), ..args };
    many.weight.shape.n = 10_000;
    assert_eq!(many.workspace_bytes(), Ok(64 + 144 * 11 + 16 * (1000 / 64) + 4 * 11 + 4 * 1000));
    let before = log().len();
    // SAFETY: the double runs nothing.
    unsafe { cuda::delta_linear(gpu.place(), &many, 0x8000, 0x7000) }.unwrap();
    let lines = log().split_off(before);
    let params = format!(" 4096 8192 12288 104 16384 77 20480 9 24576 28672 1000 10000 7 {status} 32768");
    // The double has 4 multiprocessors.
    for (line, (kernel, blocks)) in lines.iter().zip([("segments", 1), ("large", 8)]) {
        let head =
            format!("cuLaunchKernel xorz_linear_{kernel}_f32 grid {blocks} 1 1 block 256 1 1 shared 0 ");
        assert!(line.starts_with(&head) && line.ends_with(&params), "{line} {params}");
    }
    assert_eq!(lines.len(), 2);
    for workspace in [0, 0x8008] {
        // SAFETY: as above.
        let r = unsafe { cuda::delta_linear(gpu.place(), &many, workspace, 0x7000) };
        said(r, Kind::InvalidArgument, &["workspace"]);
    }
    for nothing in
        [Linear { m: 0, ..args }, Linear { weight: Words { shape: Shape { n: 0, k: 7 }, ..weight }, ..args }]
    {
        assert_eq!(launches(&nothing), []);
    }
}

#[test]
fn deterministic_rows_have_the_same_bits_in_any_company() {
    passes("child_deterministic", "");
}

#[test]
#[ignore = "a child of deterministic_rows_have_the_same_bits_in_any_company"]
fn child_deterministic() {
    let (gpu, mut rng) = (Gpu::new(0), Rng::new(108));
    let shape = Shape { n: 35, k: 290 };
    for dtype in DTYPES {
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
        let (m, x) = (70, rng.weights(dtype, 70 * shape.k));
        let map: Vec<i32> = (0..m).map(|i| TENANTS[i * 7 % TENANTS.len()]).collect();
        let (row_in, row_out) = (shape.k * dtype.word_bytes(), shape.n * dtype.word_bytes());
        let product = |rows: std::ops::Range<usize>| {
            let args = gpu.grouped_args(&fleet, &x[rows.start * row_in..rows.end * row_in], &map[rows]);
            gpu.product(&Linear { deterministic: true, ..args }).unwrap()
        };
        let all = product(0..m);
        for rows in [0..1, 3..4, 10..27, 65..70] {
            let part = &all[rows.start * row_out..rows.end * row_out];
            assert!(product(rows.clone()) == part, "{dtype} {rows:?}");
        }
    }
    assert!(!log().iter().any(|l| l.starts_with("cuLaunchKernel xorz_linear_small")));
}

#[test]
fn what_kernels_report_is_an_error_of_the_next_call_on_that_device() {
    passes("child_reports", "devices=2");
}

fn said<T: std::fmt::Debug>(r: Result<T>, kind: Kind, words: &[&str]) {
    let e: Error = r.expect_err(&format!("no error: {words:?}"));
    assert!(e.kind() == kind && words.iter().all(|w| e.message().contains(w)), "{:?}: {e}", e.kind());
}

#[test]
#[ignore = "a child of what_kernels_report_is_an_error_of_the_next_call_on_that_device"]
fn child_reports() {
    let (gpu, other, mut rng) = (Gpu::new(0), Gpu::new(1), Rng::new(103));
    let shape = Shape { n: 20, k: 300 };
    let good = case(&mut rng, Dtype::BF16, shape, Encoding::Sparse);
    let well = |gpu: &Gpu| gpu.restore(&good, &good.blob).map(|got| assert!(got == good.fine_tuned));
    well(&gpu).unwrap();
    well(&other).unwrap();
    let foreign = case(&mut rng, Dtype::F16, shape, Encoding::Sparse);
    // Bits take a delta of any dtype of their size.
    let mut bits = gpu.words(&foreign);
    (bits.dtype, bits.bits) = (Dtype::I16, true);
    let (delta, bytes) = (gpu.put(&foreign.blob), foreign.blob.len());
    // SAFETY: allocations of those sizes.
    unsafe { cuda::delta_apply(gpu.place(), bits, delta, bytes) }.unwrap();
    assert!(gpu.get(bits.address, foreign.base.len()) == foreign.fine_tuned);
    // Else the call itself is well, and its result is NaN.
    assert!(gpu.restore(&good, &foreign.blob).unwrap().iter().all(|b| *b == 0xFF));
    well(&other).unwrap();
    said(well(&gpu), Kind::Mismatch, &["an earlier delta_restore on cuda:0", "another dtype or shape"]);
    well(&gpu).unwrap();
    assert!(gpu.apply(&good, &good.blob[..good.blob.len() - 64]).unwrap() == good.base);
    said(well(&gpu), Kind::Corrupt, &["an earlier delta_apply_ on cuda:0"]);
    well(&gpu).unwrap();

    let dtype = Dtype::BF16;
    let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
    let x = integers(&mut rng, dtype, 5 * shape.k, 3);
    let map = [0, 3, 99, -1, 4];
    assert_eq!(TENANTS.iter().max(), Some(&10));
    let got = gpu.product(&gpu.grouped_args(&fleet, &x, &map)).unwrap();
    let row = shape.n * 2;
    let valid = [0, 3, -1, -1, 4];
    let wanted = fleet.reference(&x, &valid);
    for i in [0, 1, 3, 4] {
        let (got, wanted) = (&got[i * row..][..row], &wanted[i * shape.n..][..shape.n]);
        assert_eq!(first_difference(dtype, got, wanted), None, "row {i}");
    }
    assert!(got[2 * row..][..row].iter().all(|b| *b == 0xFF));
    said(well(&gpu), Kind::InvalidArgument, &["an earlier delta_linear_grouped on cuda:0", "slot 99"]);

    // No slot at all, and a row that names the first: not the arena from its beginning.
    let mut args = gpu.grouped_args(&fleet, &x, &[0; 5]);
    args.arena = gpu.put(&good.blob);
    args.arena_bytes = good.blob.len();
    args.biases = 0;
    args.rows = args.rows.map(|rows| Rows { slots: 0, slot_count: 0, ..rows });
    assert!(gpu.product(&args).unwrap().iter().all(|b| *b == 0xFF));
    said(well(&gpu), Kind::InvalidArgument, &["slot 0", "does not exist"]);

    let wrong = Case { blob: foreign.blob.clone(), ..case(&mut rng, dtype, shape, Encoding::Sparse) };
    gpu.linear(&wrong, &x, 5, None).unwrap();
    said(gpu.linear(&wrong, &x, 5, None), Kind::Mismatch, &["an earlier delta_linear on"]);
    well(&gpu).unwrap();
}

#[test]
fn calls_are_captured_in_a_graph_even_the_first() {
    passes("child_graph", "");
}

#[test]
#[ignore = "a child of calls_are_captured_in_a_graph_even_the_first"]
fn child_graph() {
    let (gpu, mut rng) = (Gpu::new(0), Rng::new(104));
    let case = exact_case(&mut rng, Dtype::F16, Shape { n: 20, k: 300 }, Encoding::Exponent);
    let (base, out) = (gpu.words(&case), gpu.put(&vec![0x5A; case.base.len()]));
    let (x, delta) = (integers(&mut rng, Dtype::F16, 300, 3), gpu.put(&case.blob));
    let y = gpu.put(&[0x5A; 40]);
    let args = Linear {
        x: gpu.put(&x),
        m: 1,
        weight: base,
        biases: 0,
        bias_stride: 0,
        arena: delta,
        arena_bytes: case.blob.len(),
        rows: None,
        deterministic: false,
    };
    order_on("capture", gpu.stream);
    // SAFETY: allocations of those sizes, none freed.
    unsafe {
        cuda::delta_restore(gpu.place(), base, out, delta, case.blob.len()).unwrap();
        cuda::delta_linear(gpu.place(), &args, 0, y).unwrap();
    }
    order("end");
    let reference = case.reference(&x, 1, None);
    for round in 0..2 {
        assert!(gpu.get(out, case.base.len()).iter().all(|b| *b == 0x5A), "ran before the replay");
        order("replay");
        assert!(gpu.get(out, case.base.len()) == case.fine_tuned);
        assert_eq!(first_difference(Dtype::F16, &gpu.get(y, 40), &reference), None, "round {round}");
        // SAFETY: the double compares with its allocations.
        unsafe { result::memcpy_htod_sync(out, &vec![0x5Au8; case.base.len()]) }.unwrap();
    }
    // A replay reports as a launch does: the delta is overwritten in place.
    // SAFETY: as above.
    unsafe { result::memcpy_htod_sync(delta, &[0u8; 64]) }.unwrap();
    order("replay");
    let next = || gpu.restore(&case, &case.blob).map(|got| got == case.fine_tuned);
    said(next(), Kind::Corrupt, &["an earlier delta_restore"]);
    said(next(), Kind::Corrupt, &["an earlier delta_linear "]);
    assert!(next().unwrap());
}

#[test]
fn threads_that_come_at_once_load_the_kernels_once() {
    passes("child_threads", "");
}

#[test]
#[ignore = "a child of threads_that_come_at_once_load_the_kernels_once"]
fn child_threads() {
    let gpu = Gpu::new(0);
    let case = case(&mut Rng::new(105), Dtype::F32, Shape { n: 16, k: 256 }, Encoding::Raw);
    let (base, delta, place) = (gpu.words(&case), gpu.put(&case.blob), gpu.place());
    let outs: Vec<_> = (0..8).map(|_| gpu.put(&case.base)).collect();
    std::thread::scope(|s| {
        for &out in &outs {
            let bytes = case.blob.len();
            // SAFETY: allocations of those sizes, none freed.
            s.spawn(move || unsafe { cuda::delta_restore(place, base, out, delta, bytes) }.unwrap());
        }
    });
    assert!(outs.iter().all(|out| gpu.get(*out, case.base.len()) == case.fine_tuned));
    assert_eq!((calls("cuModuleLoadData"), calls("cuMemHostAlloc"), calls("cuInit")), (1, 1, 2));
}

/// A call with valid arguments, for its error.
fn any_call(device: i32) -> Result<()> {
    let base = Words { dtype: Dtype::U8, bits: false, shape: Shape { n: 0, k: 0 }, address: 0 };
    // SAFETY: no words.
    unsafe { cuda::delta_restore(Place { device, stream: 0 }, base, 0, 0, 0) }
}

/// `XORZ_WANTED`: the kind, then words of the sentence.
#[test]
#[ignore = "a child of whatever_is_missing_is_said_and_what_to_do"]
fn child_refused() {
    let wanted = std::env::var("XORZ_WANTED").unwrap();
    let words: Vec<_> = wanted.split('|').collect();
    for _ in 0..2 {
        let e = any_call(0).expect_err("no error");
        println!("{e}");
        assert!(
            format!("{:?}", e.kind()) == words[0] && words[1..].iter().all(|w| e.message().contains(w)),
            "{:?}: {e}",
            e.kind()
        );
    }
}

#[test]
fn whatever_is_missing_is_said_and_what_to_do() {
    let machines = [
        ("devices=0", "Device|CUDA_ERROR_NO_DEVICE|nvidia-smi|CUDA_VISIBLE_DEVICES"),
        ("version=11080", "Device|of CUDA 11.8|12.0 or newer|update the driver"),
        ("capability=75", "Device|cuda:0 (double)|capability 7.5|need 8.0"),
        ("image=209", "Device|CUDA_ERROR_NO_BINARY_FOR_GPU|cuda:0|driver is of CUDA 13.2|XORZ_NVCC"),
        (
            "image=222 version=12040",
            "Device|CUDA_ERROR_UNSUPPORTED_PTX_VERSION|of CUDA 12.4|update the driver",
        ),
        ("image=2", "Device|loading the kernels on cuda:0|CUDA_ERROR_OUT_OF_MEMORY|free memory"),
    ];
    for (machine, wanted) in machines {
        passes_as("child_refused", machine, |c| {
            c.env("XORZ_WANTED", wanted);
        });
    }
    let (folder, _) = device::double();
    let no_image = folder.join("none.fatbin");
    let text = folder.join("text.fatbin");
    std::fs::write(&text, "no image").unwrap();
    for (image, wanted) in
        [(&no_image, "Io|XORZ_CUDA_IMAGE|none.fatbin"), (&text, "InvalidArgument|neither a fatbin")]
    {
        passes_as("child_refused", "", |c| {
            c.env("XORZ_CUDA_IMAGE", image).env("XORZ_WANTED", wanted);
        });
    }
    if std::env::var_os("XORZ_NVCC").is_some_and(|v| !v.is_empty()) {
        println!("SKIPPED: this build has CUDA kernels");
    } else {
        let wanted = "Device|built without CUDA kernels|make build CUDA=1|XORZ_NVCC";
        passes_as("child_refused", "", |c| {
            c.env_remove("XORZ_CUDA_IMAGE").env("XORZ_WANTED", wanted);
        });
    }
}

#[test]
fn no_libcuda_is_said_in_words_and_a_strange_one_too() {
    // SAFETY: loads libcuda where there is one.
    if unsafe { sys::is_culib_present() } {
        println!("SKIPPED: this machine has a libcuda");
        return;
    }
    let without = |c: &mut Command| {
        c.env_remove("LD_LIBRARY_PATH").env("XORZ_WANTED", "Device|no libcuda.so.1|install");
    };
    passes_as("child_refused", "", without);
    // A libcuda that lacks what is asked of it.
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_strange");
    std::fs::create_dir_all(&folder).unwrap();
    let source = folder.join("strange.c");
    std::fs::write(&source, "int cuInit(unsigned flags) { return (int)flags; }\n").unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let library = folder.join("libcuda.so.1");
    let built = Command::new(cc).args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
    assert!(built.success());
    passes_as("child_refused", "", |c| {
        c.env("LD_LIBRARY_PATH", &folder)
            .env("XORZ_WANTED", "Device|libcuda has no cuDriverGetVersion|update");
    });
}

#[test]
fn errors_of_a_call_are_said_and_the_next_call_is_well() {
    passes("child_errors", "devices=2");
}

#[test]
#[ignore = "a child of errors_of_a_call_are_said_and_the_next_call_is_well"]
fn child_errors() {
    let (gpu, other) = (Gpu::new(0), Gpu::new(1));
    said(any_call(2), Kind::Device, &["no cuda:2", "sees 2 devices"]);
    said(any_call(-1), Kind::Device, &["no cuda:-1"]);
    // What fails while a device is made ready is tried again.
    for (function, words) in [
        ("cuDevicePrimaryCtxRetain", "the primary context of cuda:0"),
        ("cuThreadExchangeStreamCaptureMode", "capture mode"),
        ("cuModuleLoadData", "loading the kernels"),
        ("cuModuleGetFunction", "the kernels have no xorz_"),
        ("cuMemHostAlloc", "pinned memory"),
        ("cuMemHostGetDevicePointer_v2", "status words"),
    ] {
        order(&format!("fail {function} 2"));
        said(any_call(0), Kind::Device, &[words, "CUDA_ERROR_OUT_OF_MEMORY"]);
    }
    assert_eq!(calls("cuLaunchKernel"), 0);
    any_call(0).unwrap();
    said(any_call(0), Kind::Corrupt, &["no delta"]);
    assert_eq!(calls("cuLaunchKernel"), 1);

    let case = case(&mut Rng::new(106), Dtype::BF16, Shape { n: 5, k: 9 }, Encoding::Sparse);
    for (code, words) in [
        (1, "CUDA_ERROR_INVALID_VALUE"),
        (700, "an earlier kernel of this process failed"),
        (900, "call it once before the capture"),
        (3, "forked"),
    ] {
        order(&format!("fail cuLaunchKernel {code}"));
        let r = gpu.restore(&case, &case.blob);
        said(r, Kind::Device, &["launching xorz_delta_restore_16 on cuda:0", words]);
        assert!(gpu.restore(&case, &case.blob).unwrap() == case.fine_tuned);
    }
    // A stream of another device; and none at all.
    let base = gpu.words(&case);
    let (out, delta) = (gpu.put(&case.base), gpu.put(&case.blob));
    // SAFETY: allocations of those sizes, none freed; the double compares streams with those that it made.
    let on = |stream| unsafe {
        cuda::delta_restore(Place { device: 0, stream }, base, out, delta, case.blob.len())
    };
    for stream in [other.stream, 0x1234_5670] {
        said(on(stream), Kind::Device, &["CUDA_ERROR_INVALID_HANDLE", "primary context"]);
    }
    on(gpu.stream).unwrap();
}

#[test]
fn addresses_that_the_kernels_cannot_take_are_refused_before_a_device_is_asked() {
    passes("child_addresses", "devices=0");
}

#[test]
#[ignore = "a child of addresses_that_the_kernels_cannot_take_are_refused_before_a_device_is_asked"]
fn child_addresses() {
    let place = Place { device: 0, stream: 0 };
    let words = |dtype, address| Words { dtype, bits: false, shape: Shape { n: 2, k: 2 }, address };
    for (base, out, delta, name) in [(2, 16, 16, "base"), (16, 2, 16, "out"), (16, 16, 8, "delta")] {
        // SAFETY: there is no device.
        let r = unsafe { cuda::delta_restore(place, words(Dtype::F32, base), out, delta, 512) };
        said(r, Kind::InvalidArgument, &[name, "no multiple of"]);
    }
    for (weight, delta, name) in [(1, 16, "weight"), (16, 8, "delta")] {
        // SAFETY: as above.
        let r = unsafe { cuda::delta_apply(place, words(Dtype::BF16, weight), delta, 512) };
        said(r, Kind::InvalidArgument, &[name, "no multiple of"]);
    }
    let rows = Rows { slots: 16, slot_count: 1, tenant_of_row: 16 };
    let good = Linear {
        x: 16,
        m: 3,
        weight: words(Dtype::BF16, 16),
        biases: 0,
        bias_stride: 0,
        arena: 16,
        arena_bytes: 512,
        rows: Some(rows),
        deterministic: false,
    };
    let weight = words(Dtype::BF16, 3);
    let wrong = [
        (Linear { x: 3, ..good }, "input"),
        (Linear { weight, ..good }, "weight"),
        (Linear { biases: 3, ..good }, "biases"),
        (Linear { arena: 8, ..good }, "arena"),
        (Linear { arena: 8, rows: None, ..good }, "delta"),
        (Linear { rows: Some(Rows { slots: 4, ..rows }), ..good }, "slots"),
        (Linear { rows: Some(Rows { slots: 0, ..rows }), ..good }, "slots"),
        (Linear { rows: Some(Rows { tenant_of_row: 2, ..rows }), ..good }, "tenant_of_row"),
        (Linear { rows: Some(Rows { tenant_of_row: 0, ..rows }), ..good }, "tenant_of_row"),
    ];
    for (args, name) in wrong {
        // SAFETY: as above.
        said(unsafe { cuda::delta_linear(place, &args, 0, 16) }, Kind::InvalidArgument, &[name]);
    }
    // SAFETY: as above.
    said(unsafe { cuda::delta_linear(place, &good, 0, 1) }, Kind::InvalidArgument, &["out"]);
    // SAFETY: as above.
    said(unsafe { cuda::delta_linear(place, &good, 0, 16) }, Kind::Device, &["NO_DEVICE"]);
}

#[test]
fn the_double_notices_a_host_that_reads_device_memory_and_a_kernel_that_leaves_its_own() {
    for (child, sign) in [("child_host_read", ""), ("child_outside", "outside of device memory")] {
        let out = run(child, "devices=2", |_| ());
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains(sign), "{child}: {}\n{text}", out.status);
        assert!(!text.contains("panicked"), "{child}: {text}");
    }
}

#[test]
#[ignore = "a child of the_double_notices_a_host_that_reads_device_memory_and_a_kernel_that_leaves_its_own"]
fn child_host_read() {
    let at = Gpu::new(0).put(&[1, 2, 3]);
    // SAFETY: none: this ends the process.
    let read = unsafe { std::ptr::read_volatile(at as *const u8) };
    println!("read {read}");
}

#[test]
#[ignore = "a child of the_double_notices_a_host_that_reads_device_memory_and_a_kernel_that_leaves_its_own"]
fn child_outside() {
    let (gpu, other) = (Gpu::new(0), Gpu::new(1));
    let case = case(&mut Rng::new(107), Dtype::BF16, Shape { n: 5, k: 9 }, Encoding::Sparse);
    let (base, delta) = (gpu.words(&case), gpu.put(&case.blob));
    let out = other.put(&case.base);
    // SAFETY: none: memory of another device, which ends the process.
    unsafe { cuda::delta_restore(gpu.place(), base, out, delta, case.blob.len()) }.unwrap();
}
