//! The digest of a base by itself, on the caller's threads: what [`Matrix::digest`], the oracle, gives.
//!
//! **Floor.** Bytes: the words once, from memory. Operations for 32 words of 16 bits: some 40 of xxh3.

use super::exec::{Executor, LEAST_WORDS, try_run};
use crate::error::Result;
use crate::matrix::{Digest, Matrix};
use std::sync::Mutex;

/// Leaves of one task: their rows are few enough to divide a matrix evenly, and one lock for them costs nothing.
const LEAVES: usize = 4;

/// The digest of `base`.
///
/// # Errors
/// What the executor fails with.
pub fn delta_digest(base: &Matrix<'_>, exec: &dyn Executor) -> Result<Digest> {
    let (shape, rows) = (base.shape(), LEAVES * Digest::LEAF_ROWS);
    let count = shape.n.div_ceil(rows);
    let found: Vec<Mutex<Vec<[u8; 16]>>> = (0..count).map(|_| Mutex::default()).collect();
    let words = (0..count).map(|task| (shape.n - task * rows).min(rows) * shape.k);
    try_run(exec, LEAST_WORDS, words, |task| {
        let end = shape.n.div_ceil(Digest::LEAF_ROWS).min((task + 1) * LEAVES);
        let leaves = (task * LEAVES..end).map(|leaf| base.digest_leaf(leaf)).collect();
        *found[task].lock().unwrap_or_else(|p| p.into_inner()) = leaves;
        Ok(())
    })?;
    let leaves = found.into_iter().flat_map(|leaves| leaves.into_inner().unwrap_or_else(|p| p.into_inner()));
    Ok(Digest::of_leaves(base.dtype(), shape, leaves))
}
