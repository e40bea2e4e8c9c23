//! Promise: the command line does the whole job without Python, says what went wrong in one line, and tells
//! scripts by its exit code; a killed run leaves no output and no other files in its way.

use crate::common::data::{Rng, perturbed};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use xorz::matrix::Dtype;

fn xorz(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xorz")).args(args).current_dir(dir).output().unwrap()
}

/// With `input` on standard input.
fn piped(dir: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xorz"));
    command.args(args).current_dir(dir).env("TMPDIR", dir.join("tmp"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // A run that refuses its arguments does not read.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().unwrap()
    })
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
fn fast_packages_hold_nothing_predicted_and_come_back() {
    let dir = folder(512 * 64);
    let d = dir.path();
    let packed = |to: &str, more: &[&str]| -> (Vec<String>, u64) {
        let args = [&["pack", "base", "ft", "-o", to, "--json"], more].concat();
        let value: serde_json::Value = serde_json::from_slice(&xorz(d, &args).stdout).unwrap();
        let codecs = value["codecs"].as_object().unwrap().keys().cloned().collect();
        (codecs, value["package_bytes"].as_u64().unwrap())
    };
    let (slow, smallest) = packed("p.xorz", &[]);
    let (fast, larger) = packed("q.xorz", &["--fast"]);
    assert!(slow.contains(&"predicted".to_owned()), "{slow:?}");
    assert!(!fast.contains(&"predicted".to_owned()), "{fast:?}");
    assert!(larger > smallest, "{larger} for {smallest}");
    let out = xorz(d, &["unpack", "base", "q.xorz", "-o", "out"]);
    assert!(out.status.success());
    assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("ft")).unwrap());
    let out = xorz(d, &["pack", "base", "ft", "-o", "r.xorz", "--fast", "--codec", "predicted"]);
    assert!(!out.status.success() && !d.join("r.xorz").exists());
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
        (2, "holds no .safetensors", &["pack", "folder", "ft", "-o", "q.xorz"]),
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
    // Of small tensors a package knows the first half of the digest.
    for (words, digits) in [(512 * 4, 16), (512 * 8, 32)] {
        let dir = folder(words);
        let d = dir.path();
        assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
        let text = complaint(&xorz(d, &["verify", "other", "p.xorz"]));
        let digests = text.split(|c: char| !c.is_ascii_hexdigit()).filter(|s| s.len() == digits);
        assert_eq!(digests.collect::<std::collections::HashSet<_>>().len(), 2, "{text}");
        assert!(text.contains("`layer.weight`"), "{text}");
    }
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
fn packages_and_files_go_through_pipes() {
    let dir = folder(512 * 64);
    let d = dir.path();
    fs::create_dir(d.join("tmp")).unwrap();
    let read = |name: &str| fs::read(d.join(name)).unwrap();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let (base, ft, package) = (read("base"), read("ft"), read("p.xorz"));

    let out = xorz(d, &["pack", "base", "ft", "-o", "-"]);
    assert!(out.status.success() && out.stdout == package, "{}", String::from_utf8_lossy(&out.stderr));
    let report = String::from_utf8(out.stderr).unwrap();
    assert!(report.starts_with("packed    to standard output\n") && report.contains("1 deltas"), "{report}");
    let out = xorz(d, &["pack", "base", "ft", "-o", "-", "--quiet"]);
    assert!(out.status.success() && out.stderr.is_empty() && out.stdout == package);
    let out = xorz(d, &["unpack", "base", "p.xorz", "-o", "-", "-q"]);
    assert!(out.status.success() && out.stderr.is_empty() && out.stdout == ft);

    let out = piped(d, &["unpack", "base", "-", "-o", "-", "-q"], &package);
    assert!(out.status.success() && out.stderr.is_empty() && out.stdout == ft);
    let out = piped(d, &["unpack", "-", "p.xorz", "-o", "out"], &base);
    assert!(out.status.success() && read("out") == ft, "{}", String::from_utf8_lossy(&out.stderr));
    for (args, input) in [
        (&["verify", "base", "-", "ft"][..], &package),
        (&["verify", "-", "p.xorz", "ft"], &base),
        (&["verify", "base", "p.xorz", "-"], &ft),
    ] {
        let out = piped(d, args, input);
        assert!(out.status.success() && stdout(&out).contains("equal the fine-tune given"), "{args:?}");
    }
    let out = piped(d, &["inspect", "-"], &package);
    assert!(stdout(&out).contains("from standard input") && stdout(&out).contains("layer.weight"));
    assert_eq!(piped(d, &["digest", "-"], &base).stdout, xorz(d, &["digest", "base"]).stdout);

    // The same bytes whatever way they came, but for the name of the file.
    let a = piped(d, &["pack", "base", "-", "-o", "-", "-q"], &ft);
    let b = piped(d, &["pack", "base", "-", "-o", "q.xorz", "-j", "1"], &ft);
    assert!(a.status.success() && b.status.success() && a.stdout == read("q.xorz"));
    assert!(stdout(&xorz(d, &["inspect", "q.xorz"])).contains("made from stdin.safetensors, "));
    assert_eq!(fs::read_dir(d.join("tmp")).unwrap().count(), 0, "something is left in TMPDIR");
}

