//! Bytes on their way into an output: a nameless file that holds what has no place yet, and a file that is written in order.

use super::temp::{folder, nameless, temporary, within};
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes whose place in the output is not known yet: appended to a nameless file, read back when it is.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    buffer: Vec<u8>,
    /// Where the buffer's bytes belong.
    flushed: u64,
    /// Bytes that the buffer holds.
    room: usize,
}

impl Spool {
    const BUFFER: usize = 1 << 20;

    /// In the folder of `beside`, so that what fits here fits there, or among temporary files.
    pub(crate) fn create(beside: Option<&Path>) -> Result<Self> {
        let dir = beside.map_or_else(std::env::temp_dir, |p| folder(p).to_path_buf());
        let named = || {
            let (file, temp) = temporary(&dir.join("xorz-spool"), |temp| {
                OpenOptions::new().read(true).write(true).create_new(true).open(temp)
            })?;
            std::fs::remove_file(&temp).map_err(within(&temp))?;
            Ok(file)
        };
        let file = nameless(&dir).or_else(|_| named()).map_err(|e: Error| match beside {
            Some(path) => {
                Error::io(e.message()).within(format_args!("cannot write beside {}", path.display()))
            }
            None => e,
        })?;
        Ok(Self { file, buffer: Vec::new(), flushed: 0, room: Self::BUFFER })
    }

    /// The same with a buffer of so many bytes, where there are many.
    pub(crate) fn with_room(self, room: usize) -> Self {
        Self { room, ..self }
    }

    /// Bytes appended so far.
    pub(crate) fn len(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Append bytes.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.buffer.len() + bytes.len() > self.room {
            self.flush()?;
        }
        if bytes.len() >= self.room {
            self.file.write_all_at(bytes, self.flushed)?;
            self.flushed += bytes.len() as u64;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all_at(&self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Overwrite bytes that were appended.
    pub(crate) fn patch(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        Ok(self.file.write_all_at(bytes, at)?)
    }

    /// Forget what was appended from byte `len` on.
    pub(crate) fn truncate(&mut self, len: u64) -> Result<()> {
        self.flush()?;
        self.flushed = self.flushed.min(len);
        Ok(self.file.set_len(self.flushed)?)
    }

    /// Hand the bytes `range` to `take`, piece after piece.
    pub(crate) fn replay(
        &mut self,
        range: std::ops::Range<u64>,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.flush()?;
        let mut buffer = super::aligned::Aligned::default();
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(Self::BUFFER as u64) as usize;
            let room = buffer.room(n, at);
            self.file.read_exact_at(room, at)?;
            take(room)?;
            at += n as u64;
        }
        Ok(())
    }
}

/// A writer at the start of a file, buffered by the caller.
pub(crate) struct Sequential<'a> {
    file: &'a File,
    at: u64,
}

impl<'a> Sequential<'a> {
    /// From byte 0 on.
    pub(crate) fn new(file: &'a File) -> Self {
        Self { file, at: 0 }
    }
}

impl Write for Sequential<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
