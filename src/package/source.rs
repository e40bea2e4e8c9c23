//! Sources for `resident::encode` that hold no dense matrix: XOR bytes decoded frame by frame as they are asked for, and
//! the tiles of another resident delta.

use super::blob::PLANE_FRAME_BYTES;
use super::frames::Frames;
use crate::codec::{Grid, Rect, decode_tile};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use crate::resident::{Resident, Source};
use std::io::Read;
use std::ops::Range;

/// Random access to the XOR bytes of a matrix, by positions in its row-major bytes.
pub(super) trait XorReader {
    /// What follows lies in `span`, in `rows` pieces: keep as much of it at hand as avoids decoding twice.
    fn hold(&mut self, span: Range<usize>, rows: usize) -> Result<()>;
    /// XOR the delta's bytes from `at` on into `bytes`.
    fn apply(&mut self, at: usize, bytes: &mut [u8]) -> Result<()>;
}

/// Codec `planes`: whole frames, decoded when first needed, the last few kept.
pub(super) struct PlaneReader<'a> {
    frames: Frames<'a>,
    word_bytes: usize,
    kept: Vec<(usize, Vec<u8>)>,
    keep: usize,
    planes: Vec<u8>,
}

impl<'a> PlaneReader<'a> {
    pub(super) fn new(frames: Frames<'a>, word_bytes: usize) -> Self {
        Self { frames, word_bytes, kept: Vec::new(), keep: 1, planes: Vec::new() }
    }

    /// The XOR bytes of frame `i`, moved to the end of the kept ones.
    fn frame(&mut self, i: usize) -> Result<&[u8]> {
        if let Some(at) = self.kept.iter().position(|(k, _)| *k == i) {
            self.kept[at..].rotate_left(1);
        } else {
            let reuse = if self.kept.len() < self.keep { Vec::new() } else { self.kept.remove(0).1 };
            let frame = self.decode(i, reuse)?;
            self.kept.push((i, frame));
        }
        self.kept.last().map(|(_, f)| f.as_slice()).ok_or_else(|| Error::internal("no frame kept"))
    }

    fn decode(&mut self, i: usize, mut out: Vec<u8>) -> Result<Vec<u8>> {
        self.planes.clear();
        self.frames.read(i, &mut self.planes)?;
        let w = self.word_bytes;
        out.clear();
        out.resize(self.planes.len(), 0);
        let words = self.planes.len() / w;
        for (p, plane) in self.planes.chunks_exact(words.max(1)).enumerate() {
            out[p..].iter_mut().step_by(w).zip(plane).for_each(|(o, b)| *o = *b);
        }
        Ok(out)
    }
}

impl XorReader for PlaneReader<'_> {
    fn hold(&mut self, span: Range<usize>, rows: usize) -> Result<()> {
        let frames = span.end.div_ceil(PLANE_FRAME_BYTES) - span.start / PLANE_FRAME_BYTES;
        self.keep = frames.min(2 * rows).max(1);
        let surplus = self.kept.len().saturating_sub(self.keep);
        self.kept.drain(..surplus);
        Ok(())
    }

    fn apply(&mut self, at: usize, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let (i, within) = ((at + done) / PLANE_FRAME_BYTES, (at + done) % PLANE_FRAME_BYTES);
            let frame = self.frame(i)?;
            let n = frame.len().saturating_sub(within).min(bytes.len() - done);
            if n == 0 {
                return Err(Error::internal(format!("XOR byte {} is in no frame", at + done)));
            }
            bytes[done..done + n].iter_mut().zip(&frame[within..]).for_each(|(b, x)| *b ^= x);
            done += n;
        }
        Ok(())
    }
}

/// Codec `xor`: one frame, decoded forwards through a sliding window; a step back starts over.
pub(super) struct StreamReader<'a> {
    frame: &'a [u8],
    total: usize,
    decoder: Option<Box<dyn Read + 'a>>,
    /// Window bytes; those before `dead` are no longer wanted.
    window: Vec<u8>,
    dead: usize,
    /// Position of `window[0]`.
    start: usize,
}

