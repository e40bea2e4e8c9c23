//! Promise: every error that a newcomer meets says in one line what is wrong and what to do, and ends with
//! its exit code.

use crate::common::data::{Rng, perturbed};
use crate::common::disk::{command, complaint, done, refused, run, safetensors, xorz};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use xorz::matrix::Dtype;

/// `base`, its fine-tune `ft` and its package `p`; `other` is another base.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    fs::set_permissions(d, fs::Permissions::from_mode(0o755)).unwrap();
    let mut rng = Rng::new(15);
    let base = rng.weights(Dtype::BF16, 128 * 128);
    let ft = perturbed(&mut rng, Dtype::BF16, &base, 0.02);
    let other = rng.weights(Dtype::BF16, 128 * 128);
    for (name, words) in [("base", base), ("ft", ft), ("other", other)] {
        one(d, name, "w", "BF16", words);
    }
    done(d, &["pack", "base", "ft", "-o", "p"]);
    dir
}

/// A file with one square tensor.
fn one(d: &Path, file: &str, name: &str, dtype: &'static str, words: Vec<u8>) {
    let width = Dtype::from_name(dtype).unwrap().word_bytes();
    let side = (words.len() / width).isqrt();
    fs::write(d.join(file), safetensors(&[(name.into(), dtype, vec![side, side], words)])).unwrap();
}

#[test]
fn no_base() {
    let dir = folder();
    let d = dir.path();
    refused(d, &["pack", "nothing", "ft", "-o", "q"], 4, &["nothing: No such file", "check the path"]);
    refused(d, &["unpack", "nothing", "p", "-o", "q"], 4, &["nothing: No such file", "check the path"]);
    let hub = [
        "meta-llama/Llama-3.2-1B: No such file",
        "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B",
    ];
    refused(d, &["pack", "meta-llama/Llama-3.2-1B", "ft", "-o", "q"], 4, &hub);
    fs::create_dir(d.join("empty")).unwrap();
    refused(
        d,
        &["pack", "empty", "ft", "-o", "q"],
        2,
        &["empty: holds no .safetensors file", "save_pretrained"],
    );
    refused(
        d,
        &["pack", "p", "ft", "-o", "q"],
        2,
        &["p: is a xorz package, not a checkpoint", "xorz unpack"],
    );
    refused(
        d,
        &["pack", "base", "p", "-o", "q"],
        2,
        &["p: is a xorz package, not a checkpoint", "xorz unpack"],
    );
}

#[test]
fn wrong_base() {
    let dir = folder();
    let d = dir.path();
    for verb in [&["unpack", "other", "p", "-o", "q"][..], &["verify", "other", "p"]] {
        refused(d, verb, 1, &["`w`", "give the base that it was packed against", "xorz digest BASE"]);
    }
    one(d, "names", "v", "BF16", vec![0; 128 * 256]);
    refused(
        d,
        &["unpack", "names", "p", "-o", "q"],
        1,
        &["no tensor `w`", "give the base that it was packed against"],
    );
    // Digests are spoken of where they tell the bases apart, and not because a name sounds like it.
    one(d, "named", "digest", "BF16", vec![1; 128 * 256]);
    one(d, "empty", "digest", "BF16", vec![0; 128 * 256]);
    done(d, &["pack", "empty", "named", "-o", "r"]);
    let out = xorz(d, &["unpack", "names", "r", "-o", "q"]);
    let text = complaint(&out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.contains("no tensor `digest`") && !text.contains("xorz digest BASE"), "{text}");
    refused(d, &["unpack", "p", "base", "-o", "q"], 2, &["p: is a xorz package, not a checkpoint"]);
    refused(d, &["inspect", "base"], 3, &["not a xorz package", "`xorz pack BASE FINE_TUNED` makes one"]);
    // A package is made, and its maker told that it is none worth having.
    for (base, words) in [
        ("names", "the base has no tensor `w`; is it this fine-tune's base?"),
        ("small", "[128, 128] in the fine-tune"),
    ] {
        one(d, "small", "w", "BF16", vec![0; 64 * 128]);
        let text = done(d, &["pack", base, "ft", "-o", "q"]);
        assert!(
            text.contains("note      100 % of the fine-tune's bytes are stored alone")
                && text.contains(words),
            "{text}"
        );
    }
    assert!(!done(d, &["pack", "base", "ft", "-o", "q"]).contains("note"));
}

