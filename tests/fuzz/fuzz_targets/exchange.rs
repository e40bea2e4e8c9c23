//! Exchanges: whole ones turn one version's words into the other's and back; edited and arbitrary ones, behind right sums, too, are
//! refused and leave every word as it was, or turn words that can be turned back.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use support::{Choices, bounded, edit, pair};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::vector::{exchange, exchange_apply};
use xxhash_rust::xxh3::xxh3_64;

const HEADER_BYTES: usize = 40;
/// Before what the sum of a chunk is of: its first position, its entries, the sum.
const HEAD_BYTES: usize = 24;
const DIGESTS_BYTES: usize = 32;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::of(data);
    let dtype = choices.of_list(&Dtype::ALL);
    let words = choices.below(6000);
    let (seed, dense) = (u64::from(choices.byte()), choices.byte());
    let (old, new) = pair(dtype, words, seed, dense);
    bounded(data.len() + 4 * old.len(), || {
        let shape = Shape { n: 1, k: words };
        let matrix = |words| Matrix::new(dtype, shape, words).expect("words of that shape");
        let (mut bytes, changed) = exchange(&matrix(&old), &matrix(&new)).expect("two of one shape");
        assert_eq!(changed, differing(dtype, &old, &new), "words that differ");
        let kind = choices.byte();
        let mut edited = edit(&mut bytes, &mut choices);
        if kind & 7 == 1 {
            bytes = choices.rest().to_vec();
            edited = true;
        }
        if kind & 8 == 0 {
            seal(&mut bytes, dtype.word_bytes());
        }
        turned(&bytes, &old, edited, &new);
    });
});

fn differing(dtype: Dtype, old: &[u8], new: &[u8]) -> u64 {
    let size = dtype.word_bytes();
    old.chunks_exact(size).zip(new.chunks_exact(size)).filter(|(a, b)| a != b).count() as u64
}

/// Make the sums of the chunks right, as far as there are any: past the check that finds damage.
fn seal(bytes: &mut [u8], word_bytes: usize) {
    let mut at = HEADER_BYTES;
    while let Some(head) = bytes.get(at..at + HEAD_BYTES) {
        let count = u64::from_le_bytes(head[8..16].try_into().expect("eight bytes"));
        let Some(end) = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(word_bytes + 1))
            .and_then(|entries| entries.checked_add(at + HEAD_BYTES + DIGESTS_BYTES))
            .filter(|&end| end <= bytes.len())
        else {
            return;
        };
        let sum = xxh3_64(&bytes[at + HEAD_BYTES..end]).to_le_bytes();
        bytes[at + 16..at + HEAD_BYTES].copy_from_slice(&sum);
        at = end;
    }
}

fn turned(bytes: &[u8], old: &[u8], edited: bool, new: &[u8]) {
    // Where the words of every dtype may lie.
    let mut room = vec![0u64; old.len().div_ceil(8)];
    let words = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut room)[..old.len()];
    words.copy_from_slice(old);
    let done = exchange_apply(bytes, words, false);
    if !edited {
        done.as_ref().expect("a whole exchange");
        assert!(words == new, "other words came out");
    }
    if done.is_err() {
        assert!(words == old, "what was refused has changed words");
        return;
    }
    let there = words.to_vec();
    let back = exchange_apply(bytes, words, true);
    // The digest of what the words become is looked at on the way back only.
    assert!(edited || back.is_ok(), "what was turned turns back");
    assert!(words == if back.is_ok() { old } else { &there }, "other words came back");
}