impl<'a> StreamReader<'a> {
    pub(super) fn new(frame: &'a [u8], total: usize) -> Self {
        Self { frame, total, decoder: None, window: Vec::new(), dead: 0, start: 0 }
    }

    fn restart(&mut self) -> Result<()> {
        self.decoder = Some(Box::new(decoder(self.frame, self.total as u64)?));
        self.window.clear();
        (self.dead, self.start) = (0, 0);
        Ok(())
    }

    /// Decode `n` bytes onto the window's end.
    fn pull(&mut self, n: usize) -> Result<()> {
        let old = self.window.len();
        self.window.resize(old + n, 0);
        let decoder = self.decoder.as_mut().ok_or_else(|| Error::internal("no decoder"))?;
        decoder.read_exact(&mut self.window[old..]).map_err(|e| Error::corrupt(format!("zstd: {e}")))
    }
}

/// A streaming decoder of one frame whose content is `total` bytes; its window is no larger than they need.
pub(super) fn decoder(frame: &[u8], total: u64) -> Result<impl Read + '_> {
    let fail = |e: std::io::Error| Error::corrupt(format!("zstd: {e}"));
    let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(fail)?.single_frame();
    let log = 64 - total.saturating_sub(1).leading_zeros();
    decoder.window_log_max(log.clamp(20, 27)).map_err(fail)?;
    Ok(decoder)
}

impl XorReader for StreamReader<'_> {
    fn hold(&mut self, span: Range<usize>, _rows: usize) -> Result<()> {
        if self.decoder.is_none() || span.start < self.start + self.dead {
            self.restart()?;
        }
        // Skip what lies between, in small steps.
        while self.start + self.window.len() < span.start {
            self.start += self.window.len();
            self.window.clear();
            self.dead = 0;
            self.pull((span.start - self.start).min(1 << 16))?;
        }
        self.dead = span.start - self.start;
        if self.dead > self.window.len() / 2 {
            self.window.drain(..self.dead);
            (self.start, self.dead) = (span.start, 0);
        }
        let have = self.start + self.window.len();
        if span.end > have {
            self.pull(span.end - have)?;
        }
        Ok(())
    }

    fn apply(&mut self, at: usize, bytes: &mut [u8]) -> Result<()> {
        let from = at.checked_sub(self.start).and_then(|a| self.window.get(a..a + bytes.len()));
        let from = from.ok_or_else(|| Error::internal("XOR bytes outside the window held"))?;
        bytes.iter_mut().zip(from).for_each(|(b, x)| *b ^= x);
        Ok(())
    }
}

/// Base words, and base XOR delta as the fine-tuned ones.
pub(super) struct XorSource<'a, R> {
    base: Matrix<'a>,
    digest: Digest,
    reader: R,
}

impl<'a, R: XorReader> XorSource<'a, R> {
    /// `digest` is the base's, computed by the caller already.
    pub(super) fn new(base: Matrix<'a>, digest: Digest, reader: R) -> Self {
        Self { base, digest, reader }
    }
}

impl<R: XorReader> Source for XorSource<'_, R> {
    fn dtype(&self) -> Dtype {
        self.base.dtype()
    }

    fn shape(&self) -> Shape {
        self.base.shape()
    }

    fn base_digest(&self) -> Digest {
        self.digest
    }

    fn read(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        base: &mut [u8],
        fine_tuned: &mut [u8],
    ) -> Result<()> {
        if rows.is_empty() || cols.is_empty() {
            return Ok(());
        }
        copy_base(&self.base, &rows, &cols, base);
        fine_tuned.copy_from_slice(base);
        let w = self.base.dtype().word_bytes();
        let at = |r: usize, c: usize| (r * self.base.shape().k + c) * w;
        self.reader.hold(at(rows.start, cols.start)..at(rows.end - 1, cols.end), rows.len())?;
        for (r, row) in rows.zip(fine_tuned.chunks_exact_mut(cols.len() * w)) {
            self.reader.apply(at(r, cols.start), row)?;
        }
        Ok(())
    }
}

