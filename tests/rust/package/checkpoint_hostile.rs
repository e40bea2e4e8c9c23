//! Promise: whatever a folder or a package made from one holds, packing and unpacking name the file that is wrong, write
//! nothing outside the output, and leave nothing behind; no crash, no hang, nothing allocated on a number alone.

use crate::common::data::Rng;
use crate::common::disk::{complaint, done, matrices, model, names, refused, safetensors, tree, xorz};
use crate::common::forge::Forge;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use xorz::error::Kind;
use xorz::package::{Destination, PackOptions, Package, Run, pack_files, unpack_files, verify_files};

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00002-of-00002.safetensors";

/// `base` and `ft` (folders of two shards), a folder `other` of another model, and `outside`, which nobody is to touch.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(61, 4, 64, 200);
    model(&d.join("base"), &base, 2);
    model(&d.join("ft"), &ft, 2);
    let other: Vec<_> = matrices(62, 4, 48, 100)
        .0
        .into_iter()
        .map(|mut t| {
            t.0 = t.0.replace("layers", "blocks");
            t
        })
        .collect();
    model(&d.join("other"), &other, 2);
    fs::write(d.join("outside.safetensors"), safetensors(&ft)).unwrap();
    dir
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    names(from).iter().for_each(|n| assert!(fs::copy(from.join(n), to.join(n)).is_ok()));
}

