//! Tiles of `codec::predicted` at speed: tables made once a matrix, words of no dense context skipped 64 at a time.
//! Portable code; the same bytes and words as the oracle's.

use crate::codec::predicted::bits::BitReader;
use crate::codec::predicted::step::{octave, step_of, stepped};
use crate::codec::predicted::table::{Coding, State};
use crate::codec::predicted::{Item, LANES, Predictor, StepCounts, write_items};
use crate::codec::word::{Word, with_word};
use crate::error::{Error, Result};
use crate::matrix::Dtype;

/// Words looked at together.
const RUN: usize = 64;

/// Which words are dense, as a comparison: those whose bits without the sign lie in a range.
#[derive(Clone, Copy)]
struct DenseWords {
    shift: u32,
    low: u32,
    len: u32,
    sign: u32,
    all: bool,
}

impl DenseWords {
    fn new<W: Word>(p: &Predictor) -> Self {
        let (shift, sign) = (p.shift::<W>(), 1u32 << (W::BITS - 1));
        let edge = |octave: usize| ((octave as u64) << shift).min(u64::from(sign)) as u32;
        let (low, high) = (edge(p.dense().start), edge(p.dense().end));
        Self { shift, low, len: high - low, sign, all: low == 0 && high == sign }
    }

    /// A bit for each of at most 64 words: whether it is dense.
    #[inline(always)]
    fn mask<W: Word>(&self, words: &[W]) -> u64 {
        if self.all || self.len == 0 {
            return if self.all { u64::MAX >> (RUN - words.len()) } else { 0 };
        }
        let mut flags = [0u8; RUN];
        for (flag, w) in flags.iter_mut().zip(words) {
            let place = (w.to_u64() as u32 & (self.sign - 1)).wrapping_sub(self.low);
            *flag = u8::from(place < self.len);
        }
        bits_of(&flags)
    }
}

/// The bits that 64 bytes of 0 or 1 are.
#[inline(always)]
fn bits_of(flags: &[u8; RUN]) -> u64 {
    let (eights, _) = flags.as_chunks::<8>();
    eights.iter().enumerate().fold(0, |mask, (i, eight)| {
        let byte = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask | byte << (8 * i)
    })
}

/// Decodes the tiles of one matrix.
pub(crate) struct PredictedDecoder {
    predictor: Predictor,
    states: Vec<State>,
    /// Where the states of each octave's context begin.
    begin: [u32; 256],
    /// By symbol: the step but for its raw bits, and all ones where it is to be negated.
    steps: [(u32, u32); 256],
}

/// Lanes of a tile on their way.
struct LanesAt<'a> {
    reader: BitReader<'a>,
    lanes: [u16; LANES],
    turn: usize,
}

impl LanesAt<'_> {
    #[inline(always)]
    fn next(&mut self, states: &[State]) -> (u8, u32) {
        let lane = &mut self.lanes[self.turn % LANES];
        let state = states.get(usize::from(*lane)).copied().unwrap_or_default();
        let (next, raw) = state.leave(&mut self.reader);
        (*lane, self.turn) = (next, self.turn + 1);
        (state.symbol, raw)
    }
}

impl PredictedDecoder {
    /// Make the tables of `predictor`.
    pub(crate) fn new(predictor: Predictor) -> Self {
        let log = predictor.log();
        let begin = predictor.context.map(|c| u32::from(c) << log);
        let parts = |symbol: usize| with_word!(predictor.dtype(), W => step_of::<W>(symbol, 0));
        let steps = std::array::from_fn(|symbol| match symbol {
            1 => (0, 0),
            _ => (parts(symbol.min(127)).unsigned_abs(), if symbol & 1 == 1 { u32::MAX } else { 0 }),
        });
        Self { states: predictor.decoding(), begin, steps, predictor }
    }

    /// Decode a tile in place, as [`crate::codec::predicted::decode_predicted`] does.
    pub(crate) fn decode(&self, dtype: Dtype, tile: &[u8], words: &mut [u8]) -> Result<()> {
        if tile.is_empty() {
            return Ok(());
        }
        with_word!(dtype, W => {
            // Pieces of a file lie at any place.
            if let Ok(words) = bytemuck::try_cast_slice_mut::<u8, W>(words) {
                return self.decode_words(tile, words);
            }
            let mut copy: Vec<W> = words.chunks_exact(W::BYTES).map(W::load).collect();
            self.decode_words(tile, &mut copy)?;
            words.copy_from_slice(bytemuck::cast_slice(&copy));
            Ok(())
        })
    }

