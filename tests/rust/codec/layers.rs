//! Promise: the tree is as `docs/architecture.md` draws it. Modules, and the rooms of `package`, know only
//! what lies below them; `unsafe` stays in its rooms, torch in csrc, cxx in one file, intrinsics in
//! vector/<arch>.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(dir: &Path, ends: &[&str]) -> Vec<PathBuf> {
    let mut out = vec![];
    for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            out.extend(files(&entry, ends));
        } else if ends.iter().any(|e| entry.to_string_lossy().ends_with(e)) {
            out.push(entry);
        }
    }
    out
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

/// The file's code: no line comments, so that prose may name what code may not.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

fn source() -> Vec<(String, String)> {
    let mut found: Vec<_> = files(&root().join("src"), &[".rs"]).iter().map(|p| (name(p), code(p))).collect();
    found.sort();
    assert!(found.len() > 15, "the search found only {} files", found.len());
    found
}

/// The identifiers that follow `path` in a file's code: what is used of the module of that path.
fn used<'t>(text: &'t str, path: &'t str) -> impl Iterator<Item = &'t str> {
    text.match_indices(path).map(move |(i, _)| {
        let rest = &text[i + path.len()..];
        &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())]
    })
}

/// Every module of `folder`, and those below it that it may use.
fn hold(folder: &str, path: &str, below: &[(&str, &[&str])]) {
    let mut held = 0;
    for (file, text) in source() {
        let Some(inside) = file.strip_prefix(folder) else { continue };
        let Some((module, allowed)) =
            below.iter().find(|(m, _)| inside.starts_with(&format!("{m}/")) || inside == format!("{m}.rs"))
        else {
            continue;
        };
        for used in used(&text, path) {
            held += 1;
            assert!(used == *module || allowed.contains(&used), "{file} uses {path}{used}");
        }
    }
    assert!(held > 0, "the search finds nothing in {folder}");
}

#[test]
fn modules_use_only_what_lies_below_them() {
    let below: &[(&str, &[&str])] = &[
        ("error", &[]),
        ("matrix", &["error"]),
        ("codec", &["error", "matrix"]),
        ("resident", &["error", "matrix", "codec"]),
        ("vector", &["error", "matrix", "codec", "resident"]),
        ("package", &["error", "matrix", "codec", "resident", "vector"]),
        ("report", &["error", "matrix", "codec", "resident", "vector", "package"]),
        ("cpu", &["error", "matrix", "codec", "resident", "vector"]),
        ("cuda", &["error", "matrix"]),
        ("ffi", &["error", "matrix", "codec", "resident", "vector", "package", "cpu", "cuda"]),
    ];
    hold("src/", "crate::", below);
}

/// A room names what it uses of another by that room's name, and never by a way around it, so that this test
/// sees it.
#[test]
fn rooms_of_package_use_only_what_lies_below_them() {
    let below: &[(&str, &[&str])] = &[
        ("options", &[]),
        ("io", &[]),
        ("format", &["options", "io"]),
        ("checkpoint", &["options", "io", "format"]),
        ("jobs", &["options", "io", "format", "checkpoint"]),
    ];
    hold("src/package/", "crate::package::", below);
    for (file, text) in source().iter().filter(|(f, _)| f.starts_with("src/package/")) {
        let room = file.split('/').nth(2).unwrap();
        assert!(room == "mod.rs" || below.iter().any(|(m, _)| room.trim_end_matches(".rs") == *m), "{file}");
        assert!(!text.contains("super::super::"), "{file} goes around its room");
        let top = text.split("mod tests").next().unwrap();
        assert!(room != "options.rs" || !top.contains("super::"), "{file} uses a room");
    }
    for (file, text) in source().iter().filter(|(f, _)| !f.starts_with("src/package/")) {
        let inner = used(text, "package::").find(|u| below.iter().any(|(m, _)| m == u));
        assert!(file.starts_with("src/report/") || inner.is_none(), "{file} uses package::{inner:?}");
    }
}

/// No two files of a room use each other, straight or in a circle: what is below can be read without what is
/// above. A folder inside of a room counts as one file.
#[test]
fn files_of_a_room_form_no_circle() {
    for room in ["cpu", "package/io", "package/format", "package/checkpoint", "package/jobs"] {
        let path = format!("crate::{}::", room.replace('/', "::"));
        let mut left: Vec<(String, Vec<String>)> = vec![];
        for (file, text) in source() {
            let Some(inside) = file.strip_prefix(&format!("src/{room}/")) else { continue };
            let name = inside.split('/').next().unwrap().trim_end_matches(".rs");
            let top = text.split("mod tests").next().unwrap();
            let beside = if inside.contains('/') { vec![] } else { used(top, "super::").collect() };
            let names = beside.into_iter().chain(used(top, &path));
            left.push((name.to_owned(), names.map(str::to_owned).collect()));
        }
        left.retain(|(f, _)| f != "mod");
        assert!(left.len() > 3, "{room} has only {} files", left.len());
        // Take away what uses nothing that is left, floor by floor.
        while !left.is_empty() {
            let names: Vec<String> = left.iter().map(|(f, _)| f.clone()).collect();
            let stands = |(f, uses): &(String, Vec<String>)| {
                uses.iter().all(|u| {
                    assert!(!u.is_empty(), "{f} uses several files at once");
                    u == f || !names.contains(u)
                })
            };
            left.retain(|file| !stands(file));
            assert!(left.len() < names.len(), "{room}: a circle among {names:?}");
        }
    }
}

