//! Files that many jobs read in about the same order: what one of them has read, the others get from memory. Long reads take
//! whole blocks, of which those used last stay; short ones, which jobs that sample a file repeat exactly, are kept as they are.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Bytes of a block: about a piece of a tensor.
const BLOCK: u64 = 512 << 10;
/// Blocks that are kept, and how many more for each thread, which may be in the middle of two or three.
const BLOCKS: usize = 64;
const BLOCKS_PER_THREAD: usize = 4;
/// Reads shorter than this are samples, and kept as they are.
const SHORT: usize = 64 << 10;
/// Bytes of short reads that are kept, and what one takes beside its bytes.
const SHORTS: usize = 16 << 20;
const SHORT_COST: usize = 128;

/// What is kept of all files that share it.
#[derive(Debug)]
pub(crate) struct ReadCache {
    blocks: usize,
    kept: Mutex<KeptReads>,
    /// Bytes that were read from files.
    read: AtomicU64,
}

#[derive(Debug, Default)]
struct KeptReads {
    clock: u64,
    /// By file and number: the block, and when it was used last.
    blocks: HashMap<(u32, u64), (Arc<Block>, u64)>,
    /// By file, offset and length.
    shorts: HashMap<(u32, u64, usize), Arc<[u8]>>,
    short_bytes: usize,
}

impl KeptReads {
    fn found(&mut self, key: (u32, u64)) -> Option<Arc<Block>> {
        self.clock += 1;
        let (block, used) = self.blocks.get_mut(&key)?;
        *used = self.clock;
        Some(Arc::clone(block))
    }
}

/// Empty until whoever made it has read it; others wait for that.
type Block = RwLock<Vec<u8>>;

impl ReadCache {
    /// For so many threads.
    pub(crate) fn new(threads: usize) -> Self {
        let blocks = BLOCKS + BLOCKS_PER_THREAD * threads;
        Self { blocks, kept: Mutex::default(), read: AtomicU64::new(0) }
    }

    /// Bytes that were read from files so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn kept(&self) -> MutexGuard<'_, KeptReads> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block of that number, if it is kept.
    fn found(&self, key: (u32, u64)) -> Option<Arc<Block>> {
        self.kept().found(key)
    }

    /// The block of that number, which may be empty; in place of the one that was used longest ago.
    fn block(&self, key: (u32, u64)) -> Arc<Block> {
        let mut kept = self.kept();
        if let Some(block) = kept.found(key) {
            return block;
        }
        if kept.blocks.len() >= self.blocks
            && let Some(oldest) = kept.blocks.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key)
        {
            kept.blocks.remove(&oldest);
        }
        let (block, now) = (Arc::new(Block::default()), kept.clock);
        kept.blocks.insert(key, (Arc::clone(&block), now));
        block
    }

    fn keep_short(&self, key: (u32, u64, usize), bytes: &[u8]) {
        let mut kept = self.kept();
        // Samples of one tensor are repeated soon or never.
        if kept.short_bytes > SHORTS {
            kept.shorts.clear();
            kept.short_bytes = 0;
        }
        if kept.shorts.insert(key, bytes.into()).is_none() {
            kept.short_bytes += bytes.len() + SHORT_COST;
        }
    }
}

/// An open file whose reads go through a cache.
#[derive(Debug)]
pub(crate) struct SharedFile {
    pub(crate) file: File,
    /// Its number among the files of the cache, and its length.
    number: u32,
    bytes: u64,
    cache: Arc<ReadCache>,
}

impl SharedFile {
    /// File `number` of those of `cache`; it has `bytes` bytes.
    pub(crate) fn new(file: File, number: u32, bytes: u64, cache: &Arc<ReadCache>) -> Self {
        Self { file, number, bytes, cache: Arc::clone(cache) }
    }

