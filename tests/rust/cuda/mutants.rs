//! Promise: the checks of `cuda_kernels` notice what goes wrong in kernels: a barrier removed, a lane
//! swapped, a threshold or an index off by one, a buffer reused too early. Each mutant is compiled and must
//! be caught.

use crate::common::data::{Rng, adversarial, perturbed, word};
use crate::common::device::{Device, Launch, TSAN};
use crate::common::kernels::{Fleet, LINEAR_OUT, all_apart, assert_streams, maps, nudged, restore};
use crate::common::linear::{Case, first_difference, integers, values};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

const DTYPE: Dtype = Dtype::BF16;

const RESTORE: [Mutant; 16] = [
    ("gaps summed without a barrier", "restore.cu", "gap_sum(records", "  block_sync();\n", ""),
    (
        "exceptions without a barrier",
        "restore.cu",
        "if (!sound) shared.corrupt = 1;",
        "  block_sync();\n",
        "",
    ),
    ("a run begins one run late", "restore.cu", "uint32_t column = 0;", "before < i", "before <= i"),
    ("a column's second entry taken twice", "words.cuh", "patch_run(", "if (same && !open) continue;", ""),
    (
        "a run ends before its column",
        "words.cuh",
        "patch_run(",
        "if (j >= run.to && !open) break;",
        "if (j >= run.to) break;",
    ),
    (
        "the first exception passed over",
        "words.cuh",
        "patch_exceptions(",
        "span.from + i;",
        "span.from + i + 1;",
    ),
    (
        "the first difference passed over",
        "differences.cuh",
        "bool add_differences(",
        "span.from + i;",
        "span.from + i + 1;",
    ),
    (
        "a second difference taken for a first",
        "differences.cuh",
        "bool add_differences(",
        "if (second) continue;",
        "",
    ),
    ("a second difference left out", "differences.cuh", "word_after(", "pair ? sum +", "false ? sum +"),
    ("staged words without a barrier", "restore.cu", "chunk.put(", "      warp_sync();\n", ""),
    ("a refill one bit early", "exponent.cuh", "void steps(", "held_ < width[i]", "held_ <= width[i]"),
    ("units of the lane above", "exponent.cuh", "void steps(", "(1u <<", "(2u <<"),
    (
        "a unit above other bits",
        "exponent.cuh",
        "Without a branch",
        "fresh[i] << held[i]",
        "fresh[i] << held[0]",
    ),
    ("units of the step before", "exponent.cuh", "void steps(", "mine = at_ +", "mine = at_ - (i != 0) +"),
    (
        "the next steps of another place",
        "restore.cu",
        "kSteps, true>",
        "stage[s + 32 * i",
        "stage[s + 32 * (i ^ 1)",
    ),
    ("an offset one bit wide", "exponent.cuh", "Without a branch", "over >> 1", "over"),
];

