//! The table of a package of version 2, read: every number is checked before anything is done or allocated by it, and
//! whatever it says of a tensor before any tensor is looked at. SPEC.md is the meaning, `table_writer` writes it.

use super::columns::{ColumnReader, TextReader};
use super::frames::{MAX_RATIO, check_frame};
use super::parts::{BasePart, BaseParts};
use super::record::{
    BaseTensor, Entry, JointFrame, RESERVED, Records, SHORT_DIGEST, SourceFile, VERSION, check_entry,
    check_of, short_digest,
};
use super::sums::Sum;
use super::table_columns::{
    EntryColumns, FILE_EXECUTABLE, FILE_TENSORS, MAX_DIMS, MAX_JOINT_BYTES, PART_FILE, PART_NAME,
    TABLE_FOLDER, TABLE_HEAD, TABLE_SUMS, base_kind, most_columns, most_parts,
};
use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::options::Codec;
use std::ops::Range;

/// Read the table `bytes` of a package whose data take `data` bytes.
pub(super) fn read_table(bytes: &[u8], data: u64) -> Result<Records> {
    let short = || Error::truncated(format!("a table of {} bytes", bytes.len()));
    let (head, rest) = bytes.split_at_checked(TABLE_HEAD).ok_or_else(short)?;
    let (found, want) = (check_of(&bytes[16..]), &head[..16]);
    if found.0 != *want {
        let want = Digest(std::array::from_fn(|i| want[i]));
        return Err(Error::corrupt(format!("the table is damaged: its digest is {found}, it says {want}")));
    }
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (raw, stored) = (word(16), word(20) as usize);
    let (columns, digests) = rest.split_at_checked(stored).ok_or_else(|| {
        Error::truncated(format!("the table's columns take {stored} bytes, but {} follow", rest.len()))
    })?;
    if u64::from(raw) > most_columns(bytes.len()) {
        return Err(Error::corrupt(format!(
            "the table's columns have {raw} bytes, more than the {} of a table of {} bytes",
            most_columns(bytes.len()),
            bytes.len()
        )));
    }
    let inflated;
    let columns = if stored as u64 == u64::from(raw) {
        columns
    } else {
        check_frame(columns, u64::from(raw)).map_err(|e| e.within("the table"))?;
        let read = zstd::bulk::decompress(columns, raw as usize);
        inflated = read.map_err(|e| Error::corrupt(format!("the table does not decompress: {e}")))?;
        if inflated.len() != raw as usize {
            let got = inflated.len();
            return Err(Error::corrupt(format!("the table's frame gave {got} bytes instead of {raw}")));
        }
        &inflated
    };
    TableReader::new(columns, digests, bytes.len(), data)?.read()
}

/// dtype, dimensions and bytes of some tensors.
type TensorKind = (String, Vec<usize>, u64);

struct TableReader<'a> {
    columns: ColumnReader<'a>,
    texts: TextReader<'a>,
    digests: ColumnReader<'a>,
    /// Bytes of the data, and how many of them belong to what was read.
    data: u64,
    at: u64,
    /// Pieces of bases that may still come.
    parts: usize,
    /// Whether each delta has the sha256 of its base among the digests.
    sums: bool,
    /// Tensors, joint frames, files, removed tensors, kinds.
    counts: [usize; 5],
    records: Records,
}

impl<'a> TableReader<'a> {
    fn new(columns: &'a [u8], digests: &'a [u8], bytes: usize, data: u64) -> Result<Self> {
        let mut from = ColumnReader::new("counts", columns);
        let flags = from.number()?;
        if flags & !(TABLE_FOLDER | TABLE_SUMS) != 0 {
            return Err(Error::unsupported(format!(
                "the table has flags {flags}, which this xorz does not know"
            )));
        }
        // Nothing of these is without a byte here, or without a digest.
        let (each, some) = (columns.len(), digests.len());
        let counts = [
            from.count("tensors", some / SHORT_DIGEST)?,
            from.count("joint frames", some / 16)?,
            from.count("files", some / 48)?,
            from.count("removed tensors", each)?,
            from.count("kinds", each)?,
        ];
        let texts = TextReader::new(&mut from, most_columns(bytes))?;
        let digests = ColumnReader::new("digests", digests);
        let records = Records { folder: flags & TABLE_FOLDER != 0, ..Records::default() };
        let (parts, sums) = (most_parts(bytes), flags & TABLE_SUMS != 0);
        Ok(Self { columns: from, texts, digests, data, at: 0, parts, sums, counts, records })
    }

    fn read(mut self) -> Result<Records> {
        let [tensors, joints, files, removed, kinds] = self.counts;
        let mut names = Vec::with_capacity(tensors);
        for _ in 0..tensors {
            names.push(self.texts.next()?);
        }
        for _ in 0..removed {
            let name = self.texts.next()?;
            self.records.removed.push(name);
        }
        let paths = (0..files).map(|_| self.texts.next()).collect::<Result<Vec<_>>>()?;
        let kinds = self.kinds(kinds)?;
        self.entries(names, &kinds, joints)?;
        self.files(paths)?;
        self.texts.end()?;
        self.columns.end()?;
        self.digests.end()?;
        if self.at != self.data {
            return Err(Error::corrupt(format!(
                "tensors and files take {} bytes, but {} are stored",
                self.at, self.data
            )));
        }
        Ok(self.records)
    }

