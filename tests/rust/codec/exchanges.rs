//! Promise: an exchange makes the new words of the old ones in place, and the old ones of the new, bit for bit; it touches no
//! other word, writes over no word that it was not made for, and whatever its bytes are, an error leaves all words as they
//! were.

use crate::common::data::{Rng, matrix};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};
use xorz::vector::{Isa, exchange, exchange_apply, exchange_on};

const DTYPES: [Dtype; 4] = [Dtype::I8, Dtype::BF16, Dtype::F32, Dtype::F64];

/// Two versions of words, of which this share differs; a way of nothing in the middle.
fn versions(rng: &mut Rng, dtype: Dtype, words: usize, share: f64) -> (Vec<u8>, Vec<u8>) {
    let (old, other) = (rng.weights(dtype, words), rng.weights(dtype, words));
    let mut new = rng.mix(dtype, &old, &other, share);
    let quiet = words / 3 * dtype.word_bytes()..words / 2 * dtype.word_bytes();
    new[quiet.clone()].copy_from_slice(&old[quiet]);
    (old, new)
}

fn differing(dtype: Dtype, a: &[u8], b: &[u8]) -> u64 {
    let w = dtype.word_bytes();
    a.chunks(w).zip(b.chunks(w)).filter(|(a, b)| a != b).count() as u64
}

/// Words as a tensor's lie.
fn aligned(bytes: &[u8]) -> Vec<u64> {
    let mut out = vec![0; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut out)[..bytes.len()].copy_from_slice(bytes);
    out
}

fn inside(words: &mut [u64], len: usize) -> &mut [u8] {
    &mut bytemuck::cast_slice_mut(words)[..len]
}

#[test]
fn an_exchange_makes_either_version_of_the_other() {
    let mut rng = Rng::new(31);
    for dtype in DTYPES {
        for shape in [(0, 7), (1, 1), (1, 63), (3, 65), (40, 5000)].map(|(n, k)| Shape { n, k }) {
            for share in [0.0, 0.0001, 0.002, 0.03, 0.4, 1.0] {
                let (old, new) = versions(&mut rng, dtype, shape.n * shape.k, share);
                let (before, after) = (matrix(dtype, shape, &old), matrix(dtype, shape, &new));
                let (bytes, changed) = exchange(&before, &after).unwrap();
                assert_eq!(changed, differing(dtype, &old, &new));
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                    assert!(
                        exchange_on(isa, &before, &after).unwrap() == (bytes.clone(), changed),
                        "{isa:?}"
                    );
                }
                let mut words = aligned(&old);
                exchange_apply(&bytes, inside(&mut words, old.len()), false).unwrap();
                assert!(inside(&mut words, old.len()) == new, "{dtype} {shape} {share}");
                exchange_apply(&bytes, inside(&mut words, old.len()), true).unwrap();
                assert!(inside(&mut words, old.len()) == old, "{dtype} {shape} {share}, back");
            }
        }
    }
}

#[test]
fn an_exchange_takes_little_more_than_the_words_that_differ() {
    let (mut rng, shape) = (Rng::new(32), Shape { n: 100, k: 10_000 });
    for (share, most) in [(0.001, 16.0), (0.01, 4.0), (0.1, 3.2)] {
        let (old, new) = versions(&mut rng, Dtype::BF16, 1_000_000, share);
        let (bytes, changed) =
            exchange(&matrix(Dtype::BF16, shape, &old), &matrix(Dtype::BF16, shape, &new)).unwrap();
        let each = bytes.len() as f64 / changed as f64;
        assert!(each < most, "{each} bytes for each word at {share}");
    }
}

#[test]
fn words_that_an_exchange_was_not_made_for_are_left_alone() {
    let (mut rng, shape, dtype) = (Rng::new(33), Shape { n: 30, k: 1000 }, Dtype::BF16);
    let (old, new) = versions(&mut rng, dtype, 30_000, 0.3);
    let (bytes, _) = exchange(&matrix(dtype, shape, &old), &matrix(dtype, shape, &new)).unwrap();
    let w = dtype.word_bytes();
    let differ: Vec<_> = (0..30_000).filter(|i| old[w * i..w * i + w] != new[w * i..w * i + w]).collect();
    for at in [differ[0], differ[differ.len() / 2], differ[differ.len() - 1]] {
        for (back, right) in [(false, &old), (true, &new)] {
            let mut other = right.clone();
            other[w * at] ^= 1;
            let mut words = aligned(&other);
            let error = exchange_apply(&bytes, inside(&mut words, other.len()), back).unwrap_err();
            assert_eq!(error.kind(), Kind::Mismatch, "{error}");
            assert!(error.message().contains("have digest"), "{error}");
            assert!(inside(&mut words, other.len()) == other, "half applied at {at}");
        }
    }
    // Onto what it has made already, and back of what it has not.
    for (back, words) in [(false, &new), (true, &old)] {
        let mut twice = aligned(words);
        let error = exchange_apply(&bytes, inside(&mut twice, words.len()), back).unwrap_err();
        assert_eq!(error.kind(), Kind::Mismatch, "{error}");
        assert!(inside(&mut twice, words.len()) == *words);
    }
}

#[test]
fn broken_exchanges_change_nothing() {
    let (mut rng, shape, dtype) = (Rng::new(34), Shape { n: 20, k: 700 }, Dtype::BF16);
    let (old, new) = versions(&mut rng, dtype, 14_000, 0.2);
    let (good, _) = exchange(&matrix(dtype, shape, &old), &matrix(dtype, shape, &new)).unwrap();
    let mut words = aligned(&old);
    let mut refused = |bytes: &[u8], what: &str| {
        let done = exchange_apply(bytes, inside(&mut words, old.len()), false);
        // The count of differing words is for people alone.
        let made = inside(&mut words, old.len());
        assert!(done.is_err() && made == old, "{what}: {done:?}");
    };
    for at in (0..good.len()).filter(|at| !(24..32).contains(at)) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (rng.next() % 8);
        refused(&bytes, &format!("a flipped bit at {at}"));
    }
    for end in (0..good.len()).step_by(7) {
        refused(&good[..end], &format!("cut to {end}"));
    }
    for at in [8, 16, 32, 40, 48, good.len() / 2] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&[255; 8]);
        refused(&bytes, "large numbers");
    }
    refused(&[&good[..], &[0; 3]].concat(), "more bytes");
    let fewer = exchange_apply(&good, &mut vec![0; old.len() - 2], false).unwrap_err();
    assert!(fewer.kind() == Kind::Mismatch && fewer.message().contains("14000 words"), "{fewer}");
    let mut odd = vec![0u8; old.len() + 1];
    let start = usize::from(odd.as_ptr().addr().is_multiple_of(2));
    let error = exchange_apply(&good, &mut odd[start..start + old.len()], false).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
    let other = exchange(&matrix(dtype, shape, &old), &matrix(dtype, Shape { n: 700, k: 20 }, &new));
    assert_eq!(other.unwrap_err().kind(), Kind::Mismatch);
}
