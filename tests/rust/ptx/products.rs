//! Promise: products by what nvcc makes of `linear_small`, `linear_large` and `linear_grad` are those of the fine-tuned words: exact
//! where sums are, one column where x is one-hot, within the bound elsewhere; NaN and infinities are the tenants' own.

use crate::common::data::{Rng, adversarial, perturbed, word};
use crate::common::device::After;
use crate::common::grads::{fleet_grad, fleet_reference, grad};
use crate::common::kernels::{Fleet, LINEAR_OUT, Linear, maps, nudged};
use crate::common::linear::{Case, DTYPES, ENCODINGS, first_difference, integers, values};
use crate::machine::Machine;
use crate::oracle::{machine, product_status, run, run_large};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// So many rows of x a block.
    Few(usize),
    Many,
    Grad,
}

pub(crate) const WAYS: [Way; 4] = [Way::Few(4), Way::Few(16), Way::Many, Way::Grad];

/// Words of a row of x, and of the output.
pub(crate) fn widths(way: Way, shape: Shape) -> (usize, usize) {
    if way == Way::Grad { (shape.n, shape.k) } else { (shape.k, shape.n) }
}

/// # Errors
/// What a thread did that it may not.
pub(crate) fn product(
    machine: &Machine,
    fleet: &Fleet,
    way: Way,
    x: &[u8],
    map: &[i32],
    seed: u64,
) -> Result<Vec<After>, String> {
    let blocks = [None, Some(1), Some(3)][seed as usize % 3];
    match way {
        Way::Few(rows) => run(machine, &fleet.launch(x, map, rows, seed)),
        Way::Many => run_large(machine, &fleet.large(x, map, blocks, true, seed)),
        Way::Grad => run_large(machine, &fleet_grad(fleet, x, map, blocks, true, seed)),
    }
}

pub(crate) fn reference(fleet: &Fleet, way: Way, x: &[u8], map: &[i32]) -> Vec<f64> {
    if way == Way::Grad { fleet_reference(fleet, x, map) } else { fleet.reference(x, map) }
}

/// Products of integers, whose sums f32 holds: the float64 result, rounded once.
pub(crate) fn check_exact(
    machine: &Machine,
    fleet: &Fleet,
    way: Way,
    map: &[i32],
    seed: u64,
) -> Result<(), String> {
    let x = integers(&mut Rng::new(seed), fleet.dtype, map.len() * widths(way, fleet.shape).0, 3);
    let after = product(machine, fleet, way, &x, map, seed)?;
    let difference = first_difference(fleet.dtype, &after[LINEAR_OUT].bytes, &reference(fleet, way, &x, map));
    match (product_status(&after), difference) {
        (0, None) => Ok(()),
        found => Err(format!("{} {} {way:?} {map:?}: {found:x?}", fleet.dtype, fleet.shape)),
    }
}

/// Every number of rows that a block may have and some that take several, each shape with some of them.
const ROWS: [usize; 19] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 130];

#[test]
fn integer_products_are_exact_in_any_mix_of_tenants() {
    let Some(machine) = machine("integer_products_are_exact_in_any_mix_of_tenants") else { return };
    let mut rng = Rng::new(182);
    for dtype in DTYPES {
        for ((n, k), step) in [((35, 259), 3), ((1, 31), 3), ((33, 1), 3), ((20, 127), 3), ((5, 4097), 6)] {
            let share = if k == 127 { 0.5 } else { 0.1 };
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), share);
            let these = |i: &usize| (i + n + dtype as usize).is_multiple_of(step);
            for (i, &m) in ROWS.iter().enumerate().filter(|(i, _)| these(i)) {
                let maps = maps(&mut rng, m);
                for (j, way) in WAYS.into_iter().enumerate() {
                    if way == Way::Few(4) && (m > 33 || dtype != Dtype::F32) {
                        continue;
                    }
                    let map = &maps[(3 * i + 2 * j) % maps.len()];
                    check_exact(machine, &fleet, way, map, rng.next() % 1000).unwrap();
                }
            }
        }
    }
}

