//! Promise: the host side of the CUDA kernels launches what the kernels are: names, parameters in order,
//! numbers and grids are those of the sources in `cuda/` and of `cuda/README.md`.

use std::collections::BTreeSet;
use std::path::Path;
use xorz::cuda::params::{Apply, DigestLeaves, DigestRoot, Embedding, Kind, Linear, Params, Restore, SMALL};
use xorz::cuda::plan::{
    self, ENTRIES, GRAD_ROWS, GRAD_STRIP_BYTES, LARGE_W_ROWS, MOST_BLOCKS, Product, ProductRows,
    SMALL_W_ROWS, THREADS, large_rows,
};
use xorz::cuda::status::{self, Code, Op, SLOT_BITS};
use xorz::error;
use xorz::matrix::{Dtype, Shape};

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Without the backslashes and spaces of macros.
fn joined(text: &str) -> String {
    text.replace('\\', " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn every_kernel_has_an_entry_and_every_entry_a_kernel() {
    let header = read("tests/cuda_host/kernels.h");
    let names: BTreeSet<_> = header.split("X(").skip(1).filter_map(|t| t.split(')').next()).collect();
    assert!(names.len() > 10, "{names:?}");
    assert_eq!(names, ENTRIES.into_iter().collect());
    let gate = read("cuda/gate.txt");
    let rows = gate.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split_whitespace().next());
    assert_eq!(names, rows.collect());
}

/// What the kernel whose name is `name` in the source takes.
fn source_params(file: &str, name: &str) -> Vec<(String, Kind)> {
    let text = joined(&read(file));
    let after = text.split(&format!("{name}(")).nth(1).unwrap_or_else(|| panic!("no {name} in {file}"));
    let list = after.split(')').next().unwrap();
    let one = |param: &str| {
        let (of, name) = param.trim().rsplit_once(' ').unwrap();
        let kind = match of {
            _ if of.ends_with('*') => Kind::Pointer,
            "uint64_t" => Kind::U64,
            "uint32_t" => Kind::U32,
            other => panic!("{name} is a {other}"),
        };
        (name.to_owned(), kind)
    };
    list.split(',').map(one).collect()
}

/// What the README says of the entry.
fn documented_params(entry: &str) -> Vec<(String, Kind)> {
    let text = read("cuda/README.md");
    let section = text.split("\n### ").find(|s| s.starts_with(entry)).unwrap_or_else(|| panic!("no {entry}"));
    let rows = section.lines().filter(|l| l.starts_with("| ") && l.as_bytes()[2].is_ascii_digit());
    let one = |(at, row): (usize, &str)| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        assert_eq!(cells[1], at.to_string(), "{row}");
        let kind = match cells[3] {
            "uint64" => Kind::U64,
            "uint32" => Kind::U32,
            _ => Kind::Pointer,
        };
        assert_eq!(kind == Kind::Pointer, cells[3].contains('*'), "{row}");
        (cells[2].to_owned(), kind)
    };
    rows.enumerate().map(one).collect()
}

fn table<P: Params>() -> Vec<(String, Kind)> {
    P::TABLE.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect()
}

#[test]
fn parameters_are_those_of_the_kernels_and_of_the_readme() {
    for (ours, file, kernel, entry) in [
        (table::<Restore>(), "restore.cu", "xorz_delta_restore_##bits", "`xorz_delta_restore_"),
        (table::<Apply>(), "restore.cu", "xorz_delta_verify_##bits", "`xorz_delta_verify_"),
        (table::<Apply>(), "restore.cu", "xorz_delta_apply_##bits", "`xorz_delta_verify_"),
        (table::<DigestLeaves>(), "digest.cu", "xorz_digest_leaves", "`xorz_digest_leaves"),
        (table::<DigestRoot>(), "digest.cu", "xorz_digest_root", "`xorz_digest_root"),
        (table::<Embedding>(), "embedding.cu", "xorz_delta_embedding_##bits", "`xorz_delta_embedding_"),
        (
            table::<Linear>()[..SMALL].to_vec(),
            "linear_small.cu",
            "xorz_linear_small_##name##_m##M",
            "`xorz_linear_small_",
        ),
    ] {
        assert_eq!(ours, source_params(&format!("cuda/{file}"), kernel), "{kernel}");
        assert_eq!(ours, documented_params(entry), "{entry}");
    }
    for kernel in ["segments", "large", "grad"] {
        let found =
            source_params(&format!("cuda/linear_{kernel}.cu"), &format!("xorz_linear_{kernel}_##name"));
        assert_eq!(table::<Linear>(), found, "{kernel}");
    }
    let readme = read("cuda/README.md");
    assert!(readme.contains("| 0 to 13 | | | those of `xorz_linear_small_*` |\n| 14 | workspace | uint8* |"));
}

