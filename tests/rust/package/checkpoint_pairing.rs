//! Promise: whatever names, shards and dtypes a fine-tune has, and whether experts were stacked or split: what is in the base costs
//! little, and the same comes back.

use crate::common::data::Rng;
use crate::common::disk::{Tensor, safetensors};
use crate::common::forge::Forge;
use crate::common::packed::{Packed, t, tuned};
use std::collections::BTreeMap;
use std::fs;
use xorz::codec::Prefer;
use xorz::error::Kind;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Base, Codec, Destination, PackOptions, Package, Run, pack_files, verify_files};
use xorz::resident::{Resident, restore};

#[test]
fn components_with_the_same_names_are_paired_by_their_paths() {
    let mut rng = Rng::new(71);
    let (mut base, mut ft) = (BTreeMap::new(), BTreeMap::new());
    for part in ["transformer", "transformer_2", "vae"] {
        let (old, new) = tuned(&mut rng, 128 * 256);
        base.insert(format!("{part}/x.safetensors"), vec![t("w", "BF16", &[128, 256], &old)]);
        // One component was saved in shards of other names.
        let shard = if part == "vae" { "diffusion-00001-of-00001" } else { "x" };
        ft.insert(format!("{part}/{shard}.safetensors"), vec![t("w", "BF16", &[128, 256], &new)]);
    }
    // The base in half precision, beside the one that is meant.
    base.insert("vae/a.fp16.safetensors".into(), vec![t("w", "F16", &[128, 256], &rng.bytes(128 * 512))]);
    let files = |m: BTreeMap<String, Vec<Tensor>>| -> Vec<(String, Vec<Tensor>)> { m.into_iter().collect() };
    let (base, ft) = (files(base), files(ft));
    let view = |files: &[(String, Vec<Tensor>)]| -> Vec<(&str, Vec<Tensor>)> {
        // Borrowed for as long as the test runs.
        files.iter().map(|(p, t)| (&*Box::leak(p.clone().into_boxed_str()), t.clone())).collect()
    };
    let packed = Packed::of(&view(&base), &view(&ft));
    packed.takes(0.15);
    assert_eq!((packed.report.alone, packed.report.removed), (0, 0));
    // And against the same base in other shards: folders tell, where paths do not.
    let d = packed.dir.path();
    fs::rename(d.join("base/transformer_2/x.safetensors"), d.join("base/transformer_2/y.safetensors"))
        .unwrap();
    verify_files(&d.join("base"), &d.join("p"), None, &Run::default()).unwrap();
    // A fine-tune whose components are exchanged is another one.
    fs::rename(d.join("ft/transformer"), d.join("ft/transformer_3")).unwrap();
    fs::rename(d.join("ft/transformer_2"), d.join("ft/transformer")).unwrap();
    fs::rename(d.join("ft/transformer_3"), d.join("ft/transformer_2")).unwrap();
    verify_files(&d.join("base"), &d.join("p"), Some(&d.join("ft")), &Run::default()).unwrap_err();
}

#[test]
fn renamed_layers_are_found_however_many_there_are() {
    let mut rng = Rng::new(72);
    for infix in ["._checkpoint_wrapped_module", ".inner.part", ""] {
        let (mut base, mut ft) = (Vec::new(), Vec::new());
        for layer in 0..80 {
            let (old, new) = tuned(&mut rng, 32 * 128);
            base.push(t(&format!("blocks.{layer}.q"), "BF16", &[32, 128], &old));
            ft.push(t(&format!("net.blocks.{layer}{infix}.q"), "BF16", &[32, 128], &new));
            // Too small to be searched for.
            let (old, new) = tuned(&mut rng, 64);
            base.push(t(&format!("blocks.{layer}.norm.gamma"), "BF16", &[64], &old));
            ft.push(t(&format!("net.blocks.{layer}{infix}.norm.weight"), "BF16", &[64], &new));
        }
        let packed = Packed::one(&base, &ft);
        assert_eq!((packed.report.alone, packed.report.removed), (0, 0), "{infix}: {:?}", packed.report);
        for layer in [0, 63, 64, 79] {
            let found = packed.entry(&format!("net.blocks.{layer}{infix}.q")).base.unwrap().name;
            assert_eq!(found, format!("blocks.{layer}.q"), "{infix}");
        }
    }
    // Names that say nothing at all, and names that say something else: layers were left out.
    let layers: Vec<_> = (0..100).map(|_| tuned(&mut rng, 32 * 128)).collect();
    let base: Vec<_> =
        layers.iter().enumerate().map(|(i, l)| t(&format!("l.{i}.w"), "BF16", &[32, 128], &l.0)).collect();
    let anonymous: Vec<_> =
        layers.iter().rev().enumerate().map(|(i, l)| t(&format!("p{i}"), "BF16", &[32, 128], &l.1)).collect();
    Packed::one(&base, &anonymous).takes(0.15);
    let pruned: Vec<_> = layers
        .iter()
        .step_by(2)
        .enumerate()
        .map(|(i, l)| t(&format!("l.{i}.w"), "BF16", &[32, 128], &l.1))
        .collect();
    Packed::one(&base, &pruned).takes(0.15);
}

