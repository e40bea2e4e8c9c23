//! What the targets share: choices made of the fuzzer's bytes, edits of good bytes into bad ones, and the bounds that no input
//! may break: a second of this thread's time, and ten times what it holds in memory.

#![allow(dead_code, reason = "no target needs all of it")]

#[path = "../../../rust/common/counting.rs"]
pub mod counting;
#[path = "../../../rust/common/seal.rs"]
pub mod seal;

use std::path::PathBuf;
use std::time::Duration;
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, encode_as};

/// What buffers of a fixed size may take, whatever the input.
const FIXED_BYTES: usize = 24 << 20;

/// Numbers that arithmetic goes wrong at.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    15,
    16,
    255,
    65_536,
    1 << 24,
    (1 << 31) - 1,
    1 << 32,
    1 << 44,
    i64::MAX as u64,
    u64::MAX - 63,
    u64::MAX,
];

/// The fuzzer's bytes, read as choices. Where there are no more, everything is 0.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    pub fn of(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// The next bytes, `len` of them or as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        let wide = u32::from_le_bytes([self.byte(), if end > 256 { self.byte() } else { 0 }, 0, 0]);
        wide as usize % end
    }

    pub fn of_list<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// A number of any size: an edge, or one near `good`.
    pub fn number(&mut self, good: u64) -> u64 {
        match self.byte() {
            how @ 0..14 => EDGES[usize::from(how)],
            14..=20 => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
            21..=40 => good.wrapping_add(u64::from(self.byte())).wrapping_sub(128),
            _ => good,
        }
    }
}

/// Numbers without the fuzzer's bytes: xorshift.
pub fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    }
}

/// Base and fine-tuned words as training leaves them: `dense` 0 to 255 is how many change.
pub fn pair(dtype: Dtype, words: usize, seed: u64, dense: u8) -> (Vec<u8>, Vec<u8>) {
    let (w, mut next) = (dtype.word_bytes(), noise(seed));
    let mut base = Vec::with_capacity(words * w);
    for _ in 0..words {
        let mut word = next().to_le_bytes();
        // Exponents of weights, where words have any: a few octaves below 1.
        match dtype {
            Dtype::F32 | Dtype::BF16 => word[w - 1] = 0x3C + (word[w - 1] & 0x83),
            Dtype::F16 => word[1] = 0x28 + (word[1] & 0x87),
            _ => {}
        }
        base.extend_from_slice(&word[..w]);
    }
    let mut tuned = base.clone();
    for word in tuned.chunks_exact_mut(w) {
        let roll = next();
        if roll as u8 <= dense && dense > 0 {
            word[0] = word[0].wrapping_add(if roll >> 8 & 1 == 0 { 1 } else { 255 });
        }
        if roll >> 20 & 0x3FF == 0 && dense > 3 {
            word[w - 1] ^= 0x80 | (roll >> 40) as u8;
        }
    }
    (base, tuned)
}

/// The resident delta of a pair in one encoding.
pub fn delta(dtype: Dtype, shape: Shape, base: &[u8], tuned: &[u8], encoding: Encoding) -> Vec<u8> {
    let matrix = |words| Matrix::new(dtype, shape, words).expect("words of that shape");
    let mut pair = Pair::new(matrix(base), matrix(tuned)).expect("two of one shape");
    encode_as(&mut pair, encoding).expect("every pair has a delta")
}

/// Change good bytes as the choices say, until there are none or they say so. Whether anything changed.
pub fn edit(bytes: &mut Vec<u8>, choices: &mut Choices<'_>) -> bool {
    let before = bytes.clone();
    for _ in 0..16 {
        if choices.is_empty() || bytes.is_empty() {
            break;
        }
        let at = choices.below(bytes.len().min(65_536));
        let len = bytes.len();
        match choices.byte() {
            0 => break,
            1..=60 => bytes[at] = choices.byte(),
            61..=120 => bytes[at] ^= 1 << (choices.byte() & 7),
            121..=170 => {
                let at = at & !7;
                if at + 8 <= len {
                    let old = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
                    bytes[at..at + 8].copy_from_slice(&choices.number(old).to_le_bytes());
                }
            }
            171..=190 => bytes.truncate(at),
            191..=210 => bytes.extend_from_slice(choices.bytes(1 + at % 64)),
            211..=230 => {
                let end = (at + 1 + choices.below(64)).min(len);
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + 1 + choices.below(64)).min(len);
                let part = bytes[at..end].to_vec();
                let to = choices.below(len.min(65_536));
                bytes.splice(to..to, part);
            }
        }
    }
    *bytes != before
}

/// Do `work` on what takes `given` bytes in all: the input, a base, an output. It may take a second of this thread's time and ten
/// times that memory, beside what is fixed.
pub fn bounded<T>(given: usize, work: impl FnOnce() -> T) -> T {
    let start = thread_time();
    let (made, held) = counting::held_by(work);
    let took = thread_time().saturating_sub(start);
    assert!(held.most <= 10 * given + FIXED_BYTES, "{} bytes held for {given} given", held.most);
    assert!(took < Duration::from_secs(1), "{took:?} for {given} bytes");
    made
}

/// The processor time of this thread: others on the machine must not make an input look slow.
fn thread_time() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a place for one time.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// A folder of this process's own, made once; the fuzzer's own processes each have another.
pub fn folder() -> PathBuf {
    // Of one length, so that an edit of a text that names it means the same in each process.
    let path = std::env::temp_dir().join(format!("xorz-fuzz-{:010}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a temporary folder");
    path
}
