//! Stored bytes in the making: what each codec appends to the spool, and how it closes.

use super::frames::{Deflater, FRAME_BYTES, TableWriter, cut};
use super::predicted::PredictedBody;
use super::record;
use crate::codec::Encoding;
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype};
use crate::package::io::spool::Spool;
use crate::package::options::Codec;
use crate::resident::{Assembler, DeltaPiece, Estimate, Finished};
use std::io::Write;
use xxhash_rust::xxh3::Xxh3;

/// How a tensor is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice {
    Same,
    Alone,
    Planes,
    Xor,
    Predicted,
    Joint,
    Resident { estimate: Estimate, zstd: bool },
}

/// How a tensor is stored, and whether one frame of its XOR may be smaller yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen {
    pub(crate) choice: Choice,
    pub(crate) near: bool,
}

impl From<Choice> for Chosen {
    fn from(choice: Choice) -> Self {
        Self { choice, near: false }
    }
}

/// A tensor's stored bytes, by codec.
pub(crate) enum StoredBody {
    /// Nothing, or what a joint frame will hold.
    None,
    Frames(Box<FramesBody>),
    Xor(Box<XorBody>),
    Predicted(Box<PredictedBody>),
    Resident(Box<ResidentBody>),
}

impl StoredBody {
    pub(crate) fn new(
        choice: Choice,
        dtype: Option<Dtype>,
        bytes: usize,
        level: i32,
        spool: &mut Spool,
    ) -> Result<Self> {
        Ok(match (choice, dtype) {
            (Choice::Same | Choice::Joint, _) => Self::None,
            (Choice::Xor, _) => Self::Xor(Box::new(XorBody::new(bytes, level)?)),
            (Choice::Resident { estimate, zstd }, Some(dtype)) => {
                let assembler = Assembler::new(dtype, &estimate.plan)?;
                if !zstd {
                    // Leave its place; the head is known only at the end.
                    spool.append(&vec![0; assembler.head_bytes()])?;
                }
                let framer = if zstd { Some(Framer::new(level)?) } else { None };
                Self::Resident(Box::new(ResidentBody { assembler, framer }))
            }
            _ => Self::Frames(Box::default()),
        })
    }

    /// Finish the stored bytes; returns their codec, their digest, and the encoding of a resident delta.
    pub(crate) fn finish(
        self,
        to: &mut Spool,
        choice: Choice,
        digest: Option<Digest>,
        start: u64,
    ) -> Result<(Codec, Digest, Option<Encoding>)> {
        match self {
            Self::None if matches!(choice, Choice::Joint) => Ok((Codec::Joint, record::check_of(&[]), None)),
            Self::None => Ok((Codec::Same, record::check_of(&[]), None)),
            Self::Frames(body) => {
                let codec = if matches!(choice, Choice::Planes) { Codec::Planes } else { Codec::Alone };
                Ok((codec, body.finish(to, 0)?, None))
            }
            Self::Xor(body) => Ok((Codec::Xor, body.finish(to)?, None)),
            Self::Predicted(body) => Ok((Codec::Predicted, body.finish(to)?, None)),
            Self::Resident(body) => {
                let digest = digest.ok_or_else(|| Error::internal("a delta without its base's digest"))?;
                body.finish(to, digest, start)
            }
        }
    }
}

fn digest_of(hash: &Xxh3) -> Digest {
    Digest(hash.digest128().to_le_bytes())
}

/// Frames and their table.
#[derive(Default)]
pub(crate) struct FramesBody {
    table: TableWriter,
    hash: Xxh3,
}

impl FramesBody {
    /// Append frames, of `(stored, raw)` bytes each.
    pub(crate) fn push(&mut self, to: &mut Spool, frames: &[u8], lengths: &[(usize, usize)]) -> Result<()> {
        lengths.iter().try_for_each(|(stored, raw)| self.table.push(*stored, *raw))?;
        self.hash.update(frames);
        to.append(frames)
    }

    pub(crate) fn finish(mut self, to: &mut Spool, first: usize) -> Result<Digest> {
        let table = std::mem::take(&mut self.table).finish(first)?;
        self.hash.update(&table);
        to.append(&table)?;
        Ok(digest_of(&self.hash))
    }
}

/// One zstd frame of the XOR bytes; nothing for an empty tensor.
pub(crate) struct XorBody {
    zstd: Option<zstd::stream::write::Encoder<'static, Vec<u8>>>,
    hash: Xxh3,
}

