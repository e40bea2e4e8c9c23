//! Promise: whatever the bytes of a resident delta, an error or the right answer: no panic, no hang, no allocation
//! beyond a small multiple of the input.

use crate::common::counting::held_by;
use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped};
use crate::common::seal::{reseal, reseal_for};
use xorz::codec::{Encoding, Prefer};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, encode_as, restore, slice};
use xorz::vector::{Serial, delta_apply, delta_matches, patch};

struct Case {
    dtype: Dtype,
    shape: Shape,
    base: Vec<u8>,
    fine_tuned: Vec<u8>,
    blob: Vec<u8>,
}

fn cases() -> Vec<Case> {
    let mut rng = Rng::new(11);
    let mut out = vec![];
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::I8] {
        let shape = Shape { n: 18, k: 40 };
        let base = rng.weights(dtype, 720);
        let changed = if dtype == Dtype::I8 {
            perturbed(&mut rng, dtype, &base, 0.3)
        } else {
            stepped(&mut rng, dtype, &base, 1e-3)
        };
        let odd = if dtype == Dtype::I8 { rng.bytes(720) } else { adversarial(&mut rng, dtype, 720) };
        let fine_tuned = rng.mix(dtype, &changed, &odd, 0.02);
        for encoding in Encoding::ALL {
            let f = if encoding == Encoding::Unchanged { &base } else { &fine_tuned };
            let pair = Pair::new(matrix(dtype, shape, &base), matrix(dtype, shape, f));
            let blob = encode_as(&mut pair.unwrap(), encoding).unwrap();
            let header = *Resident::parse(&blob).unwrap().header();
            assert_eq!(header.encoding, encoding);
            let apart = encoding == Encoding::Exponent && dtype.computes();
            assert!(!apart || (header.entries > 5 && header.exceptions > 0), "{header:?}");
            out.push(Case { dtype, shape, base: base.clone(), fine_tuned: f.clone(), blob });
        }
    }
    out
}

/// Everything a caller may do with bytes that were not checked. Returns what restoring gave.
fn use_it(blob: &[u8], base: &Matrix<'_>) -> Option<Vec<u8>> {
    let delta = Resident::parse(blob).ok()?;
    let _ = delta.check();
    let _ = delta.check_base(base);
    for i in 0..delta.grid().tiles().min(64) {
        let _ = delta.tile(i);
    }
    let _ = slice(&delta, base, 0, 3..base.shape().n);
    let mut out = vec![0; base.bytes().len()];
    restore(&delta, base, &mut out).ok().map(|()| out)
}

#[test]
fn every_flipped_byte_is_found_by_a_check_and_harms_no_one_without() {
    for case in cases() {
        let base = matrix(case.dtype, case.shape, &case.base);
        let ((), held) = held_by(|| {
            for i in 0..case.blob.len() {
                for flip in [0x01, 0x80, 0xFF, case.blob[i]] {
                    let mut bad = case.blob.clone();
                    bad[i] ^= flip;
                    let _ = use_it(&bad, &base);
                    if bad != case.blob {
                        let found = Resident::parse(&bad).and_then(|d| d.check_full(&base));
                        assert!(found.is_err(), "byte {i} ^ {flip:#x} of {} {}", case.dtype, case.blob.len());
                    }
                }
            }
        });
        let largest = held.largest;
        assert!(largest <= 16 * (case.blob.len() + case.base.len()) + (1 << 16), "{largest} bytes at once");
    }
}

/// Shapes that hold no word, and would take hours if work went by their rows or columns.
const HOLLOW: [(usize, usize); 6] =
    [(1 << 44, 0), (0, 1 << 44), (1 << 62, 0), (0, isize::MAX as usize), (1 << 25, 0), (usize::MAX, 0)];