/// Rows that go by sixteen bytes, more than a group of columns a warp, more rows of a tenant than a tile has: ways through the kernels
/// that odd shapes do not take.
#[test]
fn products_of_whole_pieces_and_full_tiles_are_exact() {
    let Some(machine) = machine("products_of_whole_pieces_and_full_tiles_are_exact") else { return };
    let mut rng = Rng::new(184);
    for dtype in DTYPES {
        let shape = Shape { n: 72, k: 1184 };
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
        // The base, entries, streams, words of their own, and streams of which nearly all is apart.
        for (i, tenant) in [-1, 0, 3, 4, 10].into_iter().enumerate() {
            let few = if i % 2 == 0 { 16 } else { 7 };
            for (way, m) in [(Way::Few(4), 4), (Way::Few(16), few), (Way::Many, 130), (Way::Grad, 130)] {
                check_exact(machine, &fleet, way, &vec![tenant; m], 0).unwrap();
            }
        }
    }
}

/// One delta, and x of which each row is a single one: the rows of the output are columns of the fine-tuned matrix, or for
/// the gradient its rows.
pub(crate) fn check_one_hot(machine: &Machine, case: &Case, way: Way) -> Result<(), String> {
    let (dtype, shape) = (case.dtype, case.shape);
    let (count, width) = widths(way, shape);
    let x: Vec<u8> =
        (0..count * count).flat_map(|i| word(dtype, f64::from(u8::from(i / count == i % count)))).collect();
    let linear =
        Linear { rows: if let Way::Few(rows) = way { rows } else { 16 }, ..Linear::of_one(case, &x, count) };
    let after = match way {
        Way::Few(_) => run(machine, &linear.launch())?,
        Way::Many => run_large(machine, &linear.large(None, true))?,
        Way::Grad => run_large(machine, &grad(&linear, None, true))?,
    };
    let (y, want) = (values(dtype, &after[LINEAR_OUT].bytes), values(dtype, &case.fine_tuned));
    let wrong = (0..count * width).find(|i| {
        let (row, column) = (i / width, i % width);
        let at = if way == Way::Grad { row * shape.k + column } else { column * shape.k + row };
        y[*i] != want[at]
    });
    match (product_status(&after), wrong) {
        (0, None) => Ok(()),
        found => Err(format!("{} {way:?}: {found:x?}", case.name())),
    }
}

#[test]
fn one_hot_x_gives_a_column_of_the_fine_tuned_matrix() {
    let Some(machine) = machine("one_hot_x_gives_a_column_of_the_fine_tuned_matrix") else { return };
    let mut rng = Rng::new(181);
    let shape = Shape { n: 21, k: 141 };
    for dtype in [Dtype::BF16, Dtype::F16] {
        let base = rng.weights(dtype, shape.n * shape.k);
        let far = perturbed(&mut rng, dtype, &base, 0.3);
        let near = nudged(&mut rng, 2, &base, 4, 0);
        for encoding in ENCODINGS {
            let fine_tuned = if encoding == Encoding::Exponent { &near } else { &far };
            let case = Case::new(dtype, shape, encoding, &base, fine_tuned);
            WAYS.into_iter().for_each(|way| check_one_hot(machine, &case, way).unwrap());
        }
    }
}

/// Roundings between a product and its output, of which docs/numerics.md speaks, and the factor of the sum's size.
fn chain(way: Way, case: &Case, changed: usize) -> (usize, f64) {
    let Shape { n, k } = case.shape;
    match way {
        Way::Few(_) => {
            let product = (k.div_ceil(256) * 8 + 7).max(k / 32 + 6 * k.div_ceil(256));
            let entries = if case.encoding == Encoding::Sparse { 2 * changed + 17 } else { 0 };
            (product + entries + 1, 3.0)
        }
        Way::Many => (1 + if case.dtype == Dtype::F32 { k } else { k.div_ceil(16) }, 0.0),
        Way::Grad => (if case.dtype == Dtype::F32 { n } else { n.div_ceil(16) }, 0.0),
    }
}

