//! The 192 bytes that open every resident delta, and where its sections lie.

use crate::codec::word::Word;
use crate::codec::{Encoding, GapKind, Grid};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype, Shape};
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// First bytes of every resident delta.
pub const MAGIC: [u8; 8] = *b"XORZDLT\0";
/// The layout version that this library writes. It reads this one and those before it.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 192;
/// Where the header keeps the digest of all other bytes.
pub(crate) const CONTENT_AT: Range<usize> = 160..176;
/// Where it keeps the number of entries; zeros in layout 0.
const ENTRIES_AT: usize = 104;
/// Where it keeps the offsets of the entries' directory and positions; zeros in layout 0.
const ENTRY_OFFSETS_AT: Range<usize> = 176..192;
/// Sections begin at multiples of it.
pub(crate) const ALIGN: usize = 64;

/// What a resident delta says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The layout version: 0 or 1.
    pub version: u16,
    /// How the words are stored.
    pub encoding: Encoding,
    /// Element type of base and fine_tuned.
    pub dtype: Dtype,
    /// Rows and columns of base and fine_tuned.
    pub shape: Shape,
    /// Rows of a tile.
    pub tile_rows: usize,
    /// Columns of a tile.
    pub tile_cols: usize,
    /// Of `sparse`: what a gap is. `U8` otherwise.
    pub gap: GapKind,
    /// Words that differ from base.
    pub changed: u64,
    /// Words stored as exceptions.
    pub exceptions: u64,
    /// Of `exponent` and a dtype that computes: exact differences stored apart. 0 otherwise, and in layout 0.
    pub entries: u64,
    /// Digest of the base that it was made against.
    pub base_digest: Digest,
    /// Of `exponent`: bits by class of the base word. Zeros otherwise.
    pub widths: [u8; 32],
    /// Of `sparse`: records; of `exponent`: stream units; of all tiles. 0 otherwise.
    pub units: u64,
}

/// Where the sections lie. Offsets follow from the header alone; an absent section is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// `tiles + 1` u32: first record or unit of each tile.
    pub directory: Range<usize>,
    /// Records, units or words.
    pub payload: Range<usize>,
    /// Entries; empty in layout 0.
    pub entries: Listing,
    /// Exceptions: words that override everything else.
    pub exceptions: Listing,
    /// Bytes of the whole delta.
    pub total: usize,
}

/// Three sections that list what tiles store apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    /// `tiles + 1` u32: the first one of each tile.
    pub directory: Range<usize>,
    /// Positions in the tile, one u16 each.
    pub positions: Range<usize>,
    /// One word for each position: a difference or a fine-tuned word.
    pub words: Range<usize>,
}

impl Listing {
    /// In the order in which they lie.
    pub(crate) fn sections(&self) -> [&Range<usize>; 3] {
        [&self.directory, &self.positions, &self.words]
    }
}

impl Layout {
    /// Every section, in the order in which they lie.
    pub(crate) fn sections(&self) -> impl Iterator<Item = &Range<usize>> {
        let listings = [&self.entries, &self.exceptions].into_iter().flat_map(Listing::sections);
        [&self.directory, &self.payload].into_iter().chain(listings)
    }
}

/// xxh3-128 of what precedes the payload but for the place where this digest is kept, the payload's own
/// xxh3-128 and what follows the payload: so that it can be made while the payload is written elsewhere.
pub(crate) fn content_digest(head: &[u8], payload: u128, tail: &[u8]) -> Digest {
    let mut h = Xxh3::new();
    h.update(&head[..CONTENT_AT.start]);
    h.update(&head[CONTENT_AT.end..]);
    h.update(&payload.to_le_bytes());
    h.update(tail);
    Digest(h.digest128().to_le_bytes())
}

impl Header {
    /// The tile grid.
    pub fn grid(&self) -> Grid {
        Grid { shape: self.shape, tile_rows: self.tile_rows, tile_cols: self.tile_cols }
    }

    /// Bytes of one unit of the directory: a record of 16 lanes, or a stream unit.
    pub(crate) fn unit_bytes(&self) -> usize {
        match self.encoding {
            Encoding::Sparse => Grid::TILE_ROWS * (self.gap.bytes() + self.dtype.word_bytes()),
            _ => self.dtype.word_bytes(),
        }
    }

