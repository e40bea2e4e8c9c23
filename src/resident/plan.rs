//! How a matrix will be stored: decided before a word is written. Must hold no cost model and no words.

use super::header::{Header, VERSION};
use crate::codec::{Encoding, GapKind, Grid, exponent};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};

/// How a matrix will be stored. Made by [`super::estimate`]; every plan gives the same words back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How the words are stored.
    pub encoding: Encoding,
    /// The matrix's shape and its tiles.
    pub grid: Grid,
    /// Of `sparse`: what a gap is. `U8` otherwise.
    pub gap: GapKind,
    /// Of `exponent`: bits by class of the base word. Zeros otherwise.
    pub widths: [u8; exponent::CLASSES],
}

impl Plan {
    pub(crate) fn unchanged(shape: Shape) -> Self {
        Self {
            encoding: Encoding::Unchanged,
            grid: Grid::for_sparse(shape),
            gap: GapKind::U8,
            widths: [0; 32],
        }
    }

    /// A plan for a matrix where no change is expected: if there is one, it becomes an exception.
    pub(crate) fn quiet(shape: Shape) -> Self {
        Self { encoding: Encoding::Exponent, grid: Grid::for_exponent(shape), ..Self::unchanged(shape) }
    }

    /// The plan of an existing delta, for a matrix of another shape.
    pub(crate) fn of(h: &Header, shape: Shape) -> Self {
        Self { encoding: h.encoding, grid: Grid { shape, ..h.grid() }, gap: h.gap, widths: h.widths }
    }

    /// Whether tiles of a delta can be copied into one that is written as planned. What layout 0 stores apart
    /// of `exponent` is not what layout 1 does.
    pub(crate) fn same_tiles(&self, h: &Header) -> bool {
        let same_layout = h.version == VERSION || h.encoding != Encoding::Exponent;
        same_layout && *self == Self::of(h, self.grid.shape)
    }

    /// Whether its tiles are listed in a directory.
    pub(crate) fn tiled(&self) -> bool {
        matches!(self.encoding, Encoding::Sparse | Encoding::Exponent)
    }

    /// The header of a delta stored so, without changes yet.
    pub(crate) fn header(&self, dtype: Dtype) -> Header {
        Header {
            version: VERSION,
            encoding: self.encoding,
            dtype,
            shape: self.grid.shape,
            tile_rows: self.grid.tile_rows,
            tile_cols: self.grid.tile_cols,
            gap: self.gap,
            changed: 0,
            exceptions: 0,
            entries: 0,
            base_digest: Digest([0; 16]),
            widths: self.widths,
            units: 0,
        }
    }

    /// Check a plan that a caller put together by the rules that a reader checks a delta by.
    pub(crate) fn check(&self, dtype: Dtype) -> Result<()> {
        let sound = self.header(dtype).check_fields();
        let powers = self.grid.tile_rows.is_power_of_two() && self.grid.tile_cols.is_power_of_two();
        if sound.is_ok() && powers {
            return Ok(());
        }
        Err(Error::invalid(format!("no delta of {dtype} can be stored as planned: {self:?}")))
    }
}
