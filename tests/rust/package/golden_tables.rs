//! Promise: packages of version 2, which is frozen, decode forever: every codec, base and kind of file that a table can say. The
//! files in tests/golden are never regenerated.

use crate::common::data::{Rng, perturbed, stepped};
use crate::common::disk::{Tensor, safetensors, sums};
use crate::common::tables::{CODECS, Row, SUMS, Table, take_table};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use xorz::codec::Prefer;
use xorz::matrix::Dtype;
use xorz::package::{
    Codec, Destination, PackOptions, Run, SafeTensors, Trust, pack_files, unpack_files, verify_files,
};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Of the file `ft.safetensors` against `base.safetensors`, which packages of version 1 are of, too.
const FILES: [(Option<Codec>, Prefer, &str); 8] = [
    (None, Prefer::Memory, "v2_smallest.xorz"),
    (Some(Codec::Xor), Prefer::Memory, "v2_xor.xorz"),
    (Some(Codec::Resident), Prefer::Speed, "v2_resident_speed.xorz"),
    (Some(Codec::Resident), Prefer::Memory, "v2_resident_memory.xorz"),
    (Some(Codec::ResidentZstd), Prefer::Speed, "v2_resident_zstd_speed.xorz"),
    (Some(Codec::ResidentZstd), Prefer::Memory, "v2_resident_zstd_memory.xorz"),
    (Some(Codec::Planes), Prefer::Memory, "v2_planes.xorz"),
    (Some(Codec::Predicted), Prefer::Memory, "v2_predicted.xorz"),
];

/// Of a folder of two components against the folder `v2_base`.
const FOLDERS: [(Option<Codec>, &str); 2] =
    [(None, "v2_folder.xorz"), (Some(Codec::ResidentZstd), "v2_folder_resident_zstd.xorz")];
/// The first one once more, put together by another hand, its table as it is without zstd.
const PLAIN: &str = "v2_folder_plain_table.xorz";
/// The first of these, with the sha256 of each delta's base.
const TRUSTED: &str = "v2_folder_sha256.xorz";
const BASE: &str = "v2_base";
const SUMS_OF_FILES: &str = "v2_folder_files.json";

fn table(name: &str) -> Table {
    let file = SafeTensors::open(&golden(name)).unwrap();
    take_table(&file.read(file.find("xorz:table").unwrap()).unwrap())
}

#[test]
fn golden_packages_of_version_2_give_back_every_bit() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::default();
    let (mut codecs, mut bases, mut encodings) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut note = |name: &str| {
        let table = table(name);
        for row in &table.rows {
            codecs.insert(row.codec);
            encodings.insert(row.encoding);
            bases.insert((row.base, row.parts.iter().any(|p| p.0.is_none())));
        }
        table
    };
    let (base, ft) = (golden("base.safetensors"), golden("ft.safetensors"));
    let out = dir.path().join("out");
    for (_, _, name) in FILES {
        assert_eq!(note(name).removed, ["removed"]);
        verify_files(&base, &golden(name), Some(&ft), &run).unwrap();
        unpack_files(&base, &golden(name), Destination::Path(&out), &run).unwrap();
        assert!(fs::read(&out).unwrap() == fs::read(&ft).unwrap(), "{name}");
    }
    let want: BTreeMap<String, (String, bool)> =
        serde_json::from_slice(&fs::read(golden(SUMS_OF_FILES)).unwrap()).unwrap();
    for name in FOLDERS.iter().map(|(_, name)| *name).chain([PLAIN]) {
        let table = note(name);
        assert_eq!((table.flags, table.removed), (1, vec!["gone".to_owned()]), "{name}");
        assert!(table.rows.iter().any(|r| r.again > 0), "{name}: no name of two files");
        let kinds: BTreeSet<u64> = table.files.iter().map(|f| f.1[0]).collect();
        assert_eq!(kinds, [0, 1, 2].into(), "{name}: kinds of files");
        verify_files(&golden(BASE), &golden(name), None, &run).unwrap();
        let out = dir.path().join(name);
        unpack_files(&golden(BASE), &golden(name), Destination::Path(&out), &run).unwrap();
        assert_eq!(sums(&out), want, "{name}");
    }
    assert_eq!(codecs.into_iter().collect::<Vec<_>>(), (0..CODECS.len() as u64).collect::<Vec<_>>());
    assert_eq!(encodings.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    // None, by its own name, by another one, parts without zeros and with, by its own name and that of its file.
    let all = [(0, false), (1, false), (2, false), (3, false), (3, true), (5, false)];
    assert_eq!(bases.into_iter().collect::<Vec<_>>(), all);
}