    /// Where the sections lie.
    pub(crate) fn layout(&self) -> Result<Layout> {
        let tiled = matches!(self.encoding, Encoding::Sparse | Encoding::Exponent);
        let directory = if tiled { (self.grid().tiles() as u64 + 1) * 4 } else { 0 };
        let payload = match self.encoding {
            Encoding::Raw => Some(self.shape.bytes(self.dtype)? as u64),
            Encoding::Unchanged => Some(0),
            _ => self.units.checked_mul(self.unit_bytes() as u64),
        };
        let listed = |count: u64| {
            let word = self.dtype.word_bytes() as u64;
            [Some(u64::from(count > 0) * directory), count.checked_mul(2), count.checked_mul(word)]
        };
        let mut at = HEADER_BYTES;
        let mut place = |length: Option<u64>| -> Result<Range<usize>> {
            let section = length.and_then(|length| {
                let start = at;
                let end = start.checked_add(usize::try_from(length).ok()?)?;
                at = end.checked_next_multiple_of(ALIGN)?;
                Some(start..end)
            });
            section.ok_or_else(|| Error::corrupt("resident delta: sizes overflow"))
        };
        let (directory, payload) = (place(Some(directory))?, place(payload)?);
        let mut list = |count: u64| -> Result<Listing> {
            let [directory, positions, words] = listed(count);
            Ok(Listing { directory: place(directory)?, positions: place(positions)?, words: place(words)? })
        };
        let (entries, exceptions) = (list(self.entries)?, list(self.exceptions)?);
        Ok(Layout { directory, payload, entries, exceptions, total: at })
    }

    /// The header's bytes.
    pub(crate) fn write(&self) -> Result<[u8; HEADER_BYTES]> {
        let layout = self.layout()?;
        let mut b = [0u8; HEADER_BYTES];
        b[..8].copy_from_slice(&MAGIC);
        b[8..10].copy_from_slice(&self.version.to_le_bytes());
        b[10] = self.encoding as u8;
        b[11] = self.dtype as u8;
        b[12] = self.tile_rows.trailing_zeros() as u8;
        b[13] = self.tile_cols.trailing_zeros() as u8;
        b[14] = self.gap.bytes() as u8;
        let numbers = [
            self.shape.n as u64,
            self.shape.k as u64,
            layout.total as u64,
            self.changed,
            self.exceptions,
            self.units,
            layout.directory.start as u64,
            layout.payload.start as u64,
            layout.exceptions.directory.start as u64,
            layout.exceptions.positions.start as u64,
            layout.exceptions.words.start as u64,
        ];
        let mut put = |at: usize, v: u64| b[at..at + 8].copy_from_slice(&v.to_le_bytes());
        numbers.into_iter().enumerate().for_each(|(i, v)| put(16 + 8 * i, v));
        if self.version > 0 {
            put(ENTRIES_AT, self.entries);
            put(ENTRY_OFFSETS_AT.start, layout.entries.directory.start as u64);
            put(ENTRY_OFFSETS_AT.start + 8, layout.entries.positions.start as u64);
        }
        b[112..128].copy_from_slice(&self.base_digest.0);
        b[128..160].copy_from_slice(&self.widths);
        Ok(b)
    }

    /// Read and check a header and the sizes it announces against `bytes`, the whole delta.
    pub(crate) fn read(bytes: &[u8]) -> Result<(Self, Layout)> {
        Self::read_head(bytes, bytes.len() as u64)
    }

    /// [`Header::read`] where `bytes` are the first ones of a delta of `total` bytes.
    pub(crate) fn read_head(bytes: &[u8], total: u64) -> Result<(Self, Layout)> {
        if bytes.len() < HEADER_BYTES {
            return Err(Error::truncated(format!(
                "resident delta: {} bytes are fewer than the {HEADER_BYTES} of a header",
                bytes.len()
            )));
        }
        if bytes[..8] != MAGIC {
            return Err(Error::corrupt(
                "resident delta: it does not begin with XORZDLT, so it is something else",
            ));
        }
        let version = u16::load(&bytes[8..10]);
        if version > VERSION {
            return Err(Error::unsupported(format!(
                "resident delta: layout version {version}, but this library reads 0 to {VERSION}"
            )));
        }
        let header = Self::read_fields(version, bytes)?;
        let layout = header.layout()?;
        header.check_sizes(bytes, total, &layout)?;
        Ok((header, layout))
    }

