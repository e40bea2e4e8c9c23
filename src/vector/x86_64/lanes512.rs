//! The bit streams of `exponent` on 16-bit words with AVX-512 VBMI2: see `vector::lanes` for what they are
//! and `portable` there for their meaning. A step of 32 words has no branch and no table in memory:
//! `vpexpand` hands out the units in the order of the lanes, and `vpshldv` joins what a lane holds to its
//! unit. Must not check what `vector::lanes` checks.
//!
//! A lane is kept as the unit that it took last, of which the top `held` bits are left (what lies below them
//! is spent): `value = unit << held | last >> (16 - held)` is then one instruction, and `held` stays below
//! 16, whatever the width.
//!
//! **Floor** (16-bit words, Zen 5): 17 instructions for a step, 22 with its load, store and loop; the chain
//! from one step to the next is compare, expand, blend. 5.1 cycles measured in the cache, 0.04 ns per word,
//! where memory takes 9.3 for the base's words with two cores at 56 GB/s. **Tried**: expanding into the old
//! units, from a register or from memory (6.5 cycles: the merge lies in the chain), two or four groups for a
//! refill (4.2, 3.7, but 2 to 15 % of size, and 2 times it).

use super::avx512_more::Avx512Vbmi2;
use crate::codec::exponent::CLASSES;
use crate::vector::lanes::{Code, LaneBits, Progress, STEP};
use std::arch::x86_64::*;

/// A value for each class of 16-bit words.
#[inline(always)]
fn table16(of: impl Fn(u32) -> u32, widths: &[u8; CLASSES]) -> __m512i {
    let values: [u16; CLASSES] = std::array::from_fn(|class| of(u32::from(widths[class])) as u16);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute(values) }
}

/// What a tile's widths say of 16-bit words, by class: the width and its mask.
#[derive(Clone, Copy)]
pub(crate) struct Table16 {
    pub(super) widths: __m512i,
    pub(super) masks: __m512i,
    pub(super) shift: __m128i,
}

impl Table16 {
    /// Of a code whose widths are 16 at most.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    pub(crate) fn new(code: &Code<'_>) -> Self {
        Self {
            widths: table16(|w| w, code.widths),
            masks: table16(|w| (1 << w) - 1, code.widths),
            shift: _mm_cvtsi32_si128(code.shift as i32),
        }
    }
}

/// 32 lanes of 16 bits.
#[derive(Clone, Copy)]
pub(crate) struct Lanes16 {
    /// The unit that each lane took last.
    pub(super) last: __m512i,
    /// How many of its top bits are left: 0 to 15.
    pub(super) held: __m512i,
}

impl Lanes16 {
    /// At a tile's first word.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(crate) fn empty() -> Self {
        Self { last: _mm512_setzero_si512(), held: _mm512_setzero_si512() }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    #[inline]
    fn load(lanes: &LaneBits<u16>) -> Self {
        let (bits, held) = (words(&lanes.bits), words(&lanes.held));
        let up = _mm512_sub_epi16(_mm512_set1_epi16(16), held);
        // A shift by 16, where nothing is held, gives zero.
        Self { last: _mm512_sllv_epi16(bits, up), held }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    #[inline]
    fn save(&self, lanes: &mut LaneBits<u16>) {
        let down = _mm512_sub_epi16(_mm512_set1_epi16(16), self.held);
        store(_mm512_srlv_epi16(self.last, down), &mut lanes.bits);
        store(self.held, &mut lanes.held);
    }

    /// Decode one step: the base's words in, the fine-tuned ones out, exceptions apart. `units` is what the
    /// step may take. Gives how many units were taken. Lanes without a word (outside of `there`) take
    /// nothing, and give zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
    #[inline]
    pub(crate) fn step<const WHOLE: bool>(
        &mut self,
        t: &Table16,
        base: __m512i,
        there: __mmask32,
        units: __m512i,
    ) -> (__m512i, usize) {
        // Only the low five bits of an index count.
        let class = _mm512_srl_epi16(base, t.shift);
        let mut w = _mm512_permutexvar_epi16(class, t.widths);
        if !WHOLE {
            w = _mm512_maskz_mov_epi16(there, w);
        }
        let takes = _mm512_cmplt_epu16_mask(self.held, w);
        // Expanded to zeros and blended: merging into `last` would put the expansion's latency into the
        // chain. The value needs no blend: where no unit is taken, all its bits are held.
        let unit = _mm512_maskz_expand_epi16(takes, units);
        let value = _mm512_shldv_epi16(unit, self.last, self.held);
        self.last = _mm512_mask_blend_epi16(takes, self.last, unit);
        self.held = _mm512_and_si512(_mm512_sub_epi16(self.held, w), _mm512_set1_epi16(15));
        // Half of the range is the mask less its half: base - (mask - mask / 2) + (value & mask). The mask
        // less what the value has of it is what it lacks.
        let mask = _mm512_permutexvar_epi16(class, t.masks);
        let most = _mm512_add_epi16(base, _mm512_srli_epi16::<1>(mask));
        let word = _mm512_sub_epi16(most, _mm512_andnot_si512(value, mask));
        (if WHOLE { word } else { _mm512_maskz_mov_epi16(there, word) }, takes.count_ones() as usize)
    }
}

/// 64 bytes of plain data.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn words<T: bytemuck::Pod, const N: usize>(from: &[T; N]) -> __m512i {
    const { assert!(size_of::<[T; N]>() >= 64) };
    // SAFETY: the array holds at least 64 bytes of plain data, the load asks no alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store<T: bytemuck::Pod, const N: usize>(v: __m512i, to: &mut [T; N]) {
    const { assert!(size_of::<[T; N]>() >= 64) };
    // SAFETY: the array takes at least 64 bytes, any bytes are a T, the store asks no alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
}

