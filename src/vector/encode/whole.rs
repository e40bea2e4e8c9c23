//! A whole matrix on the caller's threads: runs of tiles are encoded side by side and put together in order.
//! In memory are the delta, once, and the pieces of one round.

use super::{encode_tiles_on, estimate_on};
use crate::codec::{Encoding, Prefer};
use crate::error::Result;
use crate::matrix::{Digest, Matrix};
use crate::resident::{Assembler, DeltaPiece, Pair, Plan};
use crate::vector::dispatch::Isa;
use crate::vector::exec::{Executor, LEAST_WORDS, try_run};
use std::ops::Range;
use std::sync::Mutex;

/// Words that one task takes, about: enough for what a task costs, little enough to share a matrix out.
const TASK_WORDS: usize = 1 << 19;

/// Encode what turns `base` into `fine_tuned`: the bytes of `resident::encode_pair`, whatever the threads.
/// Where nothing was measured, a sample chooses the encoding; a second pass follows where it misled.
///
/// # Errors
/// `Mismatch` if dtypes or shapes differ; `Unsupported` beyond 2^32 units.
pub fn encode(
    base: &Matrix<'_>,
    fine_tuned: &Matrix<'_>,
    prefer: Prefer,
    exec: &dyn Executor,
) -> Result<Vec<u8>> {
    encode_on(Isa::active()?, base, fine_tuned, prefer, exec)
}

/// [`encode`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`encode`]; `Unsupported` if the machine lacks `isa`.
pub fn encode_on(
    isa: Isa,
    base: &Matrix<'_>,
    fine_tuned: &Matrix<'_>,
    prefer: Prefer,
    exec: &dyn Executor,
) -> Result<Vec<u8>> {
    let mut pair = Pair::new(*base, *fine_tuned)?;
    let digest = digest(base, exec)?;
    let job = EncodeJob { isa, base: *base, fine_tuned: *fine_tuned, digest };
    let sampled = estimate_on(isa, &mut pair, prefer, false)?;
    let delta = job.write(&sampled.plan, exec)?;
    if !sampled.is_off(delta.len() as u64) {
        return Ok(delta);
    }
    drop(delta);
    job.write(&estimate_on(isa, &mut pair, prefer, true)?.plan, exec)
}

/// [`Matrix::digest`], its leaves at once.
fn digest(matrix: &Matrix<'_>, exec: &dyn Executor) -> Result<Digest> {
    let leaves: Vec<_> =
        (0..matrix.shape().n.div_ceil(Digest::LEAF_ROWS)).map(|_| Mutex::new([0; 16])).collect();
    let words = leaves.iter().map(|_| Digest::LEAF_ROWS * matrix.shape().k);
    try_run(exec, LEAST_WORDS, words, |i| {
        *leaves[i].lock().unwrap_or_else(|p| p.into_inner()) = matrix.digest_leaf(i);
        Ok(())
    })?;
    let leaves = leaves.into_iter().map(|leaf| leaf.into_inner().unwrap_or_else(|p| p.into_inner()));
    Ok(Digest::of_leaves(matrix.dtype(), matrix.shape(), leaves))
}

struct EncodeJob<'a> {
    isa: Isa,
    base: Matrix<'a>,
    fine_tuned: Matrix<'a>,
    digest: Digest,
}

impl EncodeJob<'_> {
    fn write(&self, plan: &Plan, exec: &dyn Executor) -> Result<Vec<u8>> {
        let mut assembler = Assembler::new(self.base.dtype(), plan)?;
        let mut out = vec![0; assembler.head_bytes()];
        // An exact estimate has read every word and found none changed.
        let tiles = if plan.encoding == Encoding::Unchanged { 0 } else { plan.grid.tiles() };
        let tasks = self.tasks(plan, tiles);
        let pieces: Vec<_> =
            (0..exec.threads().clamp(1, tasks.len().max(1))).map(|_| Mutex::default()).collect();
        for round in tasks.chunks(pieces.len()) {
            let words = round.iter().map(|tiles| tiles.clone().map(|i| plan.grid.rect(i).words()).sum());
            try_run(exec, LEAST_WORDS, words, |i| {
                let mut piece: std::sync::MutexGuard<'_, DeltaPiece> =
                    pieces[i].lock().unwrap_or_else(|p| p.into_inner());
                piece.clear();
                let words =
                    (self.words(&self.base, plan, &round[i]), self.words(&self.fine_tuned, plan, &round[i]));
                encode_tiles_on(self.isa, plan, self.base.dtype(), round[i].clone(), words, &mut piece)
            })?;
            for piece in &pieces[..round.len()] {
                let piece = piece.lock().unwrap_or_else(|p| p.into_inner());
                assembler.add(&piece)?;
                out.extend_from_slice(&piece.payload);
            }
        }
        assembler.finish(self.digest)?.around(&mut out);
        Ok(out)
    }

    /// Runs of whole bands, or of tiles where there is but one row.
    fn tasks(&self, plan: &Plan, tiles: usize) -> Vec<Range<usize>> {
        let grid = &plan.grid;
        let (unit, words) = match grid.shape.n {
            1 => (1, grid.tile_cols),
            _ => (grid.tile_cols_count().max(1), grid.tile_rows * grid.shape.k),
        };
        let step = unit * (TASK_WORDS / words.max(1)).max(1);
        (0..tiles).step_by(step).map(|start| start..(start + step).min(tiles)).collect()
    }

    /// The words that a run of tiles covers.
    fn words<'m>(&self, matrix: &Matrix<'m>, plan: &Plan, tiles: &Range<usize>) -> &'m [u8] {
        let (first, last) = (plan.grid.rect(tiles.start), plan.grid.rect(tiles.end - 1));
        match plan.grid.shape.n {
            1 => matrix.span(0, first.c0, last.c1 - first.c0),
            _ => matrix.rows(first.r0, last.r1).bytes(),
        }
    }
}
