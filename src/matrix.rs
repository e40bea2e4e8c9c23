//! Dtypes, shapes and borrowed matrices; every size is computed with checked arithmetic here and nowhere else.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Element types, by the names that safetensors gives them. The number is the code in file and memory formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Dtype {
    F32 = 1,
    BF16 = 2,
    F16 = 3,
    F64 = 4,
    U8 = 5,
    I8 = 6,
    BOOL = 7,
    F8E4M3 = 8,
    F8E5M2 = 9,
    U16 = 10,
    I16 = 11,
    U32 = 12,
    I32 = 13,
    U64 = 14,
    I64 = 15,
}

impl Dtype {
    /// Every dtype, in the order of their codes.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::BF16,
        Self::F16,
        Self::F64,
        Self::U8,
        Self::I8,
        Self::BOOL,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::U64,
        Self::I64,
    ];

    /// The dtype of a format code, or `None` for an unknown one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|d| *d as u8 == code)
    }

    /// The dtype of a format code that a caller gives.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown one.
    pub fn of_code(code: u32) -> Result<Self> {
        let known = u8::try_from(code).ok().and_then(Self::from_code);
        known.ok_or_else(|| Error::invalid(format!("no dtype has the code {code}")))
    }

    /// The dtype of a safetensors name such as `BF16`, or `None` for an unknown one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }

    /// The safetensors name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::F64 => "F64",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::BOOL => "BOOL",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::U64 => "U64",
            Self::I64 => "I64",
        }
    }

    /// Bytes of one word (element): 1, 2, 4 or 8.
    pub fn word_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::BOOL | Self::F8E4M3 | Self::F8E5M2 => 1,
            Self::BF16 | Self::F16 | Self::U16 | Self::I16 => 2,
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::F64 | Self::U64 | Self::I64 => 8,
        }
    }

    /// Whether linear layers compute on it: f32, bf16, f16.
    pub fn computes(self) -> bool {
        matches!(self, Self::F32 | Self::BF16 | Self::F16)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The matrix shape of a tensor: `n` rows of `k` words. The first dimension is the rows; 1-D and 0-D tensors are one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
}

impl Shape {
    /// The most rows of a matrix without columns, and columns of one without rows. It has no bytes that would have to be
    /// there, but work goes by its rows all the same: leaves of the digest, loops over rows. So hardly any bytes could
    /// ask for years of it.
    pub const MAX_EMPTY: usize = 1 << 24;

    /// Refuse a shape without words that says to have very many rows or columns.
    fn check_empty(self) -> Result<Self> {
        if self.n > 0 && self.k > 0 || self.n.max(self.k) <= Self::MAX_EMPTY {
            return Ok(self);
        }
        Err(Error::invalid(format!(
            "shape {self} has no words, but {} rows or columns, more than the {} of an empty matrix",
            self.n.max(self.k),
            Self::MAX_EMPTY
        )))
    }

    /// The matrix shape of a tensor's dimensions.
    ///
    /// # Errors
    /// `InvalidArgument` if the number of elements overflows, or there are none and more than [`Shape::MAX_EMPTY`] rows.
    pub fn of_dims(dims: &[usize]) -> Result<Self> {
        let product = |d: &[usize]| {
            d.iter()
                .try_fold(1usize, |a, &b| a.checked_mul(b))
                .ok_or_else(|| Error::invalid(format!("shape {dims:?} has too many elements")))
        };
        match dims {
            [] => Ok(Self { n: 1, k: 1 }),
            [k] => Ok(Self { n: 1, k: *k }),
            [n, rest @ ..] => {
                product(dims)?;
                Self { n: *n, k: product(rest)? }.check_empty()
            }
        }
    }

    /// Number of words.
    ///
    /// # Errors
    /// `InvalidArgument` on overflow.
    pub fn words(self) -> Result<usize> {
        self.n
            .checked_mul(self.k)
            .ok_or_else(|| Error::invalid(format!("shape {self} has too many elements")))
    }

    /// Number of bytes at `dtype`, at most `isize::MAX`.
    ///
    /// # Errors
    /// `InvalidArgument` on overflow, and for a matrix without words of more than [`Shape::MAX_EMPTY`] rows or columns.
    pub fn bytes(self, dtype: Dtype) -> Result<usize> {
        self.check_empty()?
            .words()?
            .checked_mul(dtype.word_bytes())
            .filter(|&b| isize::try_from(b).is_ok())
            .ok_or_else(|| Error::invalid(format!("shape {self} of {dtype} has too many bytes")))
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}]", self.n, self.k)
    }
}

