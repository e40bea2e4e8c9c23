//! The stored bytes of one delta: every codec's writer, and the way back to a resident delta or to fine-tuned words.
//!
//! Base and entry have been compared before anything here runs (reader.rs), so the base's length bounds what is allocated.

use super::frames::{self, Frames, MAX_FRAME_BYTES};
use super::source::{PlaneReader, ResidentSource, StreamReader, XorReader, XorSource};
use super::{Codec, Entry, PackOptions};
use crate::codec::{Encoding, Prefer};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Matrix};
use crate::resident::{self, Resident};

/// XOR bytes of one `planes` frame; whole words of any size.
pub(super) const PLANE_FRAME_BYTES: usize = 1 << 20;

/// The longest resident delta that a base of this many bytes justifies.
pub(super) fn resident_limit(base_bytes: usize) -> u64 {
    4 * base_bytes as u64 + (64 << 10)
}

/// A delta as it will be stored.
pub(super) struct Stored {
    pub(super) codec: Codec,
    pub(super) bytes: Vec<u8>,
    pub(super) base: Digest,
    pub(super) encoding: Option<Encoding>,
    pub(super) changed: u64,
}

/// Encode one delta by the codec asked for, or by the smallest.
pub(super) fn write(base: &Matrix<'_>, fine_tuned: &Matrix<'_>, options: &PackOptions) -> Result<Stored> {
    let level = options.level();
    let stored = |codec, bytes, encoding| Stored {
        codec,
        bytes,
        base: base.digest(),
        encoding,
        changed: count_changed(base, fine_tuned),
    };
    match options.codec {
        Some(Codec::Xor) => return Ok(stored(Codec::Xor, write_xor(base, fine_tuned, level)?, None)),
        Some(Codec::Planes) => {
            return Ok(stored(Codec::Planes, write_planes(base, fine_tuned, level)?, None));
        }
        Some(c) if c.alone() => {
            return Err(Error::invalid(format!("codec `{}` is not one for deltas", c.name())));
        }
        _ => {}
    }
    let resident = resident::encode_pair(base, fine_tuned, options.prefer)?;
    let view = Resident::parse(&resident)?;
    let (base_digest, changed, encoding) =
        (view.header().base_digest, view.header().changed, view.header().encoding);
    let fits = resident.len() as u64 <= resident_limit(base.bytes().len());
    let mut candidates = Vec::new();
    if fits && options.codec != Some(Codec::Resident) {
        candidates.push((Codec::ResidentZstd, Some(encoding), write_sections(&view, level)?));
    }
    // An unchanged tensor's header compresses to less than any XOR frame table.
    if !fits || (options.codec.is_none() && encoding != Encoding::Unchanged) {
        candidates.push((Codec::Planes, None, write_planes(base, fine_tuned, level)?));
    }
    if fits && options.codec != Some(Codec::ResidentZstd) {
        candidates.insert(0, (Codec::Resident, Some(encoding), resident));
    }
    let (codec, encoding, bytes) = candidates
        .into_iter()
        .min_by_key(|(_, _, bytes)| bytes.len())
        .ok_or_else(|| Error::internal("no codec fits"))?;
    Ok(Stored { codec, bytes, base: base_digest, encoding, changed })
}

fn count_changed(base: &Matrix<'_>, fine_tuned: &Matrix<'_>) -> u64 {
    let w = base.dtype().word_bytes();
    base.bytes().chunks_exact(w).zip(fine_tuned.bytes().chunks_exact(w)).filter(|(a, b)| a != b).count()
        as u64
}

fn write_sections(view: &Resident<'_>, level: i32) -> Result<Vec<u8>> {
    let parts: Vec<_> = view.sections().into_iter().flat_map(|s| frames::cut(s, MAX_FRAME_BYTES)).collect();
    frames::write(&parts, level, |part, raw| raw.extend_from_slice(&view.bytes()[part]))
}

fn write_planes(base: &Matrix<'_>, fine_tuned: &Matrix<'_>, level: i32) -> Result<Vec<u8>> {
    let w = base.dtype().word_bytes();
    let parts: Vec<_> = frames::cut(0..base.bytes().len(), PLANE_FRAME_BYTES).collect();
    frames::write(&parts, level, |part, raw| {
        let (b, f) = (&base.bytes()[part.clone()], &fine_tuned.bytes()[part]);
        for plane in 0..w {
            let words = b[plane..].iter().step_by(w).zip(f[plane..].iter().step_by(w));
            raw.extend(words.map(|(x, y)| x ^ y));
        }
    })
}

fn write_xor(base: &Matrix<'_>, fine_tuned: &Matrix<'_>, level: i32) -> Result<Vec<u8>> {
    if base.bytes().is_empty() {
        return Ok(Vec::new());
    }
    let xor: Vec<u8> = base.bytes().iter().zip(fine_tuned.bytes()).map(|(x, y)| x ^ y).collect();
    frames::compress(&xor, level)
}

/// The resident delta of stored bytes, encoded for `prefer`; checked against entry and base. A delta that is stored for
/// something else is encoded again, tile by tile.
pub(super) fn to_resident(
    entry: &Entry,
    stored: Vec<u8>,
    base: &Matrix<'_>,
    digest: Digest,
    prefer: Prefer,
) -> Result<Vec<u8>> {
    let bytes = match entry.codec {
        Codec::Resident => stored,
        Codec::ResidentZstd => read_sections(&stored, base)?,
        Codec::Planes => {
            let frames = plane_frames(&stored, base)?;
            let reader = PlaneReader::new(frames, base.dtype().word_bytes());
            resident::encode(&mut XorSource::new(*base, digest, reader), prefer)?
        }
        Codec::Xor => {
            check_xor(&stored, base)?;
            let reader = StreamReader::new(&stored, base.bytes().len());
            resident::encode(&mut XorSource::new(*base, digest, reader), prefer)?
        }
        Codec::Alone | Codec::AloneZstd => return Err(stored_alone()),
    };
    check_resident(entry, &bytes, base)?;
    let again = entry.prefer != Some(prefer) && !matches!(entry.encoding, None | Some(Encoding::Unchanged));
    if again {
        resident::encode(&mut ResidentSource::new(Resident::parse(&bytes)?, *base), prefer)
    } else {
        Ok(bytes)
    }
}

