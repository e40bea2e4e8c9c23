//! Promise: what is packed comes back bit for bit, by every codec, for every dtype and preference, and a packed file comes
//! back as the same file. Also: another base is refused.

use crate::common::data::{Rng, matrix, perturbed};
use crate::common::exchanged::exchanged;
use std::fs;
use std::path::{Path, PathBuf};
use xorz::codec::{Encoding, Prefer};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{
    Codec, Destination, PackOptions, Package, Report, Run, SafeTensors, Tensor, Writer, pack_files,
    unpack_files, verify_files,
};
use xorz::resident::{Resident, encode_pair, restore};

/// A safetensors file: header as a human would write it, ending in `pad` spaces.
fn safetensors(path: &Path, metadata: &str, tensors: &[(&str, &str, Vec<usize>, Vec<u8>)], pad: usize) {
    let (mut header, mut data) = (format!("{{{metadata}"), Vec::new());
    for (i, (name, dtype, dims, bytes)) in tensors.iter().enumerate() {
        let comma = if i == 0 && metadata.is_empty() { "" } else { ", " };
        let end = data.len() + bytes.len();
        header += &format!(
            "{comma}\"{name}\": {{\"shape\":{dims:?},\"dtype\":\"{dtype}\",\"data_offsets\":[{}, {end}]}}",
            data.len()
        );
        data.extend_from_slice(bytes);
    }
    header += "}";
    header += &" ".repeat(pad);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend(data);
    fs::write(path, file).unwrap();
}

fn options(codec: Option<Codec>, prefer: Prefer) -> PackOptions {
    PackOptions { prefer, codec, ..PackOptions::default() }
}

const CODECS: [Option<Codec>; 6] = [
    None,
    Some(Codec::Xor),
    Some(Codec::Resident),
    Some(Codec::ResidentZstd),
    Some(Codec::Planes),
    Some(Codec::Predicted),
];

#[test]
fn every_codec_dtype_and_preference_gives_the_same_bits_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let mut rng = Rng::new(1);
    for dtype in Dtype::ALL {
        for (dims, share) in
            [(vec![37, 300], 0.01), (vec![19, 5, 7], 0.5), (vec![1000], 1.0), (vec![64, 64], 0.0)]
        {
            let words = dims.iter().product();
            let base = rng.weights(dtype, words);
            let ft = perturbed(&mut rng, dtype, &base, share);
            for codec in CODECS {
                for prefer in [Prefer::Speed, Prefer::Memory] {
                    let mut w = Writer::create(&path, options(codec, prefer)).unwrap();
                    let t = |bytes| Tensor { name: "w", dtype: dtype.name(), dims: &dims, bytes };
                    w.add(&t(&ft), Some(&t(&base))).unwrap();
                    let report = w.finish().unwrap();
                    assert_eq!(report.package_bytes, fs::metadata(&path).unwrap().len());
                    check_one(&path, dtype, &dims, &base, &ft, codec);
                }
            }
        }
    }
}

/// All ways out of a package with the one tensor `w`.
fn check_one(path: &Path, dtype: Dtype, dims: &[usize], base: &[u8], ft: &[u8], codec: Option<Codec>) {
    let package = Package::open(path).unwrap();
    let shape = Shape::of_dims(dims).unwrap();
    let m = matrix(dtype, shape, base);
    let entry = package.entry("w").unwrap();
    let what = format!("{dtype} {dims:?} {:?}", entry.codec);
    if let Some(codec) = codec {
        // Words of eight bytes are not predicted, nor is a tensor without words.
        let held = codec != Codec::Predicted || (dtype.word_bytes() < 8 && !ft.is_empty());
        assert_eq!(entry.codec, if held { codec } else { Codec::Planes }, "{what}");
    }
    assert_eq!((entry.dims.as_slice(), entry.word_dtype()), (dims, Some(dtype)));
    let w = dtype.word_bytes();
    let changed = base.chunks(w).zip(ft.chunks(w)).filter(|(a, b)| a != b).count() as u64;
    assert_eq!(entry.changed, Some(changed), "{what}");
    let mut out = vec![0xAA; ft.len()];
    package.restore("w", Some(&m), &mut out).unwrap();
    assert!(out == ft, "{what}: restore");
    assert!(exchanged(&package, "w", &m).unwrap() == ft, "{what}: in place");
    for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
        let bytes = package.resident("w", &m, prefer).unwrap();
        // What is loaded for a preference is what encoding for it gives: nothing is lost on the way.
        let direct = encode_pair(&m, &matrix(dtype, shape, ft), prefer.or(entry.prefer).unwrap()).unwrap();
        assert!(bytes == direct, "{what} {prefer:?}: resident");
        restore(&Resident::parse(&bytes).unwrap(), &m, &mut out).unwrap();
        assert!(out == ft, "{what} {prefer:?}: restore of resident");
    }
}

