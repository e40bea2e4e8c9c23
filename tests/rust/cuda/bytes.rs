//! Promise: `cuda/BYTES.md` says what the kernels of `cuda/` move: written by
//! `cargo test --test cuda bytes:: -- --ignored`, and compared here where that is quick.

use crate::common::data::{Rng, perturbed};
use crate::common::device::{After, root};
use crate::common::kernels::{LINEAR_OUT, LINEAR_STATUS, Linear, device, nudged, restore, run_large, status};
use crate::common::linear::Case;
use std::fmt::Write;
use xorz::codec::Encoding;
use xorz::cuda::plan::{self, Product};
use xorz::matrix::{Dtype, Shape};

const DTYPE: Dtype = Dtype::BF16;
const SHAPES: [(usize, usize); 3] = [(4096, 4096), (11008, 4096), (4096, 11008)];
/// Rows of x and tenants among them; 16 rows are of 16 tenants at most.
const BATCHES: [(usize, usize); 12] = [
    (1, 1),
    (8, 1),
    (8, 8),
    (16, 1),
    (16, 8),
    (16, 16),
    (64, 1),
    (64, 8),
    (64, 32),
    (512, 1),
    (512, 8),
    (512, 32),
];
/// Rows of W that are counted: one panel of `linear_large`, four of `linear_small`, four tiles of restore.
/// All panels are alike.
const COUNTED: usize = 64;
/// Published peaks: GB/s of memory, TFLOP/s of f32 FMAs, and of dense bf16 products. A100 40 GB SXM; H100 80
/// GB SXM.
const PEAKS: [(f64, f64, f64); 2] = [(1555.0, 19.5, 312.0), (3350.0, 66.9, 989.4)];

/// The changes that a delta holds, and how.
#[derive(Clone, Copy)]
struct Change {
    name: &'static str,
    encoding: Encoding,
    share: f64,
}

const CHANGES: [Change; 4] = [
    Change { name: "1 %", encoding: Encoding::Sparse, share: 0.01 },
    Change { name: "5 %", encoding: Encoding::Sparse, share: 0.05 },
    Change { name: "30 %", encoding: Encoding::Sparse, share: 0.30 },
    Change { name: "exponent", encoding: Encoding::Exponent, share: 0.01 },
];

/// Tenants of [`COUNTED`] rows of `k` columns.
struct Sample {
    change: Change,
    k: usize,
    cases: Vec<Case>,
    rng: Rng,
}

impl Sample {
    fn new(k: usize, change: Change, tenants: usize) -> Self {
        let mut rng = Rng::new(k as u64 + (change.share * 100.0) as u64 + 1000 * change.encoding as u64);
        let shape = Shape { n: COUNTED, k };
        let base = rng.weights(DTYPE, COUNTED * k);
        let cases = (0..tenants).map(|_| {
            let fine_tuned = match change.encoding {
                // 3 bits a word, and exceptions.
                Encoding::Exponent => {
                    let near = nudged(&mut rng, 2, &base, 3, 0);
                    let far = perturbed(&mut rng, DTYPE, &base, 1.0);
                    rng.mix(DTYPE, &near, &far, change.share)
                }
                _ => perturbed(&mut rng, DTYPE, &base, change.share),
            };
            Case::new(DTYPE, shape, change.encoding, &base, &fine_tuned)
        });
        let cases = cases.collect();
        Self { change, k, cases, rng }
    }
}

/// Bytes, of a whole matrix of `n` rows: what must move, and what does by three ways of counting.
struct Moved {
    must: f64,
    distinct: f64,
    x_once: f64,
    by_block: f64,
}

impl Moved {
    fn cells(&self) -> String {
        let ratio = |v: f64| format!("{:.2}", v / self.must);
        let missed = if self.x_once > 1.10 * self.must { " *" } else { "" };
        let (a, b, c) = (ratio(self.distinct), ratio(self.x_once), ratio(self.by_block));
        format!("{:.1} | {a} | {b}{missed} | {c}", self.must / 1e6)
    }
}

fn sectors(after: &After) -> (f64, f64) {
    (32.0 * after.sectors.0 as f64, 32.0 * after.sectors.1 as f64)
}

