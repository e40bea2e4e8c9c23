//! The table of a package, written: what `table` reads.

use super::columns::{TextWriter, put_number};
use super::frames::compress_text;
use super::record::{Entry, Records, SHORT_DIGEST, check_of, short_digest};
use super::table_columns::{
    FILE_EXECUTABLE, FILE_TENSORS, PART_FILE, PART_NAME, TABLE_FOLDER, TABLE_HEAD, TABLE_SUMS, base_kind,
    most_columns, most_parts,
};
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::options::Codec;
use std::collections::HashMap;

/// The table of `records`, whose entries are in the order of their stored bytes, those of a joint frame side by side.
///
/// # Errors
/// `Unsupported` for names or numbers of dimensions that are too long for any package.
pub(super) fn write_table(records: &Records) -> Result<Vec<u8>> {
    let digests = digests(records)?;
    // What is so alike that readers take it for a trap is written as it is.
    let table = match table(records, &digests, true)? {
        Some(table) => table,
        None => {
            table(records, &digests, false)?.ok_or_else(|| Error::internal("a table beyond its limits"))?
        }
    };
    Ok(table)
}

fn table(records: &Records, digests: &[u8], compact: bool) -> Result<Option<Vec<u8>>> {
    let mut writer = ColumnsWriter { texts: TextWriter::new(compact), ..ColumnsWriter::default() };
    writer.all(records)?;
    let (decoded, parts) = (writer.texts.decoded, writer.part_count);
    let columns = writer.finish(records);
    let frame = if compact { compress_text(&columns)? } else { Vec::new() };
    let stored = if compact && frame.len() < columns.len() { &frame } else { &columns };
    let length = TABLE_HEAD + stored.len() + digests.len();
    if columns.len() as u64 > most_columns(length)
        || decoded > most_columns(length)
        || parts > most_parts(length)
    {
        return Ok(None);
    }
    let mut out = vec![0; 16];
    for n in [columns.len(), stored.len()] {
        let n = u32::try_from(n).map_err(|_| Error::unsupported("a table of more than 4 GiB"))?;
        out.extend_from_slice(&n.to_le_bytes());
    }
    out.extend_from_slice(stored);
    out.extend_from_slice(digests);
    let check = check_of(&out[16..]);
    out[..16].copy_from_slice(&check.0);
    Ok(Some(out))
}

/// Every digest, entry after entry, then file after file.
fn digests(records: &Records) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let by_name: HashMap<&str, &Entry> = match records.entries.iter().any(|e| e.same.is_some()) {
        true => {
            let first = records.entries.iter().filter(|e| e.again.is_none());
            first.map(|e| (e.name.as_str(), e)).collect()
        }
        false => HashMap::new(),
    };
    let mut joints = records.joints.iter().enumerate();
    let (mut next, sums) = (joints.next(), records.has_sums());
    for e in &records.entries {
        if let (Some((frame, _)), Some((i, joint))) = (e.joint, next)
            && frame == i
        {
            out.extend_from_slice(&joint.check.0);
            next = joints.next();
        }
        match (e.codec, &e.same) {
            (Codec::Same, Some(name)) => {
                let other = by_name.get(name.as_str());
                let other =
                    other.ok_or_else(|| Error::internal("the same as no tensor").of_tensor(&e.name))?;
                out.extend_from_slice(&identity(other).0);
            }
            (codec, _) if short_digest(codec, e.bytes) => {
                out.extend_from_slice(&identity(e).0[..SHORT_DIGEST]);
            }
            _ => out.extend_from_slice(&identity(e).0),
        }
        if let Some(base) = e.base.as_ref().filter(|_| sums) {
            let lacks = || Error::internal("a delta without the sha256 that others have").of_tensor(&e.name);
            out.extend_from_slice(&base.sha256.ok_or_else(lacks)?.0);
        }
        if !matches!(e.codec, Codec::Alone | Codec::Same | Codec::Unchanged | Codec::Joint) {
            out.extend_from_slice(&e.check.0);
        }
    }
    for (file, _) in &records.files {
        for text in [&file.sha256, &file.check] {
            let pairs = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or("-"));
            for pair in pairs {
                let byte = u8::from_str_radix(pair, 16).map_err(|_| Error::internal("a digest is none"))?;
                out.push(byte);
            }
        }
    }
    Ok(out)
}

/// What tells the entry's bytes from others: its base's digest, or that of what is stored.
pub(super) fn identity(e: &Entry) -> Digest {
    match &e.base {
        Some(base) if short_digest(e.codec, e.bytes) => {
            let mut short = Digest([0; 16]);
            short.0[..SHORT_DIGEST].copy_from_slice(&base.digest.0[..SHORT_DIGEST]);
            short
        }
        Some(base) => base.digest,
        None => e.check,
    }
}

