//! Promise: no tensor takes more than one zstd frame of its XOR at level 10, which is the notebook's way; and no package, with its
//! header and its table, more than these frames together, where there is enough to store for a header of 256 bytes.

use crate::common::data::{Rng, perturbed, stepped, word};
use crate::common::disk::{Tensor, done, safetensors};
use std::fs;
use std::path::Path;
use xorz::codec::Prefer;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{
    Codec, Destination, PackOptions, Package, Run, SafeTensors, Tensor as Given, Writer, pack_files,
};

/// A tensor of both sides.
struct Both {
    name: String,
    dtype: Dtype,
    dims: Vec<usize>,
    base: Vec<u8>,
    ft: Vec<u8>,
}

fn both(name: &str, dtype: Dtype, dims: &[usize], base: Vec<u8>, ft: Vec<u8>) -> Both {
    Both { name: name.into(), dtype, dims: dims.to_vec(), base, ft }
}

/// One frame of the XOR, as the notebook makes it.
fn frame(b: &Both) -> usize {
    let xor: Vec<u8> = b.base.iter().zip(&b.ft).map(|(x, y)| x ^ y).collect();
    zstd::bulk::compress(&xor, 10).unwrap().len()
}

/// Pack, compare each tensor with its frame, restore; gives the bytes of the package and of all frames.
fn compared(what: &str, all: &[Both], jobs: usize) -> (usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut writer = Writer::create(&path, PackOptions::default()).unwrap().jobs(jobs);
    for b in all {
        let side = |bytes| Given { name: &b.name, dtype: b.dtype.name(), dims: &b.dims, bytes };
        writer.add(&side(&b.ft), Some(&side(&b.base))).unwrap();
    }
    let report = writer.finish().unwrap();
    assert_eq!(report.package_bytes, fs::metadata(&path).unwrap().len());
    let package = Package::open(&path).unwrap();
    let (mut frames, mut stored) = (0, 0);
    for b in all {
        let (e, most) = (package.entry(&b.name).unwrap(), frame(b));
        let (name, codec) = (&b.name, e.codec.name());
        assert!(e.stored_bytes as usize <= most, "{what}: {name} by {codec}: {} for {most}", e.stored_bytes);
        (frames, stored) = (frames + most, stored + e.stored_bytes);
        let m = Matrix::new(b.dtype, Shape::of_dims(&b.dims).unwrap(), &b.base).unwrap();
        let mut out = vec![0; b.ft.len()];
        package.restore(&b.name, Some(&m), &mut out).unwrap();
        assert!(out == b.ft, "{what}: {name} by {codec} came back wrong");
        for prefer in [None, Some(Prefer::Speed)] {
            let delta = package.resident(&b.name, &m, prefer).unwrap();
            let delta = xorz::resident::Resident::parse(&delta).unwrap();
            xorz::resident::restore(&delta, &m, &mut out).unwrap();
            assert!(out == b.ft, "{what}: the delta of {name} by {codec}");
        }
    }
    println!(
        "{what}: {} tensors, frames {frames}, stored {stored}, package {}",
        all.len(),
        report.package_bytes
    );
    (report.package_bytes as usize, frames)
}

/// The notebook's layer: 3 % of each parameter plus noise of 0.01.
fn notebook(d: usize, hidden: usize) -> Vec<Both> {
    let mut rng = Rng::new(42);
    let mut parameter = |name: &str, dims: &[usize], scale: f64| {
        let words = dims.iter().product::<usize>();
        let base: Vec<u8> =
            (0..words).flat_map(|_| word(Dtype::F32, scale * (2.0 * rng.unit() - 1.0))).collect();
        let mut ft = base.clone();
        for _ in 0..(words * 3 / 100).max(1) {
            let at = 4 * (rng.next() as usize % words);
            let old = f32::from_le_bytes(ft[at..at + 4].try_into().unwrap());
            ft[at..at + 4].copy_from_slice(&(old + 0.01 * rng.normal() as f32).to_le_bytes());
        }
        both(name, Dtype::F32, dims, base, ft)
    };
    let scale = |k: usize| 1.0 / (k as f64).sqrt();
    vec![
        parameter("ln1.weight", &[d], 1.0),
        parameter("ln1.bias", &[d], 0.1),
        parameter("self_attn.in_proj_weight", &[3 * d, d], scale(d)),
        parameter("self_attn.in_proj_bias", &[3 * d], 0.1),
        parameter("self_attn.out_proj.weight", &[d, d], scale(d)),
        parameter("self_attn.out_proj.bias", &[d], 0.1),
        parameter("ln2.weight", &[d], 1.0),
        parameter("ln2.bias", &[d], 0.1),
        parameter("ff.0.weight", &[hidden, d], scale(d)),
        parameter("ff.0.bias", &[hidden], scale(d)),
        parameter("ff.2.weight", &[d, hidden], scale(hidden)),
        parameter("ff.2.bias", &[d], scale(hidden)),
    ]
}

#[test]
fn the_notebooks_layer_is_smaller_than_by_the_notebook() {
    let (package, frames) = compared("notebook 64x128", &notebook(64, 128), 1);
    assert!(package <= frames, "{package} for {frames}");
    // One matrix of the large one: the rest is alike.
    let large: Vec<Both> =
        notebook(4096, 1).into_iter().filter(|b| b.dims.len() < 2 || b.name.contains("out")).collect();
    let (package, frames) = compared("notebook 4096x4096", &large, 2);
    assert!(package <= frames, "{package} for {frames}");
}

