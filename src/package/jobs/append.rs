//! The pieces of a tensor appended in order, until it is an entry of the package: by the codec that was chosen, or by what has
//! turned out to be smaller.

use super::encode::{EncodeScratch, PLAIN_FROM, TensorJob, XOR_WHOLE};
use crate::error::Result;
use crate::matrix::{Digest, DigestStream};
use crate::package::format::contents::ContentsPart;
use crate::package::format::frames::XorDeflater;
use crate::package::format::predicted::PredictedBody;
use crate::package::format::record::{self, BaseTensor, Entry};
use crate::package::format::stored::{Choice, Chosen, StoredBody};
use crate::package::format::sums::Sum;
use crate::package::format::words::PairSource;
use crate::package::io::spool::Spool;
use crate::package::options::{Codec, PackOptions, Trust};
use crate::vector;
use sha2::{Digest as _, Sha256};

impl TensorJob<'_> {
    /// Begin to append what `make` makes.
    pub(super) fn open<'j>(&'j self, options: &'j PackOptions, spool: &mut Spool) -> Result<OpenTensor<'j>> {
        let Chosen { choice, near } = self.choice(options).map_err(|e| self.named(e))?;
        let digest = self.delta.map(|(dtype, shape, _)| Digest::stream(dtype, shape));
        let sha256 = (digest.is_some() && options.trust == Trust::Sha256).then(Sha256::new);
        let mut open = OpenTensor {
            job: self,
            options,
            choice,
            near,
            body: StoredBody::None,
            start: spool.len(),
            changed: 0,
            digest,
            sha256,
            difference: Vec::new(),
            own: Vec::new(),
        };
        open.body = open.body(choice, spool)?;
        Ok(open)
    }
}

/// A tensor whose pieces are being appended to a spool.
pub(super) struct OpenTensor<'j> {
    job: &'j TensorJob<'j>,
    options: &'j PackOptions,
    choice: Choice,
    near: bool,
    body: StoredBody,
    start: u64,
    changed: u64,
    digest: Option<DigestStream>,
    /// Of the same words, where it is kept.
    sha256: Option<Sha256>,
    /// Of a small tensor, its XOR and the frame of it.
    difference: Vec<u8>,
    own: Vec<u8>,
}

