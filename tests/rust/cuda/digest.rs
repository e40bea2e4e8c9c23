//! Promise: the digest that a GPU computes of a matrix is the one that the core computes of the same words, of every
//! length, shape and alignment; and a delta's base is known by it, before anything is done with the delta.

use crate::common::data::{Rng, perturbed};
use crate::common::device::{After, Device, Launch, Param};
use crate::common::gpu::{Gpu, case, log, order, order_on, passes, said};
use crate::common::kernels::{device, status};
use crate::common::linear::{Case, ENCODINGS};
use xorz::codec::Encoding;
use xorz::cuda::{self, DeviceMatrix};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Matrix, Shape};
use xxhash_rust::xxh3::xxh3_128;

/// Where in the workspace leaves begin.
const LEAVES_AT: usize = 32;
/// Where in the parameters of the leaves the workspace is, and in those of the root its outputs.
const WORKSPACE: usize = 3;
const STATUS: usize = 7;
const VERDICT: usize = 8;
const ROOT: usize = 9;

fn words(rng: &mut Rng, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|_| rng.next() as u8).collect()
}

/// The launch of `n` rows, words `offset` bytes past a multiple of 256, on `blocks` blocks.
fn leaves(words: &[u8], n: usize, row_bytes: usize, offset: u64, blocks: u32, seed: u64) -> Launch {
    let params = vec![
        Param::In(words.to_vec(), offset),
        Param::U64(n as u64),
        Param::U64(row_bytes as u64),
        Param::Out(vec![0xEE; LEAVES_AT + 16 * n.div_ceil(64)], 0),
    ];
    let kernel = "xorz_digest_leaves".into();
    Launch { kernel, blocks: (blocks, 1), seed, count: false, late: false, only: None, params }
}

/// A delta that is compared, and what the words are called.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    shape: Shape,
    word_bytes: usize,
    /// 0 where the delta says it.
    dtype: u32,
    delta: Option<&'a [u8]>,
}

/// The launch of the root over the leaves that a launch has left.
fn root(left: &After, wanted: Wanted<'_>, seed: u64) -> Launch {
    let params = vec![
        Param::Out(left.bytes.clone(), 0),
        Param::U64(wanted.shape.n as u64),
        Param::U64(wanted.shape.k as u64),
        Param::U32(wanted.word_bytes as u32),
        Param::U32(wanted.dtype),
        wanted.delta.map_or(Param::Null, |d| Param::In(d.to_vec(), 0)),
        Param::U64(wanted.delta.map_or(0, <[u8]>::len) as u64),
        Param::Out(vec![0; 4], 0),
        Param::Out(vec![0xEE; 4], 0),
        Param::Out(vec![0xEE; 16], 0),
    ];
    let kernel = "xorz_digest_root".into();
    Launch { kernel, blocks: (1, 1), seed, count: false, late: false, only: None, params }
}

/// Lengths on both sides of every boundary of the hash: its short forms, stripes, parts, rounds of a block of threads.
fn lengths(rng: &mut Rng) -> Vec<usize> {
    let mut all: Vec<usize> = (0..=260).collect();
    for about in [1024, 2048, 3 * 1024, 15 * 1024, 16384, 17 * 1024, 32768, 49152, 65536] {
        all.extend([about - 64, about - 1, about, about + 1, about + 63, about + 64, about + 65]);
    }
    all.extend((0..60).map(|_| 241 + rng.next() as usize % 70_000));
    all
}

