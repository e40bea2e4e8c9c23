//! Byte planes: the first bytes of all words, then the second ones, and so on. The bytes of one plane are alike, so zstd
//! finds more in them.

/// `base XOR fine_tuned` into `out`.
pub(crate) fn xor(base: &[u8], fine_tuned: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.extend(base.iter().zip(fine_tuned).map(|(b, f)| b ^ f));
}

/// Put the planes of `words` into `out`.
pub(crate) fn split(words: &[u8], word_bytes: usize, out: &mut Vec<u8>) {
    out.clear();
    out.resize(words.len(), 0);
    let count = words.len() / word_bytes;
    for (plane, out) in out.chunks_exact_mut(count.max(1)).enumerate() {
        match word_bytes {
            2 => gather::<2>(words, out, plane),
            4 => gather::<4>(words, out, plane),
            8 => gather::<8>(words, out, plane),
            _ => out.copy_from_slice(words),
        }
    }
}

/// One plane of words of `W` bytes.
fn gather<const W: usize>(words: &[u8], out: &mut [u8], plane: usize) {
    let (words, _) = words.as_chunks::<W>();
    out.iter_mut().zip(words).for_each(|(o, w)| *o = w[plane]);
}

/// XOR what planes hold into `words`: `planes` are of the words from `first` of a frame of `total` words on.
pub(crate) fn apply(planes: &[u8], total: usize, first: usize, words: &mut [u8], word_bytes: usize) {
    match word_bytes {
        1 => words.iter_mut().zip(&planes[first..]).for_each(|(o, p)| *o ^= p),
        2 => {
            let n = words.len() / 2;
            let (low, high) = (&planes[first..][..n], &planes[total + first..][..n]);
            let (words, _) = words.as_chunks_mut::<2>();
            words.iter_mut().zip(low.iter().zip(high)).for_each(|(w, (l, h))| *w = [w[0] ^ l, w[1] ^ h]);
        }
        w => {
            let n = words.len() / w;
            if n == 0 {
                return;
            }
            for (plane, planes) in planes.chunks_exact(total).enumerate() {
                let planes = &planes[first..][..n];
                words[plane..].iter_mut().step_by(w).zip(planes).for_each(|(o, p)| *o ^= p);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_put_back_any_part_of_the_words() {
        for w in [1usize, 2, 4, 8] {
            let total = 301;
            let ft: Vec<u8> = (0..total * w).map(|i| (i * 31 % 253) as u8).collect();
            let base: Vec<u8> = (0..total * w).map(|i| (i * 17 % 241) as u8).collect();
            let (mut planes, mut difference) = (vec![], vec![]);
            xor(&base, &ft, &mut difference);
            split(&difference, w, &mut planes);
            for (from, to) in [(0, total), (3, 50), (200, 301), (7, 7)] {
                let mut words = base[from * w..to * w].to_vec();
                apply(&planes, total, from, &mut words, w);
                assert_eq!(words, ft[from * w..to * w], "{w} {from}..{to}");
            }
        }
    }
}