#[test]
fn the_binary_uses_package_and_what_it_speaks() {
    for (file, text) in source().iter().filter(|(f, _)| f.starts_with("src/bin/")) {
        for hidden in ["xorz::ffi", "xorz::vector", "xorz::cpu", "xorz::cuda"] {
            assert!(!text.contains(hidden), "{file} uses {hidden}");
        }
    }
}

#[test]
fn unsafe_stays_in_its_rooms() {
    let rooms = ["src/vector/x86_64/", "src/cuda/", "src/ffi/"];
    let mut used = 0;
    for (file, text) in source() {
        let here = text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
        used += usize::from(here);
        assert!(!here || rooms.iter().any(|r| file.starts_with(r)), "unsafe in {file}");
    }
    assert!(used > 0, "the search finds nothing");
    for module in [
        "src/codec/mod.rs",
        "src/resident/mod.rs",
        "src/package/mod.rs",
        "src/report/mod.rs",
        "src/cpu/mod.rs",
        "src/error.rs",
        "src/matrix.rs",
        "src/bin/xorz/main.rs",
    ] {
        let text = std::fs::read_to_string(root().join(module)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{module} does not forbid unsafe code");
    }
}

#[test]
fn foreign_worlds_stay_behind_their_doors() {
    for (file, text) in source() {
        let cxx = text.contains("cxx::");
        assert!(!cxx || file == "src/ffi/bridge.rs", "cxx in {file}");
        for crate_of_cli in ["clap", "indicatif", "tempfile"] {
            assert!(!text.contains(crate_of_cli) || file.starts_with("src/bin/"), "{crate_of_cli} in {file}");
        }
        assert!(!text.contains("cudarc") || file == "src/cuda/driver.rs", "libcuda in {file}");
        let intrinsics = text.contains("std::arch") || text.contains("core::arch");
        let detected = text.replace("std::arch::is_x86_feature_detected", "");
        let at_home = file.starts_with("src/vector/x86_64/");
        let really = intrinsics && (detected.contains("std::arch") || detected.contains("core::arch"));
        assert!(!really || at_home, "intrinsics in {file}");
        assert!(!text.contains("libtorch") && !text.contains("pyo3"), "torch or Python in {file}");
    }
    let folders = ["csrc", "cuda", "tests/capi"].map(|d| root().join(d));
    for path in
        folders.iter().filter(|d| d.is_dir()).flat_map(|d| files(d, &[".h", ".cpp", ".c", ".cu", ".cuh"]))
    {
        let (file, text) = (name(&path), std::fs::read_to_string(&path).unwrap());
        assert!(!text.contains("#include <torch/") || file.starts_with("csrc/"), "torch in {file}");
    }
}

/// Whoever depends on the library compiles nothing of the command line's: what only the binary uses is
/// optional.
#[test]
fn the_library_needs_no_crate_of_the_command_line() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let needed = manifest.split("[dependencies]\n").nth(1).unwrap().split("\n[").next().unwrap();
    let needed = needed.lines().filter(|l| l.contains('=') && !l.contains("optional = true"));
    let needed: Vec<&str> =
        needed.filter_map(|l| l.split(' ').next()).filter(|n| !n.starts_with('#')).collect();
    assert!(needed.len() > 5, "the manifest was not understood");
    for name in needed {
        let (path, macros) = (format!("{}::", name.replace('-', "_")), format!("{name}!"));
        let library = source().into_iter().filter(|(f, _)| !f.starts_with("src/bin/"));
        let users = library.filter(|(_, text)| text.contains(&path) || text.contains(&macros)).count();
        assert!(users > 0, "the library does not use {name}: make it optional");
    }
}

/// Messages are for people. What code needs to know of an error is a field of it: its kind, subject or hint.
#[test]
fn no_code_branches_on_the_text_of_an_error() {
    let reads = ["message()", "e.to_string()", ".text"];
    let asks = [".contains(", ".starts_with(", ".ends_with(", ".find(", ".matches(", "==", "!="];
    for (file, text) in source() {
        let code: String = text.split("mod tests").next().unwrap().split_whitespace().collect();
        for (read, ask) in reads.iter().flat_map(|r| asks.map(|a| (r, a))) {
            let branches = code.contains(&format!("{read}{ask}"));
            assert!(!branches, "{file} asks what an error says: {read}{ask}");
        }
    }
}

#[test]
fn files_hold_one_idea() {
    for (file, text) in source() {
        assert!(text.lines().count() <= 450, "{file} has {} lines", text.lines().count());
    }
}