/// The error for asking a delta of a tensor that is stored without a base.
pub(super) fn stored_alone() -> Error {
    Error::unsupported(
        "is stored alone (the base has no tensor of this name, dtype and shape), so it has no delta",
    )
}

fn read_sections(stored: &[u8], base: &Matrix<'_>) -> Result<Vec<u8>> {
    let limit = resident_limit(base.bytes().len());
    let frames = Frames::parse(stored, |total| {
        if total > limit {
            return Err(Error::corrupt(format!(
                "a resident delta of {total} bytes, but a base of {} bytes justifies at most {limit}",
                base.bytes().len()
            )));
        }
        Ok(())
    })?;
    let mut out = Vec::new();
    for i in 0..frames.len() {
        // Exactly, not doubling: this vector is what is kept in memory. A lying table fails at its first bad frame.
        out.reserve_exact(frames.raw_bytes(i));
        frames.read(i, &mut out)?;
    }
    Ok(out)
}

/// A resident delta that came from a package is what the package says, and is sound.
fn check_resident(entry: &Entry, bytes: &[u8], base: &Matrix<'_>) -> Result<()> {
    let view = Resident::parse(bytes)?;
    view.check_base(base).map_err(|e| Error::corrupt(e.message()))?;
    let h = view.header();
    let expected = entry.base.as_ref().map(|b| b.digest);
    if Some(h.base_digest) != expected {
        return Err(Error::corrupt(format!("the delta names base {}, its record another", h.base_digest)));
    }
    if Some(h.changed) != entry.changed {
        return Err(Error::corrupt(format!(
            "the delta has {} changed words, its record says {:?}",
            h.changed, entry.changed
        )));
    }
    if entry.encoding.is_some_and(|e| e != h.encoding) {
        return Err(Error::corrupt(format!(
            "the delta is encoded as {}, its record says {:?}",
            h.encoding, entry.encoding
        )));
    }
    view.check()
}

fn plane_frames<'a>(stored: &'a [u8], base: &Matrix<'_>) -> Result<Frames<'a>> {
    let len = base.bytes().len();
    let frames = Frames::parse(stored, |_| Ok(()))?;
    let want = len.div_ceil(PLANE_FRAME_BYTES);
    if frames.len() != want {
        return Err(Error::corrupt(format!("{} frames of planes where {want} belong", frames.len())));
    }
    for i in 0..want {
        let size = PLANE_FRAME_BYTES.min(len - i * PLANE_FRAME_BYTES);
        if frames.raw_bytes(i) != size {
            return Err(Error::corrupt(format!(
                "frame {i} of planes announces {} bytes, not {size}",
                frames.raw_bytes(i)
            )));
        }
    }
    Ok(frames)
}

fn check_xor(stored: &[u8], base: &Matrix<'_>) -> Result<()> {
    match (stored.is_empty(), base.bytes().is_empty()) {
        (true, true) => Ok(()),
        (false, true) => Err(Error::corrupt("bytes stored for an empty tensor")),
        _ => frames::check_frame(stored, base.bytes().len() as u64),
    }
}

/// Restore the fine-tuned words of stored bytes; `out` has the base's length.
pub(super) fn restore(
    entry: &Entry,
    stored: Vec<u8>,
    base: &Matrix<'_>,
    digest: Digest,
    out: &mut [u8],
) -> Result<()> {
    match entry.codec {
        Codec::Planes => {
            let mut reader = PlaneReader::new(plane_frames(&stored, base)?, base.dtype().word_bytes());
            restore_xor(entry, base, &mut reader, out)
        }
        Codec::Xor => {
            check_xor(&stored, base)?;
            restore_xor(entry, base, &mut StreamReader::new(&stored, base.bytes().len()), out)
        }
        _ => {
            let prefer = entry.prefer.unwrap_or(Prefer::Memory);
            let bytes = to_resident(entry, stored, base, digest, prefer)?;
            resident::restore(&Resident::parse(&bytes)?, base, out)
        }
    }
}

fn restore_xor(entry: &Entry, base: &Matrix<'_>, reader: &mut dyn XorReader, out: &mut [u8]) -> Result<()> {
    out.copy_from_slice(base.bytes());
    for part in frames::cut(0..out.len(), PLANE_FRAME_BYTES) {
        reader.hold(part.clone(), 1)?;
        reader.apply(part.start, &mut out[part])?;
    }
    let restored = Matrix::new(base.dtype(), base.shape(), out)?;
    let changed = count_changed(base, &restored);
    if Some(changed) != entry.changed {
        return Err(Error::corrupt(format!("{changed} words changed, the record says {:?}", entry.changed)));
    }
    Ok(())
}

/// Refuse, before anything is allocated, an `alone` tensor whose stored bytes cannot be its bytes.
pub(super) fn check_alone(entry: &Entry, stored: &[u8]) -> Result<()> {
    match entry.codec {
        Codec::AloneZstd => frames::check_frame(stored, entry.bytes),
        _ if stored.len() as u64 != entry.bytes => {
            Err(Error::corrupt(format!("{} bytes stored for a tensor of {}", stored.len(), entry.bytes)))
        }
        _ => Ok(()),
    }
}
