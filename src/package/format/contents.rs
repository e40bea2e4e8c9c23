//! What a package holds, and how it is put together: stored tensors wait in nameless spool files, since the
//! table and the header hold their sizes; the whole then appears under its name at once.

use super::columns::check_text;
use super::container::{LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo};
use super::joint::JointWriter;
use super::record::{self, Entry, JointFrame, Records, SourceFile};
use super::table_columns::MAX_DIMS;
use super::table_writer::write_table;
use super::totals::Report;
use crate::error::{Error, Result};
use crate::package::io::spool::{Sequential, Spool};
use crate::package::io::temp::Output;
use crate::package::options::{Codec, Destination};
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::ops::Range;

/// Data begin at a multiple of this, so that resident deltas can be mapped and used in place.
const ALIGN: u64 = 64;

/// Stored bytes of some tensors and files, and what they are.
#[derive(Debug)]
pub(crate) struct ContentsPart {
    pub(crate) spool: Spool,
    /// Those that wait for their joint frame are incomplete.
    pub(crate) entries: Vec<Entry>,
    /// A source file and where its stored entry lies in the spool.
    pub(crate) file: Option<(SourceFile, Range<u64>)>,
    joints: Vec<JointFrame>,
    joint: JointWriter,
}

impl ContentsPart {
    /// Nothing yet, to be stored in `spool`.
    pub(crate) fn new(spool: Spool) -> Self {
        let (entries, joints, joint) = (Vec::new(), Vec::new(), JointWriter::default());
        Self { spool, entries, file: None, joints, joint }
    }

    /// Add a small tensor of the XOR words `words`, whose own frame would be `own`.
    pub(crate) fn join(&mut self, entry: Entry, words: &[u8], own: &[u8]) -> Result<()> {
        if !self.joint.has_room(words.len()) {
            self.flush()?;
        }
        self.joint.push(self.entries.len(), words, own);
        self.entries.push(entry);
        Ok(())
    }

    /// Store what waits: no tensor comes any more.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.joint.flush(&mut self.spool, &mut self.entries, &mut self.joints)
    }
}

/// All that a package holds.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) parts: Vec<ContentsPart>,
    pub(crate) removed: Vec<String>,
    pub(crate) folder: bool,
}

/// Stored bytes of a part, in the order of the package's data.
type StoredRun = (usize, Range<u64>);

impl Contents {
    /// What is stored, by its place in the package's data; and where it is to be taken from.
    fn records(&mut self) -> (Records, Vec<StoredRun>) {
        // Resident deltas first: they are multiples of 64 bytes, so all of them stay aligned. Joint frames last.
        let mut records = Records { folder: self.folder, ..Records::default() };
        let mut of_part: Vec<usize> = Vec::new();
        for (p, part) in self.parts.iter_mut().enumerate() {
            let before = records.joints.len();
            records.joints.append(&mut part.joints);
            part.entries.iter_mut().for_each(|e| e.joint = e.joint.map(|(frame, at)| (before + frame, at)));
            of_part.resize(of_part.len() + part.entries.len(), p);
            match records.entries.is_empty() {
                true => records.entries = std::mem::take(&mut part.entries),
                false => records.entries.append(&mut part.entries),
            }
        }
        let class = |e: &Entry| match e.codec {
            Codec::Resident => 0,
            Codec::Joint => 2,
            _ => 1,
        };
        if !records.entries.is_sorted_by_key(class) {
            let mut both: Vec<_> = of_part.into_iter().zip(std::mem::take(&mut records.entries)).collect();
            both.sort_by_key(|(_, e)| class(e));
            (of_part, records.entries) = both.into_iter().unzip();
        }
        let mut runs: Vec<StoredRun> = Vec::new();
        let mut at = 0;
        let mut place = |p: usize, range: &mut Range<u64>| {
            let n = range.end - range.start;
            match runs.last_mut() {
                Some((last, run)) if *last == p && run.end == range.start => run.end = range.end,
                _ => runs.push((p, range.clone())),
            }
            *range = at..at + n;
            at += n;
        };
        for (&p, e) in of_part.iter().zip(&mut records.entries) {
            // The shares of a joint frame's tensors are all of it.
            place(p, &mut e.range);
        }
        for (p, part) in self.parts.iter_mut().enumerate() {
            if let Some((file, mut range)) = part.file.take() {
                place(p, &mut range);
                records.files.push((file, range));
            }
        }
        records.removed = std::mem::take(&mut self.removed);
        (records, runs)
    }

