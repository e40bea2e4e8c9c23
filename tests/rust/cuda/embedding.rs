//! Promise: rows that `delta_embedding` of `cuda/` looks up are those of the tenants' restored tables, bit
//! for bit; whatever indices, slots, maps and bytes say, it is those words, or all bits set and a status.
//! Mutants of it are noticed.

use crate::common::data::{Rng, matrix};
use crate::common::device::{Device, TSAN};
use crate::common::kernels::{device, status, tuned};
use crate::common::linear::Case;
use crate::common::lookups::{LOOKUP_OUT, LOOKUP_STATUS, Tables};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::cpu::{Arena, EmbeddingArgs, delta_embedding};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, Resident};
use xorz::vector::Serial;

/// Batches of `tables` on grids of any size: every word, or which row is wrong.
fn look_up(
    device: &Device,
    rng: &mut Rng,
    tables: &Tables,
    seeds: std::ops::Range<u64>,
) -> Result<(), String> {
    let strips = tables.shape.k.div_ceil(4096) as u32;
    let (mut launches, mut wants) = (vec![], vec![]);
    for seed in seeds {
        for (m, blocks) in [(1, (1, strips)), (9, (9, strips)), (40, (7, 1)), (20, (25, 3))] {
            let (indices, map) = tables.batch(rng, m);
            launches.push(tables.launch(&indices, &map, blocks, seed));
            wants.push((tables.rows(&indices, &map), map));
        }
    }
    for (after, (want, map)) in device.run(&launches)?.iter().zip(wants) {
        let got = &after[LOOKUP_OUT].bytes;
        let row = tables.row_bytes();
        if let Some(i) = (0..map.len()).find(|i| got[i * row..][..row] != want[i * row..][..row]) {
            return Err(format!("{} {}: row {i} of tenant {}", tables.dtype, tables.shape, map[i]));
        }
        if status(after, LOOKUP_STATUS) != 0 {
            return Err(format!("status {:#x}", status(after, LOOKUP_STATUS)));
        }
    }
    Ok(())
}

#[test]
fn rows_are_those_of_the_restored_tables() {
    let (device, mut rng) = (device(), Rng::new(121));
    for dtype in Dtype::ALL {
        for (n, k) in [(1, 1), (50, 300), (37, 515)] {
            let tables = Tables::new(&mut rng, dtype, Shape { n, k });
            look_up(&device, &mut rng, &tables, 0..1).unwrap();
        }
    }
    for dtype in [Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::F64] {
        let tables = Tables::new(&mut rng, dtype, Shape { n: 20, k: 4400 });
        look_up(&device, &mut rng, &tables, 1..2).unwrap();
    }
}

#[test]
fn what_does_not_fit_gives_all_bits_set_and_a_status_and_leaves_the_others_alone() {
    let (device, mut rng) = (device(), Rng::new(122));
    let (dtype, shape) = (Dtype::BF16, Shape { n: 20, k: 300 });
    let tables = Tables::new(&mut rng, dtype, shape);
    let [at, len] = tables.slots[1];
    let foreign = |dtype: Dtype, n: usize| {
        let words = &tables.base[..n * shape.k * 2];
        let shape = Shape { n: words.len() / shape.k / dtype.word_bytes(), ..shape };
        Case::new(dtype, shape, Encoding::Raw, words, &tables.tables[3][..words.len()]).blob
    };
    let slots = |slot| Tables { slots: [&[slot], &tables.slots[1..]].concat(), ..tables.clone() };
    let bytes = |blob: &[u8]| {
        let mut tables = slots([tables.arena.len() as i64, blob.len() as i64]);
        tables.arena.extend_from_slice(blob);
        tables
    };
    let cases = [
        (tables.clone(), (-1, 1), 7),
        (tables.clone(), (20, 1), 7),
        (tables.clone(), (i64::MAX, -1), 7),
        (tables.clone(), (i64::MIN, 1), 7),
        (tables.clone(), (3, -2), 2),
        (tables.clone(), (3, tables.slots.len() as i32), 2),
        (tables.clone(), (3, i32::MIN), 2),
        (slots([at, -len]), (3, 0), 3),
        (slots([at + 8, len]), (3, 0), 3),
        (slots([at, i64::MAX]), (3, 0), 3),
        (slots([at, len - 64]), (3, 0), 5),
        (bytes(&foreign(Dtype::F16, 20)), (3, 0), 6),
        (bytes(&foreign(dtype, 19)), (3, 0), 6),
    ];
    for (tables, (index, tenant), code) in cases {
        let (indices, map) = ([5, index, 19, index], [1, tenant, 2, tenant]);
        let after = device.run(&[tables.launch(&indices, &map, (4, 1), 1)]).unwrap().remove(0);
        let found = status(&after, LOOKUP_STATUS);
        assert_eq!(found >> 24, code, "{index} of {tenant}");
        let place = if code == 7 { 3 } else { tenant as u32 & 0xFF_FFFF };
        assert_eq!(found & 0xFF_FFFF, place, "{index} of {tenant}");
        for (i, got) in after[LOOKUP_OUT].bytes.chunks(tables.row_bytes()).enumerate() {
            match i {
                0 | 2 => assert!(got == tables.row(map[i], indices[i]), "row {i}, code {code}"),
                _ => assert!(got.iter().all(|b| *b == 0xFF), "row {i}, code {code}"),
            }
        }
    }
}

