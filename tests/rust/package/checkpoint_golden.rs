//! Promise: packages of folders written once give back the same files forever: every codec, encoding and group of dtypes, and
//! all that a folder can hold. The files in tests/golden are never regenerated.

use crate::common::data::{Rng, stepped, value, word};
use crate::common::disk::{Tensor, model, safetensors, tree};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use xorz::codec::{Encoding, Prefer};
use xorz::matrix::Dtype;
use xorz::package::{
    Codec, Destination, PackOptions, Package, Run, SafeTensors, pack_files, unpack_files, verify_files,
};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

const BASE: &str = "folder_base.safetensors";
const FILES: &str = "folder_files.json";
const CASES: [(Option<Codec>, Prefer, &str); 7] = [
    (None, Prefer::Speed, "v1_folder_speed.xorz"),
    (None, Prefer::Memory, "v1_folder_memory.xorz"),
    (Some(Codec::Xor), Prefer::Memory, "v1_folder_xor.xorz"),
    (Some(Codec::Planes), Prefer::Memory, "v1_folder_planes.xorz"),
    (Some(Codec::Resident), Prefer::Speed, "v1_folder_resident_speed.xorz"),
    (Some(Codec::Resident), Prefer::Memory, "v1_folder_resident_memory.xorz"),
    (Some(Codec::ResidentZstd), Prefer::Memory, "v1_folder_resident_zstd_memory.xorz"),
];

/// Path, sha256, and whether it may be executed, of every file below a folder.
fn sums(dir: &Path) -> BTreeMap<String, (String, bool)> {
    let sum = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    tree(dir).into_iter().map(|(path, (executable, bytes))| (path, (sum(&bytes), executable))).collect()
}

#[test]
fn golden_folders_are_given_back() {
    let text = fs::read(golden(FILES)).unwrap();
    let want: BTreeMap<String, (String, bool)> = serde_json::from_slice(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut codecs, mut kinds, mut gaps) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (_, _, name) in CASES {
        let (path, out) = (golden(name), dir.path().join(name));
        verify_files(&golden(BASE), &path, None, &Run::default()).unwrap();
        unpack_files(&golden(BASE), &path, Destination::Path(&out), &Run::default()).unwrap();
        assert_eq!(sums(&out), want, "{name}");
        let stored = SafeTensors::open(&path).unwrap();
        for e in Package::open(&path).unwrap().entries() {
            if e.codec == Codec::Resident && e.encoding == Some(Encoding::Sparse) {
                // SPEC.md of the resident delta: byte 14.
                gaps.insert(stored.read(stored.find(&e.name).unwrap()).unwrap()[14]);
            }
            codecs.insert(e.codec.name());
            kinds.extend(e.encoding.map(|x| (e.word_dtype().unwrap().word_bytes(), x.name())));
        }
    }
    assert_eq!(codecs.into_iter().collect::<Vec<_>>(), {
        // Packages of version 1 have no predicted tiles.
        let old = Codec::ALL.iter().filter(|c| **c != Codec::Predicted);
        let mut all: Vec<_> = old.map(|c| c.name()).collect();
        all.sort_unstable();
        all
    });
    assert_eq!(gaps.into_iter().collect::<Vec<_>>(), [1, 2], "bytes of a gap");
    for bytes in [1, 2, 4, 8] {
        for encoding in Encoding::ALL {
            assert!(
                kinds.contains(&(bytes, encoding.name())),
                "no golden {encoding:?} of {bytes}-byte words"
            );
        }
    }
}

/// Few words changed by small steps; most; all at random; none: each makes another encoding the best.
fn pair(rng: &mut Rng, dtype: Dtype, how: &str, words: usize) -> (Vec<u8>, Vec<u8>) {
    let w = dtype.word_bytes();
    let base = rng.weights(dtype, words);
    let floats = matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64);
    let step = |rng: &mut Rng, o: &[u8]| -> Vec<u8> {
        if floats && how == "few" {
            return word(dtype, value(dtype, o) * (1.0 + 0.02 * rng.normal()));
        }
        let bits = o.iter().rev().fold(0u64, |v, b| (v << 8) | u64::from(*b));
        bits.wrapping_add(1 + rng.next() % 2).to_le_bytes()[..w].to_vec()
    };
    let new = match how {
        "none" => base.clone(),
        "random" => rng.bytes(base.len()),
        "steps" if floats && w < 8 => stepped(rng, dtype, &base, 5e-5),
        _ => {
            let share = if how == "few" { 0.01 } else { 0.6 };
            base.chunks(w).flat_map(|o| if rng.unit() < share { step(rng, o) } else { o.to_vec() }).collect()
        }
    };
    (base, new)
}

