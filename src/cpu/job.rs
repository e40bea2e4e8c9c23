//! What every product is asked: how to sum, and whether its bytes have the size that its shape says.

use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};

/// How a product is computed. The third mode of the ops, "exact", is `F.linear` on rows of [`delta_restore_rows`](crate::vector::delta_restore_rows), and
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

/// `bytes` holds the words of a `shape` matrix of `dtype`; errors call it `name`.
pub(super) fn check_words(name: &str, bytes: &[u8], shape: Shape, dtype: Dtype) -> Result<()> {
    let want = shape.bytes(dtype)?;
    if bytes.len() == want {
        return Ok(());
    }
    Err(Error::mismatch(format!("{name} has {} bytes, but {shape} of {dtype} takes {want}", bytes.len())))
}