    fn kinds(&mut self, count: usize) -> Result<Vec<TensorKind>> {
        let mut kinds = Vec::new();
        for _ in 0..count {
            let dtype = self.texts.next()?;
            let mut dims = Vec::new();
            for _ in 0..self.columns.count("dimensions", MAX_DIMS)? {
                dims.push(self.columns.count("elements of a dimension", usize::MAX)?);
            }
            kinds.push((dtype, dims, self.columns.number()?));
        }
        Ok(kinds)
    }

    fn digest(&mut self, bytes: usize) -> Result<Digest> {
        let mut digest = Digest([0; 16]);
        digest.0[..bytes].copy_from_slice(self.digests.take(bytes)?);
        Ok(digest)
    }

    fn sum(&mut self) -> Result<Sum> {
        let mut sum = Sum([0; 32]);
        sum.0.copy_from_slice(self.digests.take(32)?);
        Ok(sum)
    }

    /// The next `stored` bytes of the data.
    fn range(&mut self, stored: u64) -> Result<Range<u64>> {
        let start = self.at;
        let end = start.checked_add(stored).filter(|end| *end <= self.data).ok_or_else(|| {
            Error::corrupt(format!("takes {stored} bytes from {start} on, but the data end at {}", self.data))
        })?;
        self.at = end;
        Ok(start..end)
    }

    fn entries(&mut self, names: Vec<String>, kinds: &[TensorKind], joints: usize) -> Result<()> {
        let n = names.len();
        let mut columns = EntryColumns {
            kind: self.columns.column("kinds", n)?,
            codec: self.columns.column("codecs", n)?,
            again: self.columns.column("files", n)?,
            stored: self.columns.column("lengths", n)?,
            changed: self.columns.column("changes", n)?,
            prefer: self.columns.column("preferences", n)?,
            encoding: self.columns.column("encodings", n)?,
            base: self.columns.column("bases", n)?,
            members: self.columns.column("joint frames", joints)?,
        };
        let mut open = OpenJoint::default();
        self.records.entries.reserve_exact(n);
        for name in names {
            let entry = self.entry(&name, kinds, &mut columns, &mut open);
            let entry = entry.map_err(|e| e.of_tensor(&name))?;
            self.records.entries.push(Entry { name, ..entry });
        }
        if open.left > 0 || self.records.joints.len() != joints {
            return Err(Error::corrupt(format!(
                "{} of {joints} joint frames are there, and the last one lacks {} tensors",
                self.records.joints.len(),
                open.left
            )));
        }
        Ok(())
    }

    /// One tensor; the caller has its name.
    fn entry(
        &mut self,
        name: &str,
        kinds: &[TensorKind],
        columns: &mut EntryColumns<'_>,
        open: &mut OpenJoint,
    ) -> Result<Entry> {
        if name.starts_with(RESERVED) || name == "__metadata__" {
            return Err(Error::corrupt("the name is reserved"));
        }
        let kind = columns.kind.number()?;
        let (dtype, dims, bytes) = usize::try_from(kind)
            .ok()
            .and_then(|k| kinds.get(k))
            .ok_or_else(|| Error::corrupt(format!("is of kind {kind}, but the table has {}", kinds.len())))?;
        let code = columns.codec.number()?;
        let codec = Codec::from_code(code).ok_or_else(|| {
            Error::unsupported(format!(
                "is stored by codec {code}, but this xorz knows codecs 0 to {}; a later one wrote it",
                Codec::ALL.len() - 1
            ))
        })?;
        let again = match columns.again.count("files", self.counts[2])? {
            0 => None,
            i => Some(i - 1),
        };
        let range = columns.stored.number().and_then(|stored| self.range(stored))?;
        let changed = columns.changed.number()?;
        if !codec.delta() && changed > 0 {
            return Err(Error::corrupt(format!("is no delta, but {changed} words changed")));
        }
        let joint = self.joint(codec, *bytes, &range, columns, open)?;
        let digest = self.digest(if short_digest(codec, *bytes) { SHORT_DIGEST } else { 16 })?;
        let sha256 = if self.sums && codec.delta() { Some(self.sum()?) } else { None };
        let check = match codec {
            Codec::Joint => self.records.joints.last().map_or(digest, |j| j.check),
            Codec::Alone | Codec::Same | Codec::Unchanged => digest,
            _ => self.digest(16)?,
        };
        let base = columns.base.number()?;
        let entry = Entry {
            name: String::new(),
            dtype: dtype.clone(),
            dims: dims.clone(),
            bytes: *bytes,
            codec,
            base: self.base(name, base, codec, (digest, short_digest(codec, *bytes), sha256))?,
            encoding: columns.encoding()?,
            prefer: columns.prefer()?,
            changed: codec.delta().then_some(changed),
            stored_bytes: range.end - range.start,
            same: if codec == Codec::Same { Some(self.texts.next()?) } else { None },
            again,
            range,
            check,
            joint,
            version: VERSION,
        };
        check_entry(&entry)?;
        Ok(entry)
    }

