//! Promise: deltas of layout 1 written once are read forever, bit for bit: every encoding on words of every
//! size, gaps of both sizes, entries of every kind. `tests/golden/layout1.safetensors` is never regenerated.
//! (Layout 0 lies in the packages of version 1: `package/golden.rs`, `package/checkpoint_golden.rs`.)

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped, value};
use std::collections::BTreeSet;
use std::path::PathBuf;
use xorz::codec::{Encoding, GapKind, Tile};
use xorz::matrix::{Dtype, Shape};
use xorz::package::SafeTensors;
use xorz::resident::{Pair, Resident, encode_as, restore};
use xorz::vector::patch;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/layout1.safetensors")
}

/// What a delta of `exponent` stores apart: words of one entry, words of two, NaN among them, exceptions.
fn kinds(delta: &Resident<'_>, seen: &mut BTreeSet<String>) {
    let dtype = delta.header().dtype;
    for index in 0..delta.grid().tiles() {
        let Tile::Exponent(tile) = delta.tile(index).unwrap() else { return };
        let entries: Vec<_> = (0..tile.entries.len()).map(|i| tile.entries.get(i)).collect();
        for same in entries.chunk_by(|a, b| a.0 == b.0) {
            seen.insert(format!("{dtype} {} entries", same.len()));
            let word = &same[0].1.to_le_bytes()[..dtype.word_bytes()];
            if value(dtype, word).is_nan() {
                seen.insert(format!("{dtype} NaN"));
            }
        }
        if !tile.exceptions.is_empty() {
            seen.insert(format!("{dtype} exceptions"));
        }
    }
}

#[test]
fn golden_deltas_give_their_words_back() {
    let file = SafeTensors::open(&golden()).unwrap();
    let tensor =
        |name: &str| file.find(name).map(|t| (t.dtype.clone(), t.dims.clone(), file.read(t).unwrap()));
    let (mut encodings, mut gaps, mut seen) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let deltas = file.header().tensors.iter().filter(|t| t.name.contains(".delta."));
    for info in deltas {
        let pair = info.name.split(".delta.").next().unwrap();
        let (dtype, dims, base) = tensor(&format!("{pair}.base")).unwrap();
        let fine_tuned = tensor(&format!("{pair}.ft")).unwrap().2;
        let (dtype, shape) = (Dtype::from_name(&dtype).unwrap(), Shape::of_dims(&dims).unwrap());
        let (blob, b) = (file.read(info).unwrap(), matrix(dtype, shape, &base));
        let delta = Resident::parse(&blob).unwrap();
        let h = delta.header();
        assert_eq!((h.version, h.dtype, h.shape), (1, dtype, shape), "{}", info.name);
        delta.check_full(&b).unwrap();
        // An unchanged matrix has one delta, whatever pair it is of.
        let want = if h.encoding == Encoding::Unchanged { &base } else { &fine_tuned };
        let mut out = vec![0xA5; base.len()];
        restore(&delta, &b, &mut out).unwrap();
        assert!(out == *want, "{}", info.name);
        let mut words = base.clone();
        patch(&delta, &mut words).unwrap();
        assert!(words == *want, "{}, fast", info.name);
        encodings.insert((dtype.word_bytes(), h.encoding.name()));
        if h.encoding == Encoding::Sparse {
            gaps.insert(h.gap.bytes());
        }
        kinds(&delta, &mut seen);
    }
    for bytes in [1, 2, 4, 8] {
        let of = |e: Encoding| encodings.contains(&(bytes, e.name()));
        assert!(Encoding::ALL.into_iter().all(of), "{bytes}-byte words: {encodings:?}");
    }
    assert_eq!(gaps.into_iter().collect::<Vec<_>>(), [GapKind::U8.bytes(), GapKind::U16.bytes()]);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for kind in ["1 entries", "2 entries", "NaN", "exceptions"] {
            assert!(seen.contains(&format!("{dtype} {kind}")), "{dtype} {kind}: {seen:?}");
        }
    }
}

/// Writes the file if it is missing: `cargo test --test codec golden:: -- --ignored`.
#[test]
#[ignore = "writes the golden file if it is missing"]
fn write_missing_golden_file() {
    let mut rng = Rng::new(2027);
    let mut tensors: Vec<(String, String, Vec<usize>, Vec<u8>)> = vec![];
    let mut pair = |name: &str, dtype: Dtype, dims: [usize; 2], base: Vec<u8>, fine_tuned: Vec<u8>| {
        let shape = Shape { n: dims[0], k: dims[1] };
        let of = |encoding: Encoding| {
            let fine_tuned = if encoding == Encoding::Unchanged { &base } else { &fine_tuned };
            let pair = Pair::new(matrix(dtype, shape, &base), matrix(dtype, shape, fine_tuned)).unwrap();
            encode_as(&mut { pair }, encoding).unwrap()
        };
        for encoding in Encoding::ALL {
            let blob = of(encoding);
            tensors.push((format!("{name}.delta.{encoding}"), "U8".into(), vec![blob.len()], blob));
        }
        tensors.push((format!("{name}.base"), dtype.to_string(), dims.to_vec(), base));
        tensors.push((format!("{name}.ft"), dtype.to_string(), dims.to_vec(), fine_tuned));
    };
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let dims = [21, 90];
        let base = rng.weights(dtype, dims[0] * dims[1]);
        let near = stepped(&mut rng, dtype, &base, 1e-4);
        let odd = adversarial(&mut rng, dtype, dims[0] * dims[1]);
        let fine_tuned = rng.mix(dtype, &near, &odd, 0.03);
        pair(&dtype.to_string(), dtype, dims, base, fine_tuned);
    }
    for dtype in [Dtype::U8, Dtype::F8E4M3, Dtype::I16, Dtype::U32, Dtype::F64, Dtype::I64] {
        let dims = [17, 33];
        let base = rng.weights(dtype, dims[0] * dims[1]);
        let fine_tuned = perturbed(&mut rng, dtype, &base, 0.1);
        pair(&dtype.to_string(), dtype, dims, base, fine_tuned);
    }
    // So few changes in so long rows that gaps of two bytes are the smaller ones; more than one tile.
    let base = rng.weights(Dtype::BF16, 18 * 700);
    let mut fine_tuned = base.clone();
    (0..18).for_each(|r| fine_tuned[2 * (700 * r + 31 * r + 5)] ^= 3);
    pair("long", Dtype::BF16, [18, 700], base, fine_tuned);

    let (mut infos, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, dims, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        let info = serde_json::json!({"dtype": dtype, "shape": dims, "data_offsets": [start, data.len()]});
        infos.insert(name, info);
    }
    let header = serde_json::Value::Object(infos).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    if !golden().exists() {
        std::fs::write(golden(), file).unwrap();
    }
}
