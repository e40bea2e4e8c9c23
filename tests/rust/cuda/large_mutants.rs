//! Promise: the checks of products of many rows (`cuda_large`, `cuda_hostile`) notice what goes wrong in
//! their kernels: a barrier removed, a wait weakened, a fragment swapped, a change dropped, a gap off by one.
//! Each mutant is compiled and must be caught: by wrong results, with copies that land early or late, or by
//! the thread sanitizer.

use crate::common::data::{Rng, adversarial, perturbed, value, word};
use crate::common::device::{Device, TSAN};
use crate::common::kernels::{
    Fleet, LINEAR_OUT, LINEAR_STATUS, LOW_PANELS, Large, Linear, all_apart, nudged, on_tiles, run_large,
    status,
};
use crate::common::linear::{Case, first_difference, integers, values};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::codec::split::split;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::Resident;

const STAGES: [Mutant; 13] = [
    ("a wait for W weakened", "stages.cuh", "run_steps(", "<0>", "<1>"),
    ("a wait for x weakened", "stages.cuh", "run_steps(", "<1>", "<2>"),
    ("a window over the patched one", "stages.cuh", "run_steps(", "copied = free;", "copied = patched;"),
    ("windows out of order", "stages.cuh", "run_steps(", "multiplied = patched;", "multiplied = free;"),
    ("the first turn multiplied", "stages.cuh", "run_steps(", "sums.stop();", "sums.start();"),
    ("a column too many", "stages.cuh", "class Copier", "from + c < end_", "from + c <= end_"),
    ("a piece over the end", "stages.cuh", "class Copier", "from + S::kPer <= end_", "from < end_"),
    ("a piece before the first column", "stages.cuh", "class Copier", "from < end_ && ", ""),
    ("x over the end", "stages.cuh", "class Copier", "x_column < last ? x_column : last", "x_column"),
    (
        "the last window not patched",
        "stages.cuh",
        "run_steps(",
        "patch(stages.w[patched], column, s);",
        "if (column + kWindow < to) patch(stages.w[patched], column, s);",
    ),
    ("x of the step before", "stages.cuh", "run_steps(", "(s + 1) * kStepColumns", "s * kStepColumns"),
    ("x in the wrong order", "stages.cuh", "void begin(", "rows[row + i * kApart]", "(row + i * kApart)"),
    ("a row too many", "linear_large.cu", "write_sums(", "j >= pair.count", "j > pair.count"),
];

const SUMS: [Mutant; 8] = [
    (
        "halves of b swapped",
        "sums.cuh",
        "void begin(",
        "lane % 8, lane / 8 % 2",
        "lane % 8, (1 - lane / 8 % 2)",
    ),
    ("columns of b swapped", "sums.cuh", "uint32_t b0 =", "b[j / 2][j % 2 * 2]", "b[j / 2][(j + 1) % 2 * 2]"),
    ("rows of a swapped", "sums.cuh", "void begin(", "lane % 16", "(lane + 8) % 16"),
    ("sums of other rows", "sums.cuh", "void each_row(", "i * 8 + lane / 4", "(i ^ 1) * 8 + lane / 4"),
    ("sums of other columns", "sums.cuh", "void each_row(", "+ j % 2, sum", "+ (j + 1) % 2, sum"),
    ("a bias of the row beside", "sums.cuh", "void add(", "* 2 + j % 2);", "* 2 + (j + 1) % 2);"),
    ("a lone row left out", "sums.cuh", "void begin(", "count <= x0 ?", "count <= x0 + 1 ?"),
    ("sums kept", "sums.cuh", "void begin(", "j < 4; j++", "j < 3; j++"),
];

