//! The ops on the CPU: products, restores and in-place updates with resident deltas.
//!
//! One algorithm, written once over a sixteen-lane vector trait ([`simd`](self)), compiled per instruction set,
//! dispatched once at run time; **every instruction set gives the same bits**. Threads are the caller's ([`Executor`]).
//! `unsafe` lives in the architecture folders only; this module knows no package and no torch.
//!
//! | file | what |
//! |---|---|
//! | `linear` | products: which rows of x go where; `fused` few rows, of one tenant or many; `dot` base products, `sparse` entries, `exponent` decoding on the way |
//! | `plan` | the cost model: every choice of kernel and size; `XORZ_TRACE` |
//! | `wide` | the decode path of outputs that are not finite |
//! | `lanes` | the bit streams of `exponent` |
//! | `grad` | `delta_linear_grad_input` |
//! | `encode` | words to tiles and whole deltas, and the estimates that choose how |
//! | `lookup` | `delta_embedding`: rows of the tenants' tables |
//! | `restore` | fine-tuned words: restore, apply, tiles for scratch |
//! | `simd`, `scalar`, `x86_64` | the vector trait and its instances; `dispatch` picks one |
//! | `grouped` | `delta_linear_grouped` and its gradient; `arena` the deltas of many tenants, `weights` a base with one or none |
//! | `float` | bf16, f16, f32 as lanes; `scratch`, `counters`, `exec`: what their names say |

mod arena;
pub mod counters;
mod dispatch;
mod dot;
mod encode;
mod exec;
mod exponent;
mod finish;
mod float;
mod fused;
mod grad;
mod grouped;
mod lanes;
mod linear;
mod lookup;
mod plan;
mod restore;
mod scalar;
mod scratch;
mod simd;
mod sparse;
mod weights;
mod wide;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use arena::{ARENA_ALIGN, Arena, Tenants};
pub use dispatch::Isa;
pub use encode::{encode, encode_on, encode_tiles, encode_tiles_on, estimate, estimate_exactly, estimate_on};
pub use exec::{Executor, Serial};
pub use grouped::{
    Biases, GroupedArgs, GroupedGradArgs, delta_linear_grouped, delta_linear_grouped_grad_input,
    delta_linear_grouped_on,
};
pub use lookup::{EmbeddingArgs, delta_embedding, delta_embedding_on};

use crate::codec::ExponentTile;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix, Shape};
use crate::resident::Resident;
use dispatch::Visitor;
use float::with_float;
use simd::Simd;
use std::ops::Range;
use weights::Weights;

/// How a product is computed. The third mode of the ops, "exact", is `F.linear` on rows of [`delta_restore_rows`], and
/// so is the shim's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The fastest order of summing for the number of rows.
    #[default]
    Fast,
    /// One order of summing for every number of rows: a row's bits never depend on its company.
    Deterministic,
}

impl std::str::FromStr for Mode {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "fast" => Ok(Self::Fast),
            "deterministic" => Ok(Self::Deterministic),
            _ => Err(Error::invalid(format!("mode must be \"fast\" or \"deterministic\", not {s:?}"))),
        }
    }
}

/// What [`delta_linear`] multiplies.
#[derive(Clone, Debug)]
pub struct LinearArgs<'a> {
    /// x, `[m, k]` words of the base's dtype, any alignment.
    pub x: &'a [u8],
    /// Rows of x.
    pub m: usize,
    /// The base, `[n, k]` of f32, bf16 or f16, any alignment.
    pub base: Matrix<'a>,
    /// The delta of a matrix of the base's dtype and shape. Its base digest is not checked here.
    pub delta: Resident<'a>,
    /// Bias, `[n]` words of the base's dtype, any alignment.
    pub bias: Option<&'a [u8]>,
    /// The order of summing.
    pub mode: Mode,
}

impl LinearArgs<'_> {
    fn check(&self, out: &[u8]) -> Result<()> {
        self.delta.check_base(&self.base)?;
        let Shape { n, k } = self.base.shape();
        check_words("x", self.x, Shape { n: self.m, k }, self.base.dtype())?;
        check_words("out", out, Shape { n: self.m, k: n }, self.base.dtype())?;
        self.bias.map_or(Ok(()), |b| check_words("bias", b, Shape { n: 1, k: n }, self.base.dtype()))
    }
}

