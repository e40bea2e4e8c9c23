//! Promise: what nvcc makes of the digest is xxh3-128 of 64 rows, and of those the digest of the matrix, by which a delta's base is
//! known; and of a panel's restoring, its rows alone.

use crate::common::data::{Rng, perturbed};
use crate::common::device::{Launch, Param};
use crate::common::kernels::{restore, status};
use crate::common::linear::{Case, ENCODINGS};
use crate::machine::Machine;
use crate::oracle::{machine, run};
use xorz::cuda::status::Code;
use xorz::matrix::{Dtype, Matrix, Shape};
use xxhash_rust::xxh3::xxh3_128;

/// Where in the workspace leaves begin.
const LEAVES_AT: usize = 32;

fn launch(kernel: &str, blocks: u32, params: Vec<Param>) -> Launch {
    let kernel = kernel.into();
    Launch { kernel, blocks: (blocks, 1), seed: 3, count: false, late: false, only: None, params }
}

/// What the leaves of `n` rows leave in the workspace.
fn leaves(machine: &Machine, words: &[u8], n: usize, row_bytes: usize, past: u64) -> Vec<u8> {
    let rows = [n, row_bytes].map(|x| Param::U64(x as u64));
    let [n_rows, bytes] = rows;
    let workspace = Param::Out(vec![0xEE; LEAVES_AT + 16 * n.div_ceil(64)], 0);
    let one =
        launch("xorz_digest_leaves", 2, vec![Param::In(words.to_vec(), past), n_rows, bytes, workspace]);
    run(machine, &one).unwrap().remove(3).bytes
}

#[test]
fn leaves_are_hashed_as_xxh3_128_says() {
    let Some(machine) = machine("leaves_are_hashed_as_xxh3_128_says") else { return };
    let mut rng = Rng::new(191);
    for length in [
        0, 1, 3, 4, 8, 9, 16, 17, 33, 65, 97, 128, 129, 144, 240, 241, 256, 1023, 1024, 1025, 1088, 2049,
        16384, 16385, 17409, 33000,
    ] {
        let words: Vec<u8> = (0..length).map(|_| rng.next() as u8).collect();
        for past in [0, 1 << (length as u32 | 8).trailing_zeros()] {
            let left = leaves(machine, &words, 1, length, past);
            assert_eq!(left[LEAVES_AT..], xxh3_128(&words).to_le_bytes(), "{length} bytes at {past}");
        }
    }
}

/// Digest, verdict and status of a matrix that may be the base of `delta`.
fn root(machine: &Machine, words: &[u8], dtype: Dtype, shape: Shape, delta: Option<&[u8]>) -> [Vec<u8>; 3] {
    let w = dtype.word_bytes();
    let left = leaves(machine, words, shape.n, shape.k * w, 0);
    let params = vec![
        Param::Out(left, 0),
        Param::U64(shape.n as u64),
        Param::U64(shape.k as u64),
        Param::U32(w as u32),
        Param::U32(if delta.is_some() { 0 } else { dtype as u32 }),
        delta.map_or(Param::Null, |d| Param::In(d.to_vec(), 0)),
        Param::U64(delta.map_or(0, <[u8]>::len) as u64),
        Param::Out(vec![0; 4], 0),
        Param::Out(vec![0xEE; 4], 0),
        Param::Out(vec![0xEE; 16], 0),
    ];
    let mut after = run(machine, &launch("xorz_digest_root", 1, params)).unwrap();
    [9, 8, 7].map(|at| std::mem::take(&mut after[at].bytes))
}

#[test]
fn a_base_is_known_by_its_digest() {
    let Some(machine) = machine("a_base_is_known_by_its_digest") else { return };
    let mut rng = Rng::new(192);
    for (n, k, dtype) in [
        (1, 1, Dtype::U8),
        (0, 5, Dtype::F32),
        (65, 3, Dtype::BF16),
        (64 * 14 + 1, 1, Dtype::U16),
        (129, 77, Dtype::BF16),
        (1, 900, Dtype::F64),
    ] {
        let shape = Shape { n, k };
        let base = rng.weights(dtype, n * k);
        let of = |words: &[u8]| Matrix::new(dtype, shape, words).unwrap().digest().0;
        let [digest, ..] = root(machine, &base, dtype, shape, None);
        assert_eq!(digest, of(&base), "{dtype} {n} x {k}");
        if n * k < 100 {
            continue;
        }
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.2);
        let case = Case::new(dtype, shape, ENCODINGS[0], &base, &fine_tuned);
        let [digest, verdict, said] = root(machine, &base, dtype, shape, Some(&case.blob));
        assert_eq!((&digest[..], &verdict[..], &said[..]), (&of(&base)[..], &[0; 4][..], &[0; 4][..]));
        let mut other = base.clone();
        *other.last_mut().unwrap() ^= 1;
        let [_, verdict, said] = root(machine, &other, dtype, shape, Some(&case.blob));
        assert!(verdict != [0; 4] && u32::from(said[3]) == Code::OtherBase as u32, "{verdict:?} {said:?}");
    }
}

#[test]
fn a_panel_has_the_words_of_its_rows() {
    let Some(machine) = machine("a_panel_has_the_words_of_its_rows") else { return };
    let mut rng = Rng::new(193);
    let (shape, dtype) = (Shape { n: 530, k: 33 }, Dtype::BF16);
    let base = rng.weights(dtype, shape.n * shape.k);
    let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
    for encoding in ENCODINGS {
        let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
        for (from, to) in [(256, 512), (512, 530), (0, 256), (256, 530)] {
            let mut one = restore(false, (dtype as u32, shape), 2, &base, &case.blob, 2, 1);
            one.params[1] = Param::Out(vec![0x5A; (to - from) * 66], 0);
            one.params[8] = Param::U64(from as u64);
            one.params[9] = Param::U64((to - from) as u64);
            let after = run(machine, &one).unwrap();
            assert!(
                status(&after, 7) == 0 && after[1].bytes == case.fine_tuned[from * 66..to * 66],
                "{encoding:?} {from}"
            );
        }
    }
}
