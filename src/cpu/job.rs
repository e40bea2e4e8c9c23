//! What every product is asked: how to sum, and whether its bytes have the size that its shape says; and what
//! one call of it comes to: the job, its tenants' segments, the blocks of its tasks. The kernels below know
//! no more of a call than this.

use super::dot::Rows;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix, Shape};
use crate::vector::float::Float;
use crate::vector::simd::Simd;
use std::ops::Range;

/// How a product is computed. The third mode of the ops, "exact", is `F.linear` on rows of
/// [`delta_restore_rows`](crate::vector::delta_restore_rows), and so is the shim's.
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

/// The rows of x of one tenant.
pub(super) struct Segment<'a> {
    pub(super) weights: Weights<'a>,
    pub(super) bias: Option<&'a [u8]>,
    /// Their places in the order of the call.
    pub(super) rows: Range<usize>,
    /// The slot that the delta comes from, if it is one of many.
    pub(super) slot: Option<usize>,
}

impl Segment<'_> {
    /// What errors call the delta.
    pub(super) fn name(&self) -> String {
        self.slot.map_or_else(|| "delta".into(), |slot| format!("slots[{slot}]"))
    }

    /// The fine-tuned words of tile `index`, row after row.
    pub(super) fn restore<S: Simd>(&self, s: S, index: usize, words: &mut [u8]) -> Result<()> {
        self.weights.words(s, index, words).map_err(|e| self.within(e))
    }

    /// An error of the delta, with the name of its slot.
    pub(super) fn within(&self, e: Error) -> Error {
        match self.slot {
            Some(slot) => e.within(format_args!("slots[{slot}]")),
            None => e,
        }
    }
}

/// Rows of W and rows of x (by their places in the order of the call) of one task.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) r0: usize,
    pub(super) r1: usize,
    pub(super) m0: usize,
    pub(super) m: usize,
}

impl Block {
    /// Which of the block's rows of x belong to `segment`, counted from the block's first.
    pub(super) fn part(&self, segment: &Segment<'_>) -> Range<usize> {
        let from = segment.rows.start.max(self.m0) - self.m0;
        from..segment.rows.end.min(self.m0 + self.m) - self.m0
    }
}

/// One call, in the dtype of its words.
pub(super) struct LinearJob<'a, D: Float> {
    /// No other call's.
    pub(super) id: u64,
    pub(super) x: &'a [u8],
    pub(super) base: Matrix<'a>,
    pub(super) order: Option<&'a [usize]>,
    pub(super) out: &'a [D::Shared],
    pub(super) n: usize,
    pub(super) k: usize,
    /// Whether words are multiplied by the machine's bf16 dot product.
    pub(super) bf16: bool,
}

impl<D: Float> LinearJob<'_, D> {
    /// The row of x at place `at`.
    pub(super) fn row(&self, at: usize) -> usize {
        self.order.map_or(at, |order| order[at])
    }

    /// Columns of the row of x at place `at`.
    pub(super) fn x_row(&self, at: usize, columns: &Range<usize>) -> Rows<'_> {
        let from = (self.row(at) * self.k + columns.start) * D::BYTES;
        let len = columns.len() * D::BYTES;
        Rows { bytes: &self.x[from..from + len], stride: len, len }
    }
}

/// `bytes` holds the words of a `shape` matrix of `dtype`; errors call it `name`.
pub(super) fn check_words(name: &str, bytes: &[u8], shape: Shape, dtype: Dtype) -> Result<()> {
    let want = shape.bytes(dtype)?;
    if bytes.len() == want {
        return Ok(());
    }
    Err(Error::mismatch(format!("{name} has {} bytes, but {shape} of {dtype} takes {want}", bytes.len())))
}
