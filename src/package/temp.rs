//! Output files that appear whole or not at all: a temporary name in the same folder, synced, renamed.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file being written; removed unless [`Output::commit`] is reached.
#[derive(Debug)]
pub(super) struct Output {
    file: BufWriter<File>,
    temp: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl Output {
    /// Open a new temporary file beside `path`.
    pub(super) fn create(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::invalid("is a directory; name a file").within(path.display()));
        }
        let (file, temp) = temporary(path)?;
        Ok(Self { file: BufWriter::with_capacity(1 << 20, file), temp, path: path.into(), committed: false })
    }

    /// Sync the file, give it its name, sync the folder.
    pub(super) fn commit(mut self) -> Result<()> {
        self.rename().map_err(|e| Error::from(e).within(self.path.display()))
    }

    fn rename(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        std::fs::rename(&self.temp, &self.path)?;
        self.committed = true;
        File::open(folder(&self.path))?.sync_all()
    }
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here: the error that led here is the one to report.
            let _ = std::fs::remove_file(&self.temp);
        }
    }
}

/// A nameless file in `path`'s folder, for bytes whose place in the output is not known yet. A killed process leaves nothing.
pub(super) fn spool(path: &Path) -> Result<File> {
    let (file, temp) = temporary(path)?;
    std::fs::remove_file(&temp).map_err(|e| Error::from(e).within(temp.display()))?;
    Ok(file)
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Create `.NAME.tmp-PID-RANDOM` beside `path`; never opens a file that exists.
fn temporary(path: &Path) -> Result<(File, PathBuf)> {
    let name =
        path.file_name().ok_or_else(|| Error::invalid(format!("{}: not a file name", path.display())))?;
    let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
    for _ in 0..16 {
        // The standard library's own seeded hasher is random enough for a name that O_EXCL protects.
        let random = std::hash::RandomState::new().build_hasher().finish();
        let mut temp = OsString::from(".");
        temp.push(name);
        temp.push(format!(".tmp-{}-{random:016x}", std::process::id()));
        let temp = folder(path).join(temp);
        match OpenOptions::new().read(true).write(true).create_new(true).open(&temp) {
            Ok(file) => return Ok((file, temp)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => last = e,
            Err(e) => return Err(Error::from(e).within(path.display())),
        }
    }
    Err(Error::from(last).within(path.display()))
}