const ENTRIES: [Mutant; 15] = [
    (
        "one change dropped",
        "patch_rows.cuh",
        "void use(",
        "if (at[i] < end) *place[i]",
        "if (at[i] < end && i != 3) *place[i]",
    ),
    (
        "a gap off by one",
        "patch_rows.cuh",
        "void use(",
        "at[i - 1]) + gap_[i]",
        "at[i - 1]) + gap_[i] + (i == 3)",
    ),
    (
        "a window's end off by one",
        "patch_rows.cuh",
        "void use(",
        "taken += at[i] < end",
        "taken += at[i] <= end",
    ),
    ("a second entry taken for a first", "patch_rows.cuh", "void use(", "gap_[i] == 0 ?", "false ?"),
    (
        "a second entry on the rounded sum",
        "patch_rows.cuh",
        "void use(",
        "gap_[i] == 0 ? sum_ :",
        "gap_[i] == 0 ? D::value(D::narrow(sum_)) :",
    ),
    (
        "the first entry taken for a second",
        "patch_rows.cuh",
        "void begin(",
        "if (gap_[0] != 0) return;",
        "return;",
    ),
    ("a column beside the first", "patch_rows.cuh", "void begin(", "column_ = kNoColumn;\n  }", "}"),
    ("four records a window", "patch_rows.cuh", "void use(", "while (taken == kAtOnce)", "while (false)"),
    (
        "a record twice",
        "patch_rows.cuh",
        "void use(",
        "differences_ += taken",
        "differences_ += (taken - (taken == kAtOnce))",
    ),
    ("the word of another row", "patch_rows.cuh", "void begin(", ">(row);", ">(row ^ 1);"),
    (
        "padding taken for a column",
        "patch_rows.cuh",
        "void use_columns(",
        "if (difference == no_op<W>(D::kCode)) continue;",
        "",
    ),
    ("columns passed over", "patch_rows.cuh", "void use_columns(", "at >= end", "at + 1 >= end"),
    (
        "a second entry of a column on the rounded sum",
        "patch_rows.cuh",
        "void use_columns(",
        "at == column_ ?",
        "false ?",
    ),
    ("entries beyond the last column", "patch_rows.cuh", "After the last step", "sound_ = false;", "{}"),
    ("a tile found corrupt", "patch_rows.cuh", "void end(", "if (!sound_)", "if (false)"),
];

/// Quads of lanes: f32, and gradients.
const QUADS: [Mutant; 6] = [
    (
        "one change dropped",
        "patch_entries.cuh",
        "bool use(",
        "difference_ != nothing;",
        "difference_ != nothing && quad != 3;",
    ),
    ("a gap off by one", "patch_entries.cuh", "column_here()", "if (quad >= by) gaps", "if (quad > by) gaps"),
    ("a step's end off by one", "patch_entries.cuh", "bool use(", "at < end", "at <= end"),
    (
        "a second entry taken for a first",
        "patch_entries.cuh",
        "bool use(",
        "warp_ballot(close) != 0",
        "false",
    ),
    (
        "four records a step",
        "patch_entries.cuh",
        "bool use(",
        "return warp_ballot(taken == kQuad) == 0;",
        "return true;",
    ),
    (
        "a record twice",
        "patch_entries.cuh",
        "bool use(",
        "next_ += taken;",
        "next_ += taken - (taken == kQuad);",
    ),
];

const DIFFERENCES: [Mutant; 9] = [
    ("the last difference of a row", "patch_marks.cuh", "mark_listed(", "= e + 1;", "= e;"),
    (
        "the first difference of a row",
        "patch_marks.cuh",
        "mark_listed(",
        "marks.first[in_panel] = e;",
        "marks.first[in_panel] = e + 1;",
    ),
    ("marks without a barrier", "patch_marks.cuh", "if (list.count == 0)", "  block_sync();\n", ""),
    (
        "four differences a step",
        "patch_differences.cuh",
        "void step(",
        "while (warp_ballot(leading_votes(votes) == kQuad) != 0)",
        "while (false)",
    ),
    (
        "differences out of order",
        "differences.cuh",
        "out_of_order(",
        "before > position",
        "before == position + 1",
    ),
    ("three differences of a word", "differences.cuh", "out_of_order(", "e - span.from >= 2", "false"),
    ("a second difference taken for a first", "patch_differences.cuh", "void step(", "&& !second_", ""),
    (
        "a second difference left out",
        "patch_differences.cuh",
        "void fetch()",
        "pair_ = e + 1 < past_",
        "pair_ = false",
    ),
    ("the pair of another lane", "patch_differences.cuh", "void step(", "at_ + quad + 1", "at_ + quad"),
];