    /// Fill `out` from byte `at` on.
    pub(crate) fn read_exact_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        if out.len() < SHORT { self.short(out, at) } else { self.long(out, at) }
    }

    /// Bytes of a tensor, however few: its neighbours are wanted next.
    pub(crate) fn long(&self, out: &mut [u8], mut at: u64) -> io::Result<()> {
        let mut rest = out;
        while !rest.is_empty() {
            let (number, from) = (at / BLOCK, (at % BLOCK) as usize);
            let n = rest.len().min(BLOCK as usize - from);
            let (now, later) = rest.split_at_mut(n);
            self.of_block(number, from, now)?;
            (rest, at) = (later, at + n as u64);
        }
        Ok(())
    }

    fn of_block(&self, number: u64, from: usize, out: &mut [u8]) -> io::Result<()> {
        let block = self.cache.block((self.number, number));
        if copy_of(&block.read().unwrap_or_else(PoisonError::into_inner), from, out) {
            return Ok(());
        }
        let mut held = block.write().unwrap_or_else(PoisonError::into_inner);
        if held.is_empty() {
            let start = number * BLOCK;
            let mut bytes = vec![0; self.bytes.saturating_sub(start).min(BLOCK) as usize];
            self.read(&mut bytes, start)?;
            *held = bytes;
        }
        if copy_of(&held, from, out) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn short(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        let key = (self.number, at, out.len());
        if let Some(kept) = self.cache.kept().shorts.get(&key) {
            out.copy_from_slice(kept);
            return Ok(());
        }
        let (number, from) = (at / BLOCK, (at % BLOCK) as usize);
        if let Some(block) = self.cache.found((self.number, number))
            && copy_of(&block.read().unwrap_or_else(PoisonError::into_inner), from, out)
        {
            return Ok(());
        }
        self.read(out, at)?;
        self.cache.keep_short(key, out);
        Ok(())
    }

    fn read(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(out, at)?;
        self.cache.read.fetch_add(out.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Fill `out` from byte `from` of `block` on, if it has those bytes.
fn copy_of(block: &[u8], from: usize, out: &mut [u8]) -> bool {
    let found = block.get(from..).and_then(|rest| rest.get(..out.len()));
    found.is_some_and(|bytes| {
        out.copy_from_slice(bytes);
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Write;

    /// An open file without a name, which nobody has to remove.
    fn nameless(test: &str) -> File {
        let path = std::env::temp_dir().join(format!("xorz-shared-{test}-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn every_read_gives_the_files_bytes_and_each_byte_is_read_once_by_any_number_of_readers() {
        let bytes: Vec<u8> = (0..3 * BLOCK + 77).map(|i| ((i * i) >> 7) as u8).collect();
        let mut file = nameless("reads");
        file.write_all(&bytes).unwrap();
        let cache = Arc::new(ReadCache::new(4));
        let shared = SharedFile::new(file, 7, bytes.len() as u64, &cache);
        let read = |at: usize, n: usize| {
            let mut out = vec![1; n];
            shared.read_exact_at(&mut out, at as u64).unwrap();
            assert!(out == bytes[at..at + n], "{n} bytes from {at}");
        };
        std::thread::scope(|scope| {
            (0..4).for_each(|_| {
                scope.spawn(|| (0..bytes.len() - SHORT).step_by(70_001).for_each(|at| read(at, SHORT)));
            });
        });
        read(0, bytes.len());
        assert_eq!(cache.bytes_read(), bytes.len() as u64);
        read(5, 100);
        read(bytes.len() - 3, 3);
        assert_eq!(cache.bytes_read(), bytes.len() as u64, "what a block holds is not read again");
        let mut out = vec![0; SHORT];
        let past = shared.read_exact_at(&mut out, bytes.len() as u64 - 5);
        assert_eq!(past.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn no_more_is_kept_than_was_said_and_short_reads_are_repeated_from_memory() {
        let blocks = BLOCKS + 4 * BLOCKS_PER_THREAD + 9;
        let file = nameless("kept");
        file.set_len(blocks as u64 * BLOCK).unwrap();
        let cache = Arc::new(ReadCache::new(4));
        let shared = SharedFile::new(file, 0, blocks as u64 * BLOCK, &cache);
        let mut few = [0; 64];
        (0..5).for_each(|_| shared.read_exact_at(&mut few, 3 * BLOCK).unwrap());
        assert_eq!(cache.bytes_read(), 64);
        let mut room = vec![0; BLOCK as usize];
        (0..blocks).for_each(|i| shared.read_exact_at(&mut room, i as u64 * BLOCK).unwrap());
        assert_eq!(cache.kept().blocks.len(), BLOCKS + 4 * BLOCKS_PER_THREAD);
        let before = cache.bytes_read();
        (0..2 * SHORTS / 1000).for_each(|i| {
            shared.read_exact_at(&mut room[..1000], i as u64 * 1024 % (4 * BLOCK)).unwrap();
        });
        assert!(cache.kept().short_bytes <= SHORTS + 2 * 1128 && cache.bytes_read() > before);
    }
}
