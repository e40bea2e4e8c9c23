//! Promise: the command line does the whole job without Python, says what went wrong in one line, and tells scripts by its
//! exit code; a killed run leaves no output and no other files in its way.

mod common;

use common::{Rng, perturbed};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use xorz::matrix::Dtype;

fn xorz(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xorz")).args(args).current_dir(dir).output().unwrap()
}

fn stdout(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// The one line on standard error.
fn complaint(out: &Output) -> String {
    let text = String::from_utf8(out.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("xorz: "), "{text}");
    text
}

fn write(path: PathBuf, name: &str, words: usize, bytes: &[u8]) {
    let header = format!(
        r#"{{"{name}":{{"dtype":"BF16","shape":[{}, 512],"data_offsets":[0,{}]}}}}"#,
        words / 512,
        bytes.len()
    );
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()).unwrap();
}

/// A folder with `base`, `ft` and another base, `other`.
fn folder(words: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(11);
    let base = rng.weights(Dtype::BF16, words);
    let ft = perturbed(&mut rng, Dtype::BF16, &base, 0.01);
    write(dir.path().join("base"), "layer.weight", words, &base);
    write(dir.path().join("ft"), "layer.weight", words, &ft);
    write(dir.path().join("other"), "layer.weight", words, &ft);
    dir
}

#[test]
fn the_whole_job() {
    let dir = folder(512 * 64);
    let d = dir.path();
    for extra in
        [&[][..], &["--prefer", "speed"], &["--codec", "planes"], &["--codec", "xor", "--level", "19"]]
    {
        let out = xorz(d, &[&["pack", "base", "ft", "-o", "p.xorz"], extra].concat());
        assert!(out.status.success(), "{}", complaint(&out));
        assert!(out.stderr.is_empty());
        let text = stdout(&out);
        assert!(
            text.contains("p.xorz") && text.contains("1 deltas") && text.contains("of 32768 words"),
            "{text}"
        );
        let out = xorz(d, &["verify", "base", "p.xorz", "ft"]);
        assert!(
            out.status.success() && stdout(&out).contains("equal the fine-tune given"),
            "{}",
            stdout(&out)
        );
        let out = xorz(d, &["unpack", "base", "p.xorz", "-o", "out"]);
        assert!(out.status.success() && stdout(&out).contains("exact"), "{}", stdout(&out));
        assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("ft")).unwrap());
        let out = xorz(d, &["inspect", "p.xorz"]);
        let text = stdout(&out);
        assert!(
            text.contains("layer.weight") && text.contains("[64, 512]") && text.contains("BF16"),
            "{text}"
        );
    }
}

