//! Promise: whatever is missing, refused or reported on the way to a CUDA kernel is said in words, and the
//! next call is well. Against the double of `cuda_launch`.

use crate::common::data::Rng;
use crate::common::device::double;
use crate::common::gpu::{Gpu, calls, case, delta_of, order, passes, passes_as, run, said};
use crate::common::kernels::{Fleet, TENANTS};
use crate::common::linear::{Case, first_difference, integers};
use crate::common::lookups::Tables;
use cudarc::driver::sys;
use std::process::{Command, Output};
use xorz::codec::Encoding;
use xorz::cuda::{self, BatchRows, DeviceDelta, DeviceMatrix, Embedding, Linear, Place};
use xorz::error::{Kind, Result};
use xorz::matrix::{Dtype, Shape};

#[test]
fn what_kernels_report_is_an_error_of_the_next_call_on_that_device() {
    passes(child_reports, "devices=2");
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
    unsafe { cuda::delta_apply(gpu.place(), bits, delta, bytes, gpu.between(bits)) }.unwrap();
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
    args.rows = args.rows.map(|rows| BatchRows { slots: 0, slot_count: 0, ..rows });
    assert!(gpu.product(&args).unwrap().iter().all(|b| *b == 0xFF));
    said(well(&gpu), Kind::InvalidArgument, &["slot 0", "does not exist"]);

    let tables = Tables::new(&mut rng, dtype, Shape { n: 21, k: 30 });
    for (indices, map, words) in [
        ([3, 21, 4], [1, 1, -1], ["indices[1]", "outside of the weight"]),
        ([3, 2, 4], [1, 77, -1], ["slot 77", "does not exist"]),
    ] {
        let got = gpu.look_up(&gpu.lookup_args(&tables, &indices, &map)).unwrap();
        let row = tables.row_bytes();
        assert!(got[row..2 * row].iter().all(|b| *b == 0xFF));
        let others = tables.rows(&[indices[0], indices[2]], &[map[0], map[2]]);
        assert!([&got[..row], &got[2 * row..]].concat() == others);
        said(
            well(&gpu),
            Kind::InvalidArgument,
            &["an earlier delta_embedding on cuda:0", words[0], words[1]],
        );
        well(&gpu).unwrap();
    }

    let wrong = Case { blob: foreign.blob.clone(), ..case(&mut rng, dtype, shape, Encoding::Sparse) };
    gpu.linear(&wrong, &x, 5, None).unwrap();
    said(gpu.linear(&wrong, &x, 5, None), Kind::Mismatch, &["an earlier delta_linear on"]);
    well(&gpu).unwrap();
}

