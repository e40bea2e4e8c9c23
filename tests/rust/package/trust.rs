//! Promise: with `--trust sha256` nothing is made of a base whose words are not those that were packed against, whatever its
//! digests, the cache of digests and the package's other fields say; and a package that cannot tell is refused.

use crate::common::alone::alone;
use crate::common::data::{Rng, stepped};
use crate::common::disk::{Tensor, done, model, refused, safetensors, xorz};
use crate::common::forge::{Forge, packed_table};
use crate::common::seal::reseal_for;
use crate::common::tables::{SUMS, Table, put_table, take_table};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;
use xorz::codec::Prefer;
use xorz::error::{Kind, Result};
use xorz::matrix::{Digest, Dtype, Matrix, Shape};
use xorz::package::{
    Base, Codec, Destination, DigestCache, Identity, PackOptions, Package, Run, SafeTensors,
    Tensor as InMemory, Trust, Writer, pack_files, unpack_files, verify_files,
};

const SHAPE: Shape = Shape { n: 70, k: 30 };
const DELTAS: [Codec; 5] =
    [Codec::Xor, Codec::Resident, Codec::ResidentZstd, Codec::Planes, Codec::Predicted];

fn tensor(name: &str, bytes: &[u8]) -> Tensor {
    (name.into(), "BF16", vec![SHAPE.n, SHAPE.k], bytes.to_vec())
}

fn digest(words: &[u8]) -> Digest {
    Matrix::new(Dtype::BF16, SHAPE, words).unwrap().digest()
}

fn sha256(words: &[u8]) -> String {
    Sha256::digest(words).iter().map(|b| format!("{b:02x}")).collect()
}

/// A base, one that somebody made in its place, and a fine-tune of the first.
fn words() -> [Vec<u8>; 3] {
    let mut rng = Rng::new(9);
    let base = rng.weights(Dtype::BF16, SHAPE.n * SHAPE.k);
    let mut made = base.clone();
    made[100] ^= 1;
    let tuned = stepped(&mut rng, Dtype::BF16, &base, 2e-5);
    [base, made, tuned]
}

fn pack(dir: &Path, codec: Codec, trust: Trust) {
    let options = PackOptions { codec: Some(codec), trust, ..PackOptions::default() };
    let (base, tuned, to) = (dir.join("base"), dir.join("tuned"), dir.join("p.xorz"));
    pack_files(&base, &tuned, Destination::Path(&to), &options, &Run::default()).unwrap();
}

fn table(path: &Path) -> Table {
    let file = SafeTensors::open(path).unwrap();
    take_table(&file.read(file.find("xorz:table").unwrap()).unwrap())
}

/// The package in `dir`, whose digests are made those of another base, as though both bases had one digest: what an attacker
/// works for. The sha256 stays that of the base it was packed against.
fn collide(dir: &Path, made: &[u8]) {
    let path = dir.join("p.xorz");
    let mut forge = Forge::of(&fs::read(&path).unwrap());
    let record = forge.metadata.get_mut("xorz:tensor:w").unwrap();
    let mut fields: serde_json::Value = serde_json::from_str(record).unwrap();
    fields["base"] = digest(made).to_string().into();
    *record = fields.to_string();
    for (name, blob) in &mut forge.entries {
        if name == "w" && blob.starts_with(b"XORZDLT") {
            reseal_for(blob, digest(made).0);
        }
    }
    fs::write(path, forge.build()).unwrap();
}

/// Every way from a package and a base to words or a delta: what it gives.
fn doors(dir: &Path, base: &Path, words: &[u8], trust: Trust) -> Vec<(&'static str, Result<()>)> {
    let run = Run { trust, sha256: false, ..Run::default() };
    let path = dir.join("p.xorz");
    let open = || -> Result<Package> {
        let mut package = Package::open(&path)?;
        package.trust_in(trust)?;
        Ok(package)
    };
    let matrix = Matrix::new(Dtype::BF16, SHAPE, words).unwrap();
    let on_disk = || Base::open(base, &run);
    let out = &mut vec![0; words.len()];
    let _ = fs::remove_file(dir.join("out"));
    vec![
        ("unpack", unpack_files(base, &path, Destination::Path(&dir.join("out")), &run).map(drop)),
        ("unpack to a stream", {
            let mut sink = Vec::new();
            let done = unpack_files(base, &path, Destination::Stream(&mut sink), &run).map(drop);
            assert!(done.is_ok() || sink.is_empty(), "a stream took what was refused");
            done
        }),
        ("verify", verify_files(base, &path, None, &run).map(drop)),
        ("restore", open().and_then(|p| p.restore("w", Some(&matrix), out))),
        ("restore from a file", open().and_then(|p| on_disk()?.restore(&p, "w", out))),
        ("change in place", open().and_then(|p| p.exchanges("w", &matrix, &mut |_, _, _| Ok(())))),
        ("load", open().and_then(|p| p.resident("w", &matrix, None)).map(drop)),
        ("load anew", open().and_then(|p| p.resident("w", &matrix, Some(Prefer::Speed))).map(drop)),
        ("load from a file", open().and_then(|p| on_disk()?.resident(&p, "w", None)).map(drop)),
        (
            "load anew from a file",
            open().and_then(|p| on_disk()?.resident(&p, "w", Some(Prefer::Speed))).map(drop),
        ),
    ]
}