const LINEAR: [Mutant; 38] = [
    ("a column too many", "product.cuh", "load_columns(", "c + i < k", "c + i <= k"),
    ("warps added without a barrier", "product_tensor.cuh", "partial.sum[warp]", "  block_sync();\n", ""),
    (
        "columns of x of the other half",
        "product_tensor.cuh",
        "multiply_step(",
        "x.part[i], x.part[i + 1]",
        "x.part[i + 1], x.part[i]",
    ),
    (
        "rows of W swapped",
        "product_tensor.cuh",
        "multiply_step(",
        "{upper.part[i], lower",
        "{lower.part[i], upper",
    ),
    (
        "the next group a step early",
        "product_tensor.cuh",
        "multiply_groups(",
        "few += kApart",
        "few += kApart - 32",
    ),
    ("the other eight rows of x", "product_tensor.cuh", "*more =", "x_of(eighth + 8)", "x_of(eighth)"),
    ("sums of other rows of x", "product_tensor.cuh", "partial.sum[warp]", "+ e % 2]", "+ (e + 1) % 2]"),
    ("a row of W that there is not", "product_tensor.cuh", "row_of", "r < rows ? r", "r <= rows ? r"),
    (
        "a group more than there are",
        "product_tensor.cuh",
        "uint32_t groups =",
        "(all - warp + kWarps - 1)",
        "(all - warp + kWarps)",
    ),
    (
        "what is left beside the groups",
        "product_tensor.cuh",
        "for (uint32_t c = (groups",
        "groups * kW",
        "0 * kW",
    ),
    ("gaps taken without a barrier", "entries.cuh", "stage_rows(round, rows", "    block_sync();\n", ""),
    ("sums taken without a barrier", "entries.cuh", "runs.sums[warp]", "    block_sync();\n", ""),
    ("the other half warp's gaps", "entries.cuh", "bool add_tiles(", "0 : both - gaps", "0 : gaps"),
    ("a pair's gaps left out", "entries.cuh", "bool add_tiles(", "< group.run / 2)", "+ 1 < group.run / 2)"),
    ("a run's last record left out", "entries.cuh", "void walk(", "left != 0", "left > 1"),
    ("a record behind the run's", "entries.cuh", "void walk_four(", "i < count", "i <= count"),
    (
        "a neighbour's share of the records",
        "entries.cuh",
        "bool add_tiles(",
        "share + records.count",
        "share",
    ),
    (
        "columns in the wrong order",
        "entries.cuh",
        "void stage_pair(",
        "lower_halves(two[0]",
        "upper_halves(two[0]",
    ),
    (
        "rows of x in the wrong order",
        "entries.cuh",
        "void stage_rows(",
        "r < count ? r : 0",
        "r < count ? count - 1 - r : 0",
    ),
    ("the last columns are the first", "entries.cuh", "stage_pair(round.x[c], pairs", "+= kThreads", "+= 0"),
    (
        "another tenant's rows of the group",
        "entries.cuh",
        "bool add_tiles(",
        "from + r - group.from",
        "from + r",
    ),
    ("another tenant's runs", "entries.cuh", "bool add_tiles(", "(2u << half_warp)", "(1u << half_warp)"),
    ("a tenant's rows in two groups", "entries.cuh", "void begin(", "near >= 2 ? 2", "near >= 2 ? 1"),
    ("the base's list of other rows", "linear_small.cu", "on_base =", "way == kOnBase ||", ""),
    ("sums taken before they are there", "streams.cuh", "sums.tenant[warp] =", "    block_sync();\n", ""),
    ("tiles of a round twice", "streams.cuh", "add_streams(", "round += kWarps", "round += kWarps - 1"),
    ("a row's base words twice", "streams.cuh", "bool sum_stream(", ": row + view.k", ": row"),
    ("the last columns for whole steps", "streams.cuh", "bool sum_stream(", "left >= 32 *", "left >= 1 *"),
    (
        "columns that there are not",
        "streams.cuh",
        "void sum_words(",
        "lane < cols) << i",
        "lane <= cols) << i",
    ),
    ("the last difference of the steps", "streams.cuh", "bool within(", "next_ <", "next_ + 1 <"),
    ("rows above the panel for its own", "streams.cuh", "bool sum_stream(", "(r0 - rect.r0)", "(0 * r0)"),
    (
        "a difference passed over",
        "streams.cuh",
        "bool step(",
        "next_ < position + 32",
        "next_ < position + 31",
    ),
    ("the window of differences", "streams.cuh", "bool take(", "++used_ == 32", "++used_ == 31"),
    ("second differences left out", "streams.cuh", "bool sum_differences(", "differences.count > 1", "false"),
    (
        "first differences of other words",
        "streams.cuh",
        "bool take(",
        "thread_index() % 32;",
        "(thread_index() ^ 1) % 32;",
    ),
    ("no decode path", "linear_small.cu", "const bool refused", "finite(value)", "true"),
    (
        "decode path without exceptions",
        "again_f64.cuh",
        "fetch_row(",
        "!override_row(v, tile, rect, r, words)",
        "false",
    ),
    ("the base's bias", "batch.cuh", "bias_row(", "slot < 0 ? p.slot_count", "slot < 0 ? 0"),
];