    fn read_fields(version: u16, bytes: &[u8]) -> Result<Self> {
        let number = |i: usize| u64::load(&bytes[16 + 8 * i..24 + 8 * i]);
        let size = |i: usize| {
            usize::try_from(number(i)).map_err(|_| Error::corrupt("resident delta: a size overflows"))
        };
        let code = |what: &str, v: u8| Error::corrupt(format!("resident delta: unknown {what} {v}"));
        let mut digest = [0u8; 16];
        digest.copy_from_slice(&bytes[112..128]);
        let mut widths = [0u8; 32];
        widths.copy_from_slice(&bytes[128..160]);
        let header = Self {
            version,
            encoding: Encoding::from_code(bytes[10]).ok_or_else(|| code("encoding", bytes[10]))?,
            dtype: Dtype::from_code(bytes[11]).ok_or_else(|| code("dtype", bytes[11]))?,
            shape: Shape { n: size(0)?, k: size(1)? },
            tile_rows: 1usize.checked_shl(u32::from(bytes[12])).unwrap_or(0),
            tile_cols: 1usize.checked_shl(u32::from(bytes[13])).unwrap_or(0),
            gap: match bytes[14] {
                1 => GapKind::U8,
                2 => GapKind::U16,
                v => return Err(code("gap size", v)),
            },
            changed: number(3),
            exceptions: number(4),
            entries: if version > 0 { u64::load(&bytes[ENTRIES_AT..ENTRIES_AT + 8]) } else { 0 },
            units: number(5),
            base_digest: Digest(digest),
            widths,
        };
        header.check_fields()?;
        Ok(header)
    }

    pub(crate) fn check_fields(&self) -> Result<()> {
        let corrupt = |what: String| Err(Error::corrupt(format!("resident delta: {what}")));
        self.shape.bytes(self.dtype)?;
        let words = self.shape.words()? as u64;
        if !(Grid::MIN_COLS..=Grid::MAX_COLS).contains(&self.tile_cols)
            || !(Grid::TILE_ROWS..=Grid::MAX_WORDS / self.tile_cols).contains(&self.tile_rows)
            || (self.encoding == Encoding::Sparse && self.tile_rows != Grid::TILE_ROWS)
        {
            return corrupt(format!("tiles of {} x {}", self.tile_rows, self.tile_cols));
        }
        if self.changed > words || self.exceptions > words || self.entries > words.saturating_mul(2) {
            return corrupt(format!(
                "{} changed, {} exceptions, {} entries of {words} words",
                self.changed, self.exceptions, self.entries
            ));
        }
        if self.entries > 0 && !(self.encoding == Encoding::Exponent && self.dtype.computes()) {
            return corrupt(format!("encoding {} of {} with entries", self.encoding, self.dtype));
        }
        let bits = 8 * self.dtype.word_bytes();
        if let Some(w) = self.widths.iter().find(|w| usize::from(**w) > bits) {
            return corrupt(format!("a width of {w} bits for words of {bits}"));
        }
        if matches!(self.encoding, Encoding::Unchanged | Encoding::Raw)
            && (self.units > 0 || self.exceptions > 0)
        {
            return corrupt(format!("encoding {} with units or exceptions", self.encoding));
        }
        if [self.units, self.exceptions, self.entries].iter().any(|count| *count > u64::from(u32::MAX)) {
            return corrupt(format!(
                "{} units, {} exceptions, {} entries",
                self.units, self.exceptions, self.entries
            ));
        }
        Ok(())
    }

    fn check_sizes(&self, bytes: &[u8], total: u64, layout: &Layout) -> Result<()> {
        let kept = self.write()?;
        if kept[..112] != bytes[..112] || kept[ENTRY_OFFSETS_AT] != bytes[ENTRY_OFFSETS_AT] {
            return Err(Error::corrupt("resident delta: the header's offsets are not those of its sizes"));
        }
        let want = layout.total as u64;
        if total < want {
            return Err(Error::truncated(format!(
                "resident delta: {total} bytes, but the header announces {want}"
            )));
        }
        if total > want {
            return Err(Error::corrupt(format!(
                "resident delta: {} bytes follow the {want} that the header announces",
                total - want
            )));
        }
        Ok(())
    }
}
