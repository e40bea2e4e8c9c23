//! Any bytes as a package; any stored bytes behind right digests. Nothing may panic, hang or allocate much: each step by itself
//! is held to the bounds, since a table of a thousand tensors is a thousand times a tensor's work.
#![no_main]

mod support;

#[path = "../../rust/common/forge.rs"]
#[allow(dead_code)]
mod forge;
#[path = "../../rust/common/tables.rs"]
#[allow(dead_code)]
mod tables;

use forge::Forge;
use libfuzzer_sys::fuzz_target;
use support::bounded;
use xorz::codec::Prefer;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Codec, Package};
use xorz::resident::{Resident, restore};

const SHAPE: Shape = Shape { n: 20, k: 300 };

fuzz_target!(|data: &[u8]| {
    let [how, rest @ ..] = data else { return };
    let dtype = Dtype::ALL[usize::from(how >> 4) % Dtype::ALL.len()];
    let base: Vec<u8> = (0..20 * 300 * dtype.word_bytes()).map(|i| (i * 7 + i / 300) as u8).collect();
    let Ok(base) = Matrix::new(dtype, SHAPE, &base) else { return };
    let bytes = match how & 15 {
        7 => rest.to_vec(),
        8 => tabled(rest),
        n => Codec::ALL.get(usize::from(n & 7)).map_or_else(Vec::new, |codec| forged(*codec, &base, rest)),
    };
    let len = bytes.len();
    if let Ok(package) = bounded(len, || Package::parse(bytes)) {
        walk(&package, &base, len);
    }
});

/// A package with the one tensor `w`, stored as `blob`, whose every digest is right.
fn forged(codec: Codec, base: &Matrix<'_>, blob: &[u8]) -> Vec<u8> {
    let more = match codec {
        Codec::Alone => String::new(),
        Codec::Same => r#","same":"w""#.into(),
        _ => {
            let encoding = ["unchanged", "sparse", "exponent", "raw"][blob.len() % 4];
            let resident = matches!(codec, Codec::Resident | Codec::ResidentZstd);
            let more = if codec == Codec::Joint { r#","frame":0"# } else { "" };
            let encoding = if resident { format!(r#","encoding":"{encoding}""#) } else { more.into() };
            format!(r#","base":"{}","prefer":"memory","changed":{}{encoding}"#, base.digest(), blob.len() % 5)
        }
    };
    let record = format!(
        r#"{{"dtype":"{}","shape":[20,300],"bytes":{},"codec":"{}","check":""{more}}}"#,
        base.dtype(),
        base.bytes().len(),
        codec.name()
    );
    Forge::new().tensor("w", &record, blob.to_vec()).try_build().unwrap_or_default()
}

/// A package whose table has these columns, then the digests: three bytes say how many bytes of the one, and how many of data.
fn tabled(rest: &[u8]) -> Vec<u8> {
    let [a, b, stored, rest @ ..] = rest else { return Vec::new() };
    let (columns, digests) = rest.split_at(usize::from(u16::from_le_bytes([*a, *b])).min(rest.len()));
    let data: Vec<u8> = digests.iter().cycle().take(usize::from(*stored)).copied().collect();
    let metadata = [("format", "xorz"), ("format_version", "2")].map(|(k, v)| (k.into(), v.into())).into();
    forge::packed_table(&metadata, data, tables::sealed(columns.len() as u32, columns, digests))
}

/// Tensors of one package that are read. More of them would show nothing but that work adds up.
const MOST_TENSORS: usize = 64;

fn walk(package: &Package, base: &Matrix<'_>, len: usize) {
    let mut out = vec![0; base.bytes().len()];
    let given = len + 2 * out.len();
    for e in package.entries().iter().take(MOST_TENSORS) {
        let len = usize::try_from(e.bytes).unwrap_or(0).min(out.len());
        let _ = bounded(given, || package.restore(&e.name, Some(base), &mut out[..len]));
        for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
            if let Ok(bytes) = bounded(given, || package.resident(&e.name, base, prefer)) {
                let delta = Resident::parse(&bytes).expect("what is handed out parses");
                let _ = bounded(given + bytes.len(), || restore(&delta, base, &mut out));
            }
        }
    }
}