/// The bytes of the base that a row is a delta of, taken from the files by hand.
fn base_words(files: &BTreeMap<String, SafeTensors>, row: &Row) -> Vec<u8> {
    let tensor = |name: &str, file: Option<&String>| {
        let mut found = files.iter().filter(|(path, _)| file.is_none_or(|f| f == *path));
        found.find_map(|(_, f)| Some(f.read(f.find(name)?).unwrap())).unwrap()
    };
    if row.base != 3 {
        return tensor(row.base_name.as_ref().unwrap_or(&row.name), row.base_file.as_ref());
    }
    let part = |(name, file, at, bytes): &(Option<String>, Option<String>, u64, u64)| match name {
        Some(name) => tensor(name, file.as_ref())[*at as usize..][..*bytes as usize].to_vec(),
        None => vec![0; *bytes as usize],
    };
    row.parts.iter().flat_map(part).collect()
}

#[test]
fn a_golden_package_with_the_sha256_of_its_bases_is_trusted_by_them() {
    let open = |path: &str| (path.to_owned(), SafeTensors::open(&golden(BASE).join(path)).unwrap());
    let files: BTreeMap<_, _> = ["enc/model.safetensors", "unet/model.safetensors"].map(open).into();
    let (trusted, mut without) = (table(TRUSTED), table(FOLDERS[0].1));
    assert_eq!(trusted.flags, 1 | SUMS);
    let (mut codecs, mut bases) = (BTreeSet::new(), BTreeSet::new());
    for (row, plain) in trusted.rows.iter().zip(&mut without.rows) {
        if row.base > 0 {
            assert_eq!(row.sha256, Sha256::digest(base_words(&files, row))[..], "{}", row.name);
            codecs.insert(CODECS[row.codec as usize]);
            bases.insert(row.base);
        }
        plain.sha256.clone_from(&row.sha256);
    }
    assert!(codecs.contains("joint") && codecs.contains("unchanged") && codecs.len() > 2, "{codecs:?}");
    assert_eq!(bases, [1, 2, 3, 5].into());
    // Beside these, it is the package without.
    without.flags |= SUMS;
    assert_eq!(format!("{trusted:?}"), format!("{without:?}"));
    let run = Run { trust: Trust::Sha256, ..Run::default() };
    verify_files(&golden(BASE), &golden(TRUSTED), None, &run).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    unpack_files(&golden(BASE), &golden(TRUSTED), Destination::Path(&out), &run).unwrap();
    let want: BTreeMap<String, (String, bool)> =
        serde_json::from_slice(&fs::read(golden(SUMS_OF_FILES)).unwrap()).unwrap();
    assert_eq!(sums(&out), want);
    assert!(verify_files(&golden(BASE), &golden(FOLDERS[0].1), None, &run).is_err(), "trusted by nothing");
}

