//! One tensor of an opened package and its base: as a resident delta, or as fine-tuned words.

use super::reencode;
use super::restore::{Restore, RestoreScratch, digest_of_words};
use crate::codec::{Encoding, Prefer};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use crate::package::checkpoint::bases::Base;
use crate::package::checkpoint::files::TensorFile;
use crate::package::format::blob::{Blob, resident_limit};
use crate::package::format::frames::Inflater;
use crate::package::format::reader::Package;
use crate::package::format::record::{Entry, check_delta};
use crate::package::format::refusals::{another_base, other_kind, stored_alone};
use crate::package::format::words::TensorWords;
use crate::package::options::{Codec, Trust};
use crate::resident::{Assembler, Plan, Resident};
use crate::vector;
use std::ops::Range;

/// The words of a base tensor that has been compared with what an entry says of it, and their digest.
type Compared<'a> = (TensorWords<'a>, Option<Digest>);

/// Takes the bytes of a base that an exchange is of, the exchange, and how many words differ.
type TakeExchange<'a> = dyn FnMut(Range<usize>, &[u8], u64) -> Result<()> + 'a;

/// Words of an exchange, at least, but for the last of a tensor: many small ones would take time to be called for.
const EXCHANGE_BYTES: usize = 4 << 20;

impl Package {
    /// One tensor's resident delta. It is encoded again, piece by piece, only if `prefer` is given and is not
    /// what is stored, or if no resident delta is stored.
    ///
    /// `base` is the matrix of the base tensor [`Package::base_of`]. No dense matrix is made. Costs one pass over the base
    /// for its digest; [`Base`] does without.
    ///
    /// # Errors
    /// `Mismatch` for another dtype, shape or digest than the base had, naming the tensor and both; `Unsupported` for a
    /// tensor stored alone; `InvalidArgument` for an unknown name; `Corrupt`, `Truncated` or `Io`.
    pub fn resident(&self, name: &str, base: &Matrix<'_>, prefer: Option<Prefer>) -> Result<Vec<u8>> {
        self.of_tensor(name, |entry| self.delta(entry, in_memory(entry, base)?, prefer))
    }

    /// [`Package::resident`] of a base that is elsewhere, as in a device's memory, of which dtype, shape and digest are known.
    /// Nothing where its words are needed: they must speak for it ([`Trust::Sha256`]), or the delta is encoded anew.
    ///
    /// # Errors
    /// As [`Package::resident`].
    pub fn resident_known(
        &self,
        name: &str,
        (dtype, shape, found): (Dtype, Shape, Digest),
        prefer: Option<Prefer>,
    ) -> Result<Option<Vec<u8>>> {
        self.of_tensor(name, |entry| {
            let wanted = entry.base.as_ref().ok_or_else(stored_alone)?;
            check_kind(entry, dtype, shape)?;
            if !wanted.is(found) {
                return Err(another_base(wanted, found));
            }
            if self.trust() == Trust::Sha256 {
                return Ok(None);
            }
            match self.as_stored(entry, prefer)? {
                None if entry.codec == Codec::Unchanged => unchanged_delta(entry, found).map(Some),
                made => Ok(made),
            }
        })
    }

    /// One tensor's fine-tuned bytes into `out`, which has [`Entry::bytes`]. `base` is ignored for a tensor
    /// stored alone.
    ///
    /// # Errors
    /// As [`Package::resident`]; `Mismatch` for a base missing or an `out` of another length.
    pub fn restore(&self, name: &str, base: Option<&Matrix<'_>>, out: &mut [u8]) -> Result<()> {
        self.of_tensor(name, |entry| {
            let base = base.filter(|_| entry.base.is_some());
            self.restored(entry, base.map(|base| in_memory(entry, base)).transpose()?, out)
        })
    }

    /// What turns one tensor's base into it in place and back ([`vector::exchange_apply`]), part by part, in order: `give` gets
    /// the bytes of the base that a part is of, its exchange, and how many words differ. Parts that stay are left out. Neither a
    /// dense matrix nor a delta is made.
    ///
    /// # Errors
    /// As [`Package::resident`], before the first part for another base; and those of `give`.
    pub fn exchanges(&self, name: &str, base: &Matrix<'_>, give: &mut TakeExchange<'_>) -> Result<()> {
        self.of_tensor(name, |entry| {
            let words = in_memory(entry, base)?;
            self.check_trust(entry, &words.0)?;
            let job = Restore::new(self, entry, Some(words))?;
            let (mut taken, mut scratch) = (job.begin(), RestoreScratch::default());
            let (mut part, count) = (Vec::new(), job.pieces.count());
            for index in 0..count {
                job.make(index, &mut scratch)?;
                taken.take(&mut scratch)?;
                part.extend_from_slice(scratch.words());
                if part.len() >= EXCHANGE_BYTES || index + 1 == count {
                    let end = job.pieces.bytes(index).end;
                    give_exchange(base, end - part.len()..end, &part, give)?;
                    part.clear();
                }
            }
            taken.finish().map(drop)
        })
    }

