//! Reading a package: every record checked when it is opened, stored bytes checked when they are used.

use super::container::{Header, LENGTH_BYTES, MAX_HEADER_BYTES, SafeTensors, TensorInfo};
use super::record::{self, Entry, SourceFile};
use super::{Codec, blob, frames, source};
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::matrix::{Digest, Matrix};
use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::path::Path;

/// An opened package. Tensors are read from the file one by one, by any number of threads.
#[derive(Debug)]
pub struct Package {
    container: SafeTensors,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    removed: Vec<String>,
    files: Vec<SourceFile>,
}

impl Package {
    /// Open a package file and check everything in its header.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, `Truncated`, or `Unsupported` for another format version. Messages name the path.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(SafeTensors::open(path)?).map_err(|e| e.within(path.display()))
    }

    /// Parse a package's bytes.
    ///
    /// # Errors
    /// As [`Package::open`], but `Io`.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        Self::new(SafeTensors::from_bytes(bytes)?)
    }

    fn new(container: SafeTensors) -> Result<Self> {
        let Header { tensors, metadata } = container.header();
        check_header(tensors, metadata)?;
        let removed: Vec<String> = optional(metadata, record::REMOVED)?;
        let files: Vec<SourceFile> = optional(metadata, record::FILES)?;
        if files.len() > 1 {
            return Err(Error::unsupported(format!(
                "made of {} files; version 0 has one at most",
                files.len()
            )));
        }
        let mut entries = Vec::new();
        for info in tensors.iter().filter(|t| !t.name.starts_with(record::RESERVED)) {
            let key = record::tensor_key(&info.name);
            let text =
                metadata.get(&key).ok_or_else(|| Error::corrupt(format!("metadata `{key}` is missing")))?;
            entries.push(record::decode(info, text)?);
        }
        let headers = tensors.len() - entries.len();
        let keys = 3
            + entries.len()
            + usize::from(metadata.contains_key(record::REMOVED))
            + usize::from(metadata.contains_key(record::FILES));
        if metadata.len() != keys || headers != files.len() {
            return Err(Error::corrupt("metadata or entries that version 0 does not know"));
        }
        let index = entries.iter().enumerate().map(|(i, e)| (e.name.clone(), i)).collect();
        Ok(Self { entries, index, removed, files, container })
    }

    /// The tensors, in the order in which their bytes lie.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tensor called `name` in the fine-tune.
    ///
    /// # Errors
    /// `InvalidArgument` if there is none.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        let i = self
            .index
            .get(name)
            .ok_or_else(|| Error::invalid(format!("the package has no tensor `{name}`")))?;
        Ok(&self.entries[*i])
    }

    /// Names of base tensors that the fine-tune lacks.
    pub fn removed(&self) -> &[String] {
        &self.removed
    }

    /// The files that the package was made from; empty if it was made from tensors in memory.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// Length of the whole package in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.container.file_bytes()
    }

    /// One tensor's resident delta. It is encoded again, tile by tile, only if `prefer` is given and is not what is stored.
    ///
    /// `base` is the matrix of the base tensor `entry(name)?.base`. No dense matrix is made. Costs one pass over the base
    /// for its digest.
    ///
    /// # Errors
    /// `Mismatch` for another dtype, shape or digest than the base had, naming the tensor and both; `Unsupported` for a
    /// tensor stored alone; `InvalidArgument` for an unknown name; `Corrupt`, `Truncated` or `Io`.
    pub fn resident(&self, name: &str, base: &Matrix<'_>, prefer: Option<Prefer>) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        let read = || {
            let digest = check_base(entry, base)?;
            let prefer = prefer.or(entry.prefer).unwrap_or(Prefer::Memory);
            blob::to_resident(entry, self.stored(entry)?, base, digest, prefer)
        };
        read().map_err(|e| e.within(format_args!("tensor `{name}`")))
    }

    /// One tensor's fine-tuned bytes into `out`, which has [`Entry::bytes`]. `base` is ignored for a tensor stored alone.
    ///
    /// # Errors
    /// As [`Package::resident`]; `Mismatch` for a base missing or an `out` of another length.
    pub fn restore(&self, name: &str, base: Option<&Matrix<'_>>, out: &mut [u8]) -> Result<()> {
        let entry = self.entry(name)?;
        let mut restore = || {
            if out.len() as u64 != entry.bytes {
                return Err(Error::mismatch(format!(
                    "takes {} bytes, but out has {}",
                    entry.bytes,
                    out.len()
                )));
            }
            if entry.codec.alone() {
                return self.copy_alone(entry, &mut &mut *out);
            }
            let base = base.ok_or_else(|| Error::mismatch("is a delta, but no base was given"))?;
            let digest = check_base(entry, base)?;
            blob::restore(entry, self.stored(entry)?, base, digest, out)
        };
        restore().map_err(|e| e.within(format_args!("tensor `{name}`")))
    }

    /// Stream a tensor that is stored alone.
    pub(super) fn copy_alone(&self, entry: &Entry, out: &mut dyn Write) -> Result<()> {
        let stored = self.stored(entry)?;
        blob::check_alone(entry, &stored)?;
        match entry.codec {
            Codec::AloneZstd => copy_frame(&stored, entry.bytes, out),
            _ => Ok(out.write_all(&stored)?),
        }
    }

    /// The safetensors header of source file `i`, byte for byte.
    pub(super) fn source_header(&self, i: usize) -> Result<Vec<u8>> {
        let name = record::header_entry(i);
        let read = || {
            let (file, info) = self
                .files
                .get(i)
                .zip(self.container.find(&name))
                .ok_or_else(|| Error::corrupt("is missing from the package"))?;
            if file.header_bytes > MAX_HEADER_BYTES || file.header_bytes > file.bytes {
                return Err(Error::corrupt(format!("{} bytes are too many", file.header_bytes)));
            }
            let stored = self.container.read_range(info.range.clone())?;
            compare_check(&stored, Digest::from_hex(&file.header_check))?;
            let mut out = Vec::new();
            copy_frame_to(&stored, file.header_bytes, &mut out)?;
            Ok(out)
        };
        read().map_err(|e: Error| e.within(format_args!("`{name}`")))
    }

    /// A tensor's stored bytes, compared with their digest.
    fn stored(&self, entry: &Entry) -> Result<Vec<u8>> {
        let stored = self.container.read_range(entry.range.clone())?;
        compare_check(&stored, Some(entry.check))?;
        Ok(stored)
    }
}