/// Bytes of 32-byte sectors of the matrix in which a word changes.
fn changed(case: &Case) -> usize {
    32 * case.base.chunks(32).zip(case.fine_tuned.chunks(32)).filter(|(a, b)| a != b).count()
}

/// `delta_restore`, or `delta_apply_`, which reads and writes a word in place.
fn restored(sample: &Sample, apply: bool, n: usize) -> Moved {
    let (case, scale) = (&sample.cases[0], n as f64 / COUNTED as f64);
    let shape = case.shape;
    let mut launch = restore(
        apply,
        (2, shape),
        2,
        &case.base,
        &case.blob,
        (COUNTED / 16 * shape.k.div_ceil(4096)) as u32,
        0,
    );
    launch.count = true;
    let after = device().run(&[launch]).unwrap().remove(0);
    assert!(after[usize::from(!apply)].bytes == case.fine_tuned);
    let words = match sample.change.encoding {
        Encoding::Sparse if apply => changed(case),
        _ => case.base.len(),
    };
    let twice = if apply { 2.0 } else { 1.0 };
    let sum =
        |f: &dyn Fn(&After) -> f64| scale * (twice * f(&after[0]) + after[1..].iter().map(f).sum::<f64>());
    let (distinct, by_block) = (sum(&|a| sectors(a).0), sum(&|a| sectors(a).1));
    let must = scale * (2 * words + case.blob.len()) as f64;
    Moved { must, distinct, x_once: by_block, by_block }
}

/// A product of `m` rows of `tenants`, by tiles of one tenant's rows (`large`) or rows of any.
fn product(sample: &mut Sample, (m, tenants): (usize, usize), large: bool, n: usize) -> Moved {
    let (mut arena, mut slots) = (vec![], vec![]);
    for case in &sample.cases[..tenants] {
        slots.push([arena.len() as i64, case.blob.len() as i64]);
        arena.extend_from_slice(&case.blob);
    }
    let map: Vec<i32> = (0..m).map(|i| (i % tenants) as i32).collect();
    let x = sample.rng.weights(DTYPE, m * sample.k);
    let base = &sample.cases[0].base;
    let linear = Linear {
        dtype: DTYPE,
        shape: Shape { n: COUNTED, k: sample.k },
        base,
        x: &x,
        m,
        arena: &arena,
        slots: Some(&slots),
        tenant_of_row: Some(&map),
        biases: None,
        rows: if m <= 4 { 4 } else { 16 },
        seed: 0,
    };
    let after = if large {
        let mut large = linear.large(None, false);
        large.product.count = true;
        run_large(&device(), &[large]).unwrap().remove(0)
    } else {
        let mut launch = linear.launch();
        launch.count = true;
        device().run(&[launch]).unwrap().remove(0)
    };
    assert_eq!(status(&after, LINEAR_STATUS), 0);
    // x is the same for all panels; what else is there is a panel's own.
    let scale = n as f64 / COUNTED as f64;
    let sum = |f: &dyn Fn(&After) -> f64| after[1..].iter().map(f).sum::<f64>();
    let once = x.len() as f64;
    Moved {
        must: scale * (base.len() + arena.len() + after[LINEAR_OUT].bytes.len()) as f64 + once,
        distinct: scale * sum(&|a| sectors(a).0) + once,
        x_once: scale * sum(&|a| sectors(a).1) + once,
        by_block: scale * (sum(&|a| sectors(a).1) + sectors(&after[0]).1),
    }
}

/// The time that memory or arithmetic takes at least, on each of [`PEAKS`].
fn bounds(must: f64, flop: f64, mma: bool) -> String {
    let one = |(memory, fma, tensor): (f64, f64, f64)| {
        let (bytes, sums) = (must / memory / 1e3, flop / if mma { tensor } else { fma } / 1e6);
        let what = if bytes >= sums {
            ""
        } else if mma {
            " mma"
        } else {
            " FMA"
        };
        format!("{:.1}{what}", bytes.max(sums))
    };
    PEAKS.map(one).join(" | ")
}

/// Whether the host side would take tiles of one tenant's rows.
fn plans_tiles((m, tenants): (usize, usize), shape: Shape) -> bool {
    let rows = plan::ProductRows { m, slots: Some(tenants), deterministic: false };
    matches!(plan::linear(DTYPE, rows, shape).unwrap(), Product::Large(_))
}

