//! Promise: what is small takes little: a few bytes that announce much are refused at once, in words that name the tensor, with
//! little memory; and what is refused for being too much is refused before the work is done.

use crate::common::counting::held_by;
use crate::common::disk::{Tensor, complaint, done, safetensors, xorz};
use crate::common::forge::{Forge, hex};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use xorz::matrix::Shape;
use xorz::package::{
    DigestCache, PackOptions, Package, Run, Tensor as Given, Writer, digest_files, verify_files,
};

/// A safetensors file of tensors without words.
fn hollow(path: &Path, dims: &[usize]) {
    let tensor: Tensor = ("hollow.weight".into(), "F32", dims.to_vec(), Vec::new());
    fs::write(path, safetensors(&[tensor])).unwrap();
}

#[test]
fn tensors_without_words_and_of_very_many_rows_are_refused_at_once_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for dims in [[1 << 44, 0], [0, 1 << 44], [1 << 62, 0], [1 << 25, 0]] {
        hollow(&d.join("m"), &dims);
        assert!(fs::metadata(d.join("m")).unwrap().len() < 200);
        let start = Instant::now();
        let (refused, held) =
            held_by(|| digest_files(&d.join("m"), &DigestCache::off(), &Run { jobs: 1, ..Run::default() }));
        let e = refused.unwrap_err();
        let shape = Shape { n: dims[0], k: dims[1] }.to_string();
        assert!(e.message().contains("hollow.weight") && e.message().contains(&shape), "{e}");
        assert!(held.most < 1 << 20, "{} bytes held", held.most);
        for args in [&["pack", "m", "m", "-o", "q"][..], &["digest", "m"], &["estimate", "m", "m"]] {
            let text = complaint(&xorz(d, args));
            assert!(text.contains("hollow.weight") && text.contains(&shape), "{args:?}: {text}");
        }
        let options = PackOptions::default();
        let mut writer = Writer::create(&d.join("w"), options).unwrap();
        let given = Given { name: "hollow.weight", dtype: "F32", dims: &dims, bytes: &[] };
        let e = writer.add(&given, Some(&given)).unwrap_err();
        assert!(e.message().contains("hollow.weight") && e.message().contains(&shape), "{e}");

        // A package that says so of its tensor: no base has it, and nothing is made for it.
        for record in [
            format!(r#"{{"dtype":"F32","shape":{dims:?},"bytes":0,"codec":"alone"}}"#),
            format!(
                r#"{{"dtype":"F32","shape":{dims:?},"bytes":0,"codec":"xor","base":"{}","changed":0}}"#,
                "0".repeat(32)
            ),
        ] {
            fs::write(d.join("p"), Forge::new().tensor("hollow.weight", &record, Vec::new()).build())
                .unwrap();
            hollow(&d.join("base"), &[3, 0]);
            let run = Run { jobs: 1, ..Run::default() };
            let (verified, held) = held_by(|| verify_files(&d.join("base"), &d.join("p"), None, &run));
            verified.unwrap_err();
            assert!(held.most < 1 << 20, "{record}: {} bytes held", held.most);
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{dims:?}: {:?}", start.elapsed());
    }
    // Empty tensors as checkpoints have them stay what they are.
    for dims in [[0, 7], [130, 0], [0, 0]] {
        hollow(&d.join("m"), &dims);
        done(d, &["pack", "m", "m", "-o", "q"]);
        done(d, &["unpack", "m", "q", "-o", "out"]);
        assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("m")).unwrap());
    }
}

/// A checkpoint of one small tensor, its header's text followed by so many spaces.
fn padded(spaces: usize) -> Vec<u8> {
    let text = format!(r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}{}"#, " ".repeat(spaces));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), b"abcd"].concat()
}

#[test]
fn a_header_that_a_few_bytes_announce_takes_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    fs::write(d.join("base"), padded(0)).unwrap();
    fs::write(d.join("ft"), padded(0)).unwrap();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    // The same package, but that its source's header had a hundred million spaces: 9 KB of zstd.
    let text = &padded(99_900_000)[8..99_900_000 + 50];
    let frame = zstd::bulk::compress(text, 19).unwrap();
    let mut forge = Forge::of(&fs::read(d.join("p")).unwrap());
    let mut files: serde_json::Value = serde_json::from_str(&forge.metadata["xorz:files"]).unwrap();
    files[0]["header_bytes"] = text.len().into();
    files[0]["bytes"] = (text.len() + 12).into();
    files[0]["check"] = hex(&frame).into();
    forge.metadata.insert("xorz:files".into(), files.to_string());
    let entry = forge.entries.iter_mut().find(|(name, _)| name.starts_with("xorz:file")).unwrap();
    entry.1 = frame;
    let package = forge.build();
    assert!(package.len() < 20_000, "{}", package.len());
    fs::write(d.join("p"), &package).unwrap();
    let run = Run { jobs: 1, ..Run::default() };
    let (verified, held) = held_by(|| verify_files(&d.join("base"), &d.join("p"), None, &run));
    let e = verified.unwrap_err();
    assert!(e.message().contains("announced"), "{e}");
    assert!(held.most < 8 << 20, "{} bytes held for a package of {}", held.most, package.len());
    assert!(!xorz(d, &["unpack", "base", "p", "-o", "out"]).status.success() && !d.join("out").exists());

    // A header that truly has so many is packed so that it can be unpacked.
    for spaces in [1 << 20, 5 << 20] {
        let ft = padded(spaces);
        fs::write(d.join("ft"), &ft).unwrap();
        done(d, &["pack", "base", "ft", "-o", "p"]);
        done(d, &["unpack", "base", "p", "-o", "out"]);
        assert!(fs::read(d.join("out")).unwrap() == ft);
    }
}

