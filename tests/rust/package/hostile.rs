//! Promise: whatever the bytes of a package, reading it gives an error or the right answer; it never panics or hangs, and
//! never allocates more than a small multiple of the bytes given (package and base).

use crate::common::counting::held_by;
use crate::common::data::{Rng, matrix, perturbed};
use crate::common::forge::{Forge, framed, hex};
use std::collections::BTreeMap;
use std::fs;
use xorz::codec::Prefer;
use xorz::error::Kind;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{
    Codec, Destination, PackOptions, Package, Run, SafeTensors, Tensor, Writer, unpack_files, verify_files,
};
use xorz::resident::{Resident, restore};

/// The most bytes that `f` held at once.
fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let (result, held) = held_by(f);
    (result, held.most)
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A base, a fine-tune, and their package by one codec. Small enough to flip every byte.
fn small(codec: Option<Codec>) -> (Tensors, Tensors, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut rng = Rng::new(9);
    let (mut base, mut ft) = (Tensors::new(), Tensors::new());
    for (name, dtype, dims, share) in [
        ("a", Dtype::BF16, vec![18, 20], 0.1),
        ("b", Dtype::F32, vec![40], 1.0),
        ("c", Dtype::I64, vec![2, 3, 4], 0.3),
        ("d", Dtype::F16, vec![5, 5], 0.0),
    ] {
        let words = dims.iter().product();
        let b = rng.weights(dtype, words);
        let f = perturbed(&mut rng, dtype, &b, share);
        base.insert(name.into(), (dtype, dims.clone(), b));
        ft.insert(name.into(), (dtype, dims, f));
    }
    ft.insert("new".into(), (Dtype::U8, vec![300], vec![7; 300]));
    ft.insert("odd".into(), (Dtype::U8, vec![30], rng.bytes(30)));
    let options = PackOptions { codec, prefer: Prefer::Speed, ..PackOptions::default() };
    let mut w = Writer::create(&path, options).unwrap();
    for (name, (dtype, dims, bytes)) in &ft {
        let tensor = |bytes| Tensor { name, dtype: dtype.name(), dims, bytes };
        w.add(&tensor(bytes), base.get(name).map(|b| tensor(&b.2)).as_ref()).unwrap();
    }
    w.removed("gone");
    w.finish().unwrap();
    (base, ft, fs::read(&path).unwrap())
}

const CODECS: [Option<Codec>; 6] = [
    None,
    Some(Codec::Xor),
    Some(Codec::Resident),
    Some(Codec::ResidentZstd),
    Some(Codec::Planes),
    Some(Codec::Predicted),
];

/// Use everything in a package, or all of one tensor. Whatever is answered is handed to `answer(name, bytes)`; errors are fine.
fn walk(package: &Package, base: &Tensors, only: Option<&str>, mut answer: impl FnMut(&str, &[u8])) {
    for e in package.entries().iter().filter(|e| only.is_none_or(|only| only == e.name)) {
        let m = base.get(&e.name).map(|(d, dims, b)| matrix(*d, Shape::of_dims(dims).unwrap(), b));
        // A caller allocates what it knows; never what a package says alone.
        let len = m.map_or(300, |m| m.bytes().len()).max(usize::try_from(e.bytes.min(1000)).unwrap());
        let mut out = vec![0; len.min(usize::try_from(e.bytes).unwrap_or(0))];
        if package.restore(&e.name, m.as_ref(), &mut out).is_ok() {
            answer(&e.name, &out);
        }
        let Some(m) = m else { continue };
        let mut parts = 0;
        let _ = package.exchanges(&e.name, &m, &mut |range, _, _| {
            parts += 1;
            assert!(parts < 3 && m.bytes().get(range).is_some());
            Ok(())
        });
        for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
            if let Ok(bytes) = package.resident(&e.name, &m, prefer) {
                let mut out = vec![0; m.bytes().len()];
                if restore(&Resident::parse(&bytes).unwrap(), &m, &mut out).is_ok() {
                    answer(&e.name, &out);
                }
            }
        }
    }
}