/// That `device` hashes one row of each of `lengths`, at addresses of each alignment, as the crate does.
pub(crate) fn hashes(device: &Device, lengths: &[usize], seeds: &[u64]) -> Result<(), String> {
    let mut rng = Rng::new(201);
    let (mut launches, mut wants) = (vec![], vec![]);
    for (i, &length) in lengths.iter().enumerate() {
        let bytes = words(&mut rng, length);
        // A word of 8 bytes is at multiples of 8; lengths that are none have smaller words.
        let most = 1 << length.trailing_zeros().min(3);
        for offset in [0, most, 16 - most] {
            launches.push(leaves(&bytes, 1, length, offset % 16, 1, seeds[i % seeds.len()]));
            wants.push((length, offset % 16, xxh3_128(&bytes).to_le_bytes()));
        }
    }
    for (after, (length, offset, want)) in device.run(&launches)?.iter().zip(wants) {
        let got = &after[WORKSPACE].bytes;
        if got[LEAVES_AT..] != want {
            return Err(format!("{length} bytes at {offset}: {:02x?}, not {want:02x?}", &got[LEAVES_AT..]));
        }
        if got[..LEAVES_AT].iter().any(|b| *b != 0xEE) {
            return Err(format!("{length} bytes: leaves write over what precedes them"));
        }
    }
    Ok(())
}

#[test]
fn every_length_at_every_alignment_is_hashed_as_xxh3_128_says() {
    let lengths = lengths(&mut Rng::new(200));
    hashes(&device(), &lengths, &[0, 1, 2, 3]).unwrap();
}

/// Matrices whose digests are compared: leaves of one row and of 64, so few leaves that the root is short, and many.
pub(crate) const SHAPES: [(usize, usize, Dtype); 16] = [
    (0, 5, Dtype::F32),
    (1, 1, Dtype::U8),
    (3, 0, Dtype::BF16),
    (130, 0, Dtype::BF16),
    (63, 3, Dtype::U8),
    (64, 1, Dtype::I8),
    (65, 1, Dtype::BF16),
    (200, 7, Dtype::F16),
    (64 * 13, 1, Dtype::BF16),
    (64 * 14, 1, Dtype::F16),
    (64 * 14 + 1, 1, Dtype::U16),
    (64 * 62, 3, Dtype::U8),
    (64 * 70, 5, Dtype::F32),
    (1, 5000, Dtype::F64),
    (129, 777, Dtype::BF16),
    (64 * 1100, 1, Dtype::BOOL),
];

/// That the digests of `SHAPES` are those of the core.
pub(crate) fn digests(device: &Device, shapes: &[(usize, usize, Dtype)]) -> Result<(), String> {
    let mut rng = Rng::new(202);
    let (mut first, mut all) = (vec![], vec![]);
    for &(n, k, dtype) in shapes {
        let shape = Shape { n, k };
        let bytes = words(&mut rng, n * k * dtype.word_bytes());
        let want = Matrix::new(dtype, shape, &bytes).unwrap().digest();
        let offset = dtype.word_bytes() as u64 * (rng.next() % 3);
        let blocks = 1 + (rng.next() % 5) as u32;
        first.push(leaves(&bytes, n, k * dtype.word_bytes(), offset, blocks, rng.next() % 3));
        all.push((shape, dtype, want));
    }
    let left = device.run(&first)?;
    let second = left.iter().zip(&all).map(|(left, &(shape, dtype, _))| {
        let wanted = Wanted { shape, word_bytes: dtype.word_bytes(), dtype: dtype as u32, delta: None };
        root(&left[WORKSPACE], wanted, shape.n as u64 % 3)
    });
    let after = device.run(&second.collect::<Vec<_>>())?;
    for (after, (shape, dtype, want)) in after.iter().zip(all) {
        if after[ROOT].bytes != want.0 {
            return Err(format!("{shape} of {dtype}: {:02x?}, not {want}", after[ROOT].bytes));
        }
        if status(after, STATUS) != 0 || after[VERDICT].bytes != [0; 4] {
            return Err(format!("{shape} of {dtype}: refused"));
        }
    }
    Ok(())
}

#[test]
fn a_matrix_has_the_digest_that_the_core_gives_it() {
    digests(&device(), &SHAPES).unwrap();
}

/// A delta and words, and the status that comparing them leaves.
struct Compared {
    words: Vec<u8>,
    delta: Vec<u8>,
    wanted: (u32, Shape, usize),
    code: u32,
}

