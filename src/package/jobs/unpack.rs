//! `unpack` and `verify`: base and package into the files that were packed, or into nothing but a comparison. Files side by
//! side, each in order on several threads; memory holds a piece of a tensor per thread.

use super::compare::{compare_files, compare_names, in_fine_tune};
use super::pack::{hex, refuse_overwrite};
use super::restore::{Restore, RestoreScratch};
use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::checkpoint::bases::BaseDigests;
use crate::package::checkpoint::files::{Checkpoint, TensorFile};
use crate::package::format::container::{LENGTH_BYTES, TensorInfo};
use crate::package::format::contents;
use crate::package::format::frames::{FRAME_BYTES, Inflater};
use crate::package::format::reader::{Package, parse_source_header};
use crate::package::format::record::{BaseTensor, Entry};
use crate::package::format::refusals::{missing_in_base, other_kind};
use crate::package::format::totals::Report;
use crate::package::format::words::TensorWords;
use crate::package::io::aligned::Aligned;
use crate::package::io::ordered::{self, Crew};
use crate::package::io::temp::{Output, OutputFolder, refuses};
use crate::package::io::writeback::Writeback;
use crate::package::options::{Destination, Run, Trust};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Restore what was packed from `base` and `package` into `out`: byte for byte the file or folder, or, if the package was made
/// from tensors in memory, a safetensors file of them in order of their names.
///
/// # Errors
/// `Mismatch` for another base, naming the tensor and both digests; `Corrupt` or `Truncated` for a damaged package; `Io`;
/// `InvalidArgument` for an `out` that is an input, or a folder that is not empty; `Unsupported` for a folder to a stream.
/// Nothing appears at a path then.
pub fn unpack_files(base: &Path, package: &Path, out: Destination<'_>, run: &Run<'_>) -> Result<Report> {
    let within = |e: Error| e.within(package.display());
    let (checkpoint, mut opened) = (Checkpoint::open_base(base)?, Package::open(package)?);
    opened.trust_in(run.trust).map_err(within)?;
    opened.check_trust_in(&checkpoint, run).map_err(within)?;
    let mut job = Unpack::new(&checkpoint, &opened, None, run);
    if let Destination::Path(path) = &out {
        job.out = Some(path);
    }
    match out {
        Destination::Stream(_) if opened.is_folder() => {
            return Err(within(Error::unsupported(
                "was made from a folder, which no stream can take; name an output",
            )));
        }
        Destination::Stream(stream) => {
            job.begin("unpack");
            job.tensor_file(0, Sink::Stream(stream), &Crew::of(run.jobs)).map_err(within)?;
        }
        Destination::Path(path) if opened.is_folder() => {
            let folder = OutputFolder::create(path)?;
            job.all("unpack", &|i| folder.file(Path::new(&opened.files()[i].path)).map(Some))
                .map_err(within)?;
            folder.commit()?;
        }
        Destination::Path(path) => {
            refuse_overwrite(path, &checkpoint)?;
            if path.canonicalize().is_ok_and(|p| package.canonicalize().is_ok_and(|q| p == q)) {
                return Err(Error::invalid(format!(
                    "the output would overwrite the input {}",
                    package.display()
                )));
            }
            let output = Output::create(path)?;
            job.begin("unpack");
            job.tensor_file(0, Sink::File(output.file()), &Crew::of(run.jobs)).map_err(within)?;
            output.commit()?;
        }
    }
    job.remember();
    Ok(Report::of(&opened))
}

/// Restore everything without writing it: each base digest and stored digest, each delta, and the sha256 of the files that
/// were packed are compared; with `fine_tuned`, every tensor (and every file's sha256) with that checkpoint, too.
///
/// # Errors
/// As [`unpack_files`]; `Mismatch` naming the first tensor or file that differs from `fine_tuned`.
pub fn verify_files(base: &Path, package: &Path, fine_tuned: Option<&Path>, run: &Run<'_>) -> Result<Report> {
    let within = |e: Error| e.within(package.display());
    let (checkpoint, mut opened) = (Checkpoint::open_base(base)?, Package::open(package)?);
    opened.trust_in(run.trust).map_err(within)?;
    let ft = fine_tuned.map(Checkpoint::open).transpose()?;
    if let Some(ft) = &ft {
        compare_names(&opened, ft).map_err(within)?;
    }
    opened.check_trust_in(&checkpoint, run).map_err(within)?;
    let job = Unpack::new(&checkpoint, &opened, ft.as_ref(), run);
    if opened.files().is_empty() {
        job.begin("verify");
        job.tensor_file(0, Sink::Nothing, &Crew::of(run.jobs)).map_err(within)?;
    } else {
        job.all("verify", &|_| Ok(None)).map_err(within)?;
    }
    if let Some(ft) = &ft {
        compare_files(&opened, ft, run)?;
    }
    job.remember();
    Ok(Report::of(&opened))
}