fn restore_rows(to: &mut String, sample: &Sample, n: usize) {
    for (apply, verb) in [(false, "delta_restore"), (true, "delta_apply_")] {
        let moved = restored(sample, apply, n);
        let (name, bounds) = (sample.change.name, bounds(moved.must, 0.0, false));
        writeln!(to, "| {name} | | | {verb} | {} | | {bounds} |", moved.cells()).unwrap();
    }
}

fn product_rows(to: &mut String, sample: &mut Sample, n: usize, batches: &[(usize, usize)]) {
    for &batch in batches {
        let chosen = plans_tiles(batch, Shape { n, k: sample.k });
        // Both ways where either may be taken.
        for large in [false, true].into_iter().filter(|&large| large == chosen || batch.0 == 64) {
            let moved = product(sample, batch, large, n);
            let flop = 2.0 * (batch.0 * n * sample.k) as f64;
            let kernel = if large { "linear_large" } else { "linear_small" };
            let other = if large == chosen { "" } else { " (not planned)" };
            let (name, (m, t)) = (sample.change.name, batch);
            let (cells, bounds) = (moved.cells(), bounds(moved.must, flop, batch.0 > 2));
            writeln!(to, "| {name} | {m} | {t} | {kernel}{other} | {cells} | {:.2} | {bounds} |", flop / 1e9)
                .unwrap();
            assert!(moved.distinct <= 1.10 * moved.must, "{name} m {m} of {t}: {cells}");
            assert!(batch.0 > 16 || moved.x_once <= 1.10 * moved.must, "{name} m {m} of {t}: {cells}");
        }
    }
}

/// Those of [`BATCHES`] that every run counts again, for each of [`CHANGES`].
const QUICK: [&[(usize, usize)]; 4] = [&[(1, 1), (64, 1)], &[(8, 8)], &[(8, 1)], &[(8, 8)]];

/// What the tables mean.
const TEXT: &str = include_str!("bytes.md");
const HEAD: &str = "\
| changed | m | T | kernel | must move, MB | once | x in L2 | by block | GFLOP | A100, us | H100, us |
|---|---|---|---|---|---|---|---|---|---|---|
";

#[test]
#[ignore = "writes cuda/BYTES.md: minutes"]
fn the_table_is_written() {
    let mut text = TEXT.to_owned();
    let mut tables = SHAPES.map(|(n, k)| format!("\n## {n} x {k}\n\n{HEAD}"));
    for k in [4096, 11008] {
        for change in CHANGES {
            let mut sample = Sample::new(k, change, 32);
            for ((n, _), table) in SHAPES.iter().zip(&mut tables).filter(|((_, of), _)| *of == k) {
                restore_rows(table, &sample, *n);
                product_rows(table, &mut sample, *n, &BATCHES);
            }
            println!("{k} columns, {}", change.name);
        }
    }
    tables.iter().for_each(|table| text += table);
    std::fs::write(root("cuda/BYTES.md"), text).unwrap();
}

#[test]
fn the_table_is_of_these_kernels() {
    let written = std::fs::read_to_string(root("cuda/BYTES.md")).unwrap();
    assert!(written.starts_with(TEXT), "the text has changed");
    let each = CHANGES.len() * (2 + BATCHES.len() + BATCHES.iter().filter(|b| b.0 == 64).count());
    let rows = written.lines().filter(|l| CHANGES.iter().any(|c| l.starts_with(&format!("| {} |", c.name))));
    assert_eq!(rows.count(), SHAPES.len() * each);
    let section = written.split("\n## ").find(|s| s.starts_with("4096 x 4096\n")).unwrap();
    for (change, batches) in CHANGES.into_iter().zip(QUICK) {
        let (mut rows, mut sample) = (String::new(), Sample::new(4096, change, 8));
        restore_rows(&mut rows, &sample, 4096);
        product_rows(&mut rows, &mut sample, 4096, batches);
        for row in rows.lines() {
            assert!(section.contains(row), "cuda/BYTES.md has not {row}; write it anew");
        }
    }
}
