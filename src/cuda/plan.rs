//! From dtype, shape and rows to what is launched. Pure: no device is asked, so all of it is tested without
//! one.

#![forbid(unsafe_code)]

use std::ops::Range;

use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};

/// Threads of every block, in x.
pub const THREADS: u32 = 256;
/// Most blocks of a launch in x, and in y: limits of CUDA.
pub const MOST_BLOCKS: (u32, u32) = (i32::MAX as u32, 65535);
/// Rows of W of a block of the small product.
pub const SMALL_W_ROWS: usize = 16;
/// Rows of W of a tile of the large product.
pub const LARGE_W_ROWS: usize = 64;
/// Rows of grad of a block of the gradient.
pub const GRAD_ROWS: usize = 64;
/// Bytes of a row of W that are a strip of it.
pub const GRAD_STRIP_BYTES: usize = 512;
/// How many of its blocks a multiprocessor holds at once.
const LARGE_BLOCKS: u32 = 2;
/// Alignment of its workspace.
pub const WORKSPACE_ALIGN: u64 = 16;
/// Up to so many rows of x, the small product reads the base twice at most, the second time mostly from L2.
const SMALL_ROWS: usize = 32;
/// Blocks of `xorz_delta_verify_*`, each of which leaves a verdict that all blocks of `xorz_delta_apply_*` read.
const MOST_VERDICTS: u32 = 1024;
/// Bytes of a digest's workspace before its leaves.
const DIGEST_HEAD: usize = 32;
/// Words of W that a block of restore is meant for: rows, columns.
const RESTORE_BLOCK: (usize, usize) = (16, 4096);
/// Rows of the tallest tile that a delta may have: panels of a matrix begin and end at multiples, so that none is cut.
pub const TALLEST_TILE: usize = 256;
/// Most bytes of the restored words of a panel, unless the rows of the tallest tile are more.
const PANEL_BYTES: usize = 64 << 20;
/// The smallest tile: a matrix must have fewer than 2^32 of them.
const SMALLEST_TILE: (usize, usize) = (16, 256);

/// Every kernel that is launched, by its name in the image.
pub const ENTRIES: [&str; 31] = [
    "xorz_digest_leaves",
    "xorz_digest_root",
    "xorz_delta_restore_8",
    "xorz_delta_restore_16",
    "xorz_delta_restore_32",
    "xorz_delta_restore_64",
    "xorz_delta_verify_8",
    "xorz_delta_verify_16",
    "xorz_delta_verify_32",
    "xorz_delta_verify_64",
    "xorz_delta_apply_8",
    "xorz_delta_apply_16",
    "xorz_delta_apply_32",
    "xorz_delta_apply_64",
    "xorz_delta_embedding_8",
    "xorz_delta_embedding_16",
    "xorz_delta_embedding_32",
    "xorz_delta_embedding_64",
    "xorz_linear_small_bf16_m16",
    "xorz_linear_small_f16_m16",
    "xorz_linear_small_f32_m4",
    "xorz_linear_small_f32_m16",
    "xorz_linear_segments_bf16",
    "xorz_linear_segments_f16",
    "xorz_linear_segments_f32",
    "xorz_linear_large_bf16",
    "xorz_linear_large_f16",
    "xorz_linear_large_f32",
    "xorz_linear_grad_bf16",
    "xorz_linear_grad_f16",
    "xorz_linear_grad_f32",
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

/// One launch, with [`THREADS`] threads per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub entry: Entry,
    /// Blocks in x and y.
    pub grid: (u32, u32),
}

/// The facts about a product that decide how it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductRows {
    /// Rows of x.
    pub m: usize,
    /// Slots of the tenants that they may be of; None: all are of one.
    pub slots: Option<usize>,
    /// Whether a row's bits shall not depend on the other rows.
    pub deterministic: bool,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// No output exists, so that nothing is launched.
    Nothing,
    /// One kernel, which reads the base once for each block of rows of x.
    Small(Small),
    /// Rows sorted by tenant first, then tiles of one tenant's rows.
    Large(Large),
}