/// Where words come from before they are decoded.
#[derive(Clone, Copy)]
pub(super) enum From<'a> {
    /// From where they go.
    There,
    /// From the base, as many bytes as there are words.
    Base(&'a [u8]),
}

impl From<'_> {
    /// The first word's address, if words go to `to`.
    pub(super) fn address<W>(self, to: &[W]) -> *const u8 {
        match self {
            From::There => to.as_ptr().cast(),
            From::Base(base) => {
                assert!(base.len() == size_of_val(to), "as many bytes as there are words");
                base.as_ptr()
            }
        }
    }
}

/// What is read and written is asked for so many bytes ahead.
const AHEAD: usize = 1024;

/// [`crate::vector::lanes::Lane::steps`] of 16-bit words.
pub(super) fn words16(
    _: Avx512Vbmi2,
    lanes: &mut LaneBits<u16>,
    code: Code<'_>,
    units: &[u8],
    from: From<'_>,
    words: &mut [u16],
) -> Progress {
    // SAFETY: the token proves AVX-512 F, BW, VBMI2 and POPCNT.
    unsafe { inner16(lanes, code, units, from, words) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn inner16(
    lanes: &mut LaneBits<u16>,
    code: Code<'_>,
    units: &[u8],
    from: From<'_>,
    to: &mut [u16],
) -> Progress {
    let base = from.address(to);
    let (table, mut now) = (Table16::new(&code), Lanes16::load(lanes));
    let (whole, rest) = (to.len() / STEP, to.len() % STEP);
    let (mut step, mut at) = (0, 0);
    loop {
        // So many steps find their units, whatever they take.
        let sure = ((units.len() - at) / 64).min(whole - step);
        if sure == 0 {
            break;
        }
        for _ in 0..sure {
            let ahead = 64 * step + AHEAD;
            // Stores that miss the first cache leave one by one, in order: with 16 rows of x 7 % of the time.
            _mm_prefetch::<_MM_HINT_ET0>(to.as_ptr().cast::<i8>().wrapping_add(ahead));
            _mm_prefetch::<_MM_HINT_T0>(base.cast::<i8>().wrapping_add(ahead));
            _mm_prefetch::<_MM_HINT_T0>(units.as_ptr().cast::<i8>().wrapping_add(at + AHEAD));
            // SAFETY: whole steps lie within `to` and the base's words; `sure` steps of at most 64 bytes each
            // lie within `units` from where they begin. What was read is written, or something else, at once.
            unsafe {
                let word = _mm512_loadu_si512(base.add(64 * step).cast());
                let (word, taken) =
                    now.step::<true>(&table, word, 0, _mm512_loadu_si512(units.as_ptr().add(at).cast()));
                _mm512_storeu_si512(to.as_mut_ptr().add(STEP * step).cast(), word);
                at += 2 * taken;
            }
            step += 1;
        }
    }
    let mut done = Progress { words: STEP * step, bytes: at };
    let last = units.get(at..).and_then(|u| u.first_chunk::<64>());
    if let Some(last) = last.filter(|_| step == whole && rest > 0) {
        let there = (1u32 << rest) - 1;
        // SAFETY: only the lanes of `there` are read and written, and those words follow the whole steps.
        let taken = unsafe {
            let base = _mm512_maskz_loadu_epi16(there, base.add(64 * step).cast());
            let (word, taken) = now.step::<false>(&table, base, there, self::words(last));
            _mm512_mask_storeu_epi16(to.as_mut_ptr().add(STEP * step).cast(), there, word);
            taken
        };
        done = Progress { words: to.len(), bytes: at + 2 * taken };
    }
    now.save(lanes);
    done
}
