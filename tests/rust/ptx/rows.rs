//! Promise: rows that what nvcc makes of `delta_embedding` looks up are those of the tenants' tables, bit for bit; words at any
//! address that is a multiple of their size are computed on, and matrices without words, too.

use crate::common::data::Rng;
use crate::common::device::Param;
use crate::common::kernels::{Fleet, LINEAR_OUT, blocks_of, status};
use crate::common::linear::{DTYPES, first_difference, integers};
use crate::common::lookups::{LOOKUP_OUT, LOOKUP_STATUS, Tables};
use crate::machine::Machine;
use crate::oracle::{machine, product_status, run};
use crate::products::{WAYS, Way, product, reference, widths};
use xorz::matrix::{Dtype, Shape};

/// # Errors
/// What a thread did that it may not, or the first wrong row.
pub(crate) fn look_up(machine: &Machine, rng: &mut Rng, tables: &Tables) -> Result<(), String> {
    let strips = tables.shape.k.div_ceil(4096) as u32;
    for (m, blocks) in [(1, (1, strips)), (9, (9, strips)), (20, (7, 1)), (12, (15, 3))] {
        let (indices, map) = tables.batch(rng, m);
        let after = run(machine, &tables.launch(&indices, &map, blocks, rng.next() % 8))?;
        let (got, want) = (&after[LOOKUP_OUT].bytes, tables.rows(&indices, &map));
        let row = tables.row_bytes();
        let wrong = (0..m).find(|i| got[i * row..][..row] != want[i * row..][..row]);
        if status(&after, LOOKUP_STATUS) != 0 || wrong.is_some() {
            let found = status(&after, LOOKUP_STATUS);
            return Err(format!("{} {}: status {found:#x}, row {wrong:?}", tables.dtype, tables.shape));
        }
    }
    Ok(())
}

#[test]
fn looked_up_rows_are_those_of_the_tenants_tables() {
    let Some(machine) = machine("looked_up_rows_are_those_of_the_tenants_tables") else { return };
    let mut rng = Rng::new(121);
    for dtype in Dtype::ALL {
        for (n, k) in [(1, 1), (37, 127)] {
            let tables = Tables::new(&mut rng, dtype, Shape { n, k });
            look_up(machine, &mut rng, &tables).unwrap();
        }
    }
    for dtype in [Dtype::U8, Dtype::BF16, Dtype::F64] {
        let tables = Tables::new(&mut rng, dtype, Shape { n: 18, k: 4097 });
        look_up(machine, &mut rng, &tables).unwrap();
    }
}

#[test]
fn rows_of_nothing_that_there_is_have_all_bits_set_and_a_status() {
    let Some(machine) = machine("rows_of_nothing_that_there_is_have_all_bits_set_and_a_status") else {
        return;
    };
    let mut rng = Rng::new(122);
    let tables = Tables::new(&mut rng, Dtype::BF16, Shape { n: 20, k: 300 });
    let many = tables.slots.len() as i32;
    for (index, tenant, code) in [
        (-1, 1, 7),
        (20, 1, 7),
        (i64::MAX, -1, 7),
        (i64::MIN, 1, 7),
        (3, -2, 2),
        (3, many, 2),
        (3, i32::MIN, 2),
    ] {
        let (indices, map) = ([5, index, 19], [1, tenant, 2]);
        let after = run(machine, &tables.launch(&indices, &map, (3, 1), 1)).unwrap();
        assert_eq!(status(&after, LOOKUP_STATUS) >> 24, code, "{index} of {tenant}");
        for (i, got) in after[LOOKUP_OUT].bytes.chunks(tables.row_bytes()).enumerate() {
            let well =
                if i == 1 { got.iter().all(|b| *b == 0xFF) } else { got == tables.row(map[i], indices[i]) };
            assert!(well, "row {i}, {index} of {tenant}");
        }
    }
}

/// The parameter's bytes, so many past a multiple of 256.
fn moved(param: &mut Param, by: u64) {
    match param {
        Param::In(_, offset) | Param::Out(_, offset) => *offset = by,
        _ => panic!("no bytes"),
    }
}

#[test]
fn words_at_odd_places_are_multiplied() {
    let Some(machine) = machine("words_at_odd_places_are_multiplied") else { return };
    let mut rng = Rng::new(188);
    for dtype in DTYPES {
        let w = dtype.word_bytes() as u64;
        for (n, k) in [(17, 512), (18, 270)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
            let x = integers(&mut rng, dtype, 6 * k, 3);
            let map = [0, 3, 4, -1, 8, 2];
            for (at, by) in [(0, 1), (1, 3), (LINEAR_OUT, 5), (2, 1)] {
                for &rows in blocks_of(dtype) {
                    let mut launch = fleet.launch(&x, &map, rows, 1);
                    moved(&mut launch.params[at], by * w);
                    let after = run(machine, &launch).unwrap();
                    let want = fleet.reference(&x, &map);
                    let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &want);
                    assert_eq!((product_status(&after), difference), (0, None), "{dtype} {shape} {at}");
                }
            }
        }
    }
}

#[test]
fn matrices_without_words_are_multiplied() {
    let Some(machine) = machine("matrices_without_words_are_multiplied") else { return };
    let mut rng = Rng::new(186);
    for dtype in DTYPES {
        for (n, k, m) in [(3, 0, 2), (0, 5, 2), (3, 5, 0), (0, 0, 0), (3, 5, 2)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 4), 0.5);
            let map: Vec<i32> = (0..m).map(|i| [3, 0][i % 2]).collect();
            for way in WAYS {
                let x = integers(&mut rng, dtype, m * widths(way, shape).0, 2);
                let after = product(machine, &fleet, way, &x, &map, 0).unwrap();
                let mut want = reference(&fleet, way, &x, &map);
                if way == Way::Grad && n == 0 {
                    want = vec![0.0; m * k];
                }
                let difference = first_difference(dtype, &after[LINEAR_OUT].bytes, &want);
                assert_eq!((product_status(&after), difference), (0, None), "{dtype} {shape} m {m} {way:?}");
            }
        }
    }
}
