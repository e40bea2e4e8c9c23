//! Outputs that appear whole or not at all: made without a name (or under a temporary one) in the target's own folder,
//! synced, and given their name at once. A killed process leaves the old file or none; what it may leave under a temporary
//! name is removed by the next one that writes to the same name.

use crate::error::{Error, Result};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, linkat, open};
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes copied at once.
const COPIED: usize = 1 << 20;

pub(super) fn within(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |e| Error::from(e).within(path.display())
}

/// The folder that `path` lies in.
pub(super) fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Sync a folder, so that the names in it outlive a power cut; as far as its file system does so. CIFS and many FUSE file systems
/// refuse to, and some let nobody read a folder that may be written to. The files in it are synced all the same.
fn sync_folder(path: &Path) -> io::Result<()> {
    Home::open(path)?.sync()
}

/// A folder to be synced, opened before anything is named in it: after that nothing may fail for want of a file descriptor.
/// `None` where the file system lets nobody read it.
struct Home(Option<File>);

impl Home {
    fn open(path: &Path) -> io::Result<Self> {
        match File::open(path) {
            Err(e) if refuses(&e) => Ok(Self(None)),
            opened => opened.map(|folder| Self(Some(folder))),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self.0.as_ref().map_or(Ok(()), File::sync_all) {
            Err(e) if refuses(&e) => Ok(()),
            done => done,
        }
    }
}

/// Whether a file system does not do what was asked of it at all, rather than having failed at it.
pub(crate) fn refuses(e: &io::Error) -> bool {
    let codes = [
        libc::EINVAL,
        libc::ENOTSUP,
        libc::EOPNOTSUPP,
        libc::ENOSYS,
        libc::ENOTTY,
        libc::ENOLCK,
        libc::EPERM,
        libc::EACCES,
        libc::EBADF,
        libc::EISDIR,
    ];
    e.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// A file without a name in `dir`. It is gone when it is closed, however that comes about.
pub(super) fn nameless(dir: &Path) -> io::Result<File> {
    let fd = open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o666))?;
    Ok(File::from(fd))
}

/// The start of the temporary names of `path`: `.NAME.tmp-`.
fn prefix(path: &Path) -> Result<OsString> {
    let name =
        path.file_name().ok_or_else(|| Error::invalid(format!("{}: not a file name", path.display())))?;
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".tmp-");
    Ok(prefix)
}

