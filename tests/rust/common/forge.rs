//! Packages put together by hand from SPEC.md, independently of the writer: what a stranger with bad
//! intentions could send.

use super::tables::{Table, put_table, take_table};
use std::collections::BTreeMap;
use xorz::package::SafeTensors;
use xxhash_rust::xxh3::xxh3_128;

/// The parts of a package, as version 1 names them: of version 2 its data, cut, and its table, as records. [`Forge::build`]
/// makes every digest right, so that nothing is caught early.
#[derive(Clone, Default)]
pub struct Forge {
    pub metadata: BTreeMap<String, String>,
    pub entries: Vec<(String, Vec<u8>)>,
}

pub fn hex(bytes: &[u8]) -> String {
    xxh3_128(bytes).to_le_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

/// A safetensors file of entries that are rows of bytes.
pub fn container(metadata: &BTreeMap<String, String>, entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut infos, mut at) = (serde_json::Map::new(), 0u64);
    for (name, blob) in entries {
        let end = at + blob.len() as u64;
        let info = serde_json::json!({"dtype": "U8", "shape": [blob.len()], "data_offsets": [at, end]});
        infos.insert(name.clone(), info);
        at = end;
    }
    infos.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut header = serde_json::Value::Object(infos).to_string();
    header += &" ".repeat(header.len().wrapping_neg().wrapping_sub(8) % 64);
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.into_bytes());
    entries.iter().for_each(|(_, blob)| out.extend(blob));
    out
}

impl Forge {
    /// Take a package apart.
    pub fn of(package: &[u8]) -> Self {
        let file = SafeTensors::from_bytes(package.to_vec()).unwrap();
        let read = |name: &str| file.read(file.find(name).unwrap()).unwrap();
        if file.header().metadata["format_version"] == "2" {
            return take_table(&read("xorz:table")).forge(&read("xorz:data"));
        }
        let entries = file.header().tensors.iter().map(|t| (t.name.clone(), file.read(t).unwrap()));
        Self { metadata: file.header().metadata.clone(), entries: entries.collect() }
    }

    /// An empty package.
    pub fn new() -> Self {
        let metadata = [("format", "xorz"), ("format_version", "2")];
        Self { metadata: metadata.map(|(k, v)| (k.into(), v.into())).into(), entries: Vec::new() }
    }

    /// An empty package of version 1.
    pub fn version1() -> Self {
        let mut forge = Self::new();
        forge.metadata.insert("format_version".into(), "1".into());
        forge
    }

    /// Add a tensor; its record gets the field `check`.
    pub fn tensor(mut self, name: &str, record: &str, blob: Vec<u8>) -> Self {
        self.metadata.insert(format!("xorz:tensor:{name}"), record.into());
        self.entries.push((name.into(), blob));
        self
    }

    /// The package's bytes, with all digests recomputed. Of version 2, records that no table can say are an error.
    pub fn build(&self) -> Vec<u8> {
        self.try_build().unwrap()
    }

    /// [`Forge::build`], or `None` where no table can say what the records say.
    pub fn try_build(&self) -> Option<Vec<u8>> {
        if self.metadata.get("format_version").map(String::as_str) == Some("2") {
            let data: Vec<u8> = self.entries.iter().flat_map(|(_, blob)| blob.clone()).collect();
            return Some(packed_table(&self.metadata, data, put_table(&Table::of(self)?)));
        }
        let mut metadata = self.metadata.clone();
        for (name, blob) in &self.entries {
            let Some(text) = metadata.get_mut(&format!("xorz:tensor:{name}")) else { continue };
            if let Ok(serde_json::Value::Object(mut record)) = serde_json::from_str(text) {
                record.insert("check".into(), hex(blob).into());
                *text = serde_json::Value::Object(record).to_string();
            }
        }
        metadata.remove("xorz:check");
        let mut fields: Vec<Vec<u8>> = Vec::new();
        for (k, v) in &metadata {
            fields.extend([k.clone().into_bytes(), v.clone().into_bytes()]);
        }
        let mut at = 0u64;
        for (name, blob) in &self.entries {
            let end = at + blob.len() as u64;
            fields.extend([name.clone().into_bytes(), b"U8".to_vec()]);
            fields.extend([blob.len() as u64, at, end].map(|n| n.to_le_bytes().to_vec()));
            at = end;
        }
        let sequence: Vec<u8> = fields
            .iter()
            .flat_map(|f| [(f.len() as u64).to_le_bytes().to_vec(), f.clone()].concat())
            .collect();
        metadata.insert("xorz:check".into(), hex(&sequence));
        Some(container(&metadata, &self.entries))
    }
}

/// A package of these data and this table. Of `metadata` what does not belong to tensors and files goes into the header.
pub fn packed_table(metadata: &BTreeMap<String, String>, data: Vec<u8>, table: Vec<u8>) -> Vec<u8> {
    let mut metadata = metadata.clone();
    metadata.retain(|k, _| !k.starts_with("xorz:"));
    container(&metadata, &[("xorz:data".into(), data), ("xorz:table".into(), table)])
}

/// A framed blob of `frames`, each with the decompressed size that it claims; `first` of them go before what
/// follows them.
pub fn framed_first(frames: &[(Vec<u8>, u32)], first: u32) -> Vec<u8> {
    let mut out = Vec::new();
    frames.iter().for_each(|(frame, _)| out.extend(frame));
    for (frame, raw) in frames {
        out.extend((frame.len() as u32).to_le_bytes());
        out.extend(raw.to_le_bytes());
    }
    out.extend(first.to_le_bytes());
    out.extend((frames.len() as u32).to_le_bytes());
    out
}

/// [`framed_first`] with all frames in order.
pub fn framed(frames: &[(Vec<u8>, u32)]) -> Vec<u8> {
    framed_first(frames, 0)
}