fn comparisons(rng: &mut Rng) -> Vec<Compared> {
    let mut out = vec![];
    for (dtype, bits, k) in
        [(Dtype::BF16, Dtype::I16, 300), (Dtype::F32, Dtype::I32, 31), (Dtype::U8, Dtype::U8, 5)]
    {
        let shape = Shape { n: 130, k };
        let base = rng.weights(dtype, 130 * k);
        let fine_tuned = perturbed(rng, dtype, &base, 0.1);
        let w = dtype.word_bytes();
        for encoding in ENCODINGS {
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            let mut push = |words: &[u8], delta: &[u8], dtype: u32, code: u32| {
                let (words, delta) = (words.to_vec(), delta.to_vec());
                out.push(Compared { words, delta, wanted: (dtype, shape, w), code });
            };
            push(&base, &case.blob, dtype as u32, 0);
            // Bits: the delta says what they are.
            push(&base, &case.blob, 0, 0);
            if bits != dtype {
                push(&base, &case.blob, bits as u32, 6);
            }
            for at in [0, 17, base.len() - 1] {
                let mut other = base.clone();
                other[at] ^= 1;
                push(&other, &case.blob, dtype as u32, 9);
            }
            // Of the header's digest each byte counts; what is no delta is not compared.
            for at in [112, 119, 120, 127] {
                let mut forged = case.blob.clone();
                forged[at] ^= 0x80;
                push(&base, &forged, dtype as u32, 9);
            }
            push(&base, &case.blob[..case.blob.len() - 64], dtype as u32, 5);
            push(&base, &case.blob[..100], dtype as u32, 5);
        }
    }
    // Bits of four bytes, and a delta of words of two.
    let (shape, w) = (Shape { n: 2, k: 8 }, 4);
    let base = rng.weights(Dtype::BF16, 16);
    let case = Case::new(Dtype::BF16, shape, Encoding::Raw, &base, &rng.weights(Dtype::BF16, 16));
    out.push(Compared {
        words: [&base[..], &base].concat(),
        delta: case.blob,
        wanted: (0, shape, w),
        code: 6,
    });
    out
}

/// That each of `comparisons` leaves the status and the verdict that it should.
pub(crate) fn compares(device: &Device) -> Result<(), String> {
    let all = comparisons(&mut Rng::new(203));
    let first = all.iter().map(|c| leaves(&c.words, c.wanted.1.n, c.wanted.1.k * c.wanted.2, 0, 2, 0));
    let left = device.run(&first.collect::<Vec<_>>())?;
    let second = left.iter().zip(&all).map(|(left, c)| {
        let (dtype, shape, word_bytes) = c.wanted;
        root(&left[WORKSPACE], Wanted { shape, word_bytes, dtype, delta: Some(&c.delta) }, 1)
    });
    let after = device.run(&second.collect::<Vec<_>>())?;
    for (i, (after, c)) in after.iter().zip(&all).enumerate() {
        let (found, refused) = (status(after, STATUS), after[VERDICT].bytes != [0; 4]);
        if found != c.code << 24 || refused != (c.code != 0) {
            return Err(format!(
                "comparison {i}: status {found:#x}, not code {}; refused: {refused}",
                c.code
            ));
        }
    }
    Ok(())
}

#[test]
fn a_delta_of_another_base_is_known_by_every_byte_of_either() {
    compares(&device()).unwrap();
}

#[test]
fn the_words_are_read_once() {
    let mut rng = Rng::new(205);
    let (n, k) = (130, 4096);
    let bytes = words(&mut rng, 2 * n * k);
    let mut launch = leaves(&bytes, n, 2 * k, 0, 3, 0);
    launch.count = true;
    let after = device().run(&[launch]).unwrap().remove(0);
    let read = 32 * after[0].sectors.1;
    println!("{read} bytes of {}", bytes.len());
    // The last stripe of a leaf may overlap the one before it, in a block that has read it.
    assert_eq!(read, bytes.len() as u64);
    assert!(32 * after[WORKSPACE].sectors.1 <= 3 * 64);
}

