//! One tensor into its stored bytes, piece by piece: pieces are made by any thread and appended in order, so that memory
//! holds a piece per thread whatever the tensor's size.

use crate::codec::Encoding;
use crate::error::{Error, Result};
use crate::matrix::{Digest, DigestStream, Dtype, Matrix, Shape};
use crate::package::format::frames::{Deflater, FRAME_BYTES, cut};
use crate::package::format::kinds::words_of;
use crate::package::format::parts::BasePart;
use crate::package::format::planes;
use crate::package::format::predicted::{Predicted, PredictedBody};
use crate::package::format::record::{self, BaseTensor, Entry};
use crate::package::format::stored::{Choice, StoredBody};
use crate::package::format::words::{PairSource, TensorWords};
use crate::package::io::aligned::Aligned;
use crate::package::io::pieces::Pieces;
use crate::package::io::spool::Spool;
use crate::package::options::{Codec, PackOptions};
use crate::resident::{DeltaPiece, Estimate};
use crate::vector;
use std::sync::OnceLock;

/// Planes must be this much smaller than the resident delta: they decode several times slower.
const PLANES_WORTH: f64 = 0.97;
/// Where the resident delta takes a smaller share of the words than this, planes are hardly ever smaller (`benches/pairs.rs`).
const PLANES_FROM: f64 = 0.25;
/// Pieces of a tensor that are compressed to learn what its planes would take.
const PLANES_SAMPLE: usize = 4;

/// Predicted tiles must be this much smaller than the resident delta: loading them reads the base.
const PREDICTED_WORTH: f64 = 0.97;

/// The base tensor of a delta. Its digest is that of the words which are encoded, whatever was known of it before.
#[derive(Clone, Copy, Debug)]
pub(super) struct BaseWords<'a> {
    pub(super) name: &'a str,
    /// Its file, where the base has several tensors of that name.
    pub(super) file: Option<&'a str>,
    /// What it is put together of, where it is not one whole tensor.
    pub(super) parts: &'a [BasePart],
    pub(super) words: TensorWords<'a>,
}

/// One fine-tuned tensor to be stored.
pub(super) struct TensorJob<'a> {
    pub(super) name: &'a str,
    pub(super) key: String,
    pub(super) dtype: &'a str,
    pub(super) dims: &'a [usize],
    pub(super) words: TensorWords<'a>,
    /// Dtype, shape and base, if it becomes a delta.
    pub(super) delta: Option<(Dtype, Shape, BaseWords<'a>)>,
    /// Another tensor of the fine-tune that has the same bytes.
    pub(super) same: Option<String>,
    pub(super) pieces: Pieces,
    word_bytes: usize,
    pub(super) bytes: usize,
    choice: OnceLock<Result<Choice>>,
    pub(super) predicted: OnceLock<Predicted>,
}

/// What a thread keeps from piece to piece.
#[derive(Default)]
pub(super) struct EncodeScratch {
    fine_tuned: Aligned,
    base: Aligned,
    pub(super) piece: DeltaPiece,
    pub(super) frames: Vec<u8>,
    /// Stored and raw bytes of each frame.
    pub(super) lengths: Vec<(usize, usize)>,
    pub(super) leaves: Vec<[u8; 16]>,
    pub(super) changed: u64,
    difference: Vec<u8>,
    planes: Vec<u8>,
    deflater: Option<(i32, Deflater)>,
}

impl EncodeScratch {
    /// The fine-tuned bytes of the piece made last, if they were read from a file.
    pub(super) fn fine_tuned(&self) -> &[u8] {
        self.fine_tuned.get()
    }
}