/// What of a package is not tensor bytes.
fn described(p: &Package) -> String {
    let entries: Vec<_> = p
        .entries()
        .iter()
        .map(|e| {
            format!(
                "{} {} {:?} {} {:?} {:?} {:?}",
                e.name, e.dtype, e.dims, e.bytes, e.codec, e.base, e.changed
            )
        })
        .collect();
    format!("{entries:?} {:?} {:?}", p.removed(), p.files())
}

/// The bound on what reading may allocate: the bytes given, and fixed scratch.
fn allowed(package: usize, base: &Tensors) -> usize {
    let base: usize = base.values().map(|b| b.2.len()).sum();
    32 * package + 16 * base + (256 << 10)
}

#[test]
fn every_flipped_byte_is_an_error_or_the_right_answer() {
    for codec in CODECS {
        let (base, ft, good) = small(codec);
        let want = described(&Package::parse(good.clone()).unwrap());
        let file = SafeTensors::from_bytes(good.clone()).unwrap();
        let data = good.len() as u64 - file.header().data_bytes();
        let stored = Package::parse(good.clone()).unwrap();
        let owners: Vec<&str> = (stored.entries().iter())
            .flat_map(|e| std::iter::repeat_n(e.name.as_str(), e.stored_bytes as usize))
            .collect();
        let (mut parsed, mut most) = (0, 0);
        for i in 0..good.len() {
            // A byte of the data touches one tensor; a byte of the header may touch all.
            let at = i.checked_sub(data as usize);
            // A byte of a joint frame touches all that are in it.
            let hit = at
                .and_then(|at| owners.get(at))
                .filter(|name| stored.entry(name).unwrap().codec != Codec::Joint);
            for pattern in [0x01, 0x10, 0x80, 0xFF] {
                let mut bad = good.clone();
                bad[i] ^= pattern;
                let ((), bytes) = peak(|| {
                    let Ok(package) = Package::parse(bad) else { return };
                    parsed += 1;
                    assert_eq!(described(&package), want, "{codec:?} byte {i} ^ {pattern:#x}");
                    walk(&package, &base, hit.copied(), |name, got| {
                        assert!(
                            got == ft[name].2,
                            "{codec:?} byte {i} ^ {pattern:#x}: tensor {name} is wrong"
                        );
                    });
                });
                most = most.max(bytes);
            }
        }
        eprintln!("{codec:?}: {} bytes, at most {most} allocated, {parsed} flips parsed", good.len());
        assert!(parsed > good.len() / 4, "the flips never got past the header");
        assert!(
            most <= allowed(good.len(), &base),
            "{codec:?}: {most} bytes for a package of {}",
            good.len()
        );
    }
}

#[test]
fn every_cut_and_every_longer_package_is_refused() {
    for codec in CODECS {
        let (base, _, good) = small(codec);
        for n in 0..good.len() {
            let (result, bytes) = peak(|| Package::parse(good[..n].to_vec()).map(|_| ()));
            let e = result.unwrap_err();
            assert!(matches!(e.kind(), Kind::Truncated | Kind::Corrupt), "{n}: {e}");
            assert!(bytes <= allowed(n, &base));
        }
        let longer = [good.as_slice(), &[0]].concat();
        assert_eq!(Package::parse(longer).unwrap_err().kind(), Kind::Corrupt);
    }
}

/// Flips behind digests that were made right again: the answer may be any, but it is an answer or an error.
#[test]
fn forged_blobs_never_panic_or_allocate_much() {
    let (mut answers, mut most, mut package_bytes) = (0, 0, 0);
    for codec in CODECS {
        let (base, _, good) = small(codec);
        let forge = Forge::of(&good);
        assert_eq!(
            described(&Package::parse(forge.build()).unwrap()),
            described(&Package::parse(good).unwrap())
        );
        for which in 0..forge.entries.len() {
            for i in 0..forge.entries[which].1.len() {
                for pattern in [0x01, 0x40, 0xFF] {
                    let mut forge = forge.clone();
                    forge.entries[which].1[i] ^= pattern;
                    let name = forge.entries[which].0.clone();
                    let bad = forge.build();
                    package_bytes = package_bytes.max(bad.len());
                    let package = Package::parse(bad).unwrap();
                    let ((), bytes) = peak(|| walk(&package, &base, Some(&name), |_, _| answers += 1));
                    most = most.max(bytes);
                    assert!(bytes <= allowed(package_bytes, &base), "{codec:?} {which} {i}: {bytes} bytes");
                }
            }
        }
    }
    assert!(answers > 5_000, "only {answers}: the forgeries never got past the checks");
    eprintln!("forged blobs: at most {most} bytes allocated for packages of up to {package_bytes}");
}