#[test]
fn tensors_of_any_dtype_are_deltas_by_the_size_of_their_words() {
    let mut rng = Rng::new(73);
    let kinds: [(&str, usize); 14] = [
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
        ("F8_E8M0", 8),
        ("F8_E4M3FNUZ", 8),
        ("F8_E5M2FNUZ", 8),
        ("C64", 64),
        ("C128", 128),
        ("I4", 4),
        ("U1", 1),
        ("F12_NEW", 12),
        ("F16_NEW", 16),
        ("F32_NEW", 32),
        ("I128", 128),
    ];
    let (mut base, mut ft) = (Vec::new(), Vec::new());
    for (dtype, bits) in kinds {
        for dims in [&[48, 640][..], &[30720], &[16, 8, 240], &[8], &[0, 8]] {
            let old = rng.bytes(dims.iter().product::<usize>() * bits / 8);
            let mut new = old.clone();
            let len = new.len();
            for _ in 0..len.div_ceil(700) {
                new[rng.next() as usize % len] ^= 1;
            }
            let name = format!("{dtype}{dims:?}");
            base.push(t(&name, dtype, dims, &old));
            ft.push(t(&name, dtype, dims, &new));
        }
    }
    let packed = Packed::one(&base, &ft);
    assert_eq!(packed.report.alone, 0);
    packed.takes(0.02);
    // Of another number of bytes they are no deltas, though names and dimensions agree.
    let odd = [t("a", "NEW", &[64, 64], &rng.bytes(8192))];
    let packed = Packed::one(&odd, &[t("a", "NEW", &[64, 64], &rng.bytes(16384))]);
    assert_eq!(packed.report.alone, 1);
}

#[test]
fn a_delta_of_parts_is_given_out_for_its_own_base_only() {
    let mut rng = Rng::new(75);
    let (n, k) = (100, 64);
    let (old, new) = tuned(&mut rng, n * k);
    let grown = [&new[..], &rng.weights(Dtype::BF16, 4 * k)].concat();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let write = |name: &str, rows: usize, bytes: &[u8]| {
        fs::write(path(name), safetensors(&[t("w", "BF16", &[rows, k], bytes)])).unwrap();
    };
    write("base", n, &old);
    write("ft", n + 4, &grown);
    let mut other = old.clone();
    other[2 * (n * k - 1)] ^= 1;
    write("other", n, &other);
    for codec in Codec::ALL.into_iter().filter(|c| c.name().parse::<Codec>().is_ok()) {
        let options = PackOptions { codec: Some(codec), ..PackOptions::default() };
        let out = path("p");
        pack_files(&path("base"), &path("ft"), Destination::Path(&out), &options, &Run::default()).unwrap();
        let package = Package::open(&out).unwrap();
        assert!(!package.entry("w").unwrap().base.as_ref().unwrap().parts.is_empty());
        let open = |name: &str| Base::open(&path(name), &Run::default()).unwrap();
        for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
            let delta = open("base").resident(&package, "w", prefer).unwrap();
            // Against what was put together, written down here by hand: the rows in common, and words of 0.
            let joined = [&old[..], &vec![0; 2 * 4 * k]].concat();
            let joined = Matrix::new(Dtype::BF16, Shape { n: n + 4, k }, &joined).unwrap();
            let mut out = vec![0; grown.len()];
            restore(&Resident::parse(&delta).unwrap(), &joined, &mut out).unwrap();
            assert!(out == grown, "{codec:?} {prefer:?}");
            let e = open("other").resident(&package, "w", prefer).unwrap_err();
            assert!(e.kind() == Kind::Mismatch && e.message().contains("`w`"), "{codec:?} {prefer:?}: {e}");
        }
    }
}