const STREAMS: [Mutant; 9] = [
    ("a walk's refill one bit early", "patch_streams.cuh", "struct Walk", "held < w", "held <= w"),
    ("the unit before the last", "patch_streams.cuh", "struct Walk", "- 1)) + 1;", "- 1));"),
    (
        "a row's first unit",
        "patch_streams.cuh",
        "walk_tile(",
        "marks.at[in_panel] = walk.at;",
        "marks.at[in_panel] = walk.last;",
    ),
    ("bits left of a unit", "patch_streams.cuh", "void begin(", "(kBits - held)", "(kBits - held - 1)"),
    ("units of the lane above", "patch_streams.cuh", "void step(W*", "(1u << lane) - 1", "(2u << lane) - 1"),
    (
        "an offset one bit wide",
        "patch_streams.cuh",
        "void step(W*",
        "Bits(1) << (width - 1)",
        "Bits(1) << width",
    ),
    (
        "walked ahead",
        "patch_streams.cuh",
        "walk_tile(",
        "c + (kAhead + i) * 32 + lane",
        "c + (kAhead + i + 1) * 32 + lane",
    ),
    (
        "a tile's units left over",
        "patch_streams.cuh",
        "rows == rect.rows ?",
        "walk.at == units",
        "walk.at <= units",
    ),
    (
        "read before marked",
        "patch_streams.cuh",
        "sixteens(r0, rect.r0, rect.rows));\n    });",
        "    block_sync();\n",
        "",
    ),
];

const REST: [Mutant; 8] = [
    ("a verdict before it is there", "linear_large.cu", "k != 0, k, sums);", "  block_sync();\n", ""),
    ("no decode path", "linear_large.cu", "write_sums(", "finite(sum)", "true"),
    (
        "the next pair of no tile",
        "linear_large.cu",
        "const uint32_t all",
        "tile >= all ? tile - all : tile",
        "tile",
    ),
    (
        "one tenant's delta for another's",
        "linear_large.cu",
        "fetch_pair(",
        "work.tenants + record.part[0]",
        "work.tenants",
    ),
    (
        "places of a warp",
        "linear_segments.cu",
        "take_places(",
        "place = from + bit_count(same & ((1u << lane) - 1));",
        "place = from;",
    ),
    ("a scan's lane", "linear_segments.cu", "Counts scan(", "if (lane >= by)", "if (lane > by)"),
    ("a decode path's other rows", "again_f64_tile.cuh", "dot_f64<D>", "rows[j]", "rows[0]"),
    (
        "decode path without differences",
        "again_f64.cuh",
        "fetch_row(",
        "if (way == kOnStream) add",
        "if (false) add",
    ),
];

/// Panels of 32 rows.
const LOW: [Mutant; 6] = [
    (
        "rows of a low panel passed over",
        "linear_large.cu",
        "fetch_pair(",
        "(pair.at) * pair.height",
        "(pair.at) * kRowsOfW",
    ),
    (
        "low panels counted as tall",
        "linear_large.cu",
        "block_sync();\n  XORZ_NO_UNROLL",
        "(pair.at) * pair.height",
        "(pair.at) * kRowsOfW",
    ),
    ("rows of x of a tall panel's warp", "sums.cuh", "first_of_x(", "warp * 16", "warp / 2 * 32"),
    ("rows of W of a tall panel's warp", "sums.cuh", "first_of_w(", "height < kRowsOfW ? 0 :", "false ? 0 :"),
    (
        "sums of the next warp's rows",
        "sums.cuh",
        "next warp's",
        "if (i >= 2 && height < kRowsOfW) break;",
        "",
    ),
    ("a lone row of the next warp", "sums.cuh", "void begin(", "count <= x0 ?", "count <= x0 + 1 ?"),
];