impl<'a> TensorJob<'a> {
    /// A tensor of `words`; a delta if `delta` says against what.
    pub(super) fn new(
        (name, dtype, dims): (&'a str, &'a str, &'a [usize]),
        words: TensorWords<'a>,
        delta: Option<(Dtype, Shape, BaseWords<'a>)>,
    ) -> Result<Self> {
        let bytes = words.len()?;
        if Dtype::from_name(dtype).is_some() {
            Shape::of_dims(dims).map_err(|e| e.of_tensor(name))?;
        }
        let kind = words_of(dtype, dims, bytes as u64);
        let cut = delta.as_ref().map(|(dtype, shape, _)| (*dtype, *shape)).or(kind);
        let pieces = cut.map_or(Pieces::flat(bytes), |(dtype, shape)| Pieces::new(dtype, shape, bytes));
        let word_bytes = kind.map_or(1, |(dtype, _)| dtype.word_bytes());
        let (key, choice, predicted) = (name.to_owned(), OnceLock::new(), OnceLock::new());
        Ok(Self {
            name,
            key,
            dtype,
            dims,
            words,
            delta,
            same: None,
            pieces,
            word_bytes,
            bytes,
            choice,
            predicted,
        })
    }

    fn named(&self, e: Error) -> Error {
        e.of_tensor(self.name)
    }

    /// How it is stored: found by the first thread that asks.
    fn choice(&self, options: &PackOptions) -> Result<Choice> {
        self.choice.get_or_init(|| self.choose(options)).clone()
    }

    fn choose(&self, options: &PackOptions) -> Result<Choice> {
        let Some((dtype, shape, base)) = self.delta else {
            return Ok(if self.same.is_some() { Choice::Same } else { Choice::Alone });
        };
        match options.codec {
            Some(Codec::Xor) => return Ok(Choice::Xor),
            Some(Codec::Planes) => return Ok(Choice::Planes),
            Some(c) if !c.delta() => {
                return Err(Error::invalid(format!("codec `{}` is not one for deltas", c.name())));
            }
            Some(Codec::Predicted) => {
                let found = self.predict(dtype)?;
                return Ok(if found.is_some() { Choice::Predicted } else { Choice::Planes });
            }
            _ if !self.pieces.tiled() => return Ok(Choice::Planes),
            _ => {}
        }
        let mut source = PairSource { dtype, shape, base: base.words, fine_tuned: self.words };
        let estimate = vector::estimate(&mut source, options.prefer)?;
        let zstd = options.codec != Some(Codec::Resident);
        let mut smallest = estimate.bytes as f64;
        let mut choice = Choice::Resident { estimate, zstd };
        if options.codec.is_none()
            && !options.fast
            && estimate.plan.encoding != Encoding::Unchanged
            && let Some(bytes) = self.predict(dtype)?
            && bytes < smallest * PREDICTED_WORTH
        {
            (smallest, choice) = (bytes, Choice::Predicted);
        }
        if options.codec.is_none()
            // Below that, planes save a header at most.
            && smallest > self.bytes as f64 * PLANES_FROM + 512.0
            && self.sample_planes(options)? < smallest * PLANES_WORTH
        {
            return Ok(Choice::Planes);
        }
        Ok(choice)
    }

    /// What the planes would take, from a few pieces of the tensor.
    fn sample_planes(&self, options: &PackOptions) -> Result<f64> {
        let (count, mut scratch) = (self.pieces.count(), EncodeScratch::default());
        let step = count.div_ceil(PLANES_SAMPLE);
        let (mut stored, mut raw) = (0usize, 0usize);
        for index in (0..count).skip(step / 2).step_by(step) {
            self.make_as(Choice::Planes, index, options, &mut scratch)?;
            stored += scratch.frames.len();
            raw += self.pieces.bytes(index).len();
        }
        Ok(stored as f64 * self.bytes as f64 / raw.max(1) as f64)
    }

    /// Make piece `index`: read it, encode it, hash its base.
    pub(super) fn make(&self, index: usize, options: &PackOptions, s: &mut EncodeScratch) -> Result<()> {
        self.choice(options)
            .and_then(|choice| self.make_as(choice, index, options, s))
            .map_err(|e| self.named(e))
    }

    fn make_as(
        &self,
        choice: Choice,
        index: usize,
        options: &PackOptions,
        s: &mut EncodeScratch,
    ) -> Result<()> {
        let range = self.pieces.bytes(index);
        s.piece.clear();
        s.frames.clear();
        s.lengths.clear();
        s.leaves.clear();
        s.changed = 0;
        let fine_tuned = self.words.get(range.clone(), &mut s.fine_tuned)?;
        let word_bytes = self.word_bytes;
        let level = options.level();
        let Some((dtype, _, base)) = self.delta else {
            return match choice {
                Choice::Same => Ok(()),
                _ => deflate(
                    level,
                    &mut s.deflater,
                    fine_tuned,
                    word_bytes,
                    &mut s.planes,
                    (&mut s.frames, &mut s.lengths),
                ),
            };
        };
        let words = base.words.get(range, &mut s.base)?;
        if self.pieces.whole_leaves() {
            let part = Matrix::new(dtype, self.pieces.shape(index), words)?;
            let leaves = part.shape().n.div_ceil(Digest::LEAF_ROWS);
            s.leaves.extend((0..leaves).map(|i| part.digest_leaf(i)));
        }
        match choice {
            Choice::Resident { estimate: Estimate { plan, .. }, .. } => {
                let tiles = self.pieces.tiles(&plan.grid, index);
                vector::encode_tiles(&plan, dtype, tiles, words, fine_tuned, &mut s.piece)?;
                s.changed = s.piece.changed;
                Ok(())
            }
            Choice::Predicted => {
                let p = self.prediction()?;
                let step = p.tile_words * dtype.word_bytes();
                for (base, tuned) in words.chunks(step).zip(fine_tuned.chunks(step)) {
                    let before = s.frames.len();
                    // The predictor knows every step that was counted in these very words.
                    let encoded = p.encoder.encode(dtype, base, tuned, &mut s.frames);
                    s.changed += encoded.map_err(|_| changed_meanwhile())?;
                    s.lengths.push((s.frames.len() - before, base.len()));
                }
                Ok(())
            }
            _ => {
                s.changed = count_changed(dtype, words, fine_tuned);
                planes::xor(words, fine_tuned, &mut s.difference);
                if matches!(choice, Choice::Xor) {
                    return Ok(());
                }
                let to = (&mut s.frames, &mut s.lengths);
                deflate(level, &mut s.deflater, &s.difference, word_bytes, &mut s.planes, to)
            }
        }
    }

    /// Begin to append what `make` makes.
    pub(super) fn open<'j>(&'j self, options: &'j PackOptions, spool: &mut Spool) -> Result<OpenTensor<'j>> {
        let choice = self.choice(options).map_err(|e| self.named(e))?;
        let digest = self.delta.map(|(dtype, shape, _)| Digest::stream(dtype, shape));
        let mut open = OpenTensor {
            job: self,
            options,
            choice,
            body: StoredBody::None,
            start: spool.len(),
            changed: 0,
            digest,
        };
        open.body = open.body(choice, spool)?;
        Ok(open)
    }
}

/// Append the frames of `words`' planes.
fn deflate(
    level: i32,
    kept: &mut Option<(i32, Deflater)>,
    words: &[u8],
    word_bytes: usize,
    planes: &mut Vec<u8>,
    (frames, lengths): (&mut Vec<u8>, &mut Vec<(usize, usize)>),
) -> Result<()> {
    let deflater = match kept {
        Some((l, deflater)) if *l == level => deflater,
        other => &mut other.insert((level, Deflater::new(level)?)).1,
    };
    for part in cut(0..words.len(), FRAME_BYTES) {
        planes::split(&words[part.clone()], word_bytes, planes);
        let before = frames.len();
        deflater.frame(planes, false, frames)?;
        lengths.push((frames.len() - before, part.len()));
    }
    Ok(())
}

/// Words that differ.
pub(crate) fn count_changed(dtype: Dtype, base: &[u8], fine_tuned: &[u8]) -> u64 {
    fn count<const W: usize>(a: &[u8], b: &[u8]) -> u64 {
        let ((a, _), (b, _)) = (a.as_chunks::<W>(), b.as_chunks::<W>());
        a.iter().zip(b).filter(|(a, b)| a != b).count() as u64
    }
    match dtype.word_bytes() {
        1 => count::<1>(base, fine_tuned),
        2 => count::<2>(base, fine_tuned),
        4 => count::<4>(base, fine_tuned),
        _ => count::<8>(base, fine_tuned),
    }
}

/// A tensor whose pieces are being appended to a spool.
pub(super) struct OpenTensor<'j> {
    job: &'j TensorJob<'j>,
    options: &'j PackOptions,
    choice: Choice,
    body: StoredBody,
    start: u64,
    changed: u64,
    digest: Option<DigestStream>,
}

impl OpenTensor<'_> {
    fn body(&self, choice: Choice, spool: &mut Spool) -> Result<StoredBody> {
        let dtype = self.job.delta.map(|(dtype, ..)| dtype);
        let resident = matches!(choice, Choice::Resident { .. });
        if matches!(choice, Choice::Predicted) {
            let p = self.job.prediction()?;
            return Ok(StoredBody::Predicted(Box::new(PredictedBody::new(
                &p.predictor,
                p.tile_words,
                spool,
            )?)));
        }
        let level = if resident { self.options.stream_level() } else { self.options.level() };
        StoredBody::new(choice, dtype, self.job.bytes, level, spool)
    }

