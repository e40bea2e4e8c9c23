//! Promise: every launch that `src/cuda` makes arrives at the driver as the kernel takes it, on the caller's
//! stream and device, also in a captured graph, with nothing that waits. Against a double of libcuda.so.1
//! that runs the kernels' own source (`tests/cuda_host/driver.cpp`), in a process a test, since a process has
//! one libcuda.

use crate::common::data::Rng;
use crate::common::gpu::{Gpu, calls, case, delta_of, exact_case, log, order, order_on, passes, said};
use crate::common::grads::fleet_reference;
use crate::common::kernels::{Fleet, TENANTS, maps};
use crate::common::linear::{DTYPES, ENCODINGS, first_difference, integers};
use crate::common::lookups::Tables;
use cudarc::driver::result;
use xorz::codec::Encoding;
use xorz::cuda::{self, BatchRows, DeviceMatrix, Embedding, Linear, Place};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};

#[test]
fn every_launch_gives_what_the_oracle_gives() {
    passes(child_launches, "devices=2");
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
            // Their gradients: what would be x's output is given.
            let grad = integers(&mut rng, dtype, m * shape.n, 3);
            let map: Vec<i32> = (0..m).map(|i| TENANTS[i % TENANTS.len()]).collect();
            let got = gpu.grad(&gpu.grouped_args(&fleet, &grad, &map)).unwrap();
            let difference = first_difference(dtype, &got, &fleet_reference(&fleet, &grad, &map));
            assert_eq!(difference, None, "gradients {dtype} {map:?}");
        }
    }
    for dtype in Dtype::ALL {
        let tables = Tables::new(&mut rng, dtype, Shape { n: 21, k: 300 });
        for m in [1, 40] {
            let (indices, map) = tables.batch(&mut rng, m);
            let got = gpu.look_up(&gpu.lookup_args(&tables, &indices, &map)).unwrap();
            assert!(got == tables.rows(&indices, &map), "delta_embedding {dtype}");
            let Some(bits) =
                [Dtype::I16, Dtype::I32].into_iter().find(|i| i.word_bytes() == dtype.word_bytes())
            else {
                continue;
            };
            let args = gpu.lookup_args(&tables, &indices, &map);
            let weight = DeviceMatrix { dtype: bits, bits: true, ..args.weight };
            let got = gpu.look_up(&Embedding { weight, ..args }).unwrap();
            assert!(got == tables.rows(&indices, &map), "delta_embedding {dtype} as bits");
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
    passes(child_streams, "devices=2");
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
            unsafe { cuda::delta_restore(place, base, 0..33, out, delta_of(delta, &case)) }.unwrap();
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
    unsafe { cuda::delta_restore(second.place(), base, 0..33, out, delta_of(delta, &case)) }.unwrap();
    assert_eq!(result::ctx::get_current().unwrap(), None);
}

#[test]
fn arguments_of_products_arrive_in_order_and_rows_beyond_the_grid_in_further_launches() {
    passes(child_arguments, "");
}

#[test]
#[ignore = "a child of arguments_of_products_arrive_in_order_and_rows_beyond_the_grid_in_further_launches"]
fn child_arguments() {
    let gpu = Gpu::new(0);
    order("dry");
    let weight =
        DeviceMatrix { dtype: Dtype::F32, bits: false, shape: Shape { n: 100, k: 7 }, address: 0x2000 };
    let rows = BatchRows { slots: 0x5000, slot_count: 9, tenant_of_row: 0x6000 };
    // So many tenants that tiles of one would be empty.
    let crowd = BatchRows { slot_count: 1 << 20, ..rows };
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
    args.rows = Some(BatchRows { slots: 0, slot_count: 0, tenant_of_row: 0x6000 });
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
    for nothing in [
        Linear { m: 0, ..args },
        Linear { weight: DeviceMatrix { shape: Shape { n: 0, k: 7 }, ..weight }, ..args },
    ] {
        assert_eq!(launches(&nothing), []);
    }
}

#[test]
fn arguments_of_lookups_arrive_in_order() {
    passes(child_lookup_arguments, "");
}

#[test]
#[ignore = "a child of arguments_of_lookups_arrive_in_order"]
fn child_lookup_arguments() {
    let gpu = Gpu::new(0);
    order("dry");
    let weight =
        DeviceMatrix { dtype: Dtype::I16, bits: false, shape: Shape { n: 100, k: 9000 }, address: 0x2000 };
    let rows = BatchRows { slots: 0x4000, slot_count: 9, tenant_of_row: 0x5000 };
    let args = Embedding { indices: 0x1000, m: 33, weight, arena: 0x3000, arena_bytes: 77, rows };
    let launches = |args: &Embedding| {
        let before = log().len();
        // SAFETY: the double runs nothing.
        unsafe { cuda::delta_embedding(gpu.place(), args, 0x6000) }.unwrap();
        let launches = log().split_off(before).into_iter().filter(|l| l.starts_with("cuLaunchKernel"));
        launches.collect::<Vec<_>>()
    };
    let line = launches(&args).remove(0);
    let head = "cuLaunchKernel xorz_delta_embedding_16 grid 33 3 1 block 256 1 1 shared 0 stream ";
    let params = " params 4096 8192 12288 77 16384 9 20480 24576 33 100 9000 11 ";
    assert!(line.starts_with(head) && line.contains(params), "{line}");
    let bits = launches(&Embedding { weight: DeviceMatrix { bits: true, ..weight }, ..args }).remove(0);
    assert!(bits.contains(" 33 100 9000 0 "), "{bits}");
    // No slots: still not the one delta of all.
    let none = launches(&Embedding { rows: BatchRows { slots: 0, slot_count: 0, ..rows }, ..args }).remove(0);
    assert!(none.contains(" params 4096 8192 12288 77 8 0 20480 24576 33 "), "{none}");
    let empty = DeviceMatrix { shape: Shape { n: 100, k: 0 }, ..weight };
    for nothing in [Embedding { m: 0, ..args }, Embedding { weight: empty, ..args }] {
        assert_eq!(launches(&nothing), Vec::<String>::new());
    }
}

#[test]
fn deterministic_rows_have_the_same_bits_in_any_company() {
    passes(child_deterministic, "");
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
fn calls_are_captured_in_a_graph_even_the_first() {
    passes(child_graph, "");
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
        cuda::delta_restore(gpu.place(), base, 0..case.shape.n, out, delta_of(delta, &case)).unwrap();
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
    passes(child_threads, "");
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
            let delta = delta_of(delta, &case);
            // SAFETY: allocations of those sizes, none freed.
            s.spawn(move || unsafe { cuda::delta_restore(place, base, 0..16, out, delta) }.unwrap());
        }
    });
    assert!(outs.iter().all(|out| gpu.get(*out, case.base.len()) == case.fine_tuned));
    assert_eq!((calls("cuModuleLoadData"), calls("cuMemHostAlloc"), calls("cuInit")), (1, 1, 2));
}
