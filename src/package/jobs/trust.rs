//! What speaks for a base beside its digests: the sha256 that a package has of it, compared before anything is made of it.
//! Neither the cache of digests nor the digests themselves have a say in that.

use super::unpack::words_on;
use crate::error::Result;
use crate::package::checkpoint::files::Checkpoint;
use crate::package::format::frames::cut;
use crate::package::format::reader::Package;
use crate::package::format::record::Entry;
use crate::package::format::refusals::{another_sum, untold_sum};
use crate::package::format::sums::Sum;
use crate::package::format::words::TensorWords;
use crate::package::io::aligned::Aligned;
use crate::package::io::ordered;
use crate::package::options::{Run, Trust};
use sha2::{Digest as _, Sha256};

impl Package {
    /// The words of the base of `entry` are those that it was packed against, as far as is asked.
    pub(super) fn check_trust(&self, entry: &Entry, words: &TensorWords<'_>) -> Result<()> {
        match (self.trust(), &entry.base) {
            (Trust::Sha256, Some(base)) => {
                let want = base.sha256.ok_or_else(|| untold_sum(&base.name))?;
                let found = sum_of_words(words)?;
                if found == want { Ok(()) } else { Err(another_sum(&base.name, want, found)) }
            }
            _ => Ok(()),
        }
    }

    /// [`Package::check_trust`] of every delta on `base`, by all threads.
    pub(super) fn check_trust_in(&self, base: &Checkpoint, run: &Run<'_>) -> Result<()> {
        if self.trust() == Trust::Digest {
            return Ok(());
        }
        let mut deltas: Vec<&Entry> = self.entries().iter().filter(|e| e.base.is_some()).collect();
        // A sha256 is computed by one thread: no long one is begun when all others are done.
        deltas.sort_by_key(|e| std::cmp::Reverse(e.bytes));
        run.begin("trust", deltas.iter().fold(0u64, |all, e| all.saturating_add(e.bytes)));
        ordered::side_by_side(ordered::threads(run.jobs), deltas.len(), |i, _| {
            let entry = deltas[i];
            if let Some((words, ..)) = words_on(base, entry).map_err(|e| e.of_tensor(&entry.name))? {
                self.check_trust(entry, &words).map_err(|e| e.of_tensor(&entry.name))?;
            }
            run.advance(entry.bytes)
        })
    }
}

fn sum_of_words(words: &TensorWords<'_>) -> Result<Sum> {
    let (mut sha, mut room) = (Sha256::new(), Aligned::default());
    for part in cut(0..words.len()?, 1 << 20) {
        sha.update(words.get(part, &mut room)?);
    }
    Ok(Sum(sha.finalize().into()))
}