    /// Append piece `index`, which is in `s`: the next one in order.
    pub(super) fn take(&mut self, index: usize, spool: &mut Spool, s: &mut EncodeScratch) -> Result<()> {
        if let (Some(stream), Some((_, _, base))) = (&mut self.digest, &self.job.delta) {
            if s.leaves.is_empty() {
                stream.update(base.words.kept(self.job.pieces.bytes(index), &s.base));
            } else {
                stream.leaves(&s.leaves);
            }
        }
        self.append(spool, s).map_err(|e| self.job.named(e))
    }

    fn append(&mut self, spool: &mut Spool, s: &mut EncodeScratch) -> Result<()> {
        self.changed += s.changed;
        match &mut self.body {
            StoredBody::None => Ok(()),
            StoredBody::Frames(body) => body.push(spool, &s.frames, &s.lengths),
            StoredBody::Predicted(body) => body.push(spool, &s.frames, &s.lengths),
            StoredBody::Xor(body) => body.push(spool, &s.difference),
            StoredBody::Resident(body) => body.push(spool, &s.piece),
        }
    }

    /// Close the stored bytes; the entry's range is that of the spool.
    pub(super) fn finish(mut self, spool: &mut Spool) -> Result<Entry> {
        let digest = self.digest.take().map(DigestStream::finish);
        self.close(spool, digest).map_err(|e| self.job.named(e))
    }

