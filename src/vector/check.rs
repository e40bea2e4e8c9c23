//! `delta_check`: a delta and its base looked at in full, on the caller's threads. The outcome is that of
//! [`Resident::check_full`], the oracle, which is asked for its words wherever something is wrong.
//!
//! **Floor.** Bytes: base once, from memory; its digest and its tiles are made of what is in the caches then, so that a task
//! takes whole leaves of the digest and whole rows of tiles. Operations for 32 words of 16 bits: xxh3 some 40; 4 to copy them
//! where their tile says what changed, up to 90 to decode them where it says all; 10 to compare.

use super::bits::{BitTask, Masks, RUN};
use super::dispatch::{Isa, on_isa};
use super::exec::{Executor, LEAST_WORDS, try_run};
use super::simd::Simd;
use super::tile::tile_words;
use crate::codec::Encoding;
use crate::codec::word::{Word, with_word};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Matrix};
use crate::resident::Resident;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Validate a delta in full, and that it belongs to `base`: its bytes, the digest of the base, and a decode of every tile,
/// whose changed words are counted.
///
/// # Errors
/// Those of [`Resident::check_full`].
pub fn delta_check(delta: &Resident<'_>, base: &Matrix<'_>, exec: &dyn Executor) -> Result<()> {
    delta_check_on(Isa::active()?, delta, base, exec)
}

/// [`delta_check`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_check`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_check_on(isa: Isa, delta: &Resident<'_>, base: &Matrix<'_>, exec: &dyn Executor) -> Result<()> {
    delta.check()?;
    delta.check_base(base)?;
    match on_isa!(isa, s => look(s, delta, base, exec))? {
        Ok((digest, changed))
            if (digest, changed) == (delta.header().base_digest, delta.header().changed) =>
        {
            Ok(())
        }
        // It says what is wrong, in order.
        _ => delta.check_full(base),
    }
}

/// The digest of the base, and how many words change.
fn look<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    exec: &dyn Executor,
) -> Result<(Digest, u64)> {
    let (grid, shape) = (delta.grid(), base.shape());
    let rows = grid.tile_rows.max(Digest::LEAF_ROWS);
    if !rows.is_multiple_of(grid.tile_rows) || !rows.is_multiple_of(Digest::LEAF_ROWS) {
        return Err(Error::internal(format!("tiles of {} rows beside leaves", grid.tile_rows)));
    }
    let hollow = shape.n == 0 || shape.k == 0;
    let tasks = shape.n.div_ceil(rows);
    let leaves: Vec<Mutex<Vec<[u8; 16]>>> = (0..tasks).map(|_| Mutex::default()).collect();
    let changed = AtomicU64::new(0);
    let words = (0..tasks).map(|task| (shape.n - task * rows).min(rows) * shape.k);
    try_run(exec, LEAST_WORDS, words, |task| {
        let (r0, r1) = (task * rows, ((task + 1) * rows).min(shape.n));
        let found =
            (r0 / Digest::LEAF_ROWS..r1.div_ceil(Digest::LEAF_ROWS)).map(|leaf| base.digest_leaf(leaf));
        *leaves[task].lock().unwrap_or_else(|p| p.into_inner()) = found.collect();
        if hollow {
            return Ok(());
        }
        let across = grid.tile_cols_count();
        let mut room = Vec::new();
        for index in r0 / grid.tile_rows * across..r1.div_ceil(grid.tile_rows) * across {
            changed.fetch_add(changes(s, delta, base, index, &mut room)?, Ordering::Relaxed);
        }
        Ok(())
    })?;
    let leaves = leaves.into_iter().flat_map(|leaf| leaf.into_inner().unwrap_or_else(|p| p.into_inner()));
    Ok((Digest::of_leaves(base.dtype(), shape, leaves), changed.into_inner()))
}

