//! Encoding at the speed of memory: `resident::encode_tiles` and its estimates on vectors, bit for bit, and a
//! whole matrix on the caller's threads. Words of 1 and 8 bytes, and machines without a packer, are left to
//! the oracle.
//!
//! | file | what |
//! |---|---|
//! | `exponent`, `sparse` | tiles |
//! | `count` | what estimates count |
//! | `whole` | a matrix on an executor |

mod count;
mod exponent;
mod sparse;
mod whole;

use crate::codec::{Encoding, Prefer};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::resident::{self, DeltaPiece, Estimate, Plan, Region, Source};
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::packer::{Lanes, Packer};
use crate::vector::simd::Simd;
use std::ops::Range;

pub use whole::{encode, encode_on};

/// [`resident::encode_tiles`], bit for bit, on the machine's vectors: encode tiles `tiles` of the matrix that
/// `plan` is for and append them to `out`. One thread.
///
/// `base` and `fine_tuned` hold the words of the region that the tiles cover, at any alignment: whole bands,
/// or of a matrix of one row any run of tiles.
///
/// # Errors
/// As [`resident::encode_tiles`].
pub fn encode_tiles(
    plan: &Plan,
    dtype: Dtype,
    tiles: Range<usize>,
    base: &[u8],
    fine_tuned: &[u8],
    out: &mut DeltaPiece,
) -> Result<()> {
    encode_tiles_on(Isa::active()?, plan, dtype, tiles, (base, fine_tuned), out)
}

/// [`encode_tiles`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`encode_tiles`]; `Unsupported` if the machine lacks `isa`.
pub fn encode_tiles_on(
    isa: Isa,
    plan: &Plan,
    dtype: Dtype,
    tiles: Range<usize>,
    (base, fine_tuned): (&[u8], &[u8]),
    out: &mut DeltaPiece,
) -> Result<()> {
    on_isa!(isa, s => {
    match (s.packer(), dtype.word_bytes()) {
        (Some(p), 2) => run::<_, u16>(p, plan, dtype, tiles, (base, fine_tuned), out),
        (Some(p), 4) => run::<_, u32>(p, plan, dtype, tiles, (base, fine_tuned), out),
        _ => resident::encode_tiles(plan, dtype, tiles, base, fine_tuned, out),
    }
    })?
}

fn run<P: Packer, W: Lanes>(
    p: P,
    plan: &Plan,
    dtype: Dtype,
    tiles: Range<usize>,
    (base, fine_tuned): (&[u8], &[u8]),
    out: &mut DeltaPiece,
) -> Result<()> {
    let region = Region::new(plan, dtype, tiles.clone(), base, fine_tuned)?;
    match plan.encoding {
        Encoding::Unchanged | Encoding::Raw => {
            let mut masks = Vec::new();
            let chunks = base.chunks(BLOCK).zip(fine_tuned.chunks(BLOCK));
            let changed = chunks.map(|(base, fine_tuned)| {
                masks.clear();
                W::differ(p, base, fine_tuned, &mut masks);
                masks.iter().map(|mask| u64::from(mask.count_ones())).sum::<u64>()
            });
            region.flat(plan, changed.sum(), out);
            Ok(())
        }
        Encoding::Sparse => {
            let mut coder = sparse::SparseCoder::<W>::default();
            tiles.for_each(|index| coder.tile(p, plan, dtype, &region, index, out));
            Ok(())
        }
        Encoding::Exponent => {
            let mut coder = exponent::ExponentCoder::default();
            tiles.into_iter().try_for_each(|index| coder.tile::<P, W>(p, plan, dtype, &region, index, out))
        }
    }
}

/// Bytes compared at a time.
const BLOCK: usize = 1 << 14;

/// [`resident::estimate`], the same result, on the machine's vectors.
///
/// # Errors
/// Those of the source.
pub fn estimate(source: &mut dyn Source, prefer: Prefer) -> Result<Estimate> {
    estimate_on(Isa::active()?, source, prefer, false)
}

/// [`resident::estimate_exactly`], the same result, on the machine's vectors.
///
/// # Errors
/// Those of the source.
pub fn estimate_exactly(source: &mut dyn Source, prefer: Prefer) -> Result<Estimate> {
    estimate_on(Isa::active()?, source, prefer, true)
}

/// [`estimate`], or [`estimate_exactly`], on an instruction set of the caller's choice, for tests and
/// benchmarks.
///
/// # Errors
/// Those of the source; `Unsupported` if the machine lacks `isa`.
pub fn estimate_on(isa: Isa, source: &mut dyn Source, prefer: Prefer, exactly: bool) -> Result<Estimate> {
    on_isa!(isa, s => {
    match s.packer() {
        Some(p) => resident::estimate_by(&mut count::Fast::new(p), source, prefer, exactly),
        None => resident::estimate_by(&mut resident::Oracle, source, prefer, exactly),
    }
    })?
}