#[test]
fn small_tensors_take_no_more_whatever_they_are() {
    let mut rng = Rng::new(43);
    let mut all = Vec::new();
    for (i, words) in
        [1, 2, 3, 7, 8, 16, 33, 64, 100, 256, 768, 1023, 1025, 2048, 2049, 4096, 9000].into_iter().enumerate()
    {
        for (dtype, name) in
            [(Dtype::F32, "f32"), (Dtype::BF16, "bf16"), (Dtype::U8, "u8"), (Dtype::I64, "i64")]
        {
            for share in [0.0, 0.01, 0.2, 1.0] {
                let base = rng.weights(dtype, words);
                let ft = perturbed(&mut rng, dtype, &base, share);
                all.push(both(&format!("block.{i}.{name}.{share}"), dtype, &[words], base, ft));
            }
        }
    }
    let (package, frames) = compared("small tensors", &all, 2);
    assert!(package <= frames, "{package} for {frames}");
}

#[test]
fn many_biases_and_norms_take_no_more_with_all_that_is_around_them() {
    let mut rng = Rng::new(44);
    for (what, words, share, count) in [
        ("biases", 64, 0.03, 400),
        ("norms", 768, 0.02, 100),
        ("unchanged norms", 256, 0.0, 300),
        ("dense biases", 128, 1.0, 100),
        ("scalars", 1, 1.0, 1000),
    ] {
        let all: Vec<Both> = (0..count)
            .map(|i| {
                let base = rng.weights(Dtype::F32, words);
                let ft = perturbed(&mut rng, Dtype::F32, &base, share);
                both(&format!("model.layers.{}.{}.bias", i / 4, i % 4), Dtype::F32, &[words], base, ft)
            })
            .collect();
        let (package, frames) = compared(what, &all, 1);
        assert!(package <= frames, "{what}: {package} for {frames}");
    }
}

/// What general compressors find and codecs of numbers do not.
#[test]
fn what_repeats_is_found_and_what_does_not_compress_costs_nothing() {
    let mut rng = Rng::new(45);
    let mut all = Vec::new();
    for (i, dims) in [vec![40, 50], vec![300, 300], vec![700, 1000], vec![3000, 1024]].into_iter().enumerate()
    {
        let words: usize = dims.iter().product();
        let base = rng.weights(Dtype::BF16, words);
        let pattern = rng.bytes(6000);
        let xored = |xor: &dyn Fn(usize) -> u8| -> Vec<u8> {
            base.iter().enumerate().map(|(at, b)| b ^ xor(at)).collect()
        };
        let cases = [
            ("random", rng.bytes(2 * words)),
            ("constant", xored(&|at| [0x15, 0x03][at % 2])),
            ("repeating", xored(&|at| if at % 6000 < 300 { pattern[at % 6000] } else { 0 })),
            ("dense repeating", xored(&|at| pattern[at % 6000])),
            ("one row", xored(&|at| if at / (2 * dims[1]) == 17 { pattern[at % 6000] } else { 0 })),
            ("stepped", stepped(&mut Rng::new(46), Dtype::BF16, &base, 2e-5)),
            ("dense steps", stepped(&mut Rng::new(47), Dtype::BF16, &base, 2e-3)),
        ];
        for (what, ft) in cases {
            all.push(both(&format!("{what}.{i}"), Dtype::BF16, &dims, base.clone(), ft));
        }
    }
    let (package, frames) = compared("repeating", &all, 2);
    assert!(package <= frames, "{package} for {frames}");
}

/// From files as from memory; where a codec is asked for, it is taken.
#[test]
fn files_are_packed_as_small_as_tensors_from_memory() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let all = notebook(64, 128);
    let file = |side: fn(&Both) -> Vec<u8>| -> Vec<u8> {
        let tensors: Vec<Tensor> =
            all.iter().map(|b| (b.name.clone(), "F32", b.dims.clone(), side(b))).collect();
        safetensors(&tensors)
    };
    fs::write(d.join("base"), file(|b| b.base.clone())).unwrap();
    fs::write(d.join("ft"), file(|b| b.ft.clone())).unwrap();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    let package = Package::open(&d.join("p")).unwrap();
    for b in &all {
        let e = package.entry(&b.name).unwrap();
        assert!(e.stored_bytes as usize <= frame(b), "{} by {}", b.name, e.codec.name());
    }
    done(d, &["pack", "base", "ft", "-o", "q", "--codec", "resident-zstd"]);
    let asked = Package::open(&d.join("q")).unwrap();
    assert!(asked.entries().iter().all(|e| e.codec == Codec::ResidentZstd));
}

#[test]
fn real_pairs_take_no_more() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/pairs");
    let Ok(folder) = fs::read_dir(std::env::var_os("XORZ_PAIRS").map_or(default, Into::into)) else {
        println!("no pairs here");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut paths: Vec<_> = folder.map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some((stem, _)) = name.split_once(".ft") else { continue };
        let base = path.with_file_name(format!("{stem}.base.safetensors"));
        let to = dir.path().join("p");
        pack_files(&base, &path, Destination::Path(&to), &PackOptions::default(), &Run::default()).unwrap();
        let package = Package::open(&to).unwrap();
        let (old, new) = (SafeTensors::open(&base).unwrap(), SafeTensors::open(&path).unwrap());
        for e in package.entries().iter().filter(|e| e.base.is_some()) {
            let read = |file: &SafeTensors, name: &str| file.read(file.find(name).unwrap()).unwrap();
            let dtype = e.word_dtype().unwrap();
            let (was, is) = (read(&old, &e.base.as_ref().unwrap().name), read(&new, &e.name));
            let most = frame(&both(&e.name, dtype, &e.dims, was, is));
            let taken = e.stored_bytes as usize;
            assert!(taken <= most, "{name}: {} by {}: {taken} for {most}", e.name, e.codec.name());
        }
    }
}
