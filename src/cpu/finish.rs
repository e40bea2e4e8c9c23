//! From totals to outputs: add the bias, round, and compute outputs again that are not finite.

#![allow(clippy::needless_range_loop, reason = "arrays indexed in step are what becomes vector instructions")]

use super::again_f64;
use super::dot::Strides;
use super::job::{Block, LinearJob, Segment};
use super::scratch::Scratch;
use crate::error::Result;
use crate::vector::float::Float;
use crate::vector::simd::{Kernel, SIMD_LANES, Simd};

impl<D: Float> LinearJob<'_, D> {
    /// Add the bias, round and write the outputs, band by band, so that a band with non-finite outputs can be
    /// done again.
    pub(super) fn finish<S: Simd>(
        &self,
        s: S,
        block: Block,
        segments: &[Segment<'_>],
        (sums, strides): (&[f32], Strides),
        sc: &mut Scratch,
    ) -> Result<()> {
        for segment in segments {
            let tile_rows = segment.weights.grid().tile_rows;
            for band in block.r0 / tile_rows..block.r1.div_ceil(tile_rows) {
                let (r0, r1) = (band * tile_rows, ((band + 1) * tile_rows).min(self.n));
                let mut again = [0u16; 256];
                let mut any = false;
                for j in block.part(segment) {
                    let out = &self.out[self.row(block.m0 + j) * self.n..][..self.n];
                    let from = (r0 - block.r0) * strides.row + j * strides.column;
                    if strides.row == 1 && self.run(s, (&sums[from..], segment.bias), (r0, r1), out) {
                        continue;
                    }
                    for r in r0..r1 {
                        let total = sums[(r - block.r0) * strides.row + j * strides.column];
                        let value = segment.bias.map_or(total, |b| total + D::value_at(b, r));
                        if value.is_finite() {
                            D::put(&out[r], D::round(value));
                        } else {
                            again[r - r0] |= 1 << j;
                            any = true;
                        }
                    }
                }
                if any {
                    again_f64::linear(s, self, segment, band, block.m0, &again[..r1 - r0], sc)?;
                }
            }
        }
        Ok(())
    }

    /// Bias, rounding and the way out of one row of x's totals for rows `r0..r1` of W; whether all are finite
    /// (else it is to be done again, those that are included).
    fn run<S: Simd>(
        &self,
        s: S,
        (sums, bias): (&[f32], Option<&[u8]>),
        (r0, r1): (usize, usize),
        out: &[D::Shared],
    ) -> bool {
        (r0..r1).step_by(SIMD_LANES).all(|r| {
            let len = SIMD_LANES.min(r1 - r);
            let bias = bias.map(|b| &b[r * D::BYTES..(r + len) * D::BYTES]);
            s.run(Out::<D> { sums: &sums[r - r0..][..len], bias, out: &out[r..r + len] })
        })
    }
}

/// Round and write at most sixteen totals. Returns whether all are finite.
struct Out<'a, D: Float> {
    sums: &'a [f32],
    bias: Option<&'a [u8]>,
    out: &'a [D::Shared],
}

impl<D: Float> Kernel for Out<'_, D> {
    type Out = bool;

    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> bool {
        let mut values = [0.0; SIMD_LANES];
        match self.sums.first_chunk() {
            Some(sums) => values = *sums,
            None => values[..self.sums.len()].copy_from_slice(self.sums),
        }
        if let Some(bias) = self.bias {
            let mut words = [0; 64];
            words[..bias.len()].copy_from_slice(bias);
            // One rounding, as of an addition.
            let sum = s.fma(s.load(&values), s.splat(1.0), D::widen(s, &words));
            s.store(sum, &mut values);
        }
        let mut words = [D::Word::default(); SIMD_LANES];
        let mut finite = true;
        for i in 0..SIMD_LANES {
            finite &= values[i].to_bits() & 0x7FFF_FFFF < 0x7F80_0000;
            words[i] = D::round_finite(values[i]);
        }
        for i in 0..self.out.len().min(SIMD_LANES) {
            D::put(&self.out[i], words[i]);
        }
        finite
    }
}
