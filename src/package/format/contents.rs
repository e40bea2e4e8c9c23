//! What a package holds, and how it is put together: stored tensors wait in nameless spool files, since the
//! header that goes first holds their sizes; the whole then appears under its name at once.

use super::container::{LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo};
use super::record::{self, BaseTensor, Entry, SourceFile};
use super::totals::Report;
use crate::codec::{Encoding, Prefer};
use crate::error::{Error, Result};
use crate::matrix::Digest;
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
    pub(crate) entries: Vec<Entry>,
    /// A source file and where its stored entry lies in the spool.
    pub(crate) file: Option<(SourceFile, Range<u64>)>,
}

/// All that a package holds.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) parts: Vec<ContentsPart>,
    pub(crate) removed: Vec<String>,
    pub(crate) folder: bool,
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
    pub(crate) fn write(mut self, out: Destination<'_>) -> Result<Report> {
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

/// How long a package's header becomes, tensor by tensor, at least.
#[derive(Debug, Default)]
pub(crate) struct HeaderLength(u64, usize);

impl HeaderLength {
    /// A tensor as it is stored.
    ///
    /// # Errors
    /// `Unsupported` when the header is too long by now.
    pub(crate) fn add(&mut self, entry: &Entry) -> Result<()> {
        let key = record::to_json(&entry.key)?.len();
        // The record is a string in JSON: its quotes are escaped.
        let text = record::to_json(&record::encode(entry)?)?.len();
        let record = record::tensor_key("").len() + key + text + r#":,"#.len();
        let info = key + r#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"#.len();
        (self.0, self.1) = (self.0 + (record + info) as u64, self.1 + 1);
        if self.0 <= MAX_HEADER_BYTES {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "{} tensors or more take a header of more than the {MAX_HEADER_BYTES} bytes that safetensors allows; pack it in parts",
            self.1
        )))
    }

    /// A tensor that is still to be stored, by `codec` or whichever is the smallest: the shortest record that it can have.
    ///
    /// # Errors
    /// As [`HeaderLength::add`].
    pub(crate) fn add_least(
        &mut self,
        t: &TensorInfo,
        base: Option<&str>,
        same: Option<&str>,
        codec: Option<Codec>,
    ) -> Result<()> {
        // What is small is never stored as planes, whose record is the shortest.
        const PLANES_FROM: u64 = 512;
        // Every delta of some words takes more bytes than that.
        const LEAST_BYTES: u64 = 10;
        let digest = Digest([0; 16]);
        let of_delta =
            codec.unwrap_or(if t.bytes() > PLANES_FROM { Codec::Planes } else { Codec::ResidentZstd });
        let (delta, resident) = (base.is_some(), matches!(of_delta, Codec::Resident | Codec::ResidentZstd));
        let not_same = if delta { of_delta } else { Codec::Alone };
        if delta && t.bytes() > 0 {
            // The digits of its length, and of the place that it comes to at least.
            let place = LEAST_BYTES * self.1 as u64;
            self.0 += (format!("{LEAST_BYTES}{place}{}", place + LEAST_BYTES).len() - "000".len()) as u64;
        }
        self.add(&Entry {
            name: t.name.clone(),
            key: t.name.clone(),
            dtype: t.dtype.clone(),
            dims: t.dims.clone(),
            bytes: 0,
            codec: if same.is_some() { Codec::Same } else { not_same },
            base: base.map(|name| BaseTensor { name: name.into(), file: None, parts: Vec::new(), digest }),
            encoding: (delta && resident).then_some(Encoding::Raw),
            prefer: delta.then_some(Prefer::Speed),
            changed: delta.then_some(0),
            same: same.map(str::to_owned),
            stored_bytes: 0,
            range: 0..0,
            check: digest,
            version: record::VERSION,
        })
    }
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

/// Refuse a name that belongs to the format.
pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.starts_with(record::RESERVED) || name == "__metadata__" {
        return Err(Error::invalid("the name is reserved").of_tensor(name));
    }
    Ok(())
}
