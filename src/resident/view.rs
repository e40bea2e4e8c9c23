//! A borrowed resident delta: sizes checked when it is made, every tile handed out within bounds whatever the
//! bytes.

use super::header::{CONTENT_AT, Header, Layout, Listing, content_digest};
use crate::codec::word::{Word, with_word};
use crate::codec::{
    Encoding, Entries, Exceptions, ExponentTile, Grid, RawTile, SparseTile, Tile, decode_tile, exponent,
};
use crate::error::{Error, Hint, Result};
use crate::matrix::{Digest, Dtype, Matrix, Shape};
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_128;

/// A view of one resident delta. Made in constant time by [`Resident::parse`]; memory-safe on any bytes.
#[derive(Clone, Debug)]
pub struct Resident<'a> {
    bytes: &'a [u8],
    header: Header,
    layout: Layout,
}

impl<'a> Resident<'a> {
    /// A view of `bytes`, one whole resident delta at any alignment. Checks the header and the sizes it
    /// announces.
    ///
    /// # Errors
    /// `Truncated`, `Corrupt`, or `Unsupported` for another layout version.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let (header, layout) = Header::read(bytes)?;
        Ok(Self { bytes, header, layout })
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its tiles.
    pub fn grid(&self) -> Grid {
        self.header.grid()
    }

    /// The header's and the sections' bytes, in order and without gaps, padding included with what precedes
    /// it.
    pub fn sections(&self) -> Vec<Range<usize>> {
        let l = &self.layout;
        let mut starts = vec![0];
        starts.extend(l.sections().map(|section| section.start));
        starts.push(l.total);
        starts.windows(2).map(|w| w[0]..w[1]).filter(|r| !r.is_empty()).collect()
    }