fn copy_base(base: &Matrix<'_>, rows: &Range<usize>, cols: &Range<usize>, out: &mut [u8]) {
    let w = base.dtype().word_bytes();
    for (r, row) in rows.clone().zip(out.chunks_exact_mut(cols.len() * w)) {
        row.copy_from_slice(base.span(r, cols.start, cols.len()));
    }
}

/// The fine-tuned words of another resident delta, tile by tile: for giving a delta another encoding.
pub(super) struct ResidentSource<'a> {
    delta: Resident<'a>,
    base: Matrix<'a>,
    grid: Grid,
    kept: Vec<(usize, Vec<u8>)>,
}

/// Decoded tiles kept, in bytes: a panel of tall tiles is read in several passes of lower ones.
const KEPT_BYTES: usize = 4 << 20;

impl<'a> ResidentSource<'a> {
    /// `delta` has been checked against `base`.
    pub(super) fn new(delta: Resident<'a>, base: Matrix<'a>) -> Self {
        let grid = delta.grid();
        Self { delta, base, grid, kept: Vec::new() }
    }

    /// The fine-tuned words of one tile, moved to the end of the kept ones.
    fn tile(&mut self, index: usize, rect: &Rect) -> Result<&[u8]> {
        if let Some(at) = self.kept.iter().position(|(k, _)| *k == index) {
            self.kept[at..].rotate_left(1);
        } else {
            let w = self.base.dtype().word_bytes();
            let keep = (KEPT_BYTES / (self.grid.tile_rows * self.grid.tile_cols * w)).max(1);
            let mut words = if self.kept.len() < keep { Vec::new() } else { self.kept.remove(0).1 };
            let (rows, cols) = (rect.r1 - rect.r0, rect.c1 - rect.c0);
            words.resize(rows * cols * w, 0);
            copy_base(&self.base, &(rect.r0..rect.r1), &(rect.c0..rect.c1), &mut words);
            let tile = self.delta.tile(index)?;
            decode_tile(&tile, self.base.dtype(), rows, cols, self.grid.tile_cols, &mut words)
                .map_err(|e| e.within(format_args!("tile {index}")))?;
            self.kept.push((index, words));
        }
        self.kept.last().map(|(_, t)| t.as_slice()).ok_or_else(|| Error::internal("no tile kept"))
    }
}

impl Source for ResidentSource<'_> {
    fn dtype(&self) -> Dtype {
        self.base.dtype()
    }

    fn shape(&self) -> Shape {
        self.base.shape()
    }

    fn base_digest(&self) -> Digest {
        self.delta.header().base_digest
    }

    fn read(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        base: &mut [u8],
        fine_tuned: &mut [u8],
    ) -> Result<()> {
        if rows.is_empty() || cols.is_empty() {
            return Ok(());
        }
        copy_base(&self.base, &rows, &cols, base);
        let w = self.base.dtype().word_bytes();
        let across = self.grid.tile_cols_count();
        for tr in rows.start / self.grid.tile_rows..rows.end.div_ceil(self.grid.tile_rows) {
            for tc in cols.start / self.grid.tile_cols..cols.end.div_ceil(self.grid.tile_cols) {
                let index = tr * across + tc;
                let rect = self.grid.rect(index);
                let tile = self.tile(index, &rect)?;
                let (c0, c1) = (rect.c0.max(cols.start), rect.c1.min(cols.end));
                for r in rect.r0.max(rows.start)..rect.r1.min(rows.end) {
                    let from = ((r - rect.r0) * (rect.c1 - rect.c0) + c0 - rect.c0) * w;
                    let to = ((r - rows.start) * cols.len() + c0 - cols.start) * w;
                    let n = (c1 - c0) * w;
                    fine_tuned[to..to + n].copy_from_slice(&tile[from..from + n]);
                }
            }
        }
        Ok(())
    }
}