    fn restored(&self, entry: &Entry, base: Option<Compared<'_>>, out: &mut [u8]) -> Result<()> {
        if out.len() as u64 != entry.bytes {
            let (takes, has) = (entry.bytes, out.len());
            return Err(Error::mismatch(format!("takes {takes} bytes, but out has {has}")));
        }
        if let Some((words, _)) = &base {
            self.check_trust(entry, words)?;
        }
        let job = Restore::new(self, entry, base)?;
        let (mut taken, mut scratch) = (job.begin(), RestoreScratch::default());
        for index in 0..job.pieces.count() {
            job.make(index, &mut scratch)?;
            taken.take(&mut scratch)?;
            out[job.pieces.bytes(index)].copy_from_slice(scratch.words());
        }
        taken.finish().map(drop)
    }

    /// What `work` makes of the entry that tensor `name` is stored in. Errors name the tensor.
    fn of_tensor<'a, T>(&'a self, name: &str, work: impl FnOnce(&'a Entry) -> Result<T>) -> Result<T> {
        work(self.resolve(self.entry(name)?)?).map_err(|e| e.of_tensor(name))
    }

    /// The resident delta of `entry`: as it is stored, or encoded again on `base`.
    fn delta(&self, entry: &Entry, base: Compared<'_>, prefer: Option<Prefer>) -> Result<Vec<u8>> {
        self.check_trust(entry, &base.0)?;
        if let Some(bytes) = self.as_stored(entry, prefer)? {
            if let (words, None) = base {
                compared(entry, words, joined_digest(entry, &words)?)?;
            }
            return Ok(bytes);
        }
        if entry.codec == Codec::Unchanged {
            let (words, known) = base;
            let digest = known.map_or_else(|| joined_digest(entry, &words), Ok)?;
            compared(entry, words, digest)?;
            return unchanged_delta(entry, digest);
        }
        let restore = Restore::new(self, entry, Some(base))?;
        reencode::resident(&restore, prefer.or(entry.prefer).unwrap_or(Prefer::Memory))
    }

    /// The stored resident delta, if it is one for `prefer`.
    fn as_stored(&self, entry: &Entry, prefer: Option<Prefer>) -> Result<Option<Vec<u8>>> {
        let holds = matches!(entry.codec, Codec::Resident | Codec::ResidentZstd);
        let other = prefer.is_some() && entry.prefer != prefer;
        if !holds || (other && entry.encoding != Some(Encoding::Unchanged)) {
            return Ok(None);
        }
        let blob = Blob::of(self.container(), entry)?;
        let len =
            usize::try_from(blob.len()).map_err(|_| Error::unsupported("too large for this machine"))?;
        debug_assert!(len as u64 <= resident_limit(entry.bytes));
        let mut bytes = vec![0u8; len];
        blob.read(0, &mut bytes, &mut Inflater::default())?;
        let view = Resident::parse(&bytes)?;
        check_delta(entry, view.header())?;
        view.check()?;
        Ok(Some(bytes))
    }
}

/// The exchange of the words in `range`, which become `words`.
fn give_exchange(
    base: &Matrix<'_>,
    range: Range<usize>,
    words: &[u8],
    give: &mut TakeExchange<'_>,
) -> Result<()> {
    let run = Shape { n: 1, k: range.len() / base.dtype().word_bytes() };
    let old = Matrix::new(base.dtype(), run, &base.bytes()[range.clone()])?;
    let (exchange, changed) = vector::exchange(&old, &Matrix::new(base.dtype(), run, words)?)?;
    if changed == 0 { Ok(()) } else { give(range, &exchange, changed) }
}