/// Rows that span frames, frames that span rows, tiles that span both: read out of order, and twice.
#[test]
fn matrices_of_many_frames_give_the_same_bits_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let mut rng = Rng::new(6);
    for (dtype, dims) in [
        (Dtype::BF16, vec![33, 70_001]),
        (Dtype::F32, vec![900_001]),
        (Dtype::F64, vec![2, 3, 90_000]),
        (Dtype::U8, vec![3_000_000, 1]),
        (Dtype::F16, vec![1200, 1100]),
    ] {
        let words = dims.iter().product::<usize>();
        let base = rng.bytes(words * dtype.word_bytes());
        let other = rng.bytes(base.len());
        let ft = rng.mix(dtype, &base, &other, 0.02);
        for codec in [Codec::Planes, Codec::Xor, Codec::ResidentZstd] {
            let mut w = Writer::create(&path, options(Some(codec), Prefer::Memory)).unwrap();
            let t = |bytes| Tensor { name: "w", dtype: dtype.name(), dims: &dims, bytes };
            w.add(&t(&ft), Some(&t(&base))).unwrap();
            w.finish().unwrap();
            check_one(&path, dtype, &dims, &base, &ft, Some(codec));
        }
    }
}

/// The payload is written before the header that tells of it: what is read back is the delta in its own order.
#[test]
fn deltas_longer_than_a_frame_give_the_same_bits_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let mut rng = Rng::new(12);
    let (dtype, dims) = (Dtype::F32, vec![1031, 700]);
    let base = rng.weights(dtype, 1031 * 700);
    let ft = perturbed(&mut rng, dtype, &base, 0.9);
    for codec in [Codec::ResidentZstd, Codec::Resident] {
        for prefer in [Prefer::Speed, Prefer::Memory] {
            let mut w = Writer::create(&path, options(Some(codec), prefer)).unwrap();
            let t = |bytes| Tensor { name: "w", dtype: dtype.name(), dims: &dims, bytes };
            w.add(&t(&ft), Some(&t(&base))).unwrap();
            let report = w.finish().unwrap();
            assert!(report.package_bytes > 2 << 20, "several frames are meant");
            check_one(&path, dtype, &dims, &base, &ft, Some(codec));
            if codec == Codec::ResidentZstd {
                let file = SafeTensors::open(&path).unwrap();
                let blob = file.read(file.find("xorz:data").unwrap()).unwrap();
                let number = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap());
                let (first, count) = (number(blob.len() - 8), number(blob.len() - 4));
                assert!(first > 1 && first < count, "{first} of {count} frames go first");
            }
        }
    }
}

