//! Promise: whatever the words, shape, dtype, encoding and alignment, restoring gives back the very bits.

use crate::common::data::{Rng, adversarial, matrix, perturbed, unaligned};
use proptest::prelude::*;
use xorz::codec::{Encoding, Prefer};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, encode_as, encode_pair, restore, restore_rows};

fn round_trip(dtype: Dtype, shape: Shape, base: &[u8], fine_tuned: &[u8]) {
    let (b, f) = (matrix(dtype, shape, base), matrix(dtype, shape, fine_tuned));
    let mut blobs = vec![];
    for prefer in [Prefer::Speed, Prefer::Memory] {
        blobs.push(encode_pair(&b, &f, prefer).unwrap());
    }
    for encoding in Encoding::ALL {
        blobs.push(encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap());
    }
    for blob in blobs {
        let delta = Resident::parse(&blob).unwrap();
        let what = format!("{} {dtype} {shape}", delta.header().encoding);
        assert_eq!(blob.len() % 64, 0, "{what}");
        delta.check_full(&b).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut out = vec![0xA5; fine_tuned.len()];
        restore(&delta, &b, &mut out).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(out == fine_tuned, "{what}");
        let rows = shape.n / 3..shape.n - shape.n / 4;
        let row = b.row_bytes();
        let mut part = vec![0xA5; rows.len() * row];
        restore_rows(&delta, &b, rows.clone(), &mut part).unwrap();
        assert!(part == fine_tuned[rows.start * row..rows.end * row], "{what}, rows {rows:?}");
        let changed = base.chunks(dtype.word_bytes()).zip(fine_tuned.chunks(dtype.word_bytes()));
        assert_eq!(delta.header().changed, changed.filter(|(a, b)| a != b).count() as u64, "{what}");
    }
}

#[test]
fn every_shape_and_dtype_comes_back() {
    let shapes = [
        (0, 0),
        (0, 7),
        (3, 0),
        (1, 1),
        (1, 5000),
        (17, 1),
        (15, 255),
        (16, 256),
        (33, 257),
        (64, 31),
        (300, 40),
        (18, 4097),
        (5, 9000),
    ];
    let mut rng = Rng::new(1);
    for dtype in Dtype::ALL {
        for (n, k) in shapes {
            for changed in [0.0, 0.004, 0.03, 0.3, 1.0] {
                let shape = Shape { n, k };
                let base = rng.weights(dtype, n * k);
                let fine_tuned = perturbed(&mut rng, dtype, &base, changed);
                round_trip(dtype, shape, &base, &fine_tuned);
            }
        }
    }
}

#[test]
fn nan_payloads_signed_zeros_infinities_and_denormals_come_back() {
    let mut rng = Rng::new(2);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64] {
        for (n, k) in [(16, 256), (37, 300), (3, 5000)] {
            let base = adversarial(&mut rng, dtype, n * k);
            let all = adversarial(&mut rng, dtype, n * k);
            round_trip(dtype, Shape { n, k }, &base, &all);
            let some = rng.mix(dtype, &base, &all, 0.02);
            round_trip(dtype, Shape { n, k }, &base, &some);
        }
    }
}

#[test]
fn a_lane_of_padding_on_a_nan_or_minus_zero_changes_nothing() {
    // One row changes everywhere, so that its 15 neighbours are all padding, on words that an addition would
    // alter.
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let word: &[u8] = match dtype {
            Dtype::F32 => &[1, 0, 0x80, 0x7F],
            Dtype::F16 => &[1, 0x7C],
            _ => &[0x81, 0x7F],
        };
        for w in [word.to_vec(), [vec![0; word.len() - 1], vec![0x80]].concat()] {
            let base = w.repeat(16 * 300);
            let mut fine_tuned = base.clone();
            fine_tuned[..300 * w.len()].fill(0x3D);
            round_trip(dtype, Shape { n: 16, k: 300 }, &base, &fine_tuned);
        }
    }
}

#[test]
fn unaligned_words_come_back() {
    let mut rng = Rng::new(3);
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::F64] {
        let base = rng.weights(dtype, 40 * 300);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
        let (b, f) = (unaligned(&base), unaligned(&fine_tuned));
        round_trip(dtype, Shape { n: 40, k: 300 }, &b[1..], &f[1..]);
        let shape = Shape { n: 40, k: 300 };
        let blob =
            encode_pair(&matrix(dtype, shape, &base), &matrix(dtype, shape, &fine_tuned), Prefer::Speed)
                .unwrap();
        let moved = unaligned(&blob);
        let mut out = vec![0; base.len()];
        restore(&Resident::parse(&moved[1..]).unwrap(), &matrix(dtype, shape, &base), &mut out).unwrap();
        assert!(out == fine_tuned);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_words_come_back(
        d in 0usize..15,
        n in 0usize..70,
        k in 0usize..600,
        share in 0.0f64..1.0,
        seed in any::<u64>(),
    ) {
        let dtype = Dtype::ALL[d];
        let mut rng = Rng::new(seed);
        let base = rng.bytes(n * k * dtype.word_bytes());
        let other = rng.bytes(base.len());
        let fine_tuned = rng.mix(dtype, &base, &other, share * share);
        round_trip(dtype, Shape { n, k }, &base, &fine_tuned);
    }
}

#[test]
fn a_delta_of_another_base_is_refused_with_both_digests() {
    let mut rng = Rng::new(4);
    let shape = Shape { n: 20, k: 300 };
    let base = rng.weights(Dtype::BF16, 6000);
    let fine_tuned = perturbed(&mut rng, Dtype::BF16, &base, 0.1);
    let blob = encode_pair(
        &matrix(Dtype::BF16, shape, &base),
        &matrix(Dtype::BF16, shape, &fine_tuned),
        Prefer::Speed,
    )
    .unwrap();
    let delta = Resident::parse(&blob).unwrap();
    let mut other = base.clone();
    other[77] ^= 1;
    let wrong = matrix(Dtype::BF16, shape, &other);
    let e = delta.check_digest(&wrong).unwrap_err();
    assert_eq!(e.kind(), xorz::error::Kind::Mismatch);
    assert!(
        e.message().contains(&wrong.digest().to_string())
            && e.message().contains(&delta.header().base_digest.to_string())
    );
    let narrow = Matrix::new(Dtype::BF16, Shape { n: 10, k: 600 }, &base).unwrap();
    assert!(delta.check_base(&narrow).unwrap_err().message().contains("[10, 600]"));
    assert!(restore(&delta, &narrow, &mut vec![0; base.len()]).is_err());
}
