//! Promise: the checks of gradients for the input (`grad.rs`) notice what goes wrong in their kernel: a strip begun at the wrong
//! place, rows that are not there, a fragment swapped, a barrier removed. Each mutant is compiled and must be caught, by wrong
//! results or by the thread sanitizer.

use crate::common::data::{Rng, word};
use crate::common::device::{Device, TSAN};
use crate::common::grads::{fleet_grad, fleet_reference, grad_of_one};
use crate::common::kernels::{Fleet, LINEAR_OUT, LINEAR_STATUS, Large, on_tiles, run_large, status};
use crate::common::linear::{Case, first_difference, integers};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

const STRIPS: [Mutant; 14] = [
    (
        "the last step not patched",
        "linear_grad.cu",
        "wait_for_copies<0>();",
        "s * kStepColumns < shared",
        "(s + 1) * kStepColumns < shared",
    ),
    ("a column too many", "linear_grad.cu", "void stage_columns(", "from + c < end", "from + c <= end"),
    (
        "a strip from its tile's first column",
        "linear_grad.cu",
        "void fetch_strip(",
        "c0 & (view.tile_cols() - 1) : 0",
        "0u : 0u",
    ),
    (
        "a strip of the tile column before",
        "linear_grad.cu",
        "void fetch_strip(",
        "tiled ? c0 >> view.cols_log2 : 0",
        "0",
    ),
    (
        "right of the strip unseen",
        "linear_grad.cu",
        "void fetch_strip(",
        "if (tiled) patch.pass_over(view.tile_cols());",
        "",
    ),
    (
        "left of the strip not passed over",
        "patch_entries.cuh",
        "void begin(",
        "if (start != 0) pass_over(start);",
        "",
    ),
    ("a row marked where it begins", "patch_streams.cuh", "walk_tile(", "c == start &&", "c == 0 &&"),
    (
        "the first half of a tile twice",
        "linear_grad.cu",
        "fetch_grad_pair(",
        "record.part[1] + before",
        "record.part[1]",
    ),
    (
        "a half of a tile left out",
        "linear_grad.cu",
        "fetch_grad_pair(",
        "record.part[2] <= before",
        "before != 0",
    ),
    (
        "words stored apart left out",
        "linear_grad.cu",
        "void linear_grad(",
        "PatchEntries<D, true>",
        "PatchEntries<D, false>",
    ),
    ("nothing computed again", "linear_grad.cu", "write_grads(", "!lost && finite(sum)", "!lost"),
    (
        "another row computed again",
        "linear_grad.cu",
        "compute_grads_again(",
        "p.x + rows[i] * p.n",
        "p.x + rows[0] * p.n",
    ),
    ("a contradiction unsaid", "linear_grad.cu", "grad_of_pair(", "shared.corrupt != 0)", "false)"),
    (
        "the next pair of no tile",
        "linear_grad.cu",
        "const uint32_t all",
        "tile >= all ? tile - all : tile",
        "tile",
    ),
];

/// Quads of lanes, which products of bf16 and f16 do without (`large_mutants`).
const QUADS: [Mutant; 2] = [
    (
        "a second entry on the rounded sum",
        "patch_entries.cuh",
        "add_in_order(",
        "(there == last_ ? sum_ : D::value(*word))",
        "D::value(*word)",
    ),
    ("a tile found corrupt", "patch_entries.cuh", "void end(", "if (!sound_)", "if (false)"),
];

const SUMS: [Mutant; 6] = [
    (
        "rows of W swapped",
        "grad_sums.cuh",
        "const uint32_t row = r",
        "lane / 8 % 2 * 8",
        "(1 - lane / 8 % 2) * 8",
    ),
    (
        "columns of W swapped",
        "grad_sums.cuh",
        "load_matrices_turned(b[j]",
        "2 * j + lane / 16",
        "2 * j + 1 - lane / 16",
    ),
    ("the first half of a panel twice", "grad_sums.cuh", "const uint32_t row = r", "row = r +", "row ="),
    ("rows of grad swapped", "grad_sums.cuh", "load_matrices(a,", "lane % 16", "(lane + 8) % 16"),
    ("a sixteenth row left out", "grad_sums.cuh", "void step(", "i * 16 >= count", "i * 16 + 1 >= count"),
    (
        "sums of other columns",
        "grad_sums.cuh",
        "void each(",
        "lane % 4 * 2 + e % 2",
        "lane % 4 * 2 + 1 - e % 2",
    ),
];

