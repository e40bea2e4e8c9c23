//! `pack`: two checkpoints into a package. Files side by side, each in order on several threads; memory holds a piece of a
//! tensor per thread and never a tensor.
//!
//! A file's sha256 is computed by the thread that takes a piece, in order, while the other threads make theirs: on two cores
//! nobody waits for it as long as it takes less time than the rest of a piece (it takes a seventh of packing, two fifths of
//! unpacking). Threads that have no file left help with those of others. It is never taken from the name of a blob in a
//! Hugging Face cache, which is the sha256 that was downloaded: that is no word about the bytes that are read now, and a
//! package that tells another sha256 than that of its own words is refused when it is unpacked, when it is too late.

use super::encode::{BaseWords, EncodeScratch, TensorJob};
use crate::error::{Error, Result};
use crate::package::checkpoint::bases::BaseDigests;
use crate::package::checkpoint::files::{CarriedFile, Checkpoint, TensorFile};
use crate::package::checkpoint::lonely::Lonely;
use crate::package::checkpoint::pairing::{FoundBases, Paired, Pairs, pair};
use crate::package::format::contents::{Contents, ContentsPart, check_listed};
use crate::package::format::frames::{Deflater, FRAME_BYTES, compress_small};
use crate::package::format::parts::NO_PARTS;
use crate::package::format::record::{self, SourceFile};
use crate::package::format::stored::FramesBody;
use crate::package::format::totals::Report;
use crate::package::format::words::TensorWords;
use crate::package::io::aligned::Aligned;
use crate::package::io::ordered::{self, Crew};
use crate::package::io::regular::open_regular;
use crate::package::io::spool::Spool;
use crate::package::io::temp::check_target;
use crate::package::options::{Destination, PackOptions, Run};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Pack the checkpoint `fine_tuned` against the checkpoint `base`, each a safetensors file or a folder.
///
/// # Errors
/// `Io`, `Corrupt`, `Truncated`, `Mismatch` or `Unsupported` inputs as [`Checkpoint::open`], `InvalidArgument` for bad options
/// or an `out` that is one of the inputs. Messages name file and tensor; nothing appears at a path then.
pub fn pack_files(
    base: &Path,
    fine_tuned: &Path,
    out: Destination<'_>,
    options: &PackOptions,
    run: &Run<'_>,
) -> Result<Report> {
    let (base, ft) = (Checkpoint::open_base(base)?, Checkpoint::open(fine_tuned)?);
    let beside = match &out {
        Destination::Path(path) => Some(*path),
        Destination::Stream(_) => None,
    };
    let digests = BaseDigests::cached(&base);
    let job = Pack::plan((&base, &digests), &ft, beside, options, run)?;
    let parts = job.parts()?;
    job.write(parts, out)
}

/// An output must not replace what it is made from.
pub(crate) fn refuse_overwrite(out: &Path, input: &Checkpoint) -> Result<()> {
    let Ok(target) = out.canonicalize() else { return Ok(()) };
    let places = input.files().iter().map(|f| &f.place).chain(input.carried().iter().map(|f| &f.place));
    match places.into_iter().find(|p| p.canonicalize().is_ok_and(|p| p == target)) {
        Some(p) => Err(Error::invalid(format!("the output would overwrite the input {}", p.display()))),
        None => Ok(()),
    }
}

/// One fine-tune on its way into a package.
pub(super) struct Pack<'a> {
    pub(super) base: &'a Checkpoint,
    pub(super) ft: &'a Checkpoint,
    digests: &'a BaseDigests,
    pub(super) bases: FoundBases<'a>,
    same: Vec<Vec<Option<&'a str>>>,
    removed: Vec<&'a str>,
    lonely: Lonely,
    options: &'a PackOptions,
    run: &'a Run<'a>,
    beside: Option<&'a Path>,
}

impl<'a> Pack<'a> {
    /// Find the base of every tensor, and refuse what cannot be packed, before any work.
    pub(super) fn plan(
        (base, digests): (&'a Checkpoint, &'a BaseDigests),
        ft: &'a Checkpoint,
        beside: Option<&'a Path>,
        options: &'a PackOptions,
        run: &'a Run<'a>,
    ) -> Result<Self> {
        if let Some(path) = beside {
            check_target(path)?;
            refuse_overwrite(path, base)?;
            refuse_overwrite(path, ft)?;
        }
        let Pairs { bases, same, removed, lonely } = pair(base, ft, options.strip_prefix.as_deref())?;
        ft.tensors().try_for_each(|(_, t)| check_listed(&t.name, &t.dims))?;
        Ok(Self { base, ft, digests, bases, same, removed, lonely, options, run, beside })
    }

