//! Exchanges: where the words of two versions differ, and by what. In place one makes the new words of the old ones and, being
//! XOR, the old ones of the new. Only words that differ are touched, and each is compared with what it was; where one is not,
//! all of them are what they were again.
//!
//! They are for updates of a model that serves: all that takes long is done when one is made. Their bytes are no format: they
//! do not leave the process that made them, and another release may write others.
//!
//! **Layout.** A header: `XORZEXC\0`, the bytes of a word, how many words the matrix has, how many differ, and the bytes of all
//! that follows, each a u64. Then chunks of up to [`ENTRIES`] entries: the position of the first one and the number of entries,
//! as u64; the xxh3-64 of all that follows; the xxh3-128 of the old words and of the new. For each entry there follows a gap of one
//! byte from the one before, and then for each its words' XOR. A word that is the same in both stands where a gap would be too
//! long.
//!
//! **Floor.** Bytes: those of the exchange, and the cache lines of the words that differ, in and out. Operations for an entry:
//! three loads, two stores, and the hashing of two words and a byte.

use super::bits::{BitTask, Masks, RUN};
use super::dispatch::{Isa, on_isa};
use super::simd::Simd;
use crate::codec::word::{Word, with_word};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

const MAGIC: [u8; 8] = *b"XORZEXC\0";
const HEADER_BYTES: usize = 40;
const CHUNK_BYTES: usize = 56;
/// Entries of a chunk: the words that they lie among are still in the caches when they are written, at 1 % too.
const ENTRIES: usize = 1024;
const LONGEST: usize = u8::MAX as usize;
/// Words that stay and are looked at on the way to the next one; a longer way begins a chunk.
const STEPS: usize = 16;

/// The exchange between two matrices, and how many of their words differ.
///
/// # Errors
/// `Mismatch` where dtypes or shapes differ.
pub fn exchange(old: &Matrix<'_>, new: &Matrix<'_>) -> Result<(Vec<u8>, u64)> {
    exchange_on(Isa::active()?, old, new)
}

/// [`exchange`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`exchange`]; `Unsupported` if the machine lacks `isa`.
pub fn exchange_on(isa: Isa, old: &Matrix<'_>, new: &Matrix<'_>) -> Result<(Vec<u8>, u64)> {
    if (old.dtype(), old.shape()) != (new.dtype(), new.shape()) {
        return Err(Error::mismatch(format!(
            "old is {} {}, but new is {} {}",
            old.dtype(),
            old.shape(),
            new.dtype(),
            new.shape()
        )));
    }
    on_isa!(isa, s => with_word!(old.dtype(), W => made::<_, W>(s, old.bytes(), new.bytes())))
}

/// Make the new words of the old ones in place, or the old ones of the new (`back`). An error leaves all as they were, as long
/// as nobody else writes.
///
/// # Errors
/// `Mismatch` where a word that is to change is another one than it was when the exchange was made; `Corrupt` or `Truncated`
/// for bytes that are no whole exchange; `InvalidArgument` for words that do not lie as words must.
pub fn exchange_apply(exchange: &[u8], words: &mut [u8], back: bool) -> Result<()> {
    let (word_bytes, chunks) = parse(exchange, words.len())?;
    match word_bytes {
        1 => turn_all::<u8>(&chunks, words, back),
        2 => turn_all::<u16>(&chunks, words, back),
        4 => turn_all::<u32>(&chunks, words, back),
        8 => turn_all::<u64>(&chunks, words, back),
        _ => Err(Error::corrupt(format!("exchange: words of {word_bytes} bytes"))),
    }
}

fn made<S: Simd, W: Word>(s: S, old: &[u8], new: &[u8]) -> (Vec<u8>, u64) {
    let mut writer = ExchangeWriter::<W>::new(old);
    s.with_bits(Differences { old, new, writer: &mut writer });
    writer.finish()
}

/// A run of words, at any address; what is missing at the end is 0.
#[inline(always)]
fn loaded_run<W: Word>(bytes: &[u8]) -> [W; RUN] {
    let mut words = [W::default(); RUN];
    bytemuck::cast_slice_mut::<W, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
    words
}

/// Finds the words that differ.
struct Differences<'a, 'o, W> {
    old: &'a [u8],
    new: &'a [u8],
    writer: &'a mut ExchangeWriter<'o, W>,
}

impl<W: Word> BitTask for Differences<'_, '_, W> {
    type Out = ();