    fn decode_words<W: Word>(&self, tile: &[u8], words: &mut [W]) -> Result<()> {
        let (p, dense) = (&self.predictor, DenseWords::new::<W>(&self.predictor));
        let mut at = LanesAt { reader: BitReader::new(tile)?, lanes: [0; LANES], turn: 0 };
        for lane in 0..LANES {
            at.lanes[lane] = at.reader.take(p.log()) as u16;
        }
        if dense.len > 0 {
            for run in words.chunks_mut(RUN) {
                match dense.mask(run) {
                    u64::MAX if at.turn.is_multiple_of(LANES) => self.run(run, dense.shift, &mut at),
                    u64::MAX => run.iter_mut().for_each(|w| self.word(w, dense.shift, &mut at)),
                    mut mask => {
                        while mask != 0 {
                            self.word(&mut run[mask.trailing_zeros() as usize], dense.shift, &mut at);
                            mask &= mask - 1;
                        }
                    }
                }
            }
        }
        if p.has_gaps() {
            self.changes(words, dense.shift, &mut at)?;
        }
        if at.lanes != [0; LANES] {
            return Err(Error::corrupt(
                "a predicted tile does not end where it began: corrupt, or of another base",
            ));
        }
        at.reader.finish()
    }

    #[inline(always)]
    fn word<W: Word>(&self, word: &mut W, shift: u32, at: &mut LanesAt<'_>) {
        let begin = self.begin[octave(*word, shift)] as usize;
        let (symbol, raw) = at.next(&self.states[begin..]);
        let (start, negate) = self.steps[usize::from(symbol)];
        // Bits above a word's do not matter.
        *word = stepped(*word, (((start | raw) ^ negate).wrapping_sub(negate)) as i32);
    }

    /// 64 dense words, the first of which is the first lane's: the lanes stay in registers.
    #[inline(always)]
    fn run<W: Word>(&self, run: &mut [W], shift: u32, at: &mut LanesAt<'_>) {
        let (mut lanes, mut reader) = (at.lanes, at.reader);
        let (fours, _) = run.as_chunks_mut::<LANES>();
        for four in fours {
            for (word, lane) in four.iter_mut().zip(&mut lanes) {
                let begin = self.begin[octave(*word, shift)] as usize;
                let state = self.states.get(begin + usize::from(*lane)).copied().unwrap_or_default();
                let (next, raw) = state.leave(&mut reader);
                *lane = next;
                let (start, negate) = self.steps[usize::from(state.symbol)];
                *word = stepped(*word, (((start | raw) ^ negate).wrapping_sub(negate)) as i32);
            }
        }
        (at.lanes, at.reader, at.turn) = (lanes, reader, at.turn + RUN);
    }

    /// The changed words that are not dense.
    fn changes<W: Word>(&self, words: &mut [W], shift: u32, at: &mut LanesAt<'_>) -> Result<()> {
        let p = &self.predictor;
        let gaps = &self.states[p.gap_context() << p.log()..];
        let mut place = 0usize;
        while !at.reader.is_beyond() {
            let (symbol, raw) = at.next(gaps);
            place += (crate::codec::predicted::step::number_of(usize::from(symbol)).1 | raw) as usize;
            let Some(word) = words.get_mut(place) else { break };
            if !p.comes(usize::from(p.context[octave(*word, shift)])) {
                return Err(Error::corrupt(format!(
                    "a predicted tile changes word {place}, which never changes: corrupt, or of another base"
                )));
            }
            self.word(word, shift, at);
            place += 1;
        }
        Ok(())
    }
}

/// Count the steps of words given as bytes.
pub(crate) fn count_steps(counts: &mut StepCounts, base: &[u8], fine_tuned: &[u8]) {
    with_word!(counts.dtype(), W => with_words::<W, _>(base, fine_tuned, |b, f| counts.add(b, f)));
}

/// Count the gaps of a tile given as bytes.
pub(crate) fn count_gaps(counts: &mut StepCounts, p: &Predictor, base: &[u8], fine_tuned: &[u8]) {
    with_word!(p.dtype(), W => with_words::<W, _>(base, fine_tuned, |b, f| counts.add_gaps(p, b, f)));
}

/// Both as words: in place where they lie as words must, else copied.
fn with_words<W: Word, T>(base: &[u8], fine_tuned: &[u8], work: impl FnOnce(&[W], &[W]) -> T) -> T {
    let copied = |bytes: &[u8]| bytes.chunks_exact(W::BYTES).map(W::load).collect::<Vec<W>>();
    match (bytemuck::try_cast_slice::<u8, W>(base), bytemuck::try_cast_slice::<u8, W>(fine_tuned)) {
        (Ok(b), Ok(f)) => work(b, f),
        _ => work(&copied(base), &copied(fine_tuned)),
    }
}

/// Encodes the tiles of one matrix.
pub(crate) struct PredictedEncoder {
    predictor: Predictor,
    coding: Vec<Coding>,
}

impl PredictedEncoder {
    /// Make the tables of `predictor`.
    pub(crate) fn new(predictor: Predictor) -> Self {
        Self { coding: predictor.coding(), predictor }
    }

