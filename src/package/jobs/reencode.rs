//! A stored delta as a resident delta for another preference: restored and encoded again piece by piece, never as a whole.
//!
//! The words of a base on disk may be written to meanwhile. So each piece is hashed as it is read, and must hash the same
//! each time that it is read; and the hashes of all pieces together must be the digest that the base must have. What is
//! encoded is what was hashed. Most pieces are read once: the few that the estimate looks at are kept until they are encoded.

use super::restore::{Restore, RestoreScratch};
use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::matrix::{Digest, DigestStream, Dtype, Shape};
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
        source.hash_all()?;
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

/// The delta by the estimate's plan, and its bytes before what equals was dropped. Reads every piece, and so knows whether
/// they are the base's.
fn encode_restored(source: &mut Restored<'_, '_>, estimate: &Estimate) -> Result<(Vec<u8>, u64)> {
    let (dtype, plan) = (source.dtype(), &estimate.plan);
    let mut assembler = Assembler::new(dtype, plan)?;
    let head = assembler.head_bytes();
    let (mut out, mut piece) = (vec![0; head], DeltaPiece::default());
    let pieces = source.restore.pieces;
    let mut digest = source.restore.hashed().then(|| Digest::stream(dtype, source.shape));
    for index in 0..pieces.count() {
        let at = source.load(index)?;
        piece.clear();
        let tiles = pieces.tiles(&plan.grid, index);
        let (base, words) = source.words(at)?;
        if let Some(digest) = &mut digest {
            match pieces.whole_leaves() {
                true => digest.leaves(&source.hashes[index]),
                false => digest.update(base),
            }
        }
        vector::encode_tiles(plan, dtype, tiles, base, words, &mut piece)?;
        assembler.add(&piece)?;
        out.extend_from_slice(&piece.payload);
        source.free(at);
    }
    if let Some(found) = digest.map(DigestStream::finish) {
        source.found(found)?;
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

/// A piece of both matrices.
#[derive(Default)]
struct RestoredPiece {
    /// Which one; `None` where its room is free.
    index: Option<usize>,
    words: Aligned,
    /// Empty where the base is in memory and need not be hashed.
    base: Aligned,
}

/// Base and restored words, by rectangles; keeps some of the pieces that it restored.
struct Restored<'r, 'a> {
    restore: &'r Restore<'a>,
    dtype: Dtype,
    shape: Shape,
    digest: Digest,
    kept: Vec<RestoredPiece>,
    /// Most pieces kept.
    room: usize,
    /// How each piece of a base whose words may change hashed when it was first read: the leaves of the base's digest that it
    /// is, or a hash of its own. Empty for one that was not read yet.
    hashes: Vec<Vec<[u8; 16]>>,
    scratch: RestoreScratch,
    /// The next piece of a stream that is only read forwards.
    next: usize,
}

impl<'r, 'a> Restored<'r, 'a> {
    /// Bytes of base and words that are kept at most, but for the two pieces that it takes.
    const KEPT_BYTES: usize = 16 << 20;
    /// Pieces kept where a row is in many.
    const KEPT_FLAT: usize = 40;

    fn new(restore: &'r Restore<'a>) -> Result<Self> {
        let (dtype, shape, _) = restore.matrix()?;
        // Of words that are hashed it is known when all of them were.
        let digest = if restore.hashed() { Digest([0; 16]) } else { restore.known_digest()? };
        let scratch = RestoreScratch::keeping_base();
        let pieces = restore.pieces;
        let room = match pieces.tiled() {
            true => (Self::KEPT_BYTES / (2 * pieces.bytes(0).len()).max(1)).max(2),
            false => Self::KEPT_FLAT,
        };
        let hashes = vec![Vec::new(); if restore.hashed() { pieces.count() } else { 0 }];
        Ok(Self { restore, dtype, shape, digest, kept: Vec::new(), room, hashes, scratch, next: 0 })
    }

    /// Hash every piece as it is now, and compare the base's digest, before any is restored.
    fn hash_all(&mut self) -> Result<()> {
        if !self.restore.hashed() {
            return Ok(());
        }
        let (words, mut room) = (self.restore.base_words()?, Aligned::default());
        let mut stream = Digest::stream(self.dtype, self.shape);
        for (index, hash) in self.hashes.iter_mut().enumerate() {
            let piece = words.get(self.restore.pieces.bytes(index), &mut room)?;
            stream.update(piece);
            hash.push(xxh3_128(piece).to_le_bytes());
        }
        let found = stream.finish();
        self.found(found)
    }

    /// The base's whole digest, of which a package may know the beginning only.
    fn found(&mut self, found: Digest) -> Result<()> {
        if !self.restore.matrix()?.2.is(found) {
            return Err(self.restore.another_base(found));
        }
        self.digest = found;
        Ok(())
    }

    /// Have piece `index` among those kept, and say where.
    fn load(&mut self, index: usize) -> Result<usize> {
        if let Some(at) = self.kept.iter().position(|p| p.index == Some(index)) {
            return Ok(at);
        }
        let at = self.place();
        self.kept[at].index = None;
        let forwards = self.restore.forwards()?;
        if forwards && index < self.next {
            self.restore.rewind()?;
            self.next = 0;
        }
        let first = if forwards { self.next } else { index };
        for i in first..=index {
            self.restore.make(i, &mut self.scratch)?;
            self.compare(i)?;
            self.restore.complete(&mut self.scratch)?;
            self.next = i + 1;
        }
        let piece = &mut self.kept[at];
        piece.index = Some(index);
        self.scratch.swap(&mut piece.words, &mut piece.base);
        Ok(at)
    }

    /// Where the next piece goes: into free room; then in place of the one that was loaded last, so that those before are there
    /// when they are asked for again, in the same order; of a row in many pieces in place of the oldest.
    fn place(&mut self) -> usize {
        if let Some(free) = self.kept.iter().position(|p| p.index.is_none()) {
            return free;
        }
        if self.kept.len() < self.room {
            self.kept.push(RestoredPiece::default());
        } else if !self.restore.pieces.tiled() {
            self.kept.rotate_left(1);
        }
        self.kept.len() - 1
    }

    /// The room of a piece that is not asked for again.
    fn free(&mut self, at: usize) {
        self.kept[at].index = None;
    }

    /// The words of the base that piece `index` was made from just now are those that it had when it was read first.
    fn compare(&mut self, index: usize) -> Result<()> {
        let Some(known) = self.hashes.get_mut(index) else { return Ok(()) };
        let own = match self.restore.pieces.whole_leaves() {
            true => None,
            false => Some([xxh3_128(self.scratch.base()).to_le_bytes()]),
        };
        let found = own.as_ref().map_or(self.scratch.leaves(), |own| &own[..]);
        if known.is_empty() {
            known.extend_from_slice(found);
        }
        if known == found {
            return Ok(());
        }
        Err(Error::io("the base was changed while it was read; try again when it is at rest"))
    }

    /// Base and restored words of the piece at place `at` of those kept.
    fn words(&self, at: usize) -> Result<(&[u8], &[u8])> {
        let piece = &self.kept[at];
        let index = piece.index.ok_or_else(|| Error::internal("a piece that was not loaded"))?;
        let base = match self.restore.base_in_memory() {
            Some(words) => &words[self.restore.pieces.bytes(index)],
            None => piece.base.get(),
        };
        Ok((base, piece.words.get()))
    }

    /// Fill `base` and `out` with the bytes of both from `at` on.
    fn fill(&mut self, mut at: usize, mut base: &mut [u8], mut out: &mut [u8]) -> Result<()> {
        while !out.is_empty() {
            let index = self.restore.pieces.find(at);
            let range = self.restore.pieces.bytes(index);
            let place = self.load(index)?;
            let from = at - range.start;
            let n = (range.len() - from).min(out.len());
            if n == 0 {
                return Err(Error::internal("bytes beyond the last piece"));
            }
            let (old, new) = self.words(place)?;
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
