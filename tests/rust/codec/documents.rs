//! Promise: the documents speak of this tree. Every file that one of them names or links exists,
//! `docs/README.md` lists every page, and the lists of files in `docs/architecture.md` are complete.

use std::path::{Path, PathBuf};

const TOP: [&str; 9] =
    ["src/", "csrc/", "cuda/", "python/", "tests/", "docs/", "benches/", "examples/", ".ci/"];
const ENDS: [&str; 13] =
    [".rs", ".py", ".md", ".cu", ".cuh", ".h", ".cpp", ".c", ".txt", ".toml", ".sh", ".svg", ".xorz"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn pages(dir: &str) -> Vec<String> {
    let mut found: Vec<_> = std::fs::read_dir(root().join(dir))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.ends_with(".md"))
        .map(|n| format!("{dir}/{n}"))
        .collect();
    found.sort();
    found
}

fn documents() -> Vec<String> {
    let others = ["README.md", "CHANGELOG.md", "src/resident/SPEC.md", "src/package/SPEC.md"];
    let mut all: Vec<String> = others.iter().map(|&o| o.to_owned()).collect();
    for dir in ["docs", "tests", "cuda"] {
        all.extend(pages(dir));
    }
    all
}

/// The text without its blocks of code, which name files of the reader's.
fn prose(text: &str) -> String {
    let mut code = false;
    let outside = |line: &&str| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !fence && !code && !line.starts_with("    ")
    };
    text.lines().filter(outside).collect::<Vec<_>>().join("\n")
}

/// What stands between backticks and looks like a file or folder of this repository.
fn named(text: &str) -> Vec<&str> {
    let looks_like_one = |word: &&str| {
        let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
        plain
            && !word.starts_with('/')
            && (TOP.iter().any(|t| word.starts_with(t))
                || (word.contains('/') && ENDS.iter().any(|e| word.ends_with(e))))
    };
    text.split('`').skip(1).step_by(2).filter(looks_like_one).collect()
}

/// The targets of links into this repository: a file, and a heading in it if one is named.
fn linked(text: &str) -> Vec<(&str, Option<&str>)> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
        .filter(|target| !target.contains("://"))
        .map(|target| target.split_once('#').map_or((target, None), |(file, heading)| (file, Some(heading))))
        .collect()
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> Vec<String> {
    let keep = |c: &char| c.is_alphanumeric() || "-_ ".contains(*c);
    let anchor =
        |heading: &str| heading.to_lowercase().chars().filter(keep).collect::<String>().replace(' ', "-");
    text.lines().filter(|l| l.starts_with('#')).map(|l| anchor(l.trim_start_matches('#').trim())).collect()
}

#[test]
fn every_file_that_a_document_names_exists() {
    let (mut seen, mut missing) = (0, vec![]);
    for document in documents() {
        let text = prose(&read(&document));
        let home = root().join(Path::new(&document).parent().unwrap());
        // `tests/README.md` names files from its own folder on, the others from the root on.
        for name in named(&text) {
            seen += 1;
            if !root().join(name).exists() && !home.join(name).exists() {
                missing.push(format!("{document}: {name}"));
            }
        }
        for (link, heading) in linked(&text) {
            let target = if link.is_empty() { root().join(&document) } else { home.join(link) };
            let has = |h| std::fs::read_to_string(&target).is_ok_and(|t| anchors(&t).iter().any(|a| a == h));
            if !target.exists() || !heading.is_none_or(has) {
                missing.push(format!("{document}: {link}, heading {heading:?}"));
            }
        }
    }
    assert!(seen > 100, "the search found only {seen} names");
    assert!(missing.is_empty(), "these files do not exist:\n{}", missing.join("\n"));
}

#[test]
fn the_index_lists_every_page() {
    let index = read("docs/README.md");
    for page in pages("docs").iter().filter(|p| *p != "docs/README.md") {
        let name = page.trim_start_matches("docs/");
        assert!(index.contains(&format!("]({name})")), "docs/README.md does not list {name}");
    }
}

#[test]
fn documents_refer_to_nothing_outside_the_repository() {
    for document in documents() {
        let text = read(&document);
        for word in ["DESIGN", "/work/", "shared/research"] {
            assert!(!text.contains(word), "{document} refers to {word}");
        }
    }
}

/// The files below `dirs` with one of these endings whose text holds one of `words`.
fn files_with(dirs: &[&str], ends: &[&str], words: &[&str]) -> Vec<String> {
    let mut found = vec![];
    for dir in dirs {
        for entry in std::fs::read_dir(root().join(dir)).unwrap().map(|e| e.unwrap()) {
            let path = format!("{dir}/{}", entry.file_name().to_str().unwrap());
            if entry.path().is_dir() {
                found.extend(files_with(&[&path], ends, words));
            } else if ends.iter().any(|e| path.ends_with(e)) {
                let text = std::fs::read_to_string(entry.path()).unwrap();
                found.extend(words.iter().any(|w| text.contains(w)).then_some(path));
            }
        }
    }
    found
}

/// Each of `files` is named in the section of `docs/architecture.md` with this title, or the folder that it
/// is in.
fn assert_listed(title: &str, files: &[String]) {
    let text = read("docs/architecture.md");
    let section = text.split("\n## ").find(|s| s.starts_with(title)).expect(title);
    let listed = named(section);
    assert!(files.len() > 3, "{title}: the search found only {files:?}");
    for file in files {
        let here = listed.iter().any(|l| l == file || (l.ends_with('/') && file.starts_with(l)));
        assert!(here, "docs/architecture.md, \"{title}\", does not name {file}");
    }
}

#[test]
fn whoever_adds_an_encoding_is_told_every_file() {
    let names = ["Unchanged", "Sparse", "Exponent", "Raw"];
    let rust: Vec<String> =
        names.iter().flat_map(|n| [format!("Encoding::{n}"), format!("Tile::{n}")]).collect();
    let rust: Vec<&str> = rust.iter().map(String::as_str).collect();
    let mut files = files_with(&["src"], &[".rs"], &rust);
    files.extend(files_with(
        &["cuda"],
        &[".cu", ".cuh"],
        &["kSparse", "kExponent", "kOnEntries", "kOnStream"],
    ));
    files.extend(files_with(&["csrc", "python"], &[".h", ".cpp", ".py"], &["ENCODING_RAW", "\"exponent\""]));
    assert_listed("To add an encoding", &files);
}

#[test]
fn whoever_adds_an_op_is_told_every_file() {
    let ends = [".rs", ".cu", ".cuh", ".h", ".cpp", ".py"];
    let files = files_with(&["src", "csrc", "cuda", "python"], &ends, &["delta_embedding"]);
    assert_listed("To add an op", &files);
}

#[test]
fn whoever_adds_an_instruction_set_is_told_every_file() {
    let files = files_with(&["src"], &[".rs"], &["Avx2", "Avx512"]);
    assert_listed("To add an instruction set", &files);
}
