//! Promise: whatever the table of a package says, it is checked before anything is done by it: an error that names the tensor
//! and both values, at once, in memory bounded by the table's own length.

use crate::common::counting::held_by;
use crate::common::data::{Rng, matrix, perturbed};
use crate::common::forge::packed_table;
use crate::common::tables::{Row, SUMS, Table, number, packed, put_table, sealed, take_table, texts};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};
use xorz::package::{Codec, PackOptions, Package, SafeTensors, Tensor, Trust, Writer};

/// A package with tensors of several codecs, those of one joint frame among them: its table and its data, and its base.
fn sound_on(trust: Trust) -> (Table, Vec<u8>, BTreeMap<String, Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut rng) = (dir.path().join("p"), Rng::new(31));
    let mut writer = Writer::create(&path, PackOptions { trust, ..PackOptions::default() }).unwrap();
    let mut bases = BTreeMap::new();
    let mut add = |name: &str, dims: &[usize], share: f64, based: bool| {
        let base = rng.weights(Dtype::F32, dims.iter().product());
        let ft = perturbed(&mut rng, Dtype::F32, &base, share);
        let t = |bytes| Tensor { name, dtype: "F32", dims, bytes };
        writer.add(&t(&ft), based.then(|| t(&base)).as_ref()).unwrap();
        bases.insert(name.to_owned(), base);
    };
    add("layers.0.weight", &[64, 64], 0.05, true);
    (0..5).for_each(|i| add(&format!("layers.{i}.bias"), &[100], 0.1, true));
    add("layers.0.norm", &[64], 0.0, true);
    add("new", &[30], 1.0, false);
    writer.removed("gone");
    writer.finish().unwrap();
    let file = SafeTensors::open(&path).unwrap();
    let read = |name: &str| file.read(file.find(name).unwrap()).unwrap();
    (take_table(&read("xorz:table")), read("xorz:data"), bases)
}

fn sound() -> (Table, Vec<u8>) {
    let (table, data, _) = sound_on(Trust::Digest);
    (table, data)
}

fn metadata() -> BTreeMap<String, String> {
    [("format", "xorz"), ("format_version", "2")].map(|(k, v)| (k.into(), v.into())).into()
}

fn package(table: Vec<u8>, data: &[u8]) -> Vec<u8> {
    packed_table(&metadata(), data.to_vec(), table)
}

/// What opening says: it must refuse, at once, in little memory.
fn refused(what: &str, bytes: Vec<u8>) -> xorz::error::Error {
    let (n, start) = (bytes.len(), Instant::now());
    let (opened, held) = held_by(|| Package::parse(bytes).map(drop));
    assert!(start.elapsed() < Duration::from_secs(5), "{what}: {:?}", start.elapsed());
    assert!(held.most < 64 * n + (1 << 20), "{what}: {} bytes held for {n}", held.most);
    let e = opened.expect_err(what);
    assert!(matches!(e.kind(), Kind::Corrupt | Kind::Truncated | Kind::Unsupported), "{what}: {e}");
    e
}

#[test]
fn the_table_is_what_the_specification_says() {
    let (table, data) = sound();
    let opened = Package::parse(package(put_table(&table), &data)).unwrap();
    let codecs: Vec<Codec> = opened.entries().iter().map(|e| e.codec).collect();
    assert_eq!(codecs[codecs.len() - 5..], [Codec::Joint; 5]);
    assert!(codecs.contains(&Codec::Unchanged) && codecs.contains(&Codec::Alone));
    assert_eq!(table.joints.len(), 1);
    let stored: u64 = opened.entries().iter().map(|e| e.stored_bytes).sum();
    assert_eq!(stored, data.len() as u64);
    // Written by another hand, and without zstd, it says the same.
    let plain = table.columns();
    let same = Package::parse(package(sealed(plain.len() as u32, &plain, &table.digests()), &data)).unwrap();
    let said = |p: &Package| format!("{:?} {:?}", p.entries(), p.removed());
    assert_eq!(said(&same), said(&opened));
}