/// The same of f32.
const FUSED_LOW: [Mutant; 2] = [
    ("low sums of a tall panel", "sums.cuh", "struct FusedSums", "if (*height < kRowsOfW)", "if (true)"),
    (
        "low sums of one row",
        "sums.cuh",
        "struct FusedSums",
        "j < kRows; j++) XORZ_UNROLL",
        "j < kRows - (kRows == 2); j++) XORZ_UNROLL",
    ),
];

/// Caught by the thread sanitizer, whatever the order of threads.
const RACES: [Mutant; 8] = [
    (
        "keys counted without a barrier",
        "linear_segments.cu",
        "store(work.rows_of + key, 0u);",
        "  block_sync();\n",
        "",
    ),
    ("no barrier a step", "stages.cuh", "wait_for_copies<1>", "block_sync();", ""),
    ("x over what is multiplied", "stages.cuh", "run_steps(", "stages.x[1 - now], 0", "stages.x[now], 0"),
    ("differences over streams", "patch_streams.cuh", "Another lane may have", "    warp_sync();\n", ""),
    ("copies over marks", "stages.cuh", "sums.stop();", "block_sync();", ""),
    (
        "the next pair before it is there",
        "linear_large.cu",
        "pair.tile = tile >= all",
        "    block_sync();\n",
        "",
    ),
    ("a pair before it is there", "linear_large.cu", "pair.count = count;", "  block_sync();\n", ""),
    ("sums of the decode path", "again_f64_tile.cuh", "f64.sum[j] += sum;", "          block_sync();\n", ""),
];

const FUSED: [Mutant; 5] = [
    ("a column left out", "sums.cuh", "struct FusedSums", "c < 4", "c < 3"),
    (
        "rows of W swapped",
        "sums.cuh",
        "struct FusedSums",
        "w + S::piece_at(j0 + j * 16",
        "w + S::piece_at(j0 + (3 - j) * 16",
    ),
    ("the last exception of a row", "patch_marks.cuh", "mark_listed(", "= e + 1;", "= e;"),
    (
        "four exceptions a step",
        "patch_exceptions.cuh",
        "void step(",
        "while (warp_ballot(leading_votes(votes) == kQuad) != 0)",
        "while (false)",
    ),
    (
        "exceptions of other words",
        "patch_exceptions.cuh",
        "void step(",
        "words_ + at_ + quad",
        "words_ + at_",
    ),
];

/// As [`RACES`].
const FUSED_RACES: [Mutant; 2] = [
    (
        "exceptions over entries",
        "patch_entries.cuh",
        "may have written what an exception",
        "    warp_sync();\n",
        "",
    ),
    (
        "exceptions over differences",
        "patch_streams.cuh",
        "may have added to what an exception",
        "    warp_sync();\n",
        "",
    ),
];

/// Products that are launched together, and what each shall give.
struct Wanted {
    dtype: Dtype,
    all: Vec<(Large, Vec<f64>)>,
    exact: bool,
}

/// Early and late, in two orders of threads, and once of low panels instead of on `blocks` blocks.
fn ways(blocks: Option<usize>, large: impl Fn(bool, u64, Option<usize>) -> Large) -> Vec<Large> {
    [(false, 1, LOW_PANELS), (true, 2, blocks), (true, 0, blocks)]
        .map(|(l, s, blocks)| large(l, s, blocks))
        .into()
}

