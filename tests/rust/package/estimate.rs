//! Promise: `xorz estimate` tells the bytes that resident deltas and packages really take, for every dtype,
//! encoding and layout, by any number of threads; it says when separate copies are better, and writes
//! nothing.

use crate::common::data::{Rng, matrix, perturbed, stepped};
use crate::common::disk::{Tensor, done, names, refused, safetensors, xorz};
use serde_json::Value;
use std::fs;
use std::path::Path;
use xorz::codec::Prefer;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Pair, Resident, encode_pair, estimate as sample, estimate_exactly as exactly};

/// Base and fine-tune: every encoding and dtype, odd shapes, a matrix whose sample misleads, a tied head, one
/// new tensor and one of another dtype.
fn pair() -> (Vec<Tensor>, Vec<Tensor>) {
    let mut rng = Rng::new(77);
    let (mut base, mut ft): (Vec<Tensor>, Vec<Tensor>) = (vec![], vec![]);
    let mut add = |name: &str, dtype: Dtype, dims: &[usize], b: Vec<u8>, f: Vec<u8>| {
        base.push((name.into(), dtype.name(), dims.to_vec(), b));
        ft.push((name.into(), dtype.name(), dims.to_vec(), f));
    };
    for (i, dtype) in [Dtype::BF16, Dtype::F32, Dtype::F16, Dtype::F64, Dtype::I8].into_iter().enumerate() {
        for (what, dims) in [("w", vec![130, 257]), ("norm", vec![300]), ("cube", vec![3, 40, 50])] {
            let words = dims.iter().product();
            let b = rng.weights(dtype, words);
            let f = match what {
                "norm" => b.clone(),
                "cube" => perturbed(&mut rng, dtype, &b, 0.3),
                _ => perturbed(&mut rng, dtype, &b, 0.01),
            };
            add(&format!("model.layers.{i}.{what}"), dtype, &dims, b, f);
        }
    }
    let words = 2048 * 1024;
    let b = rng.weights(Dtype::BF16, words);
    let f = stepped(&mut rng, Dtype::BF16, &b, 2e-5);
    add("embed", Dtype::BF16, &[2048, 1024], b.clone(), f.clone());
    add("head", Dtype::BF16, &[2048, 1024], b.clone(), f);
    let (b, f) = surprise(&mut rng);
    add("surprise", Dtype::BF16, &SURPRISE, b, f);
    let (b, f) = (rng.bytes(2048), rng.bytes(2048));
    add("random", Dtype::BF16, &[32, 32], b, f);
    ft.push(("new".into(), "F32", vec![70, 70], rng.bytes(70 * 70 * 4)));
    base.push(("cast".into(), "F32", vec![64, 64], rng.bytes(64 * 64 * 4)));
    ft.push(("cast".into(), "BF16", vec![64, 64], rng.bytes(64 * 64 * 2)));
    (base, ft)
}

const SURPRISE: [usize; 2] = [16 * 400, 256];

/// A matrix that changed in a band of rows which the sample does not see, so that the delta is planned twice.
fn surprise(rng: &mut Rng) -> (Vec<u8>, Vec<u8>) {
    let base = rng.weights(Dtype::BF16, SURPRISE[0] * SURPRISE[1]);
    let shape = Shape { n: SURPRISE[0], k: SURPRISE[1] };
    for band in 0..400 {
        let mut ft = base.clone();
        let at = band * 16 * 512..(band + 16).min(400) * 16 * 512;
        ft[at].chunks_mut(2).for_each(|word| word[0] ^= u8::from(!rng.next().is_multiple_of(3)));
        let mut pair = Pair::new(matrix(Dtype::BF16, shape, &base), matrix(Dtype::BF16, shape, &ft)).unwrap();
        let sampled = sample(&mut pair, Prefer::Memory).unwrap();
        if sampled.plan.widths == [0; 32] && sampled.plan != exactly(&mut pair, Prefer::Memory).unwrap().plan
        {
            return (base, ft);
        }
    }
    panic!("every sample saw the changes");
}

