//! The table of a package of version 2, written and read by hand from SPEC.md, independently of the library.

use super::forge::{Forge, hex};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::xxh3_128;

pub const CODECS: [&str; 9] =
    ["xor", "resident", "resident-zstd", "planes", "alone", "same", "predicted", "joint", "unchanged"];
const ENCODINGS: [&str; 4] = ["unchanged", "sparse", "exponent", "raw"];
const JOINT: u64 = 7;
/// The flag of a table that has the sha256 of each delta's base.
pub const SUMS: u64 = 2;

pub type Kind = (String, Vec<u64>, u64);
pub type Part = (Option<String>, Option<String>, u64, u64);

/// One tensor of a table: numbers as they stand in the columns.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub name: String,
    pub kind: u64,
    pub codec: u64,
    pub again: u64,
    pub stored: u64,
    pub changed: u64,
    pub prefer: u64,
    pub encoding: u64,
    pub base: u64,
    pub base_name: Option<String>,
    pub base_file: Option<String>,
    pub parts: Vec<Part>,
    pub same: Option<String>,
    pub digest: Vec<u8>,
    /// Of its base's words; empty where the table has none.
    pub sha256: Vec<u8>,
    pub check: Vec<u8>,
}

/// All that a table says.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub flags: u64,
    pub kinds: Vec<Kind>,
    pub rows: Vec<Row>,
    /// Tensors and digest of each joint frame.
    pub joints: Vec<(u64, Vec<u8>)>,
    pub removed: Vec<String>,
    /// Path, flags, bytes, header, stored, digests.
    pub files: Vec<(String, [u64; 4], Vec<u8>)>,
}

pub fn number(mut v: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
    out
}

/// Texts as a table holds them: each shares with the one before what they begin with alike.
pub fn texts(all: &[&str]) -> Vec<u8> {
    let (mut common, mut lengths, mut bytes, mut last) = (vec![], vec![], vec![], "");
    for text in all {
        let alike = last.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        common.extend(number(alike as u64));
        lengths.extend(number((text.len() - alike) as u64));
        bytes.extend(&text.as_bytes()[alike..]);
        last = text;
    }
    [number(all.len() as u64), number(bytes.len() as u64), common, lengths, bytes].concat()
}

impl Table {
    /// The columns as they are before zstd.
    pub fn columns(&self) -> Vec<u8> {
        let mut all: Vec<&str> = self.rows.iter().map(|r| r.name.as_str()).collect();
        all.extend(self.removed.iter().map(String::as_str));
        all.extend(self.files.iter().map(|f| f.0.as_str()));
        all.extend(self.kinds.iter().map(|k| k.0.as_str()));
        for row in &self.rows {
            all.extend(row.base_name.iter().map(String::as_str));
            for (name, file, ..) in &row.parts {
                all.extend(name.iter().chain(file).map(String::as_str));
            }
            all.extend(row.base_file.iter().chain(&row.same).map(String::as_str));
        }
        let counts =
            [self.rows.len(), self.joints.len(), self.files.len(), self.removed.len(), self.kinds.len()];
        let mut out = number(self.flags);
        counts.iter().for_each(|n| out.extend(number(*n as u64)));
        out.extend(texts(&all));
        for (_, dims, bytes) in &self.kinds {
            out.extend(number(dims.len() as u64));
            dims.iter().chain([bytes]).for_each(|n| out.extend(number(*n)));
        }
        let columns: [fn(&Row) -> u64; 8] = [
            |r| r.kind,
            |r| r.codec,
            |r| r.again,
            |r| r.stored,
            |r| r.changed,
            |r| r.prefer,
            |r| r.encoding,
            |r| r.base,
        ];
        columns.iter().for_each(|of| self.rows.iter().for_each(|row| out.extend(number(of(row)))));
        self.joints.iter().for_each(|(members, _)| out.extend(number(*members)));
        for row in self.rows.iter().filter(|r| r.base == 3) {
            out.extend(number(row.parts.len() as u64));
            for (name, file, at, bytes) in &row.parts {
                let flags = u64::from(name.is_some()) + 2 * u64::from(file.is_some());
                [flags, *at, *bytes].iter().for_each(|n| out.extend(number(*n)));
            }
        }
        self.files.iter().for_each(|f| f.1.iter().for_each(|n| out.extend(number(*n))));
        out
    }

