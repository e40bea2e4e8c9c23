//! Promise: a panel of rows that `restore.cu` restores has the words of those rows and no others, bit for bit, whatever the
//! encoding and however tall the tiles; and many rows of one tenant are planned as panels where the docs say so.

use crate::common::data::Rng;
use crate::common::device::{After, Device, Launch, Param};
use crate::common::gpu::{Gpu, passes};
use crate::common::kernels::{device, nudged, on_tiles, restore, status, tuned};
use crate::common::linear::{Case, ENCODINGS};
use crate::common::mutants::{Mutant, all_caught};
use std::ops::Range;
use xorz::codec::Encoding;
use xorz::cuda::plan::{self, ProductRows, TALLEST_TILE};
use xorz::cuda::{self, DeviceDelta};
use xorz::error;
use xorz::matrix::{Dtype, Shape};

/// Rows `rows` of `case`, to memory that has room for no more.
fn panel(case: &Case, blob: &[u8], rows: &Range<usize>, blocks: u32) -> Launch {
    let w = case.dtype.word_bytes();
    let mut launch = restore(false, (case.dtype as u32, case.shape), w, &case.base, blob, blocks, 1);
    launch.params[1] = Param::Out(vec![0x5A; rows.len() * case.shape.k * w], 0);
    launch.params[8] = Param::U64(rows.start as u64);
    launch.params[9] = Param::U64(rows.len() as u64);
    launch
}

/// The fine-tuned words of those rows.
fn wanted<'a>(case: &'a Case, rows: &Range<usize>) -> &'a [u8] {
    let row = case.shape.k * case.dtype.word_bytes();
    &case.fine_tuned[rows.start * row..rows.end * row]
}

fn panels_of(n: usize) -> Vec<Range<usize>> {
    let ends: Vec<_> = (0..n).step_by(TALLEST_TILE).chain([n]).collect();
    let mut all: Vec<_> = ends.windows(2).map(|w| w[0]..w[1]).collect();
    all.extend([0..n, 0..0, n..n]);
    all.extend((n > TALLEST_TILE).then_some(TALLEST_TILE..n));
    all
}

/// Of every encoding, and of tiles of 16 to 256 rows.
fn cases(rng: &mut Rng, dtype: Dtype) -> Vec<(Case, Vec<u8>)> {
    let mut cases = vec![];
    for (n, k) in [(600, 300), (512, 17), (256, 260), (40, 33)] {
        let shape = Shape { n, k };
        let base = rng.weights(dtype, n * k);
        let fine_tuned = tuned(rng, dtype, &base, 0.05);
        for encoding in ENCODINGS {
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            let blob = case.blob.clone();
            cases.push((case, blob));
        }
        let near = nudged(rng, dtype.word_bytes(), &base, 4, 0);
        let near = rng.mix(dtype, &near, &fine_tuned, 0.02);
        for (rows, cols) in [(16, 256), (64, 512), (256, 256)] {
            let case = Case::new(dtype, shape, Encoding::Exponent, &base, &near);
            let blob = on_tiles(&case, rows, cols);
            cases.push((case, blob));
        }
    }
    cases
}

