//! Promise: slices and joins of deltas are deltas of the sliced and joined matrices, and never restore the matrix.

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped};
use xorz::codec::{Encoding, Prefer};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, concat, encode_as, encode_pair, restore, slice};

fn columns(shape: Shape, w: usize, bytes: &[u8], cols: std::ops::Range<usize>) -> Vec<u8> {
    (0..shape.n)
        .flat_map(|r| bytes[(r * shape.k + cols.start) * w..(r * shape.k + cols.end) * w].to_vec())
        .collect()
}

fn assert_delta(blob: &[u8], base: &Matrix<'_>, fine_tuned: &[u8], what: &str) {
    let delta = Resident::parse(blob).unwrap();
    delta.check_full(base).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut out = vec![0; fine_tuned.len()];
    restore(&delta, base, &mut out).unwrap();
    assert!(out == fine_tuned, "{what}");
}

fn pairs(dtype: Dtype, n: usize, k: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rng = Rng::new(7);
    let base = rng.weights(dtype, n * k);
    let small = perturbed(&mut rng, dtype, &base, 0.02);
    let dense = stepped(&mut rng, dtype, &base, 1e-4);
    let odd = adversarial(&mut rng, dtype, n * k);
    let some = rng.mix(dtype, &base, &odd, 0.05);
    vec![(base.clone(), small), (base.clone(), dense), (base.clone(), some), (base.clone(), base)]
}

