//! The exact difference of two words, as the additive form of `sparse` stores it.
//!
//! `fine_tuned = base + d1 (+ d2)` in f32, proved per word here. The error of an f32 addition is itself an f32
//! (Knuth's TwoSum, The Art of Computer Programming vol. 2, 4.2.2), so f32 never needs a third term; for bf16 and f16
//! whatever two terms cannot hold becomes an exception.

use crate::matrix::Dtype;
use half::{bf16, f16};

/// How one changed word is stored: `count` differences for the product, and whether restoring needs the word itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// The differences, as words of the dtype; the first `count` are meant.
    pub terms: [u64; 2],
    /// How many of them are meant: 0, 1 or 2.
    pub count: usize,
    /// Whether the word must also be an exception: `base + terms` is not, bit for bit, the fine-tuned word.
    pub exception: bool,
}

/// The word that adds nothing: -0.0 for the additive dtypes (x + -0.0 = x for every x), 0 for XOR.
pub fn no_op(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => 0x8000_0000,
        Dtype::BF16 | Dtype::F16 => 0x8000,
        _ => 0,
    }
}

/// The value of a word of a computing dtype.
#[inline]
pub fn widen(dtype: Dtype, word: u64) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_bits(word as u32),
        Dtype::F16 => f16::from_bits(word as u16).to_f32(),
        _ => f32::from_bits((word as u32) << 16),
    }
}

/// The word of a value that the dtype holds exactly; other values are cut (bf16) or rounded (f16).
#[inline]
pub fn narrow(dtype: Dtype, value: f32) -> u64 {
    match dtype {
        Dtype::F32 => u64::from(value.to_bits()),
        Dtype::F16 => u64::from(f16::from_f32(value).to_bits()),
        _ => u64::from(value.to_bits() >> 16),
    }
}

/// A NaN of the dtype: as a difference it makes the accumulator NaN, so that the decode path takes over.
fn poison(dtype: Dtype) -> u64 {
    narrow(dtype, f32::from_bits(0x7FC0_0000))
}

/// Split the difference of two words that are not equal; `dtype` tells the arithmetic.
#[inline]
pub fn split(dtype: Dtype, base: u64, fine_tuned: u64) -> Split {
    if dtype == Dtype::BF16
        && let Some(term) = one_bf16(base as u16, fine_tuned as u16)
    {
        return Split { terms: [u64::from(term), 0], count: 1, exception: false };
    }
    split_any(dtype, base, fine_tuned)
}

/// The one term of two finite bf16 words that is theirs exactly, and gives the word back: the case of nearly all changes
/// (a third of the time of encoding `sparse` is spent here). Infinities and NaN make the error, or the difference, a NaN.
#[inline]
fn one_bf16(base: u16, fine_tuned: u16) -> Option<u16> {
    let (b, f) = (widen(Dtype::BF16, u64::from(base)), widen(Dtype::BF16, u64::from(fine_tuned)));
    let (sum, error) = two_sum(f, -b);
    let exact = error == 0.0 && is_bf16(sum) && sum != 0.0;
    (exact && (b + sum).to_bits() >> 16 == u32::from(fine_tuned)).then_some((sum.to_bits() >> 16) as u16)
}

/// [`split`] of two words, in every case that the fast way leaves.
fn split_any(dtype: Dtype, base: u64, fine_tuned: u64) -> Split {
    if !dtype.computes() {
        return Split { terms: [base ^ fine_tuned, 0], count: 1, exception: false };
    }
    let (b, f) = (widen(dtype, base), widen(dtype, fine_tuned));
    let refused = Split { terms: [poison(dtype), 0], count: 1, exception: true };
    if !b.is_finite() || !f.is_finite() {
        return refused;
    }
    if b == f {
        // +0.0 against -0.0: no product can tell, only the word can.
        return Split { terms: [0, 0], count: 0, exception: true };
    }
    let (sum, error) = two_sum(f, -b);
    let terms = if dtype == Dtype::F32 { split_f32(sum, error) } else { split_half(dtype, sum, error, b, f) };
    match terms {
        None => refused,
        Some((d1, d2)) => {
            let restored = narrow(dtype, if d2 == 0.0 { b + d1 } else { (b + d1) + d2 });
            Split {
                terms: [narrow(dtype, d1), narrow(dtype, d2)],
                count: if d2 == 0.0 { 1 } else { 2 },
                exception: restored != fine_tuned,
            }
        }
    }
}

