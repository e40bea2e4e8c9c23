//! Joint frames, read: those used last are kept, since tensors are mostly read one after the other.

use super::blob::compare_check;
use super::container::SafeTensors;
use super::frames::check_frame;
use super::record::{Entry, JointFrame};
use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// The words of a frame, by its number.
type JointWords = (usize, Arc<Vec<u8>>);

/// Frames by their numbers.
#[derive(Debug)]
pub(super) struct JointReader {
    frames: Vec<JointFrame>,
    kept: Mutex<Vec<JointWords>>,
}

impl JointReader {
    const KEPT: usize = 4;

    pub(super) fn new(frames: Vec<JointFrame>) -> Self {
        Self { frames, kept: Mutex::default() }
    }

    /// All words of the frame that `e` is in, and where its own begin.
    pub(super) fn words(&self, container: &SafeTensors, e: &Entry) -> Result<(Arc<Vec<u8>>, usize)> {
        let missing = || Error::internal("no joint frame");
        let (index, at) = e.joint.ok_or_else(missing)?;
        let at = usize::try_from(at).map_err(|_| missing())?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = kept.iter().position(|(k, _)| *k == index) {
            kept[i..].rotate_left(1);
        } else {
            let words = Arc::new(inflate(container, self.frames.get(index).ok_or_else(missing)?)?);
            if kept.len() == Self::KEPT {
                kept.remove(0);
            }
            kept.push((index, words));
        }
        kept.last().map(|(_, words)| (Arc::clone(words), at)).ok_or_else(missing)
    }
}

/// The bounds of `frame` were checked with the table.
fn inflate(container: &SafeTensors, frame: &JointFrame) -> Result<Vec<u8>> {
    let within = |e: Error| e.within("its joint frame");
    compare_check(container, frame.range.clone(), Some(frame.check)).map_err(within)?;
    let mut stored = vec![0; (frame.range.end - frame.range.start) as usize];
    container.read_at(frame.range.start, &mut stored)?;
    check_frame(&stored, frame.bytes).map_err(within)?;
    let words = zstd::bulk::decompress(&stored, frame.bytes as usize);
    let words = words.map_err(|e| within(Error::corrupt(format!("zstd: {e}"))))?;
    if words.len() as u64 != frame.bytes {
        return Err(within(Error::corrupt(format!("gave {} bytes instead of {}", words.len(), frame.bytes))));
    }
    Ok(words)
}
