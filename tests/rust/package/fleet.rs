//! Promise: many fine-tunes packed in one run give the packages that each gives alone, bit for bit, by any threads; the base is
//! read once for all of them; each goes against the nearest of several bases; one that fails ends no other, and is named.

use crate::common::data::Rng;
use crate::common::disk::{
    self, Tensor, complaint, done, matrices, model, names, refused, safetensors, tree,
};
use std::fs;
use std::path::{Path, PathBuf};
use xorz::package::{
    Destination, FleetReport, PackOptions, Run, pack_files, pack_fleet, unpack_files, verify_files,
};

const MIB: usize = 1 << 20;

fn run(jobs: usize) -> Run<'static> {
    Run { jobs, ..Run::default() }
}

/// Every fine-tune of `d`, packed in one run into `d/fleet.JOBS`.
fn fleet(d: &Path, bases: &[&str], tuned: &[&str], options: &PackOptions, jobs: usize) -> FleetReport {
    let folder = d.join(format!("fleet.{jobs}"));
    fs::create_dir_all(&folder).unwrap();
    let bases: Vec<PathBuf> = bases.iter().map(|b| d.join(b)).collect();
    let pairs: Vec<_> = tuned.iter().map(|ft| (d.join(ft), folder.join(ft))).collect();
    pack_fleet(&bases, &pairs, options, &run(jobs)).unwrap()
}

/// The bytes of a package made alone.
fn alone(d: &Path, base: &str, ft: &str, options: &PackOptions) -> Vec<u8> {
    let out = d.join("alone.xorz");
    pack_files(&d.join(base), &d.join(ft), Destination::Path(&out), options, &run(1)).unwrap();
    fs::read(out).unwrap()
}

/// A base in two shards, `base`, and fine-tunes of every kind of difference that pairing knows; their names.
fn family(d: &Path) -> Vec<&'static str> {
    let (mut base, ft) = matrices(71, 5, 320, 520);
    let mut rng = Rng::new(72);
    base.push(("bias".into(), "BF16", vec![700], rng.bytes(1400)));
    base.push(("model.embed.weight".into(), "BF16", vec![900, 520], rng.bytes(936_000)));
    let other = |seed: u64| -> Vec<Tensor> {
        let mut rng = Rng::new(seed);
        let change = |(name, dtype, dims, bytes): &Tensor| {
            let mut bytes = bytes.clone();
            (0..bytes.len()).step_by(2).filter(|_| rng.unit() < 0.02).for_each(|i| bytes[i] ^= 1);
            (name.clone(), *dtype, dims.clone(), bytes)
        };
        base.iter().map(change).collect()
    };
    model(&d.join("base"), &base, 2);
    fs::write(d.join("file"), safetensors(&ft)).unwrap();
    model(&d.join("same"), &base, 2);
    model(&d.join("shards"), &other(73), 5);
    let mut reversed = other(74);
    reversed.reverse();
    model(&d.join("reversed"), &reversed, 3);
    let mut renamed = other(75);
    renamed.iter_mut().for_each(|t| t.0 = format!("_orig_mod.{}", t.0));
    fs::write(d.join("renamed"), safetensors(&renamed)).unwrap();
    let mut grown = other(76);
    let embedding = grown.last_mut().unwrap();
    (embedding.2[0], embedding.3) = (908, [&embedding.3[..], &rng.bytes(8 * 1040)].concat());
    grown.push(("new.head".into(), "F32", vec![64, 32], rng.bytes(8192)));
    let tied = grown[0].3.clone();
    grown.push(("tied".into(), "BF16", vec![320, 520], tied));
    model(&d.join("grown"), &grown, 2);
    let stacked: Vec<u8> = other(77)[..5].iter().flat_map(|t| t.3.clone()).collect();
    let mut stack = vec![("experts.stack".to_owned(), "BF16", vec![5, 320, 520], stacked)];
    stack.extend(other(78).into_iter().skip(5));
    fs::write(d.join("stack"), safetensors(&stack)).unwrap();
    model(&d.join("empty"), &other(79), 1);
    fs::write(d.join("empty/none.safetensors"), safetensors(&[])).unwrap();
    fs::write(d.join("empty/tokenizer.json"), rng.bytes(MIB)).unwrap();
    vec!["file", "same", "shards", "reversed", "renamed", "grown", "stack", "empty"]
}

