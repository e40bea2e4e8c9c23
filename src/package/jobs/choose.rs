//! How a tensor is stored: by the codec that takes the fewest bytes, as far as the whole of it or a sample tells.

use super::encode::{BaseWords, EncodeScratch, PLAIN_FROM, TensorJob, XOR_TENSOR, XOR_WHOLE};
use crate::codec::Encoding;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};
use crate::package::format::frames::compress;
use crate::package::format::joint::JOINT_TENSOR;
use crate::package::format::planes;
use crate::package::format::stored::{Choice, Chosen};
use crate::package::format::words::PairSource;
use crate::package::options::{Codec, PackOptions};
use crate::vector;
use std::ops::Range;

/// Planes must be this much smaller than the resident delta: they decode several times slower.
const PLANES_WORTH: f64 = 0.97;
/// Where the resident delta takes a smaller share of the words than this, planes are hardly ever smaller (`benches/pairs.rs`).
const PLANES_FROM: f64 = 0.25;
/// Pieces of a tensor that are compressed to learn what its planes would take.
const PLANES_SAMPLE: usize = 4;

/// Of tensors beyond [`XOR_TENSOR`] the zstd frame of the XOR is made where a sample of it takes at most so much of what was
/// chosen.
const XOR_NEAR: f64 = 1.03;
/// And taken at once where the sample takes less than so much of it.
const XOR_WORTH: f64 = 0.9;
/// Pieces of a tensor that are compressed to learn what its XOR would take.
const XOR_SAMPLE: usize = 2;
/// What a frame takes whatever is in it, about: a piece of the sample has it once, and so has the whole.
const XOR_HEAD: f64 = 32.0;
/// Bytes of a piece that level 1 looks at before the piece is compressed at level 10.
const XOR_LOOK: usize = 128 << 10;
/// Level 1 takes at most so much of what level 10 takes, or else there is little in it to find for either.
const XOR_QUICK: f64 = 1.5;
/// Words that do not compress are stored as planes up to here: in larger tensors what is around them weighs nothing.
const PLAIN_TENSOR: usize = 16 << 20;
/// And up to here what is around the words of one zstd frame may be less than what is around planes.
const PLAIN_FRAME: usize = 1 << 20;

/// Tensors from here on are worth a look where their XOR takes more than this share of them, and are stored by another codec
/// than `joint` where that takes less than so much of what the XOR takes: it has a digest of its own, too.
const DENSE_TENSOR: usize = 1024;
const DENSE_FROM: f64 = 0.25;
const DENSE_WORTH: f64 = 0.9;

/// Predicted tiles must be this much smaller than the resident delta: loading them reads the base.
const PREDICTED_WORTH: f64 = 0.97;