/// Launches of `linear_small`, which together compute all rows of x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Small {
    entry: Entry,
    n: usize,
    m: usize,
    /// Rows of x of a block.
    block_rows: usize,
}

impl Small {
    /// Each launch, its first row of x, and how many rows it computes.
    pub fn launches(self) -> impl Iterator<Item = (Launch, usize, usize)> {
        let most = self.block_rows * MOST_BLOCKS.1 as usize;
        (0..self.m).step_by(most).map(move |first| {
            let rows = most.min(self.m - first);
            let grid = (self.n.div_ceil(SMALL_W_ROWS) as u32, rows.div_ceil(self.block_rows) as u32);
            (Launch { entry: self.entry, grid }, first, rows)
        })
    }
}

/// Launches of `linear_segments`, and of `linear_large` or `linear_grad`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Large {
    /// The first launch.
    pub segments: Launch,
    entry: Entry,
    /// Most pairs of a tile of rows of x and a part of W.
    pairs: u64,
    /// Bytes of device memory, aligned to [`WORKSPACE_ALIGN`], that the first launch writes and the second
    /// reads.
    pub workspace_bytes: usize,
}

impl Large {
    /// Of each tile of rows of x with each of `parts`.
    fn new(what: &str, dtype: Dtype, rows: ProductRows, parts: usize) -> Result<Self> {
        let (name, four_byte) = (name_of(dtype)?, dtype == Dtype::F32);
        let (m, slots) = (rows.m as u64, rows.slots.unwrap_or(1) as u64);
        let tile_rows = large_rows(four_byte) as u64;
        let tenants = m.min(slots + 2);
        let bytes = 64 + 144 * tenants + 16 * (m / tile_rows) + 4 * (slots + 2) + 4 * m;
        Ok(Self {
            segments: Launch { entry: Entry::find(&format!("xorz_linear_segments_{name}"))?, grid: (1, 1) },
            entry: Entry::find(&format!("xorz_linear_{what}_{name}"))?,
            pairs: (m / tile_rows + tenants) * parts as u64,
            workspace_bytes: bytes as usize,
        })
    }

    /// The second launch, on a device of so many multiprocessors: what they hold at once, or less.
    pub fn tiles(&self, multiprocessors: u32) -> Launch {
        let held = u64::from(multiprocessors.saturating_mul(LARGE_BLOCKS).min(MOST_BLOCKS.0));
        Launch { entry: self.entry, grid: (self.pairs.min(held).max(1) as u32, 1) }
    }
}

/// Rows of x of a tile of `linear_large`, for words of four bytes (`four_byte`) and of two.
pub const fn large_rows(four_byte: bool) -> usize {
    if four_byte { 64 } else { 128 }
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

fn check_rows(m: usize, slots: usize, what: &str) -> Result<()> {
    if m <= i32::MAX as usize && slots <= i32::MAX as usize {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "{m} {what} of {slots} slots are too many for the CUDA kernels, which take 2^31 - 1 of each"
    )))
}

/// A launch on tiles of a matrix of `dtype`, of `most` blocks at most.
fn on_tiles(verb: &str, dtype: Dtype, shape: Shape, most: u32) -> Result<Launch> {
    check_shape(shape)?;
    let entry = Entry::find(&format!("xorz_delta_{verb}_{}", 8 * dtype.word_bytes()))?;
    let blocks = shape.n.div_ceil(RESTORE_BLOCK.0) * shape.k.div_ceil(RESTORE_BLOCK.1);
    Ok(Launch { entry, grid: (blocks.clamp(1, most as usize) as u32, 1) })
}

