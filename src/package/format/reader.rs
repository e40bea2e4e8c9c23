//! Reading a package: every record checked when it is opened, stored bytes checked when they are used.

use super::blob::{Blob, small_frame};
use super::container::{Header, LENGTH_BYTES, MAX_HEADER_BYTES, SafeTensors};
use super::joint_reader::JointReader;
use super::paths::check_files;
use super::record::{self, Entry, Records, SourceFile};
use super::refusals::{stored_alone, untold_sum};
use super::table::read_table;
use super::table_writer::identity;
use super::version1::read_version1;
use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::options::Trust;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// An opened package. Tensors are read from the file one by one, by any number of threads.
#[derive(Debug)]
pub struct Package {
    container: SafeTensors,
    entries: Vec<Entry>,
    /// By [`place_of`]. Hashes, since names are in the entries; who finds one compares the name.
    index: HashMap<u128, usize>,
    joints: JointReader,
    removed: Vec<String>,
    files: Vec<SourceFile>,
    /// Where what is stored of each file lies in the data.
    file_ranges: Vec<Range<u64>>,
    folder: bool,
    version: u32,
    /// What must speak for each base.
    trust: Trust,
}

/// What tensor `name` is found by: of source file `again`, where an earlier one has a tensor of that name.
fn place_of(again: Option<usize>, name: &str) -> u128 {
    xxh3_128_with_seed(name.as_bytes(), again.map_or(0, |i| i as u64 + 1))
}

/// The package in a folder: a tenant's, with a card and a config beside it. Hidden files are none, as macOS's droppings are.
fn in_folder(folder: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::from(e).within(folder.display()))? {
        let name = entry?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.ends_with(b".xorz") && !bytes.starts_with(b".") {
            found.push(folder.join(&name));
        }
    }
    found.sort();
    match &*found {
        [one] => Ok(one.clone()),
        [] => Err(Error::invalid(format!("{} is a folder that holds no package (.xorz)", folder.display()))),
        [first, ..] => Err(Error::invalid(format!(
            "{} holds {} packages ({}, ...); name one of them",
            folder.display(),
            found.len(),
            first.display()
        ))),
    }
}

impl Package {
    /// Open a package file, or the one in a folder, and check everything in its header.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, `Truncated`, `Unsupported` for another format version, or `InvalidArgument` for a folder with no package
    /// or several. Messages name the path.
    pub fn open(path: &Path) -> Result<Self> {
        let path = &if path.is_dir() { in_folder(path)? } else { path.to_owned() };
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
        let version = check_format(&container)?;
        let records = if version == 1 { read_version1(&container) } else { read_version2(&container) }?;
        let Records { entries, joints, removed, files, folder } = records;
        let (files, file_ranges): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        if version > 1 {
            check_files(&files, folder)?;
        }
        let mut index = HashMap::with_capacity(entries.len());
        for (i, e) in entries.iter().enumerate() {
            if index.insert(place_of(e.again, &e.name), i).is_some() {
                return Err(Error::corrupt(format!("tensor `{}` is there twice", e.name)));
            }
        }
        let (joints, trust) = (JointReader::new(joints), Trust::Digest);
        let package =
            Self { version, entries, index, joints, removed, files, file_ranges, folder, container, trust };
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
        self.at(None, name).ok_or_else(missing)
    }

    fn at(&self, again: Option<usize>, name: &str) -> Option<&Entry> {
        let e = &self.entries[*self.index.get(&place_of(again, name))?];
        (e.again == again && e.name == name).then_some(e)
    }

    /// Tensor `name` of source file `i`.
    pub(crate) fn entry_of(&self, i: usize, name: &str) -> Result<&Entry> {
        match self.at(Some(i), name) {
            Some(e) => Ok(e),
            None => self.entry(name).map_err(|e| Error::corrupt(e.message())),
        }
    }

