//! Promise: packages of folders of version 1 give back the same files forever: every codec, encoding and group of dtypes, and
//! all that a folder can hold. The files in tests/golden are never regenerated; nothing writes that version any more.

use crate::common::disk::sums;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use xorz::codec::Encoding;
use xorz::package::{Codec, Destination, Package, Run, SafeTensors, unpack_files, verify_files};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

const BASE: &str = "folder_base.safetensors";
const FILES: &str = "folder_files.json";
const CASES: [&str; 7] = [
    "v1_folder_speed.xorz",
    "v1_folder_memory.xorz",
    "v1_folder_xor.xorz",
    "v1_folder_planes.xorz",
    "v1_folder_resident_speed.xorz",
    "v1_folder_resident_memory.xorz",
    "v1_folder_resident_zstd_memory.xorz",
];

#[test]
fn golden_folders_are_given_back() {
    let text = fs::read(golden(FILES)).unwrap();
    let want: BTreeMap<String, (String, bool)> = serde_json::from_slice(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut codecs, mut kinds, mut gaps) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for name in CASES {
        let (path, out) = (golden(name), dir.path().join(name));
        verify_files(&golden(BASE), &path, None, &Run::default()).unwrap();
        unpack_files(&golden(BASE), &path, Destination::Path(&out), &Run::default()).unwrap();
        assert_eq!(sums(&out), want, "{name}");
        let stored = SafeTensors::open(&path).unwrap();
        for e in Package::open(&path).unwrap().entries() {
            if e.codec == Codec::Resident && e.encoding == Some(Encoding::Sparse) {
                // SPEC.md of the resident delta: byte 14.
                gaps.insert(stored.read(stored.find(&e.name).unwrap()).unwrap()[14]);
            }
            codecs.insert(e.codec.name());
            kinds.extend(e.encoding.map(|x| (e.word_dtype().unwrap().word_bytes(), x.name())));
        }
    }
    assert_eq!(codecs.into_iter().collect::<Vec<_>>(), {
        // The later ones are of version 2.
        let old = Codec::ALL.iter().filter(|c| **c <= Codec::Same);
        let mut all: Vec<_> = old.map(|c| c.name()).collect();
        all.sort_unstable();
        all
    });
    assert_eq!(gaps.into_iter().collect::<Vec<_>>(), [1, 2], "bytes of a gap");
    for bytes in [1, 2, 4, 8] {
        for encoding in Encoding::ALL {
            assert!(
                kinds.contains(&(bytes, encoding.name())),
                "no golden {encoding:?} of {bytes}-byte words"
            );
        }
    }
}