#[test]
fn json_is_one_object_with_the_same_numbers() {
    let dir = folder(512 * 64);
    let d = dir.path();
    let mut seen = Vec::new();
    for args in [
        &["pack", "base", "ft", "-o", "p.xorz", "--json"][..],
        &["verify", "base", "p.xorz", "--json"],
        &["unpack", "base", "p.xorz", "-o", "out", "--json"],
        &["inspect", "p.xorz", "--json"],
    ] {
        let out = xorz(d, args);
        let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(value["package_bytes"], fs::metadata(d.join("p.xorz")).unwrap().len());
        assert_eq!(
            (&value["tensors"], &value["words"], &value["tensor_bytes"]),
            (&1.into(), &32768.into(), &65536.into())
        );
        seen.push(value);
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
    let entry = &seen[3]["entries"][0];
    assert_eq!((&entry["name"], &entry["shape"]), (&"layer.weight".into(), &serde_json::json!([64, 512])));
    assert_eq!(entry["changed"], seen[0]["changed"]);
}

#[test]
fn exit_codes_tell_what_kind_of_thing_went_wrong() {
    let dir = folder(512 * 4);
    let d = dir.path();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let package = fs::read(d.join("p.xorz")).unwrap();
    fs::write(d.join("cut"), &package[..package.len() - 1]).unwrap();
    let mut bad = package.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(d.join("flipped"), bad).unwrap();
    fs::write(d.join("model.bin"), b"PK\x03\x04 a pickled checkpoint").unwrap();
    fs::create_dir(d.join("folder")).unwrap();
    for (code, words, args) in [
        (1, "digest", &["unpack", "other", "p.xorz", "-o", "out"][..]),
        (1, "digest", &["verify", "other", "p.xorz"]),
        (1, "layer.weight", &["verify", "base", "p.xorz", "base"]),
        (2, "overwrite", &["pack", "base", "ft", "-o", "base"]),
        (2, "directory", &["pack", "folder", "ft", "-o", "q.xorz"]),
        (2, "directory", &["pack", "base", "ft", "-o", "folder"]),
        (3, "cut", &["verify", "base", "cut"]),
        (3, "flipped", &["verify", "base", "flipped"]),
        (3, "not a xorz package", &["inspect", "base"]),
        (3, "pickled", &["pack", "base", "model.bin", "-o", "q.xorz"]),
        (4, "missing", &["inspect", "missing"]),
        (4, "no/where", &["pack", "base", "ft", "-o", "no/where"]),
    ] {
        let out = xorz(d, args);
        let text = complaint(&out);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(words), "{args:?}: {text}");
        assert!(out.stdout.is_empty(), "{args:?}");
    }
    for args in
        [&["pack", "base"][..], &["frobnicate"], &[], &["pack", "base", "ft", "-o", "q", "--codec", "alone"]]
    {
        assert_eq!(xorz(d, args).status.code(), Some(2), "{args:?}");
    }
    let mut left: Vec<_> = fs::read_dir(d).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["base", "cut", "flipped", "folder", "ft", "model.bin", "other", "p.xorz"]);
}

#[test]
fn another_base_is_refused_naming_the_tensor_and_both_digests() {
    let dir = folder(512 * 4);
    let d = dir.path();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let text = complaint(&xorz(d, &["verify", "other", "p.xorz"]));
    let digests = text.split(|c: char| !c.is_ascii_hexdigit()).filter(|s| s.len() == 32);
    assert_eq!(digests.collect::<std::collections::HashSet<_>>().len(), 2, "{text}");
    assert!(text.contains("`layer.weight`"), "{text}");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let dir = folder(512 * 4);
    let d = dir.path();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let mut command = Command::new(env!("CARGO_BIN_EXE_xorz"));
    command.args(["inspect", "p.xorz"]).current_dir(d).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn names_from_a_file_cannot_control_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    write(d.join("base"), "w\\u001b[31m\\n", 512, &[0; 1024]);
    write(d.join("ft"), "w\\u001b[31m\\n", 512, &[1; 1024]);
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    assert!(!stdout(&xorz(d, &["inspect", "p.xorz"])).contains('\u{1b}'));
    assert!(!complaint(&xorz(d, &["verify", "ft", "p.xorz"])).contains('\u{1b}'));
}

#[test]
fn a_killed_run_leaves_the_old_file_or_the_new_one() {
    let dir = folder(512 * 8192);
    let d = dir.path();
    let pack = ["pack", "base", "ft", "-o", "p.xorz"];
    let unpack = ["unpack", "base", "whole.xorz", "-o", "out"];
    let start = std::time::Instant::now();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "whole.xorz"]).status.success());
    let (whole, took) = (fs::read(d.join("whole.xorz")).unwrap(), start.elapsed());
    let ft = fs::read(d.join("ft")).unwrap();
    let mut interrupted = 0;
    for round in 0..12 {
        for (args, name, new) in [(&pack, "p.xorz", &whole), (&unpack, "out", &ft)] {
            fs::write(d.join(name), b"old").unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_xorz"));
            command.args(args).current_dir(d).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(Duration::from_secs_f64(took.as_secs_f64() * f64::from(round) / 12.0));
            child.kill().unwrap();
            child.wait().unwrap();
            let found = fs::read(d.join(name)).unwrap();
            assert!(found == b"old" || found == *new, "round {round}: {name} is {} bytes", found.len());
            interrupted += usize::from(found == b"old");
        }
    }
    assert!(interrupted > 0, "no run was killed in time");
}