#[test]
fn very_many_tensors_take_little_beside_their_data_and_open_at_once() {
    const COUNT: usize = 100_000;
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let side = |ft: bool| -> Vec<Tensor> {
        let one = |i: usize| {
            let changed = u8::from(ft && i.is_multiple_of(3));
            let bytes = (0..16).map(|b| (i * 7 + b * 31) as u8 ^ (changed << (b % 5))).collect();
            (format!("model.layers.{}.experts.{}.gate", i / 1000, i % 1000), "BF16", vec![8], bytes)
        };
        (0..COUNT).map(one).collect()
    };
    let (base, ft) = (side(false), side(true));
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    fs::write(d.join("ft"), safetensors(&ft)).unwrap();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    let start = Instant::now();
    let (opened, held) = held_by(|| Package::open(&d.join("p")).unwrap());
    let took = start.elapsed();
    assert_eq!(opened.entries().len(), COUNT);
    let data: u64 = opened.entries().iter().map(|e| e.stored_bytes).sum();
    let each = (opened.file_bytes() - data) as f64 / COUNT as f64;
    println!("{each} bytes for each tensor beside its data; opened in {took:?}, {} bytes held", held.most);
    assert!(each < 60.0, "{each} bytes for each tensor beside its data");
    assert!(held.most < 1000 * COUNT, "{} bytes held", held.most);
    // What is read of all names is read once, whatever their number: a name that is there twice is noticed all the same.
    assert_eq!(opened.entry("model.layers.99.experts.999.gate").unwrap().changed, Some(8));
    done(d, &["unpack", "base", "p", "-o", "out"]);
    assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("ft")).unwrap());
}

#[test]
fn tensors_from_memory_take_the_same_time_whatever_their_number() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut writer = Writer::create(&d.join("w"), PackOptions::default()).unwrap().jobs(1);
    let start = Instant::now();
    for i in 0..40_000 {
        let name = format!("{i}");
        writer.add(&Given { name: &name, dtype: "U8", dims: &[1], bytes: &[1] }, None).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let e = writer.add(&Given { name: "7", dtype: "U8", dims: &[1], bytes: &[1] }, None).unwrap_err();
    assert!(e.message().contains("twice"), "{e}");
    writer.finish().unwrap();
    assert_eq!(Package::open(&d.join("w")).unwrap().entries().len(), 40_000);
}

#[test]
fn names_and_dimensions_that_no_package_holds_are_refused_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let long = "n".repeat(4097);
    for (name, dims, words) in [
        (long.as_str(), vec![4], ["4097", "4096"]),
        ("many.dimensions", vec![1; 65], ["65 dimensions", "64"]),
    ] {
        let count = dims.iter().product();
        fs::write(d.join("m"), safetensors(&[(name.into(), "U8", dims.clone(), vec![1; count])])).unwrap();
        let text = complaint(&xorz(d, &["pack", "m", "m", "-o", "q"]));
        assert!(words.iter().all(|w| text.contains(w)) && text.contains(&name[..9]), "{text}");
        assert!(!d.join("q").exists());
        let mut writer = Writer::create(&d.join("w"), PackOptions::default()).unwrap();
        let bytes = vec![1; count];
        let e = writer.add(&Given { name, dtype: "U8", dims: &dims, bytes: &bytes }, None).unwrap_err();
        assert!(words.iter().all(|w| e.message().contains(w)), "{e}");
    }
    // The longest that is held comes back.
    let name = "n".repeat(4096);
    let dims: Vec<usize> = vec![1; 64];
    fs::write(d.join("m"), safetensors(&[(name, "U8", dims, vec![1])])).unwrap();
    done(d, &["pack", "m", "m", "-o", "q"]);
    done(d, &["unpack", "m", "q", "-o", "out"]);
    assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("m")).unwrap());
}
