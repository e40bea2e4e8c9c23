//! What instructions on registers compute, lane by lane, by their names in PTX (PTX ISA 8.5, chapter 9.7, by name). Values of fewer
//! than 64 bits are kept with zeros above. Not here is unknown, and an error.

use half::f16;

/// A register: a value for each lane of a warp.
pub(crate) type Lanes = [u64; 32];

pub(crate) type One = fn(&Lanes) -> Lanes;
pub(crate) type Two = fn(&Lanes, &Lanes) -> Lanes;
pub(crate) type Three = fn(&Lanes, &Lanes, &Lanes) -> Lanes;
/// A bit for each lane.
pub(crate) type Compare = fn(&Lanes, &Lanes) -> u32;

macro_rules! one {
    (|$a:ident| $e:expr) => {{
        fn f(x: &Lanes) -> Lanes {
            let mut out = [0; 32];
            for i in 0..32 {
                let $a = x[i];
                out[i] = $e;
            }
            out
        }
        f as One
    }};
}

macro_rules! two {
    (|$a:ident, $b:ident| $e:expr) => {{
        fn f(x: &Lanes, y: &Lanes) -> Lanes {
            let mut out = [0; 32];
            for i in 0..32 {
                let ($a, $b) = (x[i], y[i]);
                out[i] = $e;
            }
            out
        }
        f as Two
    }};
}

macro_rules! three {
    (|$a:ident, $b:ident, $c:ident| $e:expr) => {{
        fn f(x: &Lanes, y: &Lanes, z: &Lanes) -> Lanes {
            let mut out = [0; 32];
            for i in 0..32 {
                let ($a, $b, $c) = (x[i], y[i], z[i]);
                out[i] = $e;
            }
            out
        }
        f as Three
    }};
}

macro_rules! compare {
    (|$a:ident, $b:ident| $e:expr) => {{
        fn f(x: &Lanes, y: &Lanes) -> u32 {
            let mut out = 0;
            for i in 0..32 {
                let ($a, $b) = (x[i], y[i]);
                out |= u32::from($e) << i;
            }
            out
        }
        f as Compare
    }};
}

