//! Promise: the kernels of `cuda/` move the bytes that must move and few more: 32-byte sectors, counted while
//! they run on the host. `bytes.rs` has the tables.

use crate::common::data::{Rng, perturbed};
use crate::common::device::{After, Device, Launch, Param};
use crate::common::kernels::{LINEAR_OUT, LINEAR_STATUS, Linear, nudged, restore, run_large, status};
use crate::common::linear::Case;
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

const DTYPE: Dtype = Dtype::BF16;

/// What a launch moved: distinct sectors, and those of every block, by parameter.
struct Moved {
    distinct: f64,
    blocks: f64,
    base_by_blocks: f64,
}

fn moved(device: &Device, mut launch: Launch, base_at: usize) -> (Moved, Vec<After>) {
    launch.count = true;
    let base = match &launch.params[base_at] {
        Param::In(bytes, _) | Param::Out(bytes, _) => bytes.len() as f64,
        _ => 0.0,
    };
    let after = device.run(&[launch]).unwrap().remove(0);
    let sum = |f: &dyn Fn(&After) -> u64| 32.0 * after.iter().map(f).sum::<u64>() as f64;
    let moved = Moved {
        distinct: sum(&|a| a.sectors.0),
        blocks: sum(&|a| a.sectors.1),
        base_by_blocks: 32.0 * after[base_at].sectors.1 as f64 / base,
    };
    (moved, after)
}

/// A tenant whose words changed in `share` of the places; all of them a little where it is `exponent`.
fn case(rng: &mut Rng, shape: Shape, base: &[u8], encoding: Encoding, share: f64) -> Case {
    let fine_tuned = match encoding {
        // 3 bits a word and some exceptions: about the 3.5 bits of a full fine-tune.
        Encoding::Exponent => {
            let near = nudged(rng, 2, base, 3, 0);
            let far = perturbed(rng, DTYPE, base, 1.0);
            rng.mix(DTYPE, &near, &far, 0.01)
        }
        _ => perturbed(rng, DTYPE, base, share),
    };
    Case::new(DTYPE, shape, encoding, base, &fine_tuned)
}

const KINDS: [(Encoding, f64); 5] = [
    (Encoding::Sparse, 0.01),
    (Encoding::Sparse, 0.05),
    (Encoding::Sparse, 0.30),
    (Encoding::Exponent, 1.0),
    (Encoding::Raw, 1.0),
];

const SHAPE: Shape = Shape { n: 64, k: 4096 };

#[test]
fn restore_moves_little_more_than_it_must() {
    let (device, mut rng, shape) = (Device::new("plain", &["-O2"]), Rng::new(51), SHAPE);
    let base = rng.weights(DTYPE, shape.n * shape.k);
    println!("| {shape} bf16 | must move, MB | distinct sectors | sectors by block |\n|---|---|---|---|");
    for (encoding, share) in KINDS {
        let case = case(&mut rng, shape, &base, encoding, share);
        for apply in [false, true] {
            let blocks = shape.n.div_ceil(16) as u32;
            let launch = restore(apply, (2, shape), 2, &base, &case.blob, blocks, 0);
            let (moved, after) = moved(&device, launch, 0);
            assert!(after[usize::from(!apply)].bytes == case.fine_tuned);
            // Apply of entries touches what changed, and of raw no base: the sum of both is an upper bound
            // for it.
            let all =
                2 * base.len() * usize::from(!apply) + base.len() * usize::from(apply) + case.blob.len();
            let must = all - usize::from(encoding == Encoding::Raw && !apply) * base.len();
            let verb = if apply { "apply" } else { "restore" };
            let (d, b) = (moved.distinct / must as f64, moved.blocks / must as f64);
            println!("| {verb} {encoding} {share} | {:.2} | {d:.3} | {b:.3} |", must as f64 / 1e6);
            assert!(d <= 1.02 && b <= 1.10, "{verb} {encoding} {share}: {d} {b}");
        }
    }
}