fn check_words(name: &str, bytes: &[u8], shape: Shape, dtype: Dtype) -> Result<()> {
    let want = shape.bytes(dtype)?;
    if bytes.len() == want {
        return Ok(());
    }
    Err(Error::mismatch(format!("{name} has {} bytes, but {shape} of {dtype} takes {want}", bytes.len())))
}

/// `y = x @ W_ft^T + bias` on base and delta: `out` takes `[m, n]` words of the base's dtype, aligned to them.
///
/// f32 sums of the fine-tuned weights' products, one rounding to the dtype at the end; outputs that are not finite in
/// f32 are computed again in f64. At most 2 MiB of scratch a thread. The bits depend on the arguments only: not on
/// `exec`, not on the machine's instruction set.
///
/// # Errors
/// `Unsupported` for another dtype than f32, bf16, f16; `Mismatch` where base, delta, x, bias and out do not fit;
/// `InvalidArgument` for a misaligned `out`; `Corrupt` or `Truncated` for bad delta bytes, `out` then holds
/// unspecified words.
pub fn delta_linear(args: &LinearArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    delta_linear_on(Isa::active()?, args, out, exec)
}

/// [`delta_linear`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_linear`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_linear_on(isa: Isa, args: &LinearArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    struct Call<'a, 'b>(&'a LinearArgs<'b>, &'a mut [u8], &'a dyn Executor);
    impl Visitor for Call<'_, '_> {
        type Out = Result<()>;
        fn visit<S: Simd>(self, s: S) -> Result<()> {
            let Self(args, out, exec) = self;
            with_float!(args.base.dtype(), D => {
                args.check(out)?;
                let weights = Weights::new(args.base, Some(&args.delta));
                let segment = linear::Segment { weights, bias: args.bias, rows: 0..args.m, slot: None };
                let (x, base, segments) = (args.x, args.base, &[segment]);
                let call = linear::Call { x, base, order: None, segments, mode: args.mode };
                if out.is_empty() { Ok(()) } else { linear::run::<S, D>(s, &call, out, exec) }
            })
        }
    }
    isa.with(Call(args, out, exec))?
}

/// `gx = grad @ W_ft` on base and delta: `grad` is `[m, n]`, `out` takes `[m, k]`, words of the base's dtype.
///
/// f32 sums, one rounding at the end, outputs that are not finite in f32 computed again in f64; no dense matrix.
///
/// # Errors
/// As [`delta_linear`].
pub fn delta_linear_grad_input(
    grad: &[u8],
    m: usize,
    base: &Matrix<'_>,
    delta: &Resident<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_linear_grad_input_on(Isa::active()?, (grad, m), base, delta, out, exec)
}

/// [`delta_linear_grad_input`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_linear_grad_input`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_linear_grad_input_on(
    isa: Isa,
    (grad, m): (&[u8], usize),
    base: &Matrix<'_>,
    delta: &Resident<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    struct Call<'a, 'b>(&'a [u8], usize, &'a Matrix<'b>, &'a Resident<'b>, &'a mut [u8], &'a dyn Executor);
    impl Visitor for Call<'_, '_> {
        type Out = Result<()>;
        fn visit<S: Simd>(self, s: S) -> Result<()> {
            let Self(grad, m, base, delta, out, exec) = self;
            with_float!(base.dtype(), D => {
                delta.check_base(base)?;
                let Shape { n, k } = base.shape();
                check_words("grad", grad, Shape { n: m, k: n }, base.dtype())?;
                check_words("out", out, Shape { n: m, k }, base.dtype())?;
                if out.is_empty() {
                    return Ok(());
                }
                let out = <D as float::Float>::share(out, "out")?;
                let weights = Weights::new(*base, Some(delta));
                let segment = linear::Segment { weights, bias: None, rows: 0..m, slot: None };
                let job = grad::Job { grad, base: *base, order: None, out };
                grad::run::<S, D>(s, &job, &[segment], exec)
            })
        }
    }
    isa.with(Call(grad, m, base, delta, out, exec))?
}

/// Restore the fine-tuned matrix: `out` takes its `n * k` words, any dtype, any alignment. Bit-exact.
///
/// # Errors
/// `Mismatch` where base, delta and out do not fit; `Corrupt` or `Truncated` for bad delta bytes, `out` then holds
/// unspecified words.
pub fn delta_restore(
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_restore_rows(delta, base, 0..base.shape().n, out, exec)
}