/// Of f32, which no matrix instruction multiplies.
const FUSED: [Mutant; 3] = [
    ("halves added without a barrier", "product.cuh", "half == 1 && lane", "  block_sync();\n", ""),
    ("a lane left out of the butterfly", "product.cuh", "void add_product(", "other = 16;", "other = 8;"),
    ("rows of W swapped", "product.cuh", "half == 1 && lane", "total[r0 + r]", "total[r0 + (r ^ 1)]"),
];

/// Caught by the thread sanitizer, whatever the order of threads.
const RESTORE_RACES: [Mutant; 4] = [
    (
        "staged over what is being stored",
        "restore.cu",
        "store(to + i, stage[i]);",
        "      warp_sync();\n",
        "",
    ),
    ("a tile's last barrier", "restore.cu", "shared.corrupt) {", "  block_sync();\n}", "}"),
    (
        // The barrier after the tile's last words would do, as would the one before its differences: both are
        // left out.
        "differences before the stream's words",
        "restore.cu",
        "store(to + i, stage[i]);",
        concat!(
            "      warp_sync();\n      r = next_r;\n      c = next_c;\n    }\n",
            "    sound = stream.sound(true);\n  }\n  warp_sync();\n"
        ),
        concat!(
            "      r = next_r;\n      c = next_c;\n      if (r < rect.rows) warp_sync();\n    }\n",
            "    sound = stream.sound(true);\n  }\n"
        ),
    ),
    ("exceptions before differences", "restore.cu", "add_differences<W>(", "  warp_sync();\n", ""),
];
const LINEAR_RACES: [Mutant; 2] = [
    ("sums of the decode path over a round's", "streams.cuh", "all += sums.sum", "    block_sync();\n", ""),
    ("sums of the decode path", "again_f64.cuh", "f64.sum[j] += ", "          block_sync();\n", ""),
];

fn restores(device: &Device) -> Result<(), String> {
    let mut rng = Rng::new(61);
    let mut launches: Vec<Launch> = vec![];
    let mut wants = vec![];
    for (n, k) in [(19, 700), (40, 64), (3, 4200)] {
        let shape = Shape { n, k };
        let base = rng.weights(DTYPE, n * k);
        // Many words that take two entries, and exceptions.
        let near = perturbed(&mut rng, DTYPE, &base, 0.3);
        let far: Vec<u8> = (0..n * k).flat_map(|_| word(DTYPE, rng.normal())).collect();
        let odd = adversarial(&mut rng, DTYPE, n * k);
        let near = rng.mix(DTYPE, &near, &far, 0.1);
        let fine_tuned = rng.mix(DTYPE, &near, &odd, 0.01);
        let steps = nudged(&mut rng, 2, &base, 5, 0);
        let steps = rng.mix(DTYPE, &steps, &odd, 0.01);
        for (encoding, fine_tuned) in [(Encoding::Sparse, &fine_tuned), (Encoding::Exponent, &steps)] {
            let case = Case::new(DTYPE, shape, encoding, &base, fine_tuned);
            assert_streams(&case.blob);
            for seed in 0..4 {
                for apply in [false, true] {
                    launches.push(restore(apply, (2, shape), 2, &base, &case.blob, 2, seed));
                    wants.push((usize::from(!apply), case.fine_tuned.clone()));
                }
            }
        }
    }
    let after = device.run(&launches)?;
    for (after, (out, want)) in after.iter().zip(wants) {
        if after[out].bytes != want {
            return Err("other words".into());
        }
    }
    Ok(())
}

