//! Promise: a base's digests are those of its words, computed by any number of threads, kept, and given back only while the
//! file is the same; a cache that is broken, hostile, racy, full or not writable never makes anything fail or wrong.

use crate::common::data::Rng;
use crate::common::mapping::Mapping;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use xorz::error::Kind;
use xorz::matrix::{Digest, Dtype, Matrix, Shape};
use xorz::package::{DigestCache, Identity, Progress, Run, digest_files};

type Digests = BTreeMap<String, Digest>;

/// A safetensors file of `(name, dtype, dims)`, and the digests that its words have by [`Matrix::digest`].
fn checkpoint(path: &Path, seed: u64, tensors: &[(&str, &str, &[usize])]) -> Digests {
    let mut rng = Rng::new(seed);
    let (mut header, mut data, mut digests) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (name, dtype_name, dims) in tensors {
        let dtype = Dtype::from_name(dtype_name);
        let words: usize = dims.iter().product();
        let bytes =
            rng.bytes(words * dtype.map_or(1, Dtype::word_bytes) / if dtype.is_none() { 2 } else { 1 });
        let at = data.len();
        data.extend_from_slice(&bytes);
        header.push(format!(
            r#""{name}":{{"dtype":"{dtype_name}","shape":{dims:?},"data_offsets":[{at},{}]}}"#,
            data.len()
        ));
        // What has no words of its own is rows of bytes.
        let shape = match dtype {
            Some(_) => Shape::of_dims(dims).unwrap(),
            None => Shape { n: dims[0], k: words / 2 / dims[0] },
        };
        let matrix = Matrix::new(dtype.unwrap_or(Dtype::U8), shape, &bytes).unwrap();
        digests.insert((*name).to_owned(), matrix.digest());
    }
    let header = format!("{{{}}}", header.join(","));
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
    digests
}

/// Every kind of leaf: none, empty, one row longer than a buffer, many short ones, a last one cut.
const MIXED: &[(&str, &str, &[usize])] = &[
    ("scalar", "F32", &[]),
    ("none", "BF16", &[0, 7]),
    ("hollow", "BF16", &[130, 0]),
    ("one long row", "F32", &[700_001]),
    ("wide", "BF16", &[3, 900, 701]),
    ("tall", "U8", &[300_001, 5]),
    ("many", "F64", &[1000, 33, 7]),
    ("half bytes", "F4", &[10, 2]),
    ("bool", "BOOL", &[65, 3]),
];

fn run(jobs: usize) -> Run<'static> {
    Run { jobs, ..Run::default() }
}

fn load(cache: &DigestCache, path: &Path) -> Option<Digests> {
    cache.load(path, &File::open(path).unwrap())
}

fn store(cache: &DigestCache, path: &Path, digests: &Digests) {
    let file = File::open(path).unwrap();
    let before = Identity::watched(&file).unwrap_or(Identity::of(&file).unwrap());
    cache.store(path, &file, &before, digests);
}

/// Until a file that was just written may be trusted not to change unseen.
fn settle() {
    std::thread::sleep(Duration::from_millis(2100));
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|d| d.map(|e| e.unwrap().path()).collect()).unwrap_or_default()
}

#[test]
fn digests_are_those_of_the_matrices_whatever_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let want = checkpoint(&path, 1, MIXED);
    assert_eq!(want.len(), MIXED.len());
    for jobs in [0, 1, 2, 7, 64] {
        let found = digest_files(&path, &DigestCache::off(), &run(jobs)).unwrap();
        assert_eq!(found.iter().cloned().collect::<Digests>(), want, "{jobs} jobs");
        assert!(found.is_sorted_by_key(|(name, _)| name.clone()));
    }
}