impl TensorJob<'_> {
    /// How it is stored: found by the first thread that asks.
    pub(super) fn choice(&self, options: &PackOptions) -> Result<Chosen> {
        self.choice.get_or_init(|| self.choose(options)).clone()
    }

    fn choose(&self, options: &PackOptions) -> Result<Chosen> {
        let (choice, bytes) = self.choose_codec(options)?;
        if options.codec.is_some() || options.fast || self.delta.is_none() || self.bytes <= XOR_TENSOR {
            return Ok(choice.into());
        }
        if matches!(choice, Choice::Resident { estimate, .. } if estimate.plan.encoding == Encoding::Unchanged)
        {
            return Ok(choice.into());
        }
        // What does not compress at all takes the fewest bytes as it is.
        if bytes > PLAIN_FROM * self.bytes as f64 && self.bytes <= PLAIN_TENSOR {
            return Ok(Chosen { choice: Choice::Planes, near: self.bytes <= PLAIN_FRAME });
        }
        let xor = self.sample_xor(bytes)?;
        if xor < bytes * XOR_WORTH - XOR_HEAD && self.bytes > XOR_WHOLE {
            return Ok(Choice::Xor.into());
        }
        Ok(Chosen { choice, near: xor < bytes * XOR_NEAR + 2.0 * XOR_HEAD })
    }

    /// The codec, and about how many bytes the tensor takes by it.
    fn choose_codec(&self, options: &PackOptions) -> Result<(Choice, f64)> {
        let all = self.bytes as f64;
        let Some((dtype, shape, base)) = self.delta else {
            return Ok((if self.same.is_some() { Choice::Same } else { Choice::Alone }, all));
        };
        match options.codec {
            Some(Codec::Xor) => return Ok((Choice::Xor, all)),
            Some(Codec::Planes) => return Ok((Choice::Planes, all)),
            Some(c) if !c.on_request() => {
                return Err(Error::invalid(format!("codec `{}` is not one for deltas", c.name())));
            }
            Some(Codec::Predicted) => {
                let found = self.predict(dtype)?;
                return Ok((if found.is_some() { Choice::Predicted } else { Choice::Planes }, all));
            }
            None if (1..=JOINT_TENSOR).contains(&self.bytes) => return self.choose_small(options),
            _ if !self.pieces.tiled() => return Ok((Choice::Planes, self.sample_planes(options)?)),
            _ => {}
        }
        self.smallest((dtype, shape, base), options)
    }

    /// A share of a joint frame, unless the tensor is one whose words nearly all changed, of which another codec may know more.
    fn choose_small(&self, options: &PackOptions) -> Result<(Choice, f64)> {
        let (joint, Some(delta)) = ((Choice::Joint, self.bytes as f64), self.delta) else {
            return Err(Error::internal("a joint frame of no delta"));
        };
        if self.bytes < DENSE_TENSOR || options.fast {
            return Ok(joint);
        }
        let xor = self.sample_xor(f64::INFINITY)?;
        if xor < DENSE_FROM * self.bytes as f64 {
            return Ok(joint);
        }
        let (choice, bytes) = self.smallest(delta, options)?;
        Ok(if bytes < DENSE_WORTH * xor { (choice, bytes) } else { joint })
    }

    /// Of the codecs that tell what changed, the one that takes the fewest bytes.
    fn smallest(
        &self,
        (dtype, shape, base): (Dtype, Shape, BaseWords<'_>),
        options: &PackOptions,
    ) -> Result<(Choice, f64)> {
        let all = self.bytes as f64;
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
            && smallest > all * PLANES_FROM + 512.0
        {
            let planes = self.sample_planes(options)?;
            if planes < smallest * PLANES_WORTH {
                return Ok((Choice::Planes, planes));
            }
        }
        Ok((choice, smallest))
    }

    /// What one frame of the XOR would take, from a few pieces of the tensor; more than is of interest where a quick look says
    /// that it would take much more than `smallest` bytes.
    fn sample_xor(&self, smallest: f64) -> Result<f64> {
        let Some((_, _, base)) = self.delta else { return Ok(f64::INFINITY) };
        let (count, mut s) = (self.pieces.count(), EncodeScratch::default());
        let xor = |range: Range<usize>, s: &mut EncodeScratch| -> Result<()> {
            let fine_tuned = self.words.get(range.clone(), &mut s.fine_tuned)?;
            planes::xor(base.words.get(range, &mut s.base)?, fine_tuned, &mut s.difference);
            Ok(())
        };
        let step = count.div_ceil(XOR_SAMPLE);
        let (mut stored, mut raw) = (0.0, 0usize);
        for index in (0..count).skip(step / 2).step_by(step) {
            let piece = self.pieces.bytes(index);
            let look = piece.start..piece.end.min(piece.start + XOR_LOOK);
            xor(look.clone(), &mut s)?;
            // What its second half adds to the first, so that what repeats over the whole tensor is not counted as new each time.
            let half = &s.difference[..s.difference.len() / 2];
            let quick = 2.0 * (compress(&s.difference, 1)?.len() as f64 - compress(half, 1)?.len() as f64);
            if quick * self.bytes as f64 / look.len() as f64 > smallest * XOR_QUICK + XOR_HEAD {
                return Ok(f64::INFINITY);
            }
            if quick > PLAIN_FROM * look.len() as f64 {
                // Level 10, whose tables are large, would find nothing either.
                (stored, raw) = (stored + piece.len() as f64, raw + piece.len());
                continue;
            }
            if look != piece {
                xor(piece.clone(), &mut s)?;
            }
            s.xor.frame(&s.difference, &mut s.own)?;
            (stored, raw) = (stored + s.own.len() as f64 - XOR_HEAD, raw + piece.len());
        }
        Ok(XOR_HEAD + stored * self.bytes as f64 / raw.max(1) as f64)
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
}
