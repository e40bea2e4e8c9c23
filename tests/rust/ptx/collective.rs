//! What the lanes of a warp make together, from the PTX ISA alone (release 8.5): `shfl.sync`; "Matrix Fragments for mma.m16n8k16 with
//! floating point type"; "Warp-level matrix load instruction: ldmatrix". In the ISA's words groupID is the lane / 4 and
//! threadID_in_group the lane % 4.

use crate::arith::{Lanes, bits_of_f32, f32_of};
use crate::memory::Loaded;
use crate::ops::Factors;
use half::{bf16, f16};

/// A register of every lane, and the lanes that do not know theirs.
pub(crate) type Fragment = (Lanes, u32);

/// The lane that `lane` reads of, and whether the one that it asked for is within its segment. `c` holds the clamp in bits 0 to 4
/// and the mask of the segment in bits 8 to 12.
fn shuffle_from(across: bool, lane: usize, b: u64, c: u64) -> (usize, bool) {
    let (ask, clamp, segment) = (b as usize & 31, c as usize & 31, c as usize >> 8 & 31);
    let last = (lane & segment) | (clamp & !segment);
    let from = if across { lane ^ ask } else { (lane & segment) | (ask & !segment) };
    if from <= last { (from, true) } else { (lane, false) }
}

/// `shfl.sync.bfly`, or `idx`: what each lane gets, and the lanes that asked for one within their segment.
pub(crate) fn shuffled(across: bool, a: &Fragment, b: &Fragment, c: &Fragment) -> (Fragment, u32) {
    let (mut out, mut unknown, mut inside) = ([0; 32], b.1 | c.1, 0);
    for (lane, out) in out.iter_mut().enumerate() {
        let (from, is_inside) = shuffle_from(across, lane, b.0[lane], c.0[lane]);
        *out = a.0[from];
        unknown |= (a.1 >> from & 1) << lane;
        inside |= u32::from(is_inside) << lane;
    }
    ((out, unknown), inside)
}

/// `ldmatrix.x4`: lanes 8 i to 8 i + 7 name the rows of matrix i, eight words of 16 bits each, and register i holds a part of it. Of
/// a matrix, lane l gets the words 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, the first in the low half; turned, those of the transposed.
pub(crate) fn matrices(turned: bool, rows: &[[Loaded; 8]; 32]) -> [Fragment; 4] {
    std::array::from_fn(|matrix| {
        let (mut out, mut unknown) = ([0; 32], 0);
        for (lane, out) in out.iter_mut().enumerate() {
            for half in 0..2 {
                let (row, column) = (lane / 4, 2 * (lane % 4) + half);
                let (row, column) = if turned { (column, row) } else { (row, column) };
                let (word, known) = rows[8 * matrix + row][column];
                *out |= word << (16 * half);
                unknown |= u32::from(!known) << lane;
            }
        }
        (out, unknown)
    })
}

/// Where the two words of a register are in a matrix: row and column of the first, of `a` (16 rows, 16 columns), of register `i`.
fn place_in_a(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + if i % 2 == 1 { 8 } else { 0 }, 2 * (lane % 4) + if i >= 2 { 8 } else { 0 })
}

/// The same of `b` (16 rows, 8 columns), whose two words are below each other.
fn place_in_b(lane: usize, i: usize) -> (usize, usize) {
    (2 * (lane % 4) + 8 * i, lane / 4)
}

/// One value of the sums (16 rows, 8 columns).
fn place_in_c(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + if i >= 2 { 8 } else { 0 }, 2 * (lane % 4) + i % 2)
}

fn factor(of: Factors, word: u64) -> f64 {
    match of {
        Factors::Bf16 => bf16::from_bits(word as u16).to_f64(),
        Factors::F16 => f16::from_bits(word as u16).to_f64(),
    }
}

/// `d = a * b + c`. The ISA leaves the order of the sixteen products and their roundings to the machine; here they are exact, and
/// their sum in f64 is rounded once.
pub(crate) fn multiply(
    of: Factors,
    a: &[Fragment; 4],
    b: &[Fragment; 2],
    c: &[Fragment; 4],
) -> [Fragment; 4] {
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 16]; 8]);
    let (mut rows, mut columns) = (0u32, 0u32);
    for lane in 0..32 {
        for (i, (words, unknown)) in a.iter().enumerate() {
            let (row, column) = place_in_a(lane, i);
            left[row][column] = factor(of, words[lane] & 0xFFFF);
            left[row][column + 1] = factor(of, words[lane] >> 16);
            rows |= (unknown >> lane & 1) << row;
        }
        for (i, (words, unknown)) in b.iter().enumerate() {
            let (row, column) = place_in_b(lane, i);
            right[column][row] = factor(of, words[lane] & 0xFFFF);
            right[column][row + 1] = factor(of, words[lane] >> 16);
            columns |= (unknown >> lane & 1) << column;
        }
    }
    std::array::from_fn(|i| {
        let (mut out, mut unknown) = ([0; 32], c[i].1);
        for (lane, out) in out.iter_mut().enumerate() {
            let (row, column) = place_in_c(lane, i);
            let products = left[row].iter().zip(&right[column]).map(|(a, b)| a * b);
            let sum = f64::from(f32_of(c[i].0[lane])) + products.sum::<f64>();
            *out = bits_of_f32(sum as f32);
            unknown |= (rows >> row & 1 | columns >> column & 1) << lane;
        }
        (out, unknown)
    })
}