    pub fn digests(&self) -> Vec<u8> {
        let (mut out, mut joints, mut left) = (Vec::new(), self.joints.iter(), 0);
        for row in &self.rows {
            if row.codec == JOINT
                && left == 0
                && let Some((members, check)) = joints.next()
            {
                out.extend(check);
                left = *members;
            }
            left = left.saturating_sub(u64::from(row.codec == JOINT));
            out.extend(row.digest.iter().chain(&row.sha256).chain(&row.check));
        }
        self.files.iter().for_each(|f| out.extend(&f.2));
        out
    }

    /// The records of a package whose tensors and files are called and stored so.
    pub fn of(forge: &Forge) -> Option<Self> {
        let mut table = Self::default();
        let list = |key: &str| -> Option<Vec<Value>> {
            forge.metadata.get(key).map_or(Some(vec![]), |text| serde_json::from_str(text).ok())
        };
        table.flags = match forge.metadata.get("xorz:source").map(String::as_str) {
            None => 0,
            Some("folder") => 1,
            Some(_) => 4,
        };
        for name in list("xorz:removed")? {
            table.removed.push(name.as_str()?.to_owned());
        }
        let (mut stored, mut frames) = (forge.entries.iter(), Vec::<Vec<u8>>::new());
        for (key, blob) in stored.by_ref().take_while(|(key, _)| !key.starts_with("xorz:file:")) {
            let record: Value =
                serde_json::from_str(forge.metadata.get(&format!("xorz:tensor:{key}"))?).ok()?;
            table.row(key, record, blob)?;
            if table.rows.last()?.codec == JOINT {
                // The digest of a frame is that of what its tensors have of it.
                let frame = table.joints.len() - 1;
                frames.resize(frame + 1, Vec::new());
                frames[frame].extend(blob);
                table.joints[frame].1 = xxh3_128(&frames[frame]).to_le_bytes().to_vec();
            }
        }
        let blobs = forge.entries.iter().filter(|(key, _)| key.starts_with("xorz:file:"));
        for (file, (_, blob)) in list("xorz:files")?.iter().zip(blobs) {
            table.files.push(file_row(file, blob)?);
        }
        (table.files.len() == list("xorz:files")?.len()).then_some(table)
    }

