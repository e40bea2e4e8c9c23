//! zstd frames: one-shot with a size known beforehand, so that a frame can never make the reader allocate more than its
//! table and the caller's limit allow.
//!
//! Layout of a framed blob (SPEC.md): `count: u32`, then `count` times `stored: u32, raw: u32`, then the frames.

use crate::error::{Error, Result};
use std::ops::Range;

/// Most decompressed bytes of one frame.
pub(super) const MAX_FRAME_BYTES: usize = 4 << 20;

const COUNT_BYTES: usize = 4;
const ROW_BYTES: usize = 8;

/// zstd cannot hold more: a block of at most 128 KiB costs at least 4 bytes.
const MAX_RATIO: u64 = 32 << 10;

/// One zstd frame that carries its content size.
pub(super) fn compress(bytes: &[u8], level: i32) -> Result<Vec<u8>> {
    zstd::bulk::Compressor::new(level)
        .and_then(|mut c| c.compress(bytes))
        .map_err(|e| Error::internal(format!("zstd: {e}")))
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

/// Append the `raw` bytes of one frame to `out`.
pub(super) fn decompress(frame: &[u8], raw: usize, out: &mut Vec<u8>) -> Result<()> {
    check_frame(frame, raw as u64)?;
    let start = out.len();
    out.resize(start + raw, 0);
    let got = zstd::bulk::Decompressor::new()
        .and_then(|mut d| d.decompress_to_buffer(frame, &mut out[start..]))
        .map_err(|e| Error::corrupt(format!("a zstd frame does not decompress: {e}")))?;
    if got != raw {
        return Err(Error::corrupt(format!("a zstd frame gave {got} bytes instead of {raw}")));
    }
    Ok(())
}

/// A framed blob over `parts`, none longer than [`MAX_FRAME_BYTES`]; `fill` puts a part's bytes into the buffer.
pub(super) fn write(
    parts: &[Range<usize>],
    level: i32,
    mut fill: impl FnMut(Range<usize>, &mut Vec<u8>),
) -> Result<Vec<u8>> {
    let size =
        |n: usize| u32::try_from(n).map(u32::to_le_bytes).map_err(|_| Error::unsupported("too many frames"));
    let mut table = size(parts.len())?.to_vec();
    let mut frames = Vec::new();
    let mut raw = Vec::new();
    let mut compressor =
        zstd::bulk::Compressor::new(level).map_err(|e| Error::internal(format!("zstd: {e}")))?;
    for part in parts {
        raw.clear();
        fill(part.clone(), &mut raw);
        let frame = compressor.compress(&raw).map_err(|e| Error::internal(format!("zstd: {e}")))?;
        table.extend(size(frame.len())?);
        table.extend(size(raw.len())?);
        frames.extend(frame);
    }
    table.extend(frames);
    Ok(table)
}

/// Ranges of at most `step` bytes that cover `range`.
pub(super) fn cut(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(step).map(move |a| a..(a + step).min(end))
}

/// The checked table of a framed blob.
pub(super) struct Frames<'a> {
    blob: &'a [u8],
    list: Vec<(Range<usize>, usize)>,
}

impl<'a> Frames<'a> {
    /// Parse the table; `raw` bytes in all must come out, which the caller has found plausible.
    pub(super) fn parse(blob: &'a [u8], raw: impl FnOnce(u64) -> Result<()>) -> Result<Self> {
        let word = |at: usize| -> Result<usize> {
            let b = blob.get(at..at + 4).ok_or_else(|| Error::truncated("the frame table is cut off"))?;
            Ok(b.iter().rev().fold(0usize, |a, &x| (a << 8) | x as usize))
        };
        let count = word(0)?;
        if count > (blob.len() - COUNT_BYTES) / ROW_BYTES {
            return Err(Error::truncated(format!("{count} frames do not fit in {} bytes", blob.len())));
        }
        let mut at = COUNT_BYTES + count * ROW_BYTES;
        let mut total = 0u64;
        let mut list = Vec::with_capacity(count);
        for i in 0..count {
            let row = COUNT_BYTES + i * ROW_BYTES;
            let (stored, size) = (word(row)?, word(row + 4)?);
            if size == 0 || size > MAX_FRAME_BYTES {
                return Err(Error::corrupt(format!(
                    "frame {i} announces {size} bytes, not 1..={MAX_FRAME_BYTES}"
                )));
            }
            list.push((at..at + stored, size));
            at += stored;
            total += size as u64;
        }
        if at != blob.len() {
            return Err(Error::corrupt(format!("the frames take {at} bytes, but {} are stored", blob.len())));
        }
        raw(total)?;
        Ok(Self { blob, list })
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Decompressed bytes of frame `i`.
    pub(super) fn raw_bytes(&self, i: usize) -> usize {
        self.list[i].1
    }

    /// Append frame `i`'s bytes to `out`.
    pub(super) fn read(&self, i: usize, out: &mut Vec<u8>) -> Result<()> {
        let (range, raw) = self.list[i].clone();
        decompress(&self.blob[range], raw, out).map_err(|e| e.within(format_args!("frame {i}")))
    }
}