#[test]
fn pipes_are_refused_in_words_where_they_cannot_be() {
    let dir = folder(512 * 4);
    let d = dir.path();
    fs::create_dir(d.join("tmp")).unwrap();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let package = fs::read(d.join("p.xorz")).unwrap();
    for (code, words, args, input) in [
        (2, "one standard input", &["pack", "-", "-", "-o", "q"][..], &b""[..]),
        (2, "--json", &["pack", "base", "ft", "-o", "-", "--json"], b""),
        (2, "--json", &["unpack", "base", "p.xorz", "-o", "-", "--json"], b""),
        (3, "standard input: 0 bytes", &["inspect", "-"], b""),
        (3, "standard input: ", &["verify", "base", "-"], &package[..package.len() - 1]),
        (3, "standard input: ", &["pack", "-", "ft", "-o", "q"], b"PK\x03\x04 pickled"),
        (1, "xorz digest BASE", &["verify", "other", "-"], &package),
        (4, "full", &["pack", "base", "ft", "-o", "full/q"], b""),
    ] {
        let out = piped(d, args, input);
        let text = complaint(&out);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(words) && !text.contains("/proc/"), "{args:?}: {text}");
        assert!(out.stdout.is_empty() && !d.join("q").exists(), "{args:?}");
    }
    let out = Command::new(env!("CARGO_BIN_EXE_xorz"))
        .args(["inspect", "-"])
        .env("TMPDIR", d.join("nowhere"))
        .stdin(fs::File::open(d.join("p.xorz")).unwrap())
        .output()
        .unwrap();
    let text = complaint(&out);
    assert!(out.status.code() == Some(4) && text.contains("set TMPDIR"), "{text}");
    // A reader that goes before it has all is told to the caller: half a package is no package.
    let big = folder(512 * 2048);
    let mut command = Command::new(env!("CARGO_BIN_EXE_xorz"));
    command.args(["unpack", "base", "p.xorz", "-o", "-"]).current_dir(big.path());
    assert!(xorz(big.path(), &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(4), "{}", complaint(&out));
}

#[test]
fn jobs_change_nothing_and_quiet_says_nothing() {
    let dir = folder(512 * 300);
    let d = dir.path();
    let mut packages = Vec::new();
    for jobs in ["1", "2", "5"] {
        let out = xorz(d, &["pack", "base", "ft", "-o", "p.xorz", "--quiet", "--jobs", jobs]);
        assert!(out.status.success() && out.stdout.is_empty() && out.stderr.is_empty());
        packages.push(fs::read(d.join("p.xorz")).unwrap());
        let out = xorz(d, &["verify", "base", "p.xorz", "ft", "-q", "-j", jobs]);
        assert!(out.status.success() && out.stdout.is_empty() && out.stderr.is_empty());
        let out = xorz(d, &["unpack", "base", "p.xorz", "-o", "out", "-q", "-j", jobs]);
        assert!(out.status.success() && out.stdout.is_empty() && out.stderr.is_empty());
        assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("ft")).unwrap());
    }
    assert!(packages.iter().all(|p| *p == packages[0]));
    // Quiet is no report, and no silence about what went wrong.
    let out = xorz(d, &["verify", "other", "p.xorz", "--quiet"]);
    assert!(out.status.code() == Some(1) && complaint(&out).contains("`layer.weight`"));
    assert!(!stdout(&xorz(d, &["pack", "base", "ft", "-o", "p.xorz", "--quiet", "--json"])).is_empty());
    for jobs in ["0", "-1", "two", "5000"] {
        assert_eq!(xorz(d, &["verify", "base", "p.xorz", "--jobs", jobs]).status.code(), Some(2), "{jobs}");
    }
}