#[test]
fn slices_equal_the_slice_of_the_matrix() {
    for dtype in [Dtype::BF16, Dtype::F32] {
        let (n, k) = (70, 9000);
        let (shape, w) = (Shape { n, k }, dtype.word_bytes());
        for (base, fine_tuned) in pairs(dtype, n, k) {
            let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
            for encoding in Encoding::ALL {
                let blob = encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap();
                let delta = Resident::parse(&blob).unwrap();
                for rows in [0..n, 16..48, 0..1, 5..37, 69..70, 30..30] {
                    let cut = slice(&delta, &b, 0, rows.clone()).unwrap();
                    let part = b.rows(rows.start, rows.end);
                    let want = &fine_tuned[rows.start * k * w..rows.end * k * w];
                    assert_delta(&cut, &part, want, &format!("{encoding} {dtype} rows {rows:?}"));
                }
                for cols in [0..k, 4096..8192, 0..1, 100..5000, 8999..9000, 8192..9000] {
                    let cut = slice(&delta, &b, 1, cols.clone()).unwrap();
                    let part = columns(shape, w, &base, cols.clone());
                    let want = columns(shape, w, &fine_tuned, cols.clone());
                    let cut_shape = Shape { n, k: cols.len() };
                    assert_delta(
                        &cut,
                        &matrix(dtype, cut_shape, &part),
                        &want,
                        &format!("{encoding} {dtype} {cols:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn whole_tiles_are_copied() {
    let (dtype, n, k) = (Dtype::BF16, 64, 8192);
    let shape = Shape { n, k };
    let (base, fine_tuned) = &pairs(dtype, n, k)[0];
    let (b, f) = (matrix(dtype, shape, base), matrix(dtype, shape, fine_tuned));
    for encoding in [Encoding::Sparse, Encoding::Exponent] {
        let blob = encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap();
        let delta = Resident::parse(&blob).unwrap();
        let grid = delta.grid();
        let (across, height) = (grid.tile_cols_count(), grid.tile_rows);
        let cut = slice(&delta, &b, 0, height..3 * height).unwrap();
        let cut = Resident::parse(&cut).unwrap();
        assert_eq!(cut.header().encoding, encoding);
        assert_eq!((cut.grid().tile_rows, cut.grid().tile_cols), (height, grid.tile_cols));
        let payload = |d: &Resident<'_>, i: usize| format!("{:?}", d.tile(i).unwrap());
        for i in 0..2 * across {
            assert_eq!(payload(&cut, i), payload(&delta, i + across), "{encoding} tile {i}");
        }
    }
}

#[test]
fn joins_equal_the_joined_matrix_whatever_the_encodings() {
    for dtype in [Dtype::BF16, Dtype::F32] {
        let (n, k) = (48, 600);
        let (shape, w) = (Shape { n, k }, dtype.word_bytes());
        let data = pairs(dtype, n, k);
        for chosen in [vec![0, 0], vec![0, 1, 3], vec![3, 3], vec![1, 1], vec![0, 2], vec![3, 1]] {
            for prefer in [Prefer::Speed, Prefer::Memory] {
                let blobs: Vec<_> = chosen
                    .iter()
                    .map(|&i| {
                        let (b, f) = &data[i];
                        encode_pair(&matrix(dtype, shape, b), &matrix(dtype, shape, f), prefer).unwrap()
                    })
                    .collect();
                let parts: Vec<_> = chosen
                    .iter()
                    .zip(&blobs)
                    .map(|(&i, blob)| (Resident::parse(blob).unwrap(), matrix(dtype, shape, &data[i].0)))
                    .collect();
                let what = format!("{dtype} {chosen:?} {prefer:?}");
                let rows = Shape { n: n * parts.len(), k };
                let (b, f): (Vec<_>, Vec<_>) = chosen.iter().map(|&i| data[i].clone()).unzip();
                assert_delta(
                    &concat(&parts, 0).unwrap(),
                    &matrix(dtype, rows, &b.concat()),
                    &f.concat(),
                    &what,
                );
                let beside = |m: &[Vec<u8>]| -> Vec<u8> {
                    (0..n)
                        .flat_map(|r| m.iter().flat_map(move |x| x[r * k * w..(r + 1) * k * w].to_vec()))
                        .collect()
                };
                let cols = Shape { n, k: k * parts.len() };
                assert_delta(
                    &concat(&parts, 1).unwrap(),
                    &matrix(dtype, cols, &beside(&b)),
                    &beside(&f),
                    &what,
                );
            }
        }
    }
}

#[test]
fn ranges_and_shapes_that_do_not_fit_are_refused() {
    let shape = Shape { n: 20, k: 300 };
    let (base, fine_tuned) = &pairs(Dtype::BF16, 20, 300)[0];
    let (b, f) = (matrix(Dtype::BF16, shape, base), matrix(Dtype::BF16, shape, fine_tuned));
    let blob = encode_pair(&b, &f, Prefer::Speed).unwrap();
    let delta = Resident::parse(&blob).unwrap();
    assert!(slice(&delta, &b, 0, 5..21).is_err());
    #[expect(clippy::reversed_empty_ranges, reason = "the point of the test")]
    let reversed = 5..4;
    assert!(slice(&delta, &b, 0, reversed).is_err());
    assert!(slice(&delta, &b, 2, 0..1).unwrap_err().message().contains("dim"));
    let narrow = matrix(Dtype::BF16, Shape { n: 30, k: 200 }, base);
    assert!(slice(&delta, &narrow, 0, 0..1).is_err());
    assert!(concat(&[], 0).is_err());
    let other = encode_pair(&narrow, &narrow, Prefer::Speed).unwrap();
    let parts = [(delta, b), (Resident::parse(&other).unwrap(), narrow)];
    let e = concat(&parts, 0).unwrap_err();
    assert!(e.message().contains("[20, 300]") && e.message().contains("[30, 200]"), "{e}");
}

#[test]
fn damaged_deltas_and_those_of_another_base_are_not_made_sound_by_cutting_or_joining() {
    let (dtype, n, k) = (Dtype::BF16, 40, 300);
    let shape = Shape { n, k };
    for (base, fine_tuned) in pairs(dtype, n, k) {
        let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
        for encoding in Encoding::ALL {
            if encoding == Encoding::Unchanged && base != fine_tuned {
                continue;
            }
            let blob = encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap();
            let refused = |blob: &[u8], base: &Matrix<'_>, kind: Kind, what: &str| {
                let delta = Resident::parse(blob).unwrap();
                let (good, sound) = (delta.clone(), matrix(dtype, shape, &fine_tuned));
                let spare = encode_pair(&sound, &sound, Prefer::Memory).unwrap();
                let spare = Resident::parse(&spare).unwrap();
                for dim in [0, 1] {
                    let cut = slice(&delta, base, dim, 3..20).expect_err(what);
                    let joined =
                        concat(&[(spare.clone(), sound), (good.clone(), *base)], dim).expect_err(what);
                    assert_eq!((cut.kind(), joined.kind()), (kind, kind), "{what}: {cut}, {joined}");
                    assert!(joined.message().contains("part 1"), "{joined}");
                }
            };
            // Each byte whose change leaves a header that can be read: words, positions, digests, counts.
            for at in (0..blob.len()).step_by(if blob.len() > 2000 { 37 } else { 1 }) {
                let mut bad = blob.clone();
                bad[at] ^= 1;
                if Resident::parse(&bad).is_ok() {
                    refused(&bad, &b, Kind::Corrupt, &format!("{encoding}, byte {at}"));
                }
            }
            let mut other = base.clone();
            other[n * k] ^= 1;
            refused(
                &blob,
                &matrix(dtype, shape, &other),
                Kind::Mismatch,
                &format!("{encoding}, another base"),
            );
        }
    }
}
