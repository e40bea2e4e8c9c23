//! A stored delta as a resident delta for another preference: restored and encoded again piece by piece, never as a whole.

use super::restore::{Restore, RestoreScratch};
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use crate::package::io::aligned::Aligned;
use crate::resident::{self, Assembler, DeltaPiece, Estimate, Source};
use crate::vector;
use std::ops::Range;

/// The resident delta for `prefer`. The base's digest has been compared.
pub(crate) fn resident(restore: &Restore<'_>, prefer: Prefer) -> Result<Vec<u8>> {
    let mut source = Restored::new(restore)?;
    if !restore.pieces.tiled() {
        return resident::encode(&mut source, prefer);
    }
    let estimate = vector::estimate(&mut source, prefer)?;
    let (bytes, size) = encode_restored(&mut source, &estimate)?;
    if !estimate.is_off(size) {
        return Ok(bytes);
    }
    let exact = vector::estimate_exactly(&mut source, prefer)?;
    if exact.plan == estimate.plan { Ok(bytes) } else { Ok(encode_restored(&mut source, &exact)?.0) }
}

/// The delta by the estimate's plan, and its bytes before what equals was dropped.
fn encode_restored(source: &mut Restored<'_, '_>, estimate: &Estimate) -> Result<(Vec<u8>, u64)> {
    let (dtype, plan) = (source.dtype(), &estimate.plan);
    let mut assembler = Assembler::new(dtype, plan)?;
    let head = assembler.head_bytes();
    let (mut out, mut piece) = (vec![0; head], DeltaPiece::default());
    let pieces = source.restore.pieces;
    let mut base = Aligned::default();
    for index in 0..pieces.count() {
        let range = pieces.bytes(index);
        let words = source.restore.base_words()?;
        let base = words.get(range, &mut base)?;
        source.load(index)?;
        piece.clear();
        let tiles = pieces.tiles(&plan.grid, index);
        vector::encode_tiles(plan, dtype, tiles, base, source.loaded(), &mut piece)?;
        assembler.add(&piece)?;
        out.extend_from_slice(&piece.payload);
    }
    let size = assembler.bytes();
    let done = assembler.finish(source.base_digest())?;
    if !done.keep_payload {
        return Ok((done.head, size));
    }
    out[..head].copy_from_slice(&done.head);
    out.extend_from_slice(&done.tail);
    Ok((out, size))
}

/// Base and restored words, by rectangles; keeps the pieces restored last.
struct Restored<'r, 'a> {
    restore: &'r Restore<'a>,
    dtype: Dtype,
    shape: Shape,
    digest: Digest,
    kept: Vec<(usize, Vec<u8>)>,
    scratch: RestoreScratch,
    /// The next piece of a stream that is only read forwards.
    next: usize,
}

impl<'r, 'a> Restored<'r, 'a> {
    /// Pieces kept where a rectangle is in one, and where its rows are in many.
    const KEPT: [usize; 2] = [2, 40];

    fn new(restore: &'r Restore<'a>) -> Result<Self> {
        let (dtype, shape, digest) = restore.matrix()?;
        Ok(Self {
            restore,
            dtype,
            shape,
            digest,
            kept: Vec::new(),
            scratch: RestoreScratch::default(),
            next: 0,
        })
    }

    /// Have piece `index` at the end of those kept.
    fn load(&mut self, index: usize) -> Result<()> {
        if let Some(i) = self.kept.iter().position(|(c, _)| *c == index) {
            self.kept[i..].rotate_left(1);
            return Ok(());
        }
        if self.restore.forwards()? {
            if index < self.next {
                self.restore.rewind()?;
                self.next = 0;
            }
            while self.next <= index {
                self.restore.make(self.next, &mut self.scratch)?;
                self.restore.complete(&mut self.scratch)?;
                self.next += 1;
            }
        } else {
            self.restore.make(index, &mut self.scratch)?;
        }
        let most = Self::KEPT[usize::from(!self.restore.pieces.tiled())];
        let mut room = if self.kept.len() < most { Vec::new() } else { self.kept.remove(0).1 };
        room.clear();
        room.extend_from_slice(self.scratch.words());
        self.kept.push((index, room));
        Ok(())
    }

    fn loaded(&self) -> &[u8] {
        self.kept.last().map_or(&[], |(_, words)| words)
    }

    /// Fill `out` with the restored bytes from `at` on.
    fn fill(&mut self, mut at: usize, mut out: &mut [u8]) -> Result<()> {
        while !out.is_empty() {
            let index = self.restore.pieces.find(at);
            let range = self.restore.pieces.bytes(index);
            self.load(index)?;
            let from = at - range.start;
            let n = (range.len() - from).min(out.len());
            if n == 0 {
                return Err(Error::internal("bytes beyond the last piece"));
            }
            out[..n].copy_from_slice(&self.loaded()[from..from + n]);
            out = &mut out[n..];
            at += n;
        }
        Ok(())
    }
}

impl Source for Restored<'_, '_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> Shape {
        self.shape
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
        let (w, words) = (self.dtype.word_bytes(), self.restore.base_words()?);
        let len = cols.len() * w;
        let lines = base.chunks_exact_mut(len.max(1)).zip(fine_tuned.chunks_exact_mut(len.max(1)));
        for (r, (base, fine_tuned)) in rows.zip(lines) {
            let at = (r * self.shape.k + cols.start) * w;
            words.read(at, base)?;
            self.fill(at, fine_tuned)?;
        }
        Ok(())
    }
}
