//! zstd frames and blobs of them: append-only for the writer, a table at the end for the reader. A frame can never make
//! the reader allocate more than its table and the caller's limit allow.
//!
//! Layout of a framed blob (SPEC.md): the frames; then for each `stored: u32, raw: u32`; then `first: u32`, how many of the
//! frames go before what follows them though they belong after it; then `count: u32`.

use crate::error::{Error, Result};
use std::ops::Range;

/// Most decompressed bytes of one frame that a reader takes.
pub(super) const MAX_FRAME_BYTES: usize = 4 << 20;
/// Bytes that writers put into a frame.
pub(crate) const FRAME_BYTES: usize = 1 << 20;

const TAIL_BYTES: u64 = 8;
const ROW_BYTES: u64 = 8;

/// zstd cannot hold more: a block of at most 128 KiB costs at least 4 bytes.
pub(crate) const MAX_RATIO: u64 = 32 << 10;

fn zstd_error(e: std::io::Error) -> Error {
    Error::internal(format!("zstd: {e}"))
}

/// One zstd frame that carries its content size.
pub(crate) fn compress(bytes: &[u8], level: i32) -> Result<Vec<u8>> {
    zstd::bulk::Compressor::new(level).and_then(|mut c| c.compress(bytes)).map_err(zstd_error)
}

/// Bytes of text up to which zstd is given all the time it wants: a second for each MB.
const SHORT_TEXT: usize = 2 << 20;

/// One zstd frame of something that is written once, read often, and mostly short.
pub(super) fn compress_text(text: &[u8]) -> Result<Vec<u8>> {
    compress(text, if text.len() <= SHORT_TEXT { 19 } else { 9 })
}

/// Bytes that a small frame may hold, by what it takes: no text of people or tools is compressed further, but for padding, and
/// a few stored bytes must not ask for a hundred million in memory.
pub(super) fn most_of_small(stored: u64) -> u64 {
    (1 << 20) + 256 * stored
}

/// A small text, such as a source file's header, as one zstd frame that [`most_of_small`] allows: of a text that compresses
/// better than that, as it is.
pub(crate) fn compress_small(text: &[u8]) -> Result<Vec<u8>> {
    let frame = compress_text(text)?;
    if text.len() as u64 <= most_of_small(frame.len() as u64) {
        return Ok(frame);
    }
    // zstd's magic number; one segment, four bytes of content size, no checksum; blocks of up to 128 KiB as they are.
    let size = u32::try_from(text.len()).map_err(|_| Error::unsupported("too long for a small frame"))?;
    let mut out = [&0xFD2F_B528u32.to_le_bytes()[..], &[0xA0], &size.to_le_bytes()].concat();
    let blocks = text.chunks(128 << 10);
    let count = blocks.len();
    for (i, block) in blocks.enumerate() {
        let head = (block.len() as u32) << 3 | u32::from(i + 1 == count);
        out.extend_from_slice(&head.to_le_bytes()[..3]);
        out.extend_from_slice(block);
    }
    Ok(out)
}

/// Refuse a frame that does not announce exactly `raw` bytes, or that could not hold them.
pub(super) fn check_frame(frame: &[u8], raw: u64) -> Result<()> {
    let announced = zstd::zstd_safe::get_frame_content_size(frame)
        .map_err(|_| Error::corrupt("not a zstd frame"))?
        .ok_or_else(|| Error::corrupt("a zstd frame without its content size"))?;
    if announced != raw {
        return Err(Error::corrupt(format!("a zstd frame announces {announced} bytes where {raw} belong")));
    }
    if zstd::zstd_safe::find_frame_compressed_size(frame) != Ok(frame.len()) {
        return Err(Error::corrupt("more or less than one whole zstd frame"));
    }
    if raw / MAX_RATIO > frame.len() as u64 {
        return Err(Error::corrupt(format!("{} bytes of zstd cannot hold the {raw} announced", frame.len())));
    }
    Ok(())
}

/// Makes frames; keeps its zstd context.
pub(crate) struct Deflater {
    zstd: zstd::bulk::Compressor<'static>,
    /// Frames to be stored as they are before another one is tried: the last one tried gained next to nothing.
    skip: u32,
}

