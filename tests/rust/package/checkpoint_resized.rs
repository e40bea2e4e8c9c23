//! Promise: a tensor that has gained or lost rows, columns, channels or positions is a delta of what both have, and so is one whose
//! words lie in other dimensions; what cannot be that is stored alone, and takes no more than zstd.

use crate::common::data::{Rng, stepped};
use crate::common::disk::safetensors;
use crate::common::packed::{Packed, t, tuned};
use std::fs;
use std::time::{Duration, Instant};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Base, Codec, Destination, PackOptions, Package, Run, pack_files};
use xorz::resident::{Resident, restore};

/// Rows of `k` words, some of them left out or put in.
fn rows(all: &[u8], k: usize, ranges: &[(usize, usize)]) -> Vec<u8> {
    ranges.iter().flat_map(|(from, to)| all[from * 2 * k..to * 2 * k].to_vec()).collect()
}

#[test]
fn rows_added_or_removed_leave_a_delta_of_those_in_common() {
    let mut rng = Rng::new(74);
    let (n, k) = (1000, 64);
    let (old, new) = tuned(&mut rng, n * k);
    let fresh = rng.weights(Dtype::BF16, 8 * k);
    let cases: [(&str, Vec<u8>); 7] = [
        ("8 rows more", [&new[..], &fresh].concat()),
        ("8 in front", [&fresh[..], &new].concat()),
        ("8 inside", [&rows(&new, k, &[(0, 333)])[..], &fresh, &rows(&new, k, &[(333, n)])].concat()),
        ("8 fewer", rows(&new, k, &[(0, n - 8)])),
        ("8 fewer in front", rows(&new, k, &[(8, n)])),
        ("8 fewer inside", rows(&new, k, &[(0, 500), (508, n)])),
        ("half", rows(&new, k, &[(0, n / 2)])),
    ];
    for (what, bytes) in cases {
        println!("{what}");
        let have = bytes.len() / 2 / k;
        let base = [t("model.embed", "BF16", &[n, k], &old), t("bias", "BF16", &[n], &old[..2 * n])];
        let bias = [&old[..2 * n.min(have)], &vec![0; 2 * have.saturating_sub(n)]].concat();
        for name in ["model.embed", "wrapped.model.embed"] {
            let ft = [t(name, "BF16", &[have, k], &bytes), t("bias", "BF16", &[have], &bias)];
            let packed = Packed::one(&base, &ft);
            assert_eq!((packed.report.alone, packed.report.removed), (0, 0), "{what}: {:?}", packed.report);
            assert!(!packed.entry(name).base.unwrap().parts.is_empty());
            packed.takes(0.15);
        }
    }
    // Other weights of the name are no delta at all.
    let ft = [t("model.embed", "BF16", &[n + 8, k], &rng.weights(Dtype::BF16, (n + 8) * k))];
    assert_eq!(Packed::one(&[t("model.embed", "BF16", &[n, k], &old)], &ft).report.alone, 1);
}

/// Rows of `bytes` bytes in another order: of each new row the old one, or none, for which there are fresh words.
fn ordered(rng: &mut Rng, dtype: Dtype, all: &[u8], row: usize, from: &[Option<usize>]) -> Vec<u8> {
    let mut fresh = || rng.weights(dtype, row / dtype.word_bytes());
    from.iter().flat_map(|i| i.map_or_else(&mut fresh, |i| all[i * row..(i + 1) * row].to_vec())).collect()
}

