//! Promise: a forged delta costs a device no more than its matrix does, and `delta_apply_` changes no word unless every tile of
//! the delta is sound. Mutants of both are noticed.

use crate::common::data::{Rng, perturbed};
use crate::common::device::{After, Device, Launch};
use crate::common::kernels::{
    APPLY_STATUS, APPLY_WEIGHT, LINEAR_OUT, LINEAR_STATUS, Linear, all_apart, device, restore, run_applies,
    run_large, status, verify,
};
use crate::common::linear::{Case, integers};
use crate::common::lookups::{LOOKUP_STATUS, Tables};
use crate::common::mutants::{Mutant, all_caught};
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{HEADER_BYTES, Resident};

type Checked = Result<(), String>;

fn ensure(is_so: bool, what: impl Fn() -> String) -> Checked {
    if is_so { Ok(()) } else { Err(what()) }
}

fn put(blob: &mut [u8], at: usize, word: u32) {
    blob[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

fn offset(blob: &[u8], at: usize) -> usize {
    u64::from_le_bytes(blob[at..at + 8].try_into().unwrap()) as usize
}

/// The delta of `case` with its last tile contradicting itself: its records, its stream, its differences.
fn forged_at_the_end(case: &Case) -> Vec<Vec<u8>> {
    let h = *Resident::parse(&case.blob).unwrap().header();
    let tiles = Resident::parse(&case.blob).unwrap().grid().tiles();
    let last = HEADER_BYTES + 4 * (tiles - 1);
    let mut cut = case.blob.clone();
    let from = u32::from_le_bytes(cut[last..last + 4].try_into().unwrap());
    let mut all = vec![];
    match h.encoding {
        Encoding::Sparse => {
            // The gaps of the last tile's first record: all beyond its columns.
            let gap = usize::from(cut[14]);
            let at = offset(&cut, 72) + from as usize * 16 * (gap + case.dtype.word_bytes());
            cut[at..at + 16 * gap].fill(0xFF);
            all.push(cut);
        }
        Encoding::Exponent => {
            put(&mut cut, last, from + 1);
            all.push(cut);
            if h.entries > 1 {
                // Two of the last differences in the wrong order.
                let mut swapped = case.blob.clone();
                let at = offset(&swapped, 184) + 2 * (h.entries as usize - 2);
                swapped[at..at + 4].rotate_left(2);
                all.push(swapped);
            }
        }
        other => panic!("{other}"),
    }
    all
}

/// Applies of deltas whose last tile is forged, on more blocks of verify than a block has threads, and on few.
fn applies(device: &Device) -> Checked {
    let (mut rng, dtype) = (Rng::new(301), Dtype::BF16);
    for (shape, encoding) in [
        (Shape { n: 40, k: 700 }, Encoding::Sparse),
        (Shape { n: 40, k: 700 }, Encoding::Exponent),
        // Its 282 tiles: the last one is of a block beyond the 256 threads that read verdicts.
        (Shape { n: 4500, k: 3 }, Encoding::Sparse),
    ] {
        let base = integers(&mut rng, dtype, shape.n * shape.k, 8);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.5);
        let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        let mut blobs = forged_at_the_end(&case);
        if encoding == Encoding::Exponent {
            case.blob = all_apart(&case, 16, 256);
            blobs.extend(forged_at_the_end(&case));
            ensure(blobs.len() >= 3, || "no differences were forged".into())?;
        }
        let launch = |blob: &[u8]| restore(true, (2, shape), 2, &base, blob, 3, 1);
        for blocks in [1, 2, 300] {
            let launches: Vec<Launch> = blobs.iter().map(|blob| launch(blob)).collect();
            for after in run_applies(device, &launches, blocks)? {
                let name = || format!("{encoding} {shape} on {blocks} blocks");
                let code = status(&after, APPLY_STATUS);
                ensure(code == 1 << 24, || format!("{}: status {code:#x}", name()))?;
                ensure(after[APPLY_WEIGHT].bytes == base, || format!("{}: words changed", name()))?;
            }
            let after = run_applies(device, &[launch(&case.blob)], blocks)?.remove(0);
            let well = status(&after, APPLY_STATUS) == 0 && after[APPLY_WEIGHT].bytes == fine_tuned;
            ensure(well, || format!("{encoding} {shape} on {blocks} blocks: a sound delta is not applied"))?;
        }
    }
    Ok(())
}

#[test]
fn a_delta_with_one_forged_tile_changes_no_word() {
    applies(&device()).unwrap();
}

/// Every other tile's part of a section is all of it: `all` units, positions or words.
fn overlapping(blob: &mut [u8], directory: usize, tiles: usize, all: u32) {
    for tile in 0..=tiles {
        put(blob, directory + 4 * tile, if tile % 2 == 0 { 0 } else { all });
    }
}

/// Deltas whose directories claim everything for every other tile, and whose bytes are no reason to stop early.
fn greedy(rng: &mut Rng) -> Vec<Case> {
    let (dtype, shape) = (Dtype::BF16, Shape { n: 16 * 40, k: 256 });
    let base = integers(rng, dtype, shape.n * shape.k, 8);
    let fine_tuned = perturbed(rng, dtype, &base, 0.4);
    let tiles = 40;
    let mut sparse = Case::new(dtype, shape, Encoding::Sparse, &base, &fine_tuned);
    let h = *Resident::parse(&sparse.blob).unwrap().header();
    assert!(sparse.blob[14] == 1 && h.units > 1500, "{} records", h.units);
    // Records that step over nothing and change nothing, gaps and differences of any tile alike: the word -0.0 is the bytes
    // 0x00, 0x80, so gaps are made of 0x00 where they lie, which follows from the first tile that claims all.
    let (at, units) = (offset(&sparse.blob, 72), h.units as usize);
    sparse.blob[at..at + 16 * units].fill(0);
    sparse.blob[at + 16 * units..at + 48 * units].chunks_mut(2).for_each(|w| w.copy_from_slice(&[0, 0x80]));
    overlapping(&mut sparse.blob, HEADER_BYTES, tiles, h.units as u32);

    let mut apart = Case::new(dtype, shape, Encoding::Exponent, &base, &fine_tuned);
    apart.blob = all_apart(&apart, 16, 256);
    let h = *Resident::parse(&apart.blob).unwrap().header();
    assert!(h.entries > 10_000, "{} differences", h.entries);
    let directory = offset(&apart.blob, 176);
    overlapping(&mut apart.blob, directory, tiles, h.entries as u32);
    vec![sparse, apart]
}

fn counted(mut launch: Launch) -> Launch {
    launch.count = true;
    launch
}

/// Bytes of parameter `at` that blocks read, each counting a sector once.
fn moved(after: &[After], at: usize) -> usize {
    32 * after[at].sectors.1 as usize
}

/// What kernels read of such a delta is bounded by its length.
fn greed(device: &Device) -> Checked {
    let mut rng = Rng::new(302);
    for case in greedy(&mut rng) {
        let (dtype, shape) = (case.dtype, case.shape);
        let name = |what: &str| format!("{what} of {}", case.name());
        let bound = 2 * case.blob.len();
        let fits = |what: &str, bytes: usize, code: u32| {
            ensure(code >> 24 == 1, || format!("{}: status {code:#x}", name(what)))?;
            ensure(bytes <= bound, || format!("{}: {bytes} bytes of {}", name(what), case.blob.len()))
        };
        let one = |launch: Launch| device.run(&[counted(launch)]).map(|mut after| after.remove(0));
        let after = one(restore(false, (2, shape), 2, &case.base, &case.blob, 40, 0))?;
        fits("restore", moved(&after, 2), status(&after, 7))?;
        let apply = restore(true, (2, shape), 2, &case.base, &case.blob, 40, 0);
        let after = one(verify(&apply, 40))?;
        fits("verify", moved(&after, 1), status(&after, APPLY_STATUS))?;
        let after = one(apply)?;
        fits("apply", moved(&after, 1), status(&after, APPLY_STATUS))?;

        let x = integers(&mut rng, dtype, 2 * shape.k, 2);
        let linear = Linear { seed: 0, ..Linear::of_one(&case, &x, 2) };
        let after = one(linear.launch())?;
        // Of few rows, differences are walked with the words, and end with the first one out of order.
        if case.encoding == Encoding::Sparse {
            fits("a product of few rows", moved(&after, 4), status(&after, LINEAR_STATUS))?;
        }
        let mut large = linear.large(None, false);
        large.product.count = true;
        let after = run_large(device, &[large])?.remove(0);
        fits("a product of many rows", moved(&after, 4), status(&after, LINEAR_STATUS))?;
        ensure(after[LINEAR_OUT].bytes.contains(&0xFF), || name("no NaN"))?;

        // A row of every other tile.
        let slots = vec![[0, case.blob.len() as i64]];
        let tables =
            Tables { dtype, shape, base: case.base.clone(), tables: vec![], arena: case.blob.clone(), slots };
        let indices: Vec<i64> = (0..20).map(|i| 32 * i + 5).collect();
        let after = one(tables.launch(&indices, &[0; 20], (20, 1), 0))?;
        fits("lookups", moved(&after, 2), status(&after, LOOKUP_STATUS))?;
    }
    Ok(())
}

#[test]
fn directories_that_claim_everything_for_every_tile_are_refused_before_they_are_walked() {
    greed(&device()).unwrap();
}

const APPLIES: [Mutant; 7] = [
    ("a tile's verdict forgotten", "restore.cu", "report_tile(", "shared_or(&shared.refused, 1);", ""),
    (
        "verdicts unread",
        "restore.cu",
        "XORZ_RESTORE(bits)",
        "if (!xorz::well(verdicts, verdict_count)) return;",
        "",
    ),
    ("only the first verdicts read", "restore.cu", "bool well(", "i += kThreads", "i += count"),
    ("all verdicts in one place", "restore.cu", "void verify(", "verdicts + block_x()", "verdicts"),
    (
        "entries stored by verify",
        "restore.cu",
        "void sparse_tile(",
        "patch_run<W, kWork != kVerify>",
        "patch_run<W, true>",
    ),
    ("differences stored by verify", "restore.cu", "const auto edit", "if (kWork != kVerify) store", "store"),
    (
        "verify without differences",
        "restore.cu",
        "void exponent_tile(",
        "add_differences<W>(v, tile, rect, lane, 32, edit) && sound",
        "sound",
    ),
];

const GREED: [Mutant; 2] = [
    (
        "as many records as are claimed",
        "resident.cuh",
        "bool units_of(",
        "span.to - span.from <= most",
        "true",
    ),
    (
        "as many differences as are claimed",
        "resident.cuh",
        "bool listed_of(",
        "span.to - span.from <= list.of_word * words_of_tile(v)",
        "true",
    ),
];

const APPLY_LIST: &str =
    "#include \"restore.cu\"\n#define XORZ_KERNELS(X) X(xorz_delta_verify_16) X(xorz_delta_apply_16)\n";
const GREED_LIST: &str = "#include \"embedding.cu\"\n#include \"linear_large.cu\"\n#include \"linear_segments.cu\"\n\
    #include \"linear_small.cu\"\n#include \"restore.cu\"\n\
    #define XORZ_KERNELS(X) X(xorz_delta_restore_16) X(xorz_delta_verify_16) X(xorz_delta_apply_16) \
    X(xorz_delta_embedding_16) X(xorz_linear_small_bf16_m16) X(xorz_linear_segments_bf16) X(xorz_linear_large_bf16)\n";

#[test]
fn mutants_of_apply_and_of_bounds_are_caught() {
    all_caught(&APPLIES, APPLY_LIST, &[], applies);
    all_caught(&GREED, GREED_LIST, &[], greed);
}