impl Deflater {
    /// A frame must save one byte in so many. What saves less is a dense bit stream, where zstd finds a few percent at
    /// half the speed of all the rest.
    const WORTH: usize = 20;
    /// How many frames are taken as they are after one that saved less.
    const PATIENCE: u32 = 7;

    pub(crate) fn new(level: i32) -> Result<Self> {
        Ok(Self { zstd: zstd::bulk::Compressor::new(level).map_err(zstd_error)?, skip: 0 })
    }

    /// Append the frame of `raw` to `out`: one of zstd, or the bytes themselves where zstd saves less than a twentieth. With
    /// `in_order` frames are like their predecessors: after one that gained nothing, some are not even tried.
    pub(crate) fn frame(&mut self, raw: &[u8], in_order: bool, out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        if self.skip > 0 {
            self.skip -= 1;
        } else {
            out.resize(start + zstd::zstd_safe::compress_bound(raw.len()), 0);
            let n = self.zstd.compress_to_buffer(raw, &mut out[start..]).map_err(zstd_error)?;
            out.truncate(start + n);
            if n < raw.len() - raw.len() / Self::WORTH {
                return Ok(());
            }
            out.truncate(start);
            self.skip = if in_order && raw.len() >= FRAME_BYTES { Self::PATIENCE } else { 0 };
        }
        out.extend_from_slice(raw);
        Ok(())
    }
}

