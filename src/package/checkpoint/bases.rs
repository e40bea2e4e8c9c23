//! The digests of a base: those that are known before its bytes are read, and keeping those that reading gives.

use super::cache::{DigestCache, Identity};
use super::digests::digests_of;
use super::files::{Checkpoint, TensorFile};
use crate::error::Result;
use crate::matrix::Digest;
use crate::package::format::container::TensorInfo;
use crate::package::format::record::{BaseTensor, Entry};
use crate::package::format::refusals::missing_in_base;
use crate::package::options::Run;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Digests of a base's tensors, file by file.
#[derive(Debug)]
pub(crate) struct BaseDigests {
    cache: DigestCache,
    /// What each file was when it was opened, and its digests as far as the cache holds them.
    files: Vec<(Option<Identity>, BTreeMap<String, Digest>)>,
    /// Files whose digests have been kept by now.
    stored: Mutex<HashSet<usize>>,
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
        Self { files: files.collect(), cache, stored: Mutex::default() }
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
            let mut tensors = f.tensors.header().tensors.iter();
            let complete = tensors.all(|t| all.contains_key(&t.name));
            let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
            if let (true, Some(file)) = (complete && all.len() > kept.len(), f.tensors.file())
                && stored.insert(i)
            {
                self.cache.store(&f.place, file, before, &all);
            }
        }
    }
}

impl Checkpoint {
    /// The base tensor that `entry` was packed against, as far as names tell.
    pub(crate) fn find_base(&self, entry: &Entry, base: &BaseTensor) -> Option<(usize, &TensorInfo)> {
        let fits =
            |t: &TensorInfo| (&t.dtype, &t.dims, t.bytes()) == (&entry.dtype, &entry.dims, entry.bytes);
        self.find_near(&base.name, base.file.as_deref(), fits)
    }
}

/// A base on disk and the digests of its tensors, so that packages are loaded against it without reading it.
#[derive(Debug)]
pub struct Base {
    checkpoint: Checkpoint,
    /// File by file.
    digests: Vec<BTreeMap<String, Digest>>,
}

impl Base {
    /// Open a base, a safetensors file or a folder. Its digests come from the user's cache, or are computed and kept there.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, `Truncated` or `Unsupported`, naming the file; `InvalidArgument` for a folder without weights.
    pub fn open(path: &Path, run: &Run<'_>) -> Result<Self> {
        let checkpoint = Checkpoint::open_base(path)?;
        let digests = digests_of(&checkpoint, &DigestCache::user(), run)?;
        Ok(Self { checkpoint, digests })
    }

    /// Where the base tensor of `entry` is, and its digest.
    pub(crate) fn find(
        &self,
        entry: &Entry,
        base: &BaseTensor,
    ) -> Result<(&TensorFile, &TensorInfo, Digest)> {
        let name = base.name.as_str();
        let found = self.checkpoint.find_base(entry, base);
        let found = found.and_then(|(f, info)| Some((f, info, self.digests[f].get(name)?)));
        let (file, info, digest) = found.ok_or_else(|| missing_in_base(name))?;
        Ok((&self.checkpoint.files()[file], info, *digest))
    }

    /// What it is made of.
    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }
}