    fn close(&mut self, spool: &mut Spool, digest: Option<Digest>) -> Result<Entry> {
        if let (Choice::Resident { estimate, zstd }, StoredBody::Resident(body)) = (self.choice, &self.body)
            && estimate.is_off(body.bytes())
        {
            self.once_more(spool, zstd)?;
        }
        let body = std::mem::replace(&mut self.body, StoredBody::None);
        let (codec, check, encoding) = body.finish(spool, self.choice, digest, self.start)?;
        let job = self.job;
        let delta = job.delta.as_ref().zip(digest);
        Ok(Entry {
            name: job.name.into(),
            key: job.key.clone(),
            dtype: job.dtype.into(),
            dims: job.dims.to_vec(),
            bytes: job.bytes as u64,
            codec,
            base: delta.map(|((_, _, base), digest)| BaseTensor {
                name: base.name.into(),
                file: base.file.map(str::to_owned),
                parts: base.parts.to_vec(),
                digest,
            }),
            encoding,
            prefer: delta.map(|_| self.options.prefer),
            changed: delta.map(|_| self.changed),
            same: job.same.clone(),
            stored_bytes: spool.len() - self.start,
            range: self.start..spool.len(),
            check,
            version: record::VERSION,
        })
    }

    /// The sample misled: choose from all tiles, and encode the tensor again on this thread.
    fn once_more(&mut self, spool: &mut Spool, zstd: bool) -> Result<()> {
        let Some((dtype, shape, base)) = self.job.delta else { return Ok(()) };
        let mut source = PairSource { dtype, shape, base: base.words, fine_tuned: self.job.words };
        let estimate = vector::estimate_exactly(&mut source, self.options.prefer)?;
        if let Choice::Resident { estimate: before, .. } = self.choice
            && before.plan == estimate.plan
        {
            return Ok(());
        }
        self.choice = Choice::Resident { estimate, zstd };
        spool.truncate(self.start)?;
        self.changed = 0;
        self.body = self.body(self.choice, spool)?;
        let mut scratch = EncodeScratch::default();
        for index in 0..self.job.pieces.count() {
            self.job.make_as(self.choice, index, self.options, &mut scratch)?;
            self.append(spool, &mut scratch)?;
        }
        Ok(())
    }
}

fn changed_meanwhile() -> Error {
    Error::io("its words changed while they were read; try again when they are at rest")
}