    /// Append a tile, as [`crate::codec::predicted::encode_predicted`] does. Returns how many words differ.
    pub(crate) fn encode(
        &self,
        dtype: Dtype,
        base: &[u8],
        fine_tuned: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<u64> {
        with_word!(dtype, W => with_words::<W, _>(base, fine_tuned, |b, f| self.encode_words(b, f, out)))
    }

    fn encode_words<W: Word>(&self, base: &[W], fine_tuned: &[W], out: &mut Vec<u8>) -> Result<u64> {
        let (p, dense) = (&self.predictor, DenseWords::new::<W>(&self.predictor));
        let (mut items, mut rare) = (Vec::<Item>::new(), Vec::<Item>::new());
        let (mut changed, mut from) = (0u64, 0usize);
        for (i, (b, f)) in base.chunks(RUN).zip(fine_tuned.chunks(RUN)).enumerate() {
            let same = bytemuck::cast_slice::<W, u8>(b) == bytemuck::cast_slice::<W, u8>(f);
            let mut mask = dense.mask(b);
            let differ = if same { 0 } else { differing(b, f) };
            changed += u64::from(differ.count_ones());
            let mut others = differ & !mask;
            while mask != 0 {
                let j = mask.trailing_zeros() as usize;
                items.push(p.item(b[j], f[j], dense.shift));
                mask &= mask - 1;
            }
            while others != 0 {
                let j = others.trailing_zeros() as usize;
                let place = i * RUN + j;
                rare.extend([p.gap(place - from), p.item(b[j], f[j], dense.shift)]);
                from = place + 1;
                others &= others - 1;
            }
        }
        if changed == 0 {
            return Ok(0);
        }
        items.append(&mut rare);
        if p.has_gaps() {
            items.push(p.gap(base.len() - from));
        }
        write_items(p.log(), &self.coding, &items, out)?;
        Ok(changed)
    }
}

/// A bit for each of at most 64 words: whether it changed.
#[inline(always)]
fn differing<W: Word>(base: &[W], fine_tuned: &[W]) -> u64 {
    let mut flags = [0u8; RUN];
    flags.iter_mut().zip(base.iter().zip(fine_tuned)).for_each(|(flag, (b, f))| *flag = u8::from(b != f));
    bits_of(&flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::predicted::{decode_predicted, encode_predicted};

    /// bf16 words of many octaves; those below a certain one change by a few steps, and one in `rare` of the others.
    fn pair(n: usize, rare: u64) -> (Vec<u16>, Vec<u16>) {
        let mut x = 88_172_645_463_325_252u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        let word = |r: u64| {
            ((r & 1) << 15 | (120 - u64::from((r | 1 << 30).trailing_zeros())) << 7 | r >> 57) as u16
        };
        let base: Vec<u16> = (0..n).map(|_| word(next())).collect();
        let tuned = base.iter().map(|&b| {
            let moves = (b & 0x7FFF) >> 7 < 117 || next() % rare == 0;
            if moves { b.wrapping_add((next() % 5) as u16) } else { b }
        });
        let tuned = tuned.collect();
        (base, tuned)
    }

    #[test]
    fn tiles_are_those_of_the_oracle() {
        for (n, rare) in [(1, 1), (63, 2), (64, 1), (5000, 1), (5001, 40), (70_003, 700), (300, u64::MAX)] {
            let (base, tuned) = pair(n, rare);
            let mut counts = StepCounts::new(Dtype::BF16);
            counts.add(&base, &tuned);
            let (_, p, _) = counts.fit(n, n, true).unwrap();
            counts.add_gaps(&p, &base, &tuned);
            let (_, p, _) = counts.fit(n, n, true).unwrap();
            let (mut plain, mut fast) = (vec![], vec![]);
            let changed = encode_predicted(&p, &base, &tuned, &mut plain).unwrap();
            let (b, f) = (bytemuck::cast_slice::<u16, u8>(&base), bytemuck::cast_slice::<u16, u8>(&tuned));
            let encoder = PredictedEncoder::new(p.clone());
            assert_eq!(encoder.encode(Dtype::BF16, b, f, &mut fast).unwrap(), changed);
            assert_eq!(plain, fast);
            let (decoder, mut broken) = (PredictedDecoder::new(p.clone()), plain.clone());
            // Whole, cut and broken tiles: the same words, or an error from both.
            for i in 0..plain.len().min(300) {
                let (mut slow, mut quick) = (base.clone(), base.clone());
                let a = decode_predicted(&p, &broken, &mut slow);
                let b = decoder.decode(Dtype::BF16, &broken, bytemuck::cast_slice_mut(&mut quick));
                assert_eq!(a.is_ok(), b.is_ok(), "{n} {i}");
                assert!(a.is_err() || slow == quick);
                assert!(i > 0 || quick == tuned);
                broken.clone_from(&plain);
                broken[i * 7 % plain.len()] ^= 1 << (i % 8);
            }
        }
    }
}
