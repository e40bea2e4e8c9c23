//! Stored bytes at rest: compared with their digest when they are opened, then read by position, frame by frame, so that a
//! tensor of any size is restored in the memory of a few frames.

use super::container::SafeTensors;
use super::frames::{Inflater, Table, check_frame, most_of_small};
use super::planes;
use super::record::Entry;
use crate::error::{Error, Result};
use crate::matrix::Digest;
use crate::package::io::aligned::Aligned;
use crate::package::options::Codec;
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// The longest resident delta that a base of this many bytes justifies.
pub(crate) fn resident_limit(base_bytes: u64) -> u64 {
    base_bytes.saturating_mul(4).saturating_add(64 << 10)
}

/// Bytes read at once where all are wanted.
const STEP: u64 = 256 << 10;

/// Compare the stored bytes `range` with their digest.
pub(crate) fn compare_check(container: &SafeTensors, range: Range<u64>, want: Option<Digest>) -> Result<()> {
    let (mut hash, mut room, mut at) = (Xxh3::new(), Aligned::default(), range.start);
    while at < range.end {
        let n = (range.end - at).min(STEP);
        let bytes = room.room(n as usize, container.data_at() + at);
        container.read_at(at, bytes)?;
        hash.update(bytes);
        at += n;
    }
    let found = Digest(hash.digest128().to_le_bytes());
    match want {
        Some(want) if want == found => Ok(()),
        Some(want) => Err(Error::corrupt(format!("damaged: its bytes have digest {found}, not {want}"))),
        None => Err(Error::corrupt("its digest is not one")),
    }
}

/// The bytes that an entry stands for before a base is involved: a resident delta, planes, or a file.
#[derive(Debug)]
pub(crate) struct Blob<'a> {
    container: &'a SafeTensors,
    range: Range<u64>,
    /// `None` where the stored bytes are those bytes.
    table: Option<Table>,
    /// How many bytes of the blob (header and directory) precede the payload, although their frames are stored after it.
    head: u64,
}

impl<'a> Blob<'a> {
    /// Open what `range` of `container` holds; its digest is compared first. Frames give at most `limit` bytes.
    pub(crate) fn open(
        container: &'a SafeTensors,
        range: Range<u64>,
        check: Option<Digest>,
        framed: bool,
        limit: u64,
    ) -> Result<Self> {
        compare_check(container, range.clone(), check)?;
        let len = range.end - range.start;
        let start = range.start;
        if !framed {
            if len > limit {
                return Err(Error::corrupt(format!(
                    "{len} bytes are stored, but at most {limit} belong here"
                )));
            }
            return Ok(Self { container, range, table: None, head: 0 });
        }
        let table = Table::read(len, limit, |at, out| container.read_at(start + at, out))?;
        Ok(Self { container, range, table: Some(table), head: 0 })
    }

