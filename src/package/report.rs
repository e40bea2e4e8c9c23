//! What was packed, unpacked or found in a package, for people and for programs.

use super::record::{Entry, prefer_name, to_json};
use super::{Codec, Package};
use crate::error::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Totals of one package.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tensors of the fine-tune.
    pub tensors: usize,
    /// Tensors stored alone: new, or of another dtype or shape than in the base.
    pub alone: usize,
    /// Base tensors that the fine-tune lacks.
    pub removed: usize,
    /// Tensors that equal the base's.
    pub unchanged: usize,
    /// Words of all deltas.
    pub words: u64,
    /// Words that differ from the base.
    pub changed: u64,
    /// Bytes of all fine-tuned tensors.
    pub tensor_bytes: u64,
    /// Bytes of the package, header included.
    pub package_bytes: u64,
    /// Tensors by codec name.
    pub codecs: BTreeMap<&'static str, usize>,
    /// sha256 of the fine-tuned file, where there is one.
    pub sha256: Option<String>,
}

impl Report {
    /// The totals of an opened package.
    pub fn of(package: &Package) -> Self {
        let mut report = Self {
            removed: package.removed().len(),
            package_bytes: package.file_bytes(),
            sha256: package.files().first().map(|f| f.sha256.clone()),
            ..Self::default()
        };
        package.entries().iter().for_each(|e| report.count(e));
        report
    }

    pub(super) fn count(&mut self, e: &Entry) {
        self.tensors += 1;
        self.tensor_bytes = self.tensor_bytes.saturating_add(e.bytes);
        *self.codecs.entry(e.codec.name()).or_default() += 1;
        if e.codec.alone() {
            self.alone += 1;
            return;
        }
        let words = e.shape().and_then(|s| s.words()).unwrap_or(0) as u64;
        self.words = self.words.saturating_add(words);
        self.changed = self.changed.saturating_add(e.changed.unwrap_or(0));
        self.unchanged += usize::from(e.changed == Some(0));
    }

    /// As one JSON object.
    ///
    /// # Errors
    /// `Internal` only.
    pub fn to_json(&self) -> Result<String> {
        to_json(self)
    }
}

#[derive(Serialize)]
struct Inspection<'a> {
    format_version: u32,
    #[serde(flatten)]
    report: Report,
    removed_names: &'a [String],
    files: &'a [super::SourceFile],
    entries: Vec<Line<'a>>,
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    dtype: &'a str,
    shape: &'a [usize],
    codec: &'static str,
    bytes: u64,
    stored_bytes: u64,
    base_name: Option<&'a str>,
    base: Option<String>,
    encoding: Option<&'static str>,
    prefer: Option<&'static str>,
    changed: Option<u64>,
}

/// What a package holds, as one JSON object: the fields of [`Report`], `removed_names`, `files`, and `entries` sorted by
/// name.
///
/// # Errors
/// As [`Package::open`].
pub fn inspect_json(package: &Path) -> Result<String> {
    describe_json(&Package::open(package)?)
}

/// [`inspect_json`] of an open package.
///
/// # Errors
/// `Internal` only.
pub fn describe_json(package: &Package) -> Result<String> {
    let mut entries: Vec<_> = package.entries().iter().map(line).collect();
    entries.sort_by_key(|l| l.name);
    to_json(&Inspection {
        format_version: 0,
        report: Report::of(package),
        removed_names: package.removed(),
        files: package.files(),
        entries,
    })
}

fn line(e: &Entry) -> Line<'_> {
    Line {
        name: &e.name,
        dtype: &e.dtype,
        shape: &e.dims,
        codec: Codec::name(e.codec),
        bytes: e.bytes,
        stored_bytes: e.stored_bytes,
        base_name: e.base.as_ref().map(|b| b.name.as_str()),
        base: e.base.as_ref().map(|b| b.digest.to_string()),
        encoding: e.encoding.map(|x| x.name()),
        prefer: e.prefer.map(prefer_name),
        changed: e.changed,
    }
}