/// What is done to a copy of the fine-tune, the exit code, and words of the complaint.
type Case = (&'static str, fn(&Path), i32, &'static [&'static str]);

fn edit_index(ft: &Path, edit: impl Fn(&mut serde_json::Value)) {
    let mut index: serde_json::Value = serde_json::from_slice(&fs::read(ft.join(INDEX)).unwrap()).unwrap();
    edit(&mut index);
    fs::write(ft.join(INDEX), index.to_string()).unwrap();
}

const CASES: &[Case] = &[
    ("a shard is missing", |f| fs::remove_file(f.join(SHARD)).unwrap(), 1, &[INDEX, SHARD]),
    (
        "a shard is from another model",
        |f| assert!(fs::copy(f.join("../other").join(SHARD), f.join(SHARD)).is_ok()),
        1,
        &[INDEX, SHARD, "model.layers."],
    ),
    (
        "the shards are swapped",
        |f| {
            let first = f.join("model-00001-of-00002.safetensors");
            fs::rename(f.join(SHARD), f.join("x")).unwrap();
            fs::rename(&first, f.join(SHARD)).unwrap();
            fs::rename(f.join("x"), first).unwrap();
        },
        1,
        &[INDEX, "model.layers."],
    ),
    (
        "a shard is cut",
        |f| fs::OpenOptions::new().write(true).open(f.join(SHARD)).unwrap().set_len(5000).unwrap(),
        3,
        &[SHARD],
    ),
    ("a shard is empty", |f| fs::write(f.join(SHARD), b"").unwrap(), 3, &[SHARD]),
    (
        "a shard is a pickle",
        |f| fs::write(f.join(SHARD), b"PK\x03\x04 pickled").unwrap(),
        3,
        &[SHARD, "pickled"],
    ),
    (
        "a shard waits for git-lfs",
        |f| {
            fs::write(f.join(SHARD), "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
                .unwrap()
        },
        3,
        &[SHARD],
    ),
    (
        "the index names a shard outside",
        |f| edit_index(f, |i| i["weight_map"]["model.layers.0.weight"] = "../outside.safetensors".into()),
        1,
        &[INDEX, "outside.safetensors"],
    ),
    (
        "the index names a shard anywhere",
        |f| edit_index(f, |i| i["weight_map"]["model.layers.0.weight"] = "/etc/passwd".into()),
        1,
        &[INDEX, "/etc/passwd"],
    ),
    (
        "the index names a tensor that is nowhere",
        |f| edit_index(f, |i| i["weight_map"]["nowhere"] = SHARD.into()),
        1,
        &[INDEX, "nowhere", SHARD],
    ),
    (
        "the index says another shard",
        |f| edit_index(f, |i| i["weight_map"]["model.layers.0.weight"] = SHARD.into()),
        1,
        &[INDEX, "model.layers.0.weight", SHARD],
    ),
    ("the index is no JSON", |f| fs::write(f.join(INDEX), b"{").unwrap(), 3, &[INDEX]),
    (
        "the index is JSON of something else",
        |f| fs::write(f.join(INDEX), br#"{"weight_map": [1]}"#).unwrap(),
        3,
        &[INDEX],
    ),
    ("the index is deep", |f| fs::write(f.join(INDEX), "[".repeat(1 << 20)).unwrap(), 3, &[INDEX]),
    (
        "the index is huge",
        |f| fs::OpenOptions::new().write(true).open(f.join(INDEX)).unwrap().set_len(1 << 40).unwrap(),
        3,
        &[INDEX],
    ),
    (
        "weights are pickled",
        |f| fs::write(f.join("pytorch_model.bin"), vec![0; 2 << 20]).unwrap(),
        3,
        &["pytorch_model.bin", "safe_serialization"],
    ),
    (
        "there is nothing but pickled weights",
        |f| {
            names(f).iter().for_each(|n| fs::remove_file(f.join(n)).unwrap());
            fs::write(f.join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
        },
        3,
        &["pytorch_model.bin", "safetensors"],
    ),
    ("a link leads to a folder", |f| symlink("../other", f.join("link")).unwrap(), 3, &["link"]),
    ("a link leads to itself", |f| symlink("loop", f.join("loop")).unwrap(), 4, &["loop"]),
    ("a link leads up", |f| symlink("..", f.join("up")).unwrap(), 3, &["up"]),
    ("a link leads nowhere", |f| symlink("nowhere", f.join("dangling")).unwrap(), 4, &["dangling"]),
    (
        "a name is not UTF-8",
        |f| fs::write(f.join(OsStr::from_bytes(b"bad\xff")), b"").unwrap(),
        3,
        &["bad", "UTF-8"],
    ),
    (
        "folders are nested without end",
        |f| fs::create_dir_all(f.join("n/".repeat(60))).unwrap(),
        3,
        &["nested"],
    ),
    (
        "there is a pipe",
        |f| assert!(std::process::Command::new("mkfifo").arg(f.join("pipe")).status().unwrap().success()),
        3,
        &["pipe"],
    ),
];

#[test]
fn folders_that_are_not_whole_are_refused_naming_the_file() {
    let dir = folder();
    let d = dir.path();
    let before = names(d);
    for (what, harm, code, words) in CASES {
        copy(&d.join("ft"), &d.join("bad"));
        harm(&d.join("bad"));
        println!("{what}");
        refused(d, &["pack", "base", "bad", "-o", "q"], *code, words);
        let _ = fs::remove_dir_all(d.join("bad"));
        assert_eq!(names(d), before, "{what}");
    }
}

#[test]
fn bases_are_refused_for_their_weights_only() {
    let dir = folder();
    let d = dir.path();
    for (what, harm, _, words) in CASES {
        copy(&d.join("base"), &d.join("bad"));
        harm(&d.join("bad"));
        let out = xorz(d, &["pack", "bad", "ft", "-o", "q"]);
        if !out.status.success() {
            let text = complaint(&out);
            assert!(matches!(out.status.code(), Some(1..=4)), "{what}: {text}");
            words.iter().for_each(|w| assert!(text.contains(w), "{what}: {text}"));
        }
        fs::remove_dir_all(d.join("bad")).unwrap();
        let _ = fs::remove_file(d.join("q"));
    }
    // Names that no package could hold are no matter in a base.
    fs::write(d.join("base").join(OsStr::from_bytes(b"bad\xff")), b"").unwrap();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "q"]).status.success());
}

#[test]
fn what_is_only_strange_comes_back() {
    let dir = folder();
    let d = dir.path();
    let ft = d.join("ft");
    // Links to files, as caches lay them out, come back as the files they lead to. (Names that a terminal would obey are refused:
    // `hostile_names.rs`.)
    fs::rename(ft.join(SHARD), d.join("blob")).unwrap();
    symlink("../blob", ft.join(SHARD)).unwrap();
    fs::write(ft.join(" two  words; $(x) "), b"x").unwrap();
    fs::write(ft.join("..."), b"dots").unwrap();
    fs::write(ft.join("xorz:file:0"), b"reserved?").unwrap();
    // The same tensor in two shards: both are weights, both come back.
    fs::copy(d.join("outside.safetensors"), ft.join("twice.safetensors")).unwrap();
    fs::write(ft.join("small.bin"), b"settings, pickled, never opened").unwrap();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    done(d, &["unpack", "base", "p", "-o", "out"]);
    assert!(tree(&d.join("out")) == tree(&ft));
    assert!(!fs::symlink_metadata(d.join("out").join(SHARD)).unwrap().is_symlink());
}

#[test]
fn packages_of_folders_are_refused_for_another_base() {
    let dir = folder();
    let d = dir.path();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    let unpack = |base: &str, words: &[&str]| {
        refused(d, &["unpack", base, "p", "-o", "out"], 1, words);
        refused(d, &["verify", base, "p"], 1, words);
        assert!(names(d).iter().all(|n| n != "out" && !n.starts_with('.')), "{:?}", names(d));
    };
    unpack("other", &["model.layers.", "has no tensor"]);
    unpack("ft", &["model.layers.", "digest"]);
    copy(&d.join("base"), &d.join("half"));
    fs::remove_file(d.join("half").join(INDEX)).unwrap();
    fs::remove_file(d.join("half").join(SHARD)).unwrap();
    unpack("half", &["model.layers.", "has no tensor"]);
    // One shard of the fine-tune in the place of the base's.
    copy(&d.join("base"), &d.join("mixed"));
    fs::copy(d.join("ft").join(SHARD), d.join("mixed").join(SHARD)).unwrap();
    unpack("mixed", &["model.layers.", "digest"]);
    refused(d, &["unpack", "base", "p", "-o", "-"], 3, &["folder"]);
    // A fine-tune that is not the one that was packed.
    refused(d, &["verify", "base", "p", "base"], 1, &["model.layers."]);
    refused(d, &["verify", "base", "p", "other"], 1, &["model."]);
    fs::write(d.join("ft/config.json"), b"{}").unwrap();
    refused(d, &["verify", "base", "p", "ft"], 1, &["config.json"]);
    fs::remove_file(d.join("ft/config.json")).unwrap();
    refused(d, &["verify", "base", "p", "ft"], 1, &["config.json"]);
}

fn packed(d: &Path) -> Vec<u8> {
    let options = PackOptions::default();
    pack_files(&d.join("base"), &d.join("ft"), Destination::Path(&d.join("p")), &options, &Run::default())
        .unwrap();
    fs::read(d.join("p")).unwrap()
}

/// The package with `edit` done to its list of files; `None` where no package can say such a thing.
fn with_files(forge: &Forge, edit: impl Fn(&mut Vec<serde_json::Value>)) -> Option<Vec<u8>> {
    let mut forge = forge.clone();
    let mut files = serde_json::from_str(&forge.metadata["xorz:files"]).unwrap();
    edit(&mut files);
    forge.metadata.insert("xorz:files".into(), serde_json::to_string(&files).unwrap());
    forge.try_build()
}

/// Unpacking `bytes` must fail, into nothing.
fn never(d: &Path, what: &str, bytes: &Option<Vec<u8>>, before: &[String]) {
    let Some(bytes) = bytes else { return };
    fs::write(d.join("p"), bytes).unwrap();
    let run = Run::default();
    let e = unpack_files(&d.join("base"), &d.join("p"), Destination::Path(&d.join("deep/er/out")), &run)
        .unwrap_err();
    assert!(
        matches!(e.kind(), Kind::Corrupt | Kind::Truncated | Kind::Mismatch | Kind::Unsupported),
        "{what}: {e}"
    );
    verify_files(&d.join("base"), &d.join("p"), None, &run).unwrap_err();
    assert_eq!(names(d), before, "{what}");
    assert_eq!(names(&d.join("deep")), ["er"], "{what}");
    assert_eq!(names(&d.join("deep/er")), [""; 0], "{what}");
}

#[test]
fn packages_cannot_write_outside_of_the_output() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir_all(d.join("deep/er")).unwrap();
    let good = packed(d);
    let (before, forge) = (names(d), Forge::of(&good));
    let count = Package::parse(good.clone()).unwrap().files().len();
    let long = "x".repeat(300);
    let many = "a/".repeat(4000) + "b";
    for path in [
        "",
        "/",
        ".",
        "..",
        "../x",
        "../../x",
        "a/../../../x",
        "/tmp/x",
        "//x",
        "a//b",
        "a/./b",
        "a/..",
        "a/",
        "./x",
        "x\0y",
        "deep/\0",
        &long,
        &many,
    ] {
        for i in 0..count {
            never(
                d,
                &format!("file {i} called {path:?}"),
                &with_files(&forge, |f| f[i]["path"] = path.into()),
                &before,
            );
        }
    }
    for i in 1..count {
        let twice = with_files(&forge, |f| f[i]["path"] = f[0]["path"].clone());
        never(d, "two files of one name", &twice, &before);
        let under =
            with_files(&forge, |f| f[i]["path"] = format!("{}/x", f[0]["path"].as_str().unwrap()).into());
        never(d, "a file in another file", &under, &before);
        let over =
            with_files(&forge, |f| f[0]["path"] = format!("{}/x", f[i]["path"].as_str().unwrap()).into());
        never(d, "a file in a later file", &over, &before);
    }
}

#[test]
fn lists_of_files_that_lie_are_refused() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir_all(d.join("deep/er")).unwrap();
    let good = packed(d);
    let (before, forge) = (names(d), Forge::of(&good));
    let count = Package::parse(good).unwrap().files().len();
    for i in 0..count {
        for field in ["sha256", "bytes", "header_bytes", "check", "executable", "path", "unknown"] {
            for value in [
                serde_json::json!(null),
                serde_json::json!(0),
                serde_json::json!(1),
                serde_json::json!(u64::MAX),
                serde_json::json!(1u64 << 50),
                serde_json::json!(-1),
                serde_json::json!("0123456789abcdef0123456789abcdef"),
                serde_json::json!([]),
            ] {
                // A path is any string, and a file that was carried has no header in any case.
                let fine =
                    (field == "path" && value.is_string()) || (field == "header_bytes" && value.is_null());
                if !fine {
                    let bad = with_files(&forge, |f| f[i][field] = value.clone());
                    never(d, &format!("file {i}: {field} = {value}"), &bad, &before);
                }
            }
        }
        never(d, "a file is left out", &with_files(&forge, |f| drop(f.remove(i))), &before);
        never(d, "a file is listed twice", &with_files(&forge, |f| f.push(f[i].clone())), &before);
        if i > 0 {
            never(d, "files are swapped", &with_files(&forge, |f| f.swap(0, i)), &before);
        }
        let mut cut = forge.clone();
        cut.entries.iter_mut().filter(|e| e.0 == format!("xorz:file:{i}")).for_each(|e| e.1.truncate(3));
        never(d, "a stored file is cut", &cut.try_build(), &before);
    }
    for source in ["", "file", "Folder"] {
        let mut forge = forge.clone();
        forge.metadata.insert("xorz:source".into(), source.into());
        never(d, "made from something unknown", &forge.try_build(), &before);
    }
    let mut single = forge;
    single.metadata.remove("xorz:source");
    never(d, "many files, but no folder", &single.try_build(), &before);
}

#[test]
fn damage_anywhere_is_found_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(63, 2, 8, 64);
    model(&d.join("base"), &base, 2);
    model(&d.join("ft"), &ft, 2);
    let good = packed(d);
    let want = tree(&d.join("ft"));
    let mut rng = Rng::new(64);
    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 1 << (rng.next() % 8);
        fs::write(d.join("bad"), &bad).unwrap();
        let verified =
            verify_files(&d.join("base"), &d.join("bad"), None, &Run { jobs: 1, ..Run::default() });
        if verified.is_err() && !i.is_multiple_of(29) {
            continue;
        }
        let out = d.join("out");
        match unpack_files(&d.join("base"), &d.join("bad"), Destination::Path(&out), &Run::default()) {
            Ok(_) => assert!(verified.is_ok() && tree(&out) == want, "byte {i}: something else came out"),
            Err(_) => assert!(verified.is_err() && !out.exists(), "byte {i}: an error, and yet a folder"),
        }
        let _ = fs::remove_dir_all(out);
    }
    assert_eq!(names(d), ["bad", "base", "ft", "p"]);
}