pub(crate) fn f32_of(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

/// Results that are NaN have the canonical bits (PTX ISA, floating-point instructions: NaN payloads are not preserved).
pub(crate) fn bits_of_f32(value: f32) -> u64 {
    if value.is_nan() { 0x7FFF_FFFF } else { u64::from(value.to_bits()) }
}

fn f64_of(bits: u64) -> f64 {
    f64::from_bits(bits)
}

const LOW: u64 = 0xFFFF_FFFF;

fn signed(a: u64) -> i64 {
    i64::from(a as u32 as i32)
}

fn half_bits(value: f32) -> u64 {
    if value.is_nan() { 0x7FFF } else { u64::from(f16::from_f32(value).to_bits()) }
}

/// `bfi`: the low `len` bits of `a` over those of `b` from `at` on, of `width` bits.
fn inserted(a: u64, b: u64, at: u64, len: u64, width: u64) -> u64 {
    let (at, len) = (at & 0xFF, (len & 0xFF).min(width));
    if len == 0 || at >= width {
        return b;
    }
    let ones = if len == 64 { u64::MAX } else { (1 << len) - 1 };
    let field = (ones << at) & if width == 64 { u64::MAX } else { LOW };
    (b & !field) | ((a << at) & field)
}

/// `bfi`, whose place and length are numbers in the text of these kernels or registers.
pub(crate) fn insert(wide: bool, [a, b, at, len]: [&Lanes; 4]) -> Lanes {
    std::array::from_fn(|i| inserted(a[i], b[i], at[i], len[i], if wide { 64 } else { 32 }))
}

/// `prmt.b32` without a mode: four bytes picked of eight, or their sign spread.
fn permuted(a: u64, b: u64, pick: u64) -> u64 {
    let bytes = (b << 32) | a;
    (0..4).fold(0, |out, i| {
        let nibble = (pick >> (4 * i)) & 15;
        let byte = (bytes >> (8 * (nibble & 7))) & 0xFF;
        let byte = if nibble & 8 == 0 { byte } else { 0xFF * (byte >> 7) };
        out | (byte << (8 * i))
    })
}

pub(crate) fn one(name: &str) -> Option<One> {
    Some(match name {
        "mov.u16" | "mov.b16" | "mov.u32" | "mov.b32" | "mov.f32" | "mov.u64" | "mov.b64" | "mov.f64" => {
            one!(|a| a)
        }
        // Device memory lies at the same numbers in the generic space (PTX ISA, cvta).
        "cvta.to.global.u64" => one!(|a| a),
        "not.b32" => one!(|a| !a & LOW),
        "not.b64" => one!(|a| !a),
        "neg.s32" => one!(|a| a.wrapping_neg() & LOW),
        "neg.s64" => one!(|a| a.wrapping_neg()),
        "neg.f64" => one!(|a| a ^ (1 << 63)),
        "popc.b32" => one!(|a| u64::from(a.count_ones())),
        "brev.b32" => one!(|a| u64::from((a as u32).reverse_bits())),
        "bfind.shiftamt.u32" => {
            one!(|a| if a == 0 { LOW } else { u64::from((a as u32).leading_zeros()) })
        }
        "cvt.u16.u32" | "cvt.u16.u64" => one!(|a| a & 0xFFFF),
        "cvt.u32.u16" => one!(|a| a & 0xFFFF),
        "cvt.u32.u64" => one!(|a| a & LOW),
        "cvt.u64.u32" => one!(|a| a & LOW),
        "cvt.u64.u16" => one!(|a| a & 0xFFFF),
        "cvt.s64.s32" => one!(|a| signed(a) as u64),
        "cvt.s32.s8" => one!(|a| u64::from(i32::from(a as u8 as i8) as u32)),
        "cvt.f32.f16" => one!(|a| bits_of_f32(f16::from_bits(a as u16).to_f32())),
        "cvt.rn.f16.f32" => one!(|a| half_bits(f32_of(a))),
        "cvt.f64.f32" => one!(|a| f64::from(f32_of(a)).to_bits()),
        "cvt.rn.f32.f64" => one!(|a| bits_of_f32(f64_of(a) as f32)),
        _ => return None,
    })
}

/// The function, and whether the second operand may not be zero.
pub(crate) fn two(name: &str) -> Option<(Two, bool)> {
    let f = match name {
        "add.s32" | "add.u32" => two!(|a, b| a.wrapping_add(b) & LOW),
        "add.s64" | "add.u64" => two!(|a, b| a.wrapping_add(b)),
        "sub.s32" | "sub.u32" => two!(|a, b| a.wrapping_sub(b) & LOW),
        "sub.s64" | "sub.u64" => two!(|a, b| a.wrapping_sub(b)),
        "mul.lo.s32" | "mul.lo.u32" => two!(|a, b| a.wrapping_mul(b) & LOW),
        "mul.lo.s64" | "mul.lo.u64" => two!(|a, b| a.wrapping_mul(b)),
        "mul.hi.u64" => two!(|a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        "mul.wide.u16" => two!(|a, b| (a & 0xFFFF) * (b & 0xFFFF)),
        "mul.wide.u32" => two!(|a, b| (a & LOW) * (b & LOW)),
        "div.u32" => return Some((two!(|a, b| a.checked_div(b).unwrap_or(0)), true)),
        "rem.u32" => return Some((two!(|a, b| a.checked_rem(b).unwrap_or(0)), true)),
        "and.b16" | "and.b32" | "and.b64" => two!(|a, b| a & b),
        "or.b16" | "or.b32" | "or.b64" => two!(|a, b| a | b),
        "xor.b16" | "xor.b32" | "xor.b64" => two!(|a, b| a ^ b),
        // Shifts by more than the width are shifts by the width (PTX ISA, shl and shr).
        "shl.b32" => two!(|a, b| if b & LOW > 31 { 0 } else { (a << b) & LOW }),
        "shl.b64" => two!(|a, b| if b & LOW > 63 { 0 } else { a << (b & 63) }),
        "shr.u16" => two!(|a, b| if b & LOW > 15 { 0 } else { a >> b }),
        "shr.u32" => two!(|a, b| if b & LOW > 31 { 0 } else { a >> b }),
        "shr.u64" => two!(|a, b| if b & LOW > 63 { 0 } else { a >> (b & 63) }),
        "shr.s64" => two!(|a, b| ((a as i64) >> (b & LOW).min(63)) as u64),
        "min.u32" | "min.u64" => two!(|a, b| a.min(b)),
        "max.u32" | "max.u64" => two!(|a, b| a.max(b)),
        "add.f32" => two!(|a, b| bits_of_f32(f32_of(a) + f32_of(b))),
        "add.f64" => two!(|a, b| (f64_of(a) + f64_of(b)).to_bits()),
        _ => return None,
    };
    Some((f, false))
}

pub(crate) fn three(name: &str) -> Option<Three> {
    Some(match name {
        "mad.lo.s32" => three!(|a, b, c| a.wrapping_mul(b).wrapping_add(c) & LOW),
        "fma.rn.f32" => three!(|a, b, c| bits_of_f32(f32_of(a).mul_add(f32_of(b), f32_of(c)))),
        "fma.rn.f64" => three!(|a, b, c| f64_of(a).mul_add(f64_of(b), f64_of(c)).to_bits()),
        // The upper word of both, moved left by the low five bits of the third.
        "shf.l.wrap.b32" => three!(|a, b, c| (((b << 32) | a) << (c & 31)) >> 32 & LOW),
        "prmt.b32" => three!(|a, b, c| permuted(a, b, c)),
        _ => return None,
    })
}

/// `setp.<comparison>.<type>`; with a NaN, all of these are false (PTX ISA, setp).
pub(crate) fn comparison(name: &str) -> Option<Compare> {
    Some(match name {
        "eq.s16" | "eq.u16" | "eq.b16" | "eq.s32" | "eq.u32" | "eq.b32" | "eq.s64" | "eq.u64" | "eq.b64" => {
            compare!(|a, b| a == b)
        }
        "ne.s16" | "ne.u16" | "ne.b16" | "ne.s32" | "ne.u32" | "ne.b32" | "ne.s64" | "ne.u64" | "ne.b64" => {
            compare!(|a, b| a != b)
        }
        "lt.u16" | "lt.u32" | "lt.u64" => compare!(|a, b| a < b),
        "le.u16" | "le.u32" | "le.u64" => compare!(|a, b| a <= b),
        "gt.u16" | "gt.u32" | "gt.u64" => compare!(|a, b| a > b),
        "ge.u16" | "ge.u32" | "ge.u64" => compare!(|a, b| a >= b),
        "lt.s32" => compare!(|a, b| signed(a) < signed(b)),
        "le.s32" => compare!(|a, b| signed(a) <= signed(b)),
        "gt.s32" => compare!(|a, b| signed(a) > signed(b)),
        "ge.s32" => compare!(|a, b| signed(a) >= signed(b)),
        "lt.s64" => compare!(|a, b| (a as i64) < b as i64),
        "le.s64" => compare!(|a, b| a as i64 <= b as i64),
        "gt.s64" => compare!(|a, b| a as i64 > b as i64),
        "ge.s64" => compare!(|a, b| a as i64 >= b as i64),
        "lt.f32" => compare!(|a, b| f32_of(a) < f32_of(b)),
        "le.f32" => compare!(|a, b| f32_of(a) <= f32_of(b)),
        "gt.f32" => compare!(|a, b| f32_of(a) > f32_of(b)),
        "ge.f32" => compare!(|a, b| f32_of(a) >= f32_of(b)),
        "eq.f32" => compare!(|a, b| f32_of(a) == f32_of(b)),
        "lt.f64" => compare!(|a, b| f64_of(a) < f64_of(b)),
        "le.f64" => compare!(|a, b| f64_of(a) <= f64_of(b)),
        "gt.f64" => compare!(|a, b| f64_of(a) > f64_of(b)),
        "ge.f64" => compare!(|a, b| f64_of(a) >= f64_of(b)),
        "eq.f64" => compare!(|a, b| f64_of(a) == f64_of(b)),
        _ => return None,
    })
}
