//! Promise: a file that is cut, grown or rewritten while it is read is a clear error, or the right answer: no signal, no
//! crash, no hang, and never a package that gives back what was never there without saying so.

use crate::common::data::Rng;
use crate::common::disk::{command, complaint, done, matrices, model, names, safetensors, tree, xorz};
use crate::common::mapping::Mapping;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};
use xorz::codec::Prefer;
use xorz::error::Kind;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{
    Base, Codec, Destination, PackOptions, Package, Progress, Run, pack_files, unpack_files, verify_files,
};
use xorz::resident::{Resident, restore};

/// What happens to a file while it is read.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Cut,
    CutToNothing,
    Grow,
    Rewrite,
    Replace,
}

const FAULTS: [Fault; 5] = [Fault::Cut, Fault::CutToNothing, Fault::Grow, Fault::Rewrite, Fault::Replace];
const ROUNDS: usize = 8;

fn inflict(fault: Fault, path: &Path, rng: &mut Rng) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    match fault {
        Fault::Cut => file.set_len((len as f64 * rng.unit()) as u64).unwrap(),
        Fault::CutToNothing => file.set_len(0).unwrap(),
        Fault::Grow => {
            fs::OpenOptions::new().append(true).open(path).unwrap().write_all(&[7; 100_000]).unwrap()
        }
        Fault::Rewrite => {
            for _ in 0..50 {
                let at = 4096 + (rng.unit() * (len - 8192) as f64) as u64;
                file.write_all_at(&rng.bytes(512), at).unwrap();
            }
        }
        Fault::Replace => {
            fs::remove_file(path).unwrap();
            fs::write(path, b"another file").unwrap();
        }
    }
}

/// Run `args` while `fault` befalls `victim` at a random moment of its time.
fn meanwhile(d: &Path, args: &[&str], fault: Fault, victim: &Path, rng: &mut Rng, takes: f64) -> Output {
    let child = command(d, args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs_f64(takes * rng.unit()));
    inflict(fault, victim, rng);
    child.wait_with_output().unwrap()
}

/// `base`, `ft`, `base.d`, `ft.d` and packages `p`, `d` of them; all but the packages are kept elsewhere, too.
struct Stage {
    dir: tempfile::TempDir,
    kept: BTreeMap<String, Vec<u8>>,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        let (base, ft) = matrices(23, 6, 512, 512);
        fs::write(d.join("base"), safetensors(&base)).unwrap();
        fs::write(d.join("ft"), safetensors(&ft)).unwrap();
        model(&d.join("base.d"), &base, 2);
        model(&d.join("ft.d"), &ft, 2);
        done(d, &["pack", "base", "ft", "-o", "p"]);
        done(d, &["pack", "base.d", "ft.d", "-o", "d"]);
        let kept = tree(d).into_iter().map(|(name, (_, bytes))| (name, bytes)).collect();
        Self { dir, kept }
    }

    /// Make everything as it was at first.
    fn reset(&self) {
        for name in
            names(self.dir.path()).iter().filter(|n| !self.kept.contains_key(*n) && !n.ends_with(".d"))
        {
            let path = self.dir.path().join(name);
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        for (name, bytes) in &self.kept {
            let path = self.dir.path().join(name);
            if !fs::read(&path).is_ok_and(|b| b == *bytes) {
                fs::write(path, bytes).unwrap();
            }
        }
    }
}

/// Every round of every fault on `victim`; `judge` looks at a run that claims success. Returns how many were refused.
fn faults(args: &[&str], victims: &[&str], judge: impl Fn(&Stage, Fault)) -> usize {
    let stage = Stage::new();
    let d = stage.dir.path();
    let mut rng = Rng::new(args.len() as u64 + 100);
    let start = Instant::now();
    done(d, args);
    let takes = start.elapsed().as_secs_f64();
    let (mut refused, mut fine) = (0, 0);
    for round in 0..ROUNDS {
        for fault in FAULTS {
            stage.reset();
            let victim = victims[round % victims.len()];
            let out = meanwhile(d, args, fault, &d.join(victim), &mut rng, takes);
            let what = format!("{args:?}, {fault:?} of {victim}: {:?}", out.status);
            if out.status.success() {
                fine += 1;
                judge(&stage, fault);
            } else {
                refused += 1;
                let text = complaint(&out);
                assert!(matches!(out.status.code(), Some(1 | 3 | 4)), "{what}: {text}");
                assert!(
                    names(d).iter().all(|n| !n.starts_with('.') && n != "q"),
                    "{what} leaves {:?}",
                    names(d)
                );
            }
        }
    }
    println!("{args:?}: {refused} refused, {fine} done");
    refused
}