    /// Write the package; gives its totals.
    pub(crate) fn write(mut self, out: Destination<'_>) -> Result<Report> {
        self.parts.iter_mut().try_for_each(ContentsPart::flush)?;
        let (records, runs) = self.records();
        let table = write_table(&records)?;
        let header = package_header(runs.iter().map(|(_, r)| r.end - r.start).sum(), table.len() as u64)?;
        let report = self.report(&records, &header, &table);
        match out {
            Destination::Stream(stream) => {
                self.write_to(&runs, &header, &table, stream)?;
                stream.flush()?;
            }
            Destination::Path(path) => {
                let output = Output::create(path)?;
                let mut to = BufWriter::with_capacity(1 << 20, Sequential::new(output.file()));
                let written = self.write_to(&runs, &header, &table, &mut to);
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
        runs: &[StoredRun],
        header: &str,
        table: &[u8],
        out: &mut dyn Write,
    ) -> Result<()> {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for (p, range) in runs {
            self.parts[*p].spool.replay(range.clone(), |bytes| Ok(out.write_all(bytes)?))?;
        }
        Ok(out.write_all(table)?)
    }

    fn report(&self, records: &Records, header: &str, table: &[u8]) -> Report {
        let mut report = Report::default();
        records.entries.iter().for_each(|e| report.count(e));
        report.set_files(records.files.iter().map(|(file, _)| file), self.folder);
        report.removed = records.removed.len();
        let data = records.entries.iter().map(|e| &e.range).chain(records.files.iter().map(|(_, r)| r));
        let data: u64 = data.map(|r| r.end - r.start).sum();
        report.package_bytes = LENGTH_BYTES + (header.len() + table.len()) as u64 + data;
        report
    }
}

/// The header of a package whose data and table have so many bytes.
fn package_header(data: u64, table: u64) -> Result<String> {
    let metadata = BTreeMap::from([
        ("format".to_string(), record::FORMAT.to_string()),
        ("format_version".to_string(), record::VERSION.to_string()),
    ]);
    let info = |name: &str, range: Range<u64>| -> Result<TensorInfo> {
        let bytes = usize::try_from(range.end - range.start);
        let dims = vec![bytes.map_err(|_| Error::internal("stored bytes"))?];
        Ok(TensorInfo { name: name.into(), dtype: "U8".into(), dims, range })
    };
    let end = data.checked_add(table).ok_or_else(|| Error::internal("stored bytes"))?;
    header_text(&metadata, &[info(record::DATA, 0..data)?, info(record::TABLE, data..end)?])
}

/// A safetensors header, padded with spaces so that the data begin at a multiple of 64 bytes.
pub(crate) fn header_text(metadata: &BTreeMap<String, String>, infos: &[TensorInfo]) -> Result<String> {
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

/// Refuse a tensor that no table may list, before the work: a name that belongs to the format or is too long, dimensions
/// without end.
pub(crate) fn check_listed(name: &str, dims: &[usize]) -> Result<()> {
    if name.starts_with(record::RESERVED) || name == "__metadata__" {
        return Err(Error::invalid("the name is reserved").of_tensor(name));
    }
    check_text(name)?;
    if dims.len() > MAX_DIMS {
        let have = dims.len();
        let what = format!("has {have} dimensions, more than the {MAX_DIMS} that a package holds");
        return Err(Error::unsupported(what).of_tensor(name));
    }
    Ok(())
}
