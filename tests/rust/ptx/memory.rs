//! Memory as a block sees it: buffers in device memory, each with bounds of its own, and the shared variable. Nothing outside of
//! them, nothing misaligned, nothing that was never written, no race.

use crate::common::device::Param;
use crate::ops::{Atomic, SHARED_AT, Space, TABLE_AT};
use crate::races::{Cell, Who, Write};
use std::ops::Range;

/// Address bits below a buffer's number.
const BUFFER_BITS: u32 = 40;

/// Which bytes of a parameter hold anything, where not all do.
pub(crate) type Known = (usize, Vec<bool>);

/// A parameter's bytes in device memory.
struct Buffer {
    at: u64,
    bytes: Vec<u8>,
    writable: bool,
    /// Of those that may be written to, or that not all hold anything.
    cells: Option<Vec<Cell>>,
}

/// Bytes and what is known of them.
#[derive(Default)]
struct Shared {
    bytes: Vec<u8>,
    cells: Vec<Cell>,
}

/// All memory of a launch. A cell is of `granule` bytes: as many as the smallest access of the kernel has.
pub(crate) struct Memory {
    granule: usize,
    buffers: Vec<Option<Buffer>>,
    shared: Shared,
    pub(crate) tables: Vec<Vec<u8>>,
    /// Whether unordered writes of other values are no race.
    pub(crate) forgives: bool,
}

fn cells_of(range: &Range<usize>, granule: usize) -> Range<usize> {
    range.start / granule..range.end.div_ceil(granule)
}

/// Bytes `from ..` of `size`.
fn within(from: u64, bytes: usize, size: usize, what: &str) -> Result<Range<usize>, String> {
    let end = from.checked_add(bytes as u64).filter(|end| *end <= size as u64);
    let end = end.ok_or_else(|| format!("{bytes} bytes at {from} of {size} of {what}"))?;
    Ok(from as usize..end as usize)
}

/// What was loaded, and whether all of it had been written.
pub(crate) type Loaded = (u64, bool);

impl Memory {
    /// Buffers of `params`, of which some bytes hold nothing, whatever they are given.
    pub(crate) fn new(params: &[Param], known: &[Known], (shared, granule): (usize, usize)) -> Self {
        let one = |(i, param): (usize, &Param)| {
            let (bytes, past, writable) = match param {
                Param::In(bytes, past) => (bytes, past, false),
                Param::Out(bytes, past) => (bytes, past, true),
                Param::U32(_) | Param::U64(_) | Param::Null => return None,
                Param::Vast(..) => panic!("no buffers of which most bytes are not there are interpreted"),
            };
            let marks = known.iter().find(|known| known.0 == i).map(|known| &known.1);
            let cell = |i| Cell::new(marks.is_none_or(|marks| marks[i * granule]));
            let cells =
                (writable || marks.is_some()).then(|| (0..bytes.len().div_ceil(granule)).map(cell).collect());
            Some(Buffer { at: ((i as u64 + 1) << BUFFER_BITS) + past, bytes: bytes.clone(), writable, cells })
        };
        let buffers = params.iter().enumerate().map(one).collect();
        let shared =
            Shared { bytes: vec![0xA7; shared], cells: vec![Cell::default(); shared.div_ceil(granule)] };
        Self { granule, buffers, shared, tables: vec![], forgives: false }
    }

    /// Of the parameter `at`.
    pub(crate) fn address(&self, at: usize) -> u64 {
        self.buffers[at].as_ref().map_or(0, |buffer| buffer.at)
    }

    /// A block begins: its shared memory holds nothing.
    pub(crate) fn forget_shared(&mut self) {
        self.shared.bytes.fill(0xA7);
        self.shared.cells.fill(Cell::default());
    }

    /// Of the parameter `at`, if it may be written to: its bytes, and which hold anything.
    pub(crate) fn left(&mut self, at: usize) -> (Vec<u8>, Vec<bool>) {
        match &mut self.buffers[at] {
            Some(Buffer { bytes, writable: true, cells: Some(cells), .. }) => {
                let known = |byte: usize| cells[byte / self.granule].is_known;
                let known = (0..bytes.len()).map(known).collect();
                (std::mem::take(bytes), known)
            }
            _ => (vec![], vec![]),
        }
    }

    /// Where an access to shared memory is.
    fn within_shared(&self, at: u64, bytes: usize) -> Result<Range<usize>, String> {
        within(at.wrapping_sub(SHARED_AT), bytes, self.shared.bytes.len(), "shared memory")
    }

    /// The bytes at an address and their cells, if any.
    fn find(
        &mut self,
        space: Space,
        at: u64,
        (bytes, writes): (usize, bool),
    ) -> Result<(&mut [u8], Option<&mut [Cell]>), String> {
        if !at.is_multiple_of(bytes as u64) {
            return Err(format!("address {at:#x} is no multiple of {bytes}"));
        }
        if space == Space::Shared {
            let range = self.within_shared(at, bytes)?;
            let cells = &mut self.shared.cells[cells_of(&range, self.granule)];
            return Ok((&mut self.shared.bytes[range], Some(cells)));
        }
        if space == Space::Table {
            let table = (at / TABLE_AT).checked_sub(1).and_then(|i| self.tables.get_mut(i as usize));
            let table = table.ok_or_else(|| format!("{bytes} bytes at {at:#x}, where no constants are"))?;
            let range = within(at % TABLE_AT, bytes, table.len(), "a table of constants")?;
            return Ok((&mut table[range], None));
        }
        let number = (at >> BUFFER_BITS) as usize;
        let buffer = number.checked_sub(1).and_then(|i| self.buffers.get_mut(i)?.as_mut());
        let buffer = buffer.ok_or_else(|| format!("{bytes} bytes at {at:#x}, where no buffer is"))?;
        let (from, size) = (at.wrapping_sub(buffer.at), buffer.bytes.len());
        let end = from.checked_add(bytes as u64).filter(|end| *end <= size as u64);
        let place = || format!("{bytes} bytes at {from} of the {size} of parameter {}", number - 1);
        let end = end.ok_or_else(place)?;
        if writes && !buffer.writable {
            return Err(format!("{}, which it may only read", place()));
        }
        let range = from as usize..end as usize;
        let cells = cells_of(&range, self.granule);
        Ok((&mut buffer.bytes[range], buffer.cells.as_mut().map(|all| &mut all[cells])))
    }