/// The launch of `delta_restore` of `rows` of a matrix of `dtype`.
///
/// # Errors
/// `Unsupported` for a matrix that is too large; `InvalidArgument` for rows that it does not have, or that would cut a tile.
pub fn restore(dtype: Dtype, shape: Shape, rows: &Range<usize>) -> Result<Launch> {
    check_shape(shape)?;
    let whole = |row: usize| row.is_multiple_of(TALLEST_TILE) || row == shape.n;
    if rows.start > rows.end || rows.end > shape.n || !whole(rows.start) || !whole(rows.end) {
        return Err(Error::invalid(format!(
            "rows {} to {} are no panel of a matrix of {} rows: panels begin and end at multiples of {TALLEST_TILE}",
            rows.start, rows.end, shape.n
        )));
    }
    on_tiles("restore", dtype, Shape { n: rows.len(), ..shape }, MOST_BLOCKS.0)
}

/// Rows of W of each panel that is restored, and multiplied by torch, for `rows.m` rows of x; None where the kernels multiply.
///
/// More rows of one tenant than the small product is for would have their delta decoded once for each
/// [`large_rows`] of them by `linear_large`, whose tiles are small beside those of cuBLAS; a restored panel is decoded once,
/// and mostly still in the L2 cache when it is multiplied. What both cost is predicted in `cuda/PREDICTED.md`. As on processors
/// with matrix units (`crate::cpu`), the product is then torch's own; f32 stays here, where no setting makes it TF32.
pub fn panel_rows(dtype: Dtype, rows: ProductRows, shape: Shape) -> Option<usize> {
    let computes = matches!(dtype, Dtype::BF16 | Dtype::F16) && shape.n > 0 && shape.k > 0;
    if !computes || rows.slots.is_some() || rows.deterministic || rows.m <= SMALL_ROWS {
        return None;
    }
    let fit = PANEL_BYTES / (shape.k * dtype.word_bytes()) / TALLEST_TILE * TALLEST_TILE;
    let panels = shape.n.div_ceil(fit.max(TALLEST_TILE));
    Some(shape.n.div_ceil(panels).next_multiple_of(TALLEST_TILE))
}

/// The two launches that compute a matrix's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digesting {
    /// Hashes 64 rows a block.
    pub leaves: Launch,
    /// Hashes what those have left, and compares the result with a delta's, if one is given.
    pub root: Launch,
    /// Bytes of device memory, aligned to [`WORKSPACE_ALIGN`], between the two.
    pub workspace_bytes: usize,
}

/// The launches that compute the digest of a matrix of any dtype.
///
/// # Errors
/// `Unsupported` for a matrix that is too large.
pub fn digest(shape: Shape) -> Result<Digesting> {
    check_shape(shape)?;
    let leaves = shape.n.div_ceil(Digest::LEAF_ROWS);
    Ok(Digesting {
        leaves: Launch { entry: Entry::find("xorz_digest_leaves")?, grid: (leaves.max(1) as u32, 1) },
        root: Launch { entry: Entry::find("xorz_digest_root")?, grid: (1, 1) },
        workspace_bytes: DIGEST_HEAD + size_of::<Digest>() * leaves,
    })
}

/// The four launches of `delta_apply_`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Application {
    /// Leave a verdict of 4 bytes: whether the words are the delta's base.
    pub digest: Digesting,
    /// Looks at every tile, and changes nothing; each block leaves a verdict of 4 bytes.
    pub verify: Launch,
    /// Changes the words if all verdicts are well.
    pub apply: Launch,
}

impl Application {
    /// Verdicts that `apply` reads: one of each block of `verify`, and that of the digest, which is the last.
    pub fn verdicts(&self) -> usize {
        self.verify.grid.0 as usize + 1
    }

    /// Bytes of device memory, aligned to [`WORKSPACE_ALIGN`], between the launches: what the digest takes, then the verdicts.
    pub fn workspace_bytes(&self) -> usize {
        self.digest.workspace_bytes + 4 * self.verdicts()
    }
}

/// The launches of `delta_apply_` of a matrix of `dtype`.
///
/// # Errors
/// `Unsupported` for a matrix that is too large.
pub fn apply(dtype: Dtype, shape: Shape) -> Result<Application> {
    Ok(Application {
        digest: digest(shape)?,
        verify: on_tiles("verify", dtype, shape, MOST_VERDICTS)?,
        apply: on_tiles("apply", dtype, shape, MOST_BLOCKS.0)?,
    })
}