#[test]
fn every_package_is_bit_for_bit_what_it_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let tuned = family(d);
    let fast = PackOptions { fast: true, ..PackOptions::default() };
    for (jobs, options) in [(1, &PackOptions::default()), (2, &fast), (7, &PackOptions::default())] {
        let packed = fleet(d, &["base"], &tuned, options, jobs);
        for (p, ft) in packed.packages.iter().zip(&tuned) {
            let report = p.report.as_ref().unwrap_or_else(|e| panic!("{ft}: {}", e.message()));
            let found = fs::read(&p.package).unwrap();
            assert!(found == alone(d, "base", ft, options), "{ft}, {jobs} threads");
            assert_eq!(report.package_bytes, found.len() as u64, "{ft}");
            // And it is what it should be, whoever made it.
            let out = d.join("out");
            unpack_files(&d.join("base"), &p.package, Destination::Path(&out), &run(1)).unwrap();
            if out.is_dir() {
                assert!(tree(&out) == tree(&d.join(ft)), "{ft}");
                fs::remove_dir_all(&out).unwrap();
            } else {
                assert!(fs::read(&out).unwrap() == fs::read(d.join(ft)).unwrap(), "{ft}");
                fs::remove_file(&out).unwrap();
            }
            verify_files(&d.join("base"), &p.package, Some(&d.join(ft)), &run(2)).unwrap();
        }
        assert_eq!(names(&d.join(format!("fleet.{jobs}"))).len(), tuned.len());
    }
}

/// Bytes that this thread has read so far, from whatever file.
fn bytes_read_by_this_thread() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").unwrap();
    text.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn the_base_is_read_once_for_all_of_them() {
    const TUNED: [&str; 4] = ["a", "b", "c", "d"];
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut rng = Rng::new(81);
    // More than is kept of a base in memory: small tensors, and one that is much larger than what is kept of it.
    let dims = [[1024, 2048], [24 * 1024, 1024], [512, 4096], [1024, 1024], [33, 77]];
    let base: Vec<Tensor> = (0..dims.len() * 4)
        .filter(|i| i % dims.len() != 1 || *i == 1)
        .map(|i| {
            let [n, k] = dims[i % dims.len()];
            (format!("layers.{i}.weight"), "BF16", vec![n, k], rng.bytes(2 * n * k))
        })
        .collect();
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    for (t, ft) in TUNED.iter().enumerate() {
        let mut tuned = base.clone();
        tuned.iter_mut().for_each(|x| (t..x.3.len() / 2).step_by(50 + t).for_each(|w| x.3[2 * w] ^= 1));
        match t {
            3 => model(&d.join(ft), &tuned, 4),
            _ => fs::write(d.join(ft), safetensors(&tuned)).unwrap(),
        }
    }
    let size = fs::metadata(d.join("base")).unwrap().len();
    assert!(size > 70 * MIB as u64);
    let options = PackOptions::default();
    let before = bytes_read_by_this_thread();
    let each: Vec<_> = TUNED.iter().map(|ft| alone(d, "base", ft, &options)).collect();
    let read_alone = bytes_read_by_this_thread() - before;
    let before = bytes_read_by_this_thread();
    // One thread: it does all the work itself, so that what it read is what was read.
    let packed = fleet(d, &["base"], &TUNED, &options, 1);
    let read = bytes_read_by_this_thread() - before;
    for (p, want) in packed.packages.iter().zip(&each) {
        assert!(fs::read(&p.package).unwrap() == *want, "{:?}", p.report);
    }
    println!("{size} of base, {} read; {read} in all, {read_alone} alone", packed.base_bytes_read);
    assert_eq!(packed.base_bytes, size);
    assert!(packed.base_bytes_read >= size - 4096 && packed.base_bytes_read < size + size / 8);
    let saved = (TUNED.len() as u64 - 1) * size;
    assert!(
        read + saved - size / 8 < read_alone,
        "{read} in all, {read_alone} alone, {saved} should be saved"
    );
    let two = fleet(d, &["base"], &TUNED, &options, 2);
    assert!(two.base_bytes_read < size + size / 8, "{} read by two threads", two.base_bytes_read);
}