#[test]
fn wrong_dtype() {
    let dir = folder();
    let d = dir.path();
    one(d, "wide", "w", "F32", vec![0; 128 * 128 * 4]);
    let kind = [
        "a delta of BF16 [128, 128], but the base has F32 [128, 128]",
        "in the dtype that it was packed against",
    ];
    refused(d, &["unpack", "wide", "p", "-o", "q"], 1, &kind);
    let text = done(d, &["pack", "wide", "ft", "-o", "q"]);
    assert!(
        text.contains("`w` is BF16 in the fine-tune, but F32 in the base; save both in one dtype"),
        "{text}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&done(d, &["pack", "wide", "ft", "-o", "q", "--json"])).unwrap();
    assert!(json["advice"].as_str().unwrap().contains("save both in one dtype"));
}

#[test]
fn not_safetensors() {
    let dir = folder();
    let d = dir.path();
    let base = fs::read(d.join("base")).unwrap();
    let files: [(&str, &[u8], i32, &[&str]); 9] = [
        ("model.bin", b"PK\x03\x04 and so on", 3, &["holds pickled weights", "safetensors.torch.save_file"]),
        ("zip", b"PK\x03\x04 and so on", 3, &["pickled", "save it with safetensors.torch.save_file"]),
        ("old", b"\x80\x02}q\x00(X\x01\x00\x00", 3, &["pickled", "save it with safetensors.torch.save_file"]),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\n", 3, &["Git LFS pointer", "git lfs pull"]),
        ("page", b"<!DOCTYPE html><html>Not found</html>", 3, &["web page", "download the file itself"]),
        ("gguf", b"GGUF\x03\x00\x00\x00 and so on", 3, &["GGUF", "take the model's .safetensors files"]),
        ("text", b"hello, this is no model", 3, &["no safetensors file?", "save_pretrained"]),
        ("empty", b"", 3, &["0 bytes", "fetch or write it again"]),
        ("cut", &base[..1000], 3, &["the file was cut", "fetch or write it again"]),
    ];
    for (name, bytes, code, words) in files {
        fs::write(d.join(name), bytes).unwrap();
        for args in [["pack", name, "ft", "-o", "q"], ["pack", "base", name, "-o", "q"]] {
            refused(d, &args, code, &[words, &[name]].concat());
        }
        refused(d, &["estimate", "base", name], code, words);
    }
}

#[test]
fn no_space() {
    let dir = folder();
    let d = dir.path();
    for verb in ["pack base other -o q", "unpack base p -o q", "inspect p --html q"] {
        let mut c = std::process::Command::new("sh");
        let script = format!("trap '' XFSZ; ulimit -f 2; exec $XORZ {verb} 2>&1 1>/dev/null | cat");
        c.args(["-c", &script])
            .current_dir(d)
            .env("XORZ", env!("CARGO_BIN_EXE_xorz"))
            .env("XORZ_CACHE_DIR", "");
        let text = String::from_utf8(run(c).stdout).unwrap();
        let said = text.contains("q: ")
            && text.contains("File too large")
            && text.contains("raise the limit (ulimit -f)");
        assert!(said && text.starts_with("xorz: ") && text.lines().count() == 1, "{verb}: {text}");
        assert!(!d.join("q").exists());
    }
    // A disk that is full, wherever one can be had.
    let mut c = command(d, &["pack", "base", "ft", "-o", "-"]);
    c.stdout(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let out = c.stderr(std::process::Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let text = complaint(&out);
    assert!(
        out.status.code() == Some(4) && text.contains("make room there, or write to another disk"),
        "{text}"
    );
}

#[test]
fn no_permission() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir(d.join("closed")).unwrap();
    fs::copy(d.join("base"), d.join("secret")).unwrap();
    fs::set_permissions(d.join("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(d.join("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    let root = user() == 0;
    for (args, name) in [
        (&["pack", "secret", "ft", "-o", "q"][..], "secret: "),
        (&["pack", "base", "ft", "-o", "closed/q"], "closed/q: "),
        (&["unpack", "base", "p", "-o", "closed/q"], "closed/q: "),
        (&["inspect", "p", "--html", "closed/q"], "closed/q: "),
    ] {
        let mut c = command(d, args);
        if root {
            c.uid(65534).gid(65534);
        }
        let out = run(c);
        let text = complaint(&out);
        assert_eq!(out.status.code(), Some(4), "{args:?}: {text}");
        assert!(
            text.contains(name) && text.contains("Permission denied") && text.contains("chmod or chown"),
            "{text}"
        );
    }
    refused(
        d,
        &["pack", "base", "ft", "-o", "nowhere/q"],
        4,
        &["its folder nowhere does not exist; make it first"],
    );
}

/// Who runs this.
fn user() -> u32 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").unwrap().uid()
}