/// The base folder and the fine-tune: path of each file, and its tensors.
type Files = Vec<(&'static str, Vec<Tensor>)>;

fn folders(rng: &mut Rng) -> (Files, Files) {
    let t =
        |name: &str, dtype, dims: &[usize], bytes: &[u8]| (name.into(), dtype, dims.to_vec(), bytes.to_vec());
    let pair = |rng: &mut Rng, dtype: Dtype, words: usize| {
        let base = rng.weights(dtype, words);
        let ft = if dtype == Dtype::BF16 {
            stepped(rng, dtype, &base, 2e-5)
        } else {
            perturbed(rng, dtype, &base, 0.03)
        };
        (base, ft)
    };
    let (w0, ft0) = pair(rng, Dtype::BF16, 60 * 64);
    let (w1, ft1) = pair(rng, Dtype::BF16, 60 * 64);
    let (bias, ft_bias) = pair(rng, Dtype::F32, 60);
    let (norm, _) = pair(rng, Dtype::F32, 64);
    let (embed, ft_embed) = pair(rng, Dtype::F32, 50 * 32);
    let (experts, ft_experts) = pair(rng, Dtype::BF16, 3 * 48 * 32);
    let (renamed, ft_renamed) = pair(rng, Dtype::BF16, 70 * 32);
    let dense = rng.bytes(2 * 40 * 64);
    let grown = [&ft_embed[..], &rng.weights(Dtype::F32, 4 * 32)].concat();
    let mut unet = vec![t("w", "BF16", &[60, 64], &w1), t("embed", "F32", &[50, 32], &embed)];
    for (i, expert) in experts.chunks(2 * 48 * 32).enumerate() {
        unet.push(t(&format!("experts.{i}.up.weight"), "BF16", &[48, 32], expert));
    }
    unet.push(t("module.down.weight", "BF16", &[70, 32], &renamed));
    unet.push(t("norm", "F32", &[64], &norm));
    unet.push(t("dense", "F16", &[40, 64], &rng.bytes(2 * 40 * 64)));
    unet.push(t("gone", "U8", &[3], &[1, 2, 3]));
    let enc = vec![t("w", "BF16", &[60, 64], &w0), t("bias", "F32", &[60], &bias)];
    let first = vec![
        t("w", "BF16", &[60, 64], &ft1),
        t("embed", "F32", &[54, 32], &grown),
        t("experts.up.weight", "BF16", &[3, 48, 32], &ft_experts),
    ];
    let second = vec![
        t("down.weight", "BF16", &[70, 32], &ft_renamed),
        t("norm", "F32", &[64], &norm),
        t("dense", "F16", &[40, 64], &dense),
        t("tied", "F32", &[54, 32], &grown),
        t("scalar", "F64", &[], &[0, 0, 0, 0, 0, 0, 240, 63]),
        t("empty", "I64", &[0, 4], &[]),
        t("fp4", "F4", &[4, 4], &rng.bytes(8)),
    ];
    let ft_enc = vec![t("w", "BF16", &[60, 64], &ft0), t("bias", "F32", &[60], &ft_bias)];
    (
        vec![("enc/model.safetensors", enc), ("unet/model.safetensors", unet)],
        vec![
            ("enc/model.safetensors", ft_enc),
            ("unet/model-00001-of-00002.safetensors", first),
            ("unet/model-00002-of-00002.safetensors", second),
        ],
    )
}

fn write_folder(to: &Path, files: &Files) {
    for (path, tensors) in files {
        fs::create_dir_all(to.join(path).parent().unwrap()).unwrap();
        fs::write(to.join(path), safetensors(tensors)).unwrap();
    }
}

/// Writes what is missing, and only that: to be run once, when the version is frozen.
/// `cargo test --test package golden -- --ignored`.
#[test]
#[ignore = "writes golden files that are missing"]
fn write_missing_golden_tables() {
    let dir = tempfile::tempdir().unwrap();
    let (out, ft, run) = (dir.path().join("out"), dir.path().join("ft"), Run::default());
    let pack = |base: &Path, ft: &Path, prefer, codec, trust, name: &str| {
        let options = PackOptions { prefer, codec, trust, ..PackOptions::default() };
        pack_files(base, ft, Destination::Path(&out), &options, &run).unwrap();
        write_if_missing(name, &fs::read(&out).unwrap());
    };
    for (codec, prefer, name) in FILES {
        pack(&golden("base.safetensors"), &golden("ft.safetensors"), prefer, codec, Trust::Digest, name);
    }
    let (base, tuned) = folders(&mut Rng::new(20_262));
    if !golden(BASE).exists() {
        write_folder(&golden(BASE), &base);
    }
    write_folder(&ft, &tuned);
    fs::write(ft.join("empty"), b"").unwrap();
    fs::write(ft.join("config.json"), "{\"model_type\": \"llama\"}\n".repeat(9)).unwrap();
    fs::write(ft.join("run.sh"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(ft.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    write_if_missing(SUMS_OF_FILES, (serde_json::to_string_pretty(&sums(&ft)).unwrap() + "\n").as_bytes());
    for (codec, name) in FOLDERS {
        pack(&golden(BASE), &ft, Prefer::Memory, codec, Trust::Digest, name);
    }
    pack(&golden(BASE), &ft, Prefer::Memory, None, Trust::Sha256, TRUSTED);
}

fn write_if_missing(name: &str, bytes: &[u8]) {
    if !golden(name).exists() {
        fs::write(golden(name), bytes).unwrap();
    }
}