#[test]
fn one_that_fails_ends_no_other_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(91, 4, 256, 256);
    model(&d.join("base"), &base, 2);
    for name in ["good", "better", "cut"] {
        model(&d.join(name), &ft, 2);
    }
    let whole = fs::read(d.join("cut/model-00002-of-00002.safetensors")).unwrap();
    fs::write(d.join("cut/model-00002-of-00002.safetensors"), &whole[..whole.len() - 100]).unwrap();
    fs::create_dir(d.join("nothing")).unwrap();
    fs::write(d.join("pickle.bin"), b"\x80\x02").unwrap();
    let out = disk::xorz(
        d,
        &["pack", "base", "good", "cut", "absent", "nothing", "pickle.bin", "better", "-o", "out"],
    );
    // As the first that failed: it is cut.
    assert_eq!(out.status.code(), Some(3), "{out:?}");
    let told = String::from_utf8(out.stderr).unwrap();
    let lines: Vec<_> = told.lines().collect();
    assert_eq!(lines.len(), 5, "{told}");
    let wanted = [
        "cut is not packed: cut/model-00002-of-00002.safetensors: ",
        "absent is not packed: absent: ",
        "nothing is not packed: nothing: ",
        "pickle.bin is not packed: pickle.bin: ",
        "4 of 6",
    ];
    for (line, wanted) in lines.iter().zip(wanted) {
        assert!(line.starts_with(&format!("xorz: {wanted}")), "{told}");
    }
    assert_eq!(names(&d.join("out")), ["better.xorz", "good.xorz"]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("out/good.xorz") && text.contains("2 of 6 checkpoints") && !text.contains("cut"));
    for name in ["good", "better"] {
        done(d, &["verify", "base", &format!("out/{name}.xorz"), name]);
    }
    // A base that cannot be read concerns all of them.
    refused(d, &["pack", "absent", "good", "better", "-o", "out"], 4, &["absent"]);
    refused(d, &["pack", "cut", "good", "better", "-o", "out"], 3, &["cut/model-00002-of-00002.safetensors"]);
}

#[test]
fn a_fine_tune_whose_words_cannot_be_read_fails_while_others_are_packed() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(92, 40, 512, 512);
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    let tuned = safetensors(&ft);
    ["a", "b", "c"].iter().for_each(|name| fs::write(d.join(name), &tuned).unwrap());
    // Cut while it is read, at its end: the others are in the middle of their work then.
    struct Cut(PathBuf, std::sync::atomic::AtomicU64);
    impl xorz::package::Progress for Cut {
        fn begin(&self, _: &str, _: u64) {}
        fn advance(&self, bytes: u64) {
            let done = self.1.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed) + bytes;
            if done > 20 * MIB as u64 {
                fs::OpenOptions::new().write(true).open(&self.0).unwrap().set_len(9 * MIB as u64).unwrap();
            }
        }
    }
    for jobs in [1, 3] {
        fs::write(d.join("b"), &tuned).unwrap();
        let progress = Cut(d.join("b"), 0.into());
        let run = Run { jobs, progress: Some(&progress), ..Run::default() };
        let pairs: Vec<_> = ["a", "b", "c"].map(|n| (d.join(n), d.join(format!("{n}.{jobs}.xorz")))).into();
        let packed = pack_fleet(&[d.join("base")], &pairs, &PackOptions::default(), &run).unwrap();
        let [a, b, c] = &packed.packages[..] else { panic!() };
        let error = b.report.as_ref().unwrap_err();
        assert!(error.message().contains(&*d.join("b").to_string_lossy()), "{}", error.message());
        assert!(!b.package.exists());
        for (p, name) in [(a, "a"), (c, "c")] {
            p.report.as_ref().unwrap_or_else(|e| panic!("{name}: {}", e.message()));
            let want = alone(d, "base", name, &PackOptions::default());
            assert!(fs::read(&p.package).unwrap() == want, "{name}, {jobs} threads");
        }
    }
}