#[test]
fn a_matrix_without_words_and_very_many_rows_is_refused_at_once() {
    let start = std::time::Instant::now();
    let case = cases().into_iter().find(|c| Resident::parse(&c.blob).unwrap().header().changed == 0).unwrap();
    for (n, k) in HOLLOW {
        let shape = Shape { n, k };
        let ((), held) = held_by(|| {
            for dtype in Dtype::ALL {
                let e = Matrix::new(dtype, shape, &[]).unwrap_err();
                let (found, most) = (shape.to_string(), Shape::MAX_EMPTY.to_string());
                assert!(e.message().contains(&found) && e.message().contains(&most), "{e}");
            }
            assert!(Shape::of_dims(&[n, k]).is_err() && Shape::of_dims(&[n, 1, k]).is_err());
            let mut bad = case.blob.clone();
            bad[16..24].copy_from_slice(&(n as u64).to_le_bytes());
            bad[24..32].copy_from_slice(&(k as u64).to_le_bytes());
            reseal(&mut bad);
            assert!(Resident::parse(&bad).is_err(), "{n} x {k}");
        });
        assert!(held.largest < 1 << 16, "{n} x {k}: {}", held.largest);
    }
    // The largest that is taken is one that all of it takes at once, too.
    for (n, k) in [(Shape::MAX_EMPTY, 0), (0, Shape::MAX_EMPTY), (130, 0), (0, 0)] {
        let hollow = matrix(Dtype::F64, Shape { n, k }, &[]);
        let (blob, held) = held_by(|| xorz::resident::encode_pair(&hollow, &hollow, Prefer::Memory).unwrap());
        let delta = Resident::parse(&blob).unwrap();
        delta.check_full(&hollow).unwrap();
        restore(&delta, &hollow, &mut []).unwrap();
        slice(&delta, &hollow, 0, 0..n).unwrap();
        assert!(held.largest < 1 << 24, "{n} x {k}: {}", held.largest);
    }
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

#[test]
fn forged_digests_do_not_help() {
    // With the content's digest made good again, the structure itself must hold or decoding must stay within bounds.
    let mut rng = Rng::new(5);
    for case in cases() {
        let base = matrix(case.dtype, case.shape, &case.base);
        let mut same = case.blob.clone();
        reseal(&mut same);
        assert!(same == case.blob, "the digest is not made as SPEC.md says");
        for _ in 0..3000 {
            let mut bad = case.blob.clone();
            for _ in 0..=rng.next() % 3 {
                let i = (rng.next() % bad.len() as u64) as usize;
                bad[i] = rng.next() as u8;
            }
            // Of the right base, too: else nothing is cut or joined.
            reseal_for(&mut bad, base.digest().0);
            let restored = use_it(&bad, &base);
            if bad == case.blob {
                assert!(restored == Some(case.fine_tuned.clone()));
            }
        }
    }
}

#[test]
fn a_forged_delta_that_is_refused_has_changed_no_word_in_place() {
    // How long a stream is follows from the base's words, so that only decoding tells that a delta is of another base whose digest
    // it does not say: in a later band of rows, too, when words of the first would be changed already.
    let (mut rng, mut would_be_half) = (Rng::new(7), 0);
    for case in cases() {
        for round in 0..3000 {
            let (mut bad, mut words) = (case.blob.clone(), case.base.clone());
            let at = (rng.next() % bad.len() as u64) as usize;
            if round % 2 == 0 {
                bad[at] = rng.next() as u8;
            } else {
                let at = words.len() - 1 - at % (words.len() / 10);
                words[at..].fill_with(|| rng.next() as u8);
            }
            reseal_for(&mut bad, matrix(case.dtype, case.shape, &words).digest().0);
            let Ok(delta) = Resident::parse(&bad) else { continue };
            let mut weight = words.clone();
            let matches = delta_matches(&delta, &matrix(case.dtype, case.shape, &words), &Serial).is_ok();
            let applied = delta_apply(&delta, case.dtype, case.shape, &mut weight, &Serial).is_ok();
            assert_eq!(matches, applied, "whoever asks before changing many matrices is told");
            if !applied {
                assert!(weight == words, "half applied: {} {}", case.dtype, case.shape);
                let both_digests = delta.check_match(&matrix(case.dtype, case.shape, &words)).is_ok();
                would_be_half +=
                    usize::from(both_digests && patch(&delta, &mut weight).is_err() && weight != words);
            }
        }
    }
    assert!(would_be_half > 200, "{would_be_half}");
}

#[test]
fn every_cut_is_refused() {
    for case in cases() {
        for len in 0..case.blob.len() {
            assert!(Resident::parse(&case.blob[..len]).is_err(), "{len} of {}", case.blob.len());
        }
        let longer = [case.blob.clone(), vec![0; 64]].concat();
        assert!(Resident::parse(&longer).is_err());
    }
}

#[test]
fn a_header_of_a_huge_matrix_allocates_nothing() {
    let case = &cases()[0];
    for (n, k) in
        [(u64::MAX, 1), (1 << 62, 1), (1 << 40, 1 << 20), (0, u64::MAX), (u64::MAX, 0), (1 << 31, 1 << 31)]
    {
        let mut bad = case.blob.clone();
        bad[16..24].copy_from_slice(&n.to_le_bytes());
        bad[24..32].copy_from_slice(&k.to_le_bytes());
        reseal(&mut bad);
        let ((), held) = held_by(|| {
            if let Ok(delta) = Resident::parse(&bad) {
                let _ = delta.check();
                assert!(
                    restore(
                        &delta,
                        &matrix(case.dtype, case.shape, &case.base),
                        &mut vec![0; case.base.len()]
                    )
                    .is_err()
                );
            }
        });
        assert!(held.largest < 1 << 16, "{n} x {k}");
    }
}
