//! Promise: one word, one thing. On each floor of `src/` a type has a name that no other type there has, and
//! so has a function that is no method. So grep finds what somebody reads about in another file.
//! `docs/words.md` is the glossary.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const FLOORS: [&str; 8] = ["ffi", "codec", "resident", "vector", "cpu", "cuda", "package", "report"];

/// Floor and name of what may be there twice, and why.
const ALIKE: [(&str, &str, &str); 0] = [];

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let found = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] });
    found.filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}

/// The word that follows `keyword` at the start of a line, whatever qualifiers stand before it.
fn declared<'t>(line: &'t str, keywords: &[&str]) -> Option<&'t str> {
    let line = line.strip_prefix("pub").unwrap_or(line);
    let line = line.strip_prefix('(').and_then(|l| l.split_once(')')).map_or(line, |(_, rest)| rest);
    let mut words = line.split_whitespace();
    let keyword = words.find(|w| !["const", "unsafe", "extern", "\"C\""].contains(w))?;
    let name = words.next()?.split(|c: char| !c.is_alphanumeric() && c != '_').next()?;
    keywords.contains(&keyword).then_some(name).filter(|name| !name.is_empty())
}

/// Where each name is declared outside of any other item. One file counts once: twins under `cfg` are one
/// thing.
fn names(floor: &str, keywords: &[&str]) -> BTreeMap<String, BTreeSet<PathBuf>> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src").join(floor);
    let mut found = BTreeMap::<String, BTreeSet<PathBuf>>::new();
    for path in files(&root) {
        let text = std::fs::read_to_string(&path).unwrap();
        let outside = text.lines().take_while(|l| !l.starts_with("#[cfg(test)]"));
        for line in outside.filter(|l| !l.starts_with(' ')) {
            if let Some(name) = declared(line, keywords) {
                found.entry(name.to_owned()).or_default().insert(path.clone());
            }
        }
    }
    found
}

fn assert_unique(what: &str, keywords: &[&str], least: usize) {
    let mut seen = 0;
    for floor in FLOORS {
        for (name, places) in names(floor, keywords) {
            seen += 1;
            let alike = ALIKE.iter().any(|(f, n, _)| *f == floor && *n == name);
            assert!(places.len() == 1 || alike, "src/{floor} has several {what} called {name}: {places:?}");
        }
    }
    assert!(seen > least, "the search found only {seen} {what}");
}

#[test]
fn a_type_has_a_name_of_its_own_on_its_floor() {
    assert_unique("types", &["struct", "enum", "trait", "type", "union"], 100);
}

#[test]
fn a_function_has_a_name_of_its_own_on_its_floor() {
    assert_unique("functions", &["fn"], 150);
}

#[test]
fn the_search_finds_declarations() {
    assert_eq!(declared("pub(crate) struct Tile<'a> {", &["struct"]), Some("Tile"));
    assert_eq!(declared("pub const unsafe fn read(at: usize) {", &["fn"]), Some("read"));
    assert_eq!(declared("const LIMIT: usize = 3;", &["fn", "struct"]), None);
}