#[test]
fn rows_are_found_wherever_they_went() {
    let mut rng = Rng::new(75);
    let (n, k) = (1200, 64);
    let all = || (0..n).map(Some);
    let scattered: Vec<bool> = (0..n).map(|_| rng.next().is_multiple_of(3)).collect();
    let mut shuffled: Vec<_> = all().collect();
    (1..n).for_each(|i| shuffled.swap(i, rng.next() as usize % (i + 1)));
    // What RoPE's two layouts do to a head's rows: halves, and every second row.
    let rope = |i: usize| Some(i / 48 * 48 + i % 48 / 2 + i % 2 * 24);
    let fresh = |i: usize| i % 100 == 7;
    let cases: [(&str, Vec<Option<usize>>); 8] = [
        ("fewer in front, more at the end", (100..n).map(Some).chain([None; 8]).collect()),
        ("a third of them left out", all().filter(|i| !scattered[i.unwrap()]).collect()),
        ("12 put in", all().flat_map(|i| [fresh(i.unwrap()).then_some(None), Some(i)]).flatten().collect()),
        ("12 of them others", (0..n).map(|i| (!fresh(i)).then_some(i)).chain([None; 4]).collect()),
        ("shuffled, one of them twice", shuffled.iter().copied().chain([Some(5)]).collect()),
        ("shuffled, half of them", shuffled[..n / 2].to_vec()),
        ("half of the heads, in RoPE's other layout", (n / 2..n).map(rope).collect()),
        ("twice each", (0..2 * n).map(|i| Some(i / 2)).collect()),
    ];
    for (dtype, dims) in [("BF16", vec![n, k]), ("F32", vec![n, k]), ("F16", vec![n / 4, 4, k])] {
        let kind = Dtype::from_name(dtype).unwrap();
        let row = k * kind.word_bytes();
        let old = rng.weights(kind, n * k);
        let stepped = stepped(&mut rng, kind, &old, 1e-5);
        let new = rng.mix(kind, &old, &stepped, 0.01);
        for (what, from) in &cases {
            if dims.len() > 2 && from.len() % 4 != 0 {
                continue;
            }
            let bytes = ordered(&mut rng, kind, &new, row, from);
            let mut now = dims.clone();
            now[0] = from.len() * dims[0] / n;
            let packed = Packed::one(&[t("w", dtype, &dims, &old)], &[t("w", dtype, &now, &bytes)]);
            let others = from.iter().filter(|i| i.is_none()).count();
            let took = packed.report.package_bytes as usize;
            // 12 bytes for each run of rows at the very most, and what is new as it is.
            let most = bytes.len() / 8 + others * row + 12 * from.len() + 2048;
            println!("{what}, {dtype}: {took} of {}, at most {most}", bytes.len());
            assert_eq!(packed.report.alone, 0, "{what}");
            assert!(took < most, "{what}, {dtype}: {took} for {most}");
        }
    }
}

#[test]
fn rows_that_are_many_rows_or_none_of_the_base_s_are_no_ones() {
    let mut rng = Rng::new(76);
    let (n, k) = (600, 64);
    // Padding and tokens that were never trained: rows that say nothing of where they come from.
    let (old, new) = tuned(&mut rng, n * k);
    let zeros = vec![0u8; 200 * 2 * k];
    let same = rng.weights(Dtype::BF16, k).repeat(200);
    let base = [&old[..], &zeros, &same].concat();
    let mixed = [&same[..2 * k * 50], &rows(&new, k, &[(100, 350), (400, n)]), &zeros, &same].concat();
    let dims = |bytes: &[u8]| [bytes.len() / 2 / k, k];
    let packed =
        Packed::one(&[t("w", "BF16", &dims(&base), &base)], &[t("w", "BF16", &dims(&mixed), &mixed)]);
    assert_eq!(packed.report.alone, 0);
    packed.takes(0.2);
    // Other weights of another number of rows, and of the same one.
    for rows in [n, n + 5] {
        let other = rng.weights(Dtype::BF16, rows * k);
        let packed = Packed::one(&[t("w", "BF16", &[n, k], &old)], &[t("w", "BF16", &[rows, k], &other)]);
        let parts = packed.entry("w").base.map_or(0, |b| b.parts.len());
        assert_eq!((packed.report.alone, parts), (usize::from(rows > n), 0), "{rows}");
    }
}

/// A tensor cut into its indices of dimension `axis`: for each index of the dimensions before it, the bytes of each index of it.
fn blocks(bytes: &[u8], dims: &[usize], axis: usize) -> Vec<Vec<Vec<u8>>> {
    let outer: usize = dims[..axis].iter().product();
    let step = bytes.len() / outer / dims[axis];
    let block = |b: &[u8]| b.chunks(step).map(<[u8]>::to_vec).collect();
    bytes.chunks(step * dims[axis]).map(block).collect()
}