#[test]
fn forged_records_never_panic_or_allocate_much() {
    for codec in CODECS {
        let (base, ft, good) = small(codec);
        let forge = Forge::of(&good);
        for name in ft.keys() {
            let key = format!("xorz:tensor:{name}");
            let record: serde_json::Value = serde_json::from_str(&forge.metadata[&key]).unwrap();
            let fields: Vec<String> = record.as_object().unwrap().keys().cloned().collect();
            for field in fields.iter().map(String::as_str).chain(["extra", "base", "changed"]) {
                for value in [
                    serde_json::json!(null),
                    serde_json::json!(0),
                    serde_json::json!(u64::MAX),
                    serde_json::json!("F64"),
                    serde_json::json!("planes"),
                    serde_json::json!("xor"),
                    serde_json::json!("alone"),
                    serde_json::json!("same"),
                    serde_json::json!("resident-zstd"),
                    serde_json::json!("0123456789abcdef0123456789abcdef"),
                    serde_json::json!([1u64 << 62, 4]),
                    serde_json::json!([1u64 << 31, 1u64 << 31]),
                    serde_json::json!([0, 1u64 << 40]),
                    serde_json::json!({"a": []}),
                ] {
                    let mut forge = forge.clone();
                    let mut record = record.clone();
                    record[field] = value.clone();
                    forge.metadata.insert(key.clone(), record.to_string());
                    // What no table can say, a package of version 1 can.
                    let bad = forge.try_build().unwrap_or_else(|| {
                        forge.metadata.insert("format_version".into(), "1".into());
                        forge.build()
                    });
                    let n = bad.len();
                    let (wrong, bytes) = peak(|| {
                        let mut wrong = None;
                        if let Ok(p) = Package::parse(bad) {
                            walk(&p, &base, Some(name), |t, got| {
                                if got != ft[t].2 {
                                    wrong = Some(t.to_string());
                                }
                            });
                        }
                        wrong
                    });
                    assert!(bytes <= allowed(n, &base), "{codec:?} {name} {field} {value}: {bytes} bytes");
                    // A tensor may be claimed shorter or its bytes called something else; a delta is never wrong.
                    let fine = wrong.is_none_or(|t| !base.contains_key(&t));
                    assert!(fine, "{codec:?} {name} {field} {value}");
                }
            }
        }
    }
}

fn delta_record(codec: &str, dtype: &str, shape: &str, bytes: u64, base: &Matrix<'_>, more: &str) -> String {
    format!(
        r#"{{"dtype":"{dtype}","shape":{shape},"bytes":{bytes},"codec":"{codec}","check":"",
            "base":"{}","prefer":"memory","changed":0{more}}}"#,
        base.digest()
    )
}