    /// Write the package of its files' parts, if nobody has changed what they were made of.
    pub(super) fn write(&self, parts: Vec<ContentsPart>, out: Destination<'_>) -> Result<Report> {
        self.base.files().iter().chain(self.ft.files()).try_for_each(TensorFile::check_unchanged)?;
        self.remember(&parts);
        let removed = self.removed.iter().map(|&name| name.to_owned()).collect();
        let report = Contents { parts, removed, folder: self.ft.is_folder() }.write(out)?;
        let notes: Vec<String> = self.ft.note().into_iter().chain(self.lonely.advice()).collect();
        Ok(Report { advice: (!notes.is_empty()).then(|| notes.join("; ")), ..report })
    }
}

impl Pack<'_> {
    /// Every file of the fine-tune, stored.
    fn parts(&self) -> Result<Vec<ContentsPart>> {
        let (files, carried) = (self.ft.files(), self.ft.carried());
        let total = files.iter().map(|f| f.tensors.file_bytes()).chain(carried.iter().map(|c| c.bytes)).sum();
        self.run.begin("pack", total);
        let count = files.len() + carried.len();
        let done: Vec<Mutex<Option<ContentsPart>>> = (0..count).map(|_| Mutex::new(None)).collect();
        ordered::side_by_side(ordered::threads(self.run.jobs), count, |i, crew| {
            let part = match files.get(i) {
                Some(file) => self.tensor_file(i, file, crew),
                None => self.carried_file(&carried[i - files.len()]),
            }?;
            *done[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(part);
            Ok(())
        })?;
        let take = |m: Mutex<Option<ContentsPart>>| m.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.into_iter().map(|m| take(m).ok_or_else(|| Error::internal("a file was left out"))).collect()
    }

    /// The tensors of file `f`.
    pub(super) fn jobs<'j>(&'j self, f: usize, file: &'j TensorFile) -> Result<Vec<TensorJob<'j>>> {
        let tensors = &file.tensors.header().tensors;
        let list = tensors.iter().enumerate().map(|(i, t)| {
            let same = self.same[f][i].map(str::to_owned);
            let delta = match (&self.bases[f][i], t.matrix()) {
                (Some(paired), Some((dtype, shape))) if same.is_none() => {
                    Some((dtype, shape, self.base_words(paired)))
                }
                _ => None,
            };
            let mut job =
                TensorJob::new((&t.name, &t.dtype, &t.dims), TensorWords::File(&file.tensors, t), delta)?;
            job.same = same;
            if self.ft.find(&t.name).is_some_and(|(at, _)| at != f) {
                job.again = Some(f);
            }
            Ok(job)
        });
        list.collect()
    }

    fn base_words<'j>(&'j self, paired: &'j Paired<'_>) -> BaseWords<'j> {
        let words = paired.words(self.base);
        match paired {
            Paired::Whole((at, b)) => {
                let path = self.base.files()[*at].path.as_str();
                let file = self.base.has_several(&b.name).then_some(path);
                BaseWords { name: &b.name, file, parts: &NO_PARTS, words }
            }
            Paired::Parts(parts) => BaseWords { name: paired.name(), file: None, parts, words },
        }
    }

    fn tensor_file(&self, f: usize, file: &TensorFile, crew: &Crew) -> Result<ContentsPart> {
        let within = |e: Error| e.within(file.place.display());
        let jobs = self.jobs(f, file).map_err(within)?;
        let items: Vec<(usize, usize)> = jobs
            .iter()
            .enumerate()
            .flat_map(|(j, job)| (0..job.pieces.count()).map(move |c| (j, c)))
            .collect();
        let mut sha = sha256_begun(file);
        let (mut part, mut open) = (ContentsPart::new(Spool::create(self.beside)?), None);
        ordered::in_order::<EncodeScratch>(
            crew,
            items.len(),
            |i, s| jobs[items[i].0].make(items[i].1, self.options, s).map_err(within),
            |i, s| {
                let (j, c) = items[i];
                if c == 0 {
                    open = Some(jobs[j].open(self.options, &mut part.spool)?);
                }
                sha.update(s.fine_tuned());
                self.run.advance(s.fine_tuned().len() as u64)?;
                if let Some(o) = &mut open {
                    o.take(c, &mut part.spool, s)?;
                }
                if let Some(o) = open.take_if(|_| c + 1 == jobs[j].pieces.count()) {
                    o.finish(&mut part)?;
                }
                Ok(())
            },
        )?;
        file_part(file, sha, part)
    }

    /// A file without tensors, stored.
    pub(super) fn carried_file(&self, file: &CarriedFile) -> Result<ContentsPart> {
        let store = || -> Result<ContentsPart> {
            let (mut sha, mut part, mut body) =
                (Sha256::new(), ContentsPart::new(Spool::create(self.beside)?), FramesBody::default());
            let mut deflater = Deflater::new(self.options.level())?;
            let (mut input, mut bytes) = (open_regular(&file.place)?, 0u64);
            let (mut raw, mut frame) = (Vec::new(), Vec::new());
            loop {
                raw.clear();
                (&mut input).take(FRAME_BYTES as u64).read_to_end(&mut raw)?;
                if raw.is_empty() {
                    break;
                }
                sha.update(&raw);
                bytes += raw.len() as u64;
                frame.clear();
                deflater.frame(&raw, true, &mut frame)?;
                body.push(&mut part.spool, &frame, &[(frame.len(), raw.len())])?;
                self.run.advance(raw.len() as u64)?;
            }
            let check = body.finish(&mut part.spool, 0)?.to_string();
            let (path, executable) = (file.path.clone(), file.executable);
            let sha256 = hex(&sha.finalize());
            let source = SourceFile { path, sha256, bytes, executable, header_bytes: None, check };
            part.file = Some((source, 0..part.spool.len()));
            Ok(part)
        };
        store().map_err(|e| e.within(file.place.display()))
    }

    /// Keep the digests that packing has computed.
    fn remember(&self, parts: &[ContentsPart]) {
        let mut found: HashMap<usize, Vec<_>> = HashMap::new();
        let entries = parts.iter().flat_map(|p| &p.entries);
        for (e, base) in entries.filter_map(|e| Some((e, e.base.as_ref().filter(|b| b.parts.is_empty())?))) {
            if let Some((at, _)) = self.base.find_base(e, base) {
                found.entry(at).or_default().push((base.name.clone(), base.digest));
            }
        }
        self.digests.store(self.base, found);
    }
}