/// Tenants of every kind; of slot 10 a step has more differences than a row has lanes, some words two of
/// them.
fn of_fleet(rng: &mut Rng, dtype: Dtype, (n, k, m): (usize, usize, usize), odd: f64) -> Wanted {
    let shape = Shape { n, k };
    let words = |r: &mut Rng, words: usize| {
        let plain = integers(r, dtype, words, 6);
        let special = adversarial(r, dtype, words);
        r.mix(dtype, &plain, &special, odd)
    };
    let mut fleet = Fleet::new(rng, dtype, shape, words, 0.2);
    let exact = odd == 0.0;
    if exact {
        let (base, w) = (fleet.cases[0].base.clone(), dtype.word_bytes());
        // 300 less a small integer takes two bf16.
        let far = |i: usize| match i % 7 {
            0..3 => word(dtype, 64.0),
            3..5 => word(dtype, 300.0),
            _ => base[i * w..][..w].to_vec(),
        };
        let many: Vec<u8> = (0..n * k).flat_map(far).collect();
        let case = Case::new(dtype, shape, Encoding::Exponent, &base, &many);
        let blob = on_tiles(&case, 16, 256);
        replace(&mut fleet, 10, case, &blob);
        // Widths that depend on the base's word.
        let moved = nudged(rng, w, &base, 3, if dtype == Dtype::F32 { 16 } else { 0 });
        let small = |b: &[u8]| value(dtype, b).abs() < 2.5;
        let near = |(b, m): (&[u8], &[u8])| if small(b) { b } else { m }.to_vec();
        let near: Vec<u8> = base.chunks(w).zip(moved.chunks(w)).flat_map(near).collect();
        let case = Case::new(dtype, shape, Encoding::Exponent, &base, &near);
        let blob = case.blob.clone();
        replace(&mut fleet, 3, case, &blob);
    }
    let x = integers(rng, dtype, m * k, 2);
    let distinct: Vec<i32> = (0..m as i32).map(|i| i % 12 - 1).collect();
    let uneven = (0..m).map(|i| [3, 0, 4, 0, 0, 9, 10, 8, 0, 7, 2, 0][i % 12]).collect();
    let mut all = vec![];
    for map in [distinct, uneven] {
        let want = fleet.reference(&x, &map);
        let launched = ways(Some(5), |late, seed, blocks| fleet.large(&x, &map, blocks, late, seed));
        all.extend(launched.into_iter().map(|large| (large, want.clone())));
    }
    Wanted { dtype, all, exact }
}

fn replace(fleet: &mut Fleet, slot: usize, case: Case, blob: &[u8]) {
    fleet.slots[slot] = [fleet.arena.len() as i64, blob.len() as i64];
    fleet.arena.extend_from_slice(blob);
    fleet.cases[slot] = case;
}

/// Sums that overflow f32 on the way, in some rows of x, and come back.
fn of_overflows(dtype: Dtype) -> Wanted {
    let shape = Shape { n: 18, k: 128 };
    let m = 6;
    let large = f64::from(f32::from_bits(0x7F00_0000));
    let column = |c: usize| [1.0, 1.0, 0.0, -1.5][c / 32] * large * f64::from(u8::from(c % 32 == 5));
    let fine_tuned: Vec<u8> = (0..shape.n * shape.k).flat_map(|i| word(dtype, column(i % shape.k))).collect();
    let base = vec![0; fine_tuned.len()];
    let x: Vec<u8> =
        (0..m * shape.k).flat_map(|i| word(dtype, [1.0, -1.0, 0.25, -1.0, 0.5, 1.0][i / shape.k])).collect();
    let mut all = vec![];
    for encoding in [Encoding::Raw, Encoding::Exponent] {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let want = case.reference(&x, m, None);
        all.push((alone(&case, &case.blob, &x, m, 1).large(None, false), want));
    }
    Wanted { dtype, all, exact: true }
}