#[test]
fn another_base_is_refused_before_a_word_changes_and_the_next_call_says_so() {
    passes(child_refused_base, "");
}

#[test]
#[ignore = "a child of another_base_is_refused_before_a_word_changes_and_the_next_call_says_so"]
fn child_refused_base() {
    let (gpu, mut rng) = (Gpu::new(0), Rng::new(206));
    for (dtype, encoding) in Dtype::ALL.into_iter().flat_map(|d| ENCODINGS.map(|e| (d, e))) {
        let right = case(&mut rng, dtype, Shape { n: 70, k: 40 }, encoding);
        let mut other = case(&mut rng, dtype, right.shape, encoding);
        other.base.clone_from(&right.base);
        let at = rng.next() as usize % other.base.len();
        other.base[at] ^= 1 << (rng.next() % 8);
        let before = log().len();
        assert!(gpu.apply(&other, &right.blob).unwrap() == other.base, "{dtype} {encoding}");
        // Four launches on the caller's stream; else only the test's own copies.
        let calls = log().split_off(before);
        let calls: Vec<_> =
            calls.iter().filter(|l| !l.starts_with("cuMem") && !l.starts_with("cuCtx")).collect();
        let verbs = ["digest_leaves", "digest_root", "delta_verify_", "delta_apply_"];
        let stream = format!("stream {:#x} ", gpu.stream);
        // The first call makes the device ready.
        for (call, verb) in calls[calls.len() - 4..].iter().zip(verbs) {
            assert!(
                call.starts_with(&format!("cuLaunchKernel xorz_{verb}")) && call.contains(&stream),
                "{call}"
            );
        }
        let said_of = gpu.apply(&right, &right.blob);
        said(said_of, Kind::Mismatch, &["an earlier delta_apply_ on cuda:0", "another base", "as it was"]);
        assert!(gpu.apply(&right, &right.blob).unwrap() == right.fine_tuned, "{dtype} {encoding}");
    }
}

#[test]
fn a_captured_apply_looks_at_the_words_of_each_replay() {
    passes(child_replays, "");
}

#[test]
#[ignore = "a child of a_captured_apply_looks_at_the_words_of_each_replay"]
fn child_replays() {
    let gpu = Gpu::new(0);
    let case = case(&mut Rng::new(207), Dtype::BF16, Shape { n: 130, k: 300 }, Encoding::Sparse);
    let (weight, delta) = (gpu.words(&case), gpu.put(&case.blob));
    let between = gpu.between(weight);
    order_on("capture", gpu.stream);
    // SAFETY: allocations of those sizes, none freed.
    unsafe { cuda::delta_apply(gpu.place(), weight, delta, case.blob.len(), between) }.unwrap();
    order("end");
    for _ in 0..2 {
        // The second time the words are no base any more.
        order("replay");
        assert!(gpu.get(weight.address, case.base.len()) == case.fine_tuned);
    }
    // A digest of other words is nobody whom that concerns.
    gpu.digest(weight).unwrap();
    said(cuda::reported(0), Kind::Mismatch, &["an earlier delta_apply_", "another base"]);
}

#[test]
fn digests_alone_are_those_of_the_core() {
    passes(child_digests, "");
}

#[test]
#[ignore = "a child of digests_alone_are_those_of_the_core"]
fn child_digests() {
    let (gpu, mut rng) = (Gpu::new(0), Rng::new(208));
    for (n, k, dtype) in SHAPES.into_iter().take(15) {
        let shape = Shape { n, k };
        let bytes = words(&mut rng, n * k * dtype.word_bytes());
        let matrix = DeviceMatrix { dtype, bits: false, shape, address: gpu.put(&bytes) };
        assert_eq!(
            gpu.digest(matrix),
            Ok(Matrix::new(dtype, shape, &bytes).unwrap().digest()),
            "{shape} {dtype}"
        );
    }
}
