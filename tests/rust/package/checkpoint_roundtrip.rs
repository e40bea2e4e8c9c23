//! Promise: a checkpoint goes in and the same comes out, file for file and byte for byte, whatever its layout, headers, dtypes
//! and differences from the base; how it is packed changes no bit of that, and how many threads pack changes no bit at all.

use crate::common::data::{Rng, stepped};
use crate::common::disk::{Tensor, matrices, model, names, safetensors, tree};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use xorz::codec::Prefer;
use xorz::matrix::Dtype;
use xorz::package::{
    Codec, Destination, PackOptions, Package, Report, Run, pack_files, unpack_files, verify_files,
};

fn run(jobs: usize) -> Run<'static> {
    Run { jobs, ..Run::default() }
}

fn pack(base: &Path, ft: &Path, out: &Path, options: &PackOptions, jobs: usize) -> Report {
    pack_files(base, ft, Destination::Path(out), options, &run(jobs)).unwrap()
}

fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// Pack and give back `ft` (file or folder) in `d`, and compare everything.
fn there_and_back(d: &Path, base: &Path, ft: &Path, options: &PackOptions, jobs: usize) -> Report {
    let (package, out) = (d.join("p.xorz"), d.join("out"));
    remove(&out);
    let report = pack(base, ft, &package, options, jobs);
    unpack_files(base, &package, Destination::Path(&out), &run(jobs)).unwrap();
    if ft.is_dir() {
        let (got, want) = (tree(&out), tree(ft));
        assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
        want.iter().for_each(|(name, w)| assert!(got[name] == *w, "{name} is not the same"));
    } else {
        assert!(fs::read(&out).unwrap() == fs::read(ft).unwrap());
    }
    verify_files(base, &package, Some(ft), &run(jobs)).unwrap();
    verify_files(base, &package, None, &run(jobs)).unwrap();
    assert!(names(d).iter().all(|n| !n.starts_with('.')), "{:?}", names(d));
    report
}

fn plain(d: &Path, base: &[Tensor], ft: &[Tensor]) -> Report {
    fs::write(d.join("base"), safetensors(base)).unwrap();
    fs::write(d.join("ft"), safetensors(ft)).unwrap();
    there_and_back(d, &d.join("base"), &d.join("ft"), &PackOptions::default(), 2)
}

fn entry(d: &Path, name: &str) -> xorz::package::Entry {
    Package::open(&d.join("p.xorz")).unwrap().entry(name).unwrap().clone()
}