/// Columns of fine-tuned words of f32, many of which the sum of base word and differences, each rounded, is
/// not.
fn of_columns(rng: &mut Rng) -> Wanted {
    let (dtype, shape) = (Dtype::F32, Shape { n: 40, k: 96 });
    let k = shape.k;
    let base = rng.weights(dtype, shape.n * k);
    let bits = |word: &[u8]| u64::from(u32::from_le_bytes(word.try_into().unwrap()));
    let rounded = |base: &[u8], word: &[u8]| split(dtype, bits(base), bits(word)).exception;
    let mut fine_tuned = vec![];
    for (i, base) in base.chunks(4).enumerate() {
        let mut word = rng.weights(dtype, 1);
        // One word in 25 is such a one by chance, but not of every base word.
        for _ in 0..if i % 3 == 0 { 0 } else { 200 } {
            if !rounded(base, &word) {
                word = rng.weights(dtype, 1);
            }
        }
        fine_tuned.extend(word);
    }
    let x: Vec<u8> = (0..k * k).flat_map(|i| word(dtype, f64::from(u8::from(i / k == i % k)))).collect();
    let mut all = vec![];
    for encoding in [Encoding::Sparse, Encoding::Exponent] {
        let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        if encoding == Encoding::Exponent {
            case.blob = all_apart(&case, 32, 256);
        }
        assert!(Resident::parse(&case.blob).unwrap().header().exceptions > 1500, "{encoding}");
        let want = case.reference(&x, k, None);
        let launched =
            ways(None, |late, seed, blocks| alone(&case, &case.blob, &x, k, seed).large(blocks, late));
        all.extend(launched.into_iter().map(|large| (large, want.clone())));
    }
    Wanted { dtype, all, exact: true }
}

/// Differences that one bf16 cannot hold, so many of all, side by side or alone; `m` rows of x.
fn of_pairs(rng: &mut Rng, dtype: Dtype, encoding: Encoding, share: f64, m: usize) -> Wanted {
    let shape = Shape { n: 20, k: 96 };
    let base: Vec<u8> =
        (0..shape.n * shape.k).flat_map(|_| word(dtype, (rng.next() % 9 + 1) as f64 / 512.0)).collect();
    let near: Vec<u8> =
        (0..shape.n * shape.k).flat_map(|_| word(dtype, 1.0 + (rng.next() % 64) as f64 / 128.0)).collect();
    let single: Vec<u8> =
        base.chunks(dtype.word_bytes()).flat_map(|b| word(dtype, 2.0 * value(dtype, b))).collect();
    let near = rng.mix(dtype, &single, &near, share);
    let fine_tuned = rng.mix(dtype, &base, &near, 0.7);
    let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
    if encoding == Encoding::Exponent {
        case.blob = all_apart(&case, 32, 256);
    }
    let x = integers(rng, dtype, m * shape.k, 1);
    let want = case.reference(&x, m, None);
    let all = ways(Some(2), |late, seed, blocks| alone(&case, &case.blob, &x, m, seed).large(blocks, late));
    Wanted { dtype, all: all.into_iter().map(|large| (large, want.clone())).collect(), exact: true }
}

/// So few differences, some of two entries, that gaps are columns.
fn of_few(rng: &mut Rng, dtype: Dtype) -> Wanted {
    let (shape, m) = (Shape { n: 36, k: 3000 }, 2);
    let base: Vec<u8> = (0..shape.n * shape.k).flat_map(|_| word(dtype, 1.0 / 512.0)).collect();
    let other = |i: usize| word(dtype, if i.is_multiple_of(2) { 1.0 + 3.0 / 128.0 } else { 2.0 / 512.0 });
    let other: Vec<u8> = (0..shape.n * shape.k).flat_map(other).collect();
    let mut fine_tuned = rng.mix(dtype, &base, &other, 0.0015);
    // Whose column is the last one of a window, and of the matrix.
    for at in [63, shape.k - 1, 2 * shape.k + 127] {
        fine_tuned[at * 2..][..2].copy_from_slice(&word(dtype, 3.0));
    }
    let mut case = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
    assert_eq!(case.blob[14], 2, "gaps of two bytes");
    padding_in_column_0(&mut case.blob, shape.n.div_ceil(16));
    let x = integers(rng, dtype, m * shape.k, 1);
    let want = case.reference(&x, m, None);
    let all = ways(None, |late, seed, blocks| alone(&case, &case.blob, &x, m, seed).large(blocks, late));
    Wanted { dtype, all: all.into_iter().map(|large| (large, want.clone())).collect(), exact: true }
}