/// A restored file's header, and its tensors with their places in the data.
type Plan<'a> = (Vec<u8>, Vec<(&'a Entry, u64)>);

/// Where restored bytes go.
enum Sink<'a> {
    Nothing,
    File(&'a File),
    Stream(&'a mut (dyn Write + Send)),
}

struct Unpack<'a> {
    base: &'a Checkpoint,
    package: &'a Package,
    digests: BaseDigests,
    ft: Option<&'a Checkpoint>,
    run: &'a Run<'a>,
    /// Where files go, for messages.
    out: Option<&'a Path>,
    /// Base tensors whose digests were found right on the way.
    right: Mutex<HashMap<usize, Vec<(String, Digest)>>>,
}

impl<'a> Unpack<'a> {
    fn new(base: &'a Checkpoint, package: &'a Package, ft: Option<&'a Checkpoint>, run: &'a Run<'a>) -> Self {
        let (digests, right) = (BaseDigests::cached(base), Mutex::new(HashMap::new()));
        Self { base, package, digests, ft, run, out: None, right }
    }

    /// A failure to write is one of the output, not of the package.
    fn wrote<T>(&self, result: std::io::Result<T>) -> Result<T> {
        result.map_err(|e| match self.out {
            Some(out) => Error::from(e).within(format_args!("cannot write {}", out.display())),
            None => e.into(),
        })
    }

    fn begin(&self, what: &str) {
        let files = self.package.files().iter().map(|f| f.bytes);
        let total = match self.package.files() {
            [] => self.package.entries().iter().fold(0u64, |a, e| a.saturating_add(e.bytes)),
            _ => files.fold(0u64, u64::saturating_add),
        };
        self.run.begin(what, total);
    }

    /// Every source file, each into what `open` gives for it.
    fn all(&self, what: &str, open: &(dyn Fn(usize) -> Result<Option<File>> + Sync)) -> Result<()> {
        self.begin(what);
        let files = self.package.files();
        ordered::side_by_side(ordered::threads(self.run.jobs), files.len(), |i, crew| {
            let file = open(i)?;
            let done = match (files[i].header_bytes, &file) {
                (Some(_), Some(file)) => self.tensor_file(i, Sink::File(file), crew),
                (Some(_), None) => self.tensor_file(i, Sink::Nothing, crew),
                (None, file) => self.carried_file(i, file.as_ref()),
            };
            done.map_err(
                |e| if files.len() > 1 { e.within(format_args!("`{}`", files[i].path)) } else { e },
            )?;
            if let Some(file) = file {
                if files[i].executable {
                    let mode = file.metadata()?.permissions().mode();
                    let made = file.set_permissions(Permissions::from_mode(mode | (mode & 0o444) >> 2));
                    // Where a file system knows no such thing, all files are alike, and there is nothing to restore.
                    self.wrote(made.or_else(|e| if refuses(&e) { Ok(()) } else { Err(e) }))?;
                }
                self.wrote(file.sync_all())?;
            }
            Ok(())
        })
    }