#[test]
fn each_goes_against_the_nearest_of_several_bases() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    // Two families of the same shapes and names, and a model of another shape.
    let (one, one_ft) = matrices(101, 3, 256, 320);
    let (two, two_ft) = matrices(102, 3, 256, 320);
    let (other, _) = matrices(103, 3, 128, 128);
    for (name, tensors) in [("one", &one), ("two", &two), ("other", &other)] {
        model(&d.join(name), tensors, 1);
    }
    // A base that is itself a fine-tune of `one`, and a fine-tune of that: nearer to it than to `one`.
    let mut rng = Rng::new(104);
    let mut step = |from: &[Tensor]| -> Vec<Tensor> {
        let mut to = from.to_vec();
        to.iter_mut()
            .for_each(|t| (0..t.3.len() / 2).filter(|_| rng.unit() < 0.3).for_each(|w| t.3[2 * w] ^= 1));
        to
    };
    let instruct = step(&one);
    let of_instruct = step(&instruct);
    model(&d.join("instruct"), &instruct, 1);
    for (name, tensors) in [("ft.one", &one_ft), ("ft.two", &two_ft), ("ft.instruct", &of_instruct)] {
        model(&d.join(name), tensors, 2);
    }
    let bases = ["other", "one", "two", "instruct"];
    let packed = fleet(d, &bases, &["ft.one", "ft.two", "ft.instruct"], &PackOptions::default(), 2);
    let chosen: Vec<_> = packed.packages.iter().map(|p| bases[p.base]).collect();
    assert_eq!(chosen, ["one", "two", "instruct"], "{:?}", packed.packages);
    for p in &packed.packages {
        assert!(p.distances.len() == 4 && p.distances.iter().all(|x| (0.0..=1.0).contains(x)));
        let name = p.fine_tuned.file_name().unwrap().to_str().unwrap();
        let same = alone(d, bases[p.base], name, &PackOptions::default());
        assert!(fs::read(&p.package).unwrap() == same, "{name}");
        // No other base gives a smaller package.
        for base in bases {
            assert!(
                alone(d, base, name, &PackOptions::default()).len() >= same.len(),
                "{name} against {base}"
            );
        }
    }
    let text = done(d, &["pack", "--base", "two", "--base", "one", "ft.one", "ft.two", "-o", "out"]);
    assert!(
        text.contains("ft.one: nearest is one 0.") && text.contains("ft.two: nearest is two 0."),
        "{text}"
    );
    done(d, &["verify", "one", "out/ft.one.xorz", "ft.one"]);
    done(d, &["verify", "two", "out/ft.two.xorz", "ft.two"]);
}