fn json(d: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&done(d, args)).unwrap()
}

fn number(v: &Value) -> u64 {
    v.as_u64().unwrap_or_else(|| panic!("{v} is no number"))
}

/// Bytes of every form but zstd, from deltas that are really made.
fn really(base: &[Tensor], ft: &[Tensor]) -> [u64; 5] {
    let mut sums = [0u64; 5];
    for (name, dtype, dims, words) in ft.iter().filter(|t| t.0 != "head") {
        let found = base.iter().find(|b| &b.0 == name && &b.1 == dtype);
        let alone = words.len() as u64;
        let sizes = found.map_or([alone; 5], |(.., old)| {
            let (dtype, shape) = (Dtype::from_name(dtype).unwrap(), Shape::of_dims(dims).unwrap());
            let (b, f) = (matrix(dtype, shape, old), matrix(dtype, shape, words));
            let made = [Prefer::Memory, Prefer::Speed].map(|p| encode_pair(&b, &f, p).unwrap());
            let changed = Resident::parse(&made[0]).unwrap().header().changed;
            let coo = |index: u64| changed * (dtype.word_bytes() as u64 + 2 * index);
            [alone, made[0].len() as u64, made[1].len() as u64, coo(4), coo(8)]
        });
        sums.iter_mut().zip(sizes).for_each(|(sum, n)| *sum += n);
    }
    sums
}

#[test]
fn sizes_are_those_of_real_deltas_and_packages() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = pair();
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    fs::write(d.join("ft"), safetensors(&ft)).unwrap();
    let found = json(d, &["estimate", "base", "ft", "--json"]);
    let f = &found["fine_tunes"][0];
    let keys = ["bytes", "memory_bytes", "speed_bytes", "coo32_bytes", "coo64_bytes"];
    assert_eq!(keys.map(|k| number(&f[k])), really(&base, &ft));

    done(d, &["pack", "base", "ft", "-o", "p", "--codec", "xor"]);
    let inspected = json(d, &["inspect", "p", "--json"]);
    let entries = inspected["entries"].as_array().unwrap();
    let alone = |e: &&Value| e["codec"] == "alone";
    let xor: u64 = entries.iter().filter(|e| !alone(e)).map(|e| number(&e["stored_bytes"])).sum();
    let whole: u64 = entries.iter().filter(alone).map(|e| number(&e["bytes"])).sum();
    assert_eq!(number(&f["zstd_bytes"]), xor + whole);
    assert_eq!((number(&f["alone"]), number(&f["alone_bytes"])), (2, whole));
    for key in ["changed", "words"] {
        assert_eq!(f[key], inspected[key], "{key}");
    }
    let base_bytes: usize = base.iter().filter(|t| t.0 != "head").map(|t| t.3.len()).sum();
    assert_eq!(number(&found["base_bytes"]), base_bytes as u64, "the tied head counts once");

    for jobs in ["1", "2", "7"] {
        assert_eq!(json(d, &["estimate", "base", "ft", "--json", "-j", jobs]), found, "{jobs} threads");
    }
    let mut quick = json(d, &["estimate", "base", "ft", "--json", "--no-zstd"]);
    assert_eq!(
        (quick["fine_tunes"][0]["zstd_bytes"].take(), &quick["break_even"]),
        (Value::Null, &found["break_even"])
    );
    assert_eq!(names(d), ["base", "ft", "p"], "something was written");
}

/// A base of one matrix and fine-tunes of it: a few changes, and nothing in common.
fn small(d: &Path) {
    let mut rng = Rng::new(3);
    let one = |bytes: Vec<u8>| safetensors(&[("w".into(), "BF16", vec![256, 256], bytes)]);
    let base = rng.weights(Dtype::BF16, 256 * 256);
    fs::write(d.join("few"), one(perturbed(&mut rng, Dtype::BF16, &base, 0.01))).unwrap();
    fs::write(d.join("half"), one(stepped(&mut rng, Dtype::BF16, &base, 0.01))).unwrap();
    fs::write(d.join("random"), one(rng.bytes(256 * 512))).unwrap();
    fs::write(d.join("base"), one(base)).unwrap();
}