#[test]
fn a_base_of_the_same_digests_and_other_words_is_refused_by_every_door() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let [base, made, tuned] = words();
    for (name, bytes) in [("base", &base), ("made", &made), ("tuned", &tuned)] {
        fs::write(d.join(name), safetensors(&[tensor("w", bytes)])).unwrap();
    }
    for codec in DELTAS {
        pack(d, codec, Trust::Sha256);
        let entry = Package::open(&d.join("p.xorz")).unwrap().entry("w").unwrap().clone();
        assert_eq!(entry.codec, codec);
        assert_eq!(entry.base.unwrap().sha256.unwrap().to_string(), sha256(&base), "by another sha256");
        for (door, done) in doors(d, &d.join("base"), &base, Trust::Sha256) {
            done.unwrap_or_else(|e| panic!("{codec:?}, {door}: {e}"));
        }
        if codec != Codec::ResidentZstd {
            collide(d, &made);
            // So far the digests alone go: they let the made base pass, which shows that it is the sha256 that does not.
            for (door, done) in doors(d, &d.join("made"), &made, Trust::Digest) {
                done.unwrap_or_else(|e| panic!("{codec:?}, {door}: {e}"));
            }
            for (door, done) in doors(d, &d.join("made"), &made, Trust::Sha256) {
                let e = done.expect_err(door);
                let named =
                    [sha256(&base), sha256(&made), "`w`".into()].iter().all(|w| e.message().contains(w));
                assert!(e.kind() == Kind::Mismatch && named, "{codec:?}, {door}: {e}");
            }
            assert!(!d.join("out").exists(), "something was written");
        }
    }
}

#[test]
fn a_package_that_has_no_sha256_of_its_base_is_refused_and_one_that_needs_none_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let [base, _, tuned] = words();
    fs::write(d.join("base"), safetensors(&[tensor("w", &base)])).unwrap();
    fs::write(d.join("tuned"), safetensors(&[tensor("w", &tuned)])).unwrap();
    pack(d, Codec::Planes, Trust::Digest);
    assert_eq!(table(&d.join("p.xorz")).flags, 0);
    for (door, done) in doors(d, &d.join("base"), &base, Trust::Sha256) {
        let e = done.expect_err(door);
        assert!(e.kind() == Kind::Mismatch && e.message().contains("--trust sha256"), "{door}: {e}");
    }
    // A package that had them is another one without them.
    pack(d, Codec::Planes, Trust::Sha256);
    let path = d.join("p.xorz");
    let mut stripped = table(&path);
    assert_eq!(stripped.flags, SUMS);
    stripped.flags = 0;
    stripped.rows.iter_mut().for_each(|row| row.sha256.clear());
    let forge = Forge::of(&fs::read(&path).unwrap());
    let data = forge.entries.iter().flat_map(|(_, blob)| blob.clone()).collect();
    fs::write(&path, packed_table(&forge.metadata, data, put_table(&stripped))).unwrap();
    for (door, done) in doors(d, &d.join("base"), &base, Trust::Digest) {
        done.unwrap_or_else(|e| panic!("{door}: {e}"));
    }
    assert!(doors(d, &d.join("base"), &base, Trust::Sha256).into_iter().all(|(_, done)| done.is_err()));
    // A fine-tune that shares nothing with its base has nothing to trust.
    fs::write(d.join("tuned"), safetensors(&[tensor("other", &[9; 4200])])).unwrap();
    pack(d, Codec::Planes, Trust::Digest);
    verify_files(&d.join("base"), &d.join("p.xorz"), None, &Run { trust: Trust::Sha256, ..Run::default() })
        .unwrap();
}