const RACES: [Mutant; 3] = [
    (
        "marks over words in use",
        "linear_grad.cu",
        "void fetch_strip(",
        "across, start);\n  block_sync();",
        "across, start);",
    ),
    ("grad over grad in use", "linear_grad.cu", "void grad_of_pair(", "if (r != 0) block_sync();", ""),
    ("words before they are there", "linear_grad.cu", "void each_panel(", "    block_sync();\n", ""),
];

const FUSED: [Mutant; 3] = [
    (
        "columns of the other half",
        "grad_sums.cuh",
        "struct FusedGrads",
        "w[half * 2 + j0 / 8]",
        "w[(1 - half) * 2 + j0 / 8]",
    ),
    ("a row of W left out", "grad_sums.cuh", "struct FusedGrads", "c < 4", "c < 3"),
    ("outputs of the other half", "grad_sums.cuh", "struct FusedGrads", "j / 4 * 64", "(1 - j / 4) * 64"),
];

struct Wanted {
    dtype: Dtype,
    large: Large,
    want: Vec<f64>,
}

fn wanted(rng: &mut Rng, dtype: Dtype) -> Vec<Wanted> {
    let mut all = vec![];
    for (n, k, m) in [(70, 600, 12), (33, 140, 80)] {
        let fleet = Fleet::new(rng, dtype, Shape { n, k }, |r, w| integers(r, dtype, w, 8), 0.1);
        let x = integers(rng, dtype, m * n, 3);
        // More rows of one tenant than a block takes, and some of each of the others.
        let map: Vec<i32> = (0..m as i32).map(|i| if i < 67 && m > 70 { 0 } else { i % 12 - 1 }).collect();
        for (late, seed) in [(false, 0), (true, 1), (true, 2)] {
            let large = fleet_grad(&fleet, &x, &map, Some(3), late, seed);
            all.push(Wanted { dtype, large, want: fleet_reference(&fleet, &x, &map) });
        }
    }
    // Sums that leave f32 and come back sixteen rows later (within an mma they would not leave it), and words that no
    // difference gives, in two rows of grad and more.
    let shape = Shape { n: 70, k: 300 };
    let mut base = integers(rng, dtype, shape.n * shape.k, 3);
    let mut far = base.clone();
    let w = dtype.word_bytes();
    let put = |words: &mut Vec<u8>, r: usize, c: usize, v: f64| {
        words[(r * 300 + c) * w..][..w].copy_from_slice(&word(dtype, v));
    };
    for (r, v) in [(0, 3e38), (1, 3e38), (20, -3e38), (21, -3e38)] {
        (0..300).step_by(7).for_each(|c| put(&mut far, r, c, v));
    }
    for c in [5, 270] {
        put(&mut base, 9, c, f64::INFINITY);
        put(&mut far, 9, c, 2.0);
    }
    let x: Vec<u8> = (0..6 * shape.n).flat_map(|i| word(dtype, [1.0, 2.0][i / shape.n % 2])).collect();
    for encoding in [Encoding::Sparse, Encoding::Exponent] {
        let case = Case::new(dtype, shape, encoding, &base, &far);
        let want = case.reference_grad(&x, 6);
        all.push(Wanted { dtype, large: grad_of_one(&case, &case.blob, &x, 6, true, 1), want });
    }
    all.push(of_pairs(rng, dtype));
    all
}