/// Writes what is missing, and only that, in the version that this library writes: to be run once, when that is frozen.
/// `cargo test --test package golden -- --ignored`.
#[test]
#[ignore = "writes golden files that are missing"]
fn write_missing_golden_files() {
    let mut rng = Rng::new(20_261);
    let (mut base, mut ft): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
    let dtypes = ["BF16", "F16", "F32", "F64", "U8", "BOOL", "F8_E4M3", "I16", "U32", "I64"];
    for name in dtypes {
        let dtype = Dtype::from_name(name).unwrap();
        for how in ["few", "steps", "random", "none"] {
            let dims = if how == "random" { vec![9, 11] } else { vec![20, 96] };
            let words = dims.iter().product();
            // Random words do not compress: they are kept few.
            let (old, new) = pair(&mut rng, dtype, how, words);
            let tensor = format!("{name}.{how}");
            base.push((tensor.clone(), name, dims.clone(), old));
            ft.push((tensor, name, dims, new));
        }
    }
    // So few changes in so long rows that gaps of two bytes are the smaller ones.
    let long = rng.weights(Dtype::BF16, 16 * 2000);
    let mut sparse = long.clone();
    (0..16).for_each(|r| sparse[2 * (2000 * r + 97 * r + 5)] ^= 3);
    base.push(("long".into(), "BF16", vec![16, 2000], long));
    ft.push(("long".into(), "BF16", vec![16, 2000], sparse));
    let embed = rng.weights(Dtype::BF16, 64 * 64);
    let tuned = stepped(&mut rng, Dtype::BF16, &embed, 1e-5);
    let t =
        |name: &str, dtype, dims: &[usize], bytes: &[u8]| (name.into(), dtype, dims.to_vec(), bytes.to_vec());
    base.push(t("embed", "BF16", &[64, 64], &embed));
    base.push(t("gone", "U8", &[3], &[1, 2, 3]));
    ft.push(t("embed", "BF16", &[64, 64], &tuned));
    ft.push(t("tied", "BF16", &[64, 64], &tuned));
    ft.push(t("untied", "BF16", &[64, 64], &stepped(&mut rng, Dtype::BF16, &embed, 2e-5)));
    ft.push(t("scalar", "F32", &[], &[0, 0, 128, 63]));
    ft.push(t("nothing", "F32", &[0, 4], &[]));
    ft.push(t("fp4", "F4", &[4, 4], &rng.bytes(8)));
    ft.push(t("future", "E99", &[5], &rng.bytes(5)));
    write_if_missing(BASE, &safetensors(&base));
    let dir = tempfile::tempdir().unwrap();
    let (folder, out) = (dir.path().join("ft"), dir.path().join("p"));
    model(&folder, &ft, 3);
    fs::create_dir(folder.join("original")).unwrap();
    fs::write(folder.join("original/copy.safetensors"), safetensors(&ft[..2])).unwrap();
    fs::write(folder.join("empty"), b"").unwrap();
    fs::write(folder.join("tokenizer.txt"), "the and of\n".repeat(500)).unwrap();
    fs::write(folder.join("run.sh"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(folder.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    write_if_missing(FILES, (serde_json::to_string_pretty(&sums(&folder)).unwrap() + "\n").as_bytes());
    for (codec, prefer, name) in CASES {
        let options = PackOptions { prefer, codec, ..PackOptions::default() };
        let to = Destination::Path(&out);
        pack_files(&golden(BASE), &folder, to, &options, &Run::default()).unwrap();
        write_if_missing(&name.replacen("v1", "v2", 1), &fs::read(&out).unwrap());
    }
}

fn write_if_missing(name: &str, bytes: &[u8]) {
    if !golden(name).exists() {
        fs::write(golden(name), bytes).unwrap();
    }
}
