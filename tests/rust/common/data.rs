//! Data that the promises are tested on: seeded, so that a failure comes back.

use half::{bf16, f16};
use xorz::matrix::{Dtype, Matrix, Shape};

/// SplitMix64 (Steele et al., OOPSLA 2014).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[allow(clippy::should_implement_trait, reason = "no test iterates over it")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In 0 .. 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, deviation 1, near enough (Irwin-Hall of 12).
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }

    /// `words` words as weights are: normal, deviation 0.02, in the dtypes that hold such; random bits in
    /// others.
    pub fn weights(&mut self, dtype: Dtype, words: usize) -> Vec<u8> {
        match dtype {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 => {
                (0..words).flat_map(|_| word(dtype, 0.02 * self.normal())).collect()
            }
            _ => self.bytes(words * dtype.word_bytes()),
        }
    }

    /// Words of `b` with probability `share`, else of `a`.
    pub fn mix(&mut self, dtype: Dtype, a: &[u8], b: &[u8], share: f64) -> Vec<u8> {
        let w = dtype.word_bytes();
        a.chunks(w)
            .zip(b.chunks(w))
            .flat_map(|(x, y)| if self.unit() < share { y } else { x }.to_vec())
            .collect()
    }
}

/// The bytes of a value.
pub fn word(dtype: Dtype, v: f64) -> Vec<u8> {
    match dtype {
        Dtype::F32 => (v as f32).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
        _ => v.to_le_bytes().to_vec(),
    }
}

/// The value of a word of a floating dtype.
pub fn value(dtype: Dtype, b: &[u8]) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
        Dtype::BF16 => bf16::from_le_bytes(b.try_into().unwrap()).to_f64(),
        Dtype::F16 => f16::from_le_bytes(b.try_into().unwrap()).to_f64(),
        _ => f64::from_le_bytes(b.try_into().unwrap()),
    }
}

/// The notebook's fine-tune: a share of the words at random positions, 1e-2 * normal added.
pub fn perturbed(rng: &mut Rng, dtype: Dtype, base: &[u8], share: f64) -> Vec<u8> {
    let w = dtype.word_bytes();
    let floating = matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64);
    let mut out = base.to_vec();
    for o in out.chunks_mut(w) {
        if rng.unit() < share {
            let new =
                if floating { word(dtype, value(dtype, o) + 0.01 * rng.normal()) } else { rng.bytes(w) };
            o.copy_from_slice(&new);
        }
    }
    out
}

/// AdamW's fine-tune: every word moves by about `lr`, and most bf16 words round back.
pub fn stepped(rng: &mut Rng, dtype: Dtype, base: &[u8], lr: f64) -> Vec<u8> {
    base.chunks(dtype.word_bytes()).flat_map(|o| word(dtype, value(dtype, o) + lr * rng.normal())).collect()
}

/// Words that arithmetic mishandles, among ordinary ones.
pub fn adversarial(rng: &mut Rng, dtype: Dtype, words: usize) -> Vec<u8> {
    let w = dtype.word_bytes();
    let sign = 1u64 << (8 * w - 1);
    let (inf, quiet) = match dtype {
        Dtype::F32 => (0x7F80_0000u64, 0x0040_0000u64),
        Dtype::BF16 => (0x7F80, 0x40),
        Dtype::F16 => (0x7C00, 0x200),
        _ => (0x7FF0_0000_0000_0000, 1 << 51),
    };
    let special = [
        0,
        sign,
        inf,
        inf | sign,
        inf | 1,
        inf | quiet,
        inf | quiet | 5,
        inf - 1,
        (inf - 1) | sign,
        1,
        2,
        sign | 1,
        quiet,
    ];
    let one = word(dtype, 1.0);
    (0..words)
        .flat_map(|_| match rng.next() % 4 {
            0 => special[(rng.next() % special.len() as u64) as usize].to_le_bytes()[..w].to_vec(),
            1 => one.clone(),
            2 => rng.bytes(w),
            _ => word(dtype, 0.02 * rng.normal()),
        })
        .collect()
}

pub fn matrix(dtype: Dtype, shape: Shape, bytes: &[u8]) -> Matrix<'_> {
    Matrix::new(dtype, shape, bytes).unwrap()
}

/// The bytes at an odd address, after one to be skipped.
pub fn unaligned(bytes: &[u8]) -> Vec<u8> {
    let mut v = Vec::with_capacity(bytes.len() + 1);
    v.push(0);
    v.extend_from_slice(bytes);
    v
}
