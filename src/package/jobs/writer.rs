//! A package from tensors in memory: each is encoded by several threads and waits in a spool.

use super::encode::{BaseWords, EncodeScratch, TensorJob};
use crate::error::{Error, Result};
use crate::package::checkpoint::lonely::Lonely;
use crate::package::checkpoint::resized::resized_parts;
use crate::package::format::container::TensorInfo;
use crate::package::format::contents::{Contents, ContentsPart, check_listed};
use crate::package::format::kinds::{dtype_bits, words_of};
use crate::package::format::parts::{BasePart, BaseParts, NO_PARTS, PartSource};
use crate::package::format::totals::Report;
use crate::package::format::words::TensorWords;
use crate::package::io::ordered::{self, Crew};
use crate::package::io::spool::Spool;
use crate::package::io::temp::check_target;
use crate::package::options::{Destination, PackOptions};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_128;

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

/// What makes two tensors one: digest, dtype and dimensions.
type Content = (u128, String, Vec<usize>);

/// A package being written from tensors in memory. Dropped before [`Writer::finish`], it leaves no file.
#[derive(Debug)]
pub struct Writer {
    options: PackOptions,
    jobs: usize,
    path: PathBuf,
    part: ContentsPart,
    removed: Vec<String>,
    names: HashSet<String>,
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
        let part = ContentsPart::new(Spool::create(Some(path))?);
        let (removed, seen, lonely) = (Vec::new(), HashMap::new(), Lonely::default());
        Ok(Self { options, jobs: 0, path: path.into(), part, removed, names: HashSet::new(), seen, lonely })
    }

    /// Threads that encode a tensor; 0, the default, takes one per core.
    #[must_use]
    pub fn jobs(mut self, jobs: usize) -> Self {
        self.jobs = jobs;
        self
    }

    /// Add one fine-tuned tensor. It becomes a delta if `base` has the same dtype and dimensions, else it is
    /// stored alone; one that equals an earlier one (a tied weight) is stored once.
    ///
    /// # Errors
    /// `InvalidArgument` for a name used twice or reserved, or bytes that do not fit dtype and dimensions; `Io`.
    pub fn add(&mut self, fine_tuned: &Tensor<'_>, base: Option<&Tensor<'_>>) -> Result<()> {
        check_listed(fine_tuned.name, fine_tuned.dims)?;
        let given = base;
        let base = base.filter(|b| (b.dtype, b.dims) == (fine_tuned.dtype, fine_tuned.dims));
        [Some(fine_tuned), given]
            .into_iter()
            .flatten()
            .try_for_each(|t| check_tensor(t).map_err(|e| e.of_tensor(t.name)))?;
        if self.names.contains(fine_tuned.name) {
            return Err(Error::invalid(format!("tensor `{}` was added twice", fine_tuned.name)));
        }
        let parts = match given.filter(|_| base.is_none()) {
            Some(b) => resized_parts(
                &info(fine_tuned),
                TensorWords::Memory(fine_tuned.bytes),
                &info(b),
                TensorWords::Memory(b.bytes),
            )?,
            None => None,
        };
        let parts = parts.map(BaseParts::from);
        let source = InMemory(given.map_or(&[], |b| b.bytes));
        let mut job = match parts.as_ref().zip(given) {
            Some((parts, b)) => joined_job(fine_tuned, b.name, &source, parts)?,
            None => job(fine_tuned, base)?,
        };
        job.same = self.met_before(fine_tuned, base);
        if job.same.is_some() {
            job.delta = None;
        }
        store(&job, &self.options, self.jobs, &mut self.part)?;
        self.names.insert(fine_tuned.name.to_owned());
        let kind = (fine_tuned.dtype, fine_tuned.dims);
        let named = given.map(|b| if parts.is_some() { kind } else { (b.dtype, b.dims) });
        self.lonely.count(fine_tuned.name, kind, fine_tuned.bytes.len() as u64, named);
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
    /// `Io`; `Unsupported` for a name longer than a package holds. No file is left then.
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

fn job<'a>(ft: &Tensor<'a>, base: Option<&Tensor<'a>>) -> Result<TensorJob<'a>> {
    let delta = match (base, words_of(ft.dtype, ft.dims, ft.bytes.len() as u64)) {
        (Some(b), Some((dtype, shape))) if b.bytes.len() == ft.bytes.len() => {
            let words = TensorWords::Memory(b.bytes);
            Some((dtype, shape, BaseWords { name: b.name, file: None, parts: &NO_PARTS, words }))
        }
        _ => None,
    };
    TensorJob::new((ft.name, ft.dtype, ft.dims), TensorWords::Memory(ft.bytes), delta)
}

/// The bytes of a base tensor, of which parts are taken.
#[derive(Debug)]
struct InMemory<'a>(&'a [u8]);

impl PartSource for InMemory<'_> {
    fn read_part(&self, part: &BasePart, at: u64, out: &mut [u8]) -> Result<()> {
        let from = usize::try_from(part.at + at).ok();
        let words = from.and_then(|from| self.0.get(from..from.checked_add(out.len())?));
        out.copy_from_slice(words.ok_or_else(|| Error::internal("a part of a base that it does not have"))?);
        Ok(())
    }
}

fn info(t: &Tensor<'_>) -> TensorInfo {
    TensorInfo {
        name: t.name.into(),
        dtype: t.dtype.into(),
        dims: t.dims.to_vec(),
        range: 0..t.bytes.len() as u64,
    }
}

fn joined_job<'a>(
    ft: &Tensor<'a>,
    name: &'a str,
    source: &'a InMemory<'a>,
    parts: &'a BaseParts,
) -> Result<TensorJob<'a>> {
    let bytes = ft.bytes.len() as u64;
    let (dtype, shape) =
        words_of(ft.dtype, ft.dims, bytes).ok_or_else(|| Error::internal("a tensor without words"))?;
    let words = TensorWords::Parts(source, parts);
    let base = BaseWords { name, file: None, parts, words };
    TensorJob::new((ft.name, ft.dtype, ft.dims), TensorWords::Memory(ft.bytes), Some((dtype, shape, base)))
}

/// Encode one tensor into `part` with several threads.
fn store(job: &TensorJob<'_>, options: &PackOptions, jobs: usize, part: &mut ContentsPart) -> Result<()> {
    let pieces = job.pieces;
    let mut open = None;
    ordered::in_order::<EncodeScratch>(
        &Crew::of(jobs),
        pieces.count(),
        |i, s| job.make(i, options, s),
        |i, s| {
            if i == 0 {
                open = Some(job.open(options, &mut part.spool)?);
            }
            open.as_mut().map_or(Ok(()), |o| o.take(i, &mut part.spool, s))
        },
    )?;
    open.ok_or_else(|| Error::internal("a tensor without pieces"))?.finish(part)
}