/// The package `q`, made while one of its inputs changed, gives back what was there, or is refused.
fn judge_package(stage: &Stage, fault: Fault, base: &str, ft: &str) {
    let d = stage.dir.path();
    // The fine-tune as it is now is gone from what follows; the base is needed as it was.
    let read = fs::read(d.join(ft)).ok();
    fs::write(d.join("q.kept"), fs::read(d.join("q")).unwrap()).unwrap();
    let q = fs::read(d.join("q")).unwrap();
    stage.reset();
    fs::write(d.join("q"), &q).unwrap();
    let out = xorz(d, &["unpack", base, "q", "-o", "out"]);
    if !out.status.success() {
        assert!(matches!(out.status.code(), Some(1 | 3)), "{fault:?}: {}", complaint(&out));
        assert!(
            matches!(fault, Fault::Rewrite),
            "{fault:?} made a package that does not unpack: {}",
            complaint(&out)
        );
        return;
    }
    let (got, was) = (d.join("out"), d.join(ft));
    let same = if was.is_dir() {
        tree(&got) == tree(&was)
    } else {
        fs::read(&got).unwrap() == fs::read(&was).unwrap()
    };
    // What was rewritten halfway was never there as a whole, but each block that came out was there at some time.
    let block = |at: usize| {
        let (got, was) = (fs::read(&got).unwrap(), fs::read(&was).unwrap());
        let now = read.as_deref().unwrap_or(&was);
        got.len() == was.len() && got.iter().zip(&was).zip(now).skip(at).all(|((g, w), n)| g == w || g == n)
    };
    assert!(
        same || (matches!(fault, Fault::Rewrite) && !was.is_dir() && block(0)),
        "{fault:?}: what came out was never there"
    );
}

#[test]
fn fine_tunes_that_change_while_they_are_packed() {
    let refused =
        faults(&["pack", "base", "ft", "-o", "q"], &["ft"], |s, f| judge_package(s, f, "base", "ft"));
    assert!(refused > 0);
}

#[test]
fn bases_that_change_while_a_fine_tune_is_packed() {
    let refused =
        faults(&["pack", "base", "ft", "-o", "q"], &["base"], |s, f| judge_package(s, f, "base", "ft"));
    assert!(refused > 0);
}

#[test]
fn folders_that_change_while_they_are_packed() {
    let victims = [
        "ft.d/model-00001-of-00002.safetensors",
        "ft.d/model-00002-of-00002.safetensors",
        "base.d/model-00002-of-00002.safetensors",
    ];
    let refused = faults(&["pack", "base.d", "ft.d", "-o", "q"], &victims, |s, f| {
        if !matches!(f, Fault::Rewrite) {
            judge_package(s, f, "base.d", "ft.d");
        }
    });
    assert!(refused > 0);
}

#[test]
fn inputs_that_change_while_they_are_unpacked() {
    // The sha256 of what was packed stands in the package: whatever happens, success means those very bytes.
    let refused = faults(&["unpack", "base", "p", "-o", "q"], &["base", "p"], |s, f| {
        let d = s.dir.path();
        assert!(fs::read(d.join("q")).unwrap() == s.kept["ft"], "{f:?}");
    });
    assert!(refused > 0);
    let victims = ["base.d/model-00001-of-00002.safetensors", "d"];
    let refused = faults(&["unpack", "base.d", "d", "-o", "q"], &victims, |s, f| {
        let d = s.dir.path();
        for (name, (_, bytes)) in tree(&d.join("q")) {
            assert!(bytes == s.kept[&format!("ft.d/{name}")], "{f:?}: {name}");
        }
        fs::remove_dir_all(d.join("q")).unwrap();
    });
    assert!(refused > 0);
}