#[test]
fn a_folder_s_digests_are_those_of_its_files_and_progress_counts_every_byte_once() {
    struct Count(Mutex<(u64, u64)>);
    impl Progress for Count {
        fn begin(&self, what: &str, bytes: u64) {
            assert_eq!(what, "digest");
            self.0.lock().unwrap().0 += bytes;
        }
        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().1 += bytes;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    fs::create_dir(d.join("inner")).unwrap();
    let mut want = checkpoint(&d.join("1.safetensors"), 1, MIXED);
    want.extend(checkpoint(&d.join("inner/2.safetensors"), 2, &[("other", "F16", &[70, 9])]));
    fs::write(d.join("config.json"), b"{}").unwrap();
    let count = Count(Mutex::new((0, 0)));
    let run = Run { progress: Some(&count), ..run(2) };
    let found = digest_files(d, &DigestCache::off(), &run).unwrap();
    assert_eq!(found.into_iter().collect::<Digests>(), want);
    let (announced, done) = *count.0.lock().unwrap();
    let all = fs::metadata(d.join("1.safetensors")).unwrap().len();
    assert!(announced == done && done > all - 2000 && done < all + 2000, "{announced} {done} {all}");

    // Of two tensors of one name, the one in the model's own file, as packing takes it.
    checkpoint(&d.join("consolidated.safetensors"), 3, &[("own", "F16", &[5])]);
    let own = checkpoint(&d.join("model.safetensors"), 4, &[("own", "F16", &[5])]);
    let found: Digests = digest_files(d, &DigestCache::off(), &run).unwrap().into_iter().collect();
    assert_eq!(found["own"], own["own"]);
    let empty = tempfile::tempdir().unwrap();
    let e = digest_files(empty.path(), &DigestCache::off(), &run).unwrap_err();
    assert_eq!(e.kind(), Kind::InvalidArgument, "{e}");
    fs::write(empty.path().join("pytorch_model.bin"), b"PK").unwrap();
    let e = digest_files(empty.path(), &DigestCache::off(), &run).unwrap_err();
    assert!(e.message().contains("safe_serialization=True"), "{e}");
}

#[test]
fn what_is_kept_is_given_back_while_the_file_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (d, cache) = (dir.path(), DigestCache::at(dir.path().join("a/cache")));
    let path = d.join("m.safetensors");
    let want = checkpoint(&path, 1, MIXED);
    assert_eq!(load(&cache, &path), None);
    store(&cache, &path, &want);
    assert_eq!(load(&cache, &path), None, "kept though the file may change within one tick of its clock");
    settle();
    let first = digest_files(&path, &cache, &run(0)).unwrap();
    assert_eq!(load(&cache, &path), Some(want.clone()));

    // Proof that the second time is from the cache: an entry that says something else is believed.
    let mut other = want.clone();
    other.insert("bool".into(), Digest([7; 16]));
    store(&cache, &path, &other);
    let second: Digests = digest_files(&path, &cache, &run(0)).unwrap().into_iter().collect();
    assert_eq!(second, other);
    assert_ne!(first.into_iter().collect::<Digests>(), second);
    // One that lacks a tensor is not.
    let mut fewer = want.clone();
    fewer.remove("bool");
    store(&cache, &path, &fewer);
    assert_eq!(digest_files(&path, &cache, &run(0)).unwrap().into_iter().collect::<Digests>(), want);

    // Another name for the same file, by a link, is the same file; a copy is not.
    std::os::unix::fs::symlink(&path, d.join("link")).unwrap();
    assert_eq!(load(&cache, &d.join("link")), Some(want.clone()));
    fs::copy(&path, d.join("copy")).unwrap();
    assert_eq!(load(&cache, &d.join("copy")), None);

    // Same length, its time of modification set back: the time of change tells.
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let changed = checkpoint(&path, 2, MIXED);
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(load(&cache, &path), None);
    assert_eq!(digest_files(&path, &cache, &run(0)).unwrap().into_iter().collect::<Digests>(), changed);

    // Replaced by another file under the same name.
    checkpoint(&d.join("new"), 1, MIXED);
    fs::rename(d.join("new"), &path).unwrap();
    assert_eq!(load(&cache, &path), None);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_never_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (path, cache) = (dir.path().join("m"), DigestCache::at(dir.path().join("cache")));
    let want = checkpoint(&path, 1, &[("w", "F32", &[100])]);
    settle();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let before = Identity::watched(&file).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, &[1], fs::metadata(&path).unwrap().len() - 1).unwrap();
    assert!(!before.same(&Identity::of(&file).unwrap()));
    cache.store(&path, &file, &before, &want);
    assert!(entries(&dir.path().join("cache")).is_empty());
}

