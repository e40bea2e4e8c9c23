//! The bookkeeping of one delta whose payload goes elsewhere as it is made: into memory, or a file. Reads no
//! words.

use super::header::{ALIGN, CONTENT_AT, HEADER_BYTES, Header, Listing, content_digest};
use super::piece::{DeltaPiece, Listed};
use super::plan::Plan;
use crate::codec::Encoding;
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype};
use xxhash_rust::xxh3::Xxh3;

/// Puts a delta together from pieces. The caller appends every piece's payload somewhere,
/// [`Assembler::head_bytes`] from the start; [`Assembler::finish`] gives what goes before and after. Holds
/// the directories and what is stored apart, no payload.
pub struct Assembler {
    plan: Plan,
    header: Header,
    /// First unit of each tile.
    units: Vec<u32>,
    entries: Growing,
    exceptions: Growing,
    payload: u64,
    hash: Xxh3,
}

/// What tiles store apart, so far: the first one of each tile, positions and words.
#[derive(Default)]
struct Growing {
    first: Vec<u32>,
    positions: Vec<u8>,
    words: Vec<u8>,
}

impl Growing {
    fn count(&self) -> u64 {
        self.positions.len() as u64 / 2
    }

    /// Whether the counts are those of the bytes, for `tiles` tiles and words of `word` bytes.
    fn takes(listed: &Listed, tiles: usize, word: usize) -> bool {
        let counted: u64 = listed.counts.iter().map(|count| u64::from(*count)).sum();
        let bytes = (listed.positions.len() as u64, listed.words.len() as u64);
        listed.counts.len() == tiles && bytes == (2 * counted, word as u64 * counted)
    }

    fn add(&mut self, listed: &Listed) -> Result<()> {
        let mut at = self.count();
        for count in &listed.counts {
            self.first.push(small(at)?);
            at += u64::from(*count);
        }
        small(at)?;
        self.positions.extend_from_slice(&listed.positions);
        self.words.extend_from_slice(&listed.words);
        Ok(())
    }

    /// Bytes of the sections.
    fn bytes(&self, tiles: usize) -> u64 {
        let directory = if self.positions.is_empty() { 0 } else { 4 * (tiles as u64 + 1) };
        [directory, self.positions.len() as u64, self.words.len() as u64].into_iter().map(padded).sum()
    }

    /// Put them into `tail`, which begins at byte `start` of the delta.
    fn put(&mut self, at: &Listing, start: usize, tail: &mut [u8]) {
        if self.positions.is_empty() {
            return;
        }
        // Below 2^32, as `add` has seen.
        self.first.push(self.count() as u32);
        let parts = [bytemuck::cast_slice(&self.first), &self.positions, &self.words];
        for (section, bytes) in at.sections().into_iter().zip(parts) {
            tail[section.start - start..section.end - start].copy_from_slice(bytes);
        }
    }
}

fn small(v: u64) -> Result<u32> {
    u32::try_from(v).map_err(|_| Error::unsupported("a matrix whose delta has more than 2^32 units"))
}

fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN as u64)
}

/// What goes around a payload: the delta is `head`, payload, `tail`; or `head` alone where nothing changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Header and directory, [`Assembler::head_bytes`] long; of an unchanged matrix the header alone.
    pub head: Vec<u8>,
    /// The payload's padding; entries, then exceptions: directory, positions and words. Empty for an
    /// unchanged matrix.
    pub tail: Vec<u8>,
    /// Whether the payload belongs to the delta; where nothing changed it does not.
    pub keep_payload: bool,
    /// What `head` begins with.
    pub header: Header,
}

impl Finished {
    /// Complete a delta in memory: [`Assembler::head_bytes`] to be filled, then the payload.
    pub(crate) fn around(&self, delta: &mut Vec<u8>) {
        if !self.keep_payload {
            delta.clear();
            delta.extend_from_slice(&self.head);
            return;
        }
        delta[..self.head.len()].copy_from_slice(&self.head);
        delta.extend_from_slice(&self.tail);
    }
}

impl Assembler {
    /// Nothing yet of a delta of `dtype` as `plan` says.
    ///
    /// # Errors
    /// `InvalidArgument` for a plan that no delta of `dtype` can have.
    pub fn new(dtype: Dtype, plan: &Plan) -> Result<Self> {
        plan.check(dtype)?;
        Ok(Self {
            plan: *plan,
            header: plan.header(dtype),
            units: vec![0],
            entries: Growing::default(),
            exceptions: Growing::default(),
            payload: 0,
            hash: Xxh3::new(),
        })
    }

