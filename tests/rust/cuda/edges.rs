//! Promise: the kernels of `cuda/` are right where an outside check saw that no test looked: tenants by the hundred,
//! tiles of any number of rows, deltas of words of another size, slots between multiples of 64, biases and the one
//! rounding of the decode path. Mutants of each are noticed.

use crate::common::data::{Rng, word};
use crate::common::device::{After, Device};
use crate::common::kernels::{
    APPLY_STATUS, LINEAR_OUT, LINEAR_STATUS, Linear, device, restore, run_large, status,
};
use crate::common::linear::{Case, DTYPES, ENCODINGS, first_difference, integers};
use crate::common::lookups::{LOOKUP_OUT, LOOKUP_STATUS, Tables};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

type Checked = Result<(), String>;

fn ensure(is_so: bool, what: impl Fn() -> String) -> Checked {
    if is_so { Ok(()) } else { Err(what()) }
}

/// Outputs and status of a product, of few rows or of many.
fn product(device: &Device, linear: &Linear<'_>, many: bool) -> Result<(u32, Vec<u8>), String> {
    let mut after: Vec<After> = if many {
        run_large(device, &[linear.large(None, true)])?.remove(0)
    } else {
        device.run(&[linear.launch()])?.remove(0)
    };
    Ok((status(&after, LINEAR_STATUS), std::mem::take(&mut after[LINEAR_OUT].bytes)))
}

/// Segments of slots on both sides of where the sorting block goes on to its next 256 keys, one of more rows than a
/// tile has on each.
fn many_tenants(device: &Device, dtype: Dtype) -> Checked {
    let (mut rng, shape) = (Rng::new(201), Shape { n: 17, k: 40 });
    let words = |rng: &mut Rng| integers(rng, dtype, shape.n * shape.k, 8);
    let base = words(&mut rng);
    let kinds = [Encoding::Sparse, Encoding::Raw, Encoding::Exponent, Encoding::Unchanged];
    let cases = kinds.map(|encoding| Case::new(dtype, shape, encoding, &base, &words(&mut rng)));
    let (mut arena, mut places) = (vec![], vec![]);
    for case in &cases {
        places.push([arena.len() as i64, case.blob.len() as i64]);
        arena.extend_from_slice(&case.blob);
        arena.resize(arena.len().next_multiple_of(64), 0xEE);
    }
    let slots: Vec<_> = (0..700).map(|slot| places[slot % 4]).collect();
    let keys = [3, 250, 253, 254, 255, 256, 257, 510, 511, 512, 513, 650, 699, -1];
    let m = 420;
    let map: Vec<i32> = (0..m).map(|i| [3, 650, keys[i % keys.len()]][i % 3]).collect();
    let (x, biases) =
        (integers(&mut rng, dtype, m * shape.k, 3), integers(&mut rng, dtype, 701 * shape.n, 9));
    let linear = Linear {
        slots: Some(&slots),
        tenant_of_row: Some(&map),
        biases: Some(&biases),
        arena: &arena,
        ..Linear::of_one(&cases[3], &x, m)
    };
    let (code, got) = product(device, &linear, true)?;
    ensure(code == 0, || format!("status {code:#x}"))?;
    let (x_row, y_row) = (shape.k * dtype.word_bytes(), shape.n * dtype.word_bytes());
    let of_row = |(i, slot): (usize, &i32)| {
        let place = usize::try_from(*slot);
        let bias = &biases[place.unwrap_or(700) * y_row..][..y_row];
        cases[place.map_or(3, |slot| slot % 4)].reference(&x[i * x_row..][..x_row], 1, Some(bias))
    };
    let want: Vec<f64> = map.iter().enumerate().flat_map(of_row).collect();
    first_difference(dtype, &got, &want).map_or(Ok(()), Err)
}

#[test]
fn hundreds_of_tenants_are_each_computed_with_their_own() {
    DTYPES.iter().for_each(|&dtype| many_tenants(&device(), dtype).unwrap());
}

