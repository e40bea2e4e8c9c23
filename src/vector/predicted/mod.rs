//! Tiles of `codec::predicted` at speed: tables made once a matrix, words of no dense context skipped 64 at a time. The same
//! bytes and words as the oracle's.
//!
//! | file | what |
//! |---|---|
//! | `decode`, `encode` | tiles; `backwards` the stream that an encoder writes |
//! | `count` | what is counted before tiles are encoded |
//! | `dense` | which words have a symbol each, and which changed |

mod backwards;
mod count;
mod decode;
mod dense;
mod encode;

pub(crate) use count::{count_gaps, count_steps};
pub(crate) use decode::PredictedDecoder;
pub(crate) use encode::PredictedEncoder;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::predicted::{Predictor, StepCounts, decode_predicted, encode_predicted};
    use crate::codec::word::Word;
    use crate::matrix::Dtype;
    use crate::vector::Isa;

    fn random(seed: u64) -> impl FnMut() -> u64 {
        let mut x = seed | 1;
        move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        }
    }

    /// Words of many octaves; those below a certain one change by a few steps, and one in `rare` of the others.
    fn pair<W: Word>(n: usize, rare: u64, shift: u32) -> (Vec<W>, Vec<W>) {
        let mut next = random(88_172_645_463_325_252 ^ n as u64);
        let word = |r: u64| {
            let octave = 120 - u64::from((r | 1 << 30).trailing_zeros());
            let (sign, fraction) = ((r >> 40 & 1) << (W::BITS - 1), r >> 20 & ((1 << shift) - 1));
            W::from_u64(sign | (octave << shift) & ((1 << (W::BITS - 1)) - 1) | fraction)
        };
        let base: Vec<W> = (0..n).map(|_| word(next())).collect();
        let tuned = base.iter().map(|&b| {
            let low = (b.to_u64() & ((1 << (W::BITS - 1)) - 1)) >> shift;
            let moves = low % 128 < 117 || next().is_multiple_of(rare);
            // Some far away, over zero.
            let far = if next().is_multiple_of(500) { next() } else { next() % 5 };
            if moves { b.plus(W::from_u64(far)) } else { b }
        });
        let tuned = tuned.collect();
        (base, tuned)
    }

    /// Counted, encoded and decoded as by the oracle, whole, cut and broken, on every instruction set.
    fn same_as_the_oracle<W: Word>(dtype: Dtype, base: &[W], tuned: &[W], seen: usize) {
        let n = base.len();
        let bytes = |words: &[W]| bytemuck::cast_slice::<W, u8>(words).to_vec();
        let (mut counts, mut plain) = (StepCounts::new(dtype), StepCounts::new(dtype));
        plain.add(&base[..seen], &tuned[..seen]);
        count_steps(&mut counts, &bytes(&base[..seen]), &bytes(&tuned[..seen])).unwrap();
        let (first, p, _) = plain.fit(n, n, seen == n).unwrap();
        assert_eq!(counts.fit(n, n, seen == n).unwrap().0, first);
        plain.add_gaps(&p, &base[..seen], &tuned[..seen]);
        count_gaps(&mut counts, &p, &bytes(&base[..seen]), &bytes(&tuned[..seen])).unwrap();
        let (second, p, _) = plain.fit(n, n, seen == n).unwrap();
        assert_eq!(counts.fit(n, n, seen == n).unwrap().0, second);
        let mut tile = vec![];
        let changed = encode_predicted(&p, base, tuned, &mut tile).unwrap();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut fast = vec![7];
            let encoder = PredictedEncoder::on(isa, p.clone()).unwrap();
            assert_eq!(encoder.encode(dtype, &bytes(base), &bytes(tuned), &mut fast).unwrap(), changed);
            assert!(fast[1..] == tile && fast[0] == 7, "{dtype} {n} {isa:?}");
            let decoder = PredictedDecoder::on(isa, p.clone()).unwrap();
            let mut broken = tile.clone();
            for i in 0..tile.len().min(200) {
                let (mut slow, mut quick) = (base.to_vec(), base.to_vec());
                let a = decode_predicted(&p, &broken, &mut slow);
                let given = broken.clone();
                let b = decoder.decode(dtype, &mut broken, bytemuck::cast_slice_mut(&mut quick));
                assert!(broken == given);
                assert_eq!(a.as_ref().err(), b.as_ref().err(), "{dtype} {n} {isa:?} {i}");
                assert!(a.is_err() || slow == quick);
                assert!(i > 0 || quick == tuned);
                broken.clone_from(&tile);
                match i % 3 {
                    0 => broken.truncate(i * 5 % tile.len()),
                    1 => broken.push(i as u8),
                    _ => broken[i * 7 % tile.len()] ^= 1 << (i % 8),
                }
            }
        }
    }

    #[test]
    fn tiles_are_those_of_the_oracle() {
        let sizes =
            [(1, 1), (63, 2), (64, 1), (5000, 1), (5001, 40), (70_003, 700), (300, u64::MAX), (129, 3)];
        for (n, rare) in sizes {
            for seen in [n, n / 3] {
                let (b, t) = pair::<u16>(n, rare, 7);
                same_as_the_oracle(Dtype::BF16, &b, &t, seen);
                let (b, t) = pair::<u16>(n, rare, 10);
                same_as_the_oracle(Dtype::F16, &b, &t, seen);
                let (b, t) = pair::<u32>(n, rare, 23);
                same_as_the_oracle(Dtype::F32, &b, &t, seen);
                let (b, t) = pair::<u8>(n, rare, 3);
                same_as_the_oracle(Dtype::I8, &b, &t, seen);
            }
        }
    }

    #[test]
    fn words_at_random_are_those_of_the_oracle() {
        let mut next = random(5);
        for n in [1usize, 64, 257, 3000] {
            let (base, tuned): (Vec<u32>, Vec<u32>) = (0..n).map(|_| (next() as u32, next() as u32)).unzip();
            let low = |v: &[u32]| v.iter().map(|w| *w as u16).collect::<Vec<_>>();
            same_as_the_oracle(Dtype::F32, &base, &tuned, n / 2);
            same_as_the_oracle(Dtype::BF16, &low(&base), &low(&tuned), n);
            same_as_the_oracle(Dtype::F16, &low(&base), &low(&tuned), 0);
        }
    }

    #[test]
    fn changes_that_a_predictor_has_no_code_for_are_refused() {
        // Nothing changed where the predictor was made: it has no gaps, and its one dense context knows two steps.
        let (base, mut tuned) = (vec![0x3F80u16; 1000], vec![0x3F80u16; 1000]);
        (0..500).for_each(|i| tuned[2 * i] += 1);
        let mut counts = StepCounts::new(Dtype::BF16);
        counts.add(&base, &tuned);
        let (_, p, _) = counts.fit(1000, 1000, true).unwrap();
        assert!(!p.has_gaps() && !p.dense().is_empty());
        let refused = |p: &Predictor, base: &[u16], tuned: &[u16]| {
            let fast = PredictedEncoder::new(p.clone()).unwrap();
            let (b, t) = (bytemuck::cast_slice(base), bytemuck::cast_slice(tuned));
            assert!(fast.encode(Dtype::BF16, b, t, &mut vec![]).is_err());
            assert!(encode_predicted(p, base, tuned, &mut vec![]).is_err());
        };
        let mut far = tuned.clone();
        far[7] = 0x0123;
        refused(&p, &base, &far);
        let mut other = base.clone();
        other[9] = 0x0123;
        refused(&p, &other, &tuned);
    }
}