impl XorBody {
    fn new(bytes: usize, level: i32) -> Result<Self> {
        let fail = |e: std::io::Error| Error::internal(format!("zstd: {e}"));
        let zstd = if bytes > 0 {
            let mut zstd = zstd::stream::write::Encoder::new(Vec::new(), level).map_err(fail)?;
            zstd.set_pledged_src_size(Some(bytes as u64)).map_err(fail)?;
            Some(zstd)
        } else {
            None
        };
        Ok(Self { zstd, hash: Xxh3::new() })
    }

    pub(crate) fn push(&mut self, to: &mut Spool, xor: &[u8]) -> Result<()> {
        let Some(zstd) = &mut self.zstd else { return Ok(()) };
        zstd.write_all(xor)?;
        self.hash.update(zstd.get_ref());
        to.append(zstd.get_ref())?;
        zstd.get_mut().clear();
        Ok(())
    }

    fn finish(mut self, to: &mut Spool) -> Result<Digest> {
        if let Some(zstd) = self.zstd.take() {
            let rest = zstd.finish()?;
            self.hash.update(&rest);
            to.append(&rest)?;
        }
        Ok(digest_of(&self.hash))
    }
}

/// A resident delta, as it is or in frames.
pub(crate) struct ResidentBody {
    assembler: Assembler,
    /// `None` for codec `resident`.
    framer: Option<Framer>,
}

impl ResidentBody {
    /// Bytes of the delta so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.assembler.bytes()
    }

    pub(crate) fn push(&mut self, to: &mut Spool, piece: &DeltaPiece) -> Result<()> {
        self.assembler.add(piece)?;
        match &mut self.framer {
            Some(framer) => framer.push(to, &piece.payload),
            None => to.append(&piece.payload),
        }
    }

    fn finish(self, to: &mut Spool, digest: Digest, start: u64) -> Result<(Codec, Digest, Option<Encoding>)> {
        let done = self.assembler.finish(digest)?;
        let encoding = Some(done.header.encoding);
        if !done.keep_payload {
            to.truncate(start)?;
        }
        if let Some(framer) = self.framer {
            let check = framer.finish(to, done)?;
            return Ok((Codec::ResidentZstd, check, encoding));
        }
        if done.keep_payload {
            to.append(&done.tail)?;
            to.patch(start, &done.head)?;
        } else {
            to.append(&done.head)?;
        }
        let mut hash = Xxh3::new();
        to.replay(start..to.len(), |bytes| {
            hash.update(bytes);
            Ok(())
        })?;
        Ok((Codec::Resident, digest_of(&hash), encoding))
    }
}

/// Payload on its way into frames.
struct Framer {
    deflater: Deflater,
    /// What waits for a frame to be full.
    waiting: Vec<u8>,
    frames: FramesBody,
}

impl Framer {
    fn new(level: i32) -> Result<Self> {
        Ok(Self { deflater: Deflater::new(level)?, waiting: Vec::new(), frames: FramesBody::default() })
    }

    fn push(&mut self, to: &mut Spool, payload: &[u8]) -> Result<()> {
        self.waiting.extend_from_slice(payload);
        // The last frame waits even if it is full, so that a small delta is one frame with its head.
        let full = self.waiting.len().saturating_sub(1) / FRAME_BYTES * FRAME_BYTES;
        self.flush(to, full)
    }

    /// Append the frames of the first `bytes` that wait.
    fn flush(&mut self, to: &mut Spool, bytes: usize) -> Result<()> {
        let mut frame = Vec::new();
        for part in cut(0..bytes, FRAME_BYTES) {
            frame.clear();
            self.deflater.frame(&self.waiting[part.clone()], true, &mut frame)?;
            self.frames.push(to, &frame, &[(frame.len(), part.len())])?;
        }
        self.waiting.drain(..bytes);
        Ok(())
    }

    /// The rest of the payload, then head and tail; or all in order, if no frame was appended yet.
    fn finish(mut self, to: &mut Spool, done: Finished) -> Result<Digest> {
        if !done.keep_payload {
            self.waiting.clear();
            self.frames = FramesBody::default();
        }
        let mut first = 0;
        let mut rest = done.head;
        if self.frames.table.count() > 0 {
            self.flush(to, self.waiting.len())?;
            first = self.frames.table.count();
        }
        rest.append(&mut self.waiting);
        rest.extend_from_slice(&done.tail);
        let bytes = rest.len();
        self.waiting = rest;
        self.flush(to, bytes)?;
        self.frames.finish(to, first)
    }
}
