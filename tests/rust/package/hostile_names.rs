//! Promise: a package puts no file where shells, git or editors run it by themselves, nor one whose name is not what a terminal
//! shows; packing refuses the same, so that what is packed can be unpacked; no name reaches a terminal as a command to it.

use crate::common::disk::{complaint, done, matrices, model, names, safetensors, tree, xorz};
use crate::common::forge::Forge;
use std::fs;
use std::path::Path;

const REFUSED: [&str; 22] = [
    ".git/hooks/post-checkout",
    ".git/config",
    "a/.git/hooks/pre-commit",
    ".GIT/config",
    ".bashrc",
    ".profile",
    ".zshenv",
    ".ssh/authorized_keys",
    ".envrc",
    ".vscode/tasks.json",
    ".config/autostart/x.desktop",
    "a/.gdbinit",
    "a\u{1b}[2J\u{1b}[31mb",
    "a\nb",
    "a\rb",
    "a\tb",
    "a\u{7f}b",
    "a\u{9b}31mb",
    "photo\u{202e}gpj.sh",
    "a\u{2067}b",
    "-rf",
    "a/--checkpoint-action=exec=sh x",
];

/// `base` and `ft`, folders, and the package `p`.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(71, 2, 64, 100);
    model(&d.join("base"), &base, 1);
    model(&d.join("ft"), &ft, 1);
    done(d, &["pack", "base", "ft", "-o", "p"]);
    dir
}

fn harmless(text: &str) {
    let bad = |c: char| {
        (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!text.contains(bad), "{text:?} on a terminal");
}

#[test]
fn a_package_puts_no_file_where_something_runs_it() {
    let dir = folder();
    let d = dir.path();
    let forge = Forge::of(&fs::read(d.join("p")).unwrap());
    let files: serde_json::Value = serde_json::from_str(&forge.metadata["xorz:files"]).unwrap();
    let before = names(d);
    for path in REFUSED {
        for i in 0..files.as_array().unwrap().len() {
            let (mut forge, mut files) = (forge.clone(), files.clone());
            files[i]["path"] = path.into();
            forge.metadata.insert("xorz:files".into(), files.to_string());
            fs::write(d.join("p"), forge.build()).unwrap();
            for args in
                [&["unpack", "base", "p", "-o", "out"][..], &["verify", "base", "p"], &["inspect", "p"]]
            {
                let out = xorz(d, args);
                assert_eq!(out.status.code(), Some(3), "{path:?}: {args:?}");
                harmless(&complaint(&out));
            }
            assert_eq!(names(d), before, "{path:?}");
        }
    }
}

#[test]
fn what_could_not_be_unpacked_is_not_packed() {
    let dir = folder();
    let d = dir.path();
    let kept = tree(&d.join("ft"));
    for path in REFUSED.into_iter().filter(|p| !p.contains(".git/")) {
        let place = d.join("ft").join(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(&place, b"x").unwrap();
        let out = xorz(d, &["pack", "base", "ft", "-o", "q"]);
        assert!(!out.status.success() && !d.join("q").exists(), "{path:?} was packed");
        harmless(&complaint(&out));
        let mut top = place.as_path();
        while top.parent() != Some(&d.join("ft")) {
            top = top.parent().unwrap();
        }
        if top.is_dir() { fs::remove_dir_all(top).unwrap() } else { fs::remove_file(top).unwrap() }
    }
    assert!(tree(&d.join("ft")) == kept);
    // Files of model hubs, names in any script, and git's own folder, which is no part of a model, are no trouble.
    for path in
        [".gitattributes", ".hidden", "...", "Über uns/模型 (2).txt", ".git/config", "onnx/تجربه\u{200c}ها"]
    {
        let place = d.join("ft").join(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(place, path).unwrap();
    }
    done(d, &["pack", "base", "ft", "-o", "q"]);
    done(d, &["unpack", "base", "q", "-o", "out"]);
    fs::remove_dir_all(d.join("ft/.git")).unwrap();
    assert!(tree(&d.join("out")) == tree(&d.join("ft")));
}

#[test]
fn no_name_reaches_a_terminal_as_a_command() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let name = "w\u{202e}thgiew\u{2066}\u{1b}[2J\u{9b}K\u{7f}";
    let tensor = |bytes: Vec<u8>| safetensors(&[(name.into(), "BF16", vec![64, 50], bytes)]);
    fs::write(d.join("base"), tensor(vec![1; 6400])).unwrap();
    fs::write(d.join("ft"), tensor((0..6400).map(|i| 1 + u8::from(i % 99 == 0)).collect())).unwrap();
    fs::write(d.join("other"), tensor(vec![2; 6400])).unwrap();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    for args in [
        &["inspect", "p"][..],
        &["inspect", "p", "--tensors"],
        &["inspect", "p", "--json"],
        &["digest", "base"],
        &["digest", "base", "--json"],
        &["estimate", "base", "ft"],
        &["estimate", "base", "ft", "--json"],
        &["verify", "base", "p", "ft"],
        &["verify", "base", "p", "--json"],
        &["verify", "other", "p"],
        &["unpack", "other", "p", "-o", "out"],
    ] {
        let out = xorz(d, args);
        harmless(&String::from_utf8_lossy(&out.stdout));
        harmless(&String::from_utf8_lossy(&out.stderr));
    }
    // Programs read the very name.
    let json: serde_json::Value = serde_json::from_str(&done(d, &["inspect", "p", "--json"])).unwrap();
    assert!(json.to_string().contains(&serde_json::to_string(name).unwrap()), "{json}");
    // The library's own messages, which other front ends print, are harmless, too.
    let e = xorz::package::verify_files(&d.join("other"), &d.join("p"), None, &xorz::package::Run::default());
    harmless(e.unwrap_err().message());
    let e = xorz::package::Package::open(Path::new("no\u{202e}where")).unwrap_err();
    harmless(&e.to_string());
}