    /// Tile `index < grid().tiles()`.
    ///
    /// # Errors
    /// `Corrupt` where the directory contradicts itself, `InvalidArgument` for an index out of range.
    pub fn tile(&self, index: usize) -> Result<Tile<'a>> {
        let grid = self.grid();
        if index >= grid.tiles() {
            return Err(Error::invalid(format!("tile {index} of {}", grid.tiles())));
        }
        match self.header.encoding {
            Encoding::Unchanged => Ok(Tile::Unchanged),
            Encoding::Raw => Ok(Tile::Raw(self.raw_tile(index))),
            Encoding::Sparse => {
                let unit = self.header.unit_bytes();
                let payload = self.units(index)?;
                let records = payload.len() / unit;
                let (gaps, differences) =
                    payload.split_at(records * Grid::TILE_ROWS * self.header.gap.bytes());
                Ok(Tile::Sparse(SparseTile {
                    records,
                    gap: self.header.gap,
                    gaps,
                    differences,
                    additive: self.header.dtype.computes(),
                    exceptions: self.exceptions(index)?,
                }))
            }
            Encoding::Exponent => {
                let l = &self.layout.entries;
                let (positions, differences) = self.listed(l, index, self.header.entries, "entries")?;
                Ok(Tile::Exponent(ExponentTile {
                    widths: self.widths(),
                    stream: self.units(index)?,
                    entries: Entries { positions, differences },
                    exceptions: self.exceptions(index)?,
                    additive: self.header.version > 0 && self.header.dtype.computes(),
                }))
            }
        }
    }

    fn widths(&self) -> &'a [u8; exponent::CLASSES] {
        // 32 bytes of the header, whose values were checked by `parse`.
        self.bytes[128..].first_chunk().unwrap_or(&[0; exponent::CLASSES])
    }

    fn raw_tile(&self, index: usize) -> RawTile<'a> {
        let (rect, shape, w) = (self.grid().rect(index), self.header.shape, self.header.dtype.word_bytes());
        let payload = &self.bytes[self.layout.payload.clone()];
        let start = (rect.r0 * shape.k + rect.c0) * w;
        RawTile { bytes: &payload[start..], stride: shape.k * w, row_bytes: rect.cols() * w }
    }

    /// Entries `index` and `index + 1` of a directory, checked against the section they point into.
    fn span(&self, directory: &Range<usize>, index: usize, limit: u64, what: &str) -> Result<Range<usize>> {
        let at = directory.start + 4 * index;
        let (a, b) = (u32::load(&self.bytes[at..at + 4]), u32::load(&self.bytes[at + 4..at + 8]));
        if a > b || u64::from(b) > limit {
            return Err(Error::corrupt(format!(
                "resident delta: tile {index} claims {what} {a}..{b} of {limit}"
            )));
        }
        Ok(a as usize..b as usize)
    }

    fn units(&self, index: usize) -> Result<&'a [u8]> {
        let units = self.span(&self.layout.directory, index, self.header.units, "units")?;
        let size = self.header.unit_bytes();
        let start = self.layout.payload.start;
        Ok(&self.bytes[start + units.start * size..start + units.end * size])
    }

    fn exceptions(&self, index: usize) -> Result<Exceptions<'a>> {
        let l = &self.layout.exceptions;
        let (positions, words) = self.listed(l, index, self.header.exceptions, "exceptions")?;
        Ok(Exceptions { positions, words })
    }

    /// Positions and words that a tile stores apart, of `count` of them in all.
    fn listed(&self, l: &Listing, index: usize, count: u64, what: &str) -> Result<(&'a [u8], &'a [u8])> {
        if count == 0 {
            return Ok((&[], &[]));
        }
        let span = self.span(&l.directory, index, count, what)?;
        let w = self.header.dtype.word_bytes();
        let (p, q) = (l.positions.start, l.words.start);
        let positions = &self.bytes[p + 2 * span.start..p + 2 * span.end];
        Ok((positions, &self.bytes[q + w * span.start..q + w * span.end]))
    }

    /// Check everything that can be checked without the base, in time proportional to the bytes: the digest
    /// of the content first, then that what it says holds together (a digest is easily forged).
    ///
    /// # Errors
    /// `Corrupt`, naming both digests or the tile.
    pub fn check(&self) -> Result<()> {
        let payload = &self.layout.payload;
        let hash = xxh3_128(&self.bytes[payload.clone()]);
        let (head, tail) = (&self.bytes[..payload.start], &self.bytes[payload.end..]);
        let (kept, found) = (&self.bytes[CONTENT_AT], content_digest(head, hash, tail));
        if kept != found.0 {
            let mut digest = [0u8; 16];
            digest.copy_from_slice(kept);
            return Err(Error::corrupt(format!(
                "resident delta: its bytes have digest {found}, but its header says {}",
                Digest(digest)
            )));
        }
        self.check_directories()?;
        self.check_padding()?;
        if matches!(self.header.encoding, Encoding::Unchanged | Encoding::Raw) {
            return Ok(());
        }
        let grid = self.grid();
        for index in 0..grid.tiles() {
            let rect = grid.rect(index);
            let check = |tile: Tile<'_>| -> Result<()> {
                let size = (rect.rows(), rect.cols(), grid.tile_cols);
                match &tile {
                    Tile::Sparse(t) => {
                        with_word!(self.header.dtype, W => t.check::<W>(self.header.dtype, rect.rows(), rect.cols()))?;
                        check_positions("exception", t.exceptions.positions, 1, size)
                    }
                    Tile::Exponent(t) => {
                        check_positions("entry", t.entries.positions, 2, size)?;
                        check_positions("exception", t.exceptions.positions, 1, size)
                    }
                    Tile::Unchanged | Tile::Raw(_) => Ok(()),
                }
            };
            self.tile(index)
                .and_then(check)
                .map_err(|e| e.within(format!("resident delta, tile {index}")))?;
        }
        Ok(())
    }

    /// A directory starts at 0 and ends where its section does.
    fn check_directories(&self) -> Result<()> {
        let l = &self.layout;
        let ends = [
            (&l.directory, self.header.units),
            (&l.entries.directory, self.header.entries),
            (&l.exceptions.directory, self.header.exceptions),
        ];
        for (d, limit) in ends.into_iter().filter(|(d, _)| !d.is_empty()) {
            let (first, last) =
                (u32::load(&self.bytes[d.start..d.start + 4]), u32::load(&self.bytes[d.end - 4..d.end]));
            if first != 0 || u64::from(last) != limit {
                return Err(Error::corrupt(format!(
                    "resident delta: a directory runs from {first} to {last}, not from 0 to {limit}"
                )));
            }
        }
        Ok(())
    }

    fn check_padding(&self) -> Result<()> {
        let l = &self.layout;
        let pads = l.sections().map(|r| r.end..r.end.next_multiple_of(super::header::ALIGN).min(l.total));
        match pads.flatten().find(|&i| self.bytes[i] != 0) {
            Some(i) => Err(Error::corrupt(format!("resident delta: byte {i} is padding but not zero"))),
            None => Ok(()),
        }
    }

    /// Check that `base` has this delta's dtype and shape.
    ///
    /// # Errors
    /// `Mismatch`, naming both.
    pub fn check_base(&self, base: &Matrix<'_>) -> Result<()> {
        self.check_kind(base.dtype(), base.shape())
    }

    fn check_kind(&self, dtype: Dtype, shape: Shape) -> Result<()> {
        let h = &self.header;
        if (h.dtype, h.shape) == (dtype, shape) {
            return Ok(());
        }
        Err(Error::mismatch(format!(
            "the delta is of a {} matrix of {}, but the base is a {shape} matrix of {dtype}",
            h.shape, h.dtype,
        )))
    }

    /// Check that `base` is the very base that the delta was made against.
    ///
    /// # Errors
    /// `Mismatch`, naming both shapes or both digests.
    pub fn check_digest(&self, base: &Matrix<'_>) -> Result<()> {
        self.check_base(base)?;
        self.check_found(base.digest())
    }

    fn check_found(&self, found: Digest) -> Result<()> {
        if found == self.header.base_digest {
            return Ok(());
        }
        Err(Error::mismatch(format!(
            "the delta was made against a base of digest {}, but this base has digest {found}",
            self.header.base_digest
        ))
        .with_hint(Hint::OtherBase))
    }

    /// What is checked before a word of the base may be changed in place: the delta's bytes ([`Self::check`])
    /// and the base's digest ([`Self::check_digest`]). Cheaper than [`Self::check_full`]: nothing is decoded.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated` or `Mismatch`.
    pub fn check_match(&self, base: &Matrix<'_>) -> Result<()> {
        self.check()?;
        self.check_digest(base)
    }

    /// [`Self::check_match`] of a base that is elsewhere, of which somebody else has computed the digest.
    ///
    /// # Errors
    /// As [`Self::check_match`].
    pub fn check_known(&self, dtype: Dtype, shape: Shape, digest: Digest) -> Result<()> {
        self.check()?;
        self.check_kind(dtype, shape)?;
        self.check_found(digest)
    }

    /// Full validation against its base: [`Self::check`], [`Self::check_digest`], and a decode of every tile
    /// whose changed words are counted.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated` or `Mismatch`.
    pub fn check_full(&self, base: &Matrix<'_>) -> Result<()> {
        self.check_match(base)?;
        let grid = self.grid();
        let (mut before, mut words, mut changed) = (Vec::new(), Vec::new(), 0u64);
        for index in 0..grid.tiles() {
            read_tile(base, &grid, index, &mut before);
            words.clone_from(&before);
            self.decode(index, &mut words)?;
            let w = self.header.dtype.word_bytes();
            changed +=
                before.chunks_exact(w).zip(words.chunks_exact(w)).filter(|(a, b)| a != b).count() as u64;
        }
        if changed != self.header.changed {
            return Err(Error::corrupt(format!(
                "resident delta: it says that {} words changed, but {changed} did",
                self.header.changed
            )));
        }
        Ok(())
    }

    /// Decode tile `index`: its base words in, its fine-tuned words out (see [`decode_tile`]).
    pub(crate) fn decode(&self, index: usize, words: &mut [u8]) -> Result<()> {
        let (grid, dtype) = (self.grid(), self.header.dtype);
        let rect = grid.rect(index);
        decode_tile(&self.tile(index)?, dtype, rect.rows(), rect.cols(), grid.tile_cols, words)
            .map_err(|e| e.within(format!("tile {index}")))
    }
}

