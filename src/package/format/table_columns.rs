//! What is in the table of a package of version 2, whoever reads or writes it: columns, flags and limits.

use super::columns::ColumnReader;
use crate::codec::{Encoding, Prefer};
use crate::error::{Error, Result};

/// Digest, length of the columns, what they take.
pub(super) const TABLE_HEAD: usize = 24;
/// Dimensions of a tensor, at most.
pub(super) const MAX_DIMS: usize = 64;
/// Bytes that the tensors of one joint frame have together, at most.
pub(crate) const MAX_JOINT_BYTES: u64 = 256 << 10;

/// Bytes that a table of `bytes` bytes may have as columns, and those that its texts may have, at most: so little that a
/// short table cannot ask for much memory.
pub(super) fn most_columns(bytes: usize) -> u64 {
    (64 << 10) + 16 * bytes as u64
}

/// Pieces of bases that a table of `bytes` bytes may list, at most.
pub(super) fn most_parts(bytes: usize) -> usize {
    1024 + bytes
}

/// What the column `base` says of a delta's base.
pub(super) mod base_kind {
    pub(crate) const OWN_NAME: u64 = 1;
    pub(crate) const OTHER_NAME: u64 = 2;
    pub(crate) const PARTS: u64 = 3;
    /// Added to the first two: a text names its file.
    pub(crate) const FILE: u64 = 4;
}

/// Bits of a base part: it has a name, its tensor's file is named.
pub(super) const PART_NAME: u64 = 1;
pub(super) const PART_FILE: u64 = 2;
/// Bits of a table: made from a folder; the sha256 of each delta's base is among the digests.
pub(super) const TABLE_FOLDER: u64 = 1;
pub(super) const TABLE_SUMS: u64 = 2;
/// Bits of a source file: it may be executed, it holds tensors.
pub(super) const FILE_EXECUTABLE: u64 = 1;
pub(super) const FILE_TENSORS: u64 = 2;

/// What is said of each tensor, and how many tensors each joint frame has.
pub(super) struct EntryColumns<'a> {
    pub(super) kind: ColumnReader<'a>,
    pub(super) codec: ColumnReader<'a>,
    pub(super) again: ColumnReader<'a>,
    pub(super) stored: ColumnReader<'a>,
    pub(super) changed: ColumnReader<'a>,
    pub(super) prefer: ColumnReader<'a>,
    pub(super) encoding: ColumnReader<'a>,
    pub(super) base: ColumnReader<'a>,
    pub(super) members: ColumnReader<'a>,
}

impl EntryColumns<'_> {
    pub(super) fn prefer(&mut self) -> Result<Option<Prefer>> {
        match self.prefer.number()? {
            0 => Ok(None),
            1 => Ok(Some(Prefer::Speed)),
            2 => Ok(Some(Prefer::Memory)),
            other => Err(Error::corrupt(format!("prefer {other} is unknown"))),
        }
    }

    pub(super) fn encoding(&mut self) -> Result<Option<Encoding>> {
        let code = self.encoding.number()?;
        let known = Encoding::ALL.into_iter().find(|e| *e as u64 + 1 == code);
        match (code, known) {
            (0, _) => Ok(None),
            (_, Some(_)) => Ok(known),
            _ => Err(Error::corrupt(format!("encoding {code} is unknown"))),
        }
    }
}