#[test]
fn small_and_unchanged_tensors_and_many_packages_at_once_keep_whole_sha256() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut rng = Rng::new(11);
    let [base, _, tuned] = words();
    let flat = |name: &str, bytes: &[u8]| -> Tensor { (name.into(), "BF16", vec![200], bytes.to_vec()) };
    let small: Vec<Vec<u8>> = (0..6).map(|_| rng.weights(Dtype::BF16, 200)).collect();
    let mut olds = vec![tensor("w", &base), tensor("norm", &base)];
    let mut news = vec![tensor("w", &tuned), tensor("norm", &base)];
    for (i, old) in small.iter().enumerate() {
        let new = if i == 5 { old.clone() } else { stepped(&mut rng, Dtype::BF16, old, 2e-5) };
        olds.push(flat(&format!("bias.{i}"), old));
        news.push(flat(&format!("bias.{i}"), &new));
    }
    fs::write(d.join("base"), safetensors(&olds)).unwrap();
    fs::write(d.join("alice"), safetensors(&news)).unwrap();
    fs::write(d.join("bob"), safetensors(&[&news[1..], &news[..1]].concat())).unwrap();
    done(d, &["pack", "base", "alice", "-o", "one.xorz", "--trust", "sha256"]);
    fs::create_dir(d.join("all")).unwrap();
    done(d, &["pack", "base", "alice", "bob", "-o", "all", "--trust", "sha256"]);
    assert_eq!(fs::read(d.join("one.xorz")).unwrap(), fs::read(d.join("all/alice.xorz")).unwrap());
    for path in ["one.xorz", "all/alice.xorz", "all/bob.xorz"] {
        let package = Package::open(&d.join(path)).unwrap();
        let codec = |name: &str| package.entry(name).unwrap().codec;
        let codecs = [codec("bias.0"), codec("norm"), codec("bias.5")];
        assert_eq!(codecs, [Codec::Joint, Codec::Unchanged, Codec::Unchanged], "{path}");
        for (name, _, _, words) in &olds {
            let sum = package.entry(name).unwrap().base.as_ref().unwrap().sha256.unwrap();
            assert_eq!(sum.to_string(), sha256(words), "{path}: {name}");
        }
        done(d, &["verify", "base", path, "--trust", "sha256"]);
    }
    // Other words of the same digests: the digest of what stands in the package is made that of these.
    for name in ["bias.0", "norm", "bias.5"] {
        let mut made = olds.clone();
        let words = &mut made.iter_mut().find(|t| t.0 == name).unwrap().3;
        words[20] ^= 1;
        let words = words.clone();
        let shape = if name == "norm" { SHAPE } else { Shape { n: 1, k: 200 } };
        let m = Matrix::new(Dtype::BF16, shape, &words).unwrap();
        fs::write(d.join("made"), safetensors(&made)).unwrap();
        let mut forge = Forge::of(&fs::read(d.join("one.xorz")).unwrap());
        let record = forge.metadata.get_mut(&format!("xorz:tensor:{name}")).unwrap();
        let mut fields: serde_json::Value = serde_json::from_str(record).unwrap();
        fields["base"] = m.digest().to_string().into();
        *record = fields.to_string();
        fs::write(d.join("p.xorz"), forge.build()).unwrap();
        done(d, &["verify", "made", "p.xorz", "--no-sha256"]);
        let named = [&format!("`{name}`"), "sha256", &*sha256(m.bytes())];
        refused(d, &["verify", "made", "p.xorz", "--no-sha256", "--trust", "sha256"], 1, &named);
        let mut package = Package::open(&d.join("p.xorz")).unwrap();
        package.restore(name, Some(&m), &mut vec![0; m.bytes().len()]).unwrap();
        package.resident(name, &m, None).unwrap();
        package.trust_in(Trust::Sha256).unwrap();
        let e = package.restore(name, Some(&m), &mut vec![0; m.bytes().len()]).unwrap_err();
        assert!(e.message().contains(&sha256(m.bytes())), "{name}: {e}");
        let e = package.resident(name, &m, None).unwrap_err();
        assert!(e.message().contains(&sha256(m.bytes())), "{name}: {e}");
    }
}

