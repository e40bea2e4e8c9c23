//! A resident delta that lies elsewhere, in a file or in frames: header and directories in memory, tiles
//! fetched on demand, so that a matrix of any size is restored band by band.

use super::header::{HEADER_BYTES, Header, Layout};
use crate::codec::Encoding;
use crate::codec::word::Word;
use crate::error::{Error, Result};
use crate::matrix::Shape;
use std::ops::Range;

/// Fills a buffer with the delta's bytes from a position on.
pub type ReadAt<'r> = &'r mut dyn FnMut(u64, &mut [u8]) -> Result<()>;

/// The header and the directories of a resident delta.
#[derive(Clone, Debug)]
pub struct Outline {
    header: Header,
    layout: Layout,
    /// First unit, entry and exception of each tile.
    directory: Vec<u32>,
    entry_directory: Vec<u32>,
    exception_directory: Vec<u32>,
}

/// Where the payload of a delta begins, as the first 80 bytes of its header say; unchecked.
pub(crate) fn head_bytes(header: &[u8; 80]) -> u64 {
    u64::load(&header[72..80])
}

impl Outline {
    /// Read the outline of a delta of `total` bytes. What it allocates is bounded by the tiles of the
    /// header's shape: compare that with the base before trusting it to be small (`limit`, in tiles).
    ///
    /// # Errors
    /// `Truncated`, `Corrupt`, `Unsupported` as [`super::Resident::parse`]; those of `read`.
    pub fn read(total: u64, limit: usize, read: ReadAt<'_>) -> Result<Self> {
        let mut head = [0u8; HEADER_BYTES];
        if total < HEADER_BYTES as u64 {
            return Err(Error::truncated(format!("resident delta: {total} bytes are fewer than a header's")));
        }
        read(0, &mut head)?;
        let (header, layout) = Header::read_head(&head, total)?;
        if header.grid().tiles() > limit {
            return Err(Error::corrupt(format!(
                "resident delta: {} tiles where {limit} belong",
                header.grid().tiles()
            )));
        }
        let mut list = |range: &Range<usize>, what: &str, limit: u64| -> Result<Vec<u32>> {
            let mut bytes = vec![0u8; range.len()];
            read(range.start as u64, &mut bytes)?;
            let list: Vec<u32> = bytes.chunks_exact(4).map(u32::load).collect();
            let ends = list.first().zip(list.last()).is_none_or(|(a, b)| *a == 0 && u64::from(*b) == limit);
            if !ends || !list.is_sorted() {
                return Err(Error::corrupt(format!(
                    "resident delta: the directory of {what} is not one of {limit}"
                )));
            }
            Ok(list)
        };
        let directory = list(&layout.directory, "units", header.units)?;
        let entry_directory = list(&layout.entries.directory, "entries", header.entries)?;
        let exception_directory = list(&layout.exceptions.directory, "exceptions", header.exceptions)?;
        Ok(Self { header, layout, directory, entry_directory, exception_directory })
    }

    /// What the delta says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Put into `out` a complete resident delta of the tiles `tiles`, which are the tiles of a matrix of
    /// `shape`, whole bands or a run of one row. Its count of changes and its content digest are not those of
    /// what it holds.
    ///
    /// # Errors
    /// `InvalidArgument` if `tiles` and `shape` do not fit each other; those of `read`.
    pub fn cut(&self, tiles: Range<usize>, shape: Shape, read: ReadAt<'_>, out: &mut Vec<u8>) -> Result<()> {
        let span = |list: &[u32]| list.get(tiles.start).zip(list.get(tiles.end)).map(|(a, b)| *a..*b);
        let units = span(&self.directory).unwrap_or(0..0);
        let entries = span(&self.entry_directory).unwrap_or(0..0);
        let exceptions = span(&self.exception_directory).unwrap_or(0..0);
        let count = |span: &Range<u32>| u64::from(span.end - span.start);
        let header = Header {
            shape,
            changed: 0,
            units: count(&units),
            entries: count(&entries),
            exceptions: count(&exceptions),
            ..self.header
        };
        if header.grid().tiles() != tiles.len() || tiles.end > self.header.grid().tiles() {
            return Err(Error::invalid(format!("tiles {tiles:?} are not those of a {shape} matrix")));
        }
        let layout = header.layout()?;
        out.clear();
        out.resize(layout.total, 0);
        out[..HEADER_BYTES].copy_from_slice(&header.write()?);
        rebase(&self.directory, &tiles, &mut out[layout.directory]);
        let payload = self.layout.payload.start as u64 + self.payload_at(&tiles, units.start);
        read(payload, &mut out[layout.payload])?;
        let word = self.header.dtype.word_bytes() as u64;
        let lists = [
            (&self.entry_directory, &self.layout.entries, entries, &layout.entries),
            (&self.exception_directory, &self.layout.exceptions, exceptions, &layout.exceptions),
        ];
        for (list, from, span, to) in lists.into_iter().filter(|(_, _, span, _)| !span.is_empty()) {
            rebase(list, &tiles, &mut out[to.directory.clone()]);
            let first = u64::from(span.start);
            read(from.positions.start as u64 + 2 * first, &mut out[to.positions.clone()])?;
            read(from.words.start as u64 + word * first, &mut out[to.words.clone()])?;
        }
        Ok(())
    }

    /// Where in the payload the first of `tiles` begins.
    fn payload_at(&self, tiles: &Range<usize>, unit: u32) -> u64 {
        let grid = self.header.grid();
        if self.header.encoding == Encoding::Raw && !tiles.is_empty() {
            let rect = grid.rect(tiles.start);
            return ((rect.r0 * grid.shape.k + rect.c0) * self.header.dtype.word_bytes()) as u64;
        }
        u64::from(unit) * self.header.unit_bytes() as u64
    }
}

/// The directory of `tiles`, counted from the first of them.
fn rebase(list: &[u32], tiles: &Range<usize>, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    let first = list[tiles.start];
    let entries = list[tiles.start..=tiles.end].iter();
    entries.zip(out.chunks_exact_mut(4)).for_each(|(e, o)| o.copy_from_slice(&(e - first).to_le_bytes()));
}
