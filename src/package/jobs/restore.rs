//! Stored bytes and a base into fine-tuned words, piece by piece. Pieces are made by any thread; the digest of the base is
//! compared on the way where it is not known beforehand.

use crate::codec::Encoding;
use crate::error::{Error, Kind, Result};
use crate::matrix::{Digest, DigestStream, Dtype, Matrix, Shape};
use crate::package::format::blob::{Blob, compare_check};
use crate::package::format::frames::{self, Inflater};
use crate::package::format::predicted::{PredictedScratch, PredictedTiles};
use crate::package::format::reader::Package;
use crate::package::format::record::{BaseTensor, Entry, check_delta};
use crate::package::format::refusals::{another_base, stored_alone};
use crate::package::format::words::TensorWords;
use crate::package::format::xor::XorStream;
use crate::package::io::aligned::Aligned;
use crate::package::io::pieces::Pieces;
use crate::package::options::Codec;
use crate::resident::{Outline, Resident};
use crate::vector;
use std::sync::{Arc, Mutex, PoisonError};

/// One tensor to be restored.
pub(crate) struct Restore<'a> {
    package: &'a Package,
    /// What is stored: the entry itself, or the one whose bytes it shares.
    entry: &'a Entry,
    base: Option<RestoreBase<'a>>,
    pub(crate) pieces: Pieces,
    /// Kept from its first piece to its last: predictors and outlines of thousands of tensors at once would be much.
    way: Mutex<Option<Arc<StoredWay<'a>>>>,
}

#[derive(Clone, Copy)]
struct RestoreBase<'a> {
    dtype: Dtype,
    shape: Shape,
    words: TensorWords<'a>,
    /// The digest that the base must have.
    want: &'a BaseTensor,
    /// The digest it is said to have: of words in memory, or from the cache. A base of another one is refused at once.
    known: Option<Digest>,
    /// Whether the words are hashed as they are read. Nothing that was known before vouches for bytes of a file: it may
    /// have been written to since, and not every way of writing moves its times.
    hashed: bool,
}

