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
    fn devices_and_folders_are_refused() {
        for path in ["/dev/zero", "/dev/null", env!("CARGO_MANIFEST_DIR")] {
            assert!(open_regular(Path::new(path)).is_err(), "{path}");
        }
        assert!(open_regular(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))).is_ok());
    }
}