/// Positions ascend, at most `most` are equal, and all lie in a tile of so many rows, columns and nominal
/// columns.
fn check_positions(
    what: &str,
    positions: &[u8],
    most: usize,
    (rows, cols, tile_cols): (usize, usize, usize),
) -> Result<()> {
    let (mut last, mut equal) = (None, 0);
    for (i, position) in positions.as_chunks::<2>().0.iter().enumerate() {
        let position = usize::from(u16::from_le_bytes(*position));
        equal = if last == Some(position) { equal + 1 } else { 1 };
        let inside = position / tile_cols < rows && position % tile_cols < cols;
        if last > Some(position) || equal > most || !inside {
            return Err(Error::corrupt(format!(
                "{what} {i} at {position} is out of order or out of its tile"
            )));
        }
        last = Some(position);
    }
    Ok(())
}

/// The words of one tile of a matrix, row after row.
pub(crate) fn read_tile(matrix: &Matrix<'_>, grid: &Grid, index: usize, out: &mut Vec<u8>) {
    let rect = grid.rect(index);
    out.clear();
    (rect.r0..rect.r1).for_each(|r| out.extend_from_slice(matrix.span(r, rect.c0, rect.cols())));
}

/// Restore the fine-tuned matrix: `out` takes its `n * k` words, little-endian. The oracle of every faster
/// restore.
///
/// # Errors
/// `Mismatch` if base or `out` have another dtype, shape or length; `Corrupt` or `Truncated` for bad bytes.
pub fn restore(delta: &Resident<'_>, base: &Matrix<'_>, out: &mut [u8]) -> Result<()> {
    restore_rows(delta, base, 0..base.shape().n, out)
}

