//! What estimates count, fast: the same numbers as the oracle's. Must choose nothing.

use super::sparse::SparseCoder;
use crate::codec::exponent::{CLASSES, class, mantissa_bits};
use crate::matrix::Dtype;
use crate::resident::{Count, Need, Oracle};
use crate::vector::lanes::STEP;
use crate::vector::packer::{Lanes, Packer};

/// A [`Count`] on an instruction set; words that it does not take are left to the oracle.
pub(super) struct Fast<P> {
    packer: P,
    two_byte: SparseCoder<u16>,
    four_byte: SparseCoder<u32>,
    masks: Vec<u32>,
}

impl<P: Packer> Fast<P> {
    pub(super) fn new(packer: P) -> Self {
        Self {
            packer,
            two_byte: SparseCoder::default(),
            four_byte: SparseCoder::default(),
            masks: Vec::new(),
        }
    }

    fn histogram<W: Lanes>(&mut self, dtype: Dtype, base: &[u8], fine_tuned: &[u8], need: &mut Need) {
        let shift = mantissa_bits(dtype);
        self.masks.clear();
        W::differ(self.packer, base, fine_tuned, &mut self.masks);
        // Four tables, so that equal classes in a row do not wait for one another.
        let mut classes = [[0u64; CLASSES]; 4];
        let (words, after) = (bytemuck::cast_slice::<_, W>(base), bytemuck::cast_slice::<_, W>(fine_tuned));
        for (i, word) in words.iter().enumerate() {
            classes[i % 4][class(*word, shift)] += 1;
        }
        for (i, mask) in self.masks.iter().enumerate() {
            let mut left = *mask;
            while left != 0 {
                let at = i * STEP + left.trailing_zeros() as usize;
                left &= left - 1;
                let c = class(words[at], shift);
                need.add(dtype, shift, words[at], after[at]);
                classes[0][c] = classes[0][c].wrapping_sub(1);
            }
        }
        for (c, need) in need.words.iter_mut().enumerate() {
            need[0] += classes.iter().fold(0u64, |sum, table| sum.wrapping_add(table[c]));
        }
    }
}

impl<P: Packer> Count for Fast<P> {
    fn widths(&mut self, dtype: Dtype, base: &[u8], fine_tuned: &[u8], need: &mut Need) {
        match dtype.word_bytes() {
            2 => self.histogram::<u16>(dtype, base, fine_tuned, need),
            4 => self.histogram::<u32>(dtype, base, fine_tuned, need),
            _ => Oracle.widths(dtype, base, fine_tuned, need),
        }
    }

    fn records(
        &mut self,
        dtype: Dtype,
        cols: usize,
        tile_cols: usize,
        base: &[u8],
        fine_tuned: &[u8],
    ) -> [u64; 3] {
        let size = (cols, tile_cols);
        match dtype.word_bytes() {
            2 => self.two_byte.collect(self.packer, dtype, size, base, fine_tuned).sizes(),
            4 => self.four_byte.collect(self.packer, dtype, size, base, fine_tuned).sizes(),
            _ => Oracle.records(dtype, cols, tile_cols, base, fine_tuned),
        }
    }
}
