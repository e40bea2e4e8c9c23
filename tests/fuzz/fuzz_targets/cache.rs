//! Entries of the digest cache: any bytes, and bodies of any text behind a right check. What is given back is what a whole entry of
//! this very file says, or nothing.
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
    digests: BTreeMap<String, Digest>,
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
            Some(Place { cache: kept, base, entry, good, digests })
        })
        .as_ref()
}

fuzz_target!(|data: &[u8]| {
    let Some(p) = place() else { return };
    let mut choices = Choices::of(data);
    let text = match choices.byte() & 3 {
        0 => choices.rest().to_vec(),
        1 => {
            let mut text = p.good.clone();
            edit(&mut text, &mut choices);
            text
        }
        _ => {
            // A body of the fuzzer's, behind a check that is right if it is written as the cache would write it.
            let good = String::from_utf8(p.good.clone()).expect("JSON");
            let at = good.find(r#""body":"#).expect("a body") + 7;
            let mut body = good[at..good.len() - 1].as_bytes().to_vec();
            edit(&mut body, &mut choices);
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
