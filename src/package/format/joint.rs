//! Joint frames: the XOR words of small tensors one after the other, in one zstd frame. A frame of its own costs a tensor of
//! a few words more than what changed in it; a share of one costs it next to nothing.

use super::frames::{MAX_RATIO, compress};
use super::record::{Entry, JointFrame, check_of};
use crate::error::{Error, Result};
use crate::package::io::spool::Spool;
use crate::package::options::Codec;

/// The largest tensor that goes into one, in bytes.
pub(crate) const JOINT_TENSOR: usize = 4096;
/// Bytes of words that writers put into one: a tensor is read alone at the cost of so many.
const JOINT_BYTES: usize = 64 << 10;
/// Higher levels find no more.
const JOINT_LEVEL: i32 = 10;

/// Small tensors that wait for a frame to be full.
#[derive(Debug, Default)]
pub(super) struct JointWriter {
    words: Vec<u8>,
    /// The frame that each would have for itself, one after the other.
    own: Vec<u8>,
    /// Where the tensor is among the entries, and the bytes of its own frame.
    waiting: Vec<(usize, usize)>,
}

impl JointWriter {
    /// Whether so many bytes more fit in.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.words.len() + bytes <= JOINT_BYTES
    }

    /// Add entry `index`, of the XOR words `words`, whose own frame would be `own`.
    pub(super) fn push(&mut self, index: usize, words: &[u8], own: &[u8]) {
        self.words.extend_from_slice(words);
        self.own.extend_from_slice(own);
        self.waiting.push((index, own.len()));
    }

    /// Append what waits: one frame, or each tensor's own where these are smaller together. Completes the entries.
    pub(super) fn flush(
        &mut self,
        to: &mut Spool,
        entries: &mut [Entry],
        joints: &mut Vec<JointFrame>,
    ) -> Result<()> {
        let Self { words, own, waiting } = std::mem::take(self);
        if waiting.is_empty() {
            return Ok(());
        }
        let frame = compress(&words, JOINT_LEVEL)?;
        let start = to.len();
        let joint = frame.len() <= own.len() && words.len() as u64 / MAX_RATIO <= frame.len() as u64;
        to.append(if joint { &frame } else { &own })?;
        let (mut before, mut at) = (0u64, 0u64);
        // A share is in proportion to what the tensor's own frame takes, and so no larger than that.
        let share = |before: u64| match joint {
            true => start + before * frame.len() as u64 / own.len() as u64,
            false => start + before,
        };
        for (index, bytes) in waiting {
            let entry = entries.get_mut(index).ok_or_else(|| Error::internal("no entry of a joint frame"))?;
            let after = before + bytes as u64;
            entry.range = share(before)..share(after);
            entry.stored_bytes = entry.range.end - entry.range.start;
            if joint {
                (entry.codec, entry.joint) = (Codec::Joint, Some((joints.len(), at)));
            } else {
                entry.codec = Codec::Xor;
                entry.check = check_of(&own[before as usize..after as usize]);
            }
            (before, at) = (after, at + entry.bytes);
        }
        if joint {
            let (range, bytes) = (start..to.len(), words.len() as u64);
            joints.push(JointFrame { range, bytes, check: check_of(&frame) });
        }
        Ok(())
    }
}
