//! Digests of base tensors, kept between runs in the user's cache folder, one small JSON file for each checkpoint file.
//!
//! A base is gigabytes and rarely changes; its digests are kilobytes. What is kept counts only while the file is the same
//! one: path, device, inode, length and both times. So it is kept only where each change moves the times: on file systems
//! that are known to move them for writes through a shared mapping, too, and after what was written through one has
//! reached the disk ([`Identity::watched`]). Everywhere else bases are read each time.
//!
//! A cache never makes a job fail: entries that are missing, broken, huge or not the user's own are ignored and made again,
//! and where nothing can be written nothing is kept. Whoever may write to the folder may choose the digests: it counts
//! only if nobody but the user and root may write to it, or put another one in its place.

use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::format::record::to_json;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use xxhash_rust::xxh3::xxh3_128;

/// How many entries are kept. Beyond that, those that were used longest ago are removed.
const MAX_ENTRIES: usize = 1000;
/// The longest entry that is read or written, in bytes: some 200,000 tensors.
const MAX_ENTRY_BYTES: u64 = 16 << 20;
/// A file that changed less than this before it was read may change again without its times telling.
const RACY: Duration = Duration::from_secs(2);
/// Temporary files of killed runs are removed when they are older than this.
const STALE: Duration = Duration::from_secs(3600);
/// Version of the entries; those of another version are ignored.
const VERSION: u32 = 1;

/// File systems, by the number that `fstatfs` gives, where the first store to a page through a shared mapping moves the
/// file's times, and the first one after each time that the page was written to disk: ext2 to ext4, XFS, btrfs, F2FS.
/// tmpfs never moves them, and of files that lie elsewhere (NFS, FUSE, overlays) nobody here can know.
const WATCHED: [u64; 4] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010];

