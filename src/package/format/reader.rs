//! Reading a package: every record checked when it is opened, stored bytes checked when they are used.

use super::blob::{Blob, small_frame};
use super::container::{Header, LENGTH_BYTES, MAX_HEADER_BYTES, SafeTensors, TensorInfo};
use super::paths::{leads_elsewhere, objection};
use super::record::{self, Entry, SourceFile};
use super::refusals::stored_alone;
use crate::error::{Error, Result};
use crate::matrix::Digest;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// An opened package. Tensors are read from the file one by one, by any number of threads.
#[derive(Debug)]
pub struct Package {
    container: SafeTensors,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    removed: Vec<String>,
    files: Vec<SourceFile>,
    folder: bool,
    version: u32,
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
        let version = check_header(tensors, metadata)?;
        let removed: Vec<String> = optional(metadata, record::REMOVED)?;
        let files: Vec<SourceFile> = optional(metadata, record::FILES)?;
        let folder = match metadata.get(record::SOURCE).map(String::as_str) {
            None => false,
            Some(record::FOLDER) => true,
            Some(other) => return Err(Error::corrupt(format!("made from a `{other}`, which is unknown"))),
        };
        check_files(&files, folder)?;
        let mut entries = Vec::new();
        for info in tensors.iter().filter(|t| record::tensor_of(&t.name).is_some()) {
            let key = record::tensor_key(&info.name);
            let text =
                metadata.get(&key).ok_or_else(|| Error::corrupt(format!("metadata `{key}` is missing")))?;
            entries.push(record::decode(version, info, text)?);
        }
        let known = [record::REMOVED, record::FILES, record::SOURCE]
            .into_iter()
            .filter(|k| metadata.contains_key(*k));
        let stored_files =
            (0..files.len()).filter(|i| container.find(&record::file_entry(*i)).is_some()).count();
        if metadata.len() != 3 + entries.len() + known.count()
            || stored_files != files.len()
            || tensors.len() != entries.len() + files.len()
        {
            return Err(Error::corrupt(format!("metadata or entries that version {version} does not know")));
        }
        let mut index = HashMap::new();
        // The plain entry of a name comes first; another file's tensor of that name has a key of its own.
        entries.iter().enumerate().for_each(|(i, e)| {
            index.insert(e.key.clone(), i);
        });
        let package = Self { version, entries, index, removed, files, folder, container };
        package.entries.iter().try_for_each(|e| package.resolve(e).map(|_| ()))?;
        Ok(package)
    }

    /// The version of the format that it was written in.
    pub fn format_version(&self) -> u32 {
        self.version
    }

    /// The tensors, in the order in which their bytes lie.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tensor called `name` in the fine-tune (of several files' the first one's).
    ///
    /// # Errors
    /// `InvalidArgument` if there is none.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || Error::invalid(format!("the package has no tensor `{name}`"));
        let i = record::tensor_of(name)
            .filter(|n| *n == name)
            .and_then(|n| self.index.get(n))
            .ok_or_else(missing)?;
        Ok(&self.entries[*i])
    }

    /// Tensor `name` of source file `i`.
    pub(crate) fn entry_of(&self, i: usize, name: &str) -> Result<&Entry> {
        match self.index.get(&record::again_entry(i, name)) {
            Some(at) => Ok(&self.entries[*at]),
            None => self.entry(name).map_err(|e| Error::corrupt(e.message())),
        }
    }

    /// The entry whose stored bytes are `e`'s: another one's for codec `same`.
    pub(crate) fn resolve<'a>(&'a self, e: &'a Entry) -> Result<&'a Entry> {
        let Some(name) = &e.same else { return Ok(e) };
        let other = self.entry(name).map_err(|x| x.of_tensor(&e.name))?;
        if other.same.is_some() || (&other.dtype, &other.dims, other.bytes) != (&e.dtype, &e.dims, e.bytes) {
            return Err(Error::corrupt(format!(
                "tensor `{}` is said to be `{name}`, which has another dtype or shape, or is no tensor of its own",
                e.name
            )));
        }
        Ok(other)
    }

    /// The base tensor that tensor `name` is a delta against: its name there, dtype and shape are the entry's.
    ///
    /// # Errors
    /// As [`Package::entry`]; `Unsupported` for a tensor stored alone.
    pub fn base_of(&self, name: &str) -> Result<&record::BaseTensor> {
        let entry = self.resolve(self.entry(name)?)?;
        entry.base.as_ref().ok_or_else(|| stored_alone().of_tensor(name))
    }

    /// Names of base tensors that the fine-tune lacks.
    pub fn removed(&self) -> &[String] {
        &self.removed
    }

    /// The files that the package was made from; empty if it was made from tensors in memory.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// Whether it was made from a folder.
    pub fn is_folder(&self) -> bool {
        self.folder
    }

    /// Length of the whole package in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.container.file_bytes()
    }

    pub(crate) fn container(&self) -> &SafeTensors {
        &self.container
    }

    /// The safetensors header of source file `i`, byte for byte.
    pub(crate) fn source_header(&self, i: usize) -> Result<Vec<u8>> {
        let name = record::file_entry(i);
        let read = || {
            let (file, info) = self
                .files
                .get(i)
                .zip(self.container.find(&name))
                .ok_or_else(|| Error::corrupt("is missing from the package"))?;
            let bytes = file.header_bytes.unwrap_or(0);
            if bytes > MAX_HEADER_BYTES || bytes > file.bytes {
                return Err(Error::corrupt(format!("{bytes} bytes are too many")));
            }
            small_frame(&self.container, info.range.clone(), bytes, Digest::from_hex(&file.check))
        };
        read().map_err(|e: Error| e.within(format_args!("`{name}`")))
    }

    /// The bytes of source file `i`, which was carried along as it is.
    pub(crate) fn carried(&self, i: usize) -> Result<Blob<'_>> {
        let name = record::file_entry(i);
        let open = || {
            let (file, info) = self
                .files
                .get(i)
                .zip(self.container.find(&name))
                .ok_or_else(|| Error::corrupt("is missing from the package"))?;
            let check = Digest::from_hex(&file.check);
            let blob = Blob::open(&self.container, info.range.clone(), check, true, file.bytes)?;
            if blob.len() != file.bytes {
                return Err(Error::corrupt(format!(
                    "{} bytes stored for a file of {}",
                    blob.len(),
                    file.bytes
                )));
            }
            Ok(blob)
        };
        open().map_err(|e: Error| e.within(format_args!("`{name}`")))
    }
}