#[test]
fn every_cut_and_every_longer_table_is_refused() {
    let (table, data) = sound();
    let (columns, digests) = (table.columns(), table.digests());
    for n in 0..columns.len() {
        refused("cut columns", package(packed(&columns[..n], &digests), &data));
    }
    for n in 0..digests.len() {
        refused("cut digests", package(packed(&columns, &digests[..n]), &data));
    }
    refused("longer columns", package(packed(&[&columns[..], &[0]].concat(), &digests), &data));
    refused("longer digests", package(packed(&columns, &[&digests[..], &[0; 16]].concat()), &data));
    let whole = put_table(&table);
    for n in 0..whole.len() {
        refused("a cut table", package(whole[..n].to_vec(), &data));
    }
    for i in 0..whole.len() {
        let mut bad = whole.clone();
        bad[i] ^= 0x20;
        assert!(refused("a flip", package(bad, &data)).message().contains("damaged"));
    }
    let e = refused("shorter data", package(whole.clone(), &data[1..]));
    assert!(e.message().contains(&(data.len() - 1).to_string()), "{e}");
    let e = refused("longer data", package(whole, &[&data[..], &[0]].concat()));
    assert!(e.message().contains(&format!("{} bytes", data.len())), "{e}");
}

/// What is done to a sound table, and words of the complaint.
type Case = (&'static str, fn(&mut Table), &'static [&'static str]);

const CASES: &[Case] = &[
    ("an unknown codec", |t| t.rows[0].codec = 9, &["`layers.0.weight`", "codec 9", "0 to 8"]),
    ("a codec of many bytes", |t| t.rows[1].codec = u64::MAX, &["codec 18446744073709551615"]),
    ("a name twice", |t| t.rows[4].name = t.rows[3].name.clone(), &["twice"]),
    ("a name of the format", |t| t.rows[0].name = "xorz:data".into(), &["`xorz:data`", "reserved"]),
    ("metadata's name", |t| t.rows[0].name = "__metadata__".into(), &["reserved"]),
    ("a name too long", |t| t.rows[0].name = "n".repeat(5000), &["5000", "4096"]),
    ("an unknown kind", |t| t.rows[0].kind = 77, &["`layers.0.weight`", "kind 77"]),
    ("a file that is not there", |t| t.rows[0].again = 3, &["`layers.0.weight`", "3 files", "room for 0"]),
    ("more than is stored", |t| t.rows[2].stored = 1 << 40, &["1099511627776", "the data end at"]),
    ("an end beyond 2^64", |t| t.rows[2].stored = u64::MAX, &["18446744073709551615", "the data end at"]),
    ("less than is stored", |t| t.rows[0].stored -= 1, &["are stored"]),
    ("too many changes", |t| t.rows[0].changed = 4097, &["`layers.0.weight`", "4097", "4096 words"]),
    ("no preference", |t| t.rows[0].prefer = 0, &["lacks the field `prefer`"]),
    ("a preference that is none", |t| t.rows[0].prefer = 3, &["prefer 3"]),
    ("an encoding that is none", |t| t.rows[0].encoding = 5, &["encoding 5"]),
    ("no base", |t| t.rows[0].base = 0, &["`layers.0.weight`", "base of kind 0"]),
    ("a base that is none", |t| t.rows[0].base = 9, &["base of kind 9"]),
    ("a base of what is none", |t| last(t, "new").base = 1, &["`new`", "base of kind 1"]),
    ("changes of what is none", |t| last(t, "new").changed = 1, &["`new`", "1 words"]),
    ("changes of what is its base", |t| last(t, "layers.0.norm").changed = 1, &["`unchanged` of Some(1)"]),
    ("flags", |t| t.flags = 4, &["flags 4"]),
    ("bytes that its dimensions do not take", |t| t.kinds[0].2 += 4, &["16388 bytes", "[64, 64]"]),
    ("dimensions without end", |t| t.kinds[0].1 = vec![1; 65], &["65 dimensions", "room for 64"]),
    ("a dimension beyond 2^63", |t| t.kinds[0].1[0] = u64::MAX, &["`layers.0.weight`"]),
    ("a frame of no tensors", |t| t.joints[0].0 = 0, &["0 tensors"]),
    ("a frame of more tensors", |t| t.joints[0].0 = 6, &["1 of 1 joint frames", "lacks 1"]),
    ("a frame of fewer tensors", |t| t.joints[0].0 = 4, &["the table ends"]),
    ("a frame too many", |t| t.joints.push((1, vec![0; 16])), &["1 of 2 joint frames"]),
    ("a frame that is interrupted", |t| t.rows.rotate_right(1), &["joint frame"]),
    (
        "the same as none",
        |t| *last(t, "new") = same(&last(t, "new").clone(), "nothing", 16),
        &["`new`", "no tensor `nothing`"],
    ),
    (
        "the same as itself",
        |t| *last(t, "new") = same(&last(t, "new").clone(), "new", 16),
        &["`new`", "no tensor of its own"],
    ),
    (
        "the same as one of another kind",
        |t| *last(t, "new") = same(&last(t, "new").clone(), "layers.0.weight", 16),
        &["`new`", "`layers.0.weight`", "another dtype or shape"],
    ),
    ("removed tensors that are not named", |t| t.removed.push("\u{0}".repeat(4097)), &["4097", "4096"]),
];

fn last<'t>(table: &'t mut Table, name: &str) -> &'t mut Row {
    table.rows.iter_mut().find(|r| r.name == name).unwrap()
}