enum StoredWay<'a> {
    Unchanged,
    Resident(Blob<'a>, Box<Outline>),
    Planes(Blob<'a>),
    Predicted(Box<PredictedTiles<'a>>),
    Xor(Mutex<XorStream<'a>>),
    /// The words of a joint frame, and where this tensor's begin.
    Joint(Arc<Vec<u8>>, usize),
}

/// What a thread keeps from piece to piece.
#[derive(Default)]
pub(crate) struct RestoreScratch {
    words: Aligned,
    /// Whether the words of the base are kept beside the leaves of their digest.
    keep_base: bool,
    base: Aligned,
    band: Vec<u8>,
    inflater: Inflater,
    predicted: PredictedScratch,
    leaves: Vec<[u8; 16]>,
}

impl RestoreScratch {
    /// The words of the piece made (and taken) last.
    pub(crate) fn words(&self) -> &[u8] {
        self.words.get()
    }

    /// One that keeps the words of the base, too.
    pub(super) fn keeping_base() -> Self {
        Self { keep_base: true, ..Self::default() }
    }

    /// The very words of the base that this piece was made from, where the base is [`Restore::hashed`].
    pub(super) fn base(&self) -> &[u8] {
        self.base.get()
    }

    /// The leaves of the base's digest that those words are; none where a leaf is in several pieces.
    pub(super) fn leaves(&self) -> &[[u8; 16]] {
        &self.leaves
    }

    /// Change the rooms of words and base for others.
    pub(super) fn swap(&mut self, words: &mut Aligned, base: &mut Aligned) {
        std::mem::swap(&mut self.words, words);
        std::mem::swap(&mut self.base, base);
    }
}

impl<'a> Restore<'a> {
    /// Of `entry` (never of codec `same`: name the entry that it stands for). `base` holds the base tensor's words and, where
    /// it is known, its digest; its dtype and shape have been compared with the entry's. Words in a file are hashed all the
    /// same, as they are read.
    pub(crate) fn new(
        package: &'a Package,
        entry: &'a Entry,
        base: Option<(TensorWords<'a>, Option<Digest>)>,
    ) -> Result<Self> {
        let bytes =
            usize::try_from(entry.bytes).map_err(|_| Error::unsupported("too large for this machine"))?;
        let dtype = entry.word_dtype();
        let (base, pieces) = match (&entry.base, dtype) {
            (Some(wanted), Some(dtype)) => {
                let (words, known) =
                    base.ok_or_else(|| Error::mismatch("is a delta, but no base was given"))?;
                let shape = entry.shape()?;
                if words.len()? != bytes {
                    return Err(Error::mismatch(format!(
                        "takes {bytes} bytes, but the base has {}",
                        words.len()?
                    )));
                }
                let hashed = known.is_none() || !matches!(words, TensorWords::Memory(_));
                let base = RestoreBase { dtype, shape, words, want: wanted, known, hashed };
                (Some(base), Pieces::new(dtype, shape, bytes))
            }
            // Without a base nothing but the stored bytes earns the size.
            _ if entry.bytes / frames::MAX_RATIO > entry.stored_bytes => {
                return Err(Error::corrupt(format!(
                    "{} stored bytes cannot hold the {bytes} announced",
                    entry.stored_bytes
                )));
            }
            (_, Some(dtype)) => (None, Pieces::new(dtype, entry.shape()?, bytes)),
            _ => (None, Pieces::flat(bytes)),
        };
        Ok(Self { package, entry, base, pieces, way: Mutex::default() })
    }

    fn named(&self, e: Error) -> Error {
        e.of_tensor(&self.entry.name)
    }

    /// What is stored, opened and compared with its digest by the first thread that asks.
    fn way(&self) -> Result<Arc<StoredWay<'a>>> {
        let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = &*way {
            return Ok(Arc::clone(opened));
        }
        let opened = Arc::new(self.open()?);
        *way = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn open(&self) -> Result<StoredWay<'a>> {
        if let Some(base @ RestoreBase { want, known: Some(known), .. }) = self.base
            && !want.is(known)
        {
            // What was known may be out of date: a right base is not refused for it.
            let found = if base.hashed { base_digest(&base)? } else { known };
            if !want.is(found) {
                return Err(another_base(want, found));
            }
        }
        let (e, container) = (self.entry, self.package.container());
        match e.codec {
            Codec::Unchanged => Ok(StoredWay::Unchanged),
            Codec::Joint => {
                let (words, at) = self.package.joint(e)?;
                Ok(StoredWay::Joint(words, at))
            }
            Codec::Planes | Codec::Alone => Ok(StoredWay::Planes(Blob::of(container, e)?)),
            Codec::Resident | Codec::ResidentZstd => self.outline(Blob::of(container, e)?),
            Codec::Predicted => {
                let base = self.base.ok_or_else(stored_alone)?;
                let tiles = PredictedTiles::open(container, e, base.dtype, base.shape.words()?)?;
                Ok(StoredWay::Predicted(Box::new(tiles)))
            }
            Codec::Same => Err(Error::internal("codec `same` was not resolved")),
            Codec::Xor => {
                compare_check(container, e.range.clone(), Some(e.check))?;
                self.xor()
            }
        }
    }

    fn outline(&self, blob: Blob<'a>) -> Result<StoredWay<'a>> {
        let base = self.base.ok_or_else(stored_alone)?;
        let mut inflater = Inflater::default();
        // A matrix has at least as many words as tiles, and its words are in the caller's hands.
        let tiles = base.shape.words()?;
        let outline = Outline::read(blob.len(), tiles, &mut |at, out| blob.read(at, out, &mut inflater))?;
        check_delta(self.entry, outline.header())?;
        Ok(match outline.header().encoding {
            Encoding::Unchanged => StoredWay::Unchanged,
            _ if !self.pieces.tiled() => {
                return Err(Error::corrupt("a resident delta of a matrix whose rows are too long for one"));
            }
            _ => StoredWay::Resident(blob, Box::new(outline)),
        })
    }

    fn xor(&self) -> Result<StoredWay<'a>> {
        let (range, bytes) = (self.entry.range.clone(), self.entry.bytes);
        match (range.is_empty(), bytes) {
            (true, 0) => Ok(StoredWay::Unchanged),
            (false, 0) => Err(Error::corrupt("bytes stored for an empty tensor")),
            _ => {
                let mut start = vec![0u8; (range.end - range.start).min(18) as usize];
                self.package.container().read_at(range.start, &mut start)?;
                let announced = zstd::zstd_safe::get_frame_content_size(&start).ok().flatten();
                if announced != Some(bytes) {
                    return Err(Error::corrupt(format!(
                        "a zstd frame announces {announced:?} bytes where {bytes} belong"
                    )));
                }
                Ok(StoredWay::Xor(Mutex::new(XorStream::new(self.package.container(), range, bytes)?)))
            }
        }
    }

    /// Make piece `index`: the fine-tuned words, but for codec `xor`, which [`Open::take`] completes.
    pub(crate) fn make(&self, index: usize, s: &mut RestoreScratch) -> Result<()> {
        s.leaves.clear();
        s.base.room(0, 0);
        self.make_words(index, s).map_err(|e| self.named(self.blame(e, index, s)))
    }

    /// A wrong base makes nonsense of a delta, and so does one that changes: say that, not what the nonsense looked like.
    fn blame(&self, e: Error, index: usize, s: &RestoreScratch) -> Error {
        let nonsense = matches!(e.kind(), Kind::Corrupt | Kind::Truncated);
        let (Some(base @ RestoreBase { hashed: true, .. }), Some(wanted), true) =
            (self.base, &self.entry.base, nonsense)
        else {
            return e;
        };
        let read = !s.leaves.is_empty() || !s.base().is_empty();
        match (self.digest_around(index, &base, s), base_digest(&base)) {
            (_, Ok(now)) if !wanted.is(now) => another_base(wanted, now),
            (Ok(then), _) if !read || wanted.is(then) => e,
            _ => Error::io(format!(
                "the base tensor `{}` was changed while it was read; try again when it is at rest",
                wanted.name
            )),
        }
    }

    /// The digest of the base, piece `index` as it was when it was read into `s`.
    fn digest_around(&self, index: usize, base: &RestoreBase<'_>, s: &RestoreScratch) -> Result<Digest> {
        let (mut stream, mut room) = (Digest::stream(base.dtype, base.shape), Aligned::default());
        for i in 0..self.pieces.count() {
            let range = self.pieces.bytes(i);
            match (i == index, s.leaves.is_empty()) {
                (true, false) => stream.leaves(&s.leaves),
                (true, true) => stream.update(s.base()),
                _ => stream.update(base.words.get(range, &mut room)?),
            }
        }
        Ok(stream.finish())
    }

    fn make_words(&self, index: usize, s: &mut RestoreScratch) -> Result<()> {
        let way = self.way()?;
        let range = self.pieces.bytes(index);
        let (at, len) = (range.start as u64, range.len());
        let Some(base) = self.base else {
            let StoredWay::Planes(blob) = &*way else { return Err(stored_alone()) };
            let words = s.words.room(len, 0);
            words.fill(0);
            let w = self.entry.word_dtype().map_or(1, Dtype::word_bytes);
            return blob.apply_planes(at, words, w, &mut s.inflater);
        };
        base.words.read(range.start, s.words.room(len, base.words.file_offset(range.start)))?;
        if base.hashed {
            self.hash(index, &base, s)?;
        }
        match &*way {
            StoredWay::Unchanged | StoredWay::Xor(_) => Ok(()),
            StoredWay::Joint(words, from) => {
                // The frame holds all words of its tensors, as its table was checked.
                let words = words[from + range.start..].iter();
                s.words.get_mut().iter_mut().zip(words).for_each(|(w, x)| *w ^= x);
                Ok(())
            }
            StoredWay::Planes(blob) => {
                blob.apply_planes(at, s.words.get_mut(), base.dtype.word_bytes(), &mut s.inflater)
            }
            StoredWay::Predicted(tiles) => {
                let read = |at: usize, out: &mut [u8]| base.words.read(at, out);
                let from = range.start / base.dtype.word_bytes();
                tiles.apply(from, s.words.get_mut(), &read, &mut s.predicted)
            }
            StoredWay::Resident(blob, outline) => {
                let tiles = self.pieces.tiles(&outline.header().grid(), index);
                let inflater = &mut s.inflater;
                let read = &mut |at: u64, out: &mut [u8]| blob.read(at, out, inflater);
                outline.cut(tiles, self.pieces.shape(index), read, &mut s.band)?;
                vector::patch(&Resident::parse(&s.band)?, s.words.get_mut())
            }
        }
    }

    /// Leaves of the base's digest, or the base itself to be hashed in order.
    fn hash(&self, index: usize, base: &RestoreBase<'_>, s: &mut RestoreScratch) -> Result<()> {
        if s.keep_base || !self.pieces.whole_leaves() {
            let words = s.words.get();
            s.base.room(words.len(), 0).copy_from_slice(words);
        }
        if self.pieces.whole_leaves() {
            let part = Matrix::new(base.dtype, self.pieces.shape(index), s.words.get())?;
            let leaves = part.shape().n.div_ceil(Digest::LEAF_ROWS);
            s.leaves.extend((0..leaves).map(|i| part.digest_leaf(i)));
        }
        Ok(())
    }

    /// Whether pieces are complete only when they are taken in order.
    pub(crate) fn forwards(&self) -> Result<bool> {
        Ok(matches!(*self.way()?, StoredWay::Xor(_)))
    }

    /// Begin again at the first piece, where pieces are taken in order.
    pub(super) fn rewind(&self) -> Result<()> {
        if let (StoredWay::Xor(xor), StoredWay::Xor(new)) = (&*self.way()?, self.xor()?) {
            let new = new.into_inner().unwrap_or_else(PoisonError::into_inner);
            *xor.lock().unwrap_or_else(PoisonError::into_inner) = new;
        }
        Ok(())
    }

    /// Complete the piece in `s`: the next one in order, where [`Restore::forwards`].
    pub(crate) fn complete(&self, s: &mut RestoreScratch) -> Result<()> {
        if let StoredWay::Xor(xor) = &*self.way()? {
            let mut xor = xor.lock().unwrap_or_else(PoisonError::into_inner);
            xor.apply(s.words.get_mut()).map_err(|e| self.named(e))?;
        }
        Ok(())
    }

    /// Dtype and shape of the matrix, and the base that it must have.
    pub(super) fn matrix(&self) -> Result<(Dtype, Shape, &BaseTensor)> {
        self.base.map(|b| (b.dtype, b.shape, b.want)).ok_or_else(stored_alone)
    }

    /// The whole digest of a base that is not [`Restore::hashed`].
    pub(super) fn known_digest(&self) -> Result<Digest> {
        self.base.and_then(|b| b.known).ok_or_else(|| Error::internal("a base of no known digest"))
    }

    /// Whether the base's words are in a file, or its digest is not known yet: what is read of them must be hashed.
    pub(super) fn hashed(&self) -> bool {
        self.base.is_some_and(|b| b.hashed)
    }

    /// The error for a base whose words have the digest `found`.
    pub(super) fn another_base(&self, found: Digest) -> Error {
        self.base.map_or_else(stored_alone, |base| another_base(base.want, found))
    }

    /// The base's words where they are in memory and need not be hashed.
    pub(super) fn base_in_memory(&self) -> Option<&'a [u8]> {
        match self.base {
            Some(RestoreBase { words: TensorWords::Memory(words), hashed: false, .. }) => Some(words),
            _ => None,
        }
    }

    /// The base's words.
    pub(crate) fn base_words(&self) -> Result<TensorWords<'a>> {
        self.base.map(|b| b.words).ok_or_else(stored_alone)
    }

    /// Begin to take what `make` makes.
    pub(crate) fn begin(&self) -> Taken<'_, 'a> {
        let digest = match self.base {
            Some(RestoreBase { hashed: true, dtype, shape, .. }) => Some(Digest::stream(dtype, shape)),
            _ => None,
        };
        Taken { restore: self, digest }
    }
}

fn base_digest(base: &RestoreBase<'_>) -> Result<Digest> {
    digest_of_words(&base.words, base.dtype, base.shape)
}

/// The digest of the matrix that `words` are, read piece by piece.
pub(super) fn digest_of_words(words: &TensorWords<'_>, dtype: Dtype, shape: Shape) -> Result<Digest> {
    let (mut stream, mut room) = (Digest::stream(dtype, shape), Aligned::default());
    for part in frames::cut(0..words.len()?, 1 << 20) {
        stream.update(words.get(part, &mut room)?);
    }
    Ok(stream.finish())
}

/// A tensor whose pieces are being taken in order.
pub(crate) struct Taken<'r, 'a> {
    restore: &'r Restore<'a>,
    digest: Option<DigestStream>,
}

impl Taken<'_, '_> {
    /// Take the piece in `s`: the next one in order. Its words are complete then.
    pub(crate) fn take(&mut self, s: &mut RestoreScratch) -> Result<()> {
        let r = self.restore;
        if let Some(stream) = &mut self.digest {
            if r.pieces.whole_leaves() {
                stream.leaves(&s.leaves);
            } else {
                stream.update(s.base());
            }
        }
        r.complete(s)
    }

    /// After the last piece: was it the right base? Gives the digest of what was read of it.
    pub(crate) fn finish(self) -> Result<Option<Digest>> {
        let r = self.restore;
        *r.way.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let Some((stream, base)) = self.digest.zip(r.base) else { return Ok(None) };
        let found = stream.finish();
        if base.want.is(found) { Ok(Some(found)) } else { Err(r.named(another_base(base.want, found))) }
    }
}