/// The plan comes from a sample of tiles. Where all changes are in rows that it does not see, the tensor is encoded again
/// by what it really holds.
#[test]
fn changes_that_a_sample_misses_cost_no_more_than_those_it_sees() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let mut rng = Rng::new(13);
    let (dtype, n, k) = (Dtype::BF16, 4096, 512);
    let base = rng.weights(dtype, n * k);
    let row = k * 2;
    for rows in [100..103, 2000..2017, 4090..4096] {
        let mut ft = base.clone();
        let part = rows.start * row..rows.end * row;
        let new = perturbed(&mut rng, dtype, &base[part.clone()], 1.0);
        ft[part].copy_from_slice(&new);
        let mut w = Writer::create(&path, options(Some(Codec::Resident), Prefer::Memory)).unwrap();
        let dims = vec![n, k];
        let t = |bytes| Tensor { name: "w", dtype: dtype.name(), dims: &dims, bytes };
        w.add(&t(&ft), Some(&t(&base))).unwrap();
        w.finish().unwrap();
        check_one(&path, dtype, &dims, &base, &ft, Some(Codec::Resident));
        // As entries they would take 4 bytes each, a quarter of them twice since noise is as large as the words, and a
        // directory; no plan that has seen them takes more.
        let stored = Package::open(&path).unwrap().entry("w").unwrap().stored_bytes;
        let most = (rows.len() * k * 5 + 4096) as u64;
        assert!(stored <= most, "{rows:?}: {stored} bytes, at most {most}");
    }
}

#[test]
fn xor_is_one_zstd_frame_that_any_decompressor_reads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let mut rng = Rng::new(2);
    let base = rng.weights(Dtype::F32, 300_000);
    let ft = perturbed(&mut rng, Dtype::F32, &base, 0.03);
    let mut w = Writer::create(&path, options(Some(Codec::Xor), Prefer::Memory)).unwrap();
    let t = |bytes| Tensor { name: "w", dtype: "F32", dims: &[300, 1000], bytes };
    w.add(&t(&ft), Some(&t(&base))).unwrap();
    w.finish().unwrap();
    // A plain safetensors reader and a plain zstd decoder: nothing of the package is needed.
    let file = SafeTensors::open(&path).unwrap();
    let info = file.find("xorz:data").unwrap();
    assert_eq!((info.dtype.as_str(), info.dims.as_slice()), ("U8", [info.bytes() as usize].as_slice()));
    let xor = zstd::decode_all(file.read(info).unwrap().as_slice()).unwrap();
    assert_eq!(xor.len(), base.len());
    assert!(xor.iter().zip(&base).map(|(x, b)| x ^ b).eq(ft.iter().copied()));
    // The same frame as the notebook's: level 10.
    assert_eq!(file.read(info).unwrap(), zstd::bulk::compress(&xor, 10).unwrap());
}

/// A fine-tune with everything that a checkpoint may hold.
fn checkpoint(dir: &Path) -> (PathBuf, PathBuf) {
    let mut rng = Rng::new(3);
    let (b, f) = (dir.join("base.safetensors"), dir.join("ft.safetensors"));
    let w = rng.weights(Dtype::BF16, 96 * 520);
    let v = perturbed(&mut rng, Dtype::BF16, &w, 0.02);
    let head = rng.weights(Dtype::F32, 70 * 30);
    let mut t = |n: usize| rng.bytes(n);
    let same = t(77 * 2);
    let base = vec![
        ("layer.weight", "BF16", vec![96, 520], w),
        ("same", "F16", vec![77], same.clone()),
        ("retyped", "F32", vec![8, 8], t(256)),
        ("reshaped", "F32", vec![8, 8], t(256)),
        ("gone", "I64", vec![3], t(24)),
        ("scalar", "F32", vec![], t(4)),
        ("empty", "BF16", vec![0, 5], vec![]),
        ("experts", "F16", vec![3, 20, 10], t(1200)),
        ("mask", "BOOL", vec![9], vec![1, 0, 1, 1, 0, 0, 1, 1, 1]),
        ("steps", "I64", vec![1], t(8)),
        ("tiny4", "F4", vec![6, 3], t(9)),
        ("double", "F64", vec![5, 5], t(200)),
    ];
    let ft = vec![
        ("new.head", "F32", vec![70, 30], head),
        ("layer.weight", "BF16", vec![96, 520], v),
        ("zeros", "BF16", vec![1000, 1000], vec![0; 2_000_000]),
        ("same", "F16", vec![77], same),
        ("retyped", "BF16", vec![8, 8], t(128)),
        ("reshaped", "F32", vec![4, 16], t(256)),
        ("scalar", "F32", vec![], t(4)),
        ("empty", "BF16", vec![0, 5], vec![]),
        ("experts", "F16", vec![3, 20, 10], t(1200)),
        ("mask", "BOOL", vec![9], vec![1, 0, 0, 1, 0, 0, 1, 1, 1]),
        ("steps", "I64", vec![1], t(8)),
        ("tiny4", "F4", vec![6, 3], t(9)),
        ("scale8", "F8_E8M0", vec![4], t(4)),
        ("future", "F12_X", vec![7], t(11)),
        ("double", "F64", vec![5, 5], t(200)),
    ];
    safetensors(&b, "", &base, 0);
    safetensors(&f, "\"__metadata__\":{\"format\":\"pt\", \"n\u{f6}te\":\"a \\\"b\\\"\"}", &ft, 13);
    (b, f)
}