/// A call with valid arguments, for its error.
fn any_call(device: i32) -> Result<()> {
    let base = DeviceMatrix { dtype: Dtype::U8, bits: false, shape: Shape { n: 0, k: 0 }, address: 0 };
    // SAFETY: no words.
    unsafe {
        cuda::delta_restore(
            Place { device, stream: 0 },
            base,
            0..base.shape.n,
            0,
            DeviceDelta { address: 0, bytes: 0 },
        )
    }
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
        passes_as(child_refused, machine, |c| {
            c.env("XORZ_WANTED", wanted);
        });
    }
    let (folder, _) = double();
    let no_image = folder.join("none.fatbin");
    let text = folder.join("text.fatbin");
    std::fs::write(&text, "no image").unwrap();
    for (image, wanted) in
        [(&no_image, "Io|XORZ_CUDA_IMAGE|none.fatbin"), (&text, "InvalidArgument|neither a fatbin")]
    {
        passes_as(child_refused, "", |c| {
            c.env("XORZ_CUDA_IMAGE", image).env("XORZ_WANTED", wanted);
        });
    }
    if std::env::var_os("XORZ_NVCC").is_some_and(|v| !v.is_empty()) {
        println!("SKIPPED: this build has CUDA kernels");
    } else {
        let wanted = "Device|built without CUDA kernels|XORZ_CUDA=1|XORZ_NVCC";
        passes_as(child_refused, "", |c| {
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
    passes_as(child_refused, "", without);
    // A libcuda that lacks what is asked of it.
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_strange");
    std::fs::create_dir_all(&folder).unwrap();
    let source = folder.join("strange.c");
    std::fs::write(&source, "int cuInit(unsigned flags) { return (int)flags; }\n").unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let library = folder.join("libcuda.so.1");
    let built = Command::new(cc).args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
    assert!(built.success());
    passes_as(child_refused, "", |c| {
        c.env("LD_LIBRARY_PATH", &folder)
            .env("XORZ_WANTED", "Device|libcuda has no cuDriverGetVersion|update");
    });
}

#[test]
fn errors_of_a_call_are_said_and_the_next_call_is_well() {
    passes(child_errors, "devices=2");
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
        ("cuFuncLoad", "the kernels have no xorz_"),
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
        cuda::delta_restore(Place { device: 0, stream }, base, 0..case.shape.n, out, delta_of(delta, &case))
    };
    for stream in [other.stream, 0x1234_5670] {
        said(on(stream), Kind::Device, &["CUDA_ERROR_INVALID_HANDLE", "primary context"]);
    }
    on(gpu.stream).unwrap();
}

#[test]
fn addresses_that_the_kernels_cannot_take_are_refused_before_a_device_is_asked() {
    passes(child_addresses, "devices=0");
}

#[test]
#[ignore = "a child of addresses_that_the_kernels_cannot_take_are_refused_before_a_device_is_asked"]
fn child_addresses() {
    let place = Place { device: 0, stream: 0 };
    let words = |dtype, address| DeviceMatrix { dtype, bits: false, shape: Shape { n: 2, k: 2 }, address };
    for (base, out, delta, name) in [(2, 16, 16, "base"), (16, 2, 16, "out"), (16, 16, 8, "delta")] {
        // SAFETY: there is no device.
        let r = unsafe {
            cuda::delta_restore(
                place,
                words(Dtype::F32, base),
                0..2,
                out,
                DeviceDelta { address: delta, bytes: 512 },
            )
        };
        said(r, Kind::InvalidArgument, &[name, "no multiple of"]);
    }
    for (weight, delta, between, name) in
        [(1, 16, 16, "weight"), (16, 8, 16, "delta"), (16, 16, 18, "workspace"), (16, 16, 0, "workspace")]
    {
        // SAFETY: as above.
        let r = unsafe { cuda::delta_apply(place, words(Dtype::BF16, weight), delta, 512, between) };
        said(r, Kind::InvalidArgument, &[name, if between == 0 { "no address" } else { "no multiple of" }]);
    }
    for (base, workspace, out, name) in [
        (2, 16, 16, "words"),
        (16, 8, 16, "workspace"),
        (16, 0, 16, "workspace"),
        (16, 16, 4, "out"),
        (16, 16, 0, "out"),
    ] {
        // SAFETY: as above.
        let r = unsafe { cuda::delta_digest(place, words(Dtype::F32, base), workspace, out) };
        said(r, Kind::InvalidArgument, &[name, "address"]);
    }
    let rows = BatchRows { slots: 16, slot_count: 1, tenant_of_row: 16 };
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
        (Linear { rows: Some(BatchRows { slots: 4, ..rows }), ..good }, "slots"),
        (Linear { rows: Some(BatchRows { slots: 0, ..rows }), ..good }, "slots"),
        (Linear { rows: Some(BatchRows { tenant_of_row: 2, ..rows }), ..good }, "tenant_of_row"),
        (Linear { rows: Some(BatchRows { tenant_of_row: 0, ..rows }), ..good }, "tenant_of_row"),
    ];
    for (args, name) in wrong {
        // SAFETY: as above.
        said(unsafe { cuda::delta_linear(place, &args, 0, 16) }, Kind::InvalidArgument, &[name]);
    }
    let table = words(Dtype::F32, 16);
    let good_lookup = Embedding { indices: 16, m: 3, weight: table, arena: 16, arena_bytes: 512, rows };
    let wrong = [
        (Embedding { indices: 4, ..good_lookup }, "indices"),
        (Embedding { weight: words(Dtype::F32, 2), ..good_lookup }, "weight"),
        (Embedding { arena: 8, ..good_lookup }, "arena"),
        (Embedding { rows: BatchRows { slots: 4, ..rows }, ..good_lookup }, "slots"),
        (Embedding { rows: BatchRows { slots: 0, ..rows }, ..good_lookup }, "slots"),
        (Embedding { rows: BatchRows { tenant_of_row: 2, ..rows }, ..good_lookup }, "tenant_of_row"),
    ];
    for (args, name) in wrong {
        // SAFETY: as above.
        said(unsafe { cuda::delta_embedding(place, &args, 16) }, Kind::InvalidArgument, &[name]);
    }
    // SAFETY: as above.
    said(unsafe { cuda::delta_embedding(place, &good_lookup, 2) }, Kind::InvalidArgument, &["out"]);
    // SAFETY: as above.
    said(unsafe { cuda::delta_embedding(place, &good_lookup, 16) }, Kind::Device, &["NO_DEVICE"]);
    // SAFETY: as above.
    said(unsafe { cuda::delta_linear(place, &good, 0, 1) }, Kind::InvalidArgument, &["out"]);
    // SAFETY: as above.
    said(unsafe { cuda::delta_linear(place, &good, 0, 16) }, Kind::Device, &["NO_DEVICE"]);
}

#[test]
fn the_double_notices_a_host_that_reads_device_memory_and_a_kernel_that_leaves_its_own() {
    let dies = |out: Output, sign: &str| {
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains(sign), "{sign}: {}\n{text}", out.status);
        assert!(!text.contains("panicked"), "{sign}: {text}");
    };
    dies(run(child_host_read, "devices=2", |_| ()), "");
    dies(run(child_outside, "devices=2", |_| ()), "outside of device memory");
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
    unsafe { cuda::delta_restore(gpu.place(), base, 0..5, out, delta_of(delta, &case)) }.unwrap();
}
