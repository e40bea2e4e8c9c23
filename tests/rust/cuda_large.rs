//! Promise: products of many rows on CUDA (`cuda/linear_segments.cu`, `cuda/linear_large.cu`), run on the host from their own
//! source, are those of the fine-tuned weights, in any mix of tenants, whenever asynchronous copies land.

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/kernels.rs"]
mod kernels;
#[path = "common/linear.rs"]
mod linear;

use common::{Rng, adversarial, perturbed, value, word};
use device::Param;
use kernels::{
    Fleet, LARGE_WORKSPACE, LINEAR_OUT, LINEAR_STATUS, Large, Linear, assert_streams, device, maps, nudged,
    on_tiles, run_large, status,
};
use linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

/// One tenant's product.
fn alone<'a>(case: &'a Case, x: &'a [u8], m: usize) -> Linear<'a> {
    Linear {
        dtype: case.dtype,
        shape: case.shape,
        base: &case.base,
        x,
        m,
        arena: &case.blob,
        slots: None,
        tenant_of_row: None,
        biases: None,
        rows: 16,
        seed: 1,
    }
}

#[test]
fn one_hot_x_gives_the_fine_tuned_column_exactly() {
    let (device, mut rng) = (device(), Rng::new(181));
    for dtype in [Dtype::BF16, Dtype::F16] {
        for (n, k) in [(70, 139), (67, 288)] {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            let far = perturbed(&mut rng, dtype, &base, 0.3);
            let near = nudged(&mut rng, 2, &base, 4, 0);
            let x: Vec<u8> =
                (0..k * k).flat_map(|i| word(dtype, f64::from(u8::from(i / k == i % k)))).collect();
            let cases: Vec<_> = ENCODINGS
                .iter()
                .map(|&encoding| {
                    let fine_tuned = if encoding == Encoding::Exponent { &near } else { &far };
                    let case = Case::new(dtype, shape, encoding, &base, fine_tuned);
                    assert_streams(&case.blob);
                    case
                })
                .collect();
            let all: Vec<_> =
                cases.iter().enumerate().map(|(i, c)| alone(c, &x, k).large(None, i % 2 == 0)).collect();
            for (after, case) in run_large(&device, &all).unwrap().iter().zip(&cases) {
                assert_eq!(status(after, LINEAR_STATUS), 0);
                for (i, y) in after[LINEAR_OUT].bytes.chunks(2).enumerate() {
                    let (j, r) = (i / n, i % n);
                    let want = value(dtype, &case.fine_tuned[(r * k + j) * 2..][..2]);
                    assert!(value(dtype, y) == want, "{} row {r} column {j}", case.name());
                }
            }
        }
    }
}

/// Every map of `m` rows as a product, early and late, on few blocks or many.
fn mixes(fleet: &Fleet, rng: &mut Rng, m: usize, x: &[u8]) -> Vec<(Large, Vec<i32>)> {
    let one = |(i, map): (usize, Vec<i32>)| {
        let blocks = [None, Some(1), Some(3)][(rng.next() % 3) as usize];
        (fleet.large(x, &map, blocks, i % 2 == 0, rng.next() % 3), map)
    };
    maps(&mut Rng::new(m as u64), m).into_iter().enumerate().map(one).collect()
}

fn run(device: &device::Device, mixes: &[(Large, Vec<i32>)]) -> Vec<Vec<device::After>> {
    run_large(device, &mixes.iter().map(|m| m.0.clone()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn exact_sums_equal_float64_bit_for_bit_in_any_mix() {
    let (device, mut rng) = (device(), Rng::new(182));
    for dtype in DTYPES {
        for (n, k, m) in [(70, 259, 40), (1, 600, 3), (129, 33, 150), (16, 1, 260), (66, 1032, 20), (18, 4360, 17)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, m * k, 3);
            let mixes = mixes(&fleet, &mut rng, m, &x);
            for (after, (_, map)) in run(&device, &mixes).iter().zip(&mixes) {
                assert_eq!(status(after, LINEAR_STATUS), 0, "{dtype} {shape} {map:?}");
                let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &fleet.reference(&x, map));
                assert_eq!(difference, None, "{dtype} {shape} {map:?}");
            }
        }
    }
}
