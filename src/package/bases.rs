//! What is known of a base's digests before its bytes are read, and keeping what reading them taught.

use super::cache::{DigestCache, Identity};
use super::checkpoint::Checkpoint;
use crate::matrix::{Digest, Dtype};
use std::collections::{BTreeMap, HashMap};

/// Digests of a base's tensors, file by file.
#[derive(Debug)]
pub(super) struct BaseDigests {
    cache: DigestCache,
    /// What each file was when it was opened, and its digests as far as the cache holds them.
    files: Vec<(Option<Identity>, BTreeMap<String, Digest>)>,
}

impl BaseDigests {
    /// What the user's cache holds.
    pub(super) fn cached(base: &Checkpoint) -> Self {
        let cache = DigestCache::user();
        let files = base.files().iter().map(|f| match f.tensors.file() {
            Some(file) => (Identity::of(file).ok(), cache.load(&f.place, file).unwrap_or_default()),
            None => (None, BTreeMap::new()),
        });
        Self { files: files.collect(), cache }
    }

    /// The digest of tensor `name` of file `file`, if it is known.
    pub(super) fn get(&self, file: usize, name: &str) -> Option<Digest> {
        self.files.get(file)?.1.get(name).copied()
    }

    /// Keep digests that were computed, by file; of files whose tensors are all known then.
    pub(super) fn store(&self, base: &Checkpoint, found: HashMap<usize, Vec<(String, Digest)>>) {
        for (i, list) in found {
            let (Some(f), Some((Some(before), kept))) = (base.files().get(i), self.files.get(i)) else {
                continue;
            };
            let mut all = kept.clone();
            all.extend(list);
            let tensors = f.tensors.header().tensors.iter();
            let complete =
                tensors.filter(|t| Dtype::from_name(&t.dtype).is_some()).all(|t| all.contains_key(&t.name));
            if let (true, Some(file)) = (complete && all.len() > kept.len(), f.tensors.file()) {
                self.cache.store(&f.place, file, before, &all);
            }
        }
    }
}
