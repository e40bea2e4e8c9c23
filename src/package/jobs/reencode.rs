//! A stored delta as a resident delta for another preference: restored and encoded again piece by piece, never as a whole.
//!
//! The words of a base on disk are read several times, and somebody may write to it meanwhile. So its pieces are hashed once,
//! together, and compared with the digest that the base must have; and each time a piece is read it must hash as it did.
//! What is encoded is what was hashed.

use super::restore::{Restore, RestoreScratch};
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use crate::package::io::aligned::Aligned;
use crate::resident::{self, Assembler, DeltaPiece, Estimate, Source};
use crate::vector;
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_128;

/// The resident delta for `prefer`.
///
/// # Errors
/// `Mismatch` for another base; `Io` for one on disk that is changed meanwhile.
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
    for index in 0..pieces.count() {
        source.load(index)?;
        piece.clear();
        let tiles = pieces.tiles(&plan.grid, index);
        let (base, words) = source.loaded();
        vector::encode_tiles(plan, dtype, tiles, base, words, &mut piece)?;
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

/// The hash of each piece of the base as it is now, and its digest, which is the one that it must have.
fn hash_pieces(restore: &Restore<'_>) -> Result<(Digest, Vec<u128>)> {
    let (dtype, shape, want) = restore.matrix()?;
    let (words, mut room) = (restore.base_words()?, Aligned::default());
    let (mut stream, mut out) = (Digest::stream(dtype, shape), Vec::new());
    for index in 0..restore.pieces.count() {
        let piece = words.get(restore.pieces.bytes(index), &mut room)?;
        stream.update(piece);
        out.push(xxh3_128(piece));
    }
    let found = stream.finish();
    if want.is(found) { Ok((found, out)) } else { Err(restore.another_base(found)) }
}

/// A piece of both matrices.
#[derive(Default)]
struct RestoredPiece {
    index: usize,
    words: Vec<u8>,
    base: Vec<u8>,
}

/// Base and restored words, by rectangles; keeps the pieces restored last.
struct Restored<'r, 'a> {
    restore: &'r Restore<'a>,
    dtype: Dtype,
    shape: Shape,
    digest: Digest,
    kept: Vec<RestoredPiece>,
    /// The hash of each piece of a base whose words may change, all of which were compared with `digest` together.
    pieces: Vec<u128>,
    scratch: RestoreScratch,
    /// The next piece of a stream that is only read forwards.
    next: usize,
}

impl<'r, 'a> Restored<'r, 'a> {
    /// Pieces kept where a rectangle is in one, and where its rows are in many.
    const KEPT: [usize; 2] = [2, 40];

    fn new(restore: &'r Restore<'a>) -> Result<Self> {
        let (dtype, shape, _) = restore.matrix()?;
        let scratch = RestoreScratch::keeping_base();
        let (digest, pieces) = match restore.hashed() {
            true => hash_pieces(restore)?,
            false => (restore.known_digest()?, Vec::new()),
        };
        Ok(Self { restore, dtype, shape, digest, kept: Vec::new(), pieces, scratch, next: 0 })
    }

    /// Have piece `index` at the end of those kept.
    fn load(&mut self, index: usize) -> Result<()> {
        if let Some(i) = self.kept.iter().position(|p| p.index == index) {
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
                self.compare(self.next)?;
                self.restore.complete(&mut self.scratch)?;
                self.next += 1;
            }
        } else {
            self.restore.make(index, &mut self.scratch)?;
            self.compare(index)?;
        }
        let most = Self::KEPT[usize::from(!self.restore.pieces.tiled())];
        let mut piece = if self.kept.len() < most { RestoredPiece::default() } else { self.kept.remove(0) };
        piece.index = index;
        piece.words.clear();
        piece.words.extend_from_slice(self.scratch.words());
        piece.base.clear();
        match self.restore.hashed() {
            true => piece.base.extend_from_slice(self.scratch.base()),
            false => {
                let (words, mut room) = (self.restore.base_words()?, Aligned::default());
                piece.base.extend_from_slice(words.get(self.restore.pieces.bytes(index), &mut room)?);
            }
        }
        self.kept.push(piece);
        Ok(())
    }

    /// The words of the base that piece `index` was made from just now are those that were compared with its digest.
    fn compare(&self, index: usize) -> Result<()> {
        match self.pieces.get(index) {
            Some(hash) if *hash != xxh3_128(self.scratch.base()) => {
                Err(Error::io("the base was changed while it was read; try again when it is at rest"))
            }
            _ => Ok(()),
        }
    }

    /// Base and restored words of the piece loaded last.
    fn loaded(&self) -> (&[u8], &[u8]) {
        self.kept.last().map_or((&[], &[]), |p| (&p.base, &p.words))
    }

    /// Fill `base` and `out` with the bytes of both from `at` on.
    fn fill(&mut self, mut at: usize, mut base: &mut [u8], mut out: &mut [u8]) -> Result<()> {
        while !out.is_empty() {
            let index = self.restore.pieces.find(at);
            let range = self.restore.pieces.bytes(index);
            self.load(index)?;
            let from = at - range.start;
            let n = (range.len() - from).min(out.len());
            if n == 0 {
                return Err(Error::internal("bytes beyond the last piece"));
            }
            let (old, new) = self.loaded();
            base[..n].copy_from_slice(&old[from..from + n]);
            out[..n].copy_from_slice(&new[from..from + n]);
            (base, out) = (&mut base[n..], &mut out[n..]);
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
        let w = self.dtype.word_bytes();
        let len = cols.len() * w;
        let lines = base.chunks_exact_mut(len.max(1)).zip(fine_tuned.chunks_exact_mut(len.max(1)));
        for (r, (base, fine_tuned)) in rows.zip(lines) {
            self.fill((r * self.shape.k + cols.start) * w, base, fine_tuned)?;
        }
        Ok(())
    }
}