    /// Bytes before the payload, header and padded directory, unless nothing changes.
    pub fn head_bytes(&self) -> usize {
        let directory = if self.plan.tiled() { 4 * (self.plan.grid.tiles() + 1) } else { 0 };
        HEADER_BYTES + directory.next_multiple_of(ALIGN)
    }

    /// Take the next tiles. Pieces come in the order of the tiles; a piece may hold any number of them.
    ///
    /// # Errors
    /// `Unsupported` beyond 2^32 units or exceptions; `InvalidArgument` for a piece that contradicts itself
    /// or the plan.
    pub fn add(&mut self, piece: &DeltaPiece) -> Result<()> {
        let word = self.header.dtype.word_bytes();
        let units: u64 = piece.units.iter().map(|u| u64::from(*u)).sum();
        let payload = if self.plan.tiled() {
            units * self.header.unit_bytes() as u64
        } else {
            piece.payload.len() as u64
        };
        let listed = |listed| Growing::takes(listed, piece.units.len(), word);
        let apart = piece.entries.bytes() + piece.exceptions.bytes();
        if !listed(&piece.entries)
            || !listed(&piece.exceptions)
            || payload != piece.payload.len() as u64
            || (!self.plan.tiled() && (units > 0 || apart > 0))
        {
            return Err(Error::invalid("a piece of a delta whose counts are not those of its bytes"));
        }
        if self.plan.tiled() {
            self.list(piece)?;
        }
        self.hash.update(&piece.payload);
        self.payload += piece.payload.len() as u64;
        self.header.changed += piece.changed;
        Ok(())
    }

    fn list(&mut self, piece: &DeltaPiece) -> Result<()> {
        for units in &piece.units {
            self.header.units += u64::from(*units);
            self.units.push(small(self.header.units)?);
        }
        self.entries.add(&piece.entries)?;
        self.exceptions.add(&piece.exceptions)?;
        self.header.entries = self.entries.count();
        self.header.exceptions = self.exceptions.count();
        Ok(())
    }

    /// Bytes of the whole delta if what was added were all; of the header alone while nothing changed.
    pub fn bytes(&self) -> u64 {
        if self.header.changed == 0 {
            return HEADER_BYTES as u64;
        }
        let tiles = self.plan.grid.tiles();
        let apart = self.entries.bytes(tiles) + self.exceptions.bytes(tiles);
        self.head_bytes() as u64 + padded(self.payload) + apart
    }

    /// Words that differ from base, so far.
    pub fn changed(&self) -> u64 {
        self.header.changed
    }

    /// What goes around the payload, after the last piece.
    ///
    /// # Errors
    /// `InvalidArgument` if pieces are missing, or words changed that were planned as unchanged.
    pub fn finish(mut self, base_digest: Digest) -> Result<Finished> {
        self.check_whole()?;
        self.header.base_digest = base_digest;
        let keep_payload = self.header.changed > 0;
        if !keep_payload {
            let plan = Plan::unchanged(self.plan.grid.shape);
            let header = Header { base_digest, ..plan.header(self.header.dtype) };
            self = Self { header, ..Self::new(self.header.dtype, &plan)? };
        }
        let layout = self.header.layout()?;
        let mut head = self.header.write()?.to_vec();
        if !layout.directory.is_empty() {
            head.extend_from_slice(bytemuck::cast_slice(&self.units));
        }
        head.resize(layout.payload.start, 0);
        // The tail begins where the payload ends, between two multiples of the alignment.
        let mut tail = vec![0; layout.total - layout.payload.end];
        self.entries.put(&layout.entries, layout.payload.end, &mut tail);
        self.exceptions.put(&layout.exceptions, layout.payload.end, &mut tail);
        let content = content_digest(&head, self.hash.digest128(), &tail);
        head[CONTENT_AT].copy_from_slice(&content.0);
        Ok(Finished { head, tail, keep_payload, header: self.header })
    }

    fn check_whole(&self) -> Result<()> {
        let tiles = self.plan.grid.tiles();
        let raw = self.plan.grid.shape.bytes(self.header.dtype)? as u64;
        let whole = match self.plan.encoding {
            Encoding::Unchanged => self.header.changed == 0,
            Encoding::Raw => self.payload == raw,
            Encoding::Sparse | Encoding::Exponent => self.units.len() == tiles + 1,
        };
        if whole {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a delta of encoding {} is not whole: {} of {tiles} tiles, {} bytes of payload, {} words changed",
            self.plan.encoding,
            self.units.len() - 1,
            self.payload,
            self.header.changed
        )))
    }
}