    /// The blob of entry `e`, whose tensor has `e.bytes` bytes.
    pub(crate) fn of(container: &'a SafeTensors, e: &Entry) -> Result<Self> {
        let (framed, limit) = match e.codec {
            Codec::Resident => (false, resident_limit(e.bytes)),
            Codec::ResidentZstd => (true, resident_limit(e.bytes)),
            Codec::Planes | Codec::Alone => (true, e.bytes),
            _ => (false, u64::MAX),
        };
        let mut blob = Self::open(container, e.range.clone(), Some(e.check), framed, limit)?;
        let first = blob.table.as_ref().map_or(0, Table::first_bytes);
        match e.codec {
            Codec::ResidentZstd if first > 0 => {
                // The delta's header, which comes after the payload, says how much goes before it.
                let mut header = [0u8; 80];
                blob.read(first, &mut header, &mut Inflater::default())?;
                blob.head = crate::resident::head_bytes(&header);
                if blob.head > blob.len() - first {
                    return Err(Error::corrupt(format!(
                        "a delta whose payload begins at {} of {} bytes",
                        blob.head,
                        blob.len()
                    )));
                }
            }
            Codec::Planes | Codec::Alone if first > 0 || blob.len() != e.bytes => {
                return Err(Error::corrupt(format!(
                    "{} bytes of planes for a tensor of {}",
                    blob.len(),
                    e.bytes
                )));
            }
            _ => {}
        }
        Ok(blob)
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> u64 {
        self.table.as_ref().map_or(self.range.end - self.range.start, Table::raw_bytes)
    }

    /// Fill `out` with the bytes from `at` on.
    pub(crate) fn read(&self, at: u64, out: &mut [u8], inflater: &mut Inflater) -> Result<()> {
        if at.checked_add(out.len() as u64).is_none_or(|end| end > self.len()) {
            return Err(Error::corrupt(format!("bytes {at} + {} of {}", out.len(), self.len())));
        }
        let Some(table) = &self.table else {
            return self.container.read_at(self.range.start + at, out);
        };
        // The blob's three parts (before, in and behind the payload) as ranges of what the frames give, one after the other.
        let (first, head) = (table.first_bytes(), self.head);
        let parts = [(0..head, first), (head..head + first, 0), (head + first..u64::MAX, head + first)];
        let mut done = 0usize;
        for (part, from) in parts {
            let here = at + done as u64;
            if !part.contains(&here) || done == out.len() {
                continue;
            }
            let n = (part.end - here).min((out.len() - done) as u64) as usize;
            self.read_frames(table, from + (here - part.start), &mut out[done..done + n], inflater)?;
            done += n;
        }
        Ok(())
    }

    fn read_frames(
        &self,
        table: &Table,
        mut at: u64,
        mut out: &mut [u8],
        inflater: &mut Inflater,
    ) -> Result<()> {
        while !out.is_empty() {
            let i = table.find(at).ok_or_else(|| Error::internal("a byte in no frame"))?;
            let (raw, frame) = self.frame(table, i, inflater)?;
            let from = (at - raw.start) as usize;
            let n = (frame.len() - from).min(out.len());
            out[..n].copy_from_slice(&frame[from..from + n]);
            out = &mut out[n..];
            at += n as u64;
        }
        Ok(())
    }

    /// Frame `i`, and which bytes it gives.
    fn frame<'b>(
        &self,
        table: &Table,
        i: usize,
        inflater: &'b mut Inflater,
    ) -> Result<(Range<u64>, &'b [u8])> {
        let (stored, raw) = table.frame(i);
        let place = self.range.start + stored.start;
        let (n, m) = ((stored.end - stored.start) as usize, (raw.end - raw.start) as usize);
        let frame = inflater
            .get(place, n, m, |out| self.container.read_at(place, out))
            .map_err(|e| e.within(format_args!("frame {i}")))?;
        Ok((raw, frame))
    }

    /// XOR the planes' words into `words`, which are those from byte `at` on of a tensor of words of `word_bytes`.
    pub(crate) fn apply_planes(
        &self,
        mut at: u64,
        mut words: &mut [u8],
        word_bytes: usize,
        inflater: &mut Inflater,
    ) -> Result<()> {
        let table = self.table.as_ref().ok_or_else(|| Error::internal("planes without frames"))?;
        while !words.is_empty() {
            let i = table.find(at).ok_or_else(|| Error::internal("a byte in no frame"))?;
            let (raw, frame) = self.frame(table, i, inflater)?;
            let from = (at - raw.start) as usize;
            if !frame.len().is_multiple_of(word_bytes) || !from.is_multiple_of(word_bytes) {
                return Err(Error::corrupt(format!("frame {i} of planes ends within a word")));
            }
            let n = (frame.len() - from).min(words.len());
            let (now, later) = words.split_at_mut(n);
            planes::apply(frame, frame.len() / word_bytes, from / word_bytes, now, word_bytes);
            words = later;
            at += n as u64;
        }
        Ok(())
    }
}

/// Bytes of a small stored frame, such as a source file's header.
pub(super) fn small_frame(
    container: &SafeTensors,
    range: Range<u64>,
    raw: u64,
    check: Option<Digest>,
) -> Result<Vec<u8>> {
    compare_check(container, range.clone(), check)?;
    let (taken, most) = (range.end - range.start, most_of_small(range.end - range.start));
    if raw > most {
        return Err(Error::corrupt(format!("{taken} stored bytes may hold {most}, but {raw} are announced")));
    }
    let mut stored = vec![0u8; (range.end - range.start) as usize];
    container.read_at(range.start, &mut stored)?;
    check_frame(&stored, raw)?;
    let raw = usize::try_from(raw).map_err(|_| Error::unsupported("too large for this machine"))?;
    let out = zstd::bulk::decompress(&stored, raw).map_err(|e| Error::corrupt(format!("zstd: {e}")))?;
    Ok(out)
}