impl OpenTensor<'_> {
    fn body(&self, choice: Choice, spool: &mut Spool) -> Result<StoredBody> {
        let dtype = self.job.delta.map(|(dtype, ..)| dtype);
        if matches!(choice, Choice::Predicted) {
            let p = self.job.prediction()?;
            return Ok(StoredBody::Predicted(Box::new(PredictedBody::new(
                &p.predictor,
                p.tile_words,
                spool,
            )?)));
        }
        let level = match choice {
            Choice::Resident { .. } => self.options.stream_level(),
            Choice::Xor if self.options.codec.is_none() => XorDeflater::LEVEL,
            _ => self.options.level(),
        };
        StoredBody::new(choice, dtype, self.job.bytes, level, spool)
    }

    /// Append piece `index`, which is in `s`: the next one in order.
    pub(super) fn take(&mut self, index: usize, spool: &mut Spool, s: &mut EncodeScratch) -> Result<()> {
        if let (Some(stream), Some((_, _, base))) = (&mut self.digest, &self.job.delta) {
            let words = base.words.kept(self.job.pieces.bytes(index), &s.base);
            if s.leaves.is_empty() {
                stream.update(words);
            } else {
                stream.leaves(&s.leaves);
            }
            self.sha256.iter_mut().for_each(|sha| sha.update(words));
        }
        self.append(spool, s).map_err(|e| self.job.named(e))
    }

    fn append(&mut self, spool: &mut Spool, s: &mut EncodeScratch) -> Result<()> {
        self.changed += s.changed;
        if !s.own.is_empty() {
            (self.difference, self.own) = (std::mem::take(&mut s.difference), std::mem::take(&mut s.own));
        }
        match &mut self.body {
            StoredBody::None => Ok(()),
            StoredBody::Frames(body) => body.push(spool, &s.frames, &s.lengths),
            StoredBody::Predicted(body) => body.push(spool, &s.frames, &s.lengths),
            StoredBody::Xor(body) => body.push(spool, &s.difference),
            StoredBody::Resident(body) => body.push(spool, &s.piece),
        }
    }

    /// Close the stored bytes and add the tensor to `part`, into whose spool its pieces went.
    pub(super) fn finish(mut self, part: &mut ContentsPart) -> Result<()> {
        let digest = self.digest.take().map(DigestStream::finish);
        self.add(part, digest).map_err(|e| self.job.named(e))
    }

    /// What is smaller than the codec that was chosen is taken in its place: nothing, where nothing changed; a share of a joint
    /// frame; one frame of the XOR.
    fn add(&mut self, part: &mut ContentsPart, digest: Option<Digest>) -> Result<()> {
        let mut entry = self.close(&mut part.spool, digest)?;
        let smallest = self.options.codec.is_none() && self.job.delta.is_some();
        if smallest && self.changed == 0 && self.job.bytes > 0 {
            if part.spool.len() > self.start {
                part.spool.truncate(self.start)?;
            }
            (entry.codec, entry.encoding, entry.range) = (Codec::Unchanged, None, self.start..self.start);
        } else if matches!(self.choice, Choice::Joint) {
            return part.join(entry, &self.difference, &self.own);
        } else if !self.own.is_empty() && (self.own.len() as u64) < entry.stored_bytes {
            part.spool.truncate(self.start)?;
            part.spool.append(&self.own)?;
            (entry.codec, entry.encoding) = (Codec::Xor, None);
            (entry.range.end, entry.check) = (part.spool.len(), record::check_of(&self.own));
        } else if smallest && self.near {
            self.rival(&mut part.spool, &mut entry)?;
        }
        entry.stored_bytes = entry.range.end - entry.range.start;
        part.entries.push(entry);
        Ok(())
    }

    /// Make the frame of a large tensor's XOR behind what was stored, and take it if it is smaller.
    fn rival(&mut self, spool: &mut Spool, entry: &mut Entry) -> Result<()> {
        let (end, whole) = (spool.len(), self.job.bytes <= XOR_WHOLE);
        // Of words that do not compress every level makes the same, and the first one holds the least memory.
        let plain = !whole && entry.stored_bytes as f64 > PLAIN_FROM * self.job.bytes as f64;
        let level = if plain { 1 } else { XorDeflater::LEVEL };
        let mut body = StoredBody::new(Choice::Xor, None, self.job.bytes, level, spool)?;
        let (mut scratch, mut words) = (EncodeScratch::default(), Vec::new());
        for index in 0..self.job.pieces.count() {
            self.job.make_as(Choice::Xor, index, self.options, &mut scratch)?;
            match &mut body {
                StoredBody::Xor(body) if !whole => body.push(spool, &scratch.difference)?,
                _ => words.extend_from_slice(&scratch.difference),
            }
        }
        let check = if whole {
            scratch.xor.frame(&words, &mut scratch.own)?;
            spool.append(&scratch.own)?;
            record::check_of(&scratch.own)
        } else {
            body.finish(spool, Choice::Xor, None, end)?.1
        };
        if spool.len() - end >= entry.stored_bytes {
            return spool.truncate(end);
        }
        (entry.codec, entry.encoding, entry.check) = (Codec::Xor, None, check);
        entry.range = end..spool.len();
        Ok(())
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
        let sha256 = self.sha256.take().map(|sha| Sum(sha.finalize().into()));
        Ok(Entry {
            name: job.name.into(),
            again: job.again,
            joint: None,
            dtype: job.dtype.into(),
            dims: job.dims.to_vec(),
            bytes: job.bytes as u64,
            codec,
            base: delta.map(|((_, _, base), digest)| BaseTensor {
                name: base.name.into(),
                file: base.file.map(str::to_owned),
                parts: base.parts.clone(),
                digest,
                short: false,
                sha256,
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
