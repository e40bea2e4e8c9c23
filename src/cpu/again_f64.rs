//! The decode path: outputs whose f32 sum is not finite are computed again, from the fine-tuned words
//! themselves, in f64, where products of two f32 are exact and do not overflow. So NaN and infinities are
//! those of the fine-tuned weights, whatever the base, the differences and the order of f32 sums made of
//! them. Slow and plain on purpose.

use super::job::{LinearJob, Segment};
use super::scratch::Scratch;
use crate::error::Result;
use crate::vector::float::Float;
use crate::vector::simd::{SIMD_LANES, Simd};

/// Compute and write outputs of row band `band` of the segment's grid again: bit j of `again[r]` asks for row
/// r of the band and the row of x at place `m0 + j`.
pub(super) fn linear<S: Simd, D: Float>(
    s: S,
    job: &LinearJob<'_, D>,
    segment: &Segment<'_>,
    band: usize,
    m0: usize,
    again: &[u16],
    sc: &mut Scratch,
) -> Result<()> {
    let grid = segment.weights.grid();
    let across = grid.tile_cols_count();
    let r0 = band * grid.tile_rows;
    let sums = sc.sums_f64.zeroed(again.len() * SIMD_LANES);
    for tc in 0..across {
        let index = band * across + tc;
        let rect = grid.rect(index);
        let words = sc.words.bytes_mut(rect.words() * D::BYTES);
        segment.restore(s, index, words)?;
        let rows = words.chunks_exact(rect.cols() * D::BYTES).zip(again);
        for (r, (row, &flags)) in rows.enumerate().filter(|(_, (_, flags))| **flags != 0) {
            for j in (0..SIMD_LANES).filter(|j| flags >> j & 1 == 1) {
                sums[r * SIMD_LANES + j] += dot::<D>(row, job.x_row(m0 + j, &(rect.c0..rect.c1)).bytes);
            }
        }
    }
    for (r, &flags) in again.iter().enumerate() {
        for j in (0..SIMD_LANES).filter(|j| flags >> j & 1 == 1) {
            let bias = segment.bias.map_or(0.0, |b| f64::from(D::value_at(b, r0 + r)));
            let value = D::round_f64(sums[r * SIMD_LANES + j] + bias);
            D::put(&job.out[job.row(m0 + j) * job.n + r0 + r], value);
        }
    }
    Ok(())
}

/// The dot product of two rows of words; exact products, f64 sums.
fn dot<D: Float>(a: &[u8], b: &[u8]) -> f64 {
    let words = a.len() / D::BYTES;
    (0..words).map(|i| f64::from(D::value_at(a, i)) * f64::from(D::value_at(b, i))).sum()
}
