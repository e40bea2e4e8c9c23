//! As what words deltas see a tensor: those of its dtype where this crate knows it, else by their size. A dtype that
//! safetensors adds tomorrow is words of that many bytes, or bytes where an element takes no whole number of them.

use crate::matrix::{Dtype, Shape};

/// Bits of one element of a safetensors dtype, `None` for a dtype that is not known here.
pub(crate) fn dtype_bits(name: &str) -> Option<u64> {
    Some(match name {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "C64" => 64,
        other => Dtype::from_name(other)?.word_bytes() as u64 * 8,
    })
}

/// Words and matrix of a tensor of `bytes` bytes, whose header has been checked. `None` if its size overflows.
///
/// | dtype | words | matrix |
/// |---|---|---|
/// | one of [`Dtype`] | its own | first dimension by the others |
/// | `C64`, `C128` | `F32`, `F64` | the same, two words an element |
/// | other, of 1, 2, 4 or 8 bytes an element | `U8`, `U16`, `U32`, `U64` | the same |
/// | other | `U8` | first dimension by the bytes of each, or one row if they are not alike |
pub(crate) fn words_of(dtype: &str, dims: &[usize], bytes: u64) -> Option<(Dtype, Shape)> {
    let shape = Shape::of_dims(dims).ok()?;
    if let Some(known) = Dtype::from_name(dtype) {
        return Some((known, shape));
    }
    let bytes = usize::try_from(bytes).ok()?;
    let elements = shape.words().ok()?;
    let twice = |d: Dtype| Some((d, Shape { k: shape.k.checked_mul(2)?, ..shape }));
    match (dtype, bytes.checked_div(elements).filter(|each| each * elements == bytes)) {
        ("C64", Some(8)) => twice(Dtype::F32),
        ("C128", Some(16)) => twice(Dtype::F64),
        (_, Some(1)) => Some((Dtype::U8, shape)),
        (_, Some(2)) => Some((Dtype::U16, shape)),
        (_, Some(4)) => Some((Dtype::U32, shape)),
        (_, Some(8)) => Some((Dtype::U64, shape)),
        _ => {
            let rows = if shape.n > 0 && bytes.is_multiple_of(shape.n) { shape.n } else { 1 };
            Some((Dtype::U8, Shape { n: rows, k: bytes / rows }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_every_byte_of_a_tensor_whatever_its_dtype() {
        let cases: [(&str, &[usize], u64, Dtype, Shape); 12] = [
            ("BF16", &[3, 4], 24, Dtype::BF16, Shape { n: 3, k: 4 }),
            ("F4", &[4, 6], 12, Dtype::U8, Shape { n: 4, k: 3 }),
            ("F4", &[2, 5], 5, Dtype::U8, Shape { n: 1, k: 5 }),
            ("F6_E2M3", &[2, 4, 2], 12, Dtype::U8, Shape { n: 2, k: 6 }),
            ("F8_E8M0", &[2, 5], 10, Dtype::U8, Shape { n: 2, k: 5 }),
            ("F8_E4M3FNUZ", &[7], 7, Dtype::U8, Shape { n: 1, k: 7 }),
            ("C64", &[2, 5], 80, Dtype::F32, Shape { n: 2, k: 10 }),
            ("C128", &[], 16, Dtype::F64, Shape { n: 1, k: 2 }),
            ("BF24", &[2, 5], 30, Dtype::U8, Shape { n: 2, k: 15 }),
            ("NEW", &[2, 5], 40, Dtype::U32, Shape { n: 2, k: 5 }),
            ("NEW", &[2, 0], 0, Dtype::U8, Shape { n: 2, k: 0 }),
            ("NEW", &[0, 5], 3, Dtype::U8, Shape { n: 1, k: 3 }),
        ];
        for (name, dims, bytes, dtype, shape) in cases {
            assert_eq!(words_of(name, dims, bytes), Some((dtype, shape)), "{name} {dims:?}");
            assert_eq!(shape.bytes(dtype).unwrap() as u64, bytes, "{name} {dims:?}");
        }
        assert_eq!(words_of("NEW", &[usize::MAX, 2], 8), None);
    }
}
