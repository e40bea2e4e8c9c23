//! `exponent`, packed backwards: equal to `codec::exponent`'s encoder bit for bit.
//!
//! A decoder takes a unit when it needs the unit's lowest bits, so an encoder that goes forward must give a
//! unit its place long before it has its bits, and scatter. Going from the tile's last word to its first, a
//! unit is whole in the very step in which the decoder would take it: the units of a step are packed by a
//! shuffle and laid down below those of the step after, and nothing is scattered. What this asks is to know
//! where each lane ends: a pass over base that adds up widths, which also tells how many units there will be.
//!
//! **Floor.** Bytes: base twice (the second time from L2), fine_tuned once, the stream once and once more on
//! its way out. Operations, for 32 words of 16 bits with AVX2 (`x86_64/pack.rs`): adding up: 2 loads, 5 for
//! classes, 5 for widths, 4 to add: 16. Packing: 4 loads; 10 for classes and widths; 12 for masks, halves and
//! powers; 6 for differences; 8 for what does not fit and what changed; 10 for where a word lies in its unit;
//! 18 to join it to the unit and what is left; 28 to shuffle units together and store them: 96. 112
//! operations at 3.5 a cycle are 32 cycles, 0.3 ns a word at 3.3 GHz, whatever share changed: no branch
//! depends on data but for misfits.

use crate::codec::exponent::mantissa_bits;
use crate::codec::{Apart, Rect};
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use crate::resident::{DeltaPiece, Plan, Region};
use crate::vector::lanes::{Code, STEP};
use crate::vector::packer::{Lanes, OpenUnit, Packer, SLACK};

/// Packs tiles; its memory is reused from tile to tile.
#[derive(Default)]
pub(super) struct ExponentCoder {
    stream: Vec<u8>,
    columns: Vec<u16>,
    masks: Vec<u32>,
    /// Position of each misfit and where its words lie in the region, descending.
    misfits: Vec<(u16, usize)>,
    apart: Apart,
}

impl ExponentCoder {
    /// Append tile `index` of the region.
    pub(super) fn tile<P: Packer, W: Lanes>(
        &mut self,
        p: P,
        plan: &Plan,
        dtype: Dtype,
        region: &Region<'_>,
        index: usize,
        out: &mut DeltaPiece,
    ) -> Result<()> {
        let rect = plan.grid.rect(index);
        self.misfits.clear();
        self.apart.clear();
        let from = out.payload.len();
        if plan.widths == [0; 32] {
            self.quiet::<P, W>(p, plan, region, &rect, out);
        } else {
            let code = Code { widths: &plan.widths, shift: mantissa_bits(dtype) };
            self.pack::<P, W>(p, code, plan, region, &rect, out)?;
        }
        for (position, at) in self.misfits.iter().rev() {
            let word = |words: &[u8]| W::load(&words[*at..at + W::BYTES]);
            self.apart.misfit(dtype, *position, word(region.base), word(region.fine_tuned));
        }
        let units = (out.payload.len() - from) / W::BYTES;
        out.close::<W>(units, &self.apart.entries, &self.apart.exceptions);
        Ok(())
    }

    fn pack<P: Packer, W: Lanes>(
        &mut self,
        p: P,
        code: Code<'_>,
        plan: &Plan,
        region: &Region<'_>,
        rect: &Rect,
        out: &mut DeltaPiece,
    ) -> Result<()> {
        let mut sums = [W::default(); STEP];
        (0..rect.rows())
            .for_each(|r| W::sums(p, code, &region.base[region.row(rect, r, W::BYTES)], &mut sums));
        let bits = u64::from(W::BITS);
        let units: u64 = sums.iter().map(|sum| sum.to_u64().div_ceil(bits)).sum();
        let below = sums.map(|sum| W::from_u64(sum.to_u64() % bits));
        let mut lanes = OpenUnit { bits: [W::default(); STEP], below };

        self.stream.resize(SLACK + units as usize * W::BYTES, 0);
        let mut end = self.stream.len();
        for r in (0..rect.rows()).rev() {
            let span = region.row(rect, r, W::BYTES);
            let row = (&region.base[span.clone()], &region.fine_tuned[span.clone()]);
            self.columns.clear();
            let packed = W::pack(p, &mut lanes, code, row, &mut self.stream[..end], &mut self.columns);
            if packed.cut || packed.bytes > end {
                return Err(Error::internal("more units than were counted"));
            }
            end -= packed.bytes;
            out.changed += packed.changed;
            let at =
                |c: &u16| ((r * plan.grid.tile_cols) as u16 + c, span.start + usize::from(*c) * W::BYTES);
            self.misfits.extend(self.columns.iter().map(at));
        }
        if end != SLACK {
            return Err(Error::internal("fewer units than were counted"));
        }
        out.payload.extend_from_slice(&self.stream[SLACK..]);
        Ok(())
    }

    /// No word has bits: every change is a misfit.
    fn quiet<P: Packer, W: Lanes>(
        &mut self,
        p: P,
        plan: &Plan,
        region: &Region<'_>,
        rect: &Rect,
        out: &mut DeltaPiece,
    ) {
        for r in (0..rect.rows()).rev() {
            let span = region.row(rect, r, W::BYTES);
            self.masks.clear();
            W::differ(p, &region.base[span.clone()], &region.fine_tuned[span.clone()], &mut self.masks);
            for (i, mask) in self.masks.iter().enumerate().rev().filter(|(_, m)| **m != 0) {
                let mut left = *mask;
                while left != 0 {
                    let bit = 31 - left.leading_zeros();
                    left ^= 1 << bit;
                    let c = i * STEP + bit as usize;
                    let position = (r * plan.grid.tile_cols + c) as u16;
                    self.misfits.push((position, span.start + c * W::BYTES));
                    out.changed += 1;
                }
            }
        }
    }
}