#[test]
fn folders_come_back_with_everything_in_them() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, mut ft) = matrices(41, 7, 128, 300);
    model(&d.join("base"), &base, 2);
    // Other shards, in another order.
    ft.reverse();
    model(&d.join("ft"), &ft, 3);
    let mut rng = Rng::new(42);
    fs::write(d.join("ft/tokenizer.json"), rng.bytes(3 << 20)).unwrap();
    fs::write(d.join("ft/vocab.txt"), "the and of\n".repeat(300_000)).unwrap();
    fs::write(d.join("ft/empty"), b"").unwrap();
    fs::write(d.join("ft/.hidden"), b"dot").unwrap();
    fs::write(d.join("ft/name with spaces, \u{e9} and \u{1F600}"), b"x").unwrap();
    fs::create_dir_all(d.join("ft/original/deep")).unwrap();
    fs::write(d.join("ft/original/deep/params.json"), b"{}").unwrap();
    // Weights in a folder of their own, one of a name that is there already.
    fs::write(d.join("ft/original/extra.safetensors"), safetensors(&ft[..2])).unwrap();
    fs::write(d.join("ft/run.sh"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(d.join("ft/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let report = there_and_back(d, &d.join("base"), &d.join("ft"), &PackOptions::default(), 2);
    assert!(report.folder && report.alone == 0, "{report:?}");
    // And other ways to hold the same base: one file, or a file without a folder.
    fs::create_dir(d.join("one")).unwrap();
    fs::write(d.join("one/model.safetensors"), safetensors(&base)).unwrap();
    for base in ["one", "one/model.safetensors"] {
        there_and_back(d, &d.join(base), &d.join("ft"), &PackOptions::default(), 1);
    }
    // A package is made against tensors, not against files.
    remove(&d.join("out"));
    unpack_files(&d.join("base"), &d.join("p.xorz"), Destination::Path(&d.join("out")), &run(2)).unwrap();
    assert!(tree(&d.join("out")) == tree(&d.join("ft")));
}

#[test]
fn a_folder_of_one_file_and_a_file_against_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(43, 3, 64, 256);
    model(&d.join("base"), &base, 3);
    fs::create_dir(d.join("ft")).unwrap();
    fs::write(d.join("ft/model.safetensors"), safetensors(&ft)).unwrap();
    assert_eq!(there_and_back(d, &d.join("base"), &d.join("ft"), &PackOptions::default(), 2).alone, 0);
    let report =
        there_and_back(d, &d.join("base"), &d.join("ft/model.safetensors"), &PackOptions::default(), 2);
    assert!(!report.folder && report.alone == 0);
    // An empty folder is as good as none.
    remove(&d.join("out"));
    fs::create_dir(d.join("out")).unwrap();
    pack(&d.join("base"), &d.join("ft"), &d.join("p.xorz"), &PackOptions::default(), 0);
    unpack_files(&d.join("base"), &d.join("p.xorz"), Destination::Path(&d.join("out")), &run(0)).unwrap();
    assert!(tree(&d.join("out")) == tree(&d.join("ft")));
}

/// A file with this header text.
fn headed(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn headers_come_back_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut rng = Rng::new(44);
    let a = rng.weights(Dtype::BF16, 600);
    let b = stepped(&mut rng, Dtype::BF16, &a, 1e-4);
    let base = headed(r#"{"a":{"dtype":"BF16","shape":[600],"data_offsets":[0,1200]}}"#, &a);
    fs::write(d.join("base"), base).unwrap();
    for header in [
        r#"{"a":{"dtype":"BF16","shape":[600],"data_offsets":[0,1200]}}"#.to_owned(),
        format!(r#"{{"a":{{"dtype":"BF16","shape":[600],"data_offsets":[0,1200]}}}}{}"#, " ".repeat(5000)),
        "{\n\t\"a\" : { \"shape\":[ 600 ],\r\n\"data_offsets\":[0 , 1200], \"dtype\":\"BF16\" } } ".to_owned(),
        r#"{"\u0061":{"dtype":"BF16","shape":[600],"data_offsets":[0,1200]},"__metadata__":{"z":"1","a":"\n\u00e9"}}"#
            .to_owned(),
        r#"{"__metadata__":{},"b":{"dtype":"F32","shape":[0],"data_offsets":[1200,1200]},"a":{"dtype":"BF16","shape":[600],"data_offsets":[0,1200]}}"#
            .to_owned(),
        r#"{"c":{"dtype":"BF16","shape":[2,100],"data_offsets":[800,1200]},"a":{"dtype":"BF16","shape":[400],"data_offsets":[0,800]}}"#
            .to_owned(),
        r#"{"a":{"dtype":"BF16","shape":[600],"data_offsets":[0,1200]},"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.to_owned(),
    ] {
        fs::write(d.join("ft"), headed(&header, &b)).unwrap();
        there_and_back(d, &d.join("base"), &d.join("ft"), &PackOptions::default(), 2);
    }
    // No tensors at all, on either side.
    for (base, ft) in [("{}", "{}   "), ("{\"__metadata__\":{\"a\":\"b\"}}", "{}")] {
        fs::write(d.join("base"), headed(base, &[])).unwrap();
        fs::write(d.join("ft"), headed(ft, &[])).unwrap();
        there_and_back(d, &d.join("base"), &d.join("ft"), &PackOptions::default(), 2);
    }
}

fn t(name: &str, dtype: &'static str, dims: &[usize], bytes: &[u8]) -> Tensor {
    (name.into(), dtype, dims.to_vec(), bytes.to_vec())
}

#[test]
fn every_dtype_comes_back_even_those_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut rng = Rng::new(45);
    let bits = [
        ("F64", 64),
        ("F32", 32),
        ("F16", 16),
        ("BF16", 16),
        ("I64", 64),
        ("I32", 32),
        ("I16", 16),
        ("I8", 8),
        ("U64", 64),
        ("U32", 32),
        ("U16", 16),
        ("U8", 8),
        ("BOOL", 8),
        ("F8_E4M3", 8),
        ("F8_E5M2", 8),
        ("F8_E8M0", 8),
        ("F4", 4),
        ("C64", 64),
        ("F6_E2M3", 6),
        ("E99", 8),
    ];
    let (mut base, mut ft) = (Vec::new(), Vec::new());
    for (dtype, bits) in bits {
        for dims in [&[][..], &[0], &[7, 0, 3], &[8], &[40, 64], &[4, 2, 8, 3]] {
            let len = dims.iter().product::<usize>() * bits / 8;
            if dims.is_empty() && bits < 8 {
                continue;
            }
            let old = rng.bytes(len);
            let mut new = old.clone();
            for b in &mut new {
                if rng.next().is_multiple_of(8) {
                    *b ^= 1 << (rng.next() % 8);
                }
            }
            let name = format!("{dtype}{dims:?}");
            base.push(t(&name, dtype, dims, &old));
            ft.push(t(&name, dtype, dims, if rng.next().is_multiple_of(4) { &old } else { &new }));
        }
    }
    plain(d, &base, &ft);
    for codec in [Codec::Xor, Codec::Resident, Codec::ResidentZstd, Codec::Planes, Codec::Predicted] {
        for prefer in [Prefer::Speed, Prefer::Memory] {
            let options = PackOptions { codec: Some(codec), prefer, ..PackOptions::default() };
            there_and_back(d, &d.join("base"), &d.join("ft"), &options, 3);
        }
    }
}

#[test]
fn tensors_that_are_new_gone_or_otherwise_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut rng = Rng::new(46);
    let w: Vec<Vec<u8>> = (0..4).map(|_| rng.weights(Dtype::BF16, 96 * 160)).collect();
    let near = |rng: &mut Rng, i: usize| stepped(rng, Dtype::BF16, &w[i], 1e-5);
    let base = [
        t("same", "BF16", &[96, 160], &w[0]),
        t("turned", "BF16", &[96, 160], &w[1]),
        t("typed", "BF16", &[96, 160], &w[2]),
        t("grown", "BF16", &[96, 160], &w[3]),
        t("gone", "U8", &[4], &[1, 2, 3, 4]),
    ];
    let (same, turned, typed, mut grown) =
        (near(&mut rng, 0), near(&mut rng, 1), w[2].clone(), near(&mut rng, 3));
    grown.extend(rng.bytes(320));
    let ft = [
        t("same", "BF16", &[96, 160], &same),
        t("turned", "BF16", &[160, 96], &turned),
        t("typed", "F16", &[96, 160], &typed),
        t("grown", "BF16", &[97, 160], &grown),
        t("new", "F32", &[3], &rng.bytes(12)),
    ];
    let report = plain(d, &base, &ft);
    assert_eq!((report.tensors, report.removed), (5, 1), "{report:?}");
    assert_eq!(Package::open(&d.join("p.xorz")).unwrap().removed(), ["gone"]);
    for name in ["turned", "typed", "new"] {
        assert!(!entry(d, name).codec.delta(), "{name}");
    }
    assert!(entry(d, "same").codec.delta());
    // The rows that both have are a delta.
    let base = entry(d, "grown").base.unwrap();
    assert_eq!((base.name.as_str(), base.parts.len()), ("grown", 2));
    assert_eq!((base.parts[0].bytes, base.parts[1].bytes), (96 * 320, 320));
}

#[test]
fn tied_untied_and_renamed_tensors_stay_small() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut rng = Rng::new(47);
    let shape = [256, 512];
    let embed = rng.weights(Dtype::BF16, 256 * 512);
    let tuned = stepped(&mut rng, Dtype::BF16, &embed, 1e-5);
    let head = stepped(&mut rng, Dtype::BF16, &embed, 2e-5);
    let tied = [t("model.embed_tokens.weight", "BF16", &shape, &embed)];
    let both =
        [t("model.embed_tokens.weight", "BF16", &shape, &embed), t("lm_head.weight", "BF16", &shape, &embed)];
    let small = embed.len() as u64 / 5;
    // The fine-tune unties what the base had tied: its head is a delta of the embedding.
    let untied =
        [t("model.embed_tokens.weight", "BF16", &shape, &tuned), t("lm_head.weight", "BF16", &shape, &head)];
    let report = plain(d, &tied, &untied);
    assert!(report.package_bytes < small, "{report:?}");
    assert_eq!(entry(d, "lm_head.weight").base.unwrap().name, "model.embed_tokens.weight");
    // It is saved with both copies of what is tied: the second takes nothing.
    let twice =
        [t("model.embed_tokens.weight", "BF16", &shape, &tuned), t("lm_head.weight", "BF16", &shape, &tuned)];
    for base in [&tied[..], &both] {
        let report = plain(d, base, &twice);
        assert!(report.package_bytes < small, "{report:?}");
    }
    // It ties what the base kept twice.
    let report = plain(d, &both, &twice[..1]);
    assert!(report.package_bytes < small && report.removed == 1, "{report:?}");
    // Every tensor has another name.
    let renamed = [t("transformer.wte.weight", "BF16", &shape, &tuned)];
    let report = plain(d, &tied, &renamed);
    assert!(report.package_bytes < small && report.alone == 0, "{report:?}");
}

#[test]
fn a_checkpoint_packed_against_itself_costs_almost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, _) = matrices(48, 8, 512, 1024);
    model(&d.join("base"), &base, 3);
    model(&d.join("ft"), &base, 2);
    let report = there_and_back(d, &d.join("base"), &d.join("ft"), &PackOptions::default(), 2);
    assert_eq!((report.unchanged, report.changed), (8, 0));
    assert!(report.package_bytes < 16 << 10, "{} bytes for nothing", report.package_bytes);
}