#[test]
fn without_sha256_tensors_are_still_compared() {
    let dir = folder(512 * 64);
    let d = dir.path();
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let out = xorz(d, &["unpack", "base", "p.xorz", "-o", "out", "--no-sha256"]);
    assert!(out.status.success() && stdout(&out).contains("sha256 was not compared"), "{}", stdout(&out));
    assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("ft")).unwrap());
    let out = xorz(d, &["verify", "base", "p.xorz", "--no-sha256"]);
    assert!(out.status.success() && stdout(&out).contains("sha256 was not compared"), "{}", stdout(&out));
    assert_eq!(xorz(d, &["verify", "other", "p.xorz", "--no-sha256"]).status.code(), Some(1));
    assert_eq!(xorz(d, &["verify", "base", "p.xorz", "base", "--no-sha256"]).status.code(), Some(1));
    assert_eq!(xorz(d, &["pack", "base", "ft", "-o", "q", "--no-sha256"]).status.code(), Some(2));
}

#[test]
fn digests_are_those_that_the_package_wants() {
    let dir = folder(512 * 130);
    let d = dir.path();
    let cache = d.join("cache");
    let digest = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xorz"));
        command.arg("digest").args(args).current_dir(d).env("XORZ_CACHE_DIR", &cache).output().unwrap()
    };
    std::thread::sleep(Duration::from_millis(2100));
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    let inspected = xorz(d, &["inspect", "p.xorz", "--json"]).stdout;
    let inspected: serde_json::Value = serde_json::from_slice(&inspected).unwrap();
    let wanted = inspected["entries"][0]["base"].as_str().unwrap();
    for args in [&["base"][..], &["base", "--jobs", "1"]] {
        let out = digest(args);
        assert_eq!(
            stdout(&out),
            format!("{wanted}  layer.weight\n"),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        assert!(out.stderr.is_empty());
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1, "the digests are kept");
    }
    let json: serde_json::Value = serde_json::from_slice(&digest(&["base", "--json"]).stdout).unwrap();
    assert_eq!(json, serde_json::json!({"digests": {"layer.weight": wanted}}));
    assert_ne!(stdout(&digest(&["other"])), stdout(&digest(&["base"])));
    assert_eq!(digest(&["p.nothing"]).status.code(), Some(4));
    assert_eq!(digest(&["cache"]).status.code(), Some(2));
}

#[test]
fn completions_and_manual_know_every_verb_and_flag() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let verbs = ["pack", "unpack", "verify", "estimate", "inspect", "digest", "completions", "man"];
    for shell in ["bash", "zsh", "fish"] {
        let out = xorz(d, &["completions", shell]);
        let text = stdout(&out);
        assert!(out.status.success() && out.stderr.is_empty());
        for word in verbs.iter().chain(&["no-sha256", "strip-prefix", "jobs"]) {
            assert!(text.contains(word), "{shell} completes no {word}");
        }
        // Where the shell is installed, it takes the script.
        fs::write(d.join("script"), &text).unwrap();
        if let Ok(out) = Command::new(shell).args(["-n", "script"]).current_dir(d).output() {
            assert!(out.status.success(), "{shell}: {}", String::from_utf8_lossy(&out.stderr));
        }
    }
    assert_eq!(xorz(d, &["completions", "cmd"]).status.code(), Some(2));
    let page = stdout(&xorz(d, &["man"]));
    assert!(page.contains(".TH xorz 1") && page.contains("EXIT STATUS"), "{page}");
    for verb in verbs {
        assert!(page.contains(&format!(".SH \"XORZ {}\"", verb.to_uppercase())), "{verb}");
    }
    let out = xorz(d, &["man", "--dir", "."]);
    assert!(out.status.success() && out.stdout.is_empty() && out.stderr.is_empty());
    for verb in verbs {
        assert!(d.join(format!("xorz-{verb}.1")).exists(), "{verb}");
    }
    assert_eq!(xorz(d, &["man", "--dir", "no/where"]).status.code(), Some(4));
}

