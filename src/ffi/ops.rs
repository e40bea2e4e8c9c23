//! Every op once, for both doors: bytes and sizes in, bytes out, guarded against panics. Knows no torch and no C.

use super::guard;
use crate::codec::{Encoding, Prefer};
use crate::cpu::{
    self, Arena, Biases, EmbeddingArgs, GroupedArgs, GroupedGradArgs, LinearArgs, Mode, Tenants,
};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use crate::resident::{self, Resident};
use crate::vector::{self, Executor};
use std::ops::Range;

/// What a caller says of a matrix: a dtype's code, the sizes, and the row-major words.
#[derive(Clone, Copy)]
pub struct Words<'a> {
    /// Code of the dtype; see [`Dtype`].
    pub dtype: u32,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// `n * k` little-endian words.
    pub bytes: &'a [u8],
}

impl<'a> Words<'a> {
    /// The checked matrix.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown dtype or an overflowing size, `Mismatch` if the bytes are not `n * k` words.
    pub fn matrix(&self) -> Result<Matrix<'a>> {
        Matrix::new(dtype(self.dtype)?, Shape { n: self.n, k: self.k }, self.bytes)
    }
}

fn dtype(code: u32) -> Result<Dtype> {
    u8::try_from(code)
        .ok()
        .and_then(Dtype::from_code)
        .ok_or_else(|| Error::invalid(format!("no dtype has the code {code}")))
}

/// What the header of a resident delta says.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// How the tiles are stored.
    pub encoding: Encoding,
    /// Dtype of base and fine-tune.
    pub dtype: Dtype,
    /// Shape of base and fine-tune.
    pub shape: Shape,
    /// Rows of a tile.
    pub tile_rows: usize,
    /// Columns of a tile.
    pub tile_cols: usize,
    /// Words that differ.
    pub changed: u64,
    /// Digest of the base.
    pub base_digest: Digest,
}

/// Read the header of a resident delta.
///
/// # Errors
/// `Corrupt`, `Truncated`, `Unsupported` as [`Resident::parse`].
pub fn delta_info(delta: &[u8]) -> Result<Info> {
    guard(|| {
        let delta = Resident::parse(delta)?;
        let (header, grid) = (delta.header(), delta.grid());
        Ok(Info {
            encoding: header.encoding,
            dtype: header.dtype,
            shape: header.shape,
            tile_rows: grid.tile_rows,
            tile_cols: grid.tile_cols,
            changed: header.changed,
            base_digest: header.base_digest,
        })
    })
}

/// Arguments of [`delta_linear`].
pub struct Linear<'a> {
    /// `[m, k]` words of the weight's dtype.
    pub input: &'a [u8],
    /// Rows of `input`.
    pub m: usize,
    /// The base, `[n, k]`.
    pub weight: Words<'a>,
    /// The fine-tune's bias, `[n]` words of the weight's dtype.
    pub bias: Option<&'a [u8]>,
    /// Resident delta of `weight`.
    pub delta: &'a [u8],
    /// Order of summation.
    pub mode: Mode,
}

/// `out [m, n] = input @ (weight (+) delta)^T + bias`.
///
/// # Errors
/// `Mismatch` where sizes or dtypes disagree, `Unsupported` for a dtype that does not compute, `Corrupt` for a broken delta.
pub fn delta_linear(args: &Linear<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    guard(|| {
        let (base, delta) = (args.weight.matrix()?, Resident::parse(args.delta)?);
        let args = LinearArgs { x: args.input, m: args.m, base, delta, bias: args.bias, mode: args.mode };
        cpu::delta_linear(&args, out, exec)
    })
}

/// `out [m, k] = grad [m, n] @ (weight (+) delta)`.
///
/// # Errors
/// As [`delta_linear`].
pub fn delta_linear_grad_input(
    grad: &[u8],
    m: usize,
    weight: Words<'_>,
    delta: &[u8],
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    guard(|| cpu::delta_linear_grad_input(grad, m, &weight.matrix()?, &Resident::parse(delta)?, out, exec))
}

/// The tenants of a batch: their deltas, and whose each row is.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// The deltas.
    pub arena: &'a [u8],
    /// Offset and length of each delta in the arena, one pair after another; length 0 is an empty slot.
    pub slots: &'a [i64],
    /// The slot of each row; -1 is the base.
    pub tenant_of_row: &'a [i32],
}

impl<'a> Batch<'a> {
    fn arena(&self) -> Arena<'a> {
        Arena { bytes: self.arena, slots: self.slots.as_chunks().0 }
    }
}