    /// The place of a tensor in its joint frame, which is the next one where the one before is full.
    fn joint(
        &mut self,
        codec: Codec,
        bytes: u64,
        range: &Range<u64>,
        columns: &mut EntryColumns<'_>,
        open: &mut OpenJoint,
    ) -> Result<Option<(usize, u64)>> {
        if codec != Codec::Joint {
            return match open.left {
                0 => Ok(None),
                n => Err(Error::corrupt(format!(
                    "is stored by codec `{}`, but {n} tensors of a joint frame are still to come",
                    codec.name()
                ))),
            };
        }
        if open.left == 0 {
            let members = columns.members.number()?;
            if members == 0 {
                return Err(Error::corrupt("begins a joint frame of 0 tensors"));
            }
            open.left = members;
            let check = self.digest(16)?;
            self.records.joints.push(JointFrame { range: range.start..range.start, bytes: 0, check });
        }
        open.left -= 1;
        let index = self.records.joints.len() - 1;
        let frame = &mut self.records.joints[index];
        let at = frame.bytes;
        frame.range.end = range.end;
        frame.bytes = at.saturating_add(bytes);
        let (holds, takes) = (frame.bytes, frame.range.end - frame.range.start);
        if holds > MAX_JOINT_BYTES {
            return Err(Error::corrupt(format!(
                "ends at byte {holds} of its joint frame, which has at most {MAX_JOINT_BYTES}"
            )));
        }
        if open.left == 0 && holds / MAX_RATIO > takes {
            return Err(Error::corrupt(format!("its joint frame of {takes} bytes cannot hold {holds}")));
        }
        Ok(Some((index, at)))
    }

    fn base(
        &mut self,
        name: &str,
        kind: u64,
        codec: Codec,
        (digest, short, sha256): (Digest, bool, Option<Sum>),
    ) -> Result<Option<BaseTensor>> {
        use base_kind::{FILE, OTHER_NAME, OWN_NAME, PARTS};
        let mut base = BaseTensor {
            name: String::new(),
            file: None,
            parts: BaseParts::default(),
            digest,
            short,
            sha256,
        };
        match (codec.delta(), kind & !FILE) {
            (false, 0) if kind == 0 => return Ok(None),
            (true, OWN_NAME) => name.clone_into(&mut base.name),
            (true, OTHER_NAME) => base.name = self.texts.next()?,
            (true, PARTS) if kind == PARTS => {
                base.parts = self.parts()?.into();
                let first = base.parts.iter().find_map(|p| p.name.as_deref());
                first.unwrap_or(name).clone_into(&mut base.name);
            }
            _ => return Err(Error::corrupt(format!("codec `{}` with a base of kind {kind}", codec.name()))),
        }
        if kind & FILE != 0 {
            base.file = Some(self.texts.next()?);
        }
        Ok(Some(base))
    }

    fn parts(&mut self) -> Result<Vec<BasePart>> {
        let count = self.columns.count("pieces of a base", self.parts)?;
        self.parts -= count;
        let mut parts = Vec::new();
        for _ in 0..count {
            let flags = self.columns.number()?;
            let (at, bytes) = (self.columns.number()?, self.columns.number()?);
            if flags & !(PART_NAME | PART_FILE) != 0 {
                return Err(Error::corrupt(format!("a piece of its base has flags {flags}")));
            }
            let name = if flags & PART_NAME != 0 { Some(self.texts.next()?) } else { None };
            let file = if flags & PART_FILE != 0 { Some(self.texts.next()?) } else { None };
            parts.push(BasePart { name, file, at, bytes });
        }
        Ok(parts)
    }

    fn files(&mut self, paths: Vec<String>) -> Result<()> {
        for path in paths {
            let file = self.file().map_err(|e| e.within(format_args!("the source file `{path}`")))?;
            self.records.files.push((SourceFile { path, ..file.0 }, file.1));
        }
        Ok(())
    }

    fn file(&mut self) -> Result<(SourceFile, Range<u64>)> {
        let flags = self.columns.number()?;
        let (bytes, header) = (self.columns.number()?, self.columns.number()?);
        let tensors = flags & FILE_TENSORS != 0;
        if flags & !(FILE_EXECUTABLE | FILE_TENSORS) != 0 || (!tensors && header > 0) {
            return Err(Error::corrupt(format!("has flags {flags} and a header of {header} bytes")));
        }
        let range = self.columns.number().and_then(|stored| self.range(stored))?;
        let sha256 = self.digests.take(32)?.iter().map(|b| format!("{b:02x}")).collect();
        let check = self.digest(16)?.to_string();
        let executable = flags & FILE_EXECUTABLE != 0;
        let header_bytes = tensors.then_some(header);
        let path = String::new();
        Ok((SourceFile { path, sha256, bytes, executable, header_bytes, check }, range))
    }
}

/// The joint frame that entries are being read of.
#[derive(Default)]
struct OpenJoint {
    /// Tensors of it that are still to come.
    left: u64,
}
