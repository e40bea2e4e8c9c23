//! Promise: tiles of `codec::predicted` give back exactly their words, whatever the words; they are about as small as the
//! entropy of the changes given the base; broken ones are an error or other words, and cost no more than whole ones.

use proptest::prelude::*;
use xorz::codec::predicted::{Predictor, StepCounts, decode_predicted, encode_predicted};
use xorz::codec::word::Word;
use xorz::error::Kind;
use xorz::matrix::Dtype;

/// A predictor's bytes and a tile of all words, by a predictor of those that `seen` says.
fn coded<W: Word>(dtype: Dtype, base: &[W], tuned: &[W], seen: usize) -> (Vec<u8>, Vec<u8>) {
    let mut counts = StepCounts::new(dtype);
    counts.add(&base[..seen], &tuned[..seen]);
    let whole = seen == base.len();
    let (_, first, _) = counts.fit(base.len(), base.len(), whole).unwrap();
    counts.add_gaps(&first, &base[..seen], &tuned[..seen]);
    let (bytes, predictor, _) = counts.fit(base.len(), base.len(), whole).unwrap();
    let mut tile = vec![];
    let changed = encode_predicted(&predictor, base, tuned, &mut tile).unwrap();
    assert_eq!(changed, base.iter().zip(tuned).filter(|(b, t)| b != t).count() as u64);
    (bytes, tile)
}

fn comes_back<W: Word>(dtype: Dtype, base: &[W], tuned: &[W]) {
    // A predictor that saw few of the words or none must code the others all the same.
    for seen in [base.len(), base.len() / 3, 0] {
        let (bytes, tile) = coded(dtype, base, tuned, seen);
        let predictor = Predictor::read(dtype, base.len(), &bytes).unwrap();
        let mut words = base.to_vec();
        decode_predicted(&predictor, &tile, &mut words).unwrap();
        assert!(words == tuned, "{dtype} {} words, {seen} seen", base.len());
    }
}

/// Numbers without a seed of their own: xorshift.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    }
}

/// Words about as weights are, `share` of them changed by steps below `2^bits`.
fn weights<W: Word>(n: usize, shift: u32, share: f64, bits: u32) -> (Vec<W>, Vec<W>) {
    let mut next = random(n as u64 * 31 + u64::from(bits));
    let base: Vec<W> = (0..n)
        .map(|_| {
            let octave = 110 - u64::from((next() | 1 << 40).trailing_zeros().min(20));
            let sign = (next() & 1) << (W::BITS - 1);
            W::from_u64(sign | (octave << shift) & (sign_bit::<W>() - 1) | next() & ((1 << shift) - 1))
        })
        .collect();
    let tuned = base.iter().map(|b| {
        let far = (next() % (1 << bits)) + 1;
        if (next() >> 11) as f64 / 2f64.powi(53) < share { b.plus(W::from_u64(far)) } else { *b }
    });
    let tuned = tuned.collect();
    (base, tuned)
}

const fn sign_bit<W: Word>() -> u64 {
    1 << (W::BITS - 1)
}

#[test]
fn words_of_every_share_of_changes_come_back() {
    for n in [1, 2, 31, 64, 65, 1000, 70_001] {
        for share in [0.0, 0.0005, 0.01, 0.3, 1.0] {
            let (b, t) = weights::<u16>(n, 7, share, 5);
            comes_back(Dtype::BF16, &b, &t);
            let (b, t) = weights::<u16>(n, 10, share, 14);
            comes_back(Dtype::F16, &b, &t);
            let (b, t) = weights::<u32>(n, 23, share, 30);
            comes_back(Dtype::F32, &b, &t);
            let (b, t) = weights::<u8>(n, 3, share, 7);
            comes_back(Dtype::U8, &b, &t);
        }
    }
}