/// The sha256 of a file, as far as its tensors.
pub(super) fn sha256_begun(file: &TensorFile) -> Sha256 {
    let text = file.tensors.header_text().as_bytes();
    let mut sha = Sha256::new();
    sha.update((text.len() as u64).to_le_bytes());
    sha.update(text);
    sha
}

/// A file of tensors, all of which are on the spool: its header goes there, too.
pub(super) fn file_part(file: &TensorFile, sha: Sha256, mut part: ContentsPart) -> Result<ContentsPart> {
    part.flush()?;
    let text = file.tensors.header_text().as_bytes();
    let stored = compress_small(text)?;
    let start = part.spool.len();
    part.spool.append(&stored)?;
    let source = SourceFile {
        path: file.path.clone(),
        sha256: hex(&sha.finalize()),
        bytes: file.tensors.file_bytes(),
        executable: file.executable,
        header_bytes: Some(text.len() as u64),
        check: record::check_of(&stored).to_string(),
    };
    part.file = Some((source, start..part.spool.len()));
    Ok(part)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// sha256 of a file, 64 hexadecimal digits.
pub(crate) fn sha256_file(path: &Path) -> Result<String> {
    let hash = || -> Result<String> {
        let (file, mut sha) = (open_regular(path)?, Sha256::new());
        let (mut room, mut at) = (Aligned::default(), 0u64);
        loop {
            let buffer = room.room(256 << 10, at);
            match file.read_at(buffer, at)? {
                0 => return Ok(hex(&sha.finalize())),
                n => {
                    sha.update(&buffer[..n]);
                    at += n as u64;
                }
            }
        }
    };
    hash().map_err(|e| e.within(path.display()))
}