/// One tenant with as many rows as fill a tile up to some row.
fn rows_of_a_tile(device: &Device, dtype: Dtype) -> Checked {
    let (mut rng, shape) = (Rng::new(202), Shape { n: 20, k: 33 });
    let base = integers(&mut rng, dtype, shape.n * shape.k, 8);
    let case = Case::new(
        dtype,
        shape,
        Encoding::Sparse,
        &base,
        &integers(&mut rng, dtype, base.len() / dtype.word_bytes(), 8),
    );
    for m in [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 98, 111, 112, 113, 127, 128, 129] {
        let x = integers(&mut rng, dtype, m * shape.k, 3);
        let (code, got) = product(device, &Linear::of_one(&case, &x, m), true)?;
        ensure(code == 0, || format!("status {code:#x}"))?;
        if let Some(wrong) = first_difference(dtype, &got, &case.reference(&x, m, None)) {
            return Err(format!("{dtype}, {m} rows: {wrong}"));
        }
    }
    Ok(())
}

#[test]
fn tiles_of_any_number_of_rows_are_computed_whole() {
    DTYPES.iter().for_each(|&dtype| rows_of_a_tile(&device(), dtype).unwrap());
}

/// Where only bits are known of a matrix, a delta of words of another size is no delta of it, whatever its encoding.
fn words_of_another_size(device: &Device, sizes: &[usize]) -> Checked {
    let (mut rng, shape) = (Rng::new(203), Shape { n: 20, k: 300 });
    for &size in sizes {
        let base = rng.bytes(shape.n * shape.k * size);
        for foreign in [Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::F64] {
            if foreign.word_bytes() == size {
                continue;
            }
            let old = rng.weights(foreign, shape.n * shape.k);
            let new = rng.weights(foreign, shape.n * shape.k);
            let near = rng.mix(foreign, &old, &new, 0.05);
            for encoding in ENCODINGS {
                let blob = Case::new(foreign, shape, encoding, &old, &near).blob;
                for apply in [false, true] {
                    let after =
                        device.run(&[restore(apply, (0, shape), size, &base, &blob, 3, 1)])?.remove(0);
                    let name = || format!("{foreign} {encoding} on words of {size} bytes, apply {apply}");
                    let code = status(&after, if apply { APPLY_STATUS } else { 7 });
                    ensure(code == 6 << 24, || format!("{}: status {code:#x}", name()))?;
                    let kept = if apply {
                        after[0].bytes == base
                    } else {
                        after[1].bytes.iter().all(|b| *b == 0xFF)
                    };
                    ensure(kept, || format!("{}: other words", name()))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn deltas_of_words_of_another_size_restore_nothing() {
    words_of_another_size(&device(), &[1, 2, 4, 8]).unwrap();
}

/// A sound delta at an offset that is a multiple of 16 but not of 64, as each of a batch's ways to look at a slot meets it.
fn slots_between(device: &Device, ways: &[&str]) -> Checked {
    let (mut rng, dtype, shape) = (Rng::new(204), Dtype::BF16, Shape { n: 20, k: 300 });
    let base = integers(&mut rng, dtype, shape.n * shape.k, 4);
    let case =
        Case::new(dtype, shape, Encoding::Raw, &base, &integers(&mut rng, dtype, shape.n * shape.k, 4));
    let x = integers(&mut rng, dtype, shape.k, 3);
    for offset in [0, 16, 32, 48, 64, 80, 112, 128] {
        let arena = [&vec![0xEE; offset][..], &case.blob, &[0xEE; 128]].concat();
        let slots = [[offset as i64, case.blob.len() as i64]];
        let want = if offset % 64 == 0 { 0 } else { 3 << 24 };
        for &way in ways {
            let code = if way == "embedding" {
                let tables = vec![case.fine_tuned.clone()];
                let all = Tables {
                    dtype,
                    shape,
                    base: base.clone(),
                    tables,
                    arena: arena.clone(),
                    slots: slots.to_vec(),
                };
                let after = device.run(&[all.launch(&[7], &[0], (1, 1), 1)])?.remove(0);
                let got = &after[LOOKUP_OUT].bytes;
                let refused = got.iter().all(|b| *b == 0xFF);
                ensure(refused || got == all.row(0, 7), || format!("{way} at {offset}: other words"))?;
                status(&after, LOOKUP_STATUS)
            } else {
                let linear = Linear {
                    slots: Some(&slots),
                    tenant_of_row: Some(&[0]),
                    arena: &arena,
                    ..Linear::of_one(&case, &x, 1)
                };
                product(device, &linear, way == "many rows")?.0
            };
            ensure(code == want, || format!("{way} at {offset}: status {code:#x}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_slot_between_multiples_of_64_is_refused() {
    slots_between(&device(), &["few rows", "many rows", "embedding"]).unwrap();
}

/// Rows of W of which the f32 product is no number, and the exact one just above or below the middle between two bf16; the
/// bias is a part of it.
fn decoded_sums(device: &Device, many: bool) -> Checked {
    let (dtype, shape) = (Dtype::BF16, Shape { n: 16, k: 520 });
    let (large, lead_step) = (2f64.powi(100), 2f64.powi(-7));
    let (mut tuned, mut bias, mut want) = (vec![0.0; shape.n * shape.k], vec![], vec![]);
    for r in 0..shape.n {
        let sign = if r & 1 == 0 { 1.0 } else { -1.0 };
        let lead = if r & 2 == 0 { 1.0 } else { 1.0 + lead_step };
        let above = if r & 4 == 0 { 1.0 } else { -1.0 };
        // The first and the last column cancel: 2^200 - 2^200.
        let columns = [(0, large), (1, sign * (lead - 1.0)), (2, sign * lead_step / 2.0)];
        let rest = [(3, sign * above * 2f64.powi(-40)), (256, -large)];
        columns.iter().chain(&rest).for_each(|(c, v)| tuned[r * shape.k + c] = *v);
        bias.push(sign);
        want.push(sign * (lead + if above > 0.0 { lead_step } else { 0.0 }));
    }
    let words = |values: &[f64]| -> Vec<u8> { values.iter().flat_map(|v| word(dtype, *v)).collect() };
    let (tuned, want) = (words(&tuned), words(&want));
    let x = |c: usize| if c == 0 || c == 256 { large } else { f64::from(u8::from(c < 4)) };
    let x = words(&(0..shape.k).map(x).collect::<Vec<_>>());
    // Of the tenant, and of the base (whose bias comes last); others have another bias.
    for encoding in ENCODINGS {
        let zeros = vec![0; tuned.len()];
        let case = Case::new(
            dtype,
            shape,
            encoding,
            if encoding == Encoding::Unchanged { &tuned } else { &zeros },
            &tuned,
        );
        for whose in [0, 1, -1] {
            if whose == -1 && encoding != Encoding::Unchanged {
                continue;
            }
            let mut biases = vec![100.0; 3 * shape.n];
            let place = usize::try_from(whose).unwrap_or(2);
            biases[place * shape.n..][..shape.n].copy_from_slice(&bias);
            let slots = [[0, case.blob.len() as i64]; 2];
            let linear = Linear {
                slots: Some(&slots),
                tenant_of_row: Some(&[whose]),
                biases: Some(&words(&biases)),
                ..Linear::of_one(&case, &x, 1)
            };
            let (code, got) = product(device, &linear, many)?;
            let name = || format!("{encoding}, slot {whose}, many rows: {many}");
            ensure(code == 0, || format!("{}: status {code:#x}", name()))?;
            let wrong = got.chunks(2).zip(want.chunks(2)).position(|(a, b)| a != b);
            ensure(wrong.is_none(), || format!("{}: output {wrong:?}", name()))?;
        }
    }
    Ok(())
}

#[test]
fn what_is_computed_again_in_f64_has_its_bias_and_is_rounded_once() {
    [false, true].iter().for_each(|&many| decoded_sums(&device(), many).unwrap());
}

const FEW: [Mutant; 7] = [
    ("rounded twice", "word.cuh", "round_f64(double", "towards ? bits + 1 : bits - 1", "bits"),
    ("no bias in the decode path", "again_f64.cuh", "void compute_again(", "p.biases != nullptr", "false"),
    (
        "another's bias in the decode path",
        "again_f64.cuh",
        "void compute_again(",
        "bias_row(p, batch.slot[t])",
        "bias_row(p, 0)",
    ),
    ("slots at multiples of 16", "batch.cuh", "place_of(", "from % kArenaAlign != 0", "from % 16 != 0"),
    ("slots at multiples of 32", "batch.cuh", "place_of(", "from % kArenaAlign != 0", "from % 32 != 0"),
    (
        "restored from words of another size",
        "restore.cu",
        "void restore(",
        "word_bytes_of(shared.view.dtype) != sizeof(W)",
        "false",
    ),
    (
        "restored from longer words",
        "restore.cu",
        "void restore(",
        "word_bytes_of(shared.view.dtype) != sizeof(W)",
        "word_bytes_of(shared.view.dtype) < sizeof(W)",
    ),
];

const MANY: [Mutant; 8] = [
    (
        "tiles of the keys before",
        "linear_segments.cu",
        "const uint32_t key = i + thread, rows",
        "at.part[c] += done.part[c];",
        "at.part[c] += c == 1 ? 0 : done.part[c];",
    ),
    (
        "rows of the keys before",
        "linear_segments.cu",
        "const uint32_t key = i + thread, rows",
        "at.part[c] += done.part[c];",
        "at.part[c] += c == 0 ? 0 : done.part[c];",
    ),
    (
        "keys counted once",
        "linear_segments.cu",
        "const uint32_t key = i + thread, rows",
        "done.part[c] += all.part[c];",
        "done.part[c] = all.part[c];",
    ),
    (
        "the last rows of a tile that is not full",
        "sums.cuh",
        "void begin(",
        "count <= x0 ?",
        "count <= x0 || (x0 == 96 && count < 128) ?",
    ),
    (
        "the last sixteen of a tile that is not full",
        "sums.cuh",
        "void begin(",
        "count <= x0 + 16 ?",
        "count <= x0 + 16 + (x0 == 96) ?",
    ),
    (
        "no bias in the decode path",
        "again_f64_tile.cuh",
        "void compute_tile_again(",
        "p.biases != nullptr",
        "false",
    ),
    (
        "another's bias in the decode path",
        "again_f64_tile.cuh",
        "void compute_tile_again(",
        "bias_row(p, tenant.slot)",
        "bias_row(p, 0)",
    ),
    (
        "slots at multiples of 16, many rows",
        "batch.cuh",
        "place_of(",
        "from % kArenaAlign != 0",
        "from % 16 != 0",
    ),
];

const FEW_LIST: &str = "#include \"restore.cu\"\n#include \"linear_small.cu\"\n#include \"embedding.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_small_bf16_m16) X(xorz_delta_restore_16) X(xorz_delta_apply_16) \
    X(xorz_delta_embedding_16)\n";
const MANY_LIST: &str = "#include \"linear_large.cu\"\n#include \"linear_segments.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_large_bf16) X(xorz_linear_segments_bf16)\n";

#[test]
fn mutants_of_few_rows_are_caught() {
    all_caught(&FEW, FEW_LIST, &[], |device| {
        decoded_sums(device, false)?;
        slots_between(device, &["few rows"])?;
        slots_between(device, &["embedding"])?;
        words_of_another_size(device, &[2])
    });
}

#[test]
fn mutants_of_many_rows_are_caught() {
    all_caught(&MANY, MANY_LIST, &[], |device| {
        many_tenants(device, Dtype::BF16)?;
        rows_of_a_tile(device, Dtype::BF16)?;
        decoded_sums(device, true)?;
        slots_between(device, &["many rows"])
    });
}