#[test]
fn special_words_come_back() {
    let words: Vec<u16> =
        vec![0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F81, 0x3F80];
    let base: Vec<u16> = words.iter().flat_map(|w| vec![*w; words.len()]).collect();
    let tuned: Vec<u16> = words.iter().flat_map(|_| words.clone()).collect();
    comes_back(Dtype::BF16, &base, &tuned);
    comes_back(Dtype::F16, &base, &tuned);
    comes_back(Dtype::I16, &base, &tuned);
    let wide = |v: &[u16]| v.iter().map(|w| u32::from(*w) << 16 | u32::from(*w)).collect::<Vec<_>>();
    comes_back(Dtype::F32, &wide(&base), &wide(&tuned));
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let turned: Vec<u16> = all.iter().map(|w| w.wrapping_mul(40_503)).collect();
    comes_back(Dtype::BF16, &all, &turned);
    comes_back::<u16>(Dtype::BF16, &[], &[]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_words_come_back(pairs in prop::collection::vec((any::<u32>(), any::<u32>(), 0u32..4), 0..400)) {
        let base: Vec<u32> = pairs.iter().map(|p| p.0).collect();
        let tuned: Vec<u32> = pairs.iter().map(|p| if p.2 == 0 { p.1 } else { p.0 ^ (p.1 & p.2 >> 1) }).collect();
        comes_back(Dtype::F32, &base, &tuned);
        let low = |v: &[u32]| v.iter().map(|w| *w as u16).collect::<Vec<_>>();
        comes_back(Dtype::F16, &low(&base), &low(&tuned));
        let low = |v: &[u32]| v.iter().map(|w| *w as u8).collect::<Vec<_>>();
        comes_back(Dtype::I8, &low(&base), &low(&tuned));
    }
}

/// 400,000 words, of which those of one octave in three change by 1 of 8 equally likely steps: the bits are counted with
/// nothing but logarithms.
#[test]
fn a_tile_takes_little_more_than_the_entropy_of_its_changes() {
    let (base, _) = weights::<u16>(400_000, 7, 0.0, 1);
    let mut next = random(77);
    let small = |b: u16| (b & 0x7FFF) >> 7 < 108;
    let tuned: Vec<u16> = base.iter().map(|b| if small(*b) { b + (next() % 8) as u16 } else { *b }).collect();
    let least = 3.0 / 8.0 * base.iter().filter(|b| small(**b)).count() as f64;
    let (predictor, tile) = coded(Dtype::BF16, &base, &tuned, base.len());
    let took = (predictor.len() + tile.len()) as f64;
    // The numbers 4 to 7 are two symbols with a raw bit each; steps over an octave's edge change nothing here.
    assert!(took >= least && took < least * 1.01 + 100.0, "{took} bytes, where {least} are the least");
}

#[test]
fn broken_bytes_are_refused_or_give_other_words() {
    let (base, tuned) = weights::<u16>(3000, 7, 0.2, 6);
    let (bytes, tile) = coded(Dtype::BF16, &base, &tuned, base.len());
    let predictor = Predictor::read(Dtype::BF16, base.len(), &bytes).unwrap();
    let mut refused = 0;
    let mut attempt = |p: &Predictor, tile: &[u8], base: &[u16]| {
        let mut words = base.to_vec();
        match decode_predicted(p, tile, &mut words) {
            Ok(()) => assert!(words != tuned || tile.is_empty()),
            Err(e) => {
                assert!(matches!(e.kind(), Kind::Corrupt | Kind::Truncated), "{e}");
                refused += 1;
            }
        }
    };
    for i in 0..tile.len() {
        let mut broken = tile.clone();
        broken[i] ^= 1 << (i % 8);
        attempt(&predictor, &broken, &base);
        attempt(&predictor, &tile[..i], &base);
        attempt(&predictor, &[&tile[..], &tile[i..]].concat(), &base);
    }
    // Another base of the same shape.
    attempt(&predictor, &tile, &tuned);
    attempt(&predictor, &tile, &vec![0; base.len()]);
    assert!(refused > 2 * tile.len(), "only {refused} of {} are refused", 3 * tile.len());
    let mut next = random(5);
    for i in 0..20_000usize {
        let mut broken = bytes.clone();
        let at = next() as usize % broken.len();
        broken[at] ^= next() as u8;
        broken.truncate(if i % 3 == 0 { at + 1 } else { broken.len() });
        match Predictor::read(Dtype::BF16, base.len(), &broken) {
            Ok(p) if i % 16 == 0 => {
                let mut words = base.clone();
                let _ = decode_predicted(&p, &tile, &mut words);
            }
            Ok(_) => {}
            Err(e) => assert!(matches!(e.kind(), Kind::Corrupt | Kind::Truncated), "{e}"),
        }
    }
}

#[test]
fn a_predictor_is_no_larger_than_its_words_earn() {
    let (base, tuned) = weights::<u16>(3000, 7, 0.2, 6);
    let (bytes, _) = coded(Dtype::BF16, &base, &tuned, base.len());
    assert!(Predictor::read(Dtype::BF16, 100, &bytes).is_err(), "2^8 states for 100 words");
    assert_eq!(Predictor::read(Dtype::F64, 3000, &bytes).unwrap_err().kind(), Kind::Unsupported);
    assert!(Predictor::read(Dtype::BF16, 3000, &[]).is_err());
    let (base, tuned) = weights::<u16>(3000, 7, 0.2, 13);
    let (bytes, _) = coded(Dtype::BF16, &base, &tuned, base.len());
    assert!(Predictor::read(Dtype::U8, 3000, &bytes).is_err(), "symbols that words of a byte do not have");
}

fn golden() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/predicted_tile.bin")
}

/// What the file holds: base words, fine-tuned words, predictor and tile, each behind its length in bytes (`u32`).
#[test]
fn a_tile_written_once_is_read_for_good() {
    let file = std::fs::read(golden()).unwrap();
    let (mut parts, mut rest) = (vec![], &file[..]);
    while let Some((length, behind)) = rest.split_first_chunk::<4>() {
        let (part, behind) = behind.split_at(u32::from_le_bytes(*length) as usize);
        parts.push(part);
        rest = behind;
    }
    let [base, tuned, predictor, tile] = parts[..] else { panic!("{} parts", parts.len()) };
    let words = |bytes: &[u8]| bytes.chunks_exact(2).map(u16::load).collect::<Vec<_>>();
    let mut restored = words(base);
    let predictor = Predictor::read(Dtype::BF16, restored.len(), predictor).unwrap();
    decode_predicted(&predictor, tile, &mut restored).unwrap();
    assert!(restored == words(tuned) && restored.len() > 1000 && base != tuned);
}

#[test]
#[ignore = "writes the golden file, which must never change once a release has it"]
fn write_the_golden_tile() {
    let (base, mut tuned) = weights::<u16>(2000, 7, 0.05, 4);
    // Words that change often, so that some contexts are dense; and a step that the predictor has not seen.
    tuned.iter_mut().for_each(|w| *w += u16::from(*w & 0x7FFF < 107 << 7) * (1 + *w % 3));
    let (bytes, tile) = {
        let seen = 1500;
        tuned[1900] ^= 0xFFFF;
        coded(Dtype::BF16, &base, &tuned, seen)
    };
    let raw = |words: &[u16]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let mut file = vec![];
    for part in [raw(&base), raw(&tuned), bytes, tile] {
        file.extend_from_slice(&(part.len() as u32).to_le_bytes());
        file.extend_from_slice(&part);
    }
    std::fs::write(golden(), file).unwrap();
}
