//! Launches of the gradient's kernel (`cuda/linear_grad.cu`), and what they should give. Must hold no expectation.

use super::data::Rng;
use super::device::Param;
use super::kernels::{Fleet, LINEAR_OUT, Large, Linear, maps};
use super::linear::Case;

/// Rows of grad `[m, n]` times a tenant's weights: `linear.x` is grad. On `blocks` blocks, or enough.
pub fn grad(linear: &Linear<'_>, blocks: Option<usize>, late: bool) -> Large {
    let mut all = linear.large(Some(1), late);
    let (w, k) = (linear.dtype.word_bytes(), linear.shape.k);
    let strips = k.div_ceil(512 / w).max(1);
    let tiles = linear.m / 64 + linear.m.min(linear.slots.map_or(1, <[_]>::len) + 2);
    for launch in [&mut all.segments, &mut all.product] {
        launch.params[LINEAR_OUT] = Param::Out(vec![0x5A; linear.m * k * w], 0);
    }
    all.product.kernel = all.product.kernel.replace("large", "grad");
    all.product.blocks = (blocks.unwrap_or(2 * strips * tiles).max(1) as u32, 1);
    all
}

/// Rows of grad of tenants of a fleet.
pub fn fleet_grad(
    fleet: &Fleet,
    x: &[u8],
    map: &[i32],
    blocks: Option<usize>,
    late: bool,
    seed: u64,
) -> Large {
    let linear = Linear {
        dtype: fleet.dtype,
        shape: fleet.shape,
        base: &fleet.cases[0].base,
        x,
        m: map.len(),
        arena: &fleet.arena,
        slots: Some(&fleet.slots),
        tenant_of_row: Some(map),
        biases: None,
        rows: 16,
        seed,
    };
    grad(&linear, blocks, late)
}

/// In f64, row by row.
pub fn fleet_reference(fleet: &Fleet, x: &[u8], map: &[i32]) -> Vec<f64> {
    let row = fleet.shape.n * fleet.dtype.word_bytes();
    let one = |(i, &t): (usize, &i32)| fleet.case(t).reference_grad(&x[i * row..][..row], 1);
    map.iter().enumerate().flat_map(one).collect()
}

/// Every map of `m` rows, with copies that land early and late, on few blocks or many.
pub fn grad_mixes(fleet: &Fleet, rng: &mut Rng, m: usize, x: &[u8]) -> Vec<(Large, Vec<i32>)> {
    let one = |(i, map): (usize, Vec<i32>)| {
        let blocks = [None, Some(1), Some(3)][(rng.next() % 3) as usize];
        (fleet_grad(fleet, x, &map, blocks, i % 2 == 0, rng.next() % 3), map)
    };
    maps(&mut Rng::new(m as u64), m).into_iter().enumerate().map(one).collect()
}

/// The gradient of one delta's product.
pub fn grad_of_one(case: &Case, blob: &[u8], x: &[u8], m: usize, late: bool, seed: u64) -> Large {
    grad(&Linear { arena: blob, seed, ..Linear::of_one(case, x, m) }, None, late)
}
