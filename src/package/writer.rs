//! Writing a package: stored tensors wait in nameless spool files, since the header that goes first holds their sizes; the
//! whole then appears under its name at once.

use super::advice::Lonely;
use super::chunks::Chunks;
use super::container::{LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, dtype_bits};
use super::encode::{BaseWords, Job, Scratch};
use super::ordered;
use super::record::{self, Entry, SourceFile};
use super::temp::{Output, Sequential, Spool, check_target};
use super::words::Words;
use super::{Codec, Destination, PackOptions, Report};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};
use std::collections::{BTreeMap, HashMap};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_128;

/// Data begin at a multiple of this, so that resident deltas can be mapped and used in place.
const ALIGN: u64 = 64;

/// A tensor to pack: contiguous, row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Name in its checkpoint.
    pub name: &'a str,
    /// safetensors dtype name, such as `BF16`; names unknown to this crate are stored alone.
    pub dtype: &'a str,
    /// All dimensions.
    pub dims: &'a [usize],
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Stored bytes of some tensors and files, and what they are.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) spool: Spool,
    pub(super) entries: Vec<Entry>,
    /// A source file and where its stored entry lies in the spool.
    pub(super) file: Option<(SourceFile, Range<u64>)>,
}

/// All that a package holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) parts: Vec<Part>,
    pub(super) removed: Vec<String>,
    pub(super) folder: bool,
}

impl Contents {
    /// Every stored range in the order of the package's data: part, range, name.
    fn order(&self) -> Vec<(usize, Range<u64>, String)> {
        let tensors = || {
            let parts = self.parts.iter().enumerate();
            parts.flat_map(|(p, part)| part.entries.iter().map(move |e| (p, e)))
        };
        let place = |(p, e): (usize, &Entry)| (p, e.range.clone(), e.key.clone());
        // Resident deltas first: they are multiples of 64 bytes, so all of them stay aligned.
        let mut out: Vec<_> = tensors().filter(|(_, e)| e.codec == Codec::Resident).map(place).collect();
        out.extend(tensors().filter(|(_, e)| e.codec != Codec::Resident).map(place));
        for (i, (p, (_, range))) in self.files().enumerate() {
            out.push((p, range.clone(), record::file_entry(i)));
        }
        out
    }

    fn files(&self) -> impl Iterator<Item = (usize, &(SourceFile, Range<u64>))> {
        self.parts.iter().enumerate().filter_map(|(p, part)| part.file.as_ref().map(|f| (p, f)))
    }

    /// The header text, padded so that the data are aligned.
    fn header(&self, order: &[(usize, Range<u64>, String)]) -> Result<String> {
        let mut metadata = BTreeMap::from([
            ("format".to_string(), record::FORMAT.to_string()),
            ("format_version".to_string(), record::VERSION.to_string()),
        ]);
        for e in self.parts.iter().flat_map(|p| &p.entries) {
            if metadata.insert(record::tensor_key(&e.key), record::encode(e)?).is_some() {
                return Err(Error::invalid(format!("tensor `{}` was added twice", e.name)));
            }
        }
        if !self.removed.is_empty() {
            metadata.insert(record::REMOVED.into(), record::to_json(&self.removed)?);
        }
        let files: Vec<_> = self.files().map(|(_, (f, _))| f).collect();
        if !files.is_empty() {
            metadata.insert(record::FILES.into(), record::to_json(&files)?);
        }
        if self.folder {
            metadata.insert(record::SOURCE.into(), record::FOLDER.into());
        }
        let mut at = 0;
        let mut infos = Vec::new();
        for (_, range, name) in order {
            let bytes = range.end - range.start;
            let dims = vec![usize::try_from(bytes).map_err(|_| Error::internal("stored bytes"))?];
            infos.push(TensorInfo { name: name.clone(), dtype: "U8".into(), dims, range: at..at + bytes });
            at += bytes;
        }
        metadata.insert(record::CHECK.into(), record::header_check(&metadata, &infos).to_string());
        header_text(&metadata, &infos)
    }

