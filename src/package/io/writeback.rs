//! Writing to disk begins while a file is still being made, so that little is left to wait for when it is synced.

use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::num::NonZeroU64;

/// Bytes handed to the disk at once.
const STRIDE: u64 = 32 << 20;

/// A file that is written from its start to its end, as far as its writing to disk has begun.
pub(crate) struct Writeback<'a> {
    file: &'a File,
    begun: u64,
}

impl<'a> Writeback<'a> {
    pub(crate) fn of(file: &'a File) -> Self {
        Self { file, begun: 0 }
    }

    /// All before byte `end` has been written to the file. Nothing waits for the disk here, and no failure of it is told: that is
    /// for who syncs the file.
    ///
    /// The system is told that these pages are not needed any more. Linux begins to write such pages to disk, and keeps those
    /// that it is still writing.
    pub(crate) fn until(&mut self, end: u64) {
        if let Some(bytes) = NonZeroU64::new(end.saturating_sub(self.begun)).filter(|n| n.get() >= STRIDE) {
            let _ = fadvise(self.file, self.begun, Some(bytes), Advice::DontNeed);
            self.begun = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::{Read, Seek, Write};
    use std::os::fd::OwnedFd;

    #[test]
    fn what_is_being_written_to_disk_stays_what_it_was_and_nothing_is_begun_twice() {
        let path = std::env::temp_dir().join(format!("xorz-writeback-{}", std::process::id()));
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        let words: Vec<u8> = (0..3 * STRIDE as usize + 5).map(|i| ((i * i) >> 9) as u8).collect();
        let mut other = file.try_clone().unwrap();
        let (mut early, mut begun) = (Writeback::of(&file), vec![]);
        for part in words.chunks(STRIDE as usize * 2 / 3) {
            other.write_all(part).unwrap();
            early.until(other.stream_position().unwrap());
            begun.push(early.begun);
        }
        // A file put together in another order than it is said to be: an end before what was begun.
        early.until(7);
        let step = STRIDE * 2 / 3;
        assert_eq!(begun, [0, 2 * step, 2 * step, 4 * step, 4 * step].map(|n| n.min(words.len() as u64)));
        let mut found = vec![];
        file.rewind().unwrap();
        file.read_to_end(&mut found).unwrap();
        assert!(found == words);
    }

    #[test]
    fn where_the_system_cannot_begin_it_is_left_to_who_syncs() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let pipe = File::from(OwnedFd::from(writer));
        Writeback::of(&pipe).until(STRIDE);
    }
}