#[test]
fn a_packed_file_comes_back_as_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let (package, out) = (dir.path().join("p.xorz"), dir.path().join("out.safetensors"));
    for codec in CODECS {
        let report = pack_files(
            &base,
            &ft,
            Destination::Path(&package),
            &options(codec, Prefer::Memory),
            &Run::default(),
        )
        .unwrap();
        assert_eq!((report.tensors, report.removed, report.unchanged), (15, 1, 2), "{codec:?}");
        // new.head, zeros, retyped, reshaped, scale8, future
        assert_eq!(report.alone, 6, "{codec:?}");
        // `zeros` is most of the bytes; only whoever packs is told.
        assert!(report.advice.as_ref().is_some_and(|a| a.contains("`zeros`")), "{report:?}");
        let report = Report { advice: None, ..report };
        let again = unpack_files(&base, &package, Destination::Path(&out), &Run::default()).unwrap();
        assert_eq!(again, report);
        assert!(fs::read(&out).unwrap() == fs::read(&ft).unwrap(), "{codec:?}");
        assert_eq!(verify_files(&base, &package, Some(&ft), &Run::default()).unwrap(), report);
        let opened = Package::open(&package).unwrap();
        assert_eq!(opened.removed(), ["gone"]);
        assert_eq!(opened.entry("zeros").unwrap().codec, Codec::Alone);
        assert_eq!(opened.entry("new.head").unwrap().base, None);
        assert_eq!(opened.entry("scale8").unwrap().codec, Codec::Alone);
        assert!(opened.entry("tiny4").unwrap().codec.delta());
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "temporary files are left: {left:?}");
}

#[test]
fn packing_is_deterministic() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let (a, b) = (dir.path().join("a.xorz"), dir.path().join("b.xorz"));
    pack_files(&base, &ft, Destination::Path(&a), &PackOptions::default(), &Run::default()).unwrap();
    pack_files(&base, &ft, Destination::Path(&b), &PackOptions::default(), &Run::default()).unwrap();
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap());
}

#[test]
fn resident_deltas_lie_aligned_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let path = dir.path().join("p.xorz");
    pack_files(
        &base,
        &ft,
        Destination::Path(&path),
        &options(Some(Codec::Resident), Prefer::Speed),
        &Run::default(),
    )
    .unwrap();
    let file = SafeTensors::open(&path).unwrap();
    let package = Package::open(&path).unwrap();
    let (mut seen, mut at) = (0, 8 + file.header_text().len() as u64);
    // They are the first ones, so that each lies where those before it end.
    for e in package.entries().iter().take_while(|e| e.codec == Codec::Resident) {
        assert_eq!(at % 64, 0, "{}", e.name);
        let whole = fs::read(&path).unwrap();
        Resident::parse(&whole[at as usize..(at + e.stored_bytes) as usize]).unwrap();
        (seen, at) = (seen + 1, at + e.stored_bytes);
    }
    assert_eq!(seen, 9);
}