#[test]
fn shards_parts_ties_and_tensors_in_memory_are_trusted_by_the_words_that_they_are_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let [base, made, tuned] = words();
    let (wide, wider) =
        ([base.clone(), base.clone()].concat(), [tuned.clone(), tuned.clone(), tuned.clone()].concat());
    let rows = |name: &str, n: usize, bytes: &[u8]| -> Tensor {
        (name.into(), "BF16", vec![n * SHAPE.n, SHAPE.k], bytes.to_vec())
    };
    let olds = vec![tensor("a", &base), rows("rows", 2, &wide)];
    let news = vec![tensor("a", &tuned), tensor("tied", &tuned), rows("rows", 3, &wider)];
    model(&d.join("base"), &olds, 2);
    model(&d.join("tuned"), &news, 1);
    done(d, &["pack", "base", "tuned", "-o", "p.xorz", "--trust", "sha256"]);
    let package = Package::open(&d.join("p.xorz")).unwrap();
    let has =
        |name: &str| package.entry(name).unwrap().base.as_ref().map(|b| (b.parts.len(), b.sha256.is_some()));
    assert_eq!(has("a"), Some((0, true)));
    assert!(matches!(has("rows"), Some((1.., true))), "{:?}", has("rows"));
    let ways: [&[&str]; 2] = [&["verify", "base", "p.xorz"], &["unpack", "base", "p.xorz", "-o", "out"]];
    for args in ways {
        done(d, &[args, &["--trust", "sha256"]].concat());
        fs::remove_dir_all(d.join("out")).unwrap_or_default();
    }
    // The same words in other files are the same base.
    fs::create_dir(d.join("one")).unwrap();
    fs::write(d.join("one/model.safetensors"), safetensors(&olds)).unwrap();
    done(d, &["verify", "one", "p.xorz", "--trust", "sha256"]);
    // One word of a part is another.
    let mut wide = wide;
    wide[8000] ^= 4;
    fs::write(d.join("one/model.safetensors"), safetensors(&[tensor("a", &base), rows("rows", 2, &wide)]))
        .unwrap();
    refused(d, &["verify", "one", "p.xorz", "--trust", "sha256"], 1, &["`rows`", "sha256"]);
    assert_eq!(xorz(d, &["verify", "one", "p.xorz", "--trust", "md5"]).status.code(), Some(2));

    let path = d.join("memory.xorz");
    let options = PackOptions { trust: Trust::Sha256, ..PackOptions::default() };
    let mut w = Writer::create(&path, options).unwrap();
    let dims = [SHAPE.n, SHAPE.k];
    let t = |bytes| InMemory { name: "w", dtype: "BF16", dims: &dims, bytes };
    w.add(&t(&tuned), Some(&t(&base))).unwrap();
    w.finish().unwrap();
    let mut package = Package::open(&path).unwrap();
    package.trust_in(Trust::Sha256).unwrap();
    let mut out = vec![0; tuned.len()];
    let on = |words| Matrix::new(Dtype::BF16, SHAPE, words).unwrap();
    package.restore("w", Some(&on(&base)), &mut out).unwrap();
    assert_eq!(out, tuned);
    assert_eq!(package.restore("w", Some(&on(&made)), &mut out).unwrap_err().kind(), Kind::Mismatch);
}

#[test]
fn a_planted_digest_is_believed_for_a_stored_delta_but_not_with_trust() {
    alone(|| {
        let dir = tempfile::tempdir().unwrap();
        let (d, cache) = (dir.path(), dir.path().join("cache"));
        // SAFETY: this process runs nothing else.
        unsafe { std::env::set_var("XORZ_CACHE_DIR", &cache) };
        let [base, made, tuned] = words();
        fs::write(d.join("base"), safetensors(&[tensor("w", &base)])).unwrap();
        fs::write(d.join("tuned"), safetensors(&[tensor("w", &tuned)])).unwrap();
        pack(d, Codec::Resident, Trust::Sha256);
        // Its digests are known now, and kept; then its words change, and the entry with them: what who may write to the
        // user's own cache can do.
        fs::write(d.join("base"), safetensors(&[tensor("w", &made)])).unwrap();
        std::thread::sleep(Duration::from_millis(2100));
        let file = File::open(d.join("base")).unwrap();
        let Some(before) = Identity::watched(&file) else {
            return println!("skipped: the file system of {} is none whose times tell", d.display());
        };
        let digests = [("w".to_owned(), digest(&base))].into();
        DigestCache::at(&cache).store(&d.join("base"), &file, &before, &digests);
        assert_eq!(DigestCache::at(&cache).load(&d.join("base"), &file), Some(digests));
        let load = |trust| -> Result<Vec<u8>> {
            let mut package = Package::open(&d.join("p.xorz"))?;
            package.trust_in(trust)?;
            Base::open(&d.join("base"), &Run::default())?.resident(&package, "w", None)
        };
        load(Trust::Digest).expect("the entry was not planted: this test shows nothing");
        let e = load(Trust::Sha256).unwrap_err();
        assert!(e.kind() == Kind::Mismatch && e.message().contains(&sha256(&made)), "{e}");
        // Whatever words are made of the base, it is read, and the entry has no say.
        let run = Run { sha256: false, ..Run::default() };
        let e = verify_files(&d.join("base"), &d.join("p.xorz"), None, &run).unwrap_err();
        assert_eq!(e.kind(), Kind::Mismatch, "{e}");
    });
}