fn same(row: &Row, other: &str, digest: usize) -> Row {
    let (name, kind) = (row.name.clone(), row.kind);
    let (same, digest) = (Some(other.to_owned()), vec![0; digest]);
    Row { name, kind, codec: 5, stored: row.stored, same, digest, ..Row::default() }
}

#[test]
fn tables_that_lie_are_refused_naming_the_tensor_and_both_values() {
    let (good, data) = sound();
    for (what, lie, words) in CASES {
        let mut table = good.clone();
        lie(&mut table);
        let stored: u64 = table.rows.iter().map(|r| r.stored).fold(0, u64::saturating_add);
        // Where something is left out of the data, these are made to fit: it is not their length that is at fault.
        let fits = what.starts_with("the same").then(|| {
            last(&mut table, "new").stored = 0;
            data[..(stored - last(&mut good.clone(), "new").stored) as usize].to_vec()
        });
        let e = refused(what, package(put_table(&table), fits.as_deref().unwrap_or(&data)));
        for word in *words {
            assert!(e.to_string().contains(word), "{what}: {e}");
        }
    }
}

#[test]
fn the_sha256_of_bases_are_there_where_the_flag_says_so_and_nowhere_else() {
    let (good, data, bases) = sound_on(Trust::Sha256);
    assert_eq!(good.flags, SUMS);
    let opened = Package::parse(package(put_table(&good), &data)).unwrap();
    let mut codecs = BTreeSet::new();
    for e in opened.entries().iter().filter(|e| e.codec.delta()) {
        // Whole, of those too whose digest is short; as another implementation of it has them.
        let sum = e.base.as_ref().unwrap().sha256.unwrap();
        assert_eq!(sum.0[..], Sha256::digest(&bases[&e.name])[..], "{}", e.name);
        codecs.insert(e.codec.name());
    }
    assert!(codecs.len() > 2 && codecs.contains("joint") && codecs.contains("unchanged"), "{codecs:?}");
    type Lie = fn(&mut Table);
    let lies: [(&str, Lie); 9] = [
        ("bytes without the flag", |t| t.flags = 0),
        ("the flag without bytes", |t| t.rows.iter_mut().for_each(|r| r.sha256.clear())),
        ("one that is missing", |t| t.rows[0].sha256.clear()),
        ("one of a joint frame that is missing", |t| last(t, "layers.3.bias").sha256.clear()),
        ("one that is missing where nothing changed", |t| last(t, "layers.0.norm").sha256.clear()),
        ("one that is cut", |t| t.rows[0].sha256.truncate(31)),
        ("one that is longer", |t| t.rows[0].sha256.push(0)),
        ("as long as a digest", |t| t.rows.iter_mut().for_each(|r| r.sha256.truncate(16))),
        ("one of what is no delta", |t| last(t, "new").sha256 = vec![7; 32]),
    ];
    for (what, lie) in lies {
        let mut table = good.clone();
        lie(&mut table);
        let e = refused(what, package(put_table(&table), &data));
        let said = ["the table ends within its digests", "follow the table's digests"];
        assert!(said.iter().any(|s| e.message().contains(s)), "{what}: {e}");
    }
    let (columns, digests) = (good.columns(), good.digests());
    for n in 0..digests.len() {
        refused("cut digests", package(packed(&columns, &digests[..n]), &data));
    }
    // In a package that has none, the flag alone.
    let (mut without, data) = sound();
    without.flags = SUMS;
    let e = refused("the flag alone", package(put_table(&without), &data));
    assert!(e.message().contains("digests"), "{e}");
}