    /// The entry whose stored bytes are `e`'s: another one's for codec `same`.
    pub(crate) fn resolve<'a>(&'a self, e: &'a Entry) -> Result<&'a Entry> {
        let Some(name) = &e.same else { return Ok(e) };
        let other = self.entry(name).map_err(|x| Error::corrupt(x.message()).of_tensor(&e.name))?;
        if other.same.is_some() || (&other.dtype, &other.dims, other.bytes) != (&e.dtype, &e.dims, e.bytes) {
            return Err(Error::corrupt(format!(
                "tensor `{}` is said to be `{name}`, which has another dtype or shape, or is no tensor of its own",
                e.name
            )));
        }
        if self.version > 1 && e.check != identity(other) {
            return Err(
                Error::corrupt(format!("is said to be `{name}`, whose digest is another")).of_tensor(&e.name)
            );
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

    /// Give no delta and no tensor from now on before `trust` speaks for the base that is given with it.
    ///
    /// # Errors
    /// `Mismatch` if it was packed without, naming the first tensor: nothing in it tells of the base's sha256. It gives
    /// nothing that has a base then.
    pub fn trust_in(&mut self, trust: Trust) -> Result<()> {
        self.trust = trust;
        let bases = self.entries.iter().filter_map(|e| Some((e, e.base.as_ref()?)));
        match bases.filter(|_| trust == Trust::Sha256).find(|(_, base)| base.sha256.is_none()) {
            Some((e, base)) => Err(untold_sum(&base.name).of_tensor(&e.name)),
            None => Ok(()),
        }
    }

    /// What must speak for each base.
    pub(crate) fn trust(&self) -> Trust {
        self.trust
    }

    /// Length of the whole package in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.container.file_bytes()
    }

    pub(crate) fn container(&self) -> &SafeTensors {
        &self.container
    }

    /// The words of the joint frame that `e` is in, and the first of its own among them.
    pub(crate) fn joint(&self, e: &Entry) -> Result<(Arc<Vec<u8>>, usize)> {
        self.joints.words(&self.container, e)
    }

    /// Source file `i` and where what is stored of it lies.
    fn stored_file(&self, i: usize) -> Result<(&SourceFile, Range<u64>)> {
        let found = self.files.get(i).zip(self.file_ranges.get(i));
        let (file, range) = found.ok_or_else(|| Error::internal(format!("no source file {i}")))?;
        Ok((file, range.clone()))
    }

    /// The safetensors header of source file `i`, byte for byte.
    pub(crate) fn source_header(&self, i: usize) -> Result<Vec<u8>> {
        let (file, range) = self.stored_file(i)?;
        let bytes = file.header_bytes.unwrap_or(0);
        let read = if bytes > MAX_HEADER_BYTES || bytes > file.bytes {
            Err(Error::corrupt(format!("a header of {bytes} bytes in a file of {}", file.bytes)))
        } else {
            small_frame(&self.container, range, bytes, Digest::from_hex(&file.check))
        };
        read.map_err(|e| e.within(format_args!("the source file `{}`", file.path)))
    }

    /// The bytes of source file `i`, which was carried along as it is.
    pub(crate) fn carried(&self, i: usize) -> Result<Blob<'_>> {
        let (file, range) = self.stored_file(i)?;
        let check = Digest::from_hex(&file.check);
        let blob = Blob::open(&self.container, range, check, true, file.bytes);
        let blob = blob.and_then(|blob| match blob.len() {
            n if n == file.bytes => Ok(blob),
            n => Err(Error::corrupt(format!("{n} bytes stored for a file of {}", file.bytes))),
        });
        blob.map_err(|e| e.within(format_args!("the source file `{}`", file.path)))
    }
}

/// It is a package; gives its version.
fn check_format(container: &SafeTensors) -> Result<u32> {
    let metadata = &container.header().metadata;
    if metadata.get("format").map(String::as_str) != Some(record::FORMAT) {
        return Err(Error::corrupt(
            "a safetensors file, but not a xorz package; `xorz pack BASE FINE_TUNED` makes one",
        ));
    }
    record::version(metadata)
}

/// What a package of version 2 says: its header has one form, its table the rest.
fn read_version2(container: &SafeTensors) -> Result<Records> {
    let Header { tensors, metadata } = container.header();
    if metadata.contains_key("xorz:check") {
        return Err(Error::unsupported(
            "is of an early build's version 2, which had no table and was never released; pack again with this xorz",
        ));
    }
    let unknown = || Error::corrupt("metadata or entries that version 2 does not know");
    let [data, table] = &tensors[..] else { return Err(unknown()) };
    let row = |t: &super::container::TensorInfo| t.dtype == "U8" && t.dims.len() == 1;
    if metadata.len() != 2
        || (data.name.as_str(), table.name.as_str()) != (record::DATA, record::TABLE)
        || !row(data)
        || !row(table)
    {
        return Err(unknown());
    }
    read_table(&container.read(table)?, data.range.end)
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