#[test]
fn zstd_bombs_are_refused_before_they_unpack() {
    let base = vec![0u8; 4096];
    let m = matrix(Dtype::U8, Shape { n: 64, k: 64 }, &base);
    let bomb = zstd::bulk::compress(&vec![0u8; 256 << 20], 3).unwrap();
    let four = zstd::bulk::compress(&vec![0u8; 4 << 20], 3).unwrap();
    let many = framed(&vec![(four.clone(), 4 << 20); 64]);
    let lying = framed(&[(four.clone(), 4096)]);
    let over = framed(&[(bomb.clone(), 256 << 20)]);
    let cases: [(&str, &str, Vec<u8>); 7] = [
        ("resident-zstd", r#","encoding":"raw""#, many.clone()),
        ("resident-zstd", r#","encoding":"raw""#, lying.clone()),
        ("resident-zstd", r#","encoding":"raw""#, over.clone()),
        ("planes", "", many),
        ("planes", "", lying),
        ("planes", "", over),
        ("xor", "", bomb.clone()),
    ];
    for (codec, more, blob) in cases {
        let record = delta_record(codec, "U8", "[64, 64]", 4096, &m, more);
        let bad = Forge::new().tensor("w", &record, blob).build();
        let n = bad.len();
        let package = Package::parse(bad).unwrap();
        let mut out = vec![0; 4096];
        let (results, bytes) =
            peak(|| (package.resident("w", &m, None).map(|_| ()), package.restore("w", Some(&m), &mut out)));
        assert_eq!(results.0.unwrap_err().kind(), Kind::Corrupt, "{codec}");
        assert_eq!(results.1.unwrap_err().kind(), Kind::Corrupt, "{codec}");
        assert!(bytes <= 4 * n + (1 << 20), "{codec}: {bytes} bytes for {n}");
    }
    // Stored alone: the caller's buffer is the bound, and a frame of another size is not unpacked at all.
    for bytes in [1u64 << 40, 1 << 28, 4096] {
        let record =
            format!(r#"{{"dtype":"U8","shape":[{bytes}],"bytes":{bytes},"codec":"alone","check":""}}"#);
        let blob = framed(&[(bomb.clone(), 256 << 20)]);
        let package = Package::parse(Forge::new().tensor("w", &record, blob).build()).unwrap();
        let mut out = vec![0; 4096];
        let (result, held) = peak(|| package.restore("w", None, &mut out));
        result.unwrap_err();
        assert!(held < 2 * bomb.len() + (1 << 20));
    }
}

#[test]
fn a_shape_that_no_base_has_is_refused_before_anything_is_allocated() {
    let base = [0u8; 64];
    let m = matrix(Dtype::U8, Shape { n: 8, k: 8 }, &base);
    let record = delta_record("planes", "U8", "[1048576, 1048576]", 1 << 40, &m, "");
    let package = Package::parse(Forge::new().tensor("w", &record, framed(&[])).build()).unwrap();
    let (result, bytes) = peak(|| package.resident("w", &m, None));
    assert_eq!(result.unwrap_err().kind(), Kind::Mismatch);
    assert!(bytes < 1 << 16);
}

#[test]
fn loading_a_delta_makes_no_dense_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut rng = Rng::new(4);
    // 32 MiB of bf16, 1 % changed.
    let dims = [4096, 4096];
    let shape = Shape { n: 4096, k: 4096 };
    let base = rng.bytes(32 << 20);
    let ft = rng.bytes(32 << 20);
    let ft = {
        let mut mixed = base.clone();
        for (i, w) in mixed.chunks_mut(2).enumerate() {
            if rng.next().is_multiple_of(100) {
                w.copy_from_slice(&ft[2 * i..2 * i + 2]);
            }
        }
        mixed
    };
    let m = matrix(Dtype::BF16, shape, &base);
    for codec in CODECS {
        let mut w = Writer::create(&path, PackOptions { codec, ..PackOptions::default() }).unwrap();
        let t = |bytes| Tensor { name: "w", dtype: "BF16", dims: &dims, bytes };
        w.add(&t(&ft), Some(&t(&base))).unwrap();
        w.finish().unwrap();
        let package = Package::open(&path).unwrap();
        let stored = package.entry("w").unwrap().stored_bytes as usize;
        for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
            let (resident, bytes) = peak(|| package.resident("w", &m, prefer).unwrap());
            // The stored bytes, what is returned (twice while it grows or is encoded again), and scratch.
            let bound = stored + 2 * resident.len() + (8 << 20);
            let used = peak_report(&resident, bytes, stored);
            assert!(bytes <= bound, "{codec:?} {prefer:?}: {used}, bound {bound}");
            assert!(bytes < base.len() / 2 + resident.len(), "{codec:?} {prefer:?}: {used}");
        }
    }
}

fn peak_report(resident: &[u8], bytes: usize, stored: usize) -> String {
    format!("{bytes} bytes held for a resident delta of {} from {stored} stored", resident.len())
}

#[test]
fn bad_containers_are_refused_with_a_reason() {
    let file = |header: &str, data: usize| {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.extend(vec![0; data]);
        out
    };
    let t = |rest: &str| format!(r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}{rest}}}"#);
    SafeTensors::from_bytes(file(&t(""), 4)).unwrap();
    for (bytes, reason) in [
        (vec![], "too few"),
        (vec![1, 0, 0], "too few"),
        (u64::MAX.to_le_bytes().to_vec(), "announces a header"),
        (b"PK\x03\x04abcdefgh".to_vec(), "pickled"),
        (100u64.to_le_bytes().to_vec(), "only 0 follow"),
        (file("", 0), "begin with"),
        (file("[]", 0), "begin with"),
        (file(" {}", 0), "begin with"),
        (file("{", 0), "not valid"),
        (file("{}x", 0), "not valid"),
        (file("{\"\u{1}\":1}", 0), "not valid"),
        (file(&t(""), 3), "only 3 follow"),
        (file(&t(""), 5), "follow the last tensor"),
        (file(&t(r#","a":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}"#), 4), "duplicate"),
        (file(&t(r#","b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}"#), 4), "before it end at 4"),
        (file(&t(r#","b":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}"#), 6), "before it end at 4"),
        (file(&t(r#","b":{"dtype":"U8","shape":[1],"data_offsets":[4,3]}"#), 4), "4..3"),
        (file(&t(r#","b":{"dtype":"F32","shape":[1],"data_offsets":[4,7]}"#), 7), "takes 4 bytes"),
        (
            file(&t(r#","b":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[4,4]}"#), 4),
            "takes 73786976294838206464 bytes",
        ),
        (file(&t(r#","b":{"dtype":"F32","shape":[-1],"data_offsets":[4,4]}"#), 4), "not valid"),
        (file(&t(r#","b":{"dtype":"F32","shape":[1.5],"data_offsets":[4,4]}"#), 4), "not valid"),
        (file(&t(r#","b":{"dtype":"F32","shape":[0]}"#), 4), "data_offsets"),
        (file(&t(r#","__metadata__":{"a":1}"#), 4), "not valid"),
        (file(&t(r#","__metadata__":{"a":"1","a":"2"}"#), 4), "duplicate"),
        (file(&t(r#","__metadata__":{},"__metadata__":{}"#), 4), "duplicate"),
        (file(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), "not valid"),
    ] {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        let e = SafeTensors::from_bytes(bytes).unwrap_err();
        assert!(e.message().contains(reason), "{shown}: {e}");
        assert!(matches!(e.kind(), Kind::Corrupt | Kind::Truncated), "{shown}: {e}");
    }
}

#[test]
fn bad_packages_are_refused_with_a_reason() {
    let record = r#"{"dtype":"U8","shape":[4],"bytes":4,"codec":"alone","check":""}"#;
    let good = Forge::version1().tensor("w", record, vec![0; 4]);
    Package::parse(good.build()).unwrap();
    let with = |key: &str, value: &str| {
        let mut forge = good.clone();
        forge.metadata.insert(key.into(), value.into());
        forge
    };
    let without = |key: &str| {
        let mut forge = good.clone();
        forge.metadata.remove(key);
        forge
    };
    let file = r#"{"path":"a","sha256":"","bytes":9,"header_bytes":1,"check":""}"#;
    let later = |codec: &str| {
        let digest = "0".repeat(32);
        let more = format!(r#""{codec}","base":"{digest}","prefer":"memory","changed":0"#);
        with("xorz:tensor:w", &record.replace("\"alone\"", &more))
    };
    for (forge, reason) in [
        (with("format", "pt"), "not a xorz package"),
        (without("format"), "not a xorz package"),
        (with("format_version", "0"), "version 0"),
        (with("format_version", "3"), "version 3"),
        (with("format_version", "02"), "version 02"),
        (without("format_version"), "version none"),
        (without("xorz:tensor:w"), "is missing"),
        (with("xorz:tensor:v", record), "does not know"),
        (with("unknown", ""), "does not know"),
        (with("xorz:removed", "[1]"), "xorz:removed"),
        (with("xorz:removed", "{"), "xorz:removed"),
        (with("xorz:files", &format!("[{file}]")), "does not know"),
        (with("xorz:files", &format!("[{file},{file}]")), "is there twice"),
        (with("xorz:files", &format!("[{file},{}]", file.replace("\"a\"", "\"b\""))), "2 are listed"),
        (with("xorz:source", "disk"), "`disk`"),
        (with("xorz:tensor:w", &record.replace("alone", "lzma")), "`lzma` is unknown"),
        (with("xorz:tensor:w", &record.replace("\"bytes\":4", "\"bytes\":5")), "does not take 5 bytes"),
        (with("xorz:tensor:w", &record.replace("\"alone\"", "\"planes\"")), "lacks the field"),
        (with("xorz:tensor:w", &record.replace('}', ",\"changed\":1}")), "has a field `changed`"),
        (good.clone().tensor("xorz:file:0", "", vec![]), "does not know"),
        (later("predicted"), "codec `predicted`, which packages of version 1 do not have"),
        (later("joint"), "codec `joint`, which packages of version 1 do not have"),
        (later("unchanged"), "codec `unchanged`, which packages of version 1 do not have"),
    ] {
        let e = Package::parse(forge.build()).unwrap_err();
        assert!(e.message().contains(reason), "{reason}: {e}");
    }
    let mut bytes = good.build();
    let at = bytes.windows(4).position(|w| w == b"xorz").unwrap();
    bytes[at] ^= 0x20;
    assert_eq!(Package::parse(bytes).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn damaged_files_never_unpack_to_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut rng = Rng::new(8);
    let (a, mut b) = (rng.weights(Dtype::BF16, 200), rng.bytes(50));
    let header = |shape: usize| {
        let text = format!(
            r#"{{"w":{{"dtype":"BF16","shape":[200],"data_offsets":[0,400]}},
                "v":{{"dtype":"U8","shape":[{shape}],"data_offsets":[400,{}]}}}}  "#,
            400 + shape
        );
        [(text.len() as u64).to_le_bytes().to_vec(), text.into_bytes()].concat()
    };
    fs::write(path("base"), [header(50), a.clone(), b.clone()].concat()).unwrap();
    b.extend([1, 2, 3]);
    let ft = [header(53), perturbed(&mut rng, Dtype::BF16, &a, 0.5), b].concat();
    fs::write(path("ft"), &ft).unwrap();
    xorz::package::pack_files(
        &path("base"),
        &path("ft"),
        Destination::Path(&path("p")),
        &PackOptions::default(),
        &Run::default(),
    )
    .unwrap();
    let good = fs::read(path("p")).unwrap();
    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 1 << (i % 8);
        fs::write(path("bad"), bad).unwrap();
        match unpack_files(&path("base"), &path("bad"), Destination::Path(&path("out")), &Run::default()) {
            Ok(_) => {
                assert!(fs::read(path("out")).unwrap() == ft, "byte {i}");
                fs::remove_file(path("out")).unwrap();
            }
            Err(_) => assert!(!path("out").exists(), "byte {i}: an error, and yet a file"),
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "temporary files are left");
    // A source header that describes another file, behind right digests.
    let forge = Forge::of(&good);
    for (from, to) in [("[200]", "[100]"), ("BF16", "F16 "), ("\"v\"", "\"x\""), ("[0,400]", "[0,300]")] {
        let mut forge = forge.clone();
        let entry = forge.entries.iter_mut().find(|e| e.0 == "xorz:file:0").unwrap();
        let text = String::from_utf8(zstd::decode_all(entry.1.as_slice()).unwrap()).unwrap();
        let text = text.replacen(from, to, 1);
        entry.1 = zstd::bulk::compress(text.as_bytes(), 3).unwrap();
        let check = hex(&entry.1);
        let mut files: serde_json::Value = serde_json::from_str(&forge.metadata["xorz:files"]).unwrap();
        files[0]["check"] = check.into();
        files[0]["header_bytes"] = text.len().into();
        forge.metadata.insert("xorz:files".into(), files.to_string());
        fs::write(path("bad"), forge.build()).unwrap();
        let e = verify_files(&path("base"), &path("bad"), None, &Run::default()).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt, "{from} -> {to}: {e}");
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_open_is_an_error() {
    let (base, _, good) = small(Some(Codec::Resident));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    fs::write(&path, &good).unwrap();
    let package = Package::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(300).unwrap();
    let (dtype, dims, bytes) = &base["a"];
    let m = matrix(*dtype, Shape::of_dims(dims).unwrap(), bytes);
    assert_eq!(package.resident("a", &m, None).unwrap_err().kind(), Kind::Truncated);
}