/// `.NAME.tmp-PID-RANDOM` beside `path`, and what `make` makes of it; never something that exists.
pub(super) fn temporary<T>(
    path: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> Result<(T, PathBuf)> {
    let prefix = prefix(path)?;
    let mut last = io::Error::from(ErrorKind::AlreadyExists);
    for _ in 0..16 {
        // The standard library's own seeded hasher is random enough for a name that is refused if it exists.
        let random = std::hash::RandomState::new().build_hasher().finish();
        let mut name = prefix.clone();
        name.push(format!("{}-{random:016x}", std::process::id()));
        let temp = folder(path).join(name);
        match make(&temp) {
            Ok(made) => return Ok((made, temp)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => last = e,
            Err(e) => return Err(within(path)(e)),
        }
    }
    Err(within(path)(last))
}

/// Open what is there, but no link, and wait for nobody: what was a file may have become a pipe since it was looked at.
fn open_at_once(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(open(path, flags, Mode::empty())?))
}

/// Remove what killed processes left under temporary names of `path`: not locked, and of a process that is no more.
fn sweep(path: &Path) {
    let Ok(prefix) = prefix(path) else { return };
    let Ok(list) = std::fs::read_dir(folder(path)) else { return };
    for entry in list.flatten() {
        let name = entry.file_name().into_vec();
        let Some(rest) = name.strip_prefix(prefix.as_bytes()) else { continue };
        let pid: Vec<u8> = rest.iter().copied().take_while(u8::is_ascii_digit).collect();
        let ours = rest.get(pid.len()) == Some(&b'-') && rest.len() == pid.len() + 17 && !pid.is_empty();
        let alive = Path::new("/proc").join(OsStr::from_bytes(&pid)).exists();
        if !ours || alive || !Path::new("/proc/self").exists() {
            continue;
        }
        // Killed runs leave files and folders. Anything else is somebody else's, and a pipe would wait for its writer.
        let Ok(kind) = entry.file_type() else { continue };
        if !kind.is_file() && !kind.is_dir() {
            continue;
        }
        let unlocked = |f: &File| flock(f, FlockOperation::NonBlockingLockExclusive).is_ok();
        if open_at_once(&entry.path()).is_ok_and(|f| unlocked(&f)) {
            // What cannot be removed stays; it is in nobody's way.
            let _ = match kind.is_dir() {
                true => std::fs::remove_dir_all(entry.path()),
                false => std::fs::remove_file(entry.path()),
            };
        }
    }
}

/// Refuse a `path` that is there and no regular file: a rename would put a file in the place of a pipe, or of `/dev/null`.
pub(crate) fn check_target(path: &Path) -> Result<()> {
    let what = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => "is a directory; name a file",
        Ok(found) if !found.is_file() => "is no regular file; name one, or `-` for standard output",
        Ok(_) => return Ok(()),
        Err(_) if !folder(path).exists() => {
            let what = format!("its folder {} does not exist; make it first", folder(path).display());
            return Err(Error::io(what).within(path.display()));
        }
        Err(_) => return Ok(()),
    };
    Err(Error::invalid(what).within(path.display()))
}

/// A file being written; it has no name, or is removed, unless [`Output::commit`] is reached.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    path: PathBuf,
    /// Its temporary name, where the file system has no nameless files.
    temp: Option<PathBuf>,
}

impl Output {
    /// Open a new file that will appear at `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        check_target(path)?;
        prefix(path)?;
        sweep(path);
        if Path::new("/proc/self/fd").exists()
            && let Ok(file) = nameless(folder(path))
        {
            // For the moment in which it has a temporary name: others then see that it is somebody's.
            let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
            return Ok(Self { file, path: path.into(), temp: None });
        }
        let (file, temp) = temporary(path, |temp| {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(temp)?;
            let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
            Ok(file)
        })?;
        Ok(Self { file, path: path.into(), temp: Some(temp) })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A copy of a nameless file, under a temporary name.
    fn copy(&self) -> Result<PathBuf> {
        let (copy, temp) = temporary(&self.path, |temp| {
            let copy = OpenOptions::new().write(true).create_new(true).open(temp)?;
            let _ = flock(&copy, FlockOperation::NonBlockingLockExclusive);
            Ok(copy)
        })?;
        let fill = || {
            let (mut room, mut at) = (vec![0; COPIED], 0);
            loop {
                let n = self.file.read_at(&mut room, at)?;
                if n == 0 {
                    return copy.sync_all();
                }
                copy.write_all_at(&room[..n], at)?;
                at += n as u64;
            }
        };
        let filled: io::Result<()> = fill();
        if filled.is_err() {
            let _ = std::fs::remove_file(&temp);
        }
        filled.map_err(within(&self.path)).map(|()| temp)
    }

    /// Sync the file, give it its name, sync the folder.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.file.sync_all().map_err(within(&self.path))?;
        let home = Home::open(folder(&self.path)).map_err(within(&self.path))?;
        let temp = match self.temp.take() {
            Some(temp) => temp,
            None => {
                let nameless = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
                let link = |to: &Path| {
                    linkat(CWD, &nameless, CWD, to, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from)
                };
                match link(&self.path) {
                    Ok(()) => return home.sync().map_err(within(&self.path)),
                    Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                        temporary(&self.path, |temp| link(temp))?.1
                    }
                    // The file system has no links, or `/proc` is not what it should be: its bytes get a name in a copy.
                    Err(e) if refuses(&e) || e.kind() == ErrorKind::NotFound => self.copy()?,
                    Err(e) => return Err(within(&self.path)(e)),
                }
            }
        };
        let renamed = std::fs::rename(&temp, &self.path);
        if renamed.is_err() {
            self.temp = Some(temp);
        }
        renamed.and_then(|()| home.sync()).map_err(within(&self.path))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(temp) = &self.temp {
            // Nothing can be done about a failure here: the error that led here is the one to report.
            let _ = std::fs::remove_file(temp);
        }
    }
}

