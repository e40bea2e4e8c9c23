//! Predictors and tiles of codec `predicted`: whole ones give their words back, edited and arbitrary ones an error or other words.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use support::{Choices, bounded, edit, pair};
use xorz::codec::predicted::{Predictor, StepCounts, decode_predicted, encode_predicted, predictable};
use xorz::codec::word::Word;
use xorz::matrix::Dtype;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::of(data);
    let dtype = choices.of_list(&Dtype::ALL);
    let words = 1 + choices.below(6000);
    let (seed, dense) = (u64::from(choices.byte()), choices.byte());
    let (base, tuned) = pair(dtype, words, seed, dense);
    bounded(data.len() + 4 * base.len(), || {
        if !predictable(dtype) {
            assert!(Predictor::read(dtype, words, choices.rest()).is_err(), "a predictor of {dtype}");
            return;
        }
        match dtype.word_bytes() {
            1 => tile::<u8>(dtype, &base, &tuned, &mut choices),
            2 => tile::<u16>(
                dtype,
                &each(&base, u16::from_le_bytes),
                &each(&tuned, u16::from_le_bytes),
                &mut choices,
            ),
            _ => tile::<u32>(
                dtype,
                &each(&base, u32::from_le_bytes),
                &each(&tuned, u32::from_le_bytes),
                &mut choices,
            ),
        }
    });
});

fn each<const N: usize, W>(bytes: &[u8], word: fn([u8; N]) -> W) -> Vec<W> {
    bytes.as_chunks::<N>().0.iter().map(|b| word(*b)).collect()
}

fn tile<W: Word + PartialEq>(dtype: Dtype, base: &[W], tuned: &[W], choices: &mut Choices<'_>) {
    let mut counts = StepCounts::new(dtype);
    let seen = if choices.byte() & 1 == 0 { base.len() } else { choices.below(base.len()) };
    let whole = seen == base.len();
    counts.add(&base[..seen], &tuned[..seen]);
    let (_, first, _) = counts.fit(base.len(), base.len(), whole).expect("any counts fit");
    counts.add_gaps(&first, &base[..seen], &tuned[..seen]);
    let (mut bytes, predictor, _) = counts.fit(base.len(), base.len(), whole).expect("any counts fit");
    let mut coded = Vec::new();
    encode_predicted(&predictor, base, tuned, &mut coded).expect("what was fitted for all words codes any");
    if choices.byte() & 7 == 1 {
        bytes = choices.bytes(96).to_vec();
    }
    let (other, foreign) = (edit(&mut bytes, choices), edit(&mut coded, choices));
    let Ok(read) = Predictor::read(dtype, base.len(), &bytes) else { return };
    let mut out = base.to_vec();
    let done = decode_predicted(&read, &coded, &mut out);
    if !other && !foreign && bytes.len() > 96 {
        done.expect("a whole tile decodes");
        assert!(out == tuned, "other words came back");
    }
}
