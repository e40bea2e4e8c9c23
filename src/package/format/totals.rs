//! What was packed, unpacked or found in a package, for people and for programs.

use super::parts::BasePart;
use super::reader::Package;
use super::record::{Entry, prefer_name, to_json};
use super::sums::Sum;
use crate::error::Result;
use crate::package::options::Codec;
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
    /// Tensors that are another tensor of the fine-tune, such as a tied head.
    pub same: usize,
    /// sha256 of the fine-tuned file, where a single file was packed.
    pub sha256: Option<String>,
    /// Whether a folder was packed.
    pub folder: bool,
    /// The files that were packed.
    pub files: Vec<FileLine>,
    /// Of packing only: what to do about a fine-tune most of which is no delta.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// One file that was packed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileLine {
    /// Path within the folder; a single file's name.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Its sha256.
    pub sha256: String,
    /// Whether it holds tensors; else it was carried along as it is.
    pub tensors: bool,
}

impl Report {
    /// The totals of an opened package.
    pub fn of(package: &Package) -> Self {
        let mut report =
            Self { removed: package.removed().len(), package_bytes: package.file_bytes(), ..Self::default() };
        report.set_files(package.files().iter(), package.is_folder());
        package.entries().iter().for_each(|e| report.count(e));
        report
    }

    pub(crate) fn count(&mut self, e: &Entry) {
        self.tensors += 1;
        self.tensor_bytes = self.tensor_bytes.saturating_add(e.bytes);
        *self.codecs.entry(e.codec.name()).or_default() += 1;
        if !e.codec.delta() {
            self.alone += usize::from(e.codec == Codec::Alone);
            self.same += usize::from(e.codec == Codec::Same);
            return;
        }
        let words = e.shape().and_then(|s| s.words()).unwrap_or(0) as u64;
        self.words = self.words.saturating_add(words);
        self.changed = self.changed.saturating_add(e.changed.unwrap_or(0));
        self.unchanged += usize::from(e.changed == Some(0));
    }

    pub(super) fn set_files<'a>(
        &mut self,
        files: impl Iterator<Item = &'a super::record::SourceFile>,
        folder: bool,
    ) {
        let line = |f: &super::record::SourceFile| FileLine {
            path: f.path.clone(),
            bytes: f.bytes,
            sha256: f.sha256.clone(),
            tensors: f.header_bytes.is_some(),
        };
        self.files = files.map(line).collect();
        self.folder = folder;
        self.sha256 = self.files.first().filter(|_| !folder).map(|f| f.sha256.clone());
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
    #[serde(skip_serializing_if = "Option::is_none")]
    base_file: Option<&'a str>,
    base_parts: &'a [BasePart],
    base: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_sha256: Option<Sum>,
    encoding: Option<&'static str>,
    prefer: Option<&'static str>,
    changed: Option<u64>,
    same: Option<&'a str>,
}

/// What a package holds, as one JSON object: the fields of [`Report`], `removed_names`, and `entries` sorted by
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
    let mut entries: Vec<_> = package.entries().iter().map(|e| line(package, e)).collect();
    entries.sort_by_key(|l| l.name);
    to_json(&Inspection {
        format_version: package.format_version(),
        report: Report::of(package),
        removed_names: package.removed(),
        entries,
    })
}

fn line<'a>(package: &'a Package, e: &'a Entry) -> Line<'a> {
    // A tensor that is another one is loaded as that one's delta.
    let base = package.resolve(e).ok().and_then(|stored| stored.base.as_ref());
    Line {
        name: &e.name,
        dtype: &e.dtype,
        shape: &e.dims,
        codec: Codec::name(e.codec),
        bytes: e.bytes,
        stored_bytes: e.stored_bytes,
        base_name: base.map(|b| b.name.as_str()),
        base_file: base.and_then(|b| b.file.as_deref()),
        base_parts: base.map_or(&[], |b| &b.parts),
        base: base.map(|b| b.digest_text()),
        base_sha256: base.and_then(|b| b.sha256),
        encoding: e.encoding.map(|x| x.name()),
        prefer: e.prefer.map(prefer_name),
        changed: e.changed,
        same: e.same.as_deref(),
    }
}
