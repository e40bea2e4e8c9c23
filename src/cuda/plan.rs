//! From dtype, shape and rows to what is launched. Pure: no device is asked, so all of it is tested without one.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};

/// Threads of every block, in x.
pub const THREADS: u32 = 256;
/// Most blocks of a launch in x, and in y: limits of CUDA.
pub const MOST_BLOCKS: (u32, u32) = (i32::MAX as u32, 65535);
/// Rows of W of a block of the small product.
pub const PANEL: usize = 16;
/// Words of W that a block of restore is meant for: rows, columns.
const RESTORE_BLOCK: (usize, usize) = (16, 4096);
/// The smallest tile: a matrix must have fewer than 2^32 of them.
const SMALLEST_TILE: (usize, usize) = (16, 256);

/// Every kernel that is launched, by its name in the image.
pub const ENTRIES: [&str; 14] = [
    "xorz_delta_restore_8",
    "xorz_delta_restore_16",
    "xorz_delta_restore_32",
    "xorz_delta_restore_64",
    "xorz_delta_apply_8",
    "xorz_delta_apply_16",
    "xorz_delta_apply_32",
    "xorz_delta_apply_64",
    "xorz_linear_small_bf16_m4",
    "xorz_linear_small_bf16_m16",
    "xorz_linear_small_f16_m4",
    "xorz_linear_small_f16_m16",
    "xorz_linear_small_f32_m4",
    "xorz_linear_small_f32_m16",
];

/// One of [`ENTRIES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(usize);

impl Entry {
    fn find(name: &str) -> Result<Self> {
        let at = ENTRIES.iter().position(|e| *e == name);
        at.map(Self).ok_or_else(|| Error::internal(format!("no kernel is called {name}")))
    }

    /// Where in [`ENTRIES`].
    pub fn index(self) -> usize {
        self.0
    }

    /// The kernel's name.
    pub fn name(self) -> &'static str {
        ENTRIES[self.0]
    }
}

/// One launch of [`THREADS`] threads a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub entry: Entry,
    /// Blocks in x and y.
    pub grid: (u32, u32),
}

/// Launches of a product: all rows of x, so many at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    entry: Entry,
    n: usize,
    m: usize,
    /// Rows of x of a block.
    block_rows: usize,
}

impl Product {
    /// The kernel.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// Rows of x of a block.
    pub fn block_rows(&self) -> usize {
        self.block_rows
    }

    /// Each launch, its first row of x, and how many rows it computes. None where there is nothing to compute.
    pub fn launches(self) -> impl Iterator<Item = (Launch, usize, usize)> {
        let most = self.block_rows * MOST_BLOCKS.1 as usize;
        let m = if self.n == 0 { 0 } else { self.m };
        (0..m).step_by(most).map(move |first| {
            let rows = most.min(m - first);
            let grid = (self.n.div_ceil(PANEL) as u32, rows.div_ceil(self.block_rows) as u32);
            (Launch { entry: self.entry, grid }, first, rows)
        })
    }
}

fn check_shape(shape: Shape) -> Result<()> {
    let Shape { n, k } = shape;
    let most = i32::MAX as usize;
    let tiles = (n.div_ceil(SMALLEST_TILE.0) as u64).saturating_mul(k.div_ceil(SMALLEST_TILE.1) as u64);
    if n > most || k > most || tiles >= 1 << 32 {
        return Err(Error::unsupported(format!(
            "a matrix of {n} x {k} is too large for the CUDA kernels: rows and columns must be below 2^31 each, and tiles of \
             16 x 256 below 2^32"
        )));
    }
    Ok(())
}

/// The launch of `delta_restore`, or of `delta_apply_`, of a matrix of `dtype`.
///
/// # Errors
/// `Unsupported` for a matrix that is too large.
pub fn restore(apply: bool, dtype: Dtype, shape: Shape) -> Result<Launch> {
    check_shape(shape)?;
    let verb = if apply { "apply" } else { "restore" };
    let entry = Entry::find(&format!("xorz_delta_{verb}_{}", 8 * dtype.word_bytes()))?;
    let blocks = shape.n.div_ceil(RESTORE_BLOCK.0) * shape.k.div_ceil(RESTORE_BLOCK.1);
    Ok(Launch { entry, grid: (blocks.clamp(1, MOST_BLOCKS.0 as usize) as u32, 1) })
}

/// The launches of a product of `m` rows of x with a matrix of `dtype`.
///
/// # Errors
/// `Unsupported` for a dtype that does not compute, or too many rows or words.
pub fn linear(dtype: Dtype, m: usize, shape: Shape) -> Result<Product> {
    check_shape(shape)?;
    if m > i32::MAX as usize {
        return Err(Error::unsupported(format!(
            "{m} rows of x are too many for the CUDA kernels, which take 2^31 - 1"
        )));
    }
    let name = match dtype {
        Dtype::BF16 => "bf16",
        Dtype::F16 => "f16",
        Dtype::F32 => "f32",
        other => return Err(Error::unsupported(format!("{other} does not compute: F32, BF16 and F16 do"))),
    };
    let block_rows = if m <= 4 { 4 } else { 16 };
    let entry = Entry::find(&format!("xorz_linear_small_{name}_m{block_rows}"))?;
    Ok(Product { entry, n: shape.n, m, block_rows })
}