/// A folder as save_pretrained makes it: two shards, their index, a config; the base is sharded otherwise.
fn folders(d: &Path) {
    let mut rng = Rng::new(5);
    let words = 512 * 70;
    for folder in ["base", "ft", "ft/tokenizer"] {
        fs::create_dir(d.join(folder)).unwrap();
    }
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        let base = rng.weights(Dtype::BF16, words);
        let ft = perturbed(&mut rng, Dtype::BF16, &base, 0.02);
        write(d.join(format!("base/part-{}.safetensors", 9 - i)), name, words, &base);
        write(d.join(format!("ft/model-{i}.safetensors")), name, words, &ft);
    }
    let index = r#"{"weight_map":{"a":"model-0.safetensors","b":"model-1.safetensors"}}"#;
    fs::write(d.join("ft/model.safetensors.index.json"), index).unwrap();
    fs::write(d.join("ft/tokenizer/vocab.txt"), "a\nb\n").unwrap();
}

#[test]
fn a_folder_comes_back_as_the_same_folder_and_each_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    folders(d);
    let names =
        ["model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json", "tokenizer/vocab.txt"];
    let out = xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]);
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = stdout(&out);
    let lines: Vec<_> = text.lines().filter(|l| l.starts_with("sha256")).collect();
    assert_eq!(lines.len(), 4, "{text}");
    for name in names {
        assert!(lines.iter().any(|l| l.ends_with(&format!("  {name}"))), "{text}");
    }
    let inspected = stdout(&xorz(d, &["inspect", "p.xorz"]));
    assert_eq!(inspected.matches("made from").count(), 4, "{inspected}");
    assert_eq!(inspected.matches("carried along").count(), 2, "{inspected}");
    for jobs in ["1", "3"] {
        let target = format!("out{jobs}");
        let out = xorz(d, &["unpack", "base", "p.xorz", "-o", &target, "-j", jobs]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(stdout(&out).contains("exact: 4 files"), "{}", stdout(&out));
        for name in names {
            let (back, ft) = (fs::read(d.join(&target).join(name)), fs::read(d.join("ft").join(name)));
            assert!(back.unwrap() == ft.unwrap(), "{name}");
        }
    }
    let out = xorz(d, &["verify", "base", "p.xorz", "ft"]);
    assert!(stdout(&out).contains("sha256 of 4 files equal the fine-tune given"), "{}", stdout(&out));
    let json: serde_json::Value =
        serde_json::from_slice(&xorz(d, &["verify", "base", "p.xorz", "--json"]).stdout).unwrap();
    assert_eq!((&json["folder"], json["files"].as_array().unwrap().len()), (&true.into(), 4));
    // Byte for byte the same whatever the threads, and on a stream.
    assert!(xorz(d, &["pack", "base", "ft", "-o", "q.xorz", "-j", "1"]).status.success());
    let whole = fs::read(d.join("p.xorz")).unwrap();
    assert!(whole == fs::read(d.join("q.xorz")).unwrap());
    assert!(whole == xorz(d, &["pack", "base", "ft", "-o", "-", "-q"]).stdout);
    // The digests of the base's folder are those that the package wants.
    let text = stdout(&xorz(d, &["digest", "base"]));
    let inspected = String::from_utf8(xorz(d, &["inspect", "p.xorz", "--json"]).stdout).unwrap();
    assert_eq!(text.lines().count(), 2);
    assert!(text.lines().all(|l| inspected.contains(l.split(' ').next().unwrap())), "{text}");
}

#[test]
fn folders_are_refused_in_words_where_they_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    folders(d);
    assert!(xorz(d, &["pack", "base", "ft", "-o", "p.xorz"]).status.success());
    fs::create_dir(d.join("full")).unwrap();
    fs::write(d.join("full/precious"), "x").unwrap();
    fs::create_dir(d.join("pickled")).unwrap();
    fs::File::create(d.join("pickled/pytorch_model.bin")).unwrap().set_len(2 << 20).unwrap();
    for (code, words, args) in [
        (2, "full", &["unpack", "base", "p.xorz", "-o", "full"][..]),
        (3, "stream", &["unpack", "base", "p.xorz", "-o", "-"]),
        (3, "safe_serialization=True", &["pack", "base", "pickled", "-o", "q"]),
        (3, "safe_serialization=True", &["digest", "pickled"]),
        (1, "digest", &["unpack", "ft", "p.xorz", "-o", "out"]),
        (1, "", &["verify", "base", "p.xorz", "base"]),
    ] {
        let out = xorz(d, args);
        let text = complaint(&out);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(words) && out.stdout.is_empty(), "{args:?}: {text}");
        assert!(!d.join("q").exists() && !d.join("out").exists(), "{args:?}");
    }
    assert_eq!(fs::read_dir(d.join("full")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(d).unwrap().count(), 5, "something is left beside");
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