#[test]
fn threads_change_no_bit_and_no_codec_changes_what_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (mut base, mut ft) = matrices(49, 5, 200, 1100);
    let mut rng = Rng::new(50);
    // More than one piece, a long row, a rewritten and a new tensor.
    let (wide, long) = (rng.weights(Dtype::F32, 700 * 2048), rng.weights(Dtype::BF16, 3 << 20));
    let (wide2, long2) =
        (stepped(&mut rng, Dtype::F32, &wide, 1e-6), stepped(&mut rng, Dtype::BF16, &long, 1e-5));
    base.extend([
        t("wide", "F32", &[700, 2048], &wide),
        t("long", "BF16", &[3 << 20], &long),
        t("random", "I8", &[999], &rng.bytes(999)),
    ]);
    ft.extend([
        t("wide", "F32", &[700, 2048], &wide2),
        t("long", "BF16", &[3 << 20], &long2),
        t("random", "I8", &[999], &rng.bytes(999)),
    ]);
    ft.push(t("new", "F16", &[1 << 20], &rng.weights(Dtype::F16, 1 << 20)));
    model(&d.join("base"), &base, 2);
    model(&d.join("ft"), &ft, 3);
    let codecs = [Codec::Xor, Codec::Resident, Codec::ResidentZstd, Codec::Planes, Codec::Predicted];
    for codec in codecs.into_iter().map(Some).chain([None]) {
        for prefer in [Prefer::Speed, Prefer::Memory] {
            let options = PackOptions { codec, prefer, ..PackOptions::default() };
            let mut first: Option<Vec<u8>> = None;
            for jobs in [1, 2, 7] {
                pack(&d.join("base"), &d.join("ft"), &d.join("p.xorz"), &options, jobs);
                let bytes = fs::read(d.join("p.xorz")).unwrap();
                let first = first.get_or_insert_with(|| bytes.clone());
                assert!(bytes == *first, "{codec:?} {prefer:?}: {jobs} threads make other bytes");
            }
            there_and_back(d, &d.join("base"), &d.join("ft"), &options, 7);
        }
    }
}
