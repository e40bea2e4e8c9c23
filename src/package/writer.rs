//! Writing a package: tensors are encoded one by one into a nameless spool file, since the header that goes first holds
//! their sizes; the whole then appears under its name at once.

use super::container::{LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, dtype_bits};
use super::record::{self, BaseTensor, Entry, SourceFile};
use super::temp::{self, Output};
use super::{Codec, PackOptions, Report, blob, frames};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix, Shape};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

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

/// A package being written. Dropped before [`Writer::finish`], it leaves no file.
#[derive(Debug)]
pub struct Writer {
    options: PackOptions,
    path: PathBuf,
    spool: File,
    spooled: u64,
    entries: Vec<Entry>,
    names: HashSet<String>,
    removed: Vec<String>,
    files: Vec<(SourceFile, Vec<u8>)>,
    report: Report,
}

/// One tensor, encoded; `entry.range` is not known yet.
pub(super) struct Packed {
    entry: Entry,
    bytes: Vec<u8>,
}

impl Writer {
    /// Begin a package that will appear at `path`. Its folder must exist and be writable.
    ///
    /// # Errors
    /// `Io`; `InvalidArgument` for a directory.
    pub fn create(path: &Path, options: PackOptions) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::invalid("is a directory; name a file").within(path.display()));
        }
        Ok(Self {
            options,
            path: path.into(),
            spool: temp::spool(path)?,
            spooled: 0,
            entries: Vec::new(),
            names: HashSet::new(),
            removed: Vec::new(),
            files: Vec::new(),
            report: Report::default(),
        })
    }

    /// Add one fine-tuned tensor. It becomes a delta if `base` has the same dtype and dimensions, else it is stored alone.
    ///
    /// # Errors
    /// `InvalidArgument` for a name used twice or reserved, or bytes that do not fit dtype and dimensions; `Io`.
    pub fn add(&mut self, fine_tuned: &Tensor<'_>, base: Option<&Tensor<'_>>) -> Result<()> {
        let packed = encode(fine_tuned, base, &self.options)?;
        self.push(packed)
    }

    /// Note a base tensor that the fine-tune lacks.
    pub fn removed(&mut self, name: &str) {
        self.removed.push(name.into());
    }

    pub(super) fn push(&mut self, packed: Packed) -> Result<()> {
        let Packed { mut entry, bytes } = packed;
        if !self.names.insert(entry.name.clone()) {
            return Err(Error::invalid(format!("tensor `{}` was added twice", entry.name)));
        }
        self.spool.write_all(&bytes)?;
        entry.range = self.spooled..self.spooled + bytes.len() as u64;
        self.spooled = entry.range.end;
        self.report.count(&entry);
        self.entries.push(entry);
        Ok(())
    }

    pub(super) fn set_file(&mut self, mut file: SourceFile, header: &str) -> Result<()> {
        let stored = frames::compress(header.as_bytes(), 19)?;
        file.header_check = record::check_of(&stored).to_string();
        self.report.sha256 = Some(file.sha256.clone());
        self.files.push((file, stored));
        Ok(())
    }

    /// Write header and data to a temporary file beside the path, sync it and rename it.
    ///
    /// # Errors
    /// `Io`; `Unsupported` for a header beyond the limit of safetensors. No file is left then.
    pub fn finish(mut self) -> Result<Report> {
        // Resident deltas first: they are multiples of 64 bytes, so all of them stay aligned.
        self.entries.sort_by_key(|e| e.codec != Codec::Resident);
        let header = self.header()?;
        let mut out = Output::create(&self.path)?;
        let within = |e: std::io::Error| Error::from(e).within(self.path.display());
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(within)?;
        out.write_all(header.as_bytes()).map_err(within)?;
        for e in &self.entries {
            self.spool.seek(SeekFrom::Start(e.range.start)).map_err(within)?;
            let copied = std::io::copy(&mut (&self.spool).take(e.stored_bytes), &mut out).map_err(within)?;
            if copied != e.stored_bytes {
                return Err(Error::io("the spool file ends early").within(self.path.display()));
            }
        }
        for (_, stored) in &self.files {
            out.write_all(stored).map_err(within)?;
        }
        out.commit()?;
        self.report.removed = self.removed.len();
        self.report.package_bytes = LENGTH_BYTES
            + header.len() as u64
            + self.spooled
            + self.files.iter().map(|(_, s)| s.len() as u64).sum::<u64>();
        Ok(self.report)
    }

    /// The header text, padded so that the data are aligned.
    fn header(&self) -> Result<String> {
        let mut metadata = BTreeMap::from([
            ("format".to_string(), record::FORMAT.to_string()),
            ("format_version".to_string(), record::VERSION.to_string()),
        ]);
        let mut infos = Vec::new();
        let mut at = 0;
        let mut place = |name: String, bytes: usize| {
            let range = at..at + bytes as u64;
            at = range.end;
            infos.push(TensorInfo { name, dtype: "U8".into(), dims: vec![bytes], range });
        };
        for e in &self.entries {
            metadata.insert(record::tensor_key(&e.name), record::encode(e)?);
            place(
                e.name.clone(),
                usize::try_from(e.stored_bytes).map_err(|_| Error::internal("stored bytes"))?,
            );
        }
        for (i, (_, stored)) in self.files.iter().enumerate() {
            place(record::header_entry(i), stored.len());
        }
        if !self.removed.is_empty() {
            metadata.insert(record::REMOVED.into(), record::to_json(&self.removed)?);
        }
        if !self.files.is_empty() {
            let files: Vec<_> = self.files.iter().map(|(f, _)| f).collect();
            metadata.insert(record::FILES.into(), record::to_json(&files)?);
        }
        metadata.insert(record::CHECK.into(), record::header_check(&metadata, &infos).to_string());
        header_text(&metadata, &infos)
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

/// Encode one tensor; pure, so that many can be encoded at once.
pub(super) fn encode(
    fine_tuned: &Tensor<'_>,
    base: Option<&Tensor<'_>>,
    options: &PackOptions,
) -> Result<Packed> {
    let pack = || {
        if fine_tuned.name.starts_with(record::RESERVED) || fine_tuned.name == "__metadata__" {
            return Err(Error::invalid("the name is reserved"));
        }
        check_tensor(fine_tuned)?;
        match base.filter(|b| (b.dtype, b.dims) == (fine_tuned.dtype, fine_tuned.dims)) {
            Some(base) => match Dtype::from_name(fine_tuned.dtype) {
                Some(dtype) => encode_delta(fine_tuned, base, dtype, options),
                None => encode_alone(fine_tuned, options),
            },
            None => encode_alone(fine_tuned, options),
        }
    };
    pack().map_err(|e| e.within(format_args!("tensor `{}`", fine_tuned.name)))
}

fn check_tensor(t: &Tensor<'_>) -> Result<()> {
    let Some(bits) = dtype_bits(t.dtype) else { return Ok(()) };
    let want = t.dims.iter().try_fold(bits, |a, &d| a.checked_mul(d as u64));
    if want != Some(t.bytes.len() as u64 * 8) {
        return Err(Error::invalid(format!("{} bytes are not {} {:?}", t.bytes.len(), t.dtype, t.dims)));
    }
    Ok(())
}

fn encode_delta(ft: &Tensor<'_>, base: &Tensor<'_>, dtype: Dtype, options: &PackOptions) -> Result<Packed> {
    let shape = Shape::of_dims(ft.dims)?;
    let stored =
        blob::write(&Matrix::new(dtype, shape, base.bytes)?, &Matrix::new(dtype, shape, ft.bytes)?, options)?;
    let mut entry = entry(ft, stored.codec, &stored.bytes);
    entry.base = Some(BaseTensor { name: base.name.into(), digest: stored.base });
    entry.encoding = stored.encoding;
    entry.prefer = Some(options.prefer);
    entry.changed = Some(stored.changed);
    Ok(Packed { entry, bytes: stored.bytes })
}

fn encode_alone(ft: &Tensor<'_>, options: &PackOptions) -> Result<Packed> {
    let zstd = frames::compress(ft.bytes, options.level())?;
    let (codec, bytes) = if zstd.len() < ft.bytes.len() {
        (Codec::AloneZstd, zstd)
    } else {
        (Codec::Alone, ft.bytes.to_vec())
    };
    Ok(Packed { entry: entry(ft, codec, &bytes), bytes })
}

fn entry(ft: &Tensor<'_>, codec: Codec, stored: &[u8]) -> Entry {
    Entry {
        name: ft.name.into(),
        dtype: ft.dtype.into(),
        dims: ft.dims.to_vec(),
        bytes: ft.bytes.len() as u64,
        codec,
        base: None,
        encoding: None,
        prefer: None,
        changed: None,
        stored_bytes: stored.len() as u64,
        range: 0..stored.len() as u64,
        check: record::check_of(stored),
    }
}