#[test]
fn another_base_is_refused_naming_the_tensor_and_both_digests() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let (package, out) = (dir.path().join("p.xorz"), dir.path().join("out"));
    pack_files(&base, &ft, Destination::Path(&package), &PackOptions::default(), &Run::default()).unwrap();
    let digest =
        Package::open(&package).unwrap().entry("double").unwrap().base.clone().unwrap().digest_text();
    let mut bytes = fs::read(&base).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let other = dir.path().join("other");
    fs::write(&other, bytes).unwrap();
    for result in [
        unpack_files(&other, &package, Destination::Path(&out), &Run::default()),
        verify_files(&other, &package, None, &Run::default()),
    ] {
        let e = result.unwrap_err();
        assert_eq!(e.kind(), Kind::Mismatch, "{e}");
        assert!(e.message().contains("`double`") && e.message().contains(&digest), "{e}");
        let found = e.message().split(|c: char| !c.is_ascii_hexdigit()).filter(|s| s.len() == digest.len());
        assert_eq!(found.collect::<std::collections::HashSet<_>>().len(), 2, "{e}");
    }
    assert!(!out.exists());
    // A base that lacks a tensor, or has it in another shape.
    let e = unpack_files(&ft, &package, Destination::Path(&out), &Run::default()).unwrap_err();
    assert_eq!(e.kind(), Kind::Mismatch, "{e}");
}

#[test]
fn verify_names_what_differs_from_the_fine_tune_given() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let package = dir.path().join("p.xorz");
    pack_files(&base, &ft, Destination::Path(&package), &PackOptions::default(), &Run::default()).unwrap();
    let original = fs::read(&ft).unwrap();
    let mut bytes = original.clone();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&ft, bytes).unwrap();
    let e = verify_files(&base, &package, Some(&ft), &Run::default()).unwrap_err();
    assert!(e.kind() == Kind::Mismatch && e.message().contains("`double`"), "{e}");
    // Same tensors, other header: only the sha256 tells.
    let at = original.windows(4).position(|w| w == b"\"pt\"").unwrap();
    let mut bytes = original;
    bytes[at + 1] = b'x';
    fs::write(&ft, bytes).unwrap();
    let e = verify_files(&base, &package, Some(&ft), &Run::default()).unwrap_err();
    assert!(e.kind() == Kind::Mismatch && e.message().contains("sha256"), "{e}");
    let e = verify_files(&base, &package, Some(&base), &Run::default()).unwrap_err();
    assert_eq!(e.kind(), Kind::Mismatch, "{e}");
}

#[test]
fn names_are_paired_without_a_prefix_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(5);
    let a = rng.weights(Dtype::F32, 900);
    let b = perturbed(&mut rng, Dtype::F32, &a, 0.1);
    let (base, ft) = (dir.path().join("base"), dir.path().join("ft"));
    let (package, out) = (dir.path().join("p.xorz"), dir.path().join("out"));
    for (base_name, ft_name) in [("bert.w", "w"), ("w", "bert.w")] {
        safetensors(&base, "", &[(base_name, "F32", vec![30, 30], a.clone())], 0);
        safetensors(&ft, "", &[(ft_name, "F32", vec![30, 30], b.clone())], 0);
        let report =
            pack_files(&base, &ft, Destination::Path(&package), &PackOptions::default(), &Run::default())
                .unwrap();
        assert_eq!((report.alone, report.removed), (1, 1));
        let options = PackOptions { strip_prefix: Some("bert.".into()), ..PackOptions::default() };
        let report = pack_files(&base, &ft, Destination::Path(&package), &options, &Run::default()).unwrap();
        assert_eq!((report.alone, report.removed), (0, 0));
        let entry = Package::open(&package).unwrap().entry(ft_name).unwrap().clone();
        assert_eq!(entry.base.unwrap().name, base_name);
        unpack_files(&base, &package, Destination::Path(&out), &Run::default()).unwrap();
        assert!(fs::read(&out).unwrap() == fs::read(&ft).unwrap());
    }
}