#[test]
fn parameters_are_packed_in_the_order_of_their_table() {
    let numbers = Apply {
        weight: 1,
        delta: 2,
        delta_bytes: 3,
        n: 4,
        k: 5,
        dtype: 6,
        status: 7,
        verdicts: 8,
        verdict_count: 9,
    };
    assert_eq!(numbers.pack().words_mut(), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let all =
        Linear { x: 10, status: u64::MAX, tenant_of_row: 18, workspace: 5, ..Default::default() }.pack();
    assert_eq!(all.clone().words_mut(), [10, 0, 0, 0, 0, 0, 0, 0, 18, 0, 0, 0, 0, u64::MAX, 5]);
    assert_eq!(all.first(SMALL).words_mut(), [10, 0, 0, 0, 0, 0, 0, 0, 18, 0, 0, 0, 0, u64::MAX]);
}

#[test]
fn numbers_are_those_of_the_kernels() {
    let resident = read("cuda/resident.cuh");
    let names = [
        "kTileCorrupt",
        "kNoTenant",
        "kBadSlot",
        "kMisaligned",
        "kNotADelta",
        "kMismatch",
        "kNoRow",
        "kOldLayout",
        "kOtherBase",
    ];
    assert_eq!(names.len(), Code::ALL.len());
    for (code, name) in Code::ALL.into_iter().zip(names) {
        assert!(resident.contains(&format!("{name} = {},", code as u32)), "{name}");
    }
    let body = resident.split("enum Status").nth(1).unwrap().split('}').next().unwrap();
    assert_eq!(body.matches(" = ").count(), 1 + Code::ALL.len());
    assert!(resident.contains(&format!("code << {SLOT_BITS} |")));
    let all = ["product.cuh", "entries.cuh", "batch.cuh", "resident.cuh", "sparse.cuh"]
        .map(|f| read(&format!("cuda/{f}")));
    assert!(all.concat().contains(&format!("kPanel = {SMALL_W_ROWS};")));
    assert!(read("cuda/stages.cuh").contains(&format!("kRowsOfW = {LARGE_W_ROWS};")));
    let rows = format!("kRowsOfX = sizeof(W) == 2 ? {} : {};", large_rows(false), large_rows(true));
    assert!(read("cuda/segments.cuh").contains(&rows));
    let sums = read("cuda/grad_sums.cuh");
    assert!(sums.contains(&format!("kRowsOfGrad = {GRAD_ROWS};")));
    assert!(sums.contains(&format!("kStripColumns = {GRAD_STRIP_BYTES} / sizeof(W);")));
    for file in
        ["digest", "embedding", "restore", "linear_small", "linear_segments", "linear_large", "linear_grad"]
            .map(|f| format!("cuda/{f}.cu"))
    {
        let file = &file;
        let text = read(file);
        assert!(text.contains("XORZ_KERNEL("));
        assert_eq!(
            text.matches("XORZ_KERNEL(").count(),
            text.matches(&format!("XORZ_KERNEL({THREADS}, ")).count()
        );
    }
    // What the library is built for is what the gate watches.
    let archs = |text: &str, from: &str, to: char| {
        let list = text.split(from).nth(1).unwrap().split(to).next().unwrap();
        list.split([',', ' ']).filter(|t| !t.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let gate = archs(&read("tests/cuda_gate/gate.py"), "ARCHS = (", ')');
    assert_eq!(gate.len(), 6);
    assert_eq!(archs(&read("cuda/CMakeLists.txt"), "set(XORZ_ARCHITECTURES ", 'C'), gate);
}

#[test]
fn restore_takes_a_block_for_each_16_rows_of_4096_columns() {
    for (n, k, blocks) in [
        (0, 5, 1),
        (1, 1, 1),
        (16, 4096, 1),
        (17, 4096, 2),
        (16, 4097, 2),
        (4096, 4096, 256),
        (16 * 1500, 1, 1500),
    ] {
        for dtype in Dtype::ALL {
            let (bits, shape) = (8 * dtype.word_bytes(), Shape { n, k });
            let both = plan::apply(dtype, shape).unwrap();
            // A verdict a block is read by each block of apply: of many there are not.
            for (launch, verb, blocks) in [
                (plan::restore(dtype, shape, &(0..n)).unwrap(), "restore", blocks),
                (both.verify, "verify", blocks.min(1024)),
                (both.apply, "apply", blocks),
            ] {
                assert_eq!(launch.grid, (blocks, 1), "{verb} {n} x {k}");
                assert_eq!(launch.entry.name(), format!("xorz_delta_{verb}_{bits}"));
                assert_eq!(ENTRIES[launch.entry.index()], launch.entry.name());
            }
            // And that of the digest, whose leaves are of 64 rows.
            assert_eq!(both.verdicts(), blocks.min(1024) as usize + 1);
            assert_eq!(both.workspace_bytes(), 32 + 16 * n.div_ceil(64) + 4 * both.verdicts());
        }
    }
}

#[test]
fn a_digest_takes_a_block_for_each_64_rows_and_one_more() {
    for (n, k, blocks) in [(0, 5, 1), (1, 1, 1), (64, 9, 1), (65, 0, 2), (4096, 4096, 64)] {
        let plan = plan::digest(Shape { n, k }).unwrap();
        assert_eq!((plan.leaves.entry.name(), plan.leaves.grid), ("xorz_digest_leaves", (blocks, 1)));
        assert_eq!((plan.root.entry.name(), plan.root.grid), ("xorz_digest_root", (1, 1)));
        assert_eq!(plan.workspace_bytes, 32 + 16 * n.div_ceil(64));
    }
    let refused = plan::digest(Shape { n: 1 << 31, k: 1 });
    assert_eq!(refused.unwrap_err().kind(), error::Kind::Unsupported);
}

#[test]
fn a_lookup_takes_a_block_for_each_row_and_4096_columns() {
    for (m, k, grid) in
        [(1, 1, (1, 1)), (70, 4096, (70, 1)), (3, 4097, (3, 2)), (2, i32::MAX as usize, (2, 65535))]
    {
        for dtype in Dtype::ALL {
            let launch = plan::embedding(dtype, m, 5, Shape { n: 10, k }).unwrap().unwrap();
            assert_eq!(launch.grid, grid);
            assert_eq!(launch.entry.name(), format!("xorz_delta_embedding_{}", 8 * dtype.word_bytes()));
        }
    }
    for (m, k) in [(0, 5), (5, 0)] {
        assert_eq!(plan::embedding(Dtype::U8, m, 5, Shape { n: 10, k }), Ok(None));
    }
    for (m, slots, n) in [(1 << 31, 1, 1), (1, 1 << 31, 1), (1, 1, 1 << 31)] {
        let refused = plan::embedding(Dtype::U8, m, slots, Shape { n, k: 1 });
        assert_eq!(refused.unwrap_err().kind(), error::Kind::Unsupported);
    }
}

fn of_one(m: usize) -> ProductRows {
    ProductRows { m, slots: None, deterministic: false }
}

fn small(dtype: Dtype, m: usize, shape: Shape) -> plan::Small {
    match plan::linear(dtype, of_one(m), shape).unwrap() {
        Product::Small(small) => small,
        other => panic!("{m} rows: {other:?}"),
    }
}

const COMPUTING: [(Dtype, &str); 3] = [(Dtype::BF16, "bf16"), (Dtype::F16, "f16"), (Dtype::F32, "f32")];

#[test]
fn few_rows_of_f32_take_blocks_of_4_and_all_others_16() {
    let shape = Shape { n: 33, k: 100 };
    for (dtype, name) in COMPUTING {
        let few = if dtype == Dtype::F32 { 4 } else { 16 };
        for (m, rows, y) in [(1, few, 1), (4, few, 1), (5, 16, 1), (16, 16, 1), (17, 16, 2), (32, 16, 2)] {
            let launches: Vec<_> = small(dtype, m, shape).launches().collect();
            assert_eq!(launches.len(), 1);
            let (launch, first, count) = launches[0];
            assert_eq!(launch.entry.name(), format!("xorz_linear_small_{name}_m{rows}"));
            assert_eq!((launch.grid, first, count), ((3, y), 0, m));
        }
    }
}

#[test]
fn many_rows_take_tiles_unless_tenants_would_leave_them_empty() {
    let shape = Shape { n: 130, k: 100 };
    for (dtype, name) in COMPUTING {
        for (m, slots, deterministic, tiles) in [
            (32, None, false, false),
            (33, None, false, true),
            (4096, None, false, true),
            (1, None, true, true),
            (5, Some(3), true, true),
            (64, Some(6), false, true),
            (64, Some(64), false, false),
            (512, Some(32), false, true),
            (512, Some(500), false, false),
        ] {
            let product = plan::linear(dtype, ProductRows { m, slots, deterministic }, shape).unwrap();
            let Product::Large(large) = product else {
                assert!(!tiles, "{m} rows of {slots:?} slots: {product:?}");
                continue;
            };
            assert!(tiles, "{m} rows of {slots:?} slots");
            let launch = large.segments;
            assert_eq!(
                (launch.entry.name(), launch.grid),
                (&format!("xorz_linear_segments_{name}")[..], (1, 1))
            );
            let (r, s) = (large_rows(dtype == Dtype::F32), slots.unwrap_or(1));
            let t = m.min(s + 2);
            assert_eq!(large.workspace_bytes, 64 + 144 * t + 16 * (m / r) + 4 * (s + 2) + 4 * m);
            let pairs = ((m / r + t) * 3) as u32;
            for multiprocessors in [1, 4, 108, u32::MAX] {
                let launch = large.tiles(multiprocessors);
                assert_eq!(launch.entry.name(), format!("xorz_linear_large_{name}"));
                assert_eq!(launch.grid, (pairs.min(multiprocessors.saturating_mul(2)), 1));
            }
        }
    }
}

#[test]
fn a_gradient_takes_a_block_for_each_strip_and_64_rows() {
    for (dtype, name) in COMPUTING {
        let four_byte = dtype == Dtype::F32;
        for (m, slots, k, strips) in
            [(1, None, 256, [1, 2]), (129, Some(3), 4097, [17, 33]), (5, None, 1, [1, 1])]
        {
            let rows = ProductRows { m, slots, deterministic: false };
            let large = plan::grad_input(dtype, rows, Shape { n: 30, k }).unwrap().unwrap();
            assert_eq!(large.segments.entry.name(), format!("xorz_linear_segments_{name}"));
            let (r, s) = (large_rows(four_byte), slots.unwrap_or(1));
            let t = m.min(s + 2);
            assert_eq!(large.workspace_bytes, 64 + 144 * t + 16 * (m / r) + 4 * (s + 2) + 4 * m);
            let launch = large.tiles(1 << 20);
            let pairs = (m / r + t) * strips[usize::from(four_byte)] * r / 64;
            assert_eq!(
                (launch.entry.name(), launch.grid),
                (&format!("xorz_linear_grad_{name}")[..], (pairs as u32, 1))
            );
            assert_eq!(large.tiles(1).grid, (pairs.min(2) as u32, 1));
        }
        for (m, k) in [(0, 5), (5, 0)] {
            let rows = ProductRows { m, slots: None, deterministic: false };
            assert_eq!(plan::grad_input(dtype, rows, Shape { n: 3, k }), Ok(None));
        }
    }
    for (dtype, m, n) in [(Dtype::U8, 1, 1), (Dtype::F32, 1 << 31, 1), (Dtype::F32, 1, 1 << 31)] {
        let refused = plan::grad_input(dtype, of_one(m), Shape { n, k: 1 });
        assert_eq!(refused.unwrap_err().kind(), error::Kind::Unsupported);
    }
}

#[test]
fn no_launch_passes_a_limit_and_none_is_empty() {
    let shape = Shape { n: 40, k: 8 };
    let most = 16 * MOST_BLOCKS.1 as usize;
    for m in [33, most, most + 1, 3 * most + 5, i32::MAX as usize] {
        // More tenants than tiles are worth.
        let rows = ProductRows { m, slots: Some(i32::MAX as usize), deterministic: false };
        let Product::Small(small) = plan::linear(Dtype::F16, rows, shape).unwrap() else { panic!("{m}") };
        let mut next = 0;
        for (launch, first, rows) in small.launches() {
            assert_eq!(first, next);
            assert!(
                rows > 0 && launch.grid == (3, rows.div_ceil(16) as u32) && launch.grid.1 <= MOST_BLOCKS.1
            );
            next += rows;
        }
        assert_eq!(next, m);
        let rows = ProductRows { deterministic: true, ..rows };
        let Product::Large(large) = plan::linear(Dtype::F16, rows, shape).unwrap() else { panic!("{m}") };
        assert!(large.tiles(u32::MAX).grid.0 <= MOST_BLOCKS.0 && large.tiles(0).grid == (1, 1));
    }
    for (m, n) in [(0, 40), (5, 0), (0, 0)] {
        for deterministic in [false, true] {
            let rows = ProductRows { m, slots: None, deterministic };
            assert_eq!(plan::linear(Dtype::F16, rows, Shape { n, k: 8 }).unwrap(), Product::Nothing);
        }
    }
    let tall = small(Dtype::F32, 1, Shape { n: i32::MAX as usize, k: 1 });
    assert!(
        tall.launches()
            .all(|(l, ..)| l.grid.0 <= MOST_BLOCKS.0 && l.grid.0 as usize * 16 >= i32::MAX as usize)
    );
}

#[test]
fn what_the_kernels_cannot_count_is_refused() {
    let kind = |r: error::Result<()>| r.map_err(|e| e.kind());
    let refused = Err(error::Kind::Unsupported);
    for shape in [
        Shape { n: 1 << 31, k: 1 },
        Shape { n: 1, k: 1 << 31 },
        Shape { n: i32::MAX as usize, k: i32::MAX as usize },
    ] {
        assert_eq!(kind(plan::restore(Dtype::U8, shape, &(0..shape.n)).map(|_| ())), refused);
        assert_eq!(kind(plan::apply(Dtype::U8, shape).map(|_| ())), refused);
        assert_eq!(kind(plan::linear(Dtype::F32, of_one(1), shape).map(|_| ())), refused);
    }
    let shape = Shape { n: 1, k: 1 };
    assert_eq!(kind(plan::linear(Dtype::F32, of_one(1 << 31), shape).map(|_| ())), refused);
    for dtype in Dtype::ALL.into_iter().filter(|d| !d.computes()) {
        assert_eq!(kind(plan::linear(dtype, of_one(1), shape).map(|_| ())), refused, "{dtype}");
    }
}

#[test]
fn each_status_names_the_op_the_device_and_the_slot() {
    use error::Kind::{Corrupt, Internal, InvalidArgument, Mismatch};
    let kinds =
        [Corrupt, InvalidArgument, InvalidArgument, InvalidArgument, Corrupt, Mismatch, InvalidArgument];
    for op in Op::ALL {
        for (code, kind) in Code::ALL.into_iter().zip(kinds) {
            let e = status::error(op, 3, (code as u32) << SLOT_BITS | 77);
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.message().contains(&format!("an earlier {} on cuda:3", op.name())), "{e}");
            let of_slots = matches!(op, Op::Grouped | Op::Embedding | Op::GroupedGradInput)
                && code != Code::NoRow
                || matches!(code, Code::NoTenant | Code::BadSlot);
            assert_eq!(e.message().contains("slot 77"), of_slots, "{e}");
            assert_eq!(e.message().contains("indices[77]"), code == Code::NoRow, "{e}");
        }
        assert_eq!(status::error(op, 0, 0x7F00_0000).kind(), Internal);
    }
}