/// The largest part of the bound that an output's error takes; above 1 is wrong.
fn check_bound(fleet: &Fleet, way: Way, x: &[u8], map: &[i32], got: &[f64]) -> f64 {
    let (dtype, want, x) = (fleet.dtype, reference(fleet, way, x, map), values(fleet.dtype, x));
    let ((terms, width), k) = (widths(way, fleet.shape), fleet.shape.k);
    let mut worst: f64 = 0.0;
    for (i, &tenant) in map.iter().enumerate() {
        let case = fleet.case(tenant);
        let (base, fine_tuned) = (values(dtype, &case.base), values(dtype, &case.fine_tuned));
        let bias = values(dtype, fleet.bias(tenant));
        for o in 0..width {
            let at = |t: usize| if way == Way::Grad { t * k + o } else { o * k + t };
            let changed = (0..terms).filter(|t| base[at(*t)] != fine_tuned[at(*t)]).count();
            let (chain, apart) = chain(way, case, changed);
            let size: f64 = (0..terms)
                .map(|t| {
                    let (b, f) = (base[at(t)], fine_tuned[at(t)]);
                    let whole = if apart == 0.0 { f.abs() } else { b.abs() + apart * (f - b).abs() };
                    x[i * terms + t].abs() * whole
                })
                .sum();
            let size = size + if way == Way::Grad { 0.0 } else { bias[o].abs() };
            let want = want[i * width + o];
            let rounding = match dtype {
                Dtype::F32 => 0.0,
                Dtype::BF16 => 2f64.powi(-8) * want.abs() * 1.01,
                _ => (2f64.powi(-11) * want.abs()).max(2f64.powi(-25)) * 1.01,
            };
            let bound = chain as f64 * 2f64.powi(-24) * size + terms as f64 * 2f64.powi(-126) + rounding;
            worst = worst.max((got[i * width + o] - want).abs() / bound);
        }
    }
    worst
}

#[test]
fn products_stay_within_the_documented_bound() {
    let Some(machine) = machine("products_stay_within_the_documented_bound") else { return };
    let mut rng = Rng::new(183);
    for dtype in DTYPES {
        for (way, n, k, m) in [
            (Way::Few(4), 6, 4500, 3),
            (Way::Few(16), 6, 4500, 9),
            (Way::Many, 6, 4500, 12),
            (Way::Grad, 300, 33, 9),
        ] {
            let fleet = Fleet::new(&mut rng, dtype, Shape { n, k }, |r, w| r.weights(dtype, w), 0.05);
            let x = rng.weights(dtype, m * widths(way, fleet.shape).0);
            let map = &maps(&mut rng, m)[0];
            let after = product(machine, &fleet, way, &x, map, 1).unwrap();
            let worst = check_bound(&fleet, way, &x, map, &values(dtype, &after[LINEAR_OUT].bytes));
            assert!(product_status(&after) == 0 && worst <= 1.0, "{dtype} {way:?}: {worst} of the bound");
        }
    }
}

#[test]
fn what_is_not_finite_is_what_the_tenants_weights_make() {
    let Some(machine) = machine("what_is_not_finite_is_what_the_tenants_weights_make") else { return };
    let mut rng = Rng::new(185);
    let (mut nans, mut infinities) = (0, 0);
    for dtype in DTYPES {
        let words = |r: &mut Rng, words: usize| {
            let (plain, odd) = (integers(r, dtype, words, 4), adversarial(r, dtype, words));
            r.mix(dtype, &plain, &odd, 0.002)
        };
        let fleet = Fleet::new(&mut rng, dtype, Shape { n: 20, k: 290 }, words, 0.01);
        let largest = if dtype == Dtype::F16 { 65504.0 } else { f64::from(f32::MAX) };
        for (way, m) in [(Way::Few(4), 3), (Way::Few(16), 12), (Way::Many, 12), (Way::Grad, 12)] {
            let count = m * widths(way, fleet.shape).0;
            let (plain, odd) = (integers(&mut rng, dtype, count, 2), adversarial(&mut rng, dtype, count));
            let x = rng.mix(dtype, &plain, &odd, 0.001);
            let map = &maps(&mut rng, m)[0];
            let after = product(machine, &fleet, way, &x, map, 2).unwrap();
            let got = values(dtype, &after[LINEAR_OUT].bytes);
            for (i, (g, w)) in got.iter().zip(reference(&fleet, way, &x, map)).enumerate() {
                assert_eq!(g.is_nan(), w.is_nan(), "{dtype} {way:?} output {i}: {g} for {w} {map:?}");
                let far = w.abs() > 1.01 * largest;
                let agrees = !far || (g.is_infinite() && g.signum() == w.signum());
                assert!(agrees, "{dtype} {way:?} output {i}: {g} for {w} {map:?}");
                nans += usize::from(w.is_nan());
                infinities += usize::from(w.is_infinite());
            }
        }
    }
    assert!(nans > 100 && infinities > 10, "only {nans} NaN and {infinities} infinities");
}