#[test]
fn a_package_of_tensors_in_memory_unpacks_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let (package, out) = (dir.path().join("p.xorz"), dir.path().join("out"));
    let (b, f) = (SafeTensors::open(&base).unwrap(), SafeTensors::open(&ft).unwrap());
    let mut w = Writer::create(&package, PackOptions::default()).unwrap();
    for t in &f.header().tensors {
        let bytes = f.read(t).unwrap();
        let base = b.find(&t.name).map(|i| (i, b.read(i).unwrap()));
        let base =
            base.as_ref().map(|(i, x)| Tensor { name: &i.name, dtype: &i.dtype, dims: &i.dims, bytes: x });
        w.add(&Tensor { name: &t.name, dtype: &t.dtype, dims: &t.dims, bytes: &bytes }, base.as_ref())
            .unwrap();
    }
    w.removed("gone");
    w.finish().unwrap();
    unpack_files(&base, &package, Destination::Path(&out), &Run::default()).unwrap();
    let o = SafeTensors::open(&out).unwrap();
    assert_eq!(o.header().tensors.len(), f.header().tensors.len());
    for t in &f.header().tensors {
        let u = o.find(&t.name).unwrap();
        assert_eq!((&u.dtype, &u.dims), (&t.dtype, &t.dims));
        assert!(o.read(u).unwrap() == f.read(t).unwrap(), "{}", t.name);
    }
    verify_files(&base, &package, Some(&ft), &Run::default()).unwrap();
}

#[test]
fn bad_tensors_are_refused_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let t = |name, bytes| Tensor { name, dtype: "F32", dims: &[2, 2], bytes };
    let mut w = Writer::create(&path, PackOptions::default()).unwrap();
    assert_eq!(w.add(&t("a", &[0; 15]), None).unwrap_err().kind(), Kind::InvalidArgument);
    assert_eq!(w.add(&t("xorz:a", &[0; 16]), None).unwrap_err().kind(), Kind::InvalidArgument);
    w.add(&t("a", &[0; 16]), None).unwrap();
    assert_eq!(w.add(&t("a", &[0; 16]), None).unwrap_err().kind(), Kind::InvalidArgument);
    drop(w);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(Writer::create(dir.path(), PackOptions::default()).unwrap_err().kind(), Kind::InvalidArgument);
    let missing = dir.path().join("no/p.xorz");
    assert_eq!(Writer::create(&missing, PackOptions::default()).unwrap_err().kind(), Kind::Io);
}

#[test]
fn an_output_never_overwrites_an_input() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let package = dir.path().join("p.xorz");
    pack_files(&base, &ft, Destination::Path(&package), &PackOptions::default(), &Run::default()).unwrap();
    for out in [&base, &ft] {
        let e = pack_files(&base, &ft, Destination::Path(out), &PackOptions::default(), &Run::default())
            .unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument, "{e}");
    }
    for out in [&base, &package] {
        assert_eq!(
            unpack_files(&base, &package, Destination::Path(out), &Run::default()).unwrap_err().kind(),
            Kind::InvalidArgument
        );
    }
    verify_files(&base, &package, Some(&ft), &Run::default()).unwrap();
}