/// What [`super::delta_apply`] checks before the first word changes: the delta's bytes against their digest, that `base` is its
/// base, and that every stream ends where its words do. Whoever changes many matrices asks for all of them first.
///
/// # Errors
/// Those of [`Resident::check_match`]; `Corrupt` or `Truncated` for a forged stream.
pub fn delta_matches(delta: &Resident<'_>, base: &Matrix<'_>, exec: &dyn Executor) -> Result<()> {
    delta.check_match(base)?;
    on_isa!(Isa::active()?, s => decodes(s, delta, base, exec))?
}

/// Decode every tile beside its words, which stay as they are. After [`Resident::check_match`] only streams of encoding
/// `exponent` can still fail: how many bits one takes follows from the base's words. A delta is forged then, since both digests
/// are right, and whoever changes words in place must know that before the first one.
pub(super) fn decodes<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    exec: &dyn Executor,
) -> Result<()> {
    let (grid, shape) = (delta.grid(), base.shape());
    if delta.header().encoding != Encoding::Exponent || base.bytes().is_empty() {
        return Ok(());
    }
    let across = grid.tile_cols_count();
    let bands = shape.n.div_ceil(grid.tile_rows);
    let words = (0..bands).map(|_| grid.tile_rows * shape.k);
    try_run(exec, LEAST_WORDS, words, |band| {
        let mut room = Vec::new();
        (band * across..(band + 1) * across)
            .try_for_each(|index| decoded(s, delta, base, index, &mut room).map(|_| ()))
    })
}

/// The fine-tuned words of tile `index`, in `room`.
fn decoded<'r, S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    index: usize,
    room: &'r mut Vec<u64>,
) -> Result<&'r [u8]> {
    let bytes = delta.grid().rect(index).words() * base.dtype().word_bytes();
    room.resize(bytes.div_ceil(8).max(room.len()), 0);
    let words = &mut bytemuck::cast_slice_mut::<u64, u8>(room)[..bytes];
    tile_words(s, delta, base, index, words)?;
    Ok(words)
}

/// How many words of tile `index` change.
fn changes<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    index: usize,
    room: &mut Vec<u64>,
) -> Result<u64> {
    let (rect, dtype) = (delta.grid().rect(index), base.dtype());
    let words = decoded(s, delta, base, index, room)?;
    let rows = words.chunks_exact((rect.cols() * dtype.word_bytes()).max(1));
    let pairs = (rect.r0..rect.r1).zip(rows);
    let count = |(r, after): (usize, &[u8])| {
        let before = base.span(r, rect.c0, rect.cols());
        with_word!(dtype, W => s.with_bits(CountChanged::<W>::new(before, after)))
    };
    Ok(pairs.map(count).sum())
}

/// Two runs of words whose differing words are to be counted.
struct CountChanged<'a, W> {
    before: &'a [u8],
    after: &'a [u8],
    word: std::marker::PhantomData<W>,
}

impl<'a, W> CountChanged<'a, W> {
    fn new(before: &'a [u8], after: &'a [u8]) -> Self {
        Self { before, after, word: std::marker::PhantomData }
    }
}

impl<W: Word> BitTask for CountChanged<'_, W> {
    type Out = u64;

    #[inline(always)]
    fn call(self, masks: impl Masks) -> u64 {
        let size = RUN * W::BYTES;
        let (before, after) = (self.before.chunks_exact(size), self.after.chunks_exact(size));
        let words = |bytes: &[u8]| {
            let mut words = [W::default(); RUN];
            bytemuck::cast_slice_mut::<W, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
            words
        };
        let rest = masks.differ(&words(before.remainder()), &words(after.remainder()));
        let whole = before.zip(after).map(|(b, a)| {
            // Words of a base in a tensor lie as words must; others are copied.
            let cast =
                |bytes| bytemuck::try_cast_slice::<u8, W>(bytes).ok().and_then(|w| w.first_chunk::<RUN>());
            let differ = match (cast(b), cast(a)) {
                (Some(b), Some(a)) => masks.differ(b, a),
                _ => masks.differ(&words(b), &words(a)),
            };
            u64::from(differ.count_ones())
        });
        whole.sum::<u64>() + u64::from(rest.count_ones())
    }
}