/// Words that the base lacks, `more` indices of a dimension, put in at `place`, or so many that the fine-tune lacks taken out.
fn resized(rng: &mut Rng, bytes: &[u8], dims: &[usize], axis: usize, place: usize, by: isize) -> Vec<u8> {
    let mut all = blocks(bytes, dims, axis);
    for block in &mut all {
        let step = block[0].len();
        if by < 0 {
            block.drain(place..place + by.unsigned_abs());
        }
        for _ in 0..by.max(0) {
            block.insert(place, rng.weights(Dtype::BF16, step / 2));
        }
    }
    all.concat().concat()
}

#[test]
fn any_dimension_that_grew_or_shrank_leaves_a_delta_of_what_both_have() {
    let mut rng = Rng::new(78);
    let cases: [(&str, &[usize], usize, usize, isize); 12] = [
        ("8 columns more", &[300, 512], 1, 512, 8),
        ("8 columns in front", &[300, 512], 1, 0, 8),
        ("8 columns inside", &[300, 512], 1, 200, 8),
        ("8 columns fewer", &[300, 512], 1, 504, -8),
        ("8 columns fewer in front", &[300, 512], 1, 0, -8),
        ("8 columns fewer inside", &[300, 512], 1, 100, -8),
        ("half of the columns", &[300, 512], 1, 256, -256),
        ("twice the columns", &[300, 512], 1, 512, 512),
        ("channels of a convolution", &[320, 32, 3, 3], 1, 32, 5),
        ("experts in the middle", &[4, 20, 64, 32], 1, 20, 2),
        ("positions", &[1, 197, 256], 1, 197, 59),
        ("the last of three", &[6, 50, 256], 2, 256, 16),
    ];
    for (what, dims, axis, place, by) in cases {
        println!("{what}");
        let (old, new) = tuned(&mut rng, dims.iter().product());
        let bytes = resized(&mut rng, &new, dims, axis, place, by);
        let mut now = dims.to_vec();
        now[axis] = now[axis].strict_add_signed(by);
        let base = [t("model.embed", "BF16", dims, &old)];
        for name in ["model.embed", "wrapped.model.embed"] {
            let ft = [t(name, "BF16", &now, &bytes)];
            let packed = Packed::one(&base, &ft);
            assert_eq!((packed.report.alone, packed.report.removed), (0, 0), "{what}: {:?}", packed.report);
            // What is new takes what it takes; of what both have there is little.
            let fresh = bytes.len().saturating_sub(old.len());
            let most = fresh as f64 * 0.95 + (bytes.len() - fresh) as f64 * 0.12 + 4096.0;
            let took = packed.report.package_bytes;
            println!("  {took} of {} bytes, {fresh} of them new", bytes.len());
            assert!((took as f64) < most, "{what}: {took} for {most}");
        }
        // Other weights of the name are no delta at all.
        let other = rng.weights(Dtype::BF16, bytes.len() / 2);
        let packed = Packed::one(&base, &[t("model.embed", "BF16", &now, &other)]);
        assert_eq!(packed.report.alone, 1, "{what}");
    }
}

#[test]
fn two_dimensions_that_grew_and_words_in_other_dimensions_stay_deltas() {
    let mut rng = Rng::new(79);
    let (n, k) = (300, 512);
    let (old, new) = tuned(&mut rng, n * k);
    let wide = resized(&mut rng, &new, &[n, k], 1, k, 8);
    let grown = resized(&mut rng, &wide, &[n, k + 8], 0, n, 8);
    let base = [t("w", "BF16", &[n, k], &old)];
    let packed = Packed::one(&base, &[t("w", "BF16", &[n + 8, k + 8], &grown)]);
    assert_eq!(packed.report.alone, 0);
    packed.takes(0.15);
    for dims in [&[n, k, 1][..], &[n, 16, 32], &[n * k], &[2, n / 2, k]] {
        let packed = Packed::one(&base, &[t("w", "BF16", dims, &new)]);
        assert_eq!(packed.report.alone, 0, "{dims:?}");
        packed.takes(0.12);
    }
    // The delta of what was put together, against a base that is put together here, by hand.
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("base"), safetensors(&base)).unwrap();
    fs::write(path("ft"), safetensors(&[t("w", "BF16", &[n, k + 8], &wide)])).unwrap();
    for codec in Codec::ALL.into_iter().filter(|c| c.name().parse::<Codec>().is_ok()) {
        let options = PackOptions { codec: Some(codec), ..PackOptions::default() };
        pack_files(&path("base"), &path("ft"), Destination::Path(&path("p")), &options, &Run::default())
            .unwrap();
        let package = Package::open(&path("p")).unwrap();
        let delta =
            Base::open(&path("base"), &Run::default()).unwrap().resident(&package, "w", None).unwrap();
        let joined: Vec<u8> = old.chunks(2 * k).flat_map(|row| [row, &[0; 16]].concat()).collect();
        let joined = Matrix::new(Dtype::BF16, Shape { n, k: k + 8 }, &joined).unwrap();
        let mut out = vec![0; wide.len()];
        restore(&Resident::parse(&delta).unwrap(), &joined, &mut out).unwrap();
        assert!(out == wide, "{codec:?}");
    }
}

