//! Promise: the kernels of `cuda/` take deltas of layout 0 of every encoding but `exponent`, whose deltas
//! they refuse with a status of its own, NaN where words were wanted, and weights left as they were.

use crate::common::data::{Rng, perturbed};
use crate::common::kernels::{
    APPLY_STATUS, LINEAR_OUT, LINEAR_STATUS, Linear, device, restore, run_large, status,
};
use crate::common::layout0;
use crate::common::linear::{Case, first_difference, integers};
use crate::common::lookups::{LOOKUP_OUT, LOOKUP_STATUS, Tables};
use xorz::codec::Encoding;
use xorz::cuda::status::Code;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::Resident;

const SHAPE: Shape = Shape { n: 40, k: 300 };
const REFUSED: u32 = (Code::OldLayout as u32) << 24;

/// The header of layout 0; its other bytes are the same but for `exponent`.
fn as_layout_0(blob: &[u8]) -> Vec<u8> {
    let mut old = blob.to_vec();
    old[8] = 0;
    old[176..192].fill(0);
    assert_eq!(Resident::parse(&old).unwrap().header().version, 0);
    old
}

/// `exponent` with as many exceptions as it likes, or none.
fn exponent(rng: &mut Rng, dtype: Dtype, base: &[u8], fine_tuned: &[u8], width: u8) -> Vec<u8> {
    layout0::exponent((dtype, SHAPE), (64, 256), &[width; 32], (base, fine_tuned), rng)
}

#[test]
fn restore_and_apply_take_all_but_exponent() {
    let (device, mut rng) = (device(), Rng::new(171));
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::U8] {
        let base = rng.weights(dtype, SHAPE.n * SHAPE.k);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
        let bits = 8 * dtype.word_bytes() as u8;
        let old = [2, bits].map(|width| exponent(&mut rng, dtype, &base, &fine_tuned, width));
        let taken = [Encoding::Sparse, Encoding::Raw]
            .map(|encoding| as_layout_0(&Case::new(dtype, SHAPE, encoding, &base, &fine_tuned).blob));
        for (blob, refused) in taken.iter().map(|b| (b, false)).chain(old.iter().map(|b| (b, true))) {
            let launches = [false, true]
                .map(|apply| restore(apply, (dtype as u32, SHAPE), dtype.word_bytes(), &base, blob, 2, 1));
            let after = device.run(&launches).unwrap();
            let want = |otherwise: &[u8]| if refused { otherwise.to_vec() } else { fine_tuned.clone() };
            assert!(after[0][1].bytes == want(&vec![0xFF; base.len()]), "restore {dtype}");
            assert!(after[1][0].bytes == want(&base), "apply {dtype}");
            for (after, at) in after.iter().zip([7, APPLY_STATUS]) {
                assert_eq!(status(after, at), if refused { REFUSED } else { 0 });
            }
        }
    }
}

#[test]
fn products_take_all_but_exponent() {
    let (device, mut rng, dtype) = (device(), Rng::new(172), Dtype::BF16);
    let base = integers(&mut rng, dtype, SHAPE.n * SHAPE.k, 6);
    let other = integers(&mut rng, dtype, SHAPE.n * SHAPE.k, 6);
    let fine_tuned = rng.mix(dtype, &base, &other, 0.1);
    let (m, x) = (5, integers(&mut rng, dtype, 5 * SHAPE.k, 2));
    let old = exponent(&mut rng, dtype, &base, &fine_tuned, 3);
    let case = Case::new(dtype, SHAPE, Encoding::Sparse, &base, &fine_tuned);
    let sparse = as_layout_0(&case.blob);
    for (blob, refused) in [(&sparse, false), (&old, true)] {
        let linear = Linear {
            dtype,
            shape: SHAPE,
            base: &base,
            x: &x,
            m,
            arena: blob,
            slots: None,
            tenant_of_row: None,
            biases: None,
            rows: 16,
            seed: 2,
        };
        let small = device.run(&[linear.launch()]).unwrap().remove(0);
        let large = run_large(&device, &[linear.large(None, true)]).unwrap().remove(0);
        for after in [small, large] {
            assert_eq!(status(&after, LINEAR_STATUS), if refused { REFUSED } else { 0 });
            let y = &after[LINEAR_OUT].bytes;
            if refused {
                assert!(y.iter().all(|b| *b == 0xFF));
            } else {
                assert_eq!(first_difference(dtype, y, &case.reference(&x, m, None)), None);
            }
        }
    }
}

#[test]
fn lookups_refuse_the_slot_alone() {
    let (device, mut rng, dtype) = (device(), Rng::new(173), Dtype::BF16);
    let mut tables = Tables::new(&mut rng, dtype, SHAPE);
    let old = exponent(&mut rng, dtype, &tables.base, &tables.tables[2], 2);
    tables.slots[2] = [tables.arena.len() as i64, old.len() as i64];
    tables.arena.extend(old);
    let (indices, map) = ([3, 39, 0, 7], [2, 1, -1, 2]);
    let after = device.run(&[tables.launch(&indices, &map, (2, 1), 1)]).unwrap().remove(0);
    assert_eq!(status(&after, LOOKUP_STATUS), REFUSED | 2);
    let (got, mut want) = (&after[LOOKUP_OUT].bytes, tables.rows(&indices, &map));
    let row = tables.row_bytes();
    [0, 3].iter().for_each(|i| want[i * row..(i + 1) * row].fill(0xFF));
    assert!(*got == want);
}