#[test]
fn numbers_and_texts_have_one_form() {
    let (good, data) = sound();
    let (columns, digests) = (good.columns(), good.digests());
    // The flags, 0, with a byte too many; with ten bytes; with a number beyond 2^64.
    for first in [vec![0x80, 0], vec![0x80; 10], [vec![0xFF; 9], vec![2]].concat()] {
        let bad = [&first, &columns[1..]].concat();
        refused("a number that is none", package(packed(&bad, &digests), &data));
    }
    for bad in [vec![0xFF], vec![0xC3], vec![0xED, 0xA0, 0x80]] {
        let name = texts(&["ab"]);
        let list = [number(1), number(bad.len() as u64), number(0), number(bad.len() as u64), bad].concat();
        for (list, utf8) in [(&name, true), (&list, false)] {
            let columns = [&[0, 0, 0, 0, 1, 0][..], list].concat();
            let bytes = package(packed(&columns, &[]), &[]);
            assert_eq!(Package::parse(bytes).is_ok(), utf8);
        }
    }
    // A text that begins as more of the one before than that has.
    let list = [number(2), number(1), number(0), number(2), number(1), number(0), vec![b'a']].concat();
    let e = refused("in common", package(packed(&[&[0, 0, 0, 0, 2, 0][..], &list].concat(), &[]), &[]));
    assert!(e.message().contains("2 bytes in common") && e.message().contains("room for 1"), "{e}");
}

#[test]
fn a_short_table_cannot_ask_for_much() {
    let (good, data) = sound();
    let digests = good.digests();
    // Counts that nothing stands behind.
    for at in 1..6 {
        for n in [1u64 << 20, 1 << 40, u64::MAX] {
            let mut counts: Vec<Vec<u8>> = vec![vec![0]; 6];
            counts[at] = number(n);
            let columns = [counts.concat(), texts(&[])].concat();
            let e = refused("a count", package(packed(&columns, &digests), &[]));
            assert!(e.message().contains("room for") && e.message().contains(&n.to_string()), "{e}");
        }
    }
    for (count, bytes) in [(1u64 << 40, 0u64), (0, 1 << 40), (u64::MAX, u64::MAX)] {
        let columns = [vec![0; 6], number(count), number(bytes)].concat();
        refused("texts", package(packed(&columns, &[]), &[]));
    }
    // A hundred million zeros in ten thousand bytes; and lengths that the frame does not have.
    let bomb = zstd::bulk::compress(&vec![0u8; 100 << 20], 19).unwrap();
    let e = refused("a bomb", package(sealed(100 << 20, &bomb, &digests), &[]));
    assert!(e.message().contains(&(100u64 << 20).to_string()) && e.message().contains("more than"), "{e}");
    for raw in [0, 1 << 16, u32::MAX] {
        refused("a frame of another length", package(sealed(raw, &bomb, &digests), &[]));
    }
    // Names that each have four thousand bytes of the one before: little in the table, much in memory.
    let mut names: Vec<String> = vec!["n".repeat(4000)];
    names.extend((0..5000).map(|i| format!("{}{i:04}", "n".repeat(4000))));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let columns = [&[0, 0, 0, 0][..], &number(5001), &[0], &texts(&names)].concat();
    let e = refused("names", package(packed(&columns, &[]), &[]));
    assert!(e.message().contains("longer than a table"), "{e}");
    // A tensor of very many pieces of bases.
    let mut table = good.clone();
    table.rows[0].base = 3;
    table.rows[0].parts = vec![(None, None, 0, 1); 20_000];
    let e = refused("parts", package(put_table(&table), &data));
    assert!(e.message().contains("20000 pieces of a base"), "{e}");
}