#[test]
fn a_delta_of_words_of_another_size_is_refused_where_the_table_is_bits() {
    let (device, mut rng) = (device(), Rng::new(124));
    let shape = Shape { n: 40, k: 96 };
    for (table, foreign) in [(Dtype::I32, Dtype::U8), (Dtype::I32, Dtype::BF16), (Dtype::I16, Dtype::F32)] {
        let tables = Tables::new(&mut rng, table, shape);
        let base = rng.weights(foreign, shape.n * shape.k);
        for encoding in [Encoding::Unchanged, Encoding::Sparse, Encoding::Raw] {
            let tuned = match encoding {
                Encoding::Unchanged => base.clone(),
                _ => tuned(&mut rng, foreign, &base, 0.05),
            };
            let blob = Case::new(foreign, shape, encoding, &base, &tuned).blob;
            let mut tables = tables.clone();
            tables.slots[0] = [tables.arena.len() as i64, blob.len() as i64];
            tables.arena.extend_from_slice(&blob);
            let (indices, map) = ([5, 39, 19], [1, 0, 2]);
            let after = device.run(&[tables.launch(&indices, &map, (3, 1), 1)]).unwrap().remove(0);
            assert_eq!(status(&after, LOOKUP_STATUS), 6 << 24, "{table} of {foreign}, {encoding:?}");
            for (i, got) in after[LOOKUP_OUT].bytes.chunks(tables.row_bytes()).enumerate() {
                match i {
                    1 => assert!(got.iter().all(|b| *b == 0xFF), "{table} of {foreign}, {encoding:?}"),
                    _ => assert!(got == tables.row(map[i], indices[i]), "row {i}"),
                }
            }
        }
    }
}

/// Blobs broken byte by byte, each `head`th of the header and up to `most` others of a blob: the oracle's
/// rows, or a status.
fn hostile(device: &Device, seed: u64, head: usize, most: usize) {
    let mut rng = Rng::new(seed);
    let shape = Shape { n: 40, k: 300 };
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::U8] {
        let tables = Tables { tables: vec![], ..Tables::new(&mut rng, dtype, shape) };
        let mut launches = vec![];
        let mut broken = vec![];
        for slot in [1, 2, 3, 5, 6] {
            let [at, len] = tables.slots[slot].map(|v| v as usize);
            let others = (HEADER_BYTES..len).step_by((len / most).max(1) | 1);
            for spot in (0..HEADER_BYTES).step_by(head).chain(others) {
                let mut bad = tables.clone();
                bad.arena[at + spot] ^= [0x01, 0x80, 0xFF][(rng.next() % 3) as usize];
                let indices: Vec<i64> = (0..6).map(|_| (rng.next() % 40) as i64).collect();
                let map = [slot as i32; 6];
                launches.push(bad.launch(&indices, &map, (3, 1), rng.next() % 3));
                broken.push((bad, indices, map));
            }
        }
        let after = device.run(&launches).unwrap();
        let (mut right, mut refused) = (0, 0);
        for (after, (bad, indices, map)) in after.iter().zip(&broken) {
            let args = EmbeddingArgs {
                indices,
                base: matrix(dtype, shape, &bad.base),
                arena: Arena { bytes: &bad.arena, slots: &bad.slots },
                tenant_of_row: map,
            };
            let mut want = vec![0; indices.len() * bad.row_bytes()];
            let oracle = delta_embedding(&args, &mut want, &Serial);
            let (code, got) = (status(after, LOOKUP_STATUS), &after[LOOKUP_OUT].bytes);
            if code == 0 {
                // The header's digests are the host's to compare.
                let at = bad.slots[map[0] as usize].map(|v| v as usize);
                let parsed = Resident::parse(&bad.arena[at[0]..at[0] + at[1]]).is_ok();
                assert!(oracle.is_ok() || !parsed, "accepted: {oracle:?}");
                assert!(oracle.is_err() || *got == want, "other words");
                right += 1;
            } else {
                assert!(got.contains(&0xFF), "refused, and no row has all bits set");
                assert!(code >> 24 == 1 || got.iter().all(|b| *b == 0xFF), "{code:#x}");
                refused += 1;
            }
        }
        assert!(right > 10 && refused > 10, "{dtype}: {right} right, {refused} refused");
    }
}

#[test]
fn broken_bytes_give_the_oracles_rows_or_a_status() {
    hostile(&device(), 123, 3, 60);
}

#[test]
fn broken_bytes_harm_no_memory() {
    let flags = [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=xorz_shared",
    ];
    let device = Device::new("sanitized", &flags);
    hostile(&device, 124, 7, 20);
    let mut rng = Rng::new(125);
    let tables = Tables::new(&mut rng, Dtype::F64, Shape { n: 20, k: 515 });
    look_up(&device, &mut rng, &tables, 0..1).unwrap();
}