#[test]
fn small_products_read_the_base_once_and_each_tenants_tiles_once() {
    let (device, mut rng, shape) = (Device::new("plain", &["-O2"]), Rng::new(52), SHAPE);
    let Shape { n, k } = shape;
    let base = rng.weights(DTYPE, n * k);
    println!(
        "| {shape} bf16 | must move, MB | distinct sectors | base by block | sectors by block |\n|---|---|---|---|---|"
    );
    for (encoding, share) in KINDS {
        let cases: Vec<_> = (0..8).map(|_| case(&mut rng, shape, &base, encoding, share)).collect();
        for (m, tenants) in [(1, 1), (8, 1), (8, 8), (16, 8)] {
            let (mut arena, mut slots) = (vec![], vec![]);
            for case in &cases[..tenants] {
                slots.push([arena.len() as i64, case.blob.len() as i64]);
                arena.extend_from_slice(&case.blob);
            }
            let map: Vec<i32> = (0..m).map(|i| (i % tenants) as i32).collect();
            let x = rng.weights(DTYPE, m * k);
            let launch = Linear {
                dtype: DTYPE,
                shape,
                base: &base,
                x: &x,
                m,
                arena: &arena,
                slots: Some(&slots),
                tenant_of_row: Some(&map),
                biases: None,
                rows: if m <= 4 { 4 } else { 16 },
                seed: 0,
            };
            let (moved, after) = moved(&device, launch.launch(), 1);
            let own = encoding == Encoding::Raw;
            let must = arena.len() + x.len() + after[LINEAR_OUT].bytes.len() + usize::from(!own) * base.len();
            let (d, b) = (moved.distinct / must as f64, moved.blocks / must as f64);
            println!(
                "| m {m}, {tenants} x {encoding} {share} | {:.2} | {d:.3} | {:.3} | {b:.2} |",
                must as f64 / 1e6,
                moved.base_by_blocks
            );
            assert!(d <= 1.02, "{encoding} {share} m {m}: {d}");
            assert!(moved.base_by_blocks <= 1.001, "{encoding} {share} m {m}: base {}", moved.base_by_blocks);
        }
    }
}

#[test]
fn large_products_read_base_and_deltas_once_for_a_tile_of_rows_of_x() {
    let (device, mut rng, shape) = (Device::new("plain", &["-O2"]), Rng::new(53), SHAPE);
    let Shape { n, k } = shape;
    let base = rng.weights(DTYPE, n * k);
    println!(
        "| {shape} bf16 | must move, MB | distinct | base, by block | all, by block |\n|---|---|---|---|---|"
    );
    for (encoding, share) in KINDS {
        let cases: Vec<_> = (0..4).map(|_| case(&mut rng, shape, &base, encoding, share)).collect();
        for (m, tenants) in [(64, 1), (64, 4), (512, 1), (512, 4)] {
            if (m, tenants) == (512, 1) && encoding != Encoding::Exponent {
                continue;
            }
            let (mut arena, mut slots) = (vec![], vec![]);
            for case in &cases[..tenants] {
                slots.push([arena.len() as i64, case.blob.len() as i64]);
                arena.extend_from_slice(&case.blob);
            }
            let map: Vec<i32> = (0..m).map(|i| (i % tenants) as i32).collect();
            let x = rng.weights(DTYPE, m * k);
            let linear = Linear {
                dtype: DTYPE,
                shape,
                base: &base,
                x: &x,
                m,
                arena: &arena,
                slots: Some(&slots),
                tenant_of_row: Some(&map),
                biases: None,
                rows: 16,
                seed: 0,
            };
            let mut large = linear.large(None, false);
            large.product.count = true;
            let after = run_large(&device, &[large]).unwrap().remove(0);
            assert_eq!(status(&after, LINEAR_STATUS), 0);
            let own = encoding == Encoding::Raw;
            let must = arena.len() + x.len() + after[LINEAR_OUT].bytes.len() + usize::from(!own) * base.len();
            let bytes = |f: &dyn Fn(&After) -> u64| 32.0 * after.iter().map(f).sum::<u64>() as f64;
            let by_block = 32.0 * after[1].sectors.1 as f64 / base.len() as f64;
            let (d, b) = (bytes(&|a| a.sectors.0) / must as f64, bytes(&|a| a.sectors.1) / must as f64);
            println!(
                "| m {m}, {tenants} x {encoding} {share} | {:.2} | {d:.3} | {by_block:.3} | {b:.2} |",
                must as f64 / 1e6
            );
            assert!(d <= 1.02, "{encoding} {share} m {m}: {d}");
            let tiles = tenants * (m / tenants).div_ceil(128);
            assert!(
                own || (by_block - tiles as f64).abs() <= 0.001 * tiles as f64,
                "{encoding} m {m}: {by_block}"
            );
        }
    }
}