/// Padding of one tile column of records with gaps of two bytes, whose column says nothing.
fn padding_in_column_0(blob: &mut [u8], tiles: usize) {
    let number = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
    let (directory, payload) = (number(64), number(72));
    let spans: Vec<_> =
        (0..tiles).map(|t| (number(directory + 4 * t), number(directory + 4 * t + 4))).collect();
    let mut padded = 0;
    for (from, to) in spans {
        let (gaps, differences) = (payload + from * 64, payload + from * 64 + (to - from) * 32);
        for at in (0..(to - from) * 32).step_by(2) {
            if blob[differences + at..][..2] == [0x00, 0x80] {
                blob[gaps + at..][..2].fill(0);
                padded += 1;
            }
        }
    }
    assert!(padded > 0);
}

fn alone<'a>(case: &'a Case, blob: &'a [u8], x: &'a [u8], m: usize, seed: u64) -> Linear<'a> {
    Linear { arena: blob, seed, ..Linear::of_one(case, x, m) }
}

/// Deltas that contradict themselves, each of which must be reported and give NaN.
fn of_contradictions(rng: &mut Rng) -> Vec<Large> {
    let dtype = Dtype::BF16;
    let offset = |blob: &[u8], at: usize| u64::from_le_bytes(blob[at..at + 8].try_into().unwrap()) as usize;
    let mut all = vec![];
    // A step ends beyond the last column, and with it.
    for k in [200, 192] {
        let shape = Shape { n: 64, k };
        let base = rng.weights(dtype, shape.n * k);
        let far = perturbed(rng, dtype, &base, 0.05);
        let near = nudged(rng, 2, &base, 4, 0);
        let near = rng.mix(dtype, &near, &far, 0.05);
        let x = rng.weights(dtype, k);
        let entries = Case::new(dtype, shape, Encoding::Sparse, &base, &far);
        let streams = Case::new(dtype, shape, Encoding::Exponent, &base, &near);
        let mut beyond = entries.blob.clone();
        // The first gap of a row of the last tile: all its entries move on, the last ones out of the matrix.
        let directory = offset(&beyond, 64);
        let records = u32::from_le_bytes(beyond[directory + 12..directory + 16].try_into().unwrap()) as usize;
        let at = offset(&beyond, 72) + records * 16 * 3;
        beyond[at] += 60;
        let mut disordered = streams.blob.clone();
        let at = offset(&disordered, 184);
        (0..2).for_each(|i| disordered.swap(at + i, at + 2 + i));
        let mut three = streams.blob.clone();
        (2..6).for_each(|i| three[at + i] = three[at + i % 2]);
        let mut left_over = streams.blob.clone();
        left_over[128..160].iter_mut().for_each(|w| *w -= u8::from(*w > 1));
        let of_streams = [disordered, three, left_over].map(|blob| (blob, &streams));
        for (blob, case) in [(beyond, &entries)].into_iter().chain(of_streams) {
            let seeds = [(0, None), (1, None), (2, LOW_PANELS)];
            all.extend(seeds.map(|(seed, blocks)| alone(case, &blob, &x, 1, seed).large(blocks, true)));
        }
    }
    all
}

fn check(device: &Device, wanted: &[Wanted], contradictions: &[Large]) -> Result<(), String> {
    for Wanted { dtype, all, exact } in wanted {
        let launches: Vec<_> = all.iter().map(|(large, _)| large.clone()).collect();
        for (after, (_, want)) in run_large(device, &launches)?.iter().zip(all) {
            if status(after, LINEAR_STATUS) != 0 {
                return Err("a status".into());
            }
            let got = &after[LINEAR_OUT].bytes;
            let wrong = if *exact {
                first_difference(*dtype, got, want)
            } else {
                let class = |v: f64| (v.is_nan(), v.abs() > 3.4e38, v.abs() > 3.4e38 && v < 0.0);
                let differs = values(*dtype, got).iter().zip(want).position(|(g, w)| class(*g) != class(*w));
                differs.map(|i| format!("output {i}"))
            };
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
        }
    }
    for (i, after) in run_large(device, contradictions)?.iter().enumerate() {
        let nan = after[LINEAR_OUT].bytes[2 * 48..].iter().all(|b| *b == 0xFF);
        if status(after, LINEAR_STATUS) >> 24 != 1 || !nan {
            return Err(format!("contradiction {i} not reported, or no NaN"));
        }
    }
    Ok(())
}