#[test]
fn a_tensor_stored_alone_has_no_delta_but_restores() {
    let dir = tempfile::tempdir().unwrap();
    let (base, ft) = checkpoint(dir.path());
    let path = dir.path().join("p.xorz");
    let options = PackOptions { fast: true, ..PackOptions::default() };
    pack_files(&base, &ft, Destination::Path(&path), &options, &Run::default()).unwrap();
    let package = Package::open(&path).unwrap();
    let f = SafeTensors::open(&ft).unwrap();
    for name in ["new.head", "zeros", "future"] {
        let want = f.read(f.find(name).unwrap()).unwrap();
        let mut out = vec![1; want.len()];
        package.restore(name, None, &mut out).unwrap();
        assert!(out == want, "{name}");
        assert_eq!(package.restore(name, None, &mut out[1..]).unwrap_err().kind(), Kind::Mismatch);
        let m = matrix(Dtype::U8, Shape { n: 1, k: 1 }, &[0]);
        assert_eq!(package.resident(name, &m, None).unwrap_err().kind(), Kind::Unsupported);
    }
    assert_eq!(package.entry("layer.weight").unwrap().encoding, Some(Encoding::Exponent));
    let mut out = vec![0; 96 * 520 * 2];
    assert_eq!(package.restore("layer.weight", None, &mut out).unwrap_err().kind(), Kind::Mismatch);
    assert_eq!(package.restore("nothing", None, &mut out).unwrap_err().kind(), Kind::InvalidArgument);
}

#[test]
fn real_pairs_come_back_as_the_same_files() {
    let pairs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/pairs");
    let dir = std::env::var_os("XORZ_PAIRS").map_or(pairs, PathBuf::from);
    let Ok(list) = fs::read_dir(&dir) else {
        eprintln!("SKIPPED real_pairs_come_back_as_the_same_files: no {}", dir.display());
        return;
    };
    let tmp = tempfile::tempdir().unwrap();
    let (package, out) = (tmp.path().join("p.xorz"), tmp.path().join("out.safetensors"));
    let mut seen = 0;
    for ft in list.map(|e| e.unwrap().path()) {
        let name = ft.file_name().unwrap().to_string_lossy().into_owned();
        let Some((stem, _)) = name.split_once(".ft") else { continue };
        let base = dir.join(format!("{stem}.base.safetensors"));
        for prefer in [Prefer::Speed, Prefer::Memory] {
            pack_files(&base, &ft, Destination::Path(&package), &options(None, prefer), &Run::default())
                .unwrap();
            unpack_files(&base, &package, Destination::Path(&out), &Run::default()).unwrap();
            assert!(fs::read(&out).unwrap() == fs::read(&ft).unwrap(), "{name}");
        }
        seen += 1;
    }
    assert!(seen > 0, "no pairs in {}", dir.display());
}

/// A matrix of several pieces, whose predictor saw a sample only; some of the rest changes as nothing in the sample did. And
/// rows so long that pieces are runs of one row.
#[test]
fn large_matrices_come_back_from_predicted_tiles() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.xorz");
    let mut rng = Rng::new(91);
    for dims in [vec![1237, 1023], vec![1_400_001], vec![3, 450_001], vec![70, 300_000]] {
        let words: usize = dims.iter().product();
        let base = rng.weights(Dtype::BF16, words);
        let mut ft = perturbed(&mut rng, Dtype::BF16, &base, 0.004);
        ft[2 * words - 3000..].iter_mut().for_each(|b| *b ^= 0xA5);
        ft[..200].iter_mut().for_each(|b| *b = 0xFF);
        let mut w = Writer::create(&path, options(Some(Codec::Predicted), Prefer::Memory)).unwrap();
        let t = |bytes| Tensor { name: "w", dtype: "BF16", dims: &dims, bytes };
        w.add(&t(&ft), Some(&t(&base))).unwrap();
        w.finish().unwrap();
        let package = Package::open(&path).unwrap();
        assert_eq!(package.entries()[0].codec, Codec::Predicted, "{dims:?}");
        let shape = Shape::of_dims(&dims).unwrap();
        let base = Matrix::new(Dtype::BF16, shape, &base).unwrap();
        let mut out = vec![0; ft.len()];
        package.restore("w", Some(&base), &mut out).unwrap();
        assert!(out == ft, "{dims:?}");
        // The stored bytes of a base that is another one are refused, not decoded.
        let other = Matrix::new(Dtype::BF16, shape, &ft).unwrap();
        assert_eq!(package.restore("w", Some(&other), &mut out).unwrap_err().kind(), Kind::Mismatch);
    }
}