fn words_of_panels(device: &Device, dtypes: &[Dtype]) -> Result<(), String> {
    let mut rng = Rng::new(171);
    for &dtype in dtypes {
        let cases = cases(&mut rng, dtype);
        let each = |(case, blob): &(Case, Vec<u8>)| {
            let all = panels_of(case.shape.n);
            all.iter().map(|rows| panel(case, blob, rows, 3)).collect::<Vec<_>>()
        };
        let launches: Vec<_> = cases.iter().flat_map(each).collect();
        let after = device.run(&launches)?;
        let mut next = after.iter();
        for (case, _) in &cases {
            for rows in panels_of(case.shape.n) {
                let after: &Vec<After> = next.next().unwrap();
                let name = format!("rows {rows:?} of {}", case.name());
                if status(after, 7) != 0 || after[1].bytes != wanted(case, &rows) {
                    return Err(format!("{name}: status {}", status(after, 7)));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn panels_have_the_words_of_their_rows() {
    words_of_panels(&device(), &[Dtype::BF16, Dtype::F32, Dtype::U8, Dtype::F64]).unwrap();
}

#[test]
fn a_delta_that_does_not_fit_gives_nan_in_the_panel() {
    let mut rng = Rng::new(172);
    let shape = Shape { n: 600, k: 300 };
    let base = rng.weights(Dtype::BF16, 600 * 300);
    let case = Case::new(Dtype::BF16, shape, Encoding::Sparse, &base, &base);
    let mut blob = case.blob.clone();
    blob[0] ^= 1;
    let after = device().run(&[panel(&case, &blob, &(256..512), 3)]).unwrap().remove(0);
    assert!(status(&after, 7) != 0 && after[1].bytes.iter().all(|b| *b == 0xFF));
}

const MUTANTS: [Mutant; 8] = [
    ("tiles from the first on", "restore.cu", "each_tile_of_block(", "(panel.from >> v.rows_log2)", "(0)"),
    ("as many tiles", "restore.cu", "each_tile_of_block(", "((panel.from + panel.rows +", "((panel.rows +"),
    ("the last tile's rows", "restore.cu", "each_tile_of_block(", " + v.tile_rows() - 1)", ")"),
    ("the base's first words", "restore.cu", "case kUnchanged", "base + first", "base"),
    ("the payload's first words", "restore.cu", "case kRaw", "v.payload) + first", "v.payload)"),
    ("all words", "restore.cu", "each_tile_of_block(", "words = panel.rows * v.k", "words = v.n * v.k"),
    ("the panel where the matrix is", "restore.cu", "xorz_delta_restore_", "out - row_from * k", "out"),
    (
        "tiles of exponent from the first on",
        "restore.cu",
        "Tiles go to blocks first",
        "tile = tile_from + block_x()",
        "tile = block_x()",
    ),
];

#[test]
fn mutants_of_panels_are_caught() {
    let list =
        "#include \"restore.cu\"\n#define XORZ_KERNELS(X) X(xorz_delta_restore_16) X(xorz_delta_apply_16)\n";
    all_caught(&MUTANTS, list, &[], |device| words_of_panels(device, &[Dtype::BF16]));
}

#[test]
fn many_rows_of_one_tenant_are_planned_as_panels_of_whole_tiles() {
    let rows = |m, slots, deterministic| ProductRows { m, slots, deterministic };
    let one = |m| rows(m, None, false);
    let shape = Shape { n: 4096, k: 4096 };
    for dtype in [Dtype::BF16, Dtype::F16] {
        assert_eq!(plan::panel_rows(dtype, one(33), shape), Some(4096));
        assert_eq!(plan::panel_rows(dtype, one(1 << 20), shape), Some(4096));
        for few in [one(0), one(1), one(32), rows(500, None, true), rows(500, Some(1), false)] {
            assert_eq!(plan::panel_rows(dtype, few, shape), None, "{few:?}");
        }
    }
    assert_eq!(plan::panel_rows(Dtype::F32, one(500), shape), None);
    assert_eq!(plan::panel_rows(Dtype::BF16, one(500), Shape { n: 0, k: 5 }), None);
    assert_eq!(plan::panel_rows(Dtype::BF16, one(500), Shape { n: 5, k: 0 }), None);
    // At most 64 MiB, unless one tile is more; every panel but the last as large as the others.
    for (n, k) in
        [(152_064, 4096), (28_672, 8192), (1, 1), (257, 1 << 20), (100_000, 33), (1 << 30, 2), (4090, 16_400)]
    {
        let rows = plan::panel_rows(Dtype::BF16, one(64), Shape { n, k }).unwrap();
        assert!(rows.is_multiple_of(TALLEST_TILE) && rows >= TALLEST_TILE);
        assert!(rows == TALLEST_TILE || rows * k * 2 <= 64 << 20, "{n} x {k}: {rows}");
        assert!(rows * n.div_ceil(rows) < n + rows);
        for from in (0..n).step_by(rows).take(3) {
            plan::restore(Dtype::BF16, Shape { n, k }, &(from..n.min(from + rows))).unwrap();
        }
    }
}

#[test]
fn rows_that_cut_a_tile_are_refused() {
    let shape = Shape { n: 600, k: 8 };
    for (from, to) in [(16, 600), (0, 300), (256, 601), (0, 0x1000), (512, 256)] {
        let said = plan::restore(Dtype::BF16, shape, &(from..to)).unwrap_err();
        assert_eq!(said.kind(), error::Kind::InvalidArgument);
        assert!(said.to_string().contains(&format!("rows {from} to {to} are no panel")), "{said}");
    }
}

#[test]
fn what_is_wrong_with_a_panels_delta_is_the_products() {
    passes(child_panel, "");
}

#[test]
#[ignore = "a child of what_is_wrong_with_a_panels_delta_is_the_products"]
fn child_panel() {
    let gpu = Gpu::new(0);
    let mut rng = Rng::new(173);
    let shape = Shape { n: 300, k: 64 };
    let base = rng.weights(Dtype::BF16, 300 * 64);
    let fine_tuned = tuned(&mut rng, Dtype::BF16, &base, 0.1);
    let case = Case::new(Dtype::BF16, shape, Encoding::Sparse, &base, &fine_tuned);
    let x = rng.weights(Dtype::BF16, 40 * 64);
    let (args, out) = (gpu.one_tenant(&case, &x, 40, &case.blob), gpu.put(&vec![0x5A; case.base.len()]));
    assert_eq!(args.panel_rows(), Some(512));
    // SAFETY: `out` has room for all rows.
    unsafe { cuda::delta_linear_panel(gpu.place(), &args, 256..300, out) }.unwrap();
    assert_eq!(gpu.get(out, 44 * 128), wanted(&case, &(256..300)));
    let broken = vec![7; case.blob.len()];
    let bad = gpu.one_tenant(&case, &x, 40, &broken);
    // SAFETY: as above.
    unsafe { cuda::delta_linear_panel(gpu.place(), &bad, 0..256, out) }.unwrap();
    let delta = DeviceDelta { address: args.arena, bytes: args.arena_bytes };
    // SAFETY: as above.
    let next = unsafe { cuda::delta_restore(gpu.place(), args.weight, 0..300, out, delta) };
    assert!(next.unwrap_err().to_string().contains("an earlier delta_linear"));
}
