//! Promise: packages written once decode forever. The files in tests/golden are never regenerated.

use crate::common::data::{Rng, perturbed, stepped, value, word};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use xorz::codec::{Encoding, Prefer};
use xorz::cpu::{LinearArgs, Mode, delta_linear};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{
    Codec, Destination, PackOptions, Package, Run, SafeTensors, pack_files, unpack_files, verify_files,
};
use xorz::resident::{Resident, restore};
use xorz::vector::Serial;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

const CASES: [(Codec, Prefer, &str); 6] = [
    (Codec::Xor, Prefer::Memory, "v1_xor.xorz"),
    (Codec::Resident, Prefer::Speed, "v1_resident_speed.xorz"),
    (Codec::Resident, Prefer::Memory, "v1_resident_memory.xorz"),
    (Codec::ResidentZstd, Prefer::Speed, "v1_resident_zstd_speed.xorz"),
    (Codec::ResidentZstd, Prefer::Memory, "v1_resident_zstd_memory.xorz"),
    (Codec::Planes, Prefer::Memory, "v1_planes.xorz"),
];

#[test]
fn golden_packages_decode() {
    let (base, ft) = (golden("base.safetensors"), golden("ft.safetensors"));
    let want = fs::read(&ft).unwrap();
    let (b, f) = (SafeTensors::open(&base).unwrap(), SafeTensors::open(&ft).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut encodings = BTreeSet::new();
    for (codec, _, name) in CASES {
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

/// Writes what is missing, and only that, in the version that this library writes: to be run once, when that
/// is frozen. `cargo test --test package golden -- --ignored`.
#[test]
#[ignore = "writes golden files that are missing"]
fn write_missing_golden_files() {
    let mut rng = Rng::new(2026);
    let bf16 = rng.weights(Dtype::BF16, 40 * 300);
    let f32 = rng.weights(Dtype::F32, 17 * 33);
    let i16 = rng.bytes(2 * 90);
    let base: Vec<(&str, &str, Vec<usize>, Vec<u8>)> = vec![
        ("layer.weight", "BF16", vec![40, 300], bf16.clone()),
        ("layer.bias", "F32", vec![17, 33], f32.clone()),
        ("rewritten", "F16", vec![200], rng.bytes(400)),
        ("same", "I16", vec![9, 10], i16.clone()),
        ("removed", "U8", vec![3], vec![1, 2, 3]),
        ("empty", "F64", vec![0], vec![]),
    ];
    let ft = vec![
        ("layer.weight", "BF16", vec![40, 300], stepped(&mut rng, Dtype::BF16, &bf16, 1e-5)),
        ("layer.bias", "F32", vec![17, 33], perturbed(&mut rng, Dtype::F32, &f32, 0.03)),
        ("rewritten", "F16", vec![200], rng.bytes(400)),
        ("same", "I16", vec![9, 10], i16),
        ("empty", "F64", vec![0], vec![]),
        ("new", "F4", vec![4, 4], rng.bytes(8)),
        ("new.zeros", "BOOL", vec![64], vec![0; 64]),
    ];
    for (name, tensors) in [("base.safetensors", base), ("ft.safetensors", ft)] {
        let (mut header, mut data) = (r#"{"__metadata__":{"format":"pt"}"#.to_string(), Vec::new());
        for (tensor, dtype, dims, bytes) in tensors {
            let start = data.len();
            data.extend(bytes);
            let info =
                format!(r#""dtype":"{dtype}","shape":{dims:?},"data_offsets":[{start},{}]"#, data.len());
            header += &format!(r#","{tensor}":{{{info}}}"#);
        }
        header += "}  ";
        let file = [(header.len() as u64).to_le_bytes().to_vec(), header.into_bytes(), data].concat();
        write_if_missing(name, &file);
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (codec, prefer, name) in CASES {
        let options = PackOptions { prefer, codec: Some(codec), ..PackOptions::default() };
        pack_files(
            &golden("base.safetensors"),
            &golden("ft.safetensors"),
            Destination::Path(&out),
            &options,
            &Run::default(),
        )
        .unwrap();
        write_if_missing(&name.replacen("v1", "v2", 1), &fs::read(&out).unwrap());
    }
}

fn write_if_missing(name: &str, bytes: &[u8]) {
    if !golden(name).exists() {
        fs::write(golden(name), bytes).unwrap();
    }
}