/// Arguments of [`delta_linear_grouped`].
pub struct Grouped<'a> {
    /// `[m, k]` words of the weight's dtype.
    pub input: &'a [u8],
    /// Rows of `input`.
    pub m: usize,
    /// The base, `[n, k]`.
    pub weight: Words<'a>,
    /// `[slots + 1, n]` words of the weight's dtype, the base's last, some bytes apart.
    pub biases: Option<Biases<'a>>,
    /// The tenants.
    pub batch: Batch<'a>,
    /// Order of summation.
    pub mode: Mode,
}

/// `out [m, n]`: row i is `delta_linear` of row i with the delta and the bias of its tenant.
///
/// # Errors
/// As [`delta_linear`]; `InvalidArgument` for a slot outside of the arena or a row of no slot.
pub fn delta_linear_grouped(args: &Grouped<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    guard(|| {
        let args = GroupedArgs {
            x: args.input,
            m: args.m,
            base: args.weight.matrix()?,
            arena: args.batch.arena(),
            tenant_of_row: args.batch.tenant_of_row,
            biases: args.biases,
            mode: args.mode,
        };
        cpu::delta_linear_grouped(&args, out, exec)
    })
}

/// `out [m, k]`: row i is `delta_linear_grad_input` of row i with the delta of its tenant.
///
/// # Errors
/// As [`delta_linear_grouped`].
pub fn delta_linear_grouped_grad_input(
    grad: &[u8],
    m: usize,
    weight: Words<'_>,
    batch: &Batch<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    guard(|| {
        let (base, arena) = (weight.matrix()?, batch.arena());
        let args = GroupedGradArgs { grad, m, base, arena, tenant_of_row: batch.tenant_of_row };
        cpu::delta_linear_grouped_grad_input(&args, out, exec)
    })
}

/// One tenant of a batch.
pub struct Tenant {
    /// Its slot; none is the base.
    pub slot: Option<usize>,
    /// Its rows, in the order of the batch.
    pub rows: Vec<i64>,
    /// Where in the arena its delta is; none for the base and for an empty slot.
    pub delta: Option<Range<usize>>,
}

/// The tenants of a batch of `m` rows on `weight`, checked as [`delta_linear_grouped`] checks them: for mode "exact",
/// which the shim drives.
///
/// # Errors
/// As [`delta_linear_grouped`].
pub fn grouped_tenants(m: usize, weight: Words<'_>, batch: &Batch<'_>) -> Result<Vec<Tenant>> {
    guard(|| {
        let (base, arena) = (weight.matrix()?, batch.arena());
        let tenants = Tenants::new(batch.tenant_of_row, m, arena.slots.len())?;
        let tenant = |(slot, rows): (Option<usize>, Range<usize>)| {
            slot.map_or(Ok(None), |slot| arena.delta(slot, &base))?;
            let delta = slot.map_or(Ok(None), |slot| arena.place(slot))?;
            let rows = tenants.order()[rows].iter().map(|&row| row as i64).collect();
            Ok(Tenant { slot, rows, delta })
        };
        tenants.groups().map(tenant).collect()
    })
}

/// The base as the deltas of a batch see it: int16 and int32 words stand for the bits of any dtype of their size, so the
/// first delta in use tells which.
fn base_of_batch<'a>(weight: &Words<'a>, batch: &Batch<'_>) -> Result<Matrix<'a>> {
    let (base, arena) = (weight.matrix()?, batch.arena());
    if !matches!(base.dtype(), Dtype::I16 | Dtype::I32) {
        return Ok(base);
    }
    let used = batch.tenant_of_row.iter().filter_map(|&tenant| usize::try_from(tenant).ok());
    for slot in used.filter(|&slot| slot < arena.slots.len()) {
        let Some(place) = arena.place(slot)? else { continue };
        let delta =
            Resident::parse(&batch.arena[place]).map_err(|e| e.within(format_args!("slots[{slot}]")))?;
        let dtype = delta.header().dtype;
        let same = dtype.word_bytes() == base.dtype().word_bytes();
        return if same { Matrix::new(dtype, base.shape(), base.bytes()) } else { Ok(base) };
    }
    Ok(base)
}

/// `out [rows, k]`: row i is row `indices[i]` of the fine-tuned table of row i's tenant. int16 and int32 words of `weight`
/// stand for the bits of any dtype of their size.
///
/// # Errors
/// `InvalidArgument` for an index beyond the table, a slot outside of the arena or a row of no slot; `Mismatch` where
/// sizes or dtypes disagree; `Corrupt` or `Truncated` for a broken delta.
pub fn delta_embedding(
    indices: &[i64],
    weight: Words<'_>,
    batch: &Batch<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    guard(|| {
        let (base, arena) = (base_of_batch(&weight, batch)?, batch.arena());
        let args = EmbeddingArgs { indices, base, arena, tenant_of_row: batch.tenant_of_row };
        cpu::delta_embedding(&args, out, exec)
    })
}