/// What tells one state of a file from another without reading it. Taken before a file is read, and again after.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    key: Key,
    /// Whether each change from now on gives another identity.
    settled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Key {
    fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Identity {
    /// The identity of an open file now.
    ///
    /// # Errors
    /// `Io` if the system does not tell.
    pub fn of(file: &File) -> Result<Self> {
        Ok(Self { key: Key::of(&file.metadata().map_err(Error::from)?), settled: false })
    }

    /// The identity of an open file from now on, by which digests of what is read after this may be kept: `None` where a
    /// change need not be seen in it, because the file changed less than two seconds ago, or lies on a file system that
    /// does not tell, or its pages cannot be written to disk.
    pub fn watched(file: &File) -> Option<Self> {
        if !known(file) || !old_enough(&file.metadata().ok()?) {
            return None;
        }
        // A page that is still to be written to disk may be changed through a mapping without a trace. Once it has been,
        // the next store to it is noticed.
        file.sync_data().ok()?;
        Some(Self { settled: true, ..Self::of(file).ok()? })
    }

    /// Whether this is the same state of the same file.
    pub fn same(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

/// Whether the times of a file tell of each change to it.
fn known(file: &File) -> bool {
    let number = rustix::fs::fstatfs(file).ok().and_then(|found| u64::try_from(found.f_type).ok());
    number.is_some_and(|number| WATCHED.contains(&number))
}

/// Whether a file has not changed for so long that a change from now on moves its times.
fn old_enough(meta: &Metadata) -> bool {
    // The time of change, unlike that of modification, cannot be set back. One in the future has not settled either.
    let nanoseconds = u32::try_from(meta.ctime_nsec()).unwrap_or(0);
    let changed = u64::try_from(meta.ctime()).ok().map(|s| UNIX_EPOCH + Duration::new(s, nanoseconds));
    let age = changed.and_then(|c| SystemTime::now().duration_since(c).ok());
    meta.is_file() && age.is_some_and(|age| age >= RACY)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CacheBody {
    version: u32,
    path: String,
    file: Key,
    digests: BTreeMap<String, String>,
}

/// `check` is the xxh3-128 of the body's JSON text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    check: String,
    body: CacheBody,
}

/// A folder of digests, or none.
#[derive(Clone, Debug, Default)]
pub struct DigestCache {
    folder: Option<PathBuf>,
}

impl DigestCache {
    /// The user's cache: `$XORZ_CACHE_DIR`, else `$XDG_CACHE_HOME/xorz`, else `~/.cache/xorz`. An empty `XORZ_CACHE_DIR`
    /// turns it off.
    pub fn user() -> Self {
        if let Some(own) = std::env::var_os("XORZ_CACHE_DIR") {
            return if own.is_empty() { Self::off() } else { Self::at(own) };
        }
        // As the XDG specification says, a path that is not absolute counts for nothing.
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        Self { folder: cache.map(|c| c.join("xorz")) }
    }

    /// A cache in `folder`, which is made when there is something to keep.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()) }
    }

    /// No cache: nothing is found and nothing kept.
    pub fn off() -> Self {
        Self::default()
    }

    /// [`Identity::watched`], where there is a cache to keep anything in.
    pub fn watched(&self, file: &File) -> Option<Identity> {
        self.folder.as_ref().and_then(|_| Identity::watched(file))
    }

    /// The digests kept for `file`, opened at `path`: `None` unless path, device, inode, length, time of modification and
    /// time of change are all as they were, and each change would have moved one of them.
    pub fn load(&self, path: &Path, file: &File) -> Option<BTreeMap<String, Digest>> {
        let folder = self.folder.as_deref().filter(|_| known(file))?;
        let path = path.canonicalize().ok()?;
        let wanted = Key::of(&file.metadata().ok()?);
        let (entry, text) = read_entry(folder, &entry_name(&path))?;
        let kept: Kept = serde_json::from_slice(&text).ok()?;
        // Only what is written as this code writes it is believed, word by word: the check is of the words that were
        // understood, and would not see others beside them.
        if to_json(&kept).ok()?.as_bytes() != text {
            return None;
        }
        let body = kept.body;
        if body.version != VERSION || body.file != wanted || body.path != path.to_string_lossy() {
            return None;
        }
        if kept.check != check(&body)? {
            return None;
        }
        // The entry was used now, so that it is removed last. A folder that may only be read is no reason to fail.
        let _ = entry.set_modified(SystemTime::now());
        body.digests.into_iter().map(|(name, hex)| Some((name, Digest::from_hex(&hex)?))).collect()
    }

    /// Keep the digests of `file`, opened at `path`, whose identity was `before` when its reading began. Nothing is kept if
    /// the file is another by now, if `before` is none of [`Identity::watched`], or if the folder is not the user's own or
    /// cannot be written to.
    pub fn store(&self, path: &Path, file: &File, before: &Identity, digests: &BTreeMap<String, Digest>) {
        // A cache that cannot be written keeps nothing; the job has what it needs all the same.
        let _ = self.try_store(path, file, before, digests);
    }

    fn try_store(
        &self,
        path: &Path,
        file: &File,
        before: &Identity,
        digests: &BTreeMap<String, Digest>,
    ) -> Result<()> {
        let Some(folder) = self.folder.as_deref() else { return Ok(()) };
        if !before.settled || !Identity::of(file)?.same(before) {
            return Ok(());
        }
        let path = path.canonicalize()?;
        let body = CacheBody {
            version: VERSION,
            path: path.to_string_lossy().into_owned(),
            file: before.key,
            digests: digests.iter().map(|(n, d)| (n.clone(), d.to_string())).collect(),
        };
        let check = check(&body).ok_or_else(|| Error::internal("the entry is not JSON"))?;
        let text = to_json(&Kept { check, body })?;
        if text.len() as u64 > MAX_ENTRY_BYTES {
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        if own_folder(folder).is_none() {
            return Ok(());
        }
        write_entry(folder, &entry_name(&path), text.as_bytes())?;
        prune(folder)?;
        Ok(())
    }
}

fn entry_name(path: &Path) -> String {
    format!("{:032x}.json", xxh3_128(path.as_os_str().as_bytes()))
}

fn check(body: &CacheBody) -> Option<String> {
    Some(format!("{:032x}", xxh3_128(to_json(body).ok()?.as_bytes())))
}

/// The user's number, if the folder is theirs, and neither it nor a folder above it may be written to by anyone but them and
/// root: who may write to one above could put another in its place. (In a folder with the sticky bit, such as `/tmp`, only
/// the owner of what lies there may do that.)
fn own_folder(folder: &Path) -> Option<u32> {
    let user = rustix::process::geteuid().as_raw();
    let real = folder.canonicalize().ok()?;
    let owned = |at: &Path, sticky: bool| {
        let meta = std::fs::metadata(at).ok()?;
        let private = meta.mode() & 0o022 == 0 || (sticky && meta.mode() & 0o1000 != 0);
        Some(private && [user, 0].contains(&meta.uid()) && meta.is_dir())
    };
    let mine = std::fs::metadata(&real).ok()?.uid() == user && owned(&real, false)?;
    let above = real.ancestors().skip(1).all(|at| owned(at, true) == Some(true));
    (mine && above).then_some(user)
}

/// An entry that is a file of ordinary length of the user's own, in a folder of the user's own.
fn read_entry(folder: &Path, name: &str) -> Option<(File, Vec<u8>)> {
    let user = own_folder(folder)?;
    // A link would lead elsewhere, a pipe would block.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(folder.join(name)).ok()?;
    let meta = file.metadata().ok()?;
    let private = meta.mode() & 0o022 == 0 && meta.uid() == user && meta.nlink() == 1;
    if !private || !meta.is_file() || meta.len() > MAX_ENTRY_BYTES {
        return None;
    }
    let mut text = Vec::new();
    (&file).take(MAX_ENTRY_BYTES).read_to_end(&mut text).ok()?;
    Some((file, text))
}

/// Written under another name and renamed: readers see a whole entry. Not synced: one lost to a power cut is made again, and
/// one cut short fails its check.
fn write_entry(folder: &Path, name: &str, text: &[u8]) -> io::Result<()> {
    let random = std::hash::RandomState::new().build_hasher().finish();
    let temp = folder.join(format!(".{name}.tmp-{}-{random:016x}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp)?;
    let done = file.write_all(text).and_then(|()| std::fs::rename(&temp, folder.join(name)));
    if done.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    done
}

/// Remove the entries used longest ago beyond [`MAX_ENTRIES`], and what killed runs left. Other files are left alone.
fn prune(folder: &Path) -> io::Result<()> {
    let mut entries = Vec::new();
    for item in std::fs::read_dir(folder)?.flatten() {
        let name = item.file_name();
        let Some(name) = name.to_str() else { continue };
        let entry = is_entry_name(name);
        let Some(used) = item.metadata().ok().and_then(|m| m.modified().ok()) else { continue };
        let left =
            name.strip_prefix('.').and_then(|n| n.split_once(".tmp-")).is_some_and(|(n, _)| is_entry_name(n));
        if left && used.elapsed().is_ok_and(|age| age > STALE) {
            let _ = std::fs::remove_file(item.path());
        } else if entry {
            entries.push((used, item.path()));
        }
    }
    let beyond = entries.len().saturating_sub(MAX_ENTRIES);
    entries.sort();
    entries.iter().take(beyond).for_each(|(_, path)| {
        let _ = std::fs::remove_file(path);
    });
    Ok(())
}

fn is_entry_name(name: &str) -> bool {
    name.strip_suffix(".json")
        .is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}
