//! Promise: packing, unpacking and estimating hold a few MiB per thread, whatever the checkpoint's size: one large tensor, many small
//! ones, and words that all change at random.

use crate::common::data::{Rng, stepped};
use crate::common::disk::{Tensor, command, safetensors};
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use xorz::matrix::Dtype;

const MIB: u64 = 1 << 20;
const JOBS: u64 = 2;

/// Beyond the page cache: what a run starts with, and what each thread holds.
const CONSTANT: u64 = 4 * MIB;
const PER_THREAD: u64 = 8 * MIB;
const ZSTD_10: u64 = 24 * MIB;

/// Peak anonymous memory of a run, in bytes; it must succeed.
fn peak(d: &Path, args: &[&str]) -> u64 {
    let mut child = command(d, args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap_or("0");
        let kib: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
        peak = peak.max(kib << 10);
        std::thread::sleep(Duration::from_micros(500));
    }
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    peak
}

/// Pack, unpack and verify what `base` and `ft` hold, and compare each peak with the bound; `extra` bytes are allowed for
/// what grows with the number of tensors, which is known.
fn bounded(what: &str, base: &[Tensor], ft: &[Tensor], extra: u64) {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    fs::write(d.join("base"), safetensors(base)).unwrap();
    let original = safetensors(ft);
    fs::write(d.join("ft"), &original).unwrap();
    let bound = CONSTANT + JOBS * PER_THREAD + extra;
    assert!(original.len() as u64 > 3 * bound, "{what}: the checkpoint is too small to show anything");
    let jobs = JOBS.to_string();
    for args in [
        &["pack", "base", "ft", "-o", "p", "--jobs", &jobs][..],
        &["pack", "base", "ft", "-o", "p.speed", "--prefer", "speed", "--jobs", &jobs],
        &["unpack", "base", "p", "-o", "out", "--jobs", &jobs],
        &["unpack", "base", "p.speed", "-o", "out", "--jobs", &jobs],
        &["verify", "base", "p", "ft", "--jobs", &jobs],
        &["estimate", "base", "ft", "--jobs", &jobs, "--no-zstd"],
        &["estimate", "base", "ft", "--jobs", &jobs],
    ] {
        // zstd's own tables at the notebook's level, one for each tensor in hand.
        let zstd = args[0] == "estimate" && !args.contains(&"--no-zstd");
        let bound = bound + if zstd { JOBS * ZSTD_10 } else { 0 };
        let found = peak(d, args);
        println!("{what}: {args:?}: {:.1} MiB of {} MiB", found as f64 / MIB as f64, bound / MIB);
        assert!(found <= bound, "{what}: {args:?}: {} MiB, bound {} MiB", found / MIB, bound / MIB);
    }
    assert!(fs::read(d.join("out")).unwrap() == original);
}

/// A block of weights and its fine-tune, over and over: made quickly.
fn repeated(bytes: usize, lr: f64) -> (Vec<u8>, Vec<u8>) {
    let mut rng = Rng::new(31);
    let base = rng.weights(Dtype::BF16, 1 << 20);
    let ft = stepped(&mut rng, Dtype::BF16, &base, lr);
    let times = bytes / base.len();
    (base.repeat(times), ft.repeat(times))
}

#[test]
fn one_large_tensor() {
    let (base, ft) = repeated(96 << 20, 2e-5);
    let one = |bytes| vec![("w".to_owned(), "BF16", vec![48 << 10, 1024], bytes)];
    bounded("one large tensor", &one(base), &one(ft), 0);
}

/// What several fine-tunes hold together of their base: blocks, more for each thread, and samples.
const SHARED: u64 = 50 * MIB;
const SHARED_PER_THREAD: u64 = 2 * MIB;

#[test]
fn several_fine_tunes_of_one_base() {
    let (base, ft) = repeated(96 << 20, 2e-5);
    let one = |bytes| safetensors(&[("w".to_owned(), "BF16", vec![48 << 10, 1024], bytes)]);
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    fs::write(d.join("base"), one(base)).unwrap();
    let ft = one(ft);
    let names = ["a", "b", "c", "d"];
    names.iter().for_each(|name| fs::write(d.join(name), &ft).unwrap());
    let bound = CONSTANT + JOBS * (PER_THREAD + SHARED_PER_THREAD) + SHARED;
    assert!(5 * ft.len() as u64 > 3 * bound, "too small to show anything");
    let jobs = JOBS.to_string();
    let found = peak(d, &[&["pack", "base"][..], &names, &["-o", "out", "--jobs", &jobs]].concat());
    println!("several fine-tunes: {:.1} MiB of {} MiB", found as f64 / MIB as f64, bound / MIB);
    assert!(found <= bound, "{} MiB, bound {} MiB", found / MIB, bound / MIB);
    assert!(names.iter().all(|name| d.join(format!("out/{name}.xorz")).exists()));
}

#[test]
fn many_small_tensors() {
    let (base, ft) = repeated(128 << 20, 2e-5);
    let cut = |bytes: &[u8]| -> Vec<Tensor> {
        let parts = bytes.chunks(32 << 10).enumerate();
        parts.map(|(i, b)| (format!("model.layers.{i}.w"), "BF16", vec![128, 128], b.to_vec())).collect()
    };
    // Names, records and digests of 4,096 tensors, with room.
    bounded("many small tensors", &cut(&base), &cut(&ft), 4096 * 4096);
}

#[test]
fn words_that_all_change_at_random() {
    let mut rng = Rng::new(32);
    let (base, ft) = (rng.bytes(64 << 20), rng.bytes(64 << 20));
    let one = |bytes| vec![("w".to_owned(), "BF16", vec![16 << 10, 2048], bytes)];
    bounded("random words", &one(base), &one(ft), 0);
}

#[test]
fn one_long_row() {
    let (base, ft) = repeated(96 << 20, 1e-4);
    let one = |bytes| vec![("w".to_owned(), "BF16", vec![48 << 20], bytes)];
    bounded("one long row", &one(base), &one(ft), 0);
}

#[test]
fn many_long_rows() {
    // 64 rows take more than a piece may: no delta of these is made of pieces of whole tiles.
    let (base, ft) = repeated(96 << 20, 1e-4);
    let one = |bytes| vec![("w".to_owned(), "BF16", vec![256, 196_608], bytes)];
    bounded("many long rows", &one(base), &one(ft), 0);
}