#[test]
fn broken_and_hostile_entries_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("cache");
    let (path, cache) = (dir.path().join("m"), DigestCache::at(&folder));
    let want = checkpoint(&path, 1, &[("w", "F32", &[100]), ("v", "U8", &[3])]);
    settle();
    store(&cache, &path, &want);
    let entry = entries(&folder).pop().unwrap();
    let good = fs::read(&entry).unwrap();
    assert_eq!(load(&cache, &path), Some(want.clone()));
    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&entry)), (0o700, 0o600));

    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 1;
        fs::write(&entry, &bad).unwrap();
        assert_eq!(load(&cache, &path), None, "byte {i} is another");
        fs::write(&entry, &good[..i]).unwrap();
        assert_eq!(load(&cache, &path), None, "cut at {i}");
    }
    // Words beside those that are understood, which the check of what was understood does not see: wherever an object or a
    // word of it begins or ends.
    for i in (0..good.len()).filter(|&i| b"{},".contains(&good[i])) {
        for beside in [&br#""more":1,"#[..], br#","more":1"#, b" "] {
            let bad = [&good[..=i], beside, &good[i + 1..]].concat();
            fs::write(&entry, &bad).unwrap();
            assert_eq!(load(&cache, &path), None, "{}", String::from_utf8_lossy(&bad));
        }
    }
    let deep = "[".repeat(100_000);
    for text in [&b""[..], b"null", b"{}", b"[]", b"\xff\xfe", deep.as_bytes()] {
        fs::write(&entry, text).unwrap();
        assert_eq!(load(&cache, &path), None);
    }
    // A terabyte of nothing, a folder, a link, a pipe that nobody writes to.
    File::create(&entry).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(load(&cache, &path), None);
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    assert_eq!(load(&cache, &path), None);
    store(&cache, &path, &want);
    fs::remove_dir(&entry).unwrap();
    fs::write(dir.path().join("elsewhere"), &good).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &entry).unwrap();
    assert_eq!(load(&cache, &path), None);
    fs::remove_file(&entry).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&entry).status().unwrap().success());
    assert_eq!(load(&cache, &path), None);
    fs::remove_file(&entry).unwrap();
    // Where others may write, they may choose the digests.
    store(&cache, &path, &want);
    assert_eq!(load(&cache, &path), Some(want.clone()));
    fs::set_permissions(&entry, fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(load(&cache, &path), None);
    fs::set_permissions(&entry, fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(load(&cache, &path), None);
}

#[test]
fn a_cache_that_cannot_be_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let want = checkpoint(&path, 1, &[("w", "F32", &[100])]);
    settle();
    fs::write(dir.path().join("file"), b"").unwrap();
    for cache in
        [DigestCache::off(), DigestCache::at(dir.path().join("file/x")), DigestCache::at("/proc/xorz")]
    {
        for _ in 0..2 {
            assert_eq!(digest_files(&path, &cache, &run(0)).unwrap().into_iter().collect::<Digests>(), want);
        }
        assert_eq!(load(&cache, &path), None);
    }
}

#[test]
fn a_thousand_entries_are_kept_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("cache");
    let (path, cache) = (dir.path().join("m"), DigestCache::at(&folder));
    let want = checkpoint(&path, 1, &[("w", "F32", &[100])]);
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(100_000);
    for i in 0..1010u64 {
        let file = File::create(folder.join(format!("{i:032x}.json"))).unwrap();
        file.set_modified(old + Duration::from_secs(i)).unwrap();
    }
    let left = folder.join(format!(".{:032x}.json.tmp-1-2", 1));
    File::create(&left).unwrap().set_modified(old).unwrap();
    fs::write(folder.join("notes.txt"), b"mine").unwrap();
    settle();
    store(&cache, &path, &want);
    assert_eq!(load(&cache, &path), Some(want));
    assert_eq!(entries(&folder).len(), 1001, "a thousand and a file that is none of ours");
    assert!(!left.exists() && folder.join("notes.txt").exists());
    assert!(
        !folder.join(format!("{:032x}.json", 10)).exists()
            && folder.join(format!("{:032x}.json", 11)).exists()
    );
}

