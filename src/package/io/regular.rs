//! Opening files to read: regular ones alone, and without waiting for anybody.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Open a regular file. What was one when it was looked at may be a pipe by now: opening that would wait for its writer.
///
/// # Errors
/// `Io`; `InvalidArgument` for anything else than a regular file. Messages do not name the path.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(Error::invalid("is not a regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_and_devices_are_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [pipe.as_path(), Path::new("/dev/zero"), dir.path()] {
            assert!(open_regular(path).is_err(), "{}", path.display());
        }
        std::fs::write(dir.path().join("file"), b"x").unwrap();
        assert!(open_regular(&dir.path().join("file")).is_ok());
    }
}