/// Columns in the making, in the order of the table.
#[derive(Default)]
struct ColumnsWriter<'a> {
    texts: TextWriter,
    kinds: Vec<u8>,
    kind_index: HashMap<(&'a str, &'a [usize], u64), u64>,
    /// Kind, codec, file, length, changes, preference, encoding, base.
    entries: [Vec<u8>; 8],
    members: Vec<u8>,
    parts: Vec<u8>,
    part_count: usize,
    files: Vec<u8>,
}

impl<'a> ColumnsWriter<'a> {
    fn all(&mut self, records: &'a Records) -> Result<()> {
        for e in &records.entries {
            self.texts.push(&e.name).map_err(|x| x.of_tensor(&e.name))?;
        }
        records.removed.iter().try_for_each(|name| self.texts.push(name))?;
        records.files.iter().try_for_each(|(file, _)| self.texts.push(&file.path))?;
        let mut kinds = Vec::new();
        for e in &records.entries {
            let next = self.kind_index.len() as u64;
            let kind = *self.kind_index.entry((&e.dtype, &e.dims, e.bytes)).or_insert(next);
            if kind == next {
                self.kind(e)?;
            }
            kinds.push(kind);
        }
        for (e, kind) in records.entries.iter().zip(kinds) {
            self.entry(e, kind).map_err(|x| x.of_tensor(&e.name))?;
        }
        let mut members = vec![0u64; records.joints.len()];
        records.entries.iter().filter_map(|e| e.joint).for_each(|(frame, _)| members[frame] += 1);
        members.iter().for_each(|n| put_number(*n, &mut self.members));
        for (file, range) in &records.files {
            let executable = if file.executable { FILE_EXECUTABLE } else { 0 };
            let flags = executable | if file.header_bytes.is_some() { FILE_TENSORS } else { 0 };
            let header = file.header_bytes.unwrap_or(0);
            [flags, file.bytes, header, range.end - range.start]
                .iter()
                .for_each(|n| put_number(*n, &mut self.files));
        }
        Ok(())
    }

    fn kind(&mut self, e: &Entry) -> Result<()> {
        self.texts.push(&e.dtype)?;
        put_number(e.dims.len() as u64, &mut self.kinds);
        e.dims.iter().for_each(|d| put_number(*d as u64, &mut self.kinds));
        put_number(e.bytes, &mut self.kinds);
        Ok(())
    }

    fn entry(&mut self, e: &Entry, kind: u64) -> Result<()> {
        let prefer = match e.prefer {
            None => 0,
            Some(Prefer::Speed) => 1,
            Some(Prefer::Memory) => 2,
        };
        let numbers = [
            kind,
            e.codec as u64,
            e.again.map_or(0, |i| i as u64 + 1),
            e.range.end - e.range.start,
            e.changed.unwrap_or(0),
            prefer,
            e.encoding.map_or(0, |x| x as u64 + 1),
            self.base(e)?,
        ];
        self.entries.iter_mut().zip(numbers).for_each(|(column, n)| put_number(n, column));
        match &e.same {
            Some(name) => self.texts.push(name),
            None => Ok(()),
        }
    }

    /// Write what is said of the base; gives its kind.
    fn base(&mut self, e: &Entry) -> Result<u64> {
        let Some(base) = &e.base else { return Ok(0) };
        if !base.parts.is_empty() {
            put_number(base.parts.len() as u64, &mut self.parts);
            self.part_count += base.parts.len();
            for part in base.parts.iter() {
                let named = part.name.iter().map(|_| PART_NAME).chain(part.file.iter().map(|_| PART_FILE));
                [named.sum(), part.at, part.bytes].iter().for_each(|n| put_number(*n, &mut self.parts));
                part.name.iter().chain(&part.file).try_for_each(|text| self.texts.push(text))?;
            }
            return Ok(base_kind::PARTS);
        }
        let own = base.name == e.name;
        if !own {
            self.texts.push(&base.name)?;
        }
        base.file.iter().try_for_each(|file| self.texts.push(file))?;
        let kind = if own { base_kind::OWN_NAME } else { base_kind::OTHER_NAME };
        Ok(kind + if base.file.is_some() { base_kind::FILE } else { 0 })
    }

    fn finish(self, records: &Records) -> Vec<u8> {
        let mut out = Vec::new();
        let (folder, sums) = (u64::from(records.folder), u64::from(records.has_sums()));
        let flags = folder * TABLE_FOLDER + sums * TABLE_SUMS;
        let counts =
            [records.entries.len(), records.joints.len(), records.files.len(), records.removed.len()];
        put_number(flags, &mut out);
        counts.iter().for_each(|n| put_number(*n as u64, &mut out));
        put_number(self.kind_index.len() as u64, &mut out);
        self.texts.finish(&mut out);
        out.extend_from_slice(&self.kinds);
        self.entries.iter().for_each(|column| out.extend_from_slice(column));
        [self.members, self.parts, self.files].iter().for_each(|column| out.extend_from_slice(column));
        out
    }
}