/// `a + b = sum + error`, exactly, unless the sum overflows.
fn two_sum(a: f32, b: f32) -> (f32, f32) {
    let sum = a + b;
    let bb = sum - a;
    (sum, (a - (sum - bb)) + (b - bb))
}

fn split_f32(sum: f32, error: f32) -> Option<(f32, f32)> {
    sum.is_finite().then_some((sum, error))
}

/// Whether a bf16 holds the value, told without rounding.
#[inline]
fn is_bf16(value: f32) -> bool {
    value.to_bits() & 0xFFFF == 0 && value.is_finite()
}

/// Two terms of 8 or 11 bits whose f32 sums are exact in either order of adding, so that a one-hot product is too.
fn split_half(dtype: Dtype, sum: f32, error: f32, b: f32, f: f32) -> Option<(f32, f32)> {
    if error == 0.0 && dtype == Dtype::BF16 && is_bf16(sum) {
        return Some((sum, 0.0));
    }
    let d1 = round_finite(dtype, sum);
    let rest = sum - d1;
    let d2 = match (rest == 0.0, error == 0.0) {
        (_, true) => rest,
        (true, false) => error,
        (false, false) => return None,
    };
    let exact = round_finite(dtype, d2) == d2
        && (b + d1) + d2 == f
        && b + (d1 + d2) == f
        && two_sum(d1, d2).1 == 0.0
        && d1 != 0.0;
    exact.then_some((d1, d2))
}

/// Nearest finite value of the dtype.
fn round_finite(dtype: Dtype, value: f32) -> f32 {
    let (rounded, max) = match dtype {
        Dtype::F16 => (f16::from_f32(value).to_f32(), f16::MAX.to_f32()),
        _ => (bf16::from_f32(value).to_f32(), bf16::MAX.to_f32()),
    };
    rounded.clamp(-max, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restored(dtype: Dtype, base: u64, s: &Split) -> u64 {
        let mut v = widen(dtype, base);
        for t in &s.terms[..s.count] {
            v += widen(dtype, *t);
        }
        narrow(dtype, v)
    }

    #[test]
    fn every_pair_of_a_grid_of_bf16_and_f16_words_is_exact_or_an_exception() {
        for dtype in [Dtype::BF16, Dtype::F16] {
            let words: Vec<u64> = (0..=0xFFFFu64)
                .step_by(97)
                .chain([0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0x7BFF, 0xFBFF, 1])
                .collect();
            let (mut pairs, mut exceptions) = (0u64, 0u64);
            for &b in &words {
                for &f in words.iter().filter(|f| **f != b) {
                    let s = split(dtype, b, f);
                    assert_eq!(s, split_any(dtype, b, f), "{dtype} {b:04x} {f:04x}");
                    pairs += 1;
                    exceptions += u64::from(s.exception);
                    assert!(s.terms[..s.count].iter().all(|t| *t != no_op(dtype)), "{dtype} {b:04x} {f:04x}");
                    assert!(s.exception || restored(dtype, b, &s) == f, "{dtype} {b:04x} {f:04x} {s:?}");
                    let (bv, fv) = (widen(dtype, b), widen(dtype, f));
                    let poisoned = s.count == 1 && widen(dtype, s.terms[0]).is_nan();
                    if !poisoned {
                        let d: f64 = s.terms[..s.count].iter().map(|t| f64::from(widen(dtype, *t))).sum();
                        assert_eq!((f64::from(bv) + d) as f32, fv, "{dtype} {b:04x} {f:04x} {s:?}");
                    }
                }
            }
            assert!(exceptions > 0 && exceptions < pairs, "{exceptions} of {pairs}");
        }
    }

    #[test]
    fn f32_differences_are_exact_in_two_terms() {
        let mut seed = 1u64;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (b, f) = ((seed >> 32) as u32, (seed as u32).rotate_left(7));
            let (bv, fv) = (f32::from_bits(b), f32::from_bits(f));
            if b == f || !bv.is_finite() || !fv.is_finite() {
                continue;
            }
            let s = split(Dtype::F32, u64::from(b), u64::from(f));
            assert!(s.exception || restored(Dtype::F32, u64::from(b), &s) == u64::from(f));
            if (bv.abs().log2() - fv.abs().log2()).abs() < 20.0
                && s.count > 0
                && !widen(Dtype::F32, s.terms[0]).is_nan()
            {
                let d: f64 = s.terms[..s.count].iter().map(|t| f64::from(widen(Dtype::F32, *t))).sum();
                assert_eq!(f64::from(bv) + d, f64::from(fv));
            }
        }
    }
}