/// Many differences that one bf16 cannot hold, side by side and alone.
fn of_pairs(rng: &mut Rng, dtype: Dtype) -> Wanted {
    let shape = Shape { n: 20, k: 96 };
    let words = shape.n * shape.k;
    let base: Vec<u8> = (0..words).flat_map(|_| word(dtype, (rng.next() % 9 + 1) as f64 / 512.0)).collect();
    let far: Vec<u8> = (0..words).flat_map(|_| word(dtype, 1.0 + (rng.next() % 64) as f64 / 128.0)).collect();
    let fine_tuned = rng.mix(dtype, &base, &far, 0.3);
    let case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
    let x = integers(rng, dtype, 3 * shape.n, 1);
    let want = case.reference_grad(&x, 3);
    Wanted { dtype, large: grad_of_one(&case, &case.blob, &x, 3, true, 1), want }
}

/// A tile whose last record lies beyond its columns, right of all strips but the last.
fn contradiction(rng: &mut Rng) -> Large {
    let (dtype, shape) = (Dtype::BF16, Shape { n: 16, k: 600 });
    let base = integers(rng, dtype, shape.n * shape.k, 3);
    let other = integers(rng, dtype, shape.n * shape.k, 3);
    let fine_tuned = rng.mix(dtype, &base, &other, 0.1);
    let case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
    let mut blob = on_tiles(&case, 16, 1024);
    let at = |at: usize| u64::from_le_bytes(blob[at..at + 8].try_into().unwrap()) as usize;
    let (payload, records) = (at(72), at(56));
    // All differences of the last record are meant, and its gaps lead beyond 600 columns.
    blob[payload + 16 * (records - 1)..payload + 16 * records].fill(0xFF);
    let differences = payload + 16 * records + 32 * (records - 1);
    blob[differences..differences + 32].fill(0x3F);
    grad_of_one(&case, &blob, &integers(rng, dtype, 16, 2), 1, false, 0)
}

fn check(device: &Device, wanted: &[Wanted], contradiction: Option<&Large>) -> Result<(), String> {
    let launches: Vec<_> = wanted.iter().map(|w| w.large.clone()).collect();
    for (after, w) in run_large(device, &launches)?.iter().zip(wanted) {
        if status(after, LINEAR_STATUS) != 0 {
            return Err("a status".into());
        }
        first_difference(w.dtype, &after[LINEAR_OUT].bytes, &w.want).map_or(Ok(()), Err)?;
    }
    for after in run_large(device, contradiction.map(std::slice::from_ref).unwrap_or(&[]))? {
        let nan = after[LINEAR_OUT].bytes.iter().all(|b| *b == 0xFF);
        if status(&after, LINEAR_STATUS) >> 24 != 1 || !nan {
            return Err("a contradiction not reported, or no NaN".into());
        }
    }
    Ok(())
}

const LIST: &str = "#include \"linear_grad.cu\"\n#include \"linear_segments.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_grad_bf16) X(xorz_linear_segments_bf16)\n";
const FUSED_LIST: &str = "#include \"linear_grad.cu\"\n#include \"linear_segments.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_grad_f32) X(xorz_linear_segments_f32)\n";

#[test]
fn mutants_of_gradients_are_caught() {
    let mut rng = Rng::new(331);
    let (all, bad) = (wanted(&mut rng, Dtype::BF16), contradiction(&mut rng));
    all_caught(&[&STRIPS[..], &QUADS, &SUMS].concat(), LIST, &[], |device| check(device, &all, Some(&bad)));
    let all = wanted(&mut rng, Dtype::F32);
    all_caught(&FUSED, FUSED_LIST, &[], |device| check(device, &all, None));
}

#[test]
fn races_of_gradients_are_caught() {
    // Some rows of all tenants, and the sums that are computed again: there nothing but the panel's own barrier waits for words.
    let mut all = wanted(&mut Rng::new(332), Dtype::BF16);
    let far = all.split_off(6);
    all.truncate(2);
    all.extend(far);
    all_caught(&RACES, LIST, &[TSAN], |device| check(device, &all, None));
}