/// Restore rows `rows` of the fine-tuned matrix: `out` takes their words.
///
/// # Errors
/// As [`delta_restore`]; `InvalidArgument` for rows beyond the matrix.
pub fn delta_restore_rows(
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta_restore_rows_on(Isa::active()?, delta, base, rows, out, exec)
}

/// [`delta_restore_rows`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_restore_rows`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_restore_rows_on(
    isa: Isa,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    struct Call<'a, 'b>(&'a Resident<'b>, &'a Matrix<'b>, Range<usize>, &'a mut [u8], &'a dyn Executor);
    impl Visitor for Call<'_, '_> {
        type Out = Result<()>;
        fn visit<S: Simd>(self, s: S) -> Result<()> {
            restore::rows(s, self.0, self.1, self.2, self.3, self.4)
        }
    }
    isa.with(Call(delta, base, rows, out, exec))?
}

/// `codec::decode_tile` of an `exponent` tile on an instruction set of the caller's choice, for tests and benchmarks:
/// `words` holds whole rows of `cols` base words on entry, fine-tuned ones on exit; `tile_cols` is the grid's.
///
/// # Errors
/// As `codec::decode_tile`; `InvalidArgument` where `words` is not rows of `cols` words or a width is above the word's;
/// `Unsupported` for words of 1 or 8 bytes, and if the machine lacks `isa`.
pub fn decode_exponent_on(
    isa: Isa,
    tile: &ExponentTile<'_>,
    dtype: Dtype,
    (cols, tile_cols): (usize, usize),
    words: &mut [u8],
) -> Result<()> {
    struct Call<'a, 'b>(&'a ExponentTile<'b>, Dtype, usize, usize, &'a mut [u8]);
    impl Visitor for Call<'_, '_> {
        type Out = Result<()>;
        fn visit<S: Simd>(self, s: S) -> Result<()> {
            restore::exponent(s, self.0, self.1, self.2, self.3, self.4)
        }
    }
    isa.with(Call(tile, dtype, cols, tile_cols, words))?
}

/// Turn the base into the fine-tuned matrix in place: `weight` holds the words of a `shape` matrix of `dtype`.
///
/// The delta's bytes are checked before a word changes ([`Resident::check`]); that `weight` is the delta's own base
/// is for the caller to check ([`Resident::check_digest`]).
///
/// # Errors
/// `Mismatch` where they do not fit, `Corrupt` or `Truncated` for bad delta bytes. An `exponent` delta of another base
/// may be found out only on the way; `weight` then holds unspecified words.
pub fn delta_apply(
    delta: &Resident<'_>,
    dtype: Dtype,
    shape: Shape,
    weight: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    struct Call<'a, 'b>(&'a Resident<'b>, Dtype, Shape, &'a mut [u8], &'a dyn Executor);
    impl Visitor for Call<'_, '_> {
        type Out = Result<()>;
        fn visit<S: Simd>(self, s: S) -> Result<()> {
            restore::apply(s, self.0, self.1, self.2, self.3, self.4)
        }
    }
    Isa::active()?.with(Call(delta, dtype, shape, weight, exec))?
}

/// Turn base words into fine-tuned ones in place, on the calling thread: `words` holds the whole matrix of the delta's
/// dtype and shape, at any alignment. Memory-safe on any bytes; neither the delta's content nor the base is checked
/// against a digest ([`Resident::check`], [`Resident::check_digest`]).
///
/// # Errors
/// `Mismatch` for another length of `words`; `Corrupt` or `Truncated` for bad delta bytes, `words` then holds
/// unspecified words.
pub fn patch(delta: &Resident<'_>, words: &mut [u8]) -> Result<()> {
    patch_on(Isa::active()?, delta, words)
}

/// [`patch`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`patch`]; `Unsupported` if the machine lacks `isa`.
pub fn patch_on(isa: Isa, delta: &Resident<'_>, words: &mut [u8]) -> Result<()> {
    struct Call<'a, 'b>(&'a Resident<'b>, &'a mut [u8]);
    impl Visitor for Call<'_, '_> {
        type Out = Result<()>;
        fn visit<S: Simd>(self, s: S) -> Result<()> {
            restore::patch_all(s, self.0, self.1)
        }
    }
    isa.with(Call(delta, words))?
}
