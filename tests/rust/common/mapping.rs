//! A file that is written to through a shared mapping, which need not move its times.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

/// A writable shared mapping of a whole file.
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    /// Map the file at `path`, whose pages are then written to and to be written to disk.
    pub fn of(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = fs::metadata(path).unwrap().len() as usize;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of an open file; the result is checked, and unmapped when this is dropped.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert!(start != libc::MAP_FAILED);
        Self { start: start.cast(), len }
    }

    /// Change byte `at`.
    pub fn flip(&mut self, at: usize) {
        assert!(at < self.len);
        // SAFETY: within the mapping; nobody else in this process refers to its bytes.
        unsafe {
            let byte = self.start.add(at);
            byte.write_volatile(byte.read_volatile() ^ 1);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