    /// Restore source file `i`, or the tensors in order of their names if there is none.
    fn tensor_file(&self, i: usize, mut sink: Sink<'_>, crew: &Crew) -> Result<()> {
        let (header, order) = self.plan(i)?;
        let jobs = order.iter().map(|(e, _)| self.restore(e)).collect::<Result<Vec<_>>>()?;
        let items: Vec<(usize, usize)> = jobs
            .iter()
            .enumerate()
            .flat_map(|(j, job)| (0..job.pieces.count()).map(move |c| (j, c)))
            .collect();
        let data = LENGTH_BYTES + header.len() as u64;
        let mut sha = self.run.sha256.then(Sha256::new);
        let start = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        sha.iter_mut().for_each(|s| s.update(&start));
        let file = match &mut sink {
            Sink::File(file) => {
                self.wrote(file.set_len(data + order.last().map_or(0, |(e, at)| at + e.bytes)))?;
                Some(*file)
            }
            Sink::Stream(stream) => {
                stream.write_all(&start)?;
                None
            }
            Sink::Nothing => None,
        };
        if let Some(file) = file {
            self.wrote(file.write_all_at(&start, 0))?;
        }
        let put = |(j, c): (usize, usize), s: &RestoreScratch| -> Result<()> {
            let at = jobs[j].pieces.bytes(c).start;
            self.compare(i, order[j].0, at, s)?;
            let at = data + order[j].1 + at as u64;
            file.map_or(Ok(()), |f| self.wrote(f.write_all_at(s.words(), at)))
        };
        let (mut taken, mut early) = (None, file.map(Writeback::of));
        ordered::in_order::<RestoreScratch>(
            crew,
            items.len(),
            |i, s| {
                let (j, c) = items[i];
                jobs[j].make(c, s)?;
                if jobs[j].forwards()? { Ok(()) } else { put((j, c), s) }
            },
            |i, s| {
                let (j, c) = items[i];
                let open = taken.get_or_insert_with(|| jobs[j].begin());
                open.take(s)?;
                if jobs[j].forwards()? {
                    put((j, c), s)?;
                }
                sha.iter_mut().for_each(|h| h.update(s.words()));
                if let Sink::Stream(stream) = &mut sink {
                    stream.write_all(s.words())?;
                }
                early
                    .iter_mut()
                    .for_each(|e| e.until(data + order[j].1 + jobs[j].pieces.bytes(c).end as u64));
                self.run.advance(s.words().len() as u64)?;
                match taken.take_if(|_| c + 1 == jobs[j].pieces.count()) {
                    Some(done) => done.finish().map(|found| self.note(order[j].0, found)),
                    None => Ok(()),
                }
            },
        )?;
        if let Sink::Stream(stream) = &mut sink {
            stream.flush()?;
        }
        self.check_base()?;
        self.compare_sha(i, sha)
    }

    /// Where no sha256 of the result is compared, digests from the cache are all that speaks for the base, and where its own is,
    /// it has been read once before: it must still be what it was when it was opened.
    fn check_base(&self) -> Result<()> {
        if self.run.trust == Trust::Digest && self.run.sha256 && !self.package.files().is_empty() {
            return Ok(());
        }
        self.base.files().iter().try_for_each(TensorFile::check_unchanged)
    }