#[test]
fn writers_keep_what_is_very_alike_within_the_limits_of_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut writer = Writer::create(&path, PackOptions::default()).unwrap();
    let name = |i: usize| format!("{}{i:04}", "n".repeat(4000));
    for i in 0..300 {
        let name = name(i);
        let t = Tensor { name: &name, dtype: "U8", dims: &[1], bytes: &[1] };
        writer.add(&t, Some(&t)).unwrap();
    }
    writer.finish().unwrap();
    let opened = Package::open(&path).unwrap();
    assert_eq!(opened.entries().len(), 300);
    assert_eq!(opened.entry(&name(299)).unwrap().codec, Codec::Unchanged);
}

#[test]
fn joint_frames_that_are_not_what_the_table_says_are_refused() {
    let (good, data, bases) = sound_on(Trust::Digest);
    let joint: Vec<&Row> = good.rows.iter().filter(|r| r.codec == 7).collect();
    let before: u64 = good.rows.iter().take_while(|r| r.codec != 7).map(|r| r.stored).sum();
    let frame = &data[before as usize..];
    let words = zstd::bulk::decompress(frame, 5 * 400).unwrap();
    let longer = zstd::bulk::compress(&[&words[..], &[0]].concat(), 3).unwrap();
    for (what, frame, said) in [
        ("fewer bytes", zstd::bulk::compress(&words[4..], 3).unwrap(), ["1996", "2000"]),
        ("more bytes", longer, ["2001", "2000"]),
        ("no frame", vec![0; 30], ["joint frame", "zstd frame"]),
        ("two frames", [frame, frame].concat(), ["joint frame", "more or less"]),
        ("a cut frame", frame[..frame.len() - 1].to_vec(), ["joint frame", "more or less"]),
    ] {
        let mut table = good.clone();
        for row in table.rows.iter_mut().filter(|r| r.codec == 7) {
            row.stored = 0;
        }
        table.rows.last_mut().unwrap().stored = frame.len() as u64;
        table.joints[0].1 = xxhash_rust::xxh3::xxh3_128(&frame).to_le_bytes().to_vec();
        let data = [&data[..before as usize], &frame].concat();
        let opened = Package::parse(package(put_table(&table), &data)).unwrap();
        for row in &joint {
            let m = matrix(Dtype::F32, Shape { n: 1, k: 100 }, &bases[&row.name]);
            let (made, held) = held_by(|| opened.resident(&row.name, &m, None).map(drop));
            let e = made.unwrap_err();
            let text = e.to_string();
            assert!(text.contains(&row.name) && said.iter().all(|s| text.contains(s)), "{what}: {e}");
            assert!(held.most < 1 << 20, "{what}: {} bytes", held.most);
            let mut out = vec![0; 400];
            assert!(opened.restore(&row.name, Some(&m), &mut out).is_err(), "{what}");
        }
    }
    // A frame that announces more than its tensors may have, or than it could hold.
    for (bytes, said) in [(1u64 << 20, "262144"), (200 << 10, "cannot hold")] {
        let mut table = good.clone();
        let kind = table.kinds.iter().position(|k| k.1 == [100]).unwrap();
        table.kinds[kind] = ("F32".into(), vec![bytes / 4], bytes);
        table.rows.retain(|r| r.codec != 7 || r.name == "layers.0.bias");
        table.rows.last_mut().unwrap().stored = 5;
        table.rows.last_mut().unwrap().digest.resize(16, 0);
        table.joints[0].0 = 1;
        let e = refused("a large frame", package(put_table(&table), &data[..before as usize + 5]));
        assert!(e.message().contains("layers.0.bias") && e.message().contains(said), "{e}");
    }
}