#[test]
fn a_base_written_through_a_mapping_is_read_again_though_its_times_stand_still() {
    let dir = tempfile::tempdir().unwrap();
    let (path, cache) = (dir.path().join("m"), DigestCache::at(dir.path().join("cache")));
    let first = checkpoint(&path, 1, &[("w", "F32", &[100])]);
    // A page that was stored to, and is still to be written to disk: further stores to it move no times.
    let last = fs::metadata(&path).unwrap().len() as usize - 1;
    let mut mapping = Mapping::of(&path);
    mapping.flip(last);
    mapping.flip(last);
    settle();
    let digests = || digest_files(&path, &cache, &run(1)).unwrap().into_iter().collect::<Digests>();
    assert_eq!(digests(), first);
    if entries(&dir.path().join("cache")).is_empty() {
        println!("skipped: the file system of {} is none whose times tell", dir.path().display());
        return;
    }
    assert_eq!(load(&cache, &path), Some(first.clone()));
    mapping.flip(last);
    let bytes = fs::read(&path).unwrap();
    let shape = Shape { n: 1, k: 100 };
    let want = Matrix::new(Dtype::F32, shape, &bytes[bytes.len() - 400..]).unwrap().digest();
    assert_ne!(want, first["w"]);
    assert_eq!(digests()["w"], want, "the digest of words that are there no more was believed");
}

#[test]
fn where_times_do_not_tell_bases_are_read_every_time() {
    // tmpfs moves no times for stores through a mapping, however long ago the last one was.
    let shared = Path::new("/dev/shm");
    let Ok(dir) = tempfile::tempdir_in(shared) else { return println!("skipped: no {}", shared.display()) };
    let home = tempfile::tempdir().unwrap();
    let (path, cache) = (dir.path().join("m"), DigestCache::at(home.path().join("cache")));
    let first = checkpoint(&path, 1, &[("w", "F32", &[100])]);
    settle();
    let digests = || digest_files(&path, &cache, &run(1)).unwrap().into_iter().collect::<Digests>();
    assert_eq!(digests(), first);
    Mapping::of(&path).flip(fs::metadata(&path).unwrap().len() as usize - 1);
    assert_ne!(digests(), first, "the digest of words that are there no more was believed");
    assert!(entries(&home.path().join("cache")).is_empty());
}

#[test]
fn a_folder_that_another_user_made_or_could_replace_is_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let above = dir.path().join("above");
    let folder = above.join("cache");
    let (path, cache) = (dir.path().join("m"), DigestCache::at(&folder));
    let want = checkpoint(&path, 1, &[("w", "F32", &[100])]);
    settle();
    store(&cache, &path, &want);
    if entries(&folder).is_empty() {
        return println!("skipped: the file system of {} is none whose times tell", dir.path().display());
    }
    let entry = entries(&folder).pop().unwrap();
    assert_eq!(load(&cache, &path), Some(want.clone()));
    let mode = |at: &Path, mode: u32| fs::set_permissions(at, fs::Permissions::from_mode(mode)).unwrap();

    // Whoever may write to a folder above may put another one in its place, but where the sticky bit forbids that.
    mode(&above, 0o777);
    assert_eq!(load(&cache, &path), None, "believed in a folder that anybody may replace");
    fs::remove_file(&entry).unwrap();
    store(&cache, &path, &want);
    assert!(entries(&folder).is_empty(), "kept in a folder that anybody may replace");
    mode(&above, 0o1777);
    store(&cache, &path, &want);
    assert_eq!(load(&cache, &path), Some(want.clone()));
    mode(&above, 0o755);

    // An entry with a second name may be written to elsewhere.
    fs::hard_link(&entry, dir.path().join("elsewhere")).unwrap();
    assert_eq!(load(&cache, &path), None);
    fs::remove_file(dir.path().join("elsewhere")).unwrap();
    assert_eq!(load(&cache, &path), Some(want.clone()));

    // Another user's folder, entry, or folder above.
    let give = |at: &Path, user: u32| std::os::unix::fs::chown(at, Some(user), None).is_ok();
    if !give(&folder, 12_345) {
        return println!("skipped: only root may give files away");
    }
    assert_eq!(load(&cache, &path), None, "another user's folder");
    assert!(give(&entry, 12_345));
    assert_eq!(load(&cache, &path), None, "another user's folder and entry");
    assert!(give(&folder, 0));
    assert_eq!(load(&cache, &path), None, "another user's entry");
    assert!(give(&entry, 0) && give(&above, 12_345));
    assert_eq!(load(&cache, &path), None, "another user's folder above");
    assert!(give(&above, 0));
    assert_eq!(load(&cache, &path), Some(want));
}