    fn compare_sha(&self, i: usize, sha: Option<Sha256>) -> Result<()> {
        let Some((sha, file)) = sha.zip(self.package.files().get(i)) else { return Ok(()) };
        let found = hex(&sha.finalize());
        if found == file.sha256 {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "what was restored has sha256 {found}, but the file that was packed had {}",
            file.sha256
        )))
    }

    fn carried_file(&self, i: usize, file: Option<&File>) -> Result<()> {
        let blob = self.package.carried(i)?;
        let (mut sha, mut inflater) = (self.run.sha256.then(Sha256::new), Inflater::default());
        let (mut buffer, mut at) = (vec![0u8; FRAME_BYTES], 0u64);
        while at < blob.len() {
            let n = (blob.len() - at).min(FRAME_BYTES as u64) as usize;
            blob.read(at, &mut buffer[..n], &mut inflater)?;
            sha.iter_mut().for_each(|s| s.update(&buffer[..n]));
            file.map_or(Ok(()), |f| self.wrote(f.write_all_at(&buffer[..n], at)))?;
            self.run.advance(n as u64)?;
            at += n as u64;
        }
        self.compare_sha(i, sha)
    }

    /// The header of restored file `i`, and its tensors with their places in the data.
    fn plan(&self, i: usize) -> Result<Plan<'a>> {
        let Some(file) = self.package.files().get(i) else { return self.own_plan() };
        let text = self.package.source_header(i)?;
        let header = parse_source_header(&text, file)?;
        let order = header.tensors.iter().map(|t| {
            let e = self.package.entry_of(i, &t.name)?;
            if (&e.dtype, &e.dims, e.bytes) != (&t.dtype, &t.dims, t.bytes()) {
                return Err(named(Error::corrupt("its record and the packed file's header disagree"), e));
            }
            Ok((e, t.range.start))
        });
        let order = order.collect::<Result<Vec<_>>>()?;
        let sources = self.package.files().iter().filter(|f| f.header_bytes.is_some()).count();
        if sources == 1 && order.len() != self.package.entries().len() {
            return Err(Error::corrupt(format!(
                "{} tensors, but the file that was packed had {}",
                self.package.entries().len(),
                order.len()
            )));
        }
        Ok((text, order))
    }

    fn own_plan(&self) -> Result<Plan<'a>> {
        let mut order: Vec<&Entry> = self.package.entries().iter().collect();
        order.sort_by_key(|e| &e.name);
        let (mut at, mut infos, mut out) = (0u64, Vec::new(), Vec::new());
        for e in order {
            let end = at.checked_add(e.bytes).ok_or_else(|| Error::corrupt("the tensors' sizes overflow"))?;
            let (name, dtype, dims) = (e.name.clone(), e.dtype.clone(), e.dims.clone());
            infos.push(TensorInfo { name, dtype, dims, range: at..end });
            out.push((e, at));
            at = end;
        }
        Ok((contents::header_text(&BTreeMap::new(), &infos)?.into_bytes(), out))
    }

    fn restore(&self, entry: &'a Entry) -> Result<Restore<'a>> {
        restore_on(self.base, &self.digests, self.package, entry)
    }

    /// Compare a restored piece of source file `i` with the fine-tune given.
    fn compare(&self, i: usize, entry: &Entry, at: usize, s: &RestoreScratch) -> Result<()> {
        let Some((ft, (f, info))) =
            self.ft.and_then(|ft| Some((ft, in_fine_tune(ft, self.package, i, entry)?)))
        else {
            return Ok(());
        };
        let mut room = Aligned::default();
        let words = TensorWords::File(&ft.files()[f].tensors, info);
        if words.get(at..at + s.words().len(), &mut room)? == s.words() {
            return Ok(());
        }
        Err(named(Error::mismatch("base + delta is not the fine-tuned tensor given"), entry))
    }

    /// Keep the digest of its base.
    fn note(&self, entry: &Entry, found: Option<Digest>) {
        let stored = self.package.resolve(entry).ok();
        if let (Some(base), Some(found)) = (stored.and_then(|e| e.base.as_ref()), found)
            && base.parts.is_empty()
            && let Some((f, _)) = stored.and_then(|e| self.base.find_base(e, base))
        {
            let mut right = self.right.lock().unwrap_or_else(PoisonError::into_inner);
            right.entry(f).or_default().push((base.name.clone(), found));
        }
    }

    fn remember(&self) {
        let right = std::mem::take(&mut *self.right.lock().unwrap_or_else(PoisonError::into_inner));
        self.digests.store(self.base, right);
    }
}

/// What restores a tensor of `package` on `base`; digests that are known need not be computed.
pub(crate) fn restore_on<'a>(
    base: &'a Checkpoint,
    digests: &BaseDigests,
    package: &'a Package,
    entry: &'a Entry,
) -> Result<Restore<'a>> {
    let stored = package.resolve(entry)?;
    let known = |(words, wanted, f): (_, &BaseTensor, Option<usize>)| {
        (words, f.and_then(|f| digests.get(f, &wanted.name)))
    };
    let words = words_on(base, stored).map(|found| found.map(known));
    words.and_then(|words| Restore::new(package, stored, words)).map_err(|e| named(e, entry))
}

/// The words in `base` that `entry` is a delta of, as far as names and shapes tell, what it says of them, and the file of a
/// whole tensor.
pub(super) fn words_on<'a>(
    base: &'a Checkpoint,
    entry: &'a Entry,
) -> Result<Option<(TensorWords<'a>, &'a BaseTensor, Option<usize>)>> {
    let Some(wanted) = &entry.base else { return Ok(None) };
    if !wanted.parts.is_empty() {
        return Ok(Some((TensorWords::Parts(base, &wanted.parts), wanted, None)));
    }
    let (f, info) = base.find_base(entry, wanted).ok_or_else(|| missing_in_base(&wanted.name))?;
    if (&info.dtype, &info.dims, info.bytes()) != (&entry.dtype, &entry.dims, entry.bytes) {
        return Err(other_kind(entry, info));
    }
    Ok(Some((TensorWords::File(&base.files()[f].tensors, info), wanted, Some(f))))
}

fn named(e: Error, entry: &Entry) -> Error {
    e.of_tensor(&entry.name)
}
