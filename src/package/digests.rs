//! The digests of a checkpoint's tensors: from the cache, or computed by all threads, over tensors and inside them.
//!
//! Reads by position into one buffer a thread; never holds a tensor.

use super::aligned::Aligned;
use super::container::{LENGTH_BYTES, SafeTensors, TensorInfo};
use super::{DigestCache, Identity, Run};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of leaves that one thread takes at a time; a longer leaf is taken whole.
const PIECE_BYTES: u64 = 8 << 20;

/// The digest of every tensor of a checkpoint, a .safetensors file or a folder of them, in order of their names. Files whose
/// digests `cache` knows are not read; what is computed is kept there. Tensors of dtypes that cannot be a base (such as
/// `F4`) have no digest and are left out.
///
/// # Errors
/// `Io`, `Corrupt` or `Truncated` files, `InvalidArgument` for a folder without .safetensors files or with one name twice;
/// every message names the file.
pub fn digest_files(base: &Path, cache: &DigestCache, run: &Run<'_>) -> Result<Vec<(String, Digest)>> {
    let mut all: BTreeMap<String, (Digest, PathBuf)> = BTreeMap::new();
    for path in shards(base)? {
        let digests = digest_file(&path, cache, run)?;
        for (name, digest) in digests {
            if let Some((_, other)) = all.insert(name.clone(), (digest, path.clone())) {
                return Err(Error::invalid(format!(
                    "{} and {} both have a tensor `{name}`; give the folder of one checkpoint",
                    other.display(),
                    path.display()
                )));
            }
        }
    }
    Ok(all.into_iter().map(|(name, (digest, _))| (name, digest)).collect())
}

/// The .safetensors files of a checkpoint, in order.
fn shards(base: &Path) -> Result<Vec<PathBuf>> {
    if !base.is_dir() {
        return Ok(vec![base.into()]);
    }
    let mut found = Vec::new();
    collect(base, 0, &mut found)?;
    found.sort();
    if found.is_empty() {
        let message = "has no .safetensors file; save pickled weights with save_pretrained(safe_serialization=True) \
                       or safetensors.torch.save_file first";
        return Err(Error::invalid(message).within(base.display()));
    }
    Ok(found)
}

/// Folders within folders that are looked into; a loop of links ends here.
const MAX_DEPTH: usize = 16;

fn collect(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    for item in std::fs::read_dir(folder).map_err(|e| Error::from(e).within(folder.display()))? {
        let path = item.map_err(|e| Error::from(e).within(folder.display()))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            found.push(path);
        } else if depth < MAX_DEPTH && path.is_dir() {
            collect(&path, depth + 1, found)?;
        }
    }
    Ok(())
}

fn digest_file(path: &Path, cache: &DigestCache, run: &Run<'_>) -> Result<BTreeMap<String, Digest>> {
    let tensors = SafeTensors::open(path)?;
    let within = |e: Error| e.within(path.display());
    let file = File::open(path).map_err(|e| within(e.into()))?;
    let known =
        tensors.header().tensors.iter().filter_map(Tensor::of).collect::<Result<Vec<_>>>().map_err(within)?;
    if let Some(kept) = cache.load(path, &file)
        && kept.len() == known.len()
        && known.iter().all(|t| kept.contains_key(&t.info.name))
    {
        return Ok(kept);
    }
    let before = Identity::of(&file).map_err(within)?;
    let data_at = LENGTH_BYTES + tensors.header_text().len() as u64;
    let digests = compute(&file, data_at, &known, run).map_err(within)?;
    cache.store(path, &file, &before, &digests);
    Ok(digests)
}

struct Tensor<'a> {
    info: &'a TensorInfo,
    dtype: Dtype,
    shape: Shape,
    leaf_bytes: u64,
}

impl<'a> Tensor<'a> {
    fn of(info: &'a TensorInfo) -> Option<Result<Self>> {
        let dtype = Dtype::from_name(&info.dtype)?;
        Some(Shape::of_dims(&info.dims).map(|shape| {
            let row = (shape.k as u64).saturating_mul(dtype.word_bytes() as u64);
            Self { info, dtype, shape, leaf_bytes: row.saturating_mul(Digest::LEAF_ROWS as u64) }
        }))
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
struct Piece {
    tensor: usize,
    first: usize,
    count: usize,
}

fn pieces(tensors: &[Tensor<'_>]) -> Vec<Piece> {
    let mut out = Vec::new();
    for (tensor, t) in tensors.iter().enumerate() {
        let step = usize::try_from(PIECE_BYTES / t.leaf_bytes.max(1)).unwrap_or(usize::MAX).max(1);
        let leaves = t.leaves();
        out.extend((0..leaves).step_by(step).map(|first| Piece {
            tensor,
            first,
            count: step.min(leaves - first),
        }));
    }
    out
}

type Leaves = Vec<[u8; 16]>;

fn compute(
    file: &File,
    data_at: u64,
    tensors: &[Tensor<'_>],
    run: &Run<'_>,
) -> Result<BTreeMap<String, Digest>> {
    let pieces = pieces(tensors);
    if let Some(progress) = run.progress {
        progress.begin("digest", tensors.iter().map(|t| t.info.bytes()).sum());
    }
    let jobs = match run.jobs {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<Leaves>)>> = Mutex::new(Vec::new());
    let work = || {
        let mut room = Aligned::default();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(i) else { return };
            let t = &tensors[piece.tensor];
            let made = leaves(file, data_at, t, piece, &mut room)
                .map_err(|e| e.within(format_args!("tensor `{}`", t.info.name)));
            if made.is_err() {
                next.store(pieces.len(), Ordering::Relaxed);
            }
            if let Some(progress) = run.progress {
                progress.advance(t.at(piece.first + piece.count) - t.at(piece.first));
            }
            done.lock().unwrap_or_else(PoisonError::into_inner).push((i, made));
        }
    };
    std::thread::scope(|scope| {
        (1..jobs.min(pieces.len())).for_each(|_| {
            scope.spawn(work);
        });
        work();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(i, _)| *i);
    let mut of_tensor: Vec<Leaves> =
        tensors.iter().map(|t| Vec::with_capacity(t.leaves().min(1 << 20))).collect();
    for (i, made) in done {
        of_tensor[pieces[i].tensor].extend(made?);
    }
    let roots = tensors.iter().zip(of_tensor);
    let named = roots.map(|(t, l)| (t.info.name.clone(), Digest::of_leaves(t.dtype, t.shape, l.into_iter())));
    Ok(named.collect())
}

/// The digests of a piece's leaves. Leaves are mostly shorter than the buffer, but any of them may be longer.
fn leaves(file: &File, data_at: u64, t: &Tensor<'_>, piece: &Piece, room: &mut Aligned) -> Result<Leaves> {
    let end = t.at(piece.first + piece.count);
    let mut at = t.at(piece.first);
    let mut out = Vec::with_capacity(piece.count);
    let mut open = Xxh3::new();
    let mut filled = 0u64;
    while at < end {
        let here = data_at + t.info.range.start + at;
        let len = usize::try_from(end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        let bytes = room.room(len, here);
        file.read_exact_at(bytes, here).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::truncated("the file was cut while it was read"),
            _ => e.into(),
        })?;
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