impl Base {
    /// One tensor's fine-tuned bytes into `out`, which has [`Entry::bytes`], from this base.
    ///
    /// # Errors
    /// As [`Package::restore`]; `Mismatch` for a base without the tensor.
    pub fn restore(&self, package: &Package, name: &str, out: &mut [u8]) -> Result<()> {
        package.of_tensor(name, |entry| {
            let base = entry.base.is_some().then(|| on_disk(entry, self)).transpose()?;
            package.restored(entry, base, out)?;
            // Words that were trusted were read once more to be used.
            if package.trust() == Trust::Sha256 { self.check_untouched(entry) } else { Ok(()) }
        })
    }

    /// The resident delta of `package`'s tensor `name` against this base. Words of the base are read only if
    /// the delta must be encoded anew: if none is stored, or one for another preference than is asked for.
    ///
    /// # Errors
    /// As [`Package::resident`]; `Mismatch` for a base without the tensor; `Io` for one that was written to since it was
    /// opened.
    pub fn resident(&self, package: &Package, name: &str, prefer: Option<Prefer>) -> Result<Vec<u8>> {
        package.of_tensor(name, |entry| {
            let made = package.delta(entry, on_disk(entry, self)?, prefer)?;
            // A delta that was taken as it is stored belongs to the base as it was when its digests were computed.
            self.check_untouched(entry)?;
            Ok(made)
        })
    }

    /// The files that `entry` takes its base from are as they were when they were opened.
    fn check_untouched(&self, entry: &Entry) -> Result<()> {
        match &entry.base {
            Some(wanted) if wanted.parts.is_empty() => self.find(entry, wanted)?.0.check_unchanged(),
            Some(_) => self.checkpoint().files().iter().try_for_each(TensorFile::check_unchanged),
            None => Ok(()),
        }
    }
}

/// The resident delta of a tensor that is its base, whose digest is `digest`.
fn unchanged_delta(entry: &Entry, digest: Digest) -> Result<Vec<u8>> {
    let dtype =
        entry.word_dtype().ok_or_else(|| Error::corrupt(format!("a delta of dtype {}", entry.dtype)))?;
    let done = Assembler::new(dtype, &Plan::unchanged(entry.shape()?))?.finish(digest)?;
    Ok(done.head)
}

/// The base tensor of `entry`, which the caller has in memory.
fn in_memory<'a>(entry: &Entry, base: &Matrix<'a>) -> Result<Compared<'a>> {
    if entry.base.is_none() {
        return Err(stored_alone());
    }
    check_kind(entry, base.dtype(), base.shape())?;
    compared(entry, TensorWords::Memory(base.bytes()), base.digest())
}

/// `Mismatch` for a base of another dtype or shape than the entry's.
fn check_kind(entry: &Entry, dtype: Dtype, shape: Shape) -> Result<()> {
    let own = entry.shape()?;
    if entry.word_dtype() == Some(dtype) && own == shape {
        return Ok(());
    }
    let of = &entry.dtype;
    Err(Error::mismatch(format!(
        "is a delta of a {own} matrix of {of}, but the base is a {shape} matrix of {dtype}"
    )))
}

/// The base tensor of `entry` in an open base.
fn on_disk<'a>(entry: &'a Entry, base: &'a Base) -> Result<Compared<'a>> {
    let wanted = entry.base.as_ref().ok_or_else(stored_alone)?;
    if !wanted.parts.is_empty() {
        // No file and no cache has its digest: it is that of the words, as they are read.
        return Ok((TensorWords::Parts(base.checkpoint(), &wanted.parts), None));
    }
    let (file, info, digest) = base.find(entry, wanted)?;
    let file = &file.tensors;
    if (&info.dtype, &info.dims, info.bytes()) != (&entry.dtype, &entry.dims, entry.bytes) {
        return Err(other_kind(entry, info));
    }
    compared(entry, TensorWords::File(file, info), digest)
}

/// The digest of a base tensor that is put together, where no delta is made anew and so none of its words is read otherwise.
fn joined_digest(entry: &Entry, words: &TensorWords<'_>) -> Result<Digest> {
    let dtype =
        entry.word_dtype().ok_or_else(|| Error::corrupt(format!("a delta of dtype {}", entry.dtype)))?;
    digest_of_words(words, dtype, entry.shape()?)
}

fn compared<'a>(entry: &Entry, words: TensorWords<'a>, found: Digest) -> Result<Compared<'a>> {
    let wanted = entry.base.as_ref().ok_or_else(stored_alone)?;
    if !wanted.is(found) {
        return Err(another_base(wanted, found));
    }
    Ok((words, Some(found)))
}
