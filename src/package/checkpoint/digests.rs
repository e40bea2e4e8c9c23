//! The digests of a checkpoint's tensors: from the cache, or computed by all threads, over tensors and inside them.
//!
//! Reads by position into one buffer per thread; never holds a tensor.

use super::cache::DigestCache;
use super::files::{Checkpoint, TensorFile};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use crate::package::format::container::{SafeTensors, TensorInfo};
use crate::package::io::aligned::Aligned;
use crate::package::io::ordered::{self, Crew};
use crate::package::options::Run;
use std::collections::BTreeMap;
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of leaves that one thread takes at a time; a longer leaf is taken whole.
const PIECE_BYTES: u64 = 8 << 20;

/// The digest of every tensor of a base, a .safetensors file or a folder of them, in order of their names. Files whose digests
/// `cache` knows are not read; what is computed is kept there.
///
/// # Errors
/// As [`Checkpoint::open_base`]; `Io` or `Truncated` for a file that is cut while it is read. Messages name the file.
pub fn digest_files(base: &Path, cache: &DigestCache, run: &Run<'_>) -> Result<Vec<(String, Digest)>> {
    digest_checkpoint(&Checkpoint::open_base(base)?, cache, run)
}

/// [`digest_files`] of a base that is open: the digests are those of the very files that it reads.
pub(super) fn digest_checkpoint(
    checkpoint: &Checkpoint,
    cache: &DigestCache,
    run: &Run<'_>,
) -> Result<Vec<(String, Digest)>> {
    let mut all = BTreeMap::new();
    for (i, digests) in digests_of(checkpoint, cache, run)?.into_iter().enumerate() {
        // Of two tensors of one name, the one that is meant where no file is named.
        all.extend(
            digests.into_iter().filter(|(name, _)| checkpoint.find(name).is_some_and(|(f, _)| f == i)),
        );
    }
    Ok(all.into_iter().collect())
}

/// The digests of every file of `checkpoint`.
pub(super) fn digests_of(
    checkpoint: &Checkpoint,
    cache: &DigestCache,
    run: &Run<'_>,
) -> Result<Vec<BTreeMap<String, Digest>>> {
    let of = |file: &TensorFile| {
        let digests = digest_file(file, cache, run).map_err(|e| e.within(file.place.display()))?;
        // Words of two states of a file would have the digest of neither.
        file.check_unchanged()?;
        Ok(digests)
    };
    checkpoint.files().iter().map(of).collect()
}

fn digest_file(t: &TensorFile, cache: &DigestCache, run: &Run<'_>) -> Result<BTreeMap<String, Digest>> {
    let file = t.tensors.file().ok_or_else(|| Error::internal("a checkpoint of no file"))?;
    let known: Vec<_> = t.tensors.header().tensors.iter().filter_map(DigestedTensor::of).collect();
    if let Some(kept) = cache.load(&t.place, file)
        && kept.len() == known.len()
        && known.iter().all(|t| kept.contains_key(&t.info.name))
    {
        return Ok(kept);
    }
    let before = cache.watched(file);
    let digests = compute(&t.tensors, &known, run)?;
    if let Some(before) = before {
        cache.store(&t.place, file, &before, &digests);
    }
    Ok(digests)
}

struct DigestedTensor<'a> {
    info: &'a TensorInfo,
    dtype: Dtype,
    shape: Shape,
    leaf_bytes: u64,
}

impl<'a> DigestedTensor<'a> {
    fn of(info: &'a TensorInfo) -> Option<Self> {
        let (dtype, shape) = info.matrix()?;
        let row = (shape.k as u64).saturating_mul(dtype.word_bytes() as u64);
        Some(Self { info, dtype, shape, leaf_bytes: row.saturating_mul(Digest::LEAF_ROWS as u64) })
    }

    fn leaves(&self) -> usize {
        self.shape.n.div_ceil(Digest::LEAF_ROWS)
    }

    /// Where leaf `i` begins, relative to the tensor; the last one ends with the tensor.
    fn at(&self, i: usize) -> u64 {
        self.leaf_bytes.saturating_mul(i as u64).min(self.info.bytes())
    }
}

/// Leaves `first .. first + count` of a tensor.
struct DigestPiece {
    tensor: usize,
    first: usize,
    count: usize,
}

fn pieces(tensors: &[DigestedTensor<'_>]) -> Vec<DigestPiece> {
    let mut out = Vec::new();
    for (tensor, t) in tensors.iter().enumerate() {
        let step = usize::try_from(PIECE_BYTES / t.leaf_bytes.max(1)).unwrap_or(usize::MAX).max(1);
        let leaves = t.leaves();
        out.extend((0..leaves).step_by(step).map(|first| DigestPiece {
            tensor,
            first,
            count: step.min(leaves - first),
        }));
    }
    out
}

type Leaves = Vec<[u8; 16]>;

fn compute(
    file: &SafeTensors,
    tensors: &[DigestedTensor<'_>],
    run: &Run<'_>,
) -> Result<BTreeMap<String, Digest>> {
    let pieces = pieces(tensors);
    run.begin("digest", tensors.iter().map(|t| t.info.bytes()).sum());
    let mut of_tensor: Vec<Leaves> =
        tensors.iter().map(|t| Vec::with_capacity(t.leaves().min(1 << 20))).collect();
    ordered::in_order::<(Aligned, Leaves)>(
        &Crew::of(run.jobs),
        pieces.len(),
        |i, (room, made)| {
            let t = &tensors[pieces[i].tensor];
            *made = leaves(file, t, &pieces[i], room).map_err(|e| e.of_tensor(&t.info.name))?;
            Ok(())
        },
        |i, (_, made)| {
            let (piece, t) = (&pieces[i], &tensors[pieces[i].tensor]);
            of_tensor[piece.tensor].append(made);
            run.advance(t.at(piece.first + piece.count) - t.at(piece.first))?;
            Ok(())
        },
    )?;
    let roots = tensors.iter().zip(of_tensor);
    let named = roots.map(|(t, l)| (t.info.name.clone(), Digest::of_leaves(t.dtype, t.shape, l.into_iter())));
    Ok(named.collect())
}

/// The digests of a piece's leaves. Leaves are mostly shorter than the buffer, but any of them may be longer.
fn leaves(
    file: &SafeTensors,
    t: &DigestedTensor<'_>,
    piece: &DigestPiece,
    room: &mut Aligned,
) -> Result<Leaves> {
    let end = t.at(piece.first + piece.count);
    let mut at = t.at(piece.first);
    let mut out = Vec::with_capacity(piece.count);
    let mut open = Xxh3::new();
    let mut filled = 0u64;
    while at < end {
        let here = t.info.range.start + at;
        let len = usize::try_from(end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        let bytes = room.room(len, file.data_at() + here);
        file.read_at(here, bytes)?;
        at += len as u64;
        let mut rest = room.get();
        while !rest.is_empty() {
            let want = t.leaf_bytes.min(end - t.at(piece.first + out.len())) - filled;
            let now = usize::try_from(want).unwrap_or(usize::MAX).min(rest.len());
            let (part, later) = rest.split_at(now);
            rest = later;
            let closes = now as u64 == want;
            if filled == 0 && closes {
                out.push(xxh3_128(part).to_le_bytes());
                continue;
            }
            open.update(part);
            filled += now as u64;
            if closes {
                out.push(open.digest128().to_le_bytes());
                open.reset();
                filled = 0;
            }
        }
    }
    // Rows of no columns have leaves of no bytes.
    out.resize(piece.count, xxh3_128(&[]).to_le_bytes());
    Ok(out)
}
