//! One tensor into its stored bytes, piece by piece: pieces are made by any thread and appended in order, so that memory
//! holds a piece per thread whatever the tensor's size.

use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use crate::package::format::frames::{Deflater, FRAME_BYTES, XorDeflater, cut};
use crate::package::format::joint::JOINT_TENSOR;
use crate::package::format::kinds::words_of;
use crate::package::format::parts::BaseParts;
use crate::package::format::planes;
use crate::package::format::predicted::Predicted;
use crate::package::format::stored::{Choice, Chosen};
use crate::package::format::words::TensorWords;
use crate::package::io::aligned::Aligned;
use crate::package::io::pieces::Pieces;
use crate::package::options::PackOptions;
use crate::resident::{DeltaPiece, Estimate};
use crate::vector;
use std::sync::OnceLock;

/// Up to so many bytes, a tensor's own zstd frame of its XOR is made beside what was chosen, and taken where it is smaller.
pub(super) const XOR_TENSOR: usize = 64 << 10;

/// Up to so many bytes the frame of a tensor's XOR is made of all of it at once, which saves a few bytes; of larger ones piece by
/// piece.
pub(super) const XOR_WHOLE: usize = 8 << 20;

/// Words do not compress that take more than this share of themselves.
pub(super) const PLAIN_FROM: f64 = 0.999;

/// Up to so many bytes a tensor without a base is compressed closely: its planes lie in one block of zstd, which level 3 does
/// not divide.
const ALONE_CLOSELY: usize = 256 << 10;
const ALONE_LEVEL: i32 = 10;

/// The base tensor of a delta. Its digest is that of the words which are encoded, whatever was known of it before.
#[derive(Clone, Copy, Debug)]
pub(super) struct BaseWords<'a> {
    pub(super) name: &'a str,
    /// Its file, where the base has several tensors of that name.
    pub(super) file: Option<&'a str>,
    /// What it is put together of, where it is not one whole tensor.
    pub(super) parts: &'a BaseParts,
    pub(super) words: TensorWords<'a>,
}

/// One fine-tuned tensor to be stored.
pub(super) struct TensorJob<'a> {
    pub(super) name: &'a str,
    /// The source file that it is of, where an earlier one has a tensor of that name.
    pub(super) again: Option<usize>,
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
    pub(super) choice: OnceLock<Result<Chosen>>,
    /// In a box: few of very many tensors have one.
    pub(super) predicted: OnceLock<Box<Predicted>>,
}

/// What a thread keeps from piece to piece.
#[derive(Default)]
pub(super) struct EncodeScratch {
    pub(super) fine_tuned: Aligned,
    pub(super) base: Aligned,
    pub(super) piece: DeltaPiece,
    pub(super) frames: Vec<u8>,
    /// Stored and raw bytes of each frame.
    pub(super) lengths: Vec<(usize, usize)>,
    pub(super) leaves: Vec<[u8; 16]>,
    pub(super) changed: u64,
    pub(super) difference: Vec<u8>,
    planes: Vec<u8>,
    deflater: Option<(i32, Deflater)>,
    /// The zstd frame of a small tensor's XOR.
    pub(super) own: Vec<u8>,
    pub(super) xor: XorDeflater,
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
        let (again, choice, predicted) = (None, OnceLock::new(), OnceLock::new());
        Ok(Self {
            name,
            again,
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

    pub(super) fn named(&self, e: Error) -> Error {
        e.of_tensor(self.name)
    }

    /// Make piece `index`: read it, encode it, hash its base.
    pub(super) fn make(&self, index: usize, options: &PackOptions, s: &mut EncodeScratch) -> Result<()> {
        let made = self.choice(options).and_then(|chosen| {
            self.make_as(chosen.choice, index, options, s)?;
            s.own.clear();
            if s.changed > 0 && self.has_own(options) {
                self.make_own(index, s)?;
            }
            Ok(())
        });
        made.map_err(|e| self.named(e))
    }

    /// Whether the frame of its XOR is made beside what was chosen.
    pub(super) fn has_own(&self, options: &PackOptions) -> bool {
        let most = if options.fast { JOINT_TENSOR } else { XOR_TENSOR };
        options.codec.is_none() && self.delta.is_some() && self.bytes <= most
    }

    /// The frame of the XOR of the piece made last, which is all of the tensor.
    fn make_own(&self, index: usize, s: &mut EncodeScratch) -> Result<()> {
        let Some((_, _, base)) = self.delta else { return Ok(()) };
        let range = self.pieces.bytes(index);
        let fine_tuned = self.words.kept(range.clone(), &s.fine_tuned);
        planes::xor(base.words.kept(range, &s.base), fine_tuned, &mut s.difference);
        s.xor.frame(&s.difference, &mut s.own)
    }

    pub(super) fn make_as(
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
            let closely = options.level.is_none() && !options.fast && self.bytes <= ALONE_CLOSELY;
            return match choice {
                Choice::Same => Ok(()),
                _ => deflate(
                    if closely { ALONE_LEVEL } else { level },
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
                if matches!(choice, Choice::Xor | Choice::Joint) {
                    return Ok(());
                }
                let to = (&mut s.frames, &mut s.lengths);
                deflate(level, &mut s.deflater, &s.difference, word_bytes, &mut s.planes, to)
            }
        }
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

fn changed_meanwhile() -> Error {
    Error::io("its words changed while they were read; try again when they are at rest")
}