#[test]
fn a_tile_that_contradicts_itself_costs_its_part_of_the_row() {
    let (device, mut rng) = (device(), Rng::new(126));
    let mut tables = Tables::new(&mut rng, Dtype::BF16, Shape { n: 20, k: 600 });
    // Slots 5 and 6 are `sparse` and `exponent` on tiles of 256 and 512 columns; the second tile ends beyond
    // the last.
    for (slot, cols) in [(5, 256), (6, 512)] {
        let at = tables.slots[slot][0] as usize + HEADER_BYTES;
        tables.arena[at + 8..at + 12].fill(0xFF);
        let indices = [3, 3];
        let map = [slot as i32, -1];
        let after = device.run(&[tables.launch(&indices, &map, (2, 1), 1)]).unwrap().remove(0);
        assert_eq!(status(&after, LOOKUP_STATUS), 1 << 24 | slot as u32);
        let (got, want) = (&after[LOOKUP_OUT].bytes, tables.rows(&indices, &map));
        assert!(got[2 * cols..1200].iter().all(|b| *b == 0xFF), "slot {slot}");
        assert!(got[..2 * cols] == want[..2 * cols] && got[1200..] == want[1200..], "slot {slot}");
    }
}

const LIST: &str = "#include \"embedding.cu\"\n#define XORZ_KERNELS(X) X(xorz_delta_embedding_16)\n";

const MUTANTS: [Mutant; 10] = [
    ("gaps summed without a barrier", "embedding.cu", "thread == 0) shared.corrupt", "  block_sync();\n", ""),
    (
        "a run begins one run late",
        "embedding.cu",
        "uint32_t column = 0;",
        "before < thread",
        "before <= thread",
    ),
    (
        "the lane of the row below",
        "embedding.cu",
        "look_up_entries(",
        "patch_run(records, v.dtype, row",
        "patch_run(records, v.dtype, row ^ 1",
    ),
    ("exceptions of the row below", "embedding.cu", "patch_row_exceptions(", "r == row", "r == row + 1"),
    ("differences of the row below", "embedding.cu", "look_up_stream(", "r == row", "r == row + 1"),
    ("always the first strip", "embedding.cu", "look_up(", "c0 >> v.cols_log2", "0 * c0 >> v.cols_log2"),
    ("an index one past the table", "embedding.cu", "const bool there", "index < p.n", "index <= p.n"),
    (
        "the tenant of the block",
        "embedding.cu",
        "embedding(",
        "load_once(p.tenant_of_row + i)",
        "load_once(p.tenant_of_row + block_x())",
    ),
    ("decoded one row too few", "decode.cuh", "decode_row(", "r <= row", "r < row"),
    ("of other dtypes, too", "batch.cuh", "open_tenant(", "p.n, p.k, dtype, view", "p.n, p.k, 0, view"),
];

fn checks(device: &Device) -> Result<(), String> {
    let mut rng = Rng::new(127);
    for (n, k) in [(50, 300), (37, 700), (20, 4400)] {
        let tables = Tables::new(&mut rng, Dtype::BF16, Shape { n, k });
        look_up(device, &mut rng, &tables, 0..3)?;
    }
    let mut tables = Tables::new(&mut rng, Dtype::BF16, Shape { n: 9, k: 70 });
    let odd = tuned(&mut rng, Dtype::F16, &tables.base, 0.5);
    let foreign = Case::new(Dtype::F16, tables.shape, Encoding::Raw, &tables.base, &odd);
    tables.slots[0] = [tables.arena.len() as i64, foreign.blob.len() as i64];
    tables.arena.extend_from_slice(&foreign.blob);
    let after = device.run(&[tables.launch(&[9, 3], &[1, 0], (1, 1), 0)])?.remove(0);
    match after[LOOKUP_OUT].bytes.iter().all(|b| *b == 0xFF) {
        true => Ok(()),
        false => Err("rows that are not there".into()),
    }
}

#[test]
fn mutants_are_caught() {
    all_caught(&MUTANTS, LIST, &[], checks);
}

/// Caught by the thread sanitizer, whatever the order of threads.
const RACES: [Mutant; 3] = [
    (
        "a row's view over the last one's",
        "embedding.cu",
        "look_up(shared, p, p.slots",
        "    block_sync();\n",
        "",
    ),
    ("differences before the stream's words", "embedding.cu", "decode_row(", "  warp_sync();\n", ""),
    ("exceptions before differences", "embedding.cu", "add_differences<W>(", "  warp_sync();\n", ""),
];

#[test]
fn no_two_threads_race_and_races_are_caught() {
    let mut rng = Rng::new(128);
    let tables = Tables::new(&mut rng, Dtype::BF16, Shape { n: 40, k: 700 });
    let launches: Vec<_> = (0..3)
        .map(|seed| {
            let (indices, map) = tables.batch(&mut rng, 40);
            tables.launch(&indices, &map, (6, 1), seed)
        })
        .collect();
    all_caught(&RACES, LIST, &[TSAN], |device| device.run(&launches).map(drop));
}