/// Write the fine-tuned words of the whole matrix to `out`.
///
/// # Errors
/// As [`delta_linear`].
pub fn delta_restore(base: Words<'_>, delta: &[u8], out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    guard(|| vector::delta_restore(&Resident::parse(delta)?, &base.matrix()?, out, exec))
}

/// Write the fine-tuned words of some rows to `out`.
///
/// # Errors
/// As [`delta_linear`]; `InvalidArgument` for rows out of range.
pub fn delta_restore_rows(
    base: Words<'_>,
    delta: &[u8],
    rows: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    guard(|| vector::delta_restore_rows(&Resident::parse(delta)?, &base.matrix()?, rows, out, exec))
}

/// Write the fine-tuned words of some rows and columns to `out`, row after row.
///
/// # Errors
/// As [`delta_linear`]; `InvalidArgument` for rows or columns out of range.
pub fn delta_restore_region(
    base: Words<'_>,
    delta: &[u8],
    (rows, columns): (Range<usize>, Range<usize>),
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    guard(|| {
        vector::delta_restore_region(&Resident::parse(delta)?, &base.matrix()?, rows, columns, out, exec)
    })
}

/// Turn `weight` from base into fine-tune, in place. Not applied twice: the result is no longer the base.
///
/// # Errors
/// As [`delta_linear`]; the digest of `weight` is checked first, so a wrong or already changed one is refused untouched.
pub fn delta_apply(
    dtype_code: u32,
    n: usize,
    k: usize,
    weight: &mut [u8],
    delta: &[u8],
    exec: &dyn Executor,
) -> Result<()> {
    guard(|| {
        let delta = Resident::parse(delta)?;
        delta.check()?;
        let base = Words { dtype: dtype_code, n, k, bytes: &*weight }.matrix()?;
        delta.check_digest(&base)?;
        let (dtype, shape) = (base.dtype(), base.shape());
        vector::delta_apply(&delta, dtype, shape, weight, exec)
    })
}

/// The resident delta from `base` to `fine_tuned`.
///
/// # Errors
/// `Mismatch` if dtypes or shapes differ.
pub fn delta_encode(
    base: Words<'_>,
    fine_tuned: Words<'_>,
    prefer: Prefer,
    exec: &dyn Executor,
) -> Result<Vec<u8>> {
    guard(|| vector::encode(&base.matrix()?, &fine_tuned.matrix()?, prefer, exec))
}

/// The delta of rows (`dim` 0) or columns (`dim` 1) `range` of the matrix.
///
/// # Errors
/// `Mismatch` if the delta is not of `base`, `InvalidArgument` for a dimension or range that does not exist.
pub fn delta_slice(delta: &[u8], base: Words<'_>, dim: usize, range: Range<usize>) -> Result<Vec<u8>> {
    guard(|| resident::slice(&Resident::parse(delta)?, &base.matrix()?, dim, range))
}

/// The delta of the matrices put one after another along `dim`.
///
/// # Errors
/// `Mismatch` if a delta is not of its base or the bases do not fit together, `InvalidArgument` for no parts.
pub fn delta_concat<'a>(parts: &[(&'a [u8], Words<'a>)], dim: usize) -> Result<Vec<u8>> {
    guard(|| {
        let part = |(i, (delta, base)): (usize, &(&'a [u8], Words<'a>))| {
            let pair = || Ok((Resident::parse(delta)?, base.matrix()?));
            pair().map_err(|e: Error| e.within(format_args!("part {i}")))
        };
        let parts = parts.iter().enumerate().map(part).collect::<Result<Vec<_>>>()?;
        resident::concat(&parts, dim)
    })
}

/// Validate a delta in full, and that it belongs to `base`, digest included.
///
/// # Errors
/// `Corrupt` or `Truncated` for a broken delta, `Mismatch` for another base.
pub fn delta_check(delta: &[u8], base: Words<'_>) -> Result<()> {
    guard(|| {
        let base = base.matrix()?;
        Resident::parse(delta)?.check_full(&base)
    })
}

/// What [`delta_apply`] checks before the first word changes: the delta's bytes and the base's digest. Cheaper than
/// [`delta_check`]: nothing is decoded.
///
/// # Errors
/// `Corrupt`, `Truncated` or `Mismatch`.
pub fn delta_matches(delta: &[u8], base: Words<'_>) -> Result<()> {
    guard(|| {
        let (base, delta) = (base.matrix()?, Resident::parse(delta)?);
        delta.check()?;
        delta.check_digest(&base)
    })
}

/// Count a panel that mode "exact", which the shim drives, restored, with its `bytes` of scratch.
pub fn note_exact_panel(bytes: usize) {
    cpu::counters::count_panel();
    cpu::counters::note_scratch(bytes);
}