#[test]
fn inputs_that_change_while_they_are_verified() {
    let refused = faults(&["verify", "base", "p", "ft"], &["ft", "base", "p"], |_, _| {});
    assert!(refused > 0);
}

/// Writes a file anew, with the bytes it has, when a job begins to read: nothing but its times can tell.
struct Rewrite<'a>(&'a Path);

impl Progress for Rewrite<'_> {
    fn begin(&self, _: &str, _: u64) {
        let bytes = fs::read(self.0).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let file = fs::OpenOptions::new().write(true).open(self.0).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
    }

    fn advance(&self, _: u64) {}
}

#[test]
fn inputs_written_to_while_they_are_read_are_refused_where_nothing_else_would_tell() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut rng = Rng::new(5);
    let base: Vec<u8> = rng.bytes(2 * 64 * 300);
    let file = |words: &[u8]| {
        let text = r#"{"w":{"dtype":"BF16","shape":[64,300],"data_offsets":[0,38400]}}"#;
        [(text.len() as u64).to_le_bytes().to_vec(), text.as_bytes().to_vec(), words.to_vec()].concat()
    };
    let mut tuned = base.clone();
    tuned[100] ^= 1;
    fs::write(path("base"), file(&base)).unwrap();
    fs::write(path("ft"), file(&tuned)).unwrap();
    let (options, out) = (PackOptions::default(), path("p"));
    let pack = |run: &Run<'_>| {
        pack_files(&path("base"), &path("ft"), Destination::Path(&out), &options, run).map(|_| ())
    };
    for victim in ["base", "ft"] {
        let e = pack(&Run { progress: Some(&Rewrite(&path(victim))), ..Run::default() }).unwrap_err();
        assert_eq!(e.kind(), Kind::Io);
        assert!(e.message().contains(victim) && e.message().contains("was changed while it was read"), "{e}");
        assert!(!out.exists());
    }
    pack(&Run::default()).unwrap();
    let victim = path("base");
    let rewrite = Rewrite(&victim);
    let restored = path("out");
    for sha256 in [true, false] {
        let run = Run { progress: Some(&rewrite), sha256, ..Run::default() };
        let unpacked = unpack_files(&path("base"), &out, Destination::Path(&restored), &run).map(|_| ());
        let verified = verify_files(&path("base"), &out, None, &run).map(|_| ());
        // The sha256 of what came out says more than the times of what went in.
        assert_eq!((unpacked.is_ok(), verified.is_ok()), (sha256, sha256));
        assert_eq!(restored.exists(), sha256);
        let _ = fs::remove_file(&restored);
    }
}

/// A base, and packages of one fine-tune of it by every codec.
struct Loading {
    dir: tempfile::TempDir,
    tensors: Vec<(String, Vec<u8>, Vec<u8>)>,
    packages: Vec<(Codec, Package)>,
}

const SIDE: usize = 300;

impl Loading {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (base, ft) = matrices(29, 3, SIDE, SIDE);
        fs::write(path("base"), safetensors(&base)).unwrap();
        fs::write(path("ft"), safetensors(&ft)).unwrap();
        let packages = Codec::ALL.into_iter().filter(|c| c.on_request()).map(|codec| {
            let options = PackOptions { codec: Some(codec), ..PackOptions::default() };
            let to = path(codec.name());
            let out = Destination::Path(&to);
            pack_files(&path("base"), &path("ft"), out, &options, &Run::default()).unwrap();
            (codec, Package::open(&to).unwrap())
        });
        let packages = packages.collect();
        let tensors = base.into_iter().zip(ft).map(|(b, f)| (b.0, b.3, f.3)).collect();
        Self { tensors, packages, dir }
    }

    fn base(&self) -> std::path::PathBuf {
        self.dir.path().join("base")
    }

    /// Every delta of every package: right, or refused in words; how many are refused.
    fn load(&self, base: &Base, what: &str) -> usize {
        let (mut refused, shape) = (0, Shape { n: SIDE, k: SIDE });
        for (codec, package) in &self.packages {
            for prefer in [None, Some(Prefer::Speed), Some(Prefer::Memory)] {
                for (name, old, new) in &self.tensors {
                    let delta = match base.resident(package, name, prefer) {
                        Ok(delta) => delta,
                        Err(e) => {
                            assert!(matches!(e.kind(), Kind::Io | Kind::Mismatch), "{e}");
                            assert!(e.message().contains(name), "{e}");
                            refused += 1;
                            continue;
                        }
                    };
                    let old = Matrix::new(Dtype::BF16, shape, old).unwrap();
                    let mut out = vec![0; new.len()];
                    restore(&Resident::parse(&delta).unwrap(), &old, &mut out).unwrap();
                    assert!(out == *new, "{what}: {codec:?} for {prefer:?} gave a wrong delta of {name}");
                }
            }
        }
        refused
    }
}