#[test]
fn very_many_short_parts_take_little_and_are_found_quickly() {
    let mut rng = Rng::new(80);
    let (n, k) = (30_000, 32);
    let (old, new) = tuned(&mut rng, n * k);
    let wide = resized(&mut rng, &new, &[n, k], 1, k, 1);
    let base = [t("w", "BF16", &[n, k], &old)];
    let start = Instant::now();
    let packed = Packed::one(&base, &[t("w", "BF16", &[n, k + 1], &wide)]);
    assert_eq!(packed.report.alone, 0);
    assert_eq!(packed.entry("w").base.unwrap().parts.len(), 2 * n);
    println!("{} bytes, {:?}", packed.report.package_bytes, start.elapsed());
    // 2 new bytes a row, and 12 for what is said of it.
    assert!(packed.report.package_bytes < 14 * n as u64 + wide.len() as u64 / 10);
    assert!(start.elapsed() < Duration::from_secs(30));
    // Shorter ones are not worth it, and there may be too many.
    for (n, k) in [(3000, 24), (70_000, 32)] {
        let (old, new) = tuned(&mut rng, n * k);
        let wide = resized(&mut rng, &new, &[n, k], 1, k, 1);
        let packed = Packed::one(&[t("w", "BF16", &[n, k], &old)], &[t("w", "BF16", &[n, k + 1], &wide)]);
        assert_eq!(packed.report.alone, 1, "{n} {k}");
    }
}

#[test]
fn what_no_base_can_be_put_together_for_is_stored_alone_and_takes_no_more_than_zstd_10() {
    let mut rng = Rng::new(81);
    let (experts, n, k) = (8, 96, 128);
    let (old, new) = tuned(&mut rng, experts * n * k);
    let turned = |bytes: &[u8]| -> Vec<u8> {
        let word = |e: usize, i: usize, j: usize| &bytes[2 * (e * n * k + i * k + j)..][..2];
        let order = (0..experts).flat_map(|e| (0..k).flat_map(move |j| (0..n).map(move |i| (e, i, j))));
        order.flat_map(|(e, i, j)| word(e, i, j).to_vec()).collect()
    };
    let stack = t("experts.w", "BF16", &[experts, n, k], &old);
    let apart: Vec<_> = old
        .chunks(2 * n * k)
        .enumerate()
        .map(|(e, w)| t(&format!("experts.{e}.w"), "BF16", &[n, k], w))
        .collect();
    let all_turned = turned(&new);
    for base in [vec![stack], apart] {
        for ft in [
            vec![t("experts.w", "BF16", &[experts, k, n], &all_turned)],
            all_turned
                .chunks(2 * n * k)
                .enumerate()
                .map(|(e, w)| t(&format!("experts.{e}.w"), "BF16", &[k, n], w))
                .collect(),
        ] {
            let packed = Packed::one(&base, &ft);
            assert_eq!(packed.report.alone, ft.len());
            for (name, _, _, words) in &ft {
                let (stored, most) =
                    (packed.entry(name).stored_bytes, zstd::bulk::compress(words, 10).unwrap());
                assert!(stored <= most.len() as u64, "{name}: {stored} for {}", most.len());
            }
        }
    }
}