#[test]
fn packages_are_called_as_the_checkpoints_are_and_replace_no_input() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(111, 2, 64, 128);
    model(&d.join("base"), &base, 1);
    for name in ["runs/a/checkpoint-100", "runs/b/checkpoint-100", "runs/b/final"] {
        model(&d.join(name), &ft, 1);
        fs::rename(
            d.join(name).join("model-00001-of-00001.safetensors"),
            d.join(name).join("model.safetensors"),
        )
        .unwrap();
        fs::remove_file(d.join(name).join("model.safetensors.index.json")).unwrap();
    }
    done(
        d,
        &["pack", "base", "runs/a/checkpoint-100", "runs/b/checkpoint-100", "runs/b/final/", "-o", "out"],
    );
    assert_eq!(names(&d.join("out")), ["a-checkpoint-100.xorz", "b-checkpoint-100.xorz", "final.xorz"]);
    done(d, &["pack", "base", "runs/b/final/model.safetensors", "-o", "files/"]);
    done(
        d,
        &[
            "pack",
            "base",
            "runs/b/final/model.safetensors",
            "base/model-00001-of-00001.safetensors",
            "-o",
            "files",
        ],
    );
    assert_eq!(names(&d.join("files")), ["model-00001-of-00001.xorz", "model.xorz"]);
    // One goes into a folder, too, where that is meant for sure: a pattern of the shell's may mean one.
    refused(d, &["pack", "base", "runs/a/checkpoint-100", "-o", "out"], 2, &["directory"]);
    done(d, &["pack", "base", "runs/a/checkpoint-100", "-o", "out/"]);
    assert_eq!(names(&d.join("out")).last().unwrap(), "final.xorz");
    assert!(names(&d.join("out")).contains(&"checkpoint-100.xorz".into()));
    refused(
        d,
        &["pack", "base", "runs/b/final", "runs/b/final", "-o", "out"],
        2,
        &["runs/b/final", "final.xorz"],
    );
    refused(d, &["pack", "base", "runs/b/final", "runs/a", "-o", "-"], 2, &["folder"]);
    refused(
        d,
        &["pack", "base", "runs/b/final", "base", "-o", "base/config.json"],
        2,
        &["base/config.json", "folder"],
    );
    let json = done(d, &["pack", "base", "runs/b/final", "runs/a/checkpoint-100", "-o", "out", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let packages = value["packages"].as_array().unwrap();
    assert_eq!(packages.len(), 2);
    assert_eq!(packages[0]["report"]["package_bytes"], fs::metadata(d.join("out/final.xorz")).unwrap().len());
    assert_eq!(
        (&packages[1]["fine_tuned"], &packages[1]["base"]),
        (&"runs/a/checkpoint-100".into(), &"base".into())
    );
    // No library call may put a package in the place of a fine-tune that is still to be read, or of a base.
    let inside = d.join("runs/a/checkpoint-100/config.json");
    let before = fs::read(&inside).unwrap();
    let pairs =
        [(d.join("runs/b/final"), inside.clone()), (d.join("runs/a/checkpoint-100"), d.join("x.xorz"))];
    let e = pack_fleet(&[d.join("base")], &pairs, &PackOptions::default(), &run(1)).unwrap_err();
    assert!(e.message().contains("config.json") && !d.join("x.xorz").exists(), "{}", e.message());
    let pairs = [(d.join("runs/b/final"), d.join("base/model-00001-of-00001.safetensors"))];
    let packed = pack_fleet(&[d.join("base")], &pairs, &PackOptions::default(), &run(1)).unwrap();
    assert!(packed.packages[0].report.as_ref().unwrap_err().message().contains("overwrite"));
    assert!(fs::read(&inside).unwrap() == before);
    let two =
        [(d.join("runs/b/final"), d.join("y.xorz")), (d.join("runs/a/checkpoint-100"), d.join("y.xorz"))];
    let e = pack_fleet(&[d.join("base")], &two, &PackOptions::default(), &run(1)).unwrap_err();
    assert!(e.message().contains("y.xorz") && !d.join("y.xorz").exists());
    let out = disk::xorz(d, &["pack", "base"]);
    assert_eq!(out.status.code(), Some(2), "{}", String::from_utf8_lossy(&out.stderr));
    let out = disk::xorz(d, &["pack", "base", "absent", "-o", "one.xorz"]);
    assert!(complaint(&out).contains("absent"));
}