    /// Write the package; gives its totals.
    pub(super) fn write(mut self, out: Destination<'_>) -> Result<Report> {
        let order = self.order();
        let header = self.header(&order)?;
        let report = self.report(&header, &order);
        match out {
            Destination::Stream(stream) => {
                self.write_to(&order, &header, stream)?;
                stream.flush()?;
            }
            Destination::Path(path) => {
                let output = Output::create(path)?;
                let mut to = BufWriter::with_capacity(1 << 20, Sequential::new(output.file()));
                let written = self.write_to(&order, &header, &mut to);
                let flushed = to.flush();
                drop(to);
                written.and(flushed.map_err(Error::from)).map_err(|e| e.within(path.display()))?;
                output.commit()?;
            }
        }
        Ok(report)
    }

    fn write_to(
        &mut self,
        order: &[(usize, Range<u64>, String)],
        header: &str,
        out: &mut dyn Write,
    ) -> Result<()> {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for (p, range, _) in order {
            self.parts[*p].spool.replay(range.clone(), |bytes| Ok(out.write_all(bytes)?))?;
        }
        Ok(())
    }

    fn report(&self, header: &str, order: &[(usize, Range<u64>, String)]) -> Report {
        let mut report = Report::default();
        self.parts.iter().flat_map(|p| &p.entries).for_each(|e| report.count(e));
        report.set_files(self.files().map(|(_, (f, _))| f), self.folder);
        report.removed = self.removed.len();
        report.package_bytes =
            LENGTH_BYTES + header.len() as u64 + order.iter().map(|(_, r, _)| r.end - r.start).sum::<u64>();
        report
    }
}

/// A safetensors header, padded with spaces so that the data begin at a multiple of 64 bytes.
pub(super) fn header_text(metadata: &BTreeMap<String, String>, infos: &[TensorInfo]) -> Result<String> {
    let mut text = String::from("{");
    if !metadata.is_empty() {
        text += &format!("\"__metadata__\":{},", record::to_json(metadata)?);
    }
    for t in infos {
        text += &format!(
            "{}:{{\"dtype\":{},\"shape\":{},\"data_offsets\":[{},{}]}},",
            record::to_json(&t.name)?,
            record::to_json(&t.dtype)?,
            record::to_json(&t.dims)?,
            t.range.start,
            t.range.end
        );
    }
    if text.ends_with(',') {
        text.pop();
    }
    text.push('}');
    while !(LENGTH_BYTES + text.len() as u64).is_multiple_of(ALIGN) {
        text.push(' ');
    }
    if text.len() as u64 > MAX_HEADER_BYTES {
        return Err(Error::unsupported(format!(
            "a header of {} bytes is too long for safetensors",
            text.len()
        )));
    }
    Ok(text)
}

/// Refuse a name that belongs to the format.
pub(super) fn check_name(name: &str) -> Result<()> {
    if name.starts_with(record::RESERVED) || name == "__metadata__" {
        return Err(Error::invalid("the name is reserved").within(format_args!("tensor `{name}`")));
    }
    Ok(())
}

/// What makes two tensors one: digest, dtype and dimensions.
type Content = (u128, String, Vec<usize>);

/// A package being written from tensors in memory. Dropped before [`Writer::finish`], it leaves no file.
#[derive(Debug)]
pub struct Writer {
    options: PackOptions,
    jobs: usize,
    path: PathBuf,
    part: Part,
    removed: Vec<String>,
    /// Tensors that may be met again, by digest, dtype and dimensions; and the digest of the base each had.
    seen: HashMap<Content, (String, Option<u128>)>,
    lonely: Lonely,
}

impl Writer {
    /// Begin a package that will appear at `path`. Its folder must exist and be writable.
    ///
    /// # Errors
    /// `Io`; `InvalidArgument` for a directory.
    pub fn create(path: &Path, options: PackOptions) -> Result<Self> {
        check_target(path)?;
        let part = Part { spool: Spool::create(Some(path))?, entries: Vec::new(), file: None };
        let (removed, seen) = (Vec::new(), HashMap::new());
        Ok(Self { options, jobs: 0, path: path.into(), part, removed, seen, lonely: Lonely::default() })
    }

    /// Threads that encode a tensor; 0, the default, takes one per core.
    #[must_use]
    pub fn jobs(mut self, jobs: usize) -> Self {
        self.jobs = jobs;
        self
    }