    fn row(&mut self, key: &str, mut record: Value, blob: &[u8]) -> Option<()> {
        let fields = record.as_object_mut()?;
        let mut take = |name: &str| fields.remove(name);
        let text = |v: Option<Value>| v.map_or(Some(None), |v| v.as_str().map(|s| Some(s.to_owned())));
        let (again, name) = match key.strip_prefix("xorz:again:").and_then(|k| k.split_once(':')) {
            Some((i, name)) => (i.parse::<u64>().ok()? + 1, name),
            None => (0, key),
        };
        let dims: Vec<u64> = serde_json::from_value(take("shape")?).ok()?;
        let kind = (text(take("dtype"))??, dims, take("bytes")?.as_u64()?);
        let codec = text(take("codec"))??;
        let codec = CODECS.iter().position(|c| *c == codec).unwrap_or(99) as u64;
        let named = |v: Option<Value>, names: &[&str]| match v {
            None => Some(0),
            Some(v) => Some(names.iter().position(|n| Some(*n) == v.as_str())? as u64 + 1),
        };
        let base = text(take("base"))?;
        let digest = |text: &str| unhex(text, 16);
        let mut row = Row {
            name: name.into(),
            kind: self.kinds.iter().position(|k| *k == kind).unwrap_or(self.kinds.len()) as u64,
            codec,
            again,
            stored: blob.len() as u64,
            changed: take("changed").map_or(Some(0), |v| v.as_u64())?,
            prefer: named(take("prefer"), &["speed", "memory"])?,
            encoding: named(take("encoding"), &ENCODINGS)?,
            base_name: text(take("base_name"))?,
            base_file: text(take("base_file"))?,
            same: text(take("same"))?,
            ..Row::default()
        };
        for part in take("base_parts").map_or(Some(vec![]), |v| v.as_array().cloned())? {
            row.parts.push(base_part(part)?);
        }
        row.base = match (&base, &row.base_name, row.parts.is_empty()) {
            (None, ..) => 0,
            (Some(_), None, true) => 1,
            (Some(_), Some(_), true) => 2,
            _ => 3,
        } + 4 * u64::from(row.base_file.is_some());
        let of_blob = digest(&hex(blob))?;
        let given = base.as_deref().map_or(Some(of_blob.clone()), digest)?;
        let short = matches!(codec, 7 | 8) && kind.2 <= 4096;
        row.digest = if short { given[..8].to_vec() } else { given };
        if codec == 5 {
            let same = self.rows.iter().find(|r| Some(&r.name) == row.same.as_ref());
            row.digest = same.map_or(vec![0; 16], |r| r.digest.clone());
            row.digest.resize(16, 0);
        }
        if !matches!(codec, 4 | 5 | 7 | 8) {
            row.check = of_blob;
        }
        if let Some(sha256) = text(take("base_sha256"))? {
            row.sha256 = unhex(&sha256, 32)?;
            self.flags |= SUMS;
        }
        take("check");
        if codec == JOINT {
            let frame = usize::try_from(take("frame")?.as_u64()?).ok().filter(|f| *f < 1000)?;
            self.joints.resize(self.joints.len().max(frame + 1), (0, vec![0; 16]));
            self.joints[frame].0 += 1;
        }
        if row.kind == self.kinds.len() as u64 {
            self.kinds.push(kind);
        }
        self.rows.push(row);
        fields.is_empty().then_some(())
    }
}

/// The `n` bytes that so many pairs of hexadecimal digits are.
fn unhex(text: &str, n: usize) -> Option<Vec<u8>> {
    let byte = |i: usize| u8::from_str_radix(text.get(i..i + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(byte).collect::<Option<Vec<u8>>>().filter(|d| d.len() == n)
}

fn base_part(part: Value) -> Option<Part> {
    let mut fields = part.as_object()?.clone();
    let name = fields.remove("name").map_or(Some(None), |v| v.as_str().map(|s| Some(s.to_owned())))?;
    let file = fields.remove("file").map_or(Some(None), |v| v.as_str().map(|s| Some(s.to_owned())))?;
    let at = fields.remove("at").map_or(Some(0), |v| v.as_u64())?;
    let bytes = fields.remove("bytes")?.as_u64()?;
    fields.is_empty().then_some((name, file, at, bytes))
}

fn file_row(file: &Value, blob: &[u8]) -> Option<(String, [u64; 4], Vec<u8>)> {
    let known = ["path", "sha256", "bytes", "executable", "header_bytes", "check"];
    file.as_object()?.keys().all(|k| known.contains(&k.as_str())).then_some(())?;
    let header = file.get("header_bytes").map_or(Some(None), |v| v.as_u64().map(Some))?;
    let executable = file.get("executable").map_or(Some(false), Value::as_bool)?;
    let flags = u64::from(executable) + 2 * u64::from(header.is_some());
    let digests = [unhex(file["sha256"].as_str()?, 32)?, unhex(file["check"].as_str()?, 16)?].concat();
    let numbers = [flags, file["bytes"].as_u64()?, header.unwrap_or(0), blob.len() as u64];
    Some((file["path"].as_str()?.to_owned(), numbers, digests))
}

/// The bytes of a table of these columns and digests, its own digest made right.
pub fn packed(columns: &[u8], digests: &[u8]) -> Vec<u8> {
    let frame = zstd::bulk::compress(columns, 3).unwrap();
    let stored = if frame.len() < columns.len() { &frame } else { columns };
    sealed(columns.len() as u32, stored, digests)
}

/// A table that says that its columns have `raw` bytes.
pub fn sealed(raw: u32, stored: &[u8], digests: &[u8]) -> Vec<u8> {
    let lengths = [raw, stored.len() as u32].map(u32::to_le_bytes).concat();
    let rest = [&lengths, stored, digests].concat();
    [&xxh3_128(&rest).to_le_bytes()[..], &rest].concat()
}

pub fn put_table(table: &Table) -> Vec<u8> {
    packed(&table.columns(), &table.digests())
}

/// Numbers and texts of columns, taken from the front.
struct Taker<'a>(&'a [u8]);

impl<'a> Taker<'a> {
    fn number(&mut self) -> u64 {
        let n = self.0.iter().position(|b| *b < 0x80).unwrap() + 1;
        self.bytes(n).iter().rev().fold(0, |v, b| (v << 7) | u64::from(b & 0x7F))
    }

    fn numbers(&mut self, n: usize) -> Vec<u64> {
        (0..n).map(|_| self.number()).collect()
    }

    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(n);
        self.0 = later;
        now
    }

    fn texts(&mut self) -> std::vec::IntoIter<String> {
        let (count, bytes) = (self.number() as usize, self.number() as usize);
        let (common, lengths) = (self.numbers(count), self.numbers(count));
        let mut bytes = Taker(self.bytes(bytes));
        let (mut out, mut last) = (Vec::new(), Vec::new());
        for (common, length) in common.into_iter().zip(lengths) {
            last.truncate(common as usize);
            last.extend(bytes.bytes(length as usize));
            out.push(String::from_utf8(last.clone()).unwrap());
        }
        out.into_iter()
    }
}