/// Makes the frame that the notebook makes of a tensor's XOR: zstd at level 10, whatever the level of other frames.
#[derive(Default)]
pub(crate) struct XorDeflater(Option<zstd::bulk::Compressor<'static>>);

impl XorDeflater {
    pub(crate) const LEVEL: i32 = 10;

    /// The frame of `xor` into `out`.
    pub(crate) fn frame(&mut self, xor: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let zstd = match &mut self.0 {
            Some(zstd) => zstd,
            none => none.insert(zstd::bulk::Compressor::new(Self::LEVEL).map_err(zstd_error)?),
        };
        out.clear();
        out.resize(zstd::zstd_safe::compress_bound(xor.len()), 0);
        let n = zstd.compress_to_buffer(xor, &mut out[..]).map_err(zstd_error)?;
        out.truncate(n);
        Ok(())
    }
}

/// The table of a blob being written.
#[derive(Debug, Default)]
pub(super) struct TableWriter {
    rows: Vec<u8>,
}

impl TableWriter {
    /// A frame of `stored` bytes that stands for `raw` bytes.
    pub(crate) fn push(&mut self, stored: usize, raw: usize) -> Result<()> {
        for n in [stored, raw] {
            let n = u32::try_from(n).map_err(|_| Error::internal("a frame beyond 4 GiB"))?;
            self.rows.extend_from_slice(&n.to_le_bytes());
        }
        Ok(())
    }

    /// Frames so far.
    pub(crate) fn count(&self) -> usize {
        self.rows.len() / ROW_BYTES as usize
    }

    /// What goes behind the frames.
    pub(crate) fn finish(mut self, first: usize) -> Result<Vec<u8>> {
        let count = self.count();
        self.push(first, count)?;
        Ok(self.rows)
    }
}

/// The checked table of a framed blob.
#[derive(Debug)]
pub(super) struct Table {
    /// Where each frame lies in the blob, and where its bytes lie in what all of them give.
    frames: Vec<(Range<u64>, Range<u64>)>,
    first: usize,
}

impl Table {
    /// Read the table of a blob of `len` bytes; `read` gives bytes by position. What all frames give is at most `limit` bytes.
    pub(crate) fn read(len: u64, limit: u64, read: impl Fn(u64, &mut [u8]) -> Result<()>) -> Result<Self> {
        let mut tail = [0u8; TAIL_BYTES as usize];
        let short = || Error::truncated(format!("a blob of frames of {len} bytes"));
        let end = len.checked_sub(TAIL_BYTES).ok_or_else(short)?;
        read(end, &mut tail)?;
        let word = |b: &[u8]| b.iter().rev().fold(0u64, |a, &x| (a << 8) | u64::from(x));
        let (first, count) = (word(&tail[..4]), word(&tail[4..]));
        if count > end / ROW_BYTES || first > count {
            return Err(Error::corrupt(format!("{count} frames, {first} of them first, in {len} bytes")));
        }
        let mut rows = vec![0u8; (count * ROW_BYTES) as usize];
        let table = end - count * ROW_BYTES;
        read(table, &mut rows)?;
        let (mut at, mut out) = (0u64, 0u64);
        let mut frames = Vec::with_capacity(rows.len() / ROW_BYTES as usize);
        for (i, row) in rows.chunks_exact(ROW_BYTES as usize).enumerate() {
            let (stored, raw) = (word(&row[..4]), word(&row[4..]));
            if raw == 0 || raw > MAX_FRAME_BYTES as u64 || stored > raw {
                return Err(Error::corrupt(format!("frame {i} takes {stored} bytes for {raw}")));
            }
            frames.push((at..at + stored, out..out + raw));
            (at, out) = (at + stored, out + raw);
        }
        if at != table {
            return Err(Error::corrupt(format!("the frames take {at} bytes, but {table} are stored")));
        }
        if out > limit {
            return Err(Error::corrupt(format!(
                "the frames give {out} bytes, but at most {limit} belong here"
            )));
        }
        Ok(Self { frames, first: first as usize })
    }

    /// Bytes that all frames give.
    pub(super) fn raw_bytes(&self) -> u64 {
        self.frames.last().map_or(0, |(_, raw)| raw.end)
    }

    /// Bytes that the first `first` frames give.
    pub(super) fn first_bytes(&self) -> u64 {
        self.first.checked_sub(1).map_or(0, |i| self.frames[i].1.end)
    }

    /// The frame that gives byte `at` of all.
    pub(crate) fn find(&self, at: u64) -> Option<usize> {
        let i = self.frames.partition_point(|(_, raw)| raw.end <= at);
        (i < self.frames.len()).then_some(i)
    }

    /// Where frame `i` lies in the blob, and which bytes it gives.
    pub(crate) fn frame(&self, i: usize) -> (Range<u64>, Range<u64>) {
        self.frames[i].clone()
    }
}

/// Reads frames; keeps its zstd context and the last few frames read.
#[derive(Default)]
pub(crate) struct Inflater {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    stored: Vec<u8>,
    kept: Vec<(u64, Vec<u8>)>,
}

impl Inflater {
    const KEPT: usize = 3;

    /// The bytes of a frame that lies at `place` (unique within one file) and gives `raw` bytes; `read` fills its stored bytes.
    pub(crate) fn get(
        &mut self,
        place: u64,
        stored: usize,
        raw: usize,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<&[u8]> {
        if let Some(i) = self.kept.iter().position(|(p, _)| *p == place) {
            self.kept[i..].rotate_left(1);
        } else {
            let mut out = if self.kept.len() < Self::KEPT { Vec::new() } else { self.kept.remove(0).1 };
            out.clear();
            self.stored.clear();
            self.stored.resize(stored, 0);
            read(&mut self.stored)?;
            self.inflate(raw, &mut out)?;
            self.kept.push((place, out));
        }
        self.kept.last().map(|(_, f)| f.as_slice()).ok_or_else(|| Error::internal("no frame kept"))
    }

    fn inflate(&mut self, raw: usize, out: &mut Vec<u8>) -> Result<()> {
        if self.stored.len() == raw {
            out.extend_from_slice(&self.stored);
            return Ok(());
        }
        check_frame(&self.stored, raw as u64)?;
        let zstd = match &mut self.zstd {
            Some(z) => z,
            none => none.insert(zstd::bulk::Decompressor::new().map_err(zstd_error)?),
        };
        out.resize(raw, 0);
        let got = zstd
            .decompress_to_buffer(&self.stored, out)
            .map_err(|e| Error::corrupt(format!("a zstd frame does not decompress: {e}")))?;
        if got != raw {
            return Err(Error::corrupt(format!("a zstd frame gave {got} bytes instead of {raw}")));
        }
        Ok(())
    }
}

/// Ranges of at most `step` bytes that cover `range`.
pub(crate) fn cut(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(step).map(move |a| a..(a + step).min(end))
}