    /// Add one fine-tuned tensor. It becomes a delta if `base` has the same dtype and dimensions, else it is stored alone; one
    /// that equals an earlier one (a tied weight) is stored once.
    ///
    /// # Errors
    /// `InvalidArgument` for a name used twice or reserved, or bytes that do not fit dtype and dimensions; `Io`.
    pub fn add(&mut self, fine_tuned: &Tensor<'_>, base: Option<&Tensor<'_>>) -> Result<()> {
        check_name(fine_tuned.name)?;
        let given = base.map(|b| (b.dtype, b.dims));
        let base = base.filter(|b| (b.dtype, b.dims) == (fine_tuned.dtype, fine_tuned.dims));
        [Some(fine_tuned), base]
            .into_iter()
            .flatten()
            .try_for_each(|t| check_tensor(t).map_err(|e| e.within(format_args!("tensor `{}`", t.name))))?;
        if self.part.entries.iter().any(|e| e.name == fine_tuned.name) {
            return Err(Error::invalid(format!("tensor `{}` was added twice", fine_tuned.name)));
        }
        let mut job = job(fine_tuned, base)?;
        job.same = self.met_before(fine_tuned, base);
        if job.same.is_some() {
            job.delta = None;
        }
        let entry = store(&job, &self.options, self.jobs, &mut self.part.spool)?;
        let kind = (fine_tuned.dtype, fine_tuned.dims);
        self.lonely.count(fine_tuned.name, kind, fine_tuned.bytes.len() as u64, given);
        self.part.entries.push(entry);
        Ok(())
    }

    /// The earlier tensor with the same bytes, whose base has the same bytes too.
    fn met_before(&mut self, ft: &Tensor<'_>, base: Option<&Tensor<'_>>) -> Option<String> {
        const WORTH: usize = 4096;
        if ft.bytes.len() < WORTH {
            return None;
        }
        let base = base.map(|b| xxh3_128(b.bytes));
        let key = (xxh3_128(ft.bytes), ft.dtype.to_owned(), ft.dims.to_vec());
        match self.seen.get(&key) {
            Some((name, earlier)) => (base.is_none() || base == *earlier).then(|| name.clone()),
            None => {
                self.seen.insert(key, (ft.name.to_owned(), base));
                None
            }
        }
    }

    /// Note a base tensor that the fine-tune lacks.
    pub fn removed(&mut self, name: &str) {
        self.removed.push(name.into());
    }

    /// Write header and data to a temporary file beside the path, sync it and rename it.
    ///
    /// # Errors
    /// `Io`; `Unsupported` for a header beyond the limit of safetensors. No file is left then.
    pub fn finish(self) -> Result<Report> {
        let contents = Contents { parts: vec![self.part], removed: self.removed, folder: false };
        let report = contents.write(Destination::Path(&self.path))?;
        Ok(Report { advice: self.lonely.advice(), ..report })
    }
}

fn check_tensor(t: &Tensor<'_>) -> Result<()> {
    let Some(bits) = dtype_bits(t.dtype) else { return Ok(()) };
    let want = t.dims.iter().try_fold(bits, |a, &d| a.checked_mul(d as u64));
    if want != Some(t.bytes.len() as u64 * 8) {
        return Err(Error::invalid(format!("{} bytes are not {} {:?}", t.bytes.len(), t.dtype, t.dims)));
    }
    Ok(())
}

fn job<'a>(ft: &Tensor<'a>, base: Option<&Tensor<'a>>) -> Result<Job<'a>> {
    let delta = match (base, Dtype::from_name(ft.dtype)) {
        (Some(b), Some(dtype)) => {
            let words = BaseWords { name: b.name, words: Words::Memory(b.bytes), digest: None };
            Some((dtype, Shape::of_dims(ft.dims)?, words))
        }
        _ => None,
    };
    Job::new((ft.name, ft.dtype, ft.dims), Words::Memory(ft.bytes), delta)
}

/// Encode one tensor onto the spool with several threads.
fn store(job: &Job<'_>, options: &PackOptions, jobs: usize, spool: &mut Spool) -> Result<Entry> {
    let chunks: Chunks = job.chunks;
    let mut open = None;
    ordered::in_order::<Scratch>(
        ordered::threads(jobs),
        chunks.count(),
        |i, s| job.make(i, options, s),
        |i, s| {
            if i == 0 {
                open = Some(job.open(options, spool)?);
            }
            open.as_mut().map_or(Ok(()), |o| o.take(i, spool, s))
        },
    )?;
    open.ok_or_else(|| Error::internal("a tensor without pieces"))?.finish(spool)
}