#[test]
fn every_strategy_and_the_verdict_follow_from_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small(d);
    let found =
        json(d, &["estimate", "base", "few", "random", "--tenants", "6", "--bandwidth", "2", "--json"]);
    let (base, ways) = (number(&found["base_bytes"]), found["strategies"].as_array().unwrap());
    let keys = ["separate", "a", "b", "c32", "c64", "memory", "speed"];
    assert_eq!(ways.iter().map(|w| w["key"].as_str().unwrap()).collect::<Vec<_>>(), keys);
    let fields =
        ["bytes", "bytes", "zstd_bytes", "coo32_bytes", "coo64_bytes", "memory_bytes", "speed_bytes"];
    for (way, field) in ways.iter().zip(fields) {
        let sum: u64 = found["fine_tunes"].as_array().unwrap().iter().map(|f| number(&f[field])).sum();
        let shared = if way["key"] == "separate" { 0 } else { base };
        assert_eq!(number(&way["total_bytes"]), shared + 3 * sum, "{way}");
        match way["step_seconds"].as_f64() {
            Some(s) => assert!((s - number(&way["total_bytes"]) as f64 / 2e9).abs() < 1e-15, "{way}"),
            None => assert_eq!(way["key"], "b", "nothing computes on zstd"),
        }
    }
    for (ft, tenants, better, words) in [
        ("few", "1", "separate", "for 1 tenant; xorz would take"),
        ("few", "2", "xorz", "with prefer=speed, in place of 256.00 KiB for 2 tenants"),
        ("half", "100", "either", "storing the fine-tunes alone may be the better choice"),
        ("random", "1000", "separate", "store the fine-tunes alone"),
    ] {
        let args = ["estimate", "base", ft, "--tenants", tenants];
        let text = done(d, &args);
        assert!(text.contains(words), "{text}");
        let v = json(d, &[&args[..], &["--json"]].concat());
        assert_eq!(v["better"], better, "{ft}: {v}");
        let (memory, separate) = (&v["strategies"][5], &v["strategies"][0]);
        let smaller = number(&memory["total_bytes"]) < number(&separate["total_bytes"]);
        assert_eq!(smaller, better != "separate", "{ft}: the verdict contradicts the table");
    }
    let text = done(d, &["estimate", "base", "few", "random"]);
    assert!(text.matches("storing the fine-tune alone may be better").count() == 1, "{text}");
    assert!(!text.contains("ms a step"), "{text}");
    assert!(done(d, &["estimate", "base", "few", "--bandwidth", "50"]).contains("ms a step"));
}

#[test]
fn what_cannot_be_estimated_is_said_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small(d);
    refused(d, &["estimate", "base", "missing"], 4, &["missing"]);
    fs::write(d.join("cut"), &fs::read(d.join("few")).unwrap()[..5000]).unwrap();
    refused(d, &["estimate", "base", "cut"], 3, &["cut"]);
    for args in [
        &["estimate", "base"][..],
        &["estimate", "base", "few", "--tenants", "0"],
        &["estimate", "base", "few", "--bandwidth", "0"],
        &["estimate", "base", "few", "--bandwidth", "fast"],
        &["estimate", "-", "-"],
    ] {
        assert_eq!(xorz(d, args).status.code(), Some(2), "{args:?}");
    }
    // Another dtype: nothing is a delta, and why is said.
    let words = vec![0; 256 * 256 * 4];
    fs::write(d.join("wide"), safetensors(&[("w".into(), "F32", vec![256, 256], words)])).unwrap();
    let text = done(d, &["estimate", "base", "wide"]);
    assert!(text.contains("F32 in the fine-tune, but BF16 in the base; save both in one dtype"), "{text}");
}