const LIST: &str = "#include \"linear_large.cu\"\n#include \"linear_segments.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_large_bf16) X(xorz_linear_segments_bf16)\n";
const FUSED_LIST: &str = "#include \"linear_large.cu\"\n#include \"linear_segments.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_linear_large_f32) X(xorz_linear_segments_f32)\n";

fn caught_by_results(mutants: &[Mutant]) {
    let (mut rng, dtype) = (Rng::new(162), Dtype::BF16);
    let wanted = [
        of_overflows(dtype),
        // More rows than a tile has.
        of_pairs(&mut rng, dtype, Encoding::Sparse, 0.4, 129),
        of_pairs(&mut rng, dtype, Encoding::Sparse, 0.03, 3),
        of_pairs(&mut Rng::new(165), dtype, Encoding::Exponent, 0.4, 35),
        of_pairs(&mut Rng::new(166), dtype, Encoding::Exponent, 0.03, 3),
        of_fleet(&mut rng, dtype, (70, 300, 25), 0.0),
        of_fleet(&mut rng, dtype, (17, 320, 14), 0.002),
        of_few(&mut Rng::new(167), dtype),
        of_fleet(&mut Rng::new(168), dtype, (17, 320, 13), 0.0),
    ];
    let contradictions = of_contradictions(&mut rng);
    all_caught(mutants, LIST, &[], |device| check(device, &wanted, &contradictions));
}

#[test]
fn mutants_of_stages_and_sums_are_caught() {
    caught_by_results(&[&STAGES[..], &SUMS].concat());
}

#[test]
fn mutants_of_entries_and_differences_are_caught() {
    caught_by_results(&[&ENTRIES[..], &DIFFERENCES].concat());
}

#[test]
fn mutants_of_streams_and_of_the_rest_are_caught() {
    caught_by_results(&[&STREAMS[..], &REST].concat());
}

#[test]
fn mutants_of_low_panels_are_caught() {
    caught_by_results(&LOW);
}

#[test]
fn mutants_of_f32_are_caught() {
    let mut rng = Rng::new(163);
    // More rows of x than half of a low panel's, too.
    let wanted = [
        of_fleet(&mut rng, Dtype::F32, (33, 100, 13), 0.0),
        of_pairs(&mut Rng::new(169), Dtype::F32, Encoding::Sparse, 0.4, 40),
        of_columns(&mut rng),
    ];
    all_caught(&[&FUSED[..], &FUSED_LOW, &QUADS].concat(), FUSED_LIST, &[], |device| {
        check(device, &wanted, &[])
    });
}

#[test]
fn races_that_the_order_of_threads_hides_are_caught() {
    let mut rng = Rng::new(164);
    let dtype = Dtype::BF16;
    let special = of_fleet(&mut rng, dtype, (130, 296, 13), 0.01);
    let pairs = of_pairs(&mut rng, dtype, Encoding::Sparse, 0.4, 129);
    let launches: Vec<_> =
        special.all.iter().chain(pairs.all.iter().take(1)).map(|(large, _)| large.clone()).collect();
    all_caught(&RACES, LIST, &[TSAN], |device| run_large(device, &launches).map(drop));
    let columns: Vec<_> = of_columns(&mut rng).all.into_iter().map(|(large, _)| large).step_by(3).collect();
    all_caught(&FUSED_RACES, FUSED_LIST, &[TSAN], |device| run_large(device, &columns).map(drop));
}