/// A borrowed contiguous row-major matrix of little-endian words.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    dtype: Dtype,
    shape: Shape,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// A matrix over `bytes`, which hold exactly `shape` at `dtype`. No alignment is asked.
    ///
    /// # Errors
    /// `Mismatch` if the length is another.
    pub fn new(dtype: Dtype, shape: Shape, bytes: &'a [u8]) -> Result<Self> {
        let want = shape.bytes(dtype)?;
        if bytes.len() != want {
            return Err(Error::mismatch(format!(
                "a {shape} matrix of {dtype} takes {want} bytes, but {} were given",
                bytes.len()
            )));
        }
        Ok(Self { dtype, shape, bytes })
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows and columns.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The words' bytes, row after row.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.shape.k * self.dtype.word_bytes()
    }

    /// The bytes of `words` words from column `c` of row `r`. The caller keeps within the shape.
    pub fn span(&self, r: usize, c: usize, words: usize) -> &'a [u8] {
        let w = self.dtype.word_bytes();
        let at = (r * self.shape.k + c) * w;
        &self.bytes[at..at + words * w]
    }

    /// Rows `r0..r1` as a matrix of their own. The caller keeps within the shape.
    pub fn rows(&self, r0: usize, r1: usize) -> Self {
        let row = self.row_bytes();
        let shape = Shape { n: r1 - r0, k: self.shape.k };
        Self { dtype: self.dtype, shape, bytes: &self.bytes[r0 * row..r1 * row] }
    }

    /// The matrix's digest; see [`Digest`].
    pub fn digest(&self) -> Digest {
        let leaves = (0..self.shape.n.div_ceil(Digest::LEAF_ROWS)).map(|i| self.digest_leaf(i));
        Digest::of_leaves(self.dtype, self.shape, leaves)
    }

    /// The digest's leaf `i`: xxh3-128 of the bytes of rows `i * LEAF_ROWS ..`.
    pub fn digest_leaf(&self, i: usize) -> [u8; 16] {
        let r0 = i * Digest::LEAF_ROWS;
        let r1 = (r0 + Digest::LEAF_ROWS).min(self.shape.n);
        xxh3_128(self.rows(r0, r1).bytes).to_le_bytes()
    }
}

/// A digest of one matrix: a tree of xxh3-128 over groups of rows, so that it can be computed in parallel and by shard.
///
/// `root = xxh3_128(code: u8, n: u64, k: u64, leaf 0, leaf 1, ...)`, little-endian. It catches mistakes, not attackers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// Rows of one leaf.
    pub const LEAF_ROWS: usize = 64;

    /// The root over leaves computed by [`Matrix::digest_leaf`], in order.
    pub fn of_leaves(dtype: Dtype, shape: Shape, leaves: impl Iterator<Item = [u8; 16]>) -> Self {
        let mut h = Xxh3::new();
        h.update(&[dtype as u8]);
        h.update(&(shape.n as u64).to_le_bytes());
        h.update(&(shape.k as u64).to_le_bytes());
        leaves.for_each(|l| h.update(&l));
        Self(h.digest128().to_le_bytes())
    }

    /// The root over a matrix whose bytes come one after the other.
    pub fn stream(dtype: Dtype, shape: Shape) -> DigestStream {
        let leaf_bytes = Self::LEAF_ROWS.saturating_mul(shape.k).saturating_mul(dtype.word_bytes());
        DigestStream { dtype, shape, leaf: Xxh3::new(), filled: 0, leaf_bytes, leaves: Vec::new() }
    }

    /// Parse 32 hexadecimal digits.
    pub fn from_hex(s: &str) -> Option<Self> {
        let b = s.as_bytes();
        if b.len() != 32 {
            return None;
        }
        let mut out = [0u8; 16];
        for (o, pair) in out.iter_mut().zip(b.chunks_exact(2)) {
            let hi = (pair[0] as char).to_digit(16)?;
            let lo = (pair[1] as char).to_digit(16)?;
            *o = u8::try_from(hi * 16 + lo).ok()?;
        }
        Some(Self(out))
    }
}

/// A [`Digest`] in the making; see [`Digest::stream`].
#[derive(Clone)]
pub struct DigestStream {
    dtype: Dtype,
    shape: Shape,
    leaf: Xxh3,
    filled: usize,
    leaf_bytes: usize,
    leaves: Vec<[u8; 16]>,
}

impl DigestStream {
    /// The matrix's next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.leaf_bytes - self.filled));
            self.leaf.update(now);
            self.filled += now.len();
            if self.filled == self.leaf_bytes {
                self.close();
            }
            bytes = later;
        }
    }

    /// The matrix's next leaves, from [`Matrix::digest_leaf`] of a part that begins at a leaf.
    pub fn leaves(&mut self, leaves: &[[u8; 16]]) {
        self.leaves.extend_from_slice(leaves);
    }

    fn close(&mut self) {
        self.leaves.push(self.leaf.digest128().to_le_bytes());
        self.leaf.reset();
        self.filled = 0;
    }

    /// The root, when all bytes have come.
    pub fn finish(mut self) -> Digest {
        while self.leaves.len() < self.shape.n.div_ceil(Digest::LEAF_ROWS) {
            self.close();
        }
        Digest::of_leaves(self.dtype, self.shape, self.leaves.into_iter())
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_streamed_in_any_pieces_is_the_matrix_s_digest() {
        for (n, k) in [(1, 1), (1, 1000), (64, 3), (65, 3), (200, 7), (130, 0), (0, 5)] {
            let shape = Shape { n, k };
            let bytes: Vec<u8> = (0..n * k * 2).map(|i| (i * 7 % 251) as u8).collect();
            let matrix = Matrix::new(Dtype::BF16, shape, &bytes).unwrap();
            for step in [1, 13, 384, 5000] {
                let mut stream = Digest::stream(Dtype::BF16, shape);
                bytes.chunks(step).for_each(|c| stream.update(c));
                assert_eq!(stream.finish(), matrix.digest(), "{shape} by {step}");
            }
            let mut stream = Digest::stream(Dtype::BF16, shape);
            (0..n.div_ceil(64)).for_each(|i| stream.leaves(&[matrix.digest_leaf(i)]));
            assert_eq!(stream.finish(), matrix.digest());
        }
    }
}