#[test]
fn parts_that_lie_are_refused() {
    let mut rng = Rng::new(76);
    let (old, new) = tuned(&mut rng, 100 * 64);
    let grown = [&new[..], &rng.weights(Dtype::BF16, 4 * 64)].concat();
    let base = [t("w", "BF16", &[100, 64], &old)];
    let packed = Packed::one(&base, &[t("w", "BF16", &[104, 64], &grown)]);
    let d = packed.dir.path();
    let forge = Forge::of(&fs::read(d.join("p")).unwrap());
    let of = |parts: serde_json::Value, version: &str| {
        let mut forge = forge.clone();
        let mut record: serde_json::Value = serde_json::from_str(&forge.metadata["xorz:tensor:w"]).unwrap();
        assert!(record["base_parts"].is_array() && record.get("base_name").is_none());
        record["base_parts"] = parts;
        forge.metadata.insert("xorz:tensor:w".into(), record.to_string());
        forge.metadata.insert("format_version".into(), version.into());
        // What no table can say is said in version 1.
        let bytes = forge.try_build().unwrap_or_else(|| {
            forge.metadata.insert("format_version".into(), "1".into());
            forge.build()
        });
        fs::write(d.join("q"), bytes).unwrap();
        verify_files(&d.join("base"), &d.join("q"), None, &Run::default()).unwrap_err()
    };
    let part = |name: &str, at: u64, bytes: u64| serde_json::json!({"name": name, "at": at, "bytes": bytes});
    let zeros = |bytes: u64| serde_json::json!({ "bytes": bytes });
    let whole = 104 * 128;
    for (what, kind, parts) in [
        ("too few", Kind::Corrupt, vec![part("w", 0, 12800)]),
        ("too many", Kind::Corrupt, vec![part("w", 0, 12800), zeros(513)]),
        ("overflow", Kind::Corrupt, vec![part("w", u64::MAX, whole)]),
        ("sum overflows", Kind::Corrupt, vec![zeros(u64::MAX), part("w", 0, whole + 1)]),
        ("nothing", Kind::Corrupt, vec![part("w", 0, 0), part("w", 0, 12800), zeros(512)]),
        ("zeros", Kind::Corrupt, vec![zeros(whole)]),
        ("nearly zeros", Kind::Corrupt, vec![part("w", 0, 64), zeros(whole - 64)]),
        (
            "zeros of a place",
            Kind::Corrupt,
            vec![part("w", 0, 12800), serde_json::json!({"at": 1, "bytes": 512})],
        ),
        ("unknown", Kind::Corrupt, vec![part("w", 0, 12800), serde_json::json!({"bytes": 512, "more": 1})]),
        ("not there", Kind::Mismatch, vec![part("v", 0, 12800), zeros(512)]),
        ("beyond", Kind::Mismatch, vec![part("w", 1, 12800), zeros(512)]),
        ("another place", Kind::Mismatch, vec![zeros(512), part("w", 0, 12800)]),
    ] {
        let e = of(parts.into(), "2");
        assert_eq!(e.kind(), kind, "{what}: {e}");
        assert!(e.to_string().contains('w'), "{what}: {e}");
    }
    let e = of(serde_json::json!([part("w", 0, 12800), zeros(512)]), "1");
    assert_eq!(e.kind(), Kind::Corrupt, "{e}");
}

#[test]
fn experts_that_are_stacked_split_or_fused_stay_deltas() {
    let mut rng = Rng::new(75);
    let (experts, n, k) = (20, 32, 96);
    let (mut apart, mut gate_up, mut down) = (Vec::new(), Vec::new(), Vec::new());
    let (mut tuned_apart, mut old_gate_up, mut old_down) = (Vec::new(), Vec::new(), Vec::new());
    for e in 0..experts {
        for (part, dims) in [("gate", [n, k]), ("up", [n, k]), ("down", [k, n])] {
            let (old, new) = tuned(&mut rng, n * k);
            let name = format!("layers.3.experts.{e}.{part}_proj.weight");
            apart.push(t(&name, "BF16", &dims, &old));
            tuned_apart.push(t(&name, "BF16", &dims, &new));
            let (stack, before) =
                if part == "down" { (&mut down, &mut old_down) } else { (&mut gate_up, &mut old_gate_up) };
            stack.extend(new);
            before.extend(old);
        }
    }
    let stacks = |gate_up: &[u8], down: &[u8]| {
        vec![
            t("layers.3.experts.gate_up_proj", "BF16", &[experts, 2 * n, k], gate_up),
            t("layers.3.experts.down_proj", "BF16", &[experts, k, n], down),
        ]
    };
    let stacked = Packed::one(&apart, &stacks(&gate_up, &down));
    assert_eq!((stacked.report.alone, stacked.report.removed), (0, 0));
    stacked.takes(0.25);
    let split = Packed::one(&stacks(&old_gate_up, &old_down), &tuned_apart);
    assert_eq!((split.report.alone, split.report.removed), (0, 0));
    // An expert more than the base has.
    gate_up.extend(rng.weights(Dtype::BF16, 2 * n * k));
    let more = [t("layers.3.experts.gate_up_proj", "BF16", &[experts + 1, 2 * n, k], &gate_up)];
    let packed = Packed::one(&apart, &more);
    assert_eq!(packed.report.alone, 0);
    packed.takes(0.3);
    // Query, key and value in one, of unlike sizes; and apart again.
    let qkv: Vec<_> = [("q", 128), ("k", 32), ("v", 32)].map(|(p, n)| (p, n, tuned(&mut rng, n * k))).into();
    let of = |new: bool| -> Vec<Tensor> {
        let one = |(p, n, (a, b)): &(&str, usize, (Vec<u8>, Vec<u8>))| {
            t(&format!("l.{p}_proj.weight"), "BF16", &[*n, k], if new { b } else { a })
        };
        qkv.iter().map(one).collect()
    };
    let fused = |new: bool| {
        let all: Vec<u8> = of(new).into_iter().flat_map(|t| t.3).collect();
        [t("l.qkv_proj.weight", "BF16", &[192, k], &all)]
    };
    assert_eq!(Packed::one(&of(false), &fused(true)).report.alone, 0);
    assert_eq!(Packed::one(&fused(false), &of(true)).report.alone, 0);
}