/// Version, known keys and the header's own digest. Gives the version.
fn check_header(tensors: &[TensorInfo], metadata: &BTreeMap<String, String>) -> Result<u32> {
    if metadata.get("format").map(String::as_str) != Some(record::FORMAT) {
        return Err(Error::corrupt(
            "a safetensors file, but not a xorz package; `xorz pack BASE FINE_TUNED` makes one",
        ));
    }
    let version = record::version(metadata)?;
    let found = metadata.get(record::CHECK).map_or("", String::as_str);
    let want = record::header_check(metadata, tensors).to_string();
    if found != want {
        return Err(Error::corrupt(format!(
            "the header is damaged: its digest is {want}, it says `{found}`"
        )));
    }
    Ok(version)
}

/// Paths stay inside the folder that they are unpacked to, do no harm there, and none is in the way of another.
fn check_files(files: &[SourceFile], folder: bool) -> Result<()> {
    let bad = |path: &str, what: &str| Err(Error::corrupt(format!("the source file `{path}` {what}")));
    let mut paths = HashSet::new();
    for file in files {
        let path = file.path.as_str();
        // The name of a single file says where it came from, not where it goes.
        if let Some(what) = if folder { objection(path) } else { leads_elsewhere(path) } {
            return bad(path, what);
        }
        if !folder && path.contains('/') {
            return bad(path, "lies in a folder, but the package was made from a file");
        }
        if !paths.insert(path) {
            return bad(path, "is there twice");
        }
    }
    for path in &paths {
        let above = path.match_indices('/').find(|(i, _)| paths.contains(&path[..*i]));
        if above.is_some() {
            return bad(path, "lies in another file");
        }
    }
    if !folder && files.len() > 1 {
        return Err(Error::corrupt(format!("made from one file, but {} are listed", files.len())));
    }
    if !folder && files.iter().any(|f| f.header_bytes.is_none()) {
        return Err(Error::corrupt("made from one file, which has no tensors"));
    }
    Ok(())
}

fn optional<T: serde::de::DeserializeOwned>(
    metadata: &BTreeMap<String, String>,
    key: &str,
) -> Result<Vec<T>> {
    metadata.get(key).map_or(Ok(Vec::new()), |text| record::from_json(key, text))
}

/// Parse the source header of a package that unpacks to a file of `bytes` bytes.
pub(crate) fn parse_source_header(text: &[u8], file: &SourceFile) -> Result<Header> {
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