/// Restore rows `rows` of the fine-tuned matrix into `out`.
///
/// # Errors
/// As [`restore`]; `InvalidArgument` for rows beyond the matrix.
pub fn restore_rows(
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    delta.check_base(base)?;
    let (grid, row_bytes) = (delta.grid(), base.row_bytes());
    if rows.start > rows.end || rows.end > base.shape().n {
        return Err(Error::invalid(format!("rows {rows:?} of a matrix of {} rows", base.shape().n)));
    }
    if out.len() != rows.len() * row_bytes {
        return Err(Error::mismatch(format!(
            "out has {} bytes, but rows {rows:?} take {}",
            out.len(),
            rows.len() * row_bytes
        )));
    }
    if rows.is_empty() || row_bytes == 0 {
        return Ok(());
    }
    let across = grid.tile_cols_count();
    let w = base.dtype().word_bytes();
    let mut tile = Vec::new();
    for index in rows.start / grid.tile_rows * across..rows.end.div_ceil(grid.tile_rows) * across {
        let rect = grid.rect(index);
        read_tile(base, &grid, index, &mut tile);
        delta.decode(index, &mut tile)?;
        for r in rect.r0.max(rows.start)..rect.r1.min(rows.end) {
            let from = (r - rect.r0) * rect.cols() * w;
            let to = (r - rows.start) * row_bytes + rect.c0 * w;
            out[to..to + rect.cols() * w].copy_from_slice(&tile[from..from + rect.cols() * w]);
        }
    }
    Ok(())
}