/// What a sound table says.
pub fn take_table(bytes: &[u8]) -> Table {
    assert_eq!(bytes[..16], xxh3_128(&bytes[16..]).to_le_bytes());
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (columns, digests) = bytes[24..].split_at(word(20));
    let columns = match word(16) {
        raw if raw == columns.len() => columns.to_vec(),
        raw => zstd::bulk::decompress(columns, raw).unwrap(),
    };
    let (mut c, mut d) = (Taker(&columns), Taker(digests));
    let flags = c.number();
    let counts: Vec<usize> = c.numbers(5).into_iter().map(|n| n as usize).collect();
    let [n, joints, files, removed, kinds] = counts[..] else { unreachable!() };
    let mut texts = c.texts();
    let names: Vec<String> = texts.by_ref().take(n).collect();
    let removed = texts.by_ref().take(removed).collect();
    let paths: Vec<String> = texts.by_ref().take(files).collect();
    let kinds: Vec<Kind> = (0..kinds)
        .map(|_| {
            let dims = c.number() as usize;
            (texts.next().unwrap(), c.numbers(dims), c.number())
        })
        .collect();
    let columns: Vec<Vec<u64>> = (0..8).map(|_| c.numbers(n)).collect();
    let members = c.numbers(joints);
    let (mut rows, mut frames, mut left) = (Vec::new(), Vec::new(), 0);
    for (i, name) in names.into_iter().enumerate() {
        let [kind, codec, again, stored, changed, prefer, encoding, base] =
            [0, 1, 2, 3, 4, 5, 6, 7].map(|k: usize| columns[k][i]);
        if codec == JOINT && left == 0 {
            left = members[frames.len()];
            frames.push((left, d.bytes(16).to_vec()));
        }
        left -= u64::from(codec == JOINT);
        let mut row =
            Row { name, kind, codec, again, stored, changed, prefer, encoding, base, ..Row::default() };
        row.base_name = (base & 3 == 2).then(|| texts.next().unwrap());
        if base == 3 {
            for _ in 0..c.number() {
                let [flags, at, bytes] = [0; 3].map(|_| c.number());
                let name = (flags & 1 > 0).then(|| texts.next().unwrap());
                let file = (flags & 2 > 0).then(|| texts.next().unwrap());
                row.parts.push((name, file, at, bytes));
            }
        }
        row.base_file = (base & 4 > 0).then(|| texts.next().unwrap());
        row.same = (codec == 5).then(|| texts.next().unwrap());
        let short = matches!(codec, 7 | 8) && kinds[kind as usize].2 <= 4096;
        row.digest = d.bytes(if short { 8 } else { 16 }).to_vec();
        row.sha256 = d.bytes(if flags & SUMS > 0 && !matches!(codec, 4 | 5) { 32 } else { 0 }).to_vec();
        row.check = d.bytes(if matches!(codec, 4 | 5 | 7 | 8) { 0 } else { 16 }).to_vec();
        rows.push(row);
    }
    let files = paths.into_iter().map(|path| {
        let numbers = c.numbers(4).try_into().unwrap();
        (path, numbers, d.bytes(48).to_vec())
    });
    let files = files.collect();
    assert!(c.0.is_empty() && d.0.is_empty() && texts.next().is_none(), "a table with more than it says");
    Table { flags, kinds, rows, joints: frames, removed, files }
}

fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl Table {
    /// As records, with the stored bytes that each has of `data`.
    pub fn forge(&self, data: &[u8]) -> Forge {
        let mut forge = Forge::new();
        let (mut data, mut frame, mut left) = (Taker(data), 0, 0);
        for row in &self.rows {
            let key = match row.again {
                0 => row.name.clone(),
                i => format!("xorz:again:{}:{}", i - 1, row.name),
            };
            let mut record = self.record(row);
            if row.codec == JOINT {
                if left == 0 {
                    (left, frame) = (self.joints[frame].0, frame + 1);
                }
                left -= 1;
                record["frame"] = (frame - 1).into();
            }
            forge = forge.tensor(&key, &record.to_string(), data.bytes(row.stored as usize).to_vec());
        }
        let mut files = Vec::new();
        for (i, (path, [flags, bytes, header, stored], digests)) in self.files.iter().enumerate() {
            let (sha256, check) = (text(&digests[..32]), text(&digests[32..]));
            let mut file = json!({"path": path, "sha256": sha256, "bytes": bytes, "check": check});
            if flags & 1 > 0 {
                file["executable"] = true.into();
            }
            if flags & 2 > 0 {
                file["header_bytes"] = (*header).into();
            }
            files.push(file);
            forge.entries.push((format!("xorz:file:{i}"), data.bytes(*stored as usize).to_vec()));
        }
        let lists: BTreeMap<&str, Value> =
            [("xorz:files", files.into()), ("xorz:removed", self.removed.clone().into())].into();
        for (key, list) in lists.into_iter().filter(|(_, list): &(_, Value)| list != &json!([])) {
            forge.metadata.insert(key.into(), list.to_string());
        }
        if self.flags & 1 > 0 {
            forge.metadata.insert("xorz:source".into(), "folder".into());
        }
        forge
    }

    fn record(&self, row: &Row) -> Value {
        let (dtype, dims, bytes) = &self.kinds[row.kind as usize];
        let codec = CODECS[row.codec as usize];
        let mut record = json!({"dtype": dtype, "shape": dims, "bytes": bytes, "codec": codec});
        if row.base > 0 {
            let mut digest = row.digest.clone();
            digest.resize(16, 0);
            record["base"] = text(&digest).into();
            record["changed"] = row.changed.into();
        }
        if !row.sha256.is_empty() {
            record["base_sha256"] = text(&row.sha256).into();
        }
        if row.prefer > 0 {
            record["prefer"] = ["speed", "memory"][row.prefer as usize - 1].into();
        }
        if row.encoding > 0 {
            record["encoding"] = ENCODINGS[row.encoding as usize - 1].into();
        }
        for (field, text) in
            [("base_name", &row.base_name), ("base_file", &row.base_file), ("same", &row.same)]
        {
            if let Some(text) = text {
                record[field] = text.as_str().into();
            }
        }
        if !row.parts.is_empty() {
            let parts = row.parts.iter().map(|(name, file, at, bytes)| {
                let mut part = json!({"bytes": bytes, "at": at});
                for (field, text) in [("name", name), ("file", file)] {
                    if let Some(text) = text {
                        part[field] = text.as_str().into();
                    }
                }
                part
            });
            record["base_parts"] = parts.collect::<Vec<_>>().into();
        }
        record
    }
}
