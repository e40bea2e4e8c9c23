//! `-` as an input or output: standard input spooled to where it can be read at any place, standard output as
//! a stream.

use crate::job::Failure;
use crate::print;
use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use xorz::error::{Error, Result};
use xorz::package::Destination;

/// What an input from standard input is called, in packages and messages.
const STDIN: &str = "stdin.safetensors";

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Inputs, one of which may be standard input.
pub(crate) struct Inputs {
    spool: Option<Spool>,
}

/// Standard input in a nameless file in $TMPDIR, of which a killed run leaves nothing. It is opened again
/// through a link in a folder of its own, so that it has a name, the same one every time.
struct Spool {
    _file: File,
    folder: TempDir,
}

impl Inputs {
    /// Read standard input if one of `paths` is `-`.
    pub(crate) fn of(paths: &[&Path]) -> Result<Self> {
        match paths.iter().filter(|p| is_dash(p)).count() {
            0 => Ok(Self { spool: None }),
            1 => Ok(Self { spool: Some(Spool::read()?) }),
            n => Err(Error::invalid(format!(
                "{n} inputs are `-`, but there is one standard input; name files for the others"
            ))),
        }
    }

    /// Where to read what the user called `path`.
    pub(crate) fn path(&self, path: &Path) -> PathBuf {
        match &self.spool {
            Some(spool) if is_dash(path) => spool.path(),
            _ => path.into(),
        }
    }

    /// What to call `path` in a report.
    pub(crate) fn name(&self, path: &Path) -> String {
        if is_dash(path) { "from standard input".into() } else { print::name(&path.display().to_string()) }
    }

    /// The failure in the user's words.
    pub(crate) fn told(&self, e: Error) -> Failure {
        let mut failure = Failure::from(e);
        if let Some(spool) = &self.spool {
            failure.text = failure.text.replace(&*spool.path().to_string_lossy(), "standard input");
        }
        failure
    }
}

impl Spool {
    fn read() -> Result<Self> {
        if stdin().is_terminal() {
            return Err(Error::invalid("standard input is a terminal; pipe a file into it, or name one"));
        }
        let within = |e: std::io::Error| {
            let place = std::env::temp_dir();
            Error::from(e).within(format_args!(
                "standard input cannot be kept in {} (set TMPDIR to a folder with room)",
                place.display()
            ))
        };
        let mut file = tempfile::tempfile().map_err(within)?;
        std::io::copy(&mut stdin().lock(), &mut file).map_err(within)?;
        let folder = tempfile::Builder::new().prefix("xorz-").tempdir().map_err(within)?;
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::os::unix::fs::symlink(open, folder.path().join(STDIN)).map_err(within)?;
        Ok(Self { _file: file, folder })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(STDIN)
    }
}

/// Where a result goes: a path, or standard output.
pub(crate) enum Output<'a> {
    Path(&'a Path),
    Stdout(File),
}

impl<'a> Output<'a> {
    /// What the user means by `path`, which `option` gave; with `json`, standard output is taken.
    pub(crate) fn of(path: &'a Path, json: bool, option: &str) -> Result<Self> {
        if !is_dash(path) {
            return Ok(Self::Path(path));
        }
        if json {
            let name = option.trim_end_matches(" -");
            return Err(Error::invalid(format!(
                "--json and `{option}` both want standard output; name a file with {name}, or drop --json"
            )));
        }
        if stdout().is_terminal() {
            let name = option.trim_end_matches(" -");
            return Err(Error::invalid(format!(
                "standard output is a terminal; redirect it, or name a file with {name}"
            )));
        }
        let own = stdout().as_fd().try_clone_to_owned();
        Ok(Self::Stdout(own.map_err(|e| Error::from(e).within("standard output"))?.into()))
    }

    /// The destination as the library takes it.
    pub(crate) fn destination(&mut self) -> Destination<'_> {
        match self {
            Self::Path(path) => Destination::Path(path),
            Self::Stdout(file) => Destination::Stream(file),
        }
    }

    /// Whether standard output carries the result.
    pub(crate) fn is_stdout(&self) -> bool {
        matches!(self, Self::Stdout(_))
    }
}
