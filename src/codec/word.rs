//! Words: the bits of one element, without arithmetic meaning.

use std::fmt::Debug;

#[cfg(target_endian = "big")]
compile_error!("xorz formats are little-endian and its kernels read them in place");

/// A word of 1, 2, 4 or 8 bytes.
pub trait Word: bytemuck::Pod + Eq + Default + Debug + Send + Sync + 'static {
    /// Bytes of a word.
    const BYTES: usize;
    /// Bits of a word.
    const BITS: u32;
    /// Bits waiting in one lane of a bit stream: less than a word, plus one fresh word.
    type Lane: Copy + Default;

    /// Read a little-endian word; panics unless `bytes.len() == BYTES`.
    fn load(bytes: &[u8]) -> Self;
    /// The word as a u64, extended with zeros.
    fn to_u64(self) -> u64;
    /// The word that the low bits of `value` are.
    fn from_u64(v: u64) -> Self;
    /// `self + other`, wrapping.
    fn plus(self, other: Self) -> Self;
    /// `self - other`, wrapping.
    fn minus(self, other: Self) -> Self;
    /// Append a fresh word above the `have` bits of a lane.
    fn refill(self, lane: &mut Self::Lane, have: u32);
    /// Take the low `width` bits (1 ..= BITS) out of a lane.
    fn take(lane: &mut Self::Lane, width: u32) -> Self;
    /// Smallest offset-binary width that holds the wrapping difference `self`: 0 for 0, else `w` with
    /// `-2^(w-1) <= self < 2^(w-1)`.
    fn width(self) -> u32 {
        let v = self.to_u64();
        let sign = (v >> (Self::BITS - 1)) & 1;
        let magnitude = if sign == 1 { Self::from_u64(!v).to_u64() } else { v };
        if v == 0 { 0 } else { 65 - magnitude.leading_zeros() }
    }
}

macro_rules! words {
    ($($w:ty, $lane:ty);*) => {$(
        impl Word for $w {
            const BYTES: usize = size_of::<$w>();
            const BITS: u32 = <$w>::BITS;
            type Lane = $lane;

            #[inline]
            fn load(bytes: &[u8]) -> Self {
                let mut b = [0u8; size_of::<$w>()];
                b.copy_from_slice(bytes);
                <$w>::from_le_bytes(b)
            }
            #[inline]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline]
            fn from_u64(v: u64) -> Self {
                v as $w
            }
            #[inline]
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline]
            fn minus(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            #[inline]
            fn refill(self, lane: &mut $lane, have: u32) {
                *lane |= <$lane>::from(self) << have;
            }
            #[inline]
            fn take(lane: &mut $lane, width: u32) -> Self {
                let v = (*lane as $w) & (<$w>::MAX >> (<$w>::BITS - width));
                *lane >>= width;
                v
            }
        }
    )*};
}

words!(u8, u16; u16, u32; u32, u64; u64, u128);

/// Run `$body` with `$w` bound to the word type of `$dtype`.
macro_rules! with_word {
    ($dtype:expr, $w:ident => $body:expr) => {
        match $dtype.word_bytes() {
            1 => {
                type $w = u8;
                $body
            }
            2 => {
                type $w = u16;
                $body
            }
            4 => {
                type $w = u32;
                $body
            }
            _ => {
                type $w = u64;
                $body
            }
        }
    };
}
pub(crate) use with_word;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn width_is_the_smallest_that_holds_the_difference() {
        for d in i16::MIN..=i16::MAX {
            let w = (d as u16).width();
            let fits = |w: u32| w > 0 && i32::from(d) >= -(1 << (w - 1)) && i32::from(d) < (1 << (w - 1));
            assert!(if d == 0 { w == 0 } else { fits(w) && (w == 1 || !fits(w - 1)) }, "{d} {w}");
        }
        assert_eq!((1u64 << 63).width(), 64);
        assert_eq!(0x80u8.width(), 8);
    }

    #[test]
    fn lanes_give_back_what_was_put() {
        let mut lane = 0u32;
        0xABCFu16.refill(&mut lane, 0);
        assert_eq!(u16::take(&mut lane, 4), 0xF);
        0x1234u16.refill(&mut lane, 12);
        assert_eq!(u16::take(&mut lane, 16), 0x4ABC);
        assert_eq!(u16::take(&mut lane, 12), 0x123);
    }
}