/// A folder being filled under a temporary name; removed unless [`OutputFolder::commit`] is reached.
#[derive(Debug)]
pub(crate) struct OutputFolder {
    path: PathBuf,
    temp: PathBuf,
    /// Held for its lock, and as the one file descriptor that is needed to remove the folder.
    lock: Option<File>,
    committed: bool,
}

impl OutputFolder {
    /// Begin a folder that will appear at `path`, which must not exist or be empty.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        // `out/` and `out` are one folder, and only the second has a name to put another one beside.
        let path: PathBuf = path.components().collect();
        match std::fs::read_dir(&path) {
            Ok(mut list) => {
                if let Some(entry) = list.next() {
                    let found = entry.map_err(within(&path))?.file_name();
                    return Err(Error::invalid(format!(
                        "is not empty (it holds `{}`); name a new folder, or remove this one first",
                        found.display()
                    ))
                    .within(path.display()));
                }
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if e.kind() == ErrorKind::NotADirectory => {
                return Err(Error::invalid("is a file, but a folder is to be written").within(path.display()));
            }
            Err(e) => return Err(within(&path)(e)),
        }
        prefix(&path)?;
        sweep(&path);
        let (lock, temp) = temporary(&path, |temp| {
            std::fs::create_dir(temp)?;
            // Too many open files, perhaps: a folder that is nobody's must not stay.
            let lock = open_at_once(temp).inspect_err(|_| drop(std::fs::remove_dir(temp)))?;
            let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
            Ok(lock)
        })?;
        Ok(Self { path, temp, lock: Some(lock), committed: false })
    }

    /// A new file in it; `relative` has been checked to stay inside.
    pub(crate) fn file(&self, relative: &Path) -> Result<File> {
        let path = self.temp.join(relative);
        let create = || {
            std::fs::create_dir_all(folder(&path))?;
            OpenOptions::new().read(true).write(true).create_new(true).open(&path)
        };
        create().map_err(within(&self.path.join(relative)))
    }

    /// Sync all folders, give the whole its name, sync the folder that it is in. Files are synced by those who wrote them.
    pub(crate) fn commit(mut self) -> Result<()> {
        let rename = || {
            sync_tree(&self.temp)?;
            let home = Home::open(folder(&self.path))?;
            std::fs::rename(&self.temp, &self.path)?;
            home.sync()
        };
        rename().map_err(within(&self.path))?;
        self.committed = true;
        Ok(())
    }
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(dir)
}

/// Remove a folder that this process made, with one file open at a time: `remove_dir_all` holds one for each level, and may
/// be called because no more are to be had.
fn remove_tree(dir: &Path) -> io::Result<()> {
    // Entries hold the folder open that they are of.
    let named = |entry: io::Result<std::fs::DirEntry>| {
        entry.and_then(|entry| Ok((entry.path(), entry.file_type()?.is_dir())))
    };
    let inside = std::fs::read_dir(dir)?.map(named).collect::<io::Result<Vec<_>>>()?;
    for (path, folder) in inside {
        if folder { remove_tree(&path) } else { std::fs::remove_file(&path) }?;
    }
    std::fs::remove_dir(dir)
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if !self.committed {
            drop(self.lock.take());
            if std::fs::remove_dir_all(&self.temp).is_err() {
                let _ = remove_tree(&self.temp);
            }
        }
    }
}