    #[inline(always)]
    fn call(self, masks: impl Masks) {
        let size = RUN * W::BYTES;
        for (i, (a, b)) in self.old.chunks(size).zip(self.new.chunks(size)).enumerate() {
            let (a, b) = (loaded_run::<W>(a), loaded_run::<W>(b));
            let mut differ = masks.differ(&a, &b);
            while differ != 0 {
                let lane = differ.trailing_zeros() as usize & (RUN - 1);
                self.writer.push(i * RUN + lane, a[lane], b[lane]);
                differ &= differ - 1;
            }
        }
    }
}

/// An exchange that is being written.
struct ExchangeWriter<'o, W> {
    words: &'o [u8],
    out: Vec<u8>,
    changed: u64,
    start: usize,
    last: usize,
    gaps: Vec<u8>,
    old: Vec<W>,
    new: Vec<W>,
}

impl<'o, W: Word> ExchangeWriter<'o, W> {
    fn new(words: &'o [u8]) -> Self {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend(MAGIC);
        out.extend(
            [W::BYTES as u64, (words.len() / W::BYTES) as u64, 0, 0].map(u64::to_le_bytes).as_flattened(),
        );
        let (gaps, old, new) = (Vec::new(), Vec::new(), Vec::new());
        Self { words, out, changed: 0, start: 0, last: 0, gaps, old, new }
    }

    #[inline(always)]
    fn push(&mut self, at: usize, old: W, new: W) {
        self.changed += 1;
        if self.gaps.is_empty() || self.gaps.len() >= ENTRIES || at - self.last > LONGEST {
            self.reach(at);
        }
        self.entry(at, old, new);
    }

    #[inline(always)]
    fn entry(&mut self, at: usize, old: W, new: W) {
        self.gaps.push((at - self.last) as u8);
        self.old.push(old);
        self.new.push(new);
        self.last = at;
    }

    /// Be at most a gap before `at`: by words that stay, or in a new chunk.
    #[inline(never)]
    fn reach(&mut self, at: usize) {
        let full = self.gaps.len() + (at - self.last) / LONGEST >= ENTRIES;
        if self.gaps.is_empty() || full || at - self.last > STEPS * LONGEST {
            self.seal();
            (self.start, self.last) = (at, at);
        }
        while at - self.last > LONGEST {
            let next = self.last + LONGEST;
            let word = W::load(&self.words[next * W::BYTES..(next + 1) * W::BYTES]);
            self.entry(next, word, word);
        }
    }

    /// The chunk is whole.
    fn seal(&mut self) {
        if self.gaps.is_empty() {
            return;
        }
        let head = [self.start, self.gaps.len(), 0].map(|number| (number as u64).to_le_bytes());
        self.out.extend_from_slice(head.as_flattened());
        let summed = self.out.len();
        self.out.extend_from_slice(&hashed_words(&self.old));
        self.out.extend_from_slice(&hashed_words(&self.new));
        self.out.extend_from_slice(&self.gaps);
        self.old.iter_mut().zip(&self.new).for_each(|(a, &b)| *a = exclusive(*a, b));
        self.out.extend_from_slice(bytemuck::cast_slice(&self.old));
        let sum = xxh3_64(&self.out[summed..]).to_le_bytes();
        self.out[summed - 8..summed].copy_from_slice(&sum);
        self.gaps.clear();
        self.old.clear();
        self.new.clear();
    }

    fn finish(mut self) -> (Vec<u8>, u64) {
        self.seal();
        let sums = [self.changed, (self.out.len() - HEADER_BYTES) as u64].map(u64::to_le_bytes);
        self.out[24..HEADER_BYTES].copy_from_slice(sums.as_flattened());
        (self.out, self.changed)
    }
}

fn exclusive<W: Word>(a: W, b: W) -> W {
    W::from_u64(a.to_u64() ^ b.to_u64())
}

fn hashed_words<W: Word>(words: &[W]) -> [u8; 16] {
    xxh3_128(bytemuck::cast_slice(words)).to_le_bytes()
}

/// Entries that are written together, and taken back if one of them is not right.
struct Chunk<'a> {
    start: usize,
    sum: u64,
    /// What the sum is of: both digests, the gaps, the XORs.
    summed: &'a [u8],
    count: usize,
}