/// The launch of `delta_embedding` of `m` rows of a table of `dtype`, one block per 4096 columns; None where
/// nothing comes out.
///
/// # Errors
/// `Unsupported` for a table that is too large, or too many rows or slots.
pub fn embedding(dtype: Dtype, m: usize, slots: usize, table: Shape) -> Result<Option<Launch>> {
    check_shape(table)?;
    check_rows(m, slots, "indices")?;
    if m == 0 || table.k == 0 {
        return Ok(None);
    }
    let entry = Entry::find(&format!("xorz_delta_embedding_{}", 8 * dtype.word_bytes()))?;
    let strips = table.k.div_ceil(RESTORE_BLOCK.1).min(MOST_BLOCKS.1 as usize);
    Ok(Some(Launch { entry, grid: (m as u32, strips as u32) }))
}

/// Whether tiles of one tenant's rows are the better way. They read the base once a tile: at worst each
/// tenant has one that it does not fill. A bound on what either way reads decides; no GPU has been asked.
fn takes_tiles(rows: ProductRows, four_byte: bool) -> bool {
    if rows.m <= SMALL_ROWS {
        return false;
    }
    let tenants = rows.slots.map_or(1, |s| rows.m.min(s + 1));
    let (tiled, small) = (rows.m / large_rows(four_byte) + tenants, rows.m.div_ceil(16));
    tiled <= 2 * small
}

/// The dtype as entries name it.
fn name_of(dtype: Dtype) -> Result<&'static str> {
    match dtype {
        Dtype::BF16 => Ok("bf16"),
        Dtype::F16 => Ok("f16"),
        Dtype::F32 => Ok("f32"),
        other => Err(Error::unsupported(format!("{other} does not compute: F32, BF16 and F16 do"))),
    }
}

/// How the gradient for the input of a product with a matrix of `dtype` is computed, `rows.m` rows of it; None where nothing
/// comes out.
///
/// # Errors
/// As [`linear`].
pub fn grad_input(dtype: Dtype, rows: ProductRows, shape: Shape) -> Result<Option<Large>> {
    check_shape(shape)?;
    check_rows(rows.m, rows.slots.unwrap_or(0), "rows of grad")?;
    name_of(dtype)?;
    if rows.m == 0 || shape.k == 0 {
        return Ok(None);
    }
    let strips = shape.k.div_ceil(GRAD_STRIP_BYTES / dtype.word_bytes());
    let parts = strips * (large_rows(dtype == Dtype::F32) / GRAD_ROWS);
    Large::new("grad", dtype, rows, parts).map(Some)
}

/// How a product with a matrix of `dtype` is computed.
///
/// # Errors
/// `Unsupported` for a dtype that does not compute, or too many rows, slots or words.
pub fn linear(dtype: Dtype, rows: ProductRows, shape: Shape) -> Result<Product> {
    check_shape(shape)?;
    let m = rows.m;
    check_rows(m, rows.slots.unwrap_or(0), "rows of x")?;
    let (name, four_byte) = (name_of(dtype)?, dtype == Dtype::F32);
    if m == 0 || shape.n == 0 {
        return Ok(Product::Nothing);
    }
    // The small product's sums depend on who shares a block.
    if rows.deterministic || takes_tiles(rows, four_byte) {
        return Ok(Product::Large(Large::new("large", dtype, rows, shape.n.div_ceil(LARGE_W_ROWS))?));
    }
    // Tensor cores multiply sixteen rows by fewer instructions than FMAs one; f32 has none.
    let block_rows = if four_byte && m <= 4 { 4 } else { 16 };
    let entry = Entry::find(&format!("xorz_linear_small_{name}_m{block_rows}"))?;
    Ok(Product::Small(Small { entry, n: shape.n, m, block_rows }))
}
