//! Promise: the checks of products of many rows (`cuda_large`, `cuda_hostile`) notice what goes wrong in
//! their kernels: a barrier removed, a wait weakened, a fragment swapped, a change dropped, a gap off by one.
//! Each mutant is compiled and must be caught: by wrong results, with copies that land early or late, or by
//! the thread sanitizer.

use crate::common::data::Rng;
use crate::common::device::TSAN;
use crate::common::kernels::run_large;
use crate::common::mutants::{Mutant, all_caught};
use crate::large_wanted::{
    WAYS, check, of_columns, of_contradictions, of_few, of_fleet, of_overflows, of_pairs,
};
use xorz::codec::Encoding;
use xorz::matrix::Dtype;

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
fn mutants_of_f32_are_caught() {
    let mut rng = Rng::new(163);
    let wanted = [of_fleet(&mut rng, Dtype::F32, (33, 100, 13), 0.0), of_columns(&mut rng)];
    all_caught(&[&FUSED[..], &QUADS].concat(), FUSED_LIST, &[], |device| check(device, &wanted, &[]));
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
    let columns: Vec<_> =
        of_columns(&mut rng).all.into_iter().map(|(large, _)| large).step_by(WAYS).collect();
    all_caught(&FUSED_RACES, FUSED_LIST, &[TSAN], |device| run_large(device, &columns).map(drop));
}