/// Does something to a base when it begins to be read for its digests.
struct Meanwhile<F: Fn() + Sync>(F);

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn begin(&self, _: &str, _: u64) {
        (self.0)();
    }

    fn advance(&self, _: u64) {}
}

#[test]
fn a_base_that_changes_between_its_opening_and_a_load_gives_no_wrong_delta() {
    let stage = Loading::new();
    let (path, kept) = (stage.base(), fs::read(stage.base()).unwrap());
    // Other words at the same places, in one file and in another of the same name.
    let other: Vec<u8> = kept.iter().enumerate().map(|(i, b)| if i > 4096 { b ^ 2 } else { *b }).collect();
    let aside = stage.dir.path().join("aside");
    let in_place = |bytes: &[u8]| {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(bytes, 0).unwrap();
    };
    let replaced = |bytes: &[u8]| {
        fs::write(&aside, bytes).unwrap();
        fs::rename(&aside, &path).unwrap();
    };
    let open = |run: &Run<'_>| Base::open(&path, run).unwrap();
    assert_eq!(stage.load(&open(&Run::default()), "at rest"), 0);

    // After it was opened: in place, which times tell, and through a mapping, which they need not.
    let base = open(&Run::default());
    in_place(&other);
    assert!(stage.load(&base, "in place") > 0);
    in_place(&kept);
    let mut mapping = Mapping::of(&path);
    let bytes = kept.len();
    (4096..bytes).step_by(2048).for_each(|at| mapping.flip(at));
    (4096..bytes).step_by(2048).for_each(|at| mapping.flip(at));
    let base = open(&Run::default());
    (4096..bytes).step_by(2048).for_each(|at| mapping.flip(at));
    assert!(stage.load(&base, "through a mapping") > 0);
    (4096..bytes).step_by(2048).for_each(|at| mapping.flip(at));

    // While it is opened: replaced by another file, whose words must not be read with this one's digests or the reverse.
    for (first, then) in [(&kept, &other), (&other, &kept)] {
        replaced(first);
        let swap = Meanwhile(|| replaced(then));
        match Base::open(&path, &Run { progress: Some(&swap), ..Run::default() }) {
            Ok(base) => drop(stage.load(&base, "replaced while it was opened")),
            Err(e) => assert!(e.message().contains("was changed while it was read"), "{e}"),
        }
    }
}

/// Says so when it goes.
struct Ended<'a>(&'a std::sync::atomic::AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn a_base_that_somebody_writes_to_all_the_time_gives_no_wrong_delta() {
    let stage = Loading::new();
    let (path, kept) = (stage.base(), fs::read(stage.base()).unwrap());
    let done = std::sync::atomic::AtomicBool::new(false);
    let (mut refused, mut opened) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut mapping = Mapping::of(&path);
            let mut rng = Rng::new(31);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let places: Vec<usize> =
                    (0..20).map(|_| 4096 + (rng.unit() * (kept.len() - 4096) as f64) as usize).collect();
                places.iter().for_each(|at| mapping.flip(*at));
                std::thread::sleep(Duration::from_micros(300));
                places.iter().for_each(|at| mapping.flip(*at));
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        // The writer ends whatever happens here, so that a failure is one and no wait without end.
        let _end = Ended(&done);
        for _ in 0..60 {
            // Its digests may be those of words that were there for a moment only: then every load is refused.
            if let Ok(base) = Base::open(&path, &Run { jobs: 1, ..Run::default() }) {
                opened += 1;
                refused += stage.load(&base, "beside a writer");
            }
        }
    });
    println!("{opened} of 60 opened, {refused} loads refused");
    assert!(opened < 60 || refused > 0);
}
