//! The digests of a base: those that are known before its bytes are read, and keeping those that reading gives.

use super::cache::{DigestCache, Identity};
use super::digests::digest_checkpoint;
use super::files::{Checkpoint, TensorFile};
use crate::error::Result;
use crate::matrix::{Digest, Dtype};
use crate::package::format::container::TensorInfo;
use crate::package::format::refusals::missing_in_base;
use crate::package::options::Run;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Digests of a base's tensors, file by file.
#[derive(Debug)]
pub(crate) struct BaseDigests {
    cache: DigestCache,
    /// What each file was when it was opened, and its digests as far as the cache holds them.
    files: Vec<(Option<Identity>, BTreeMap<String, Digest>)>,
}

impl BaseDigests {
    /// What the user's cache holds.
    pub(crate) fn cached(base: &Checkpoint) -> Self {
        let cache = DigestCache::user();
        let files = base.files().iter().map(|f| match f.tensors.file() {
            Some(file) => match cache.load(&f.place, file) {
                Some(kept) => (f.identity, kept),
                // Taken before any word is read, so that what is found may be kept.
                None => (cache.watched(file), BTreeMap::new()),
            },
            None => (None, BTreeMap::new()),
        });
        Self { files: files.collect(), cache }
    }

    /// The digest of tensor `name` of file `file`, if it is known.
    pub(crate) fn get(&self, file: usize, name: &str) -> Option<Digest> {
        self.files.get(file)?.1.get(name).copied()
    }

    /// Keep digests that were computed, by file; of files whose tensors are all known then.
    pub(crate) fn store(&self, base: &Checkpoint, found: HashMap<usize, Vec<(String, Digest)>>) {
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

/// A base on disk and the digests of its tensors, so that packages are loaded against it without reading it.
#[derive(Debug)]
pub struct Base {
    checkpoint: Checkpoint,
    digests: HashMap<String, Digest>,
}

impl Base {
    /// Open a base, a safetensors file or a folder. Its digests come from the user's cache, or are computed and kept there.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, `Truncated` or `Unsupported`, naming the file; `InvalidArgument` for a folder without weights.
    pub fn open(path: &Path, run: &Run<'_>) -> Result<Self> {
        let checkpoint = Checkpoint::open_base(path)?;
        let digests = digest_checkpoint(&checkpoint, &DigestCache::user(), run)?.into_iter().collect();
        Ok(Self { checkpoint, digests })
    }

    /// Where tensor `name` is, and its digest.
    pub(crate) fn find(&self, name: &str) -> Result<(&TensorFile, &TensorInfo, Digest)> {
        let found = self.checkpoint.find(name).zip(self.digests.get(name));
        let ((file, info), digest) = found.ok_or_else(|| missing_in_base(name))?;
        Ok((&self.checkpoint.files()[file], info, *digest))
    }
}
