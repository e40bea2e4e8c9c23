//! Entries of the digest cache: any bytes, and bodies of any text behind a right check. What is given back is what a whole entry of
//! this very file says, or nothing. What names the file (its path, its numbers) is other words in each process, so that edits
//! are made to words of a fixed length that stand for them: the fuzzer's bytes give the same entry wherever they are tried.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::OnceLock;
use support::{Choices, bounded, edit, folder};
use xorz::matrix::Digest;
use xorz::package::{DigestCache, Identity};
use xxhash_rust::xxh3::xxh3_128;

struct Place {
    cache: DigestCache,
    base: PathBuf,
    entry: PathBuf,
    good: Vec<u8>,
    /// `good` with words of [`STANDING`] in the place of what is other words in each process.
    text: String,
    /// What the words of [`STANDING`] stand for: parts of `good`, in its order.
    parts: Vec<Vec<u8>>,
    digests: BTreeMap<String, Digest>,
}

/// In the place of the check, the path and the file's key, with what is before each and begins after it.
const STANDING: [(&str, &str, &str); 3] =
    [(r#""check":""#, "@check@", r#"","body""#), (r#""path":""#, "@path@", r#"","file""#), (r#""file":"#, "@file@", r#","digests""#)];

/// A whole entry cut into the parts that are other ones in each process, and its text with words standing for them.
fn standing(good: &str) -> (Vec<Vec<u8>>, String) {
    let (mut parts, mut text, mut rest) = (Vec::new(), String::new(), good);
    for (before, word, after) in STANDING {
        let start = rest.find(before).expect("an entry as the cache writes it") + before.len();
        let end = start + rest[start..].find(after).expect("an entry as the cache writes it");
        parts.push(rest[start..end].as_bytes().to_vec());
        text += &rest[..start];
        text += word;
        rest = &rest[end..];
    }
    (parts, text + rest)
}

/// `text` with what the words stand for, wherever an edit has left a word whole.
fn filled(mut text: Vec<u8>, parts: &[Vec<u8>]) -> Vec<u8> {
    for ((_, word, _), part) in STANDING.iter().zip(parts) {
        let mut out = Vec::with_capacity(text.len());
        let mut rest = &text[..];
        while let Some(at) = rest.windows(word.len()).position(|w| w == word.as_bytes()) {
            out.extend_from_slice(&rest[..at]);
            out.extend_from_slice(part);
            rest = &rest[at + word.len()..];
        }
        out.extend_from_slice(rest);
        text = out;
    }
    text
}

/// A base, and a whole entry of it; none where the file system is none that entries are kept for.
fn place() -> Option<&'static Place> {
    static PLACE: OnceLock<Option<Place>> = OnceLock::new();
    PLACE
        .get_or_init(|| {
            let (base, cache) = (folder().join("base"), folder().join("cache"));
            std::fs::write(&base, b"no checkpoint, and nobody looks").expect("written");
            std::thread::sleep(std::time::Duration::from_millis(2200));
            let file = File::open(&base).expect("opened");
            let digests: BTreeMap<_, _> =
                [("w".to_owned(), Digest([7; 16])), ("v".to_owned(), Digest([9; 16]))].into();
            let kept = DigestCache::at(&cache);
            kept.store(&base, &file, &Identity::watched(&file)?, &digests);
            let entry = std::fs::read_dir(&cache).ok()?.next()?.ok()?.path();
            let good = std::fs::read(&entry).expect("read");
            assert_eq!(kept.load(&base, &file), Some(digests.clone()));
            let (parts, text) = standing(std::str::from_utf8(&good).expect("JSON"));
            assert_eq!(filled(text.clone().into_bytes(), &parts), good);
            Some(Place { cache: kept, base, entry, good, text, parts, digests })
        })
        .as_ref()
}

fuzz_target!(|data: &[u8]| {
    let Some(p) = place() else { return };
    let mut choices = Choices::of(data);
    let text = match choices.byte() & 3 {
        0 => choices.rest().to_vec(),
        1 => {
            let mut text = p.text.clone().into_bytes();
            edit(&mut text, &mut choices);
            filled(text, &p.parts)
        }
        _ => {
            // A body of the fuzzer's, behind a check that is right if it is written as the cache would write it.
            let at = p.text.find(r#""body":"#).expect("a body") + 7;
            let mut body = p.text[at..p.text.len() - 1].as_bytes().to_vec();
            edit(&mut body, &mut choices);
            let body = filled(body, &p.parts);
            let check = format!(r#"{{"check":"{:032x}","body":"#, xxh3_128(&body));
            [check.as_bytes(), &body, b"}"].concat()
        }
    };
    std::fs::write(&p.entry, &text).expect("written");
    let file = File::open(&p.base).expect("opened");
    let found = bounded(text.len(), || p.cache.load(&p.base, &file));
    if text == p.good {
        assert_eq!(found.as_ref(), Some(&p.digests));
    }
    if let Some(found) = found {
        // Believed is only an entry of this file as it is: digests are the only part of it that may be others.
        let value: serde_json::Value = serde_json::from_slice(&text).expect("what was believed is JSON");
        let good: serde_json::Value = serde_json::from_slice(&p.good).expect("JSON");
        for part in ["version", "path", "file"] {
            assert_eq!(value["body"][part], good["body"][part], "{part} of another file");
        }
        assert_eq!(value["body"]["digests"].as_object().map(|o| o.len()), Some(found.len()));
    }
});