    /// Up to 16 bytes, of which only those in `used` are read, into `words`: 0 and false where none is.
    ///
    /// # Errors
    /// What is wrong with the access.
    pub(crate) fn load(
        &mut self,
        space: Space,
        at: u64,
        (bytes, used): (u32, u32),
        who: Who,
        words: &mut [Loaded],
    ) -> Result<(), String> {
        let granule = self.granule;
        let (found, cells) = self.find(space, at, (bytes as usize * words.len(), false))?;
        let mut known = u32::MAX;
        for (i, cell) in cells.into_iter().flatten().enumerate() {
            let first = i * granule;
            if used >> first & 1 == 1 {
                if space == Space::Constant { cell.read_constant(who) } else { cell.read(who) }?;
            }
            known &= !(if cell.is_known { 0 } else { (1 << granule) - 1 } << first);
        }
        let all = u32::MAX >> (32 - bytes);
        for (i, (word, from)) in words.iter_mut().zip(found.chunks_exact(bytes as usize)).enumerate() {
            let mut wide = [0; 8];
            wide[..from.len()].copy_from_slice(from);
            let mine = all << (i as u32 * bytes);
            *word = (u64::from_le_bytes(wide), known & used & mine == mine);
        }
        Ok(())
    }

    /// # Errors
    /// What is wrong with the access.
    pub(crate) fn store(
        &mut self,
        space: Space,
        at: u64,
        bytes: u32,
        who: Who,
        words: &[Loaded],
    ) -> Result<(), String> {
        let (forgives, granule) = (self.forgives, self.granule);
        let (to, cells) = self.find(space, at, (bytes as usize * words.len(), true))?;
        let mut cells = cells.unwrap_or_default();
        let size = bytes as usize;
        for (to, (word, known)) in to.chunks_exact_mut(size).zip(words) {
            if !known && space != Space::Shared {
                return Err("writes to device memory what was never written".into());
            }
            let word = &word.to_le_bytes()[..size];
            let (mine, rest) = cells.split_at_mut(size.div_ceil(granule).min(cells.len()));
            for (i, cell) in mine.iter_mut().enumerate() {
                let part = i * granule..((i + 1) * granule).min(size);
                let same = forgives || (to[part.clone()] == word[part] && cell.is_known == *known);
                cell.write(who, if same { Write::Same } else { Write::Plain })?;
                cell.is_known = *known;
            }
            to.copy_from_slice(word);
            cells = rest;
        }
        Ok(())
    }

    /// Four bytes; what was there before.
    ///
    /// # Errors
    /// What is wrong with the access.
    pub(crate) fn atomic(
        &mut self,
        (space, f): (Space, Atomic),
        at: u64,
        value: u32,
        who: Who,
    ) -> Result<u32, String> {
        let (bytes, cells) = self.find(space, at, (4, true))?;
        for cell in cells.into_iter().flatten() {
            if !cell.is_known {
                return Err("an atomic on what was never written".into());
            }
            cell.write(who, Write::Atomic)?;
        }
        let before = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
        let after = match f {
            Atomic::Or => before | value,
            Atomic::Max => before.max(value),
            Atomic::Add => before.wrapping_add(value),
        };
        bytes.copy_from_slice(&after.to_le_bytes());
        Ok(before)
    }

    /// An asynchronous copy sets out: its sixteen bytes.
    ///
    /// # Errors
    /// What is wrong with either side.
    pub(crate) fn set_out(&mut self, to: u64, from: u64, who: Who) -> Result<[u8; 16], String> {
        let mut words = [(0, false); 2];
        self.load(Space::Global, from, (8, u32::MAX), who, &mut words)?;
        if !from.is_multiple_of(16) || !words.iter().all(|word| word.1) {
            return Err("copies from an odd address, or what was never written".into());
        }
        let (_, cells) = self.find(Space::Shared, to, (16, true))?;
        cells.into_iter().flatten().try_for_each(|cell| cell.write(who, Write::Copy))?;
        let mut bytes = [0; 16];
        bytes.chunks_exact_mut(8).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.0.to_le_bytes()));
        Ok(bytes)
    }

    /// It has arrived.
    ///
    /// # Errors
    /// None that `set_out` did not have.
    pub(crate) fn arrive(&mut self, to: u64, bytes: [u8; 16], who: Who) -> Result<(), String> {
        let (at, cells) = self.find(Space::Shared, to, (16, true))?;
        at.copy_from_slice(&bytes);
        cells.into_iter().flatten().for_each(|cell| cell.arrive(who));
        Ok(())
    }
}
