//! Promise: packages of version 1 decode forever. The files in tests/golden are never regenerated; nothing writes that version
//! any more.

use crate::common::data::{value, word};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use xorz::codec::Encoding;
use xorz::cpu::{LinearArgs, Mode, delta_linear};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Codec, Destination, Package, Run, SafeTensors, unpack_files, verify_files};
use xorz::resident::{Resident, restore};
use xorz::vector::Serial;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

const CASES: [(Codec, &str); 6] = [
    (Codec::Xor, "v1_xor.xorz"),
    (Codec::Resident, "v1_resident_speed.xorz"),
    (Codec::Resident, "v1_resident_memory.xorz"),
    (Codec::ResidentZstd, "v1_resident_zstd_speed.xorz"),
    (Codec::ResidentZstd, "v1_resident_zstd_memory.xorz"),
    (Codec::Planes, "v1_planes.xorz"),
];

#[test]
fn golden_packages_decode() {
    let (base, ft) = (golden("base.safetensors"), golden("ft.safetensors"));
    let want = fs::read(&ft).unwrap();
    let (b, f) = (SafeTensors::open(&base).unwrap(), SafeTensors::open(&ft).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut encodings = BTreeSet::new();
    for (codec, name) in CASES {
        let path = golden(name);
        verify_files(&base, &path, Some(&ft), &Run::default()).unwrap();
        unpack_files(&base, &path, Destination::Path(&out), &Run::default()).unwrap();
        assert!(fs::read(&out).unwrap() == want, "{name}");
        let package = Package::open(&path).unwrap();
        assert_eq!(package.removed(), ["removed"], "{name}");
        for e in package.entries().iter().filter(|e| e.codec.delta()) {
            assert_eq!(e.codec, codec, "{name}");
            encodings.extend(e.encoding.map(Encoding::name));
            let bytes = b.read(b.find(&e.name).unwrap()).unwrap();
            let m = Matrix::new(e.word_dtype().unwrap(), e.shape().unwrap(), &bytes).unwrap();
            let resident = package.resident(&e.name, &m, None).unwrap();
            let mut got = vec![0; bytes.len()];
            let delta = Resident::parse(&resident).unwrap();
            restore(&delta, &m, &mut got).unwrap();
            let fine_tuned = f.read(f.find(&e.name).unwrap()).unwrap();
            assert!(got == fine_tuned, "{name}: {}", e.name);
            if matches!(codec, Codec::Resident | Codec::ResidentZstd) {
                assert_eq!(delta.header().version, 0, "{name}: {}", e.name);
                if m.dtype().computes() {
                    columns_are_the_fine_tuned_ones(delta, &m, &fine_tuned, name);
                }
            }
        }
    }
    assert_eq!(encodings.into_iter().collect::<Vec<_>>(), ["exponent", "raw", "sparse", "unchanged"]);
}

/// `x` one-hot: a product of a delta of layout 0 is a column of the fine-tuned matrix.
fn columns_are_the_fine_tuned_ones(delta: Resident<'_>, base: &Matrix<'_>, fine_tuned: &[u8], name: &str) {
    let (dtype, Shape { n, k }, w) = (base.dtype(), base.shape(), base.dtype().word_bytes());
    let x: Vec<u8> = (0..k * k).flat_map(|i| word(dtype, f64::from(u8::from(i / k == i % k)))).collect();
    let args = LinearArgs { x: &x, m: k, base: *base, delta, bias: None, mode: Mode::Deterministic };
    let mut out = vec![0; k * n * w];
    delta_linear(&args, &mut out, &Serial).unwrap();
    for (i, got) in out.chunks(w).enumerate() {
        let (column, row) = (i / n, i % n);
        let row: Vec<f64> = fine_tuned[row * k * w..][..k * w].chunks(w).map(|f| value(dtype, f)).collect();
        if row.iter().any(|f| !f.is_finite()) {
            // Zero times what is not finite.
            continue;
        }
        let (got, want) = (value(dtype, got), row[column]);
        // Sums of f32 words and their differences are rounded.
        let slack = if dtype == Dtype::F32 { 1e-6 * want.abs().max(1e-3) } else { 0.0 };
        assert!((got - want).abs() <= slack, "{name}: {got} for {want}");
    }
}