/// Version, known keys and the header's own digest.
fn check_header(tensors: &[TensorInfo], metadata: &BTreeMap<String, String>) -> Result<()> {
    if metadata.get("format").map(String::as_str) != Some(record::FORMAT) {
        return Err(Error::corrupt("a safetensors file, but not a xorz package"));
    }
    let version = metadata.get("format_version").map_or("none", String::as_str);
    if version != record::VERSION {
        return Err(Error::unsupported(format!(
            "package format version {version}, but this xorz reads version {}",
            record::VERSION
        )));
    }
    let found = metadata.get(record::CHECK).map_or("", String::as_str);
    let want = record::header_check(metadata, tensors).to_string();
    if found != want {
        return Err(Error::corrupt(format!(
            "the header is damaged: its digest is {want}, it says `{found}`"
        )));
    }
    Ok(())
}

fn optional<T: serde::de::DeserializeOwned>(
    metadata: &BTreeMap<String, String>,
    key: &str,
) -> Result<Vec<T>> {
    metadata.get(key).map_or(Ok(Vec::new()), |text| record::from_json(key, text))
}

/// Compare a base with what a delta was made against; its digest, which costs a pass over it, is handed on.
fn check_base(entry: &Entry, base: &Matrix<'_>) -> Result<Digest> {
    let wanted = entry.base.as_ref().ok_or_else(blob::stored_alone)?;
    let (dtype, shape) = (entry.word_dtype(), entry.shape()?);
    if dtype != Some(base.dtype()) || shape != base.shape() {
        return Err(Error::mismatch(format!(
            "is a delta of a {shape} matrix of {}, but the base is a {} matrix of {}",
            entry.dtype,
            base.shape(),
            base.dtype()
        )));
    }
    let found = base.digest();
    if found != wanted.digest {
        return Err(Error::mismatch(format!(
            "another base: it was packed against `{}` of digest {}, this one has digest {found}",
            wanted.name, wanted.digest
        )));
    }
    Ok(found)
}

fn compare_check(stored: &[u8], want: Option<Digest>) -> Result<()> {
    let found = record::check_of(stored);
    match want {
        Some(want) if want == found => Ok(()),
        Some(want) => Err(Error::corrupt(format!("damaged: its bytes have digest {found}, not {want}"))),
        None => Err(Error::corrupt("its digest is not one")),
    }
}

/// Stream one checked frame of `total` bytes.
fn copy_frame(frame: &[u8], total: u64, out: &mut dyn Write) -> Result<()> {
    let mut decoder = source::decoder(frame, total)?;
    let mut buffer = vec![0u8; 1 << 16];
    let mut left = total;
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        decoder.read_exact(&mut buffer[..n]).map_err(|e| Error::corrupt(format!("zstd: {e}")))?;
        out.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    Ok(())
}

fn copy_frame_to(frame: &[u8], total: u64, out: &mut Vec<u8>) -> Result<()> {
    frames::check_frame(frame, total)?;
    copy_frame(frame, total, out)
}

/// Parse the source header of a package that unpacks to a file of `bytes` bytes.
pub(super) fn parse_source_header(text: &[u8], file: &SourceFile) -> Result<Header> {
    let header = Header::parse(text)?;
    let want = LENGTH_BYTES.checked_add(text.len() as u64).and_then(|n| n.checked_add(header.data_bytes()));
    if want != Some(file.bytes) {
        return Err(Error::corrupt(format!(
            "the source file's header does not describe {} bytes",
            file.bytes
        )));
    }
    Ok(header)
}