/// The bytes of a word, and the chunks.
fn parse(bytes: &[u8], words: usize) -> Result<(usize, Vec<Chunk<'_>>)> {
    let cut = || Error::truncated(format!("exchange: its {} bytes are not all of it", bytes.len()));
    let (header, mut rest) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(cut)?;
    if header[..8] != MAGIC {
        return Err(Error::corrupt("exchange: it does not begin as one"));
    }
    let (word_bytes, count) = (number(header, 8), number(header, 16));
    if count.checked_mul(word_bytes) != Some(words) {
        return Err(Error::mismatch(format!(
            "the exchange is of {count} words of {word_bytes} bytes, but there are {words} bytes"
        )));
    }
    if number(header, 32) != rest.len() {
        return Err(cut());
    }
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        let (head, _) = rest.split_at_checked(CHUNK_BYTES).ok_or_else(cut)?;
        let count = number(head, 8);
        if !(1..=ENTRIES).contains(&count) {
            return Err(Error::corrupt(format!("exchange: a chunk of {count} entries")));
        }
        let (_, body) = rest.split_at(24);
        let (summed, tail) = count
            .checked_mul(word_bytes.saturating_add(1))
            .and_then(|bytes| body.split_at_checked(bytes.saturating_add(CHUNK_BYTES - 24)))
            .ok_or_else(cut)?;
        chunks.push(Chunk { start: number(head, 0), sum: number(head, 16) as u64, summed, count });
        rest = tail;
    }
    Ok((word_bytes, chunks))
}

fn number(bytes: &[u8], at: usize) -> usize {
    u64::load(&bytes[at..at + 8]) as usize
}

fn turn_all<W: Word>(chunks: &[Chunk<'_>], words: &mut [u8], back: bool) -> Result<()> {
    let words: &mut [W] = bytemuck::try_cast_slice_mut(words).map_err(|_| {
        Error::invalid(format!("words of {} bytes do not lie at a multiple of that", W::BYTES))
    })?;
    let mut room = [W::default(); ENTRIES];
    for (i, chunk) in chunks.iter().enumerate() {
        if let Err(error) = chunk.turn(words, back, &mut room) {
            // Twice XOR is what was there.
            for done in chunks[..i].iter().rev() {
                done.exclude(words, &mut room, done.count);
            }
            return Err(error);
        }
    }
    Ok(())
}

impl Chunk<'_> {
    fn turn<W: Word>(&self, words: &mut [W], back: bool, room: &mut [W; ENTRIES]) -> Result<()> {
        let sum = xxh3_64(self.summed);
        if sum != self.sum {
            return Err(Error::corrupt(format!(
                "exchange: a chunk has digest {sum:016x}, not {:016x}",
                self.sum
            )));
        }
        let done = self.exclude(words, room, self.count);
        let (before, after) = self.summed[..32].split_at(16);
        let (now, next) = if back { (after, before) } else { (before, after) };
        let found = hashed_words(&room[..done]);
        if done == self.count && found == now {
            return Ok(());
        }
        self.exclude(words, room, done);
        Err(match done == self.count {
            true => self.others(found, now, next),
            false => Error::corrupt(format!("exchange: an entry beyond {} words", words.len())),
        })
    }

    /// The words that are to change are not those that they are to change from.
    fn others(&self, found: [u8; 16], now: &[u8], next: &[u8]) -> Error {
        let (start, has) = (self.start, hex(&found));
        if found == next {
            return Error::mismatch(format!(
                "of the words from {start} on, those that are to change have digest {has}, which is what they are to become: \
                 it was done already"
            ));
        }
        Error::mismatch(format!(
            "of the words from {start} on, those that are to change have digest {has}, but {} is wanted: another model's or \
             version's words, or somebody else has written to them",
            hex(now)
        ))
    }

    /// Exchange the words of the first `count` entries; what they were goes to `room`. Gives how many there were before an entry
    /// that is beyond the words.
    fn exclude<W: Word>(&self, words: &mut [W], room: &mut [W; ENTRIES], count: usize) -> usize {
        let (gaps, xors) = self.summed[32..].split_at(self.count);
        let (mut at, mut done) = (self.start.min(words.len()), 0);
        let entries = gaps.iter().zip(xors.chunks_exact(W::BYTES)).take(count);
        for (was, (&gap, xor)) in room.iter_mut().zip(entries) {
            at += usize::from(gap);
            let Some(word) = words.get_mut(at) else { break };
            *was = *word;
            *word = exclusive(*word, W::load(xor));
            done += 1;
        }
        done
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}
