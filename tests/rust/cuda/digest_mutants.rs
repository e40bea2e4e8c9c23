//! Promise: the checks of `digest.rs` notice what goes wrong in its kernels: a length off by one, a lane's sum given to
//! another, a barrier removed. Each mutant is compiled and must be caught: by wrong results, or by the thread sanitizer.

use crate::common::device::TSAN;
use crate::common::mutants::{Mutant, all_caught};
use crate::digest::{SHAPES, compares, digests, hashes};
use xorz::matrix::Dtype;

const MUTANTS: [Mutant; 26] = [
    ("the form of 8 bytes for 9", "xxh3.cuh", "void hash() {", "length <= 8", "length < 8"),
    ("the form of 16 bytes for 17", "xxh3.cuh", "void hash() {", "length <= 16", "length < 16"),
    ("the form of 128 bytes for 129", "xxh3.cuh", "void up_to_240() {", "length <= 128", "length < 128"),
    (
        "the form of 240 bytes for 241",
        "xxh3.cuh",
        "void hash(HashShared",
        "length > kFewBytes",
        "length >= kFewBytes",
    ),
    (
        "pairs of chunks rounded up",
        "xxh3.cuh",
        "void up_to_240() {",
        "(length - 1) / 32 + 1",
        "length / 32 + 1",
    ),
    ("the second secret a byte early", "xxh3.cuh", "void up_to_240() {", "(i - 4) + 3", "(i - 4) + 2"),
    ("no avalanche between", "xxh3.cuh", "void up_to_240() {", "digest[1] = avalanche(digest[1]);", ""),
    (
        "the last chunks turned",
        "xxh3.cuh",
        "void up_to_240() {",
        "length - 16, length - 32, 103",
        "length - 32, length - 16, 103",
    ),
    (
        "the middle byte of three",
        "xxh3.cuh",
        "void up_to_3() {",
        "bytes[length / 2]",
        "bytes[(length - 1) / 2]",
    ),
    ("a carry dropped", "xxh3.cuh", "void up_to_16() {", "multiply_high(low, kPrime2) +", "0 +"),
    (
        "the last stripe twice",
        "xxh3.cuh",
        "hash_many(",
        "(length - 1) / kStripeBytes",
        "length / kStripeBytes",
    ),
    (
        "a part that ends is scrambled",
        "xxh3.cuh",
        "hash_many(",
        "(length - 1) / kPartBytes",
        "length / kPartBytes",
    ),
    ("the last part scrambled", "xxh3.cuh", "hash_many(", "i < whole)", "i <= whole)"),
    ("the last round left out", "xxh3.cuh", "hash_many(", "ahead < rounds + 2", "ahead < rounds + 1"),
    (
        "the half that is kept given",
        "xxh3.cuh",
        "void sum(",
        "upper ? part[0] : part[1]",
        "upper ? part[1] : part[0]",
    ),
    (
        "the other sum of two",
        "xxh3.cuh",
        "void sum(",
        "odd ? mine.first : mine.second",
        "odd ? mine.second : mine.first",
    ),
    ("a step of the shuffles left out", "xxh3.cuh", "void sum(", "sum += warp_shuffle_xor(sum, 16);", ""),
    ("words added to their own sums", "xxh3.cuh", "void add(", "first += other", "first += one"),
    ("the last stripe's secret", "xxh3.cuh", "void finish(", "121 +", "120 +"),
    ("the last stripe's words of others", "xxh3.cuh", "void finish(", "(word, 1)", "(word, 2)"),
    ("words of two bytes too near", "xxh3.cuh", "word_at(", "(16 * i)", "(8 * i)"),
    ("a byte of the run from behind", "xxh3.cuh", "struct AcrossTwo", "before = other.part[i];", ""),
    ("n and k overlap", "digest.cu", "head_byte(", "at < 9", "at < 10"),
    (
        "rows of the last leaf",
        "digest.cu",
        "void digest_leaves(",
        "n - first < kLeafRows ? n - first",
        "n < kLeafRows ? n - first",
    ),
    ("half a digest compared", "digest.cu", "is_base_of(", "load_once(wanted + 1) == digest[1]", "true"),
    ("words of another size", "digest.cu", "open(", "word_bytes_of(shared.dtype) == word_bytes", "true"),
];

/// Caught by the thread sanitizer, whatever the order of threads.
const RACES: [Mutant; 6] = [
    ("parts added before they are there", "xxh3.cuh", "now.sum(", "    block_sync();\n", ""),
    ("parts of another round", "xxh3.cuh", "now.sum(", "[turn][2", "[0][2"),
    ("few bytes without a barrier", "xxh3.cuh", "shared.few[thread] =", "    block_sync();\n", ""),
    ("sums merged before they are there", "xxh3.cuh", "shared.sums[lane] =", "  warp_sync();\n", ""),
    (
        "a digest before it is there",
        "xxh3.cuh",
        "shared.digest[1] = few.digest[1];",
        "  block_sync();\n}",
        "}",
    ),
    ("a run without its head", "digest.cu", "head_byte(thread", "  xorz::block_sync();\n", ""),
];

const LIST: &str =
    "#include \"digest.cu\"\n#define XORZ_KERNELS(X) X(xorz_digest_leaves) X(xorz_digest_root)\n";

#[test]
fn mutants_of_digests_are_caught() {
    all_caught(&MUTANTS, LIST, &[], |device| {
        let few: Vec<usize> = (0..=260).chain([1024, 1025, 1088, 2049, 16384, 16385, 40_000]).collect();
        hashes(device, &few, &[1, 2])?;
        digests(device, &SHAPES[..15])?;
        compares(device)
    });
}

#[test]
fn no_thread_of_a_digest_reads_what_another_may_still_write() {
    let shapes = [(65, 1, Dtype::BF16), (130, 300, Dtype::BF16), (64 * 20, 1, Dtype::U8)];
    all_caught(&RACES, LIST, &[TSAN], |device| digests(device, &shapes));
}