/// Products of `rows` rows of x a block.
fn products(device: &Device, dtype: Dtype, rows: usize) -> Result<(), String> {
    let mut rng = Rng::new(62);
    for (n, k, odd) in [(33, 290, 0.002), (35, 1030, 0.0), (18, 4360, 0.0)] {
        let shape = Shape { n, k };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 6);
            let special = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &special, odd)
        };
        let mut fleet = Fleet::new(&mut rng, dtype, shape, words, 0.1);
        // A tenant whose exponent tiles hold more than 32 differences each, two of some words (256 less a
        // negative number).
        let many: Vec<u8> =
            (0..n * k).flat_map(|i| word(dtype, if i % 40 == 7 { 256.0 } else { 1.0 })).collect();
        if odd == 0.0 {
            let case = Case::new(dtype, shape, Encoding::Exponent, &fleet.cases[0].base, &many);
            let blob = all_apart(&case, 16, 512);
            fleet.slots[10] = [fleet.arena.len() as i64, blob.len() as i64];
            fleet.arena.extend_from_slice(&blob);
            fleet.cases[10] = case;
        }
        let m = 16;
        let x = integers(&mut rng, dtype, m * k, 2);
        let maps = maps(&mut rng, m);
        let seeds = if k == 1030 { 0..3 } else { 1..2 };
        for seed in seeds {
            let launches: Vec<_> = maps.iter().map(|map| fleet.launch(&x, map, rows, seed)).collect();
            for (after, map) in device.run(&launches)?.iter().zip(&maps) {
                let (got, want) = (&after[LINEAR_OUT].bytes, fleet.reference(&x, map));
                let wrong = if odd == 0.0 {
                    first_difference(dtype, got, &want)
                } else {
                    let got = values(dtype, got);
                    let class = |v: f64| {
                        (
                            v.is_nan(),
                            !v.is_nan() && v.abs() > 3.4e38,
                            v.is_sign_negative() && v.abs() > 3.4e38,
                        )
                    };
                    got.iter()
                        .zip(&want)
                        .position(|(g, w)| class(*g) != class(*w))
                        .map(|i| format!("output {i}"))
                };
                if let Some(wrong) = wrong {
                    return Err(wrong);
                }
            }
        }
    }
    Ok(())
}

const RESTORE_LIST: &str =
    "#include \"restore.cu\"\n#define XORZ_KERNELS(X) X(xorz_delta_restore_16) X(xorz_delta_apply_16)\n";
const LINEAR_LIST: &str =
    "#include \"linear_small.cu\"\n#define XORZ_KERNELS(X) X(xorz_linear_small_bf16_m16)\n";
const FUSED_LIST: &str =
    "#include \"linear_small.cu\"\n#define XORZ_KERNELS(X) X(xorz_linear_small_f32_m4)\n";

#[test]
fn mutants_of_restore_are_caught() {
    all_caught(&RESTORE, RESTORE_LIST, &[], restores);
}

#[test]
fn mutants_of_products_are_caught() {
    all_caught(&LINEAR, LINEAR_LIST, &[], |device| products(device, DTYPE, 16));
    all_caught(&FUSED, FUSED_LIST, &[], |device| products(device, Dtype::F32, 4));
}

#[test]
fn races_that_the_order_of_threads_hides_are_caught() {
    // One launch of each: a race is found without waiting for an order that shows it.
    let mut rng = Rng::new(63);
    let shape = Shape { n: 40, k: 1100 };
    let base = rng.weights(DTYPE, 44000);
    let near = nudged(&mut rng, 2, &base, 5, 0);
    let odd = adversarial(&mut rng, DTYPE, 44000);
    let near = rng.mix(DTYPE, &near, &odd, 0.01);
    let cases = [Encoding::Sparse, Encoding::Exponent].map(|e| Case::new(DTYPE, shape, e, &base, &near));
    let restores: Vec<_> =
        cases.iter().map(|c| restore(false, (2, shape), 2, &base, &c.blob, 1, 1)).collect();
    all_caught(&RESTORE_RACES, RESTORE_LIST, &[TSAN], |device| device.run(&restores).map(drop));
    let special = |r: &mut Rng, words: usize| {
        let plain = integers(r, DTYPE, words, 6);
        let odd = adversarial(r, DTYPE, words);
        r.mix(DTYPE, &plain, &odd, 0.001)
    };
    let fleet = Fleet::new(&mut rng, DTYPE, Shape { n: 19, k: 2100 }, special, 0.1);
    let mut x = integers(&mut rng, DTYPE, 8 * 2100, 2);
    // Every row takes the decode path.
    x.chunks_mut(2 * 2100).for_each(|x| x[..2].copy_from_slice(&word(DTYPE, f64::INFINITY)));
    let launches = [fleet.launch(&x, &[7, 8, 3, 3, 8, 7, 0, 8], 16, 1)];
    all_caught(&LINEAR_RACES, LINEAR_LIST, &[TSAN], |device| device.run(&launches).map(drop));
}
