//! Tiles decoded: four words at a time while all are dense or their places are known, the lanes in registers.
//!
//! **Floor.** A word of a dense context is decoded by about 25 operations: 3 for where its context's states begin, 3 to look
//! up the state, 9 to part its bits, 5 for the step, 1 to keep it; half of 8 to get at new bits (of words of at most two
//! bytes two symbols take 56 bits at most, and there are 57); 2 for the step on vectors. At 4.5 a cycle that is 6 cycles. A
//! lane waits 16 cycles for itself (state, bits taken, new bits, next state), four lanes in turn 4 a word.

use super::dense::{DensePlaces, DenseWords, HEADS, heads};
use crate::codec::predicted::bits::BitReader;
use crate::codec::predicted::step::{ESCAPE, number_of, step_of, stepped};
use crate::codec::predicted::table::State;
use crate::codec::predicted::{LANES, Predictor};
use crate::codec::word::{Word, with_word};
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use crate::vector::bits::{BitTask, Masks, RUN};
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::simd::Simd;

/// Says of a head that words of it never change.
const NEVER: u32 = 1 << 31;

/// Decodes the tiles of one matrix.
pub(crate) struct PredictedDecoder {
    isa: Isa,
    predictor: Predictor,
    states: Vec<WideState>,
    /// By the head of a word: where the states of its context begin, or [`NEVER`].
    begin: [u32; HEADS],
}

/// A state with its step in one number: the bits that it takes in all (6 bits), from bit 8 on those of them that are the next
/// state's (4), from bit 16 on the next state without them (12), at bit 31 whether the step is negative, from bit 32 on
/// its magnitude without the raw bits.
#[derive(Clone, Copy, Default)]
struct WideState(u64);

impl WideState {
    fn new(state: State, start: u32, negative: bool) -> Self {
        let (next, bits, raw) = state.parts();
        let low = (bits + raw) | bits << 8 | next << 16 | u32::from(negative) << 31;
        Self(u64::from(low) | u64::from(start) << 32)
    }

    /// Bits that it takes in all.
    #[inline(always)]
    fn taken(self) -> u32 {
        self.0 as u32 & 63
    }

    /// The next state, and the step (of a gap: its words), by the stream's next bits.
    #[inline(always)]
    fn leave(self, bits: u64) -> (u32, u32) {
        let own = (self.0 >> 8) as u32 & 63;
        let raw = (bits & ((1 << self.taken()) - 1)) >> own;
        let next = ((self.0 >> 16) as u32 & 0x7FFF) + (bits & ((1 << own) - 1)) as u32;
        let negative = (self.0 as i32 >> 31) as u32;
        // Bits above a word's do not matter.
        (next, (((self.0 >> 32) as u32 | raw as u32) ^ negative).wrapping_sub(negative))
    }
}

/// Bytes of zeros behind a stream, so that new bits are had without a branch.
const PADDING: usize = 8;

/// Where a stream is read, lowest bit first. Beyond its end there are zeros.
#[derive(Clone, Copy)]
struct StreamAt<'a> {
    /// The stream, and [`PADDING`] zeros.
    padded: &'a [u8],
    at: usize,
}

impl StreamAt<'_> {
    /// The next bits, at least 57 of them.
    #[inline(always)]
    fn peek(&self) -> u64 {
        let from = (self.at >> 3).min(self.padded.len() - PADDING);
        self.padded[from..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)) >> (self.at & 7)
    }

    #[inline(always)]
    fn skip(&mut self, bits: u32) {
        self.at += bits as usize;
    }

    #[inline(always)]
    fn is_beyond(&self) -> bool {
        self.at > 8 * (self.padded.len() - PADDING)
    }
}

/// Take the next symbol of `states` by one lane.
#[inline(always)]
fn take(states: &[WideState], lane: &mut u32, stream: &mut StreamAt<'_>) -> u32 {
    let state = states[*lane as usize];
    let step;
    (*lane, step) = state.leave(stream.peek());
    stream.skip(state.taken());
    step
}

impl PredictedDecoder {
    /// Make the tables of `predictor`.
    ///
    /// # Errors
    /// Those of [`Isa::active`].
    pub(crate) fn new(predictor: Predictor) -> Result<Self> {
        Self::on(Isa::active()?, predictor)
    }

    /// [`PredictedDecoder::new`] on an instruction set of the caller's choice.
    pub(crate) fn on(isa: Isa, predictor: Predictor) -> Result<Self> {
        let (log, dtype) = (predictor.log(), predictor.dtype());
        let gaps = predictor.gap_context() << log;
        let wide = |(i, state): (usize, State)| {
            let symbol = usize::from(state.symbol);
            if i >= gaps {
                return WideState::new(state, number_of(symbol).1, false);
            }
            let start = with_word!(dtype, W => step_of::<W>(symbol, 0)).unsigned_abs();
            WideState::new(state, start, symbol & 1 == 1 && symbol != ESCAPE)
        };
        let states = predictor.decoding().into_iter().enumerate().map(wide).collect();
        let begin = |context: usize| if predictor.comes(context) { (context as u32) << log } else { NEVER };
        let begin = with_word!(dtype, W => heads::<W>(&predictor, begin));
        Ok(Self { isa, states, begin, predictor })
    }

    /// Decode a tile in place, as [`crate::codec::predicted::decode_predicted`] does. `tile` is as it was afterwards; it grows
    /// by a few bytes meanwhile.
    pub(crate) fn decode(&self, dtype: Dtype, tile: &mut Vec<u8>, words: &mut [u8]) -> Result<()> {
        if tile.is_empty() {
            return Ok(());
        }
        let len = tile.len();
        tile.extend_from_slice(&[0; PADDING]);
        let done = with_word!(dtype, W => {
            // Pieces of a file lie at any place.
            if let Ok(words) = bytemuck::try_cast_slice_mut::<u8, W>(words) {
                self.decode_words(tile, words)
            } else {
                let mut copy: Vec<W> = words.chunks_exact(W::BYTES).map(W::load).collect();
                self.decode_words(tile, &mut copy).map(|()| words.copy_from_slice(bytemuck::cast_slice(&copy)))
            }
        });
        tile.truncate(len);
        done
    }

    fn decode_words<W: Word>(&self, padded: &[u8], words: &mut [W]) -> Result<()> {
        on_isa!(self.isa, s => s.with_bits(DecodeTask { decoder: self, padded, words }))?
    }
}

/// One tile to be decoded.
struct DecodeTask<'a, W> {
    decoder: &'a PredictedDecoder,
    padded: &'a [u8],
    words: &'a mut [W],
}

impl<W: Word> BitTask for DecodeTask<'_, W> {
    type Out = Result<()>;

    #[inline(always)]
    fn call(self, masks: impl Masks) -> Result<()> {
        let (p, dense) = (&self.decoder.predictor, DenseWords::new::<W>(&self.decoder.predictor));
        let mut whole = BitReader::new(&self.padded[..self.padded.len() - PADDING])?;
        let mut lanes = [0; LANES];
        let mut stream = StreamAt { padded: self.padded, at: whole.at() };
        for lane in &mut lanes {
            *lane = stream.peek() as u32 & ((1 << p.log()) - 1);
            stream.skip(p.log());
        }
        let mut turn = 0;
        if !dense.is_empty() {
            turn = self.decoder.dense(dense, masks, self.words, &mut lanes, &mut stream);
        }
        if p.has_gaps() {
            lanes.rotate_left(turn % LANES);
            self.decoder.changes(self.words, dense.shift, &mut lanes, &mut stream)?;
        }
        if lanes != [0; LANES] {
            return Err(Error::corrupt(
                "a predicted tile does not end where it began: corrupt, or of another base",
            ));
        }
        whole.go_to(stream.at);
        whole.finish()
    }
}

impl PredictedDecoder {
    /// Where the states of a word's context begin.
    #[inline(always)]
    fn begin<W: Word>(&self, word: W, shift: u32) -> u32 {
        self.begin[(word.to_u64() >> shift) as usize % HEADS]
    }

    /// The dense words. Gives how many there are.
    #[inline(always)]
    fn dense<W: Word>(
        &self,
        dense: DenseWords,
        masks: impl Masks,
        words: &mut [W],
        lanes: &mut [u32; LANES],
        stream: &mut StreamAt<'_>,
    ) -> usize {
        let (mut places, mut turn) = (DensePlaces::new(), 0usize);
        let all = words.len();
        for from in (0..all).step_by(RUN) {
            let run = &mut words[from..(from + RUN).min(all)];
            let mask = dense.mask(masks, run);
            turn += mask.count_ones() as usize;
            if mask == u64::MAX
                && places.is_empty()
                && let Ok(run) = run.try_into()
            {
                self.run(run, dense.shift, lanes, stream);
                continue;
            }
            places.push::<true>(from as u32, mask);
            if places.is_full() {
                let fours = self.fours(places.list(), dense.shift, words, lanes, stream);
                places.drop_first(fours);
            }
        }
        let fours = self.fours(places.list(), dense.shift, words, lanes, stream);
        for (place, lane) in places.list()[fours..].iter().zip(lanes) {
            let word = &mut words[*place as usize];
            let begin = self.begin(*word, dense.shift) as usize;
            *word = stepped(*word, take(&self.states[begin..], lane, stream) as i32);
        }
        turn
    }

    /// Words at `places`, the first of which is the first lane's, by fours; gives how many it decoded.
    #[inline(always)]
    fn fours<W: Word>(
        &self,
        places: &[u32],
        shift: u32,
        words: &mut [W],
        lanes: &mut [u32; LANES],
        stream: &mut StreamAt<'_>,
    ) -> usize {
        let (mut now, mut at) = (*lanes, *stream);
        let (fours, _) = places.as_chunks::<LANES>();
        for four in fours {
            let old = four.map(|place| words[place as usize]);
            let steps = self.four(old, shift, &mut now, &mut at);
            for ((place, old), step) in four.iter().zip(old).zip(steps) {
                words[*place as usize] = moved(old, W::from_u64(u64::from(step)));
            }
        }
        (*lanes, *stream) = (now, at);
        LANES * fours.len()
    }

    /// 64 dense words, the first of which is the first lane's.
    #[inline(always)]
    fn run<W: Word>(
        &self,
        run: &mut [W; RUN],
        shift: u32,
        lanes: &mut [u32; LANES],
        stream: &mut StreamAt<'_>,
    ) {
        let (mut now, mut at) = (*lanes, *stream);
        let mut steps = [W::default(); RUN];
        let ((fours, _), (to, _)) = (run.as_chunks::<LANES>(), steps.as_chunks_mut::<LANES>());
        for (four, to) in fours.iter().zip(to) {
            *to = self.four(*four, shift, &mut now, &mut at).map(|step| W::from_u64(u64::from(step)));
        }
        for (word, step) in run.iter_mut().zip(steps) {
            *word = moved(*word, step);
        }
        (*lanes, *stream) = (now, at);
    }

    /// The steps of four words, one of each lane.
    #[inline(always)]
    fn four<W: Word>(
        &self,
        words: [W; LANES],
        shift: u32,
        lanes: &mut [u32; LANES],
        stream: &mut StreamAt<'_>,
    ) -> [u32; LANES] {
        let (states, mut bits) = (&self.states[..], 0);
        let mut one = |i: usize, word: W, lane: &mut u32| {
            // A symbol takes 12 bits and a word's at most.
            if i.is_multiple_of(2) || W::BITS > 16 {
                bits = stream.peek();
            }
            let state = states[(self.begin(word, shift) + *lane) as usize];
            let step;
            (*lane, step) = state.leave(bits);
            bits >>= state.taken();
            stream.skip(state.taken());
            step
        };
        let [a, b, c, d] = lanes;
        [one(0, words[0], a), one(1, words[1], b), one(2, words[2], c), one(3, words[3], d)]
    }

    /// The changed words that are not dense. The first gap is the first lane's.
    #[inline(always)]
    fn changes<W: Word>(
        &self,
        words: &mut [W],
        shift: u32,
        lanes: &mut [u32; LANES],
        stream: &mut StreamAt<'_>,
    ) -> Result<()> {
        let p = &self.predictor;
        let gaps = &self.states[p.gap_context() << p.log()..];
        let ([mut a, mut b, mut c, mut d], mut at) = (*lanes, *stream);
        let mut place = 0usize;
        // The next change, by the lane of its gap and that of its step. `None` where the tile ends.
        let mut change = |gap: &mut u32, step: &mut u32| -> Option<Result<()>> {
            if at.is_beyond() {
                return None;
            }
            place += take(gaps, gap, &mut at) as usize;
            let word = words.get_mut(place)?;
            let begin = self.begin(*word, shift);
            let Some(states) = self.states.get(begin as usize..) else { return Some(Err(never(place))) };
            *word = stepped(*word, take(states, step, &mut at) as i32);
            place += 1;
            Some(Ok(()))
        };
        while let Some(first) = change(&mut a, &mut b) {
            first?;
            let Some(second) = change(&mut c, &mut d) else { break };
            second?;
        }
        (*lanes, *stream) = ([a, b, c, d], at);
        Ok(())
    }
}

/// [`stepped`] by a step of the word's own size: the sum, mirrored below zero where it left the base's side of it.
#[inline(always)]
fn moved<W: Word>(base: W, step: W) -> W {
    let sum = base.plus(step);
    let sign = 1u64 << (W::BITS - 1);
    let crossed = (sum.to_u64() ^ base.to_u64()) & sign != 0;
    W::from_u64(if crossed { sum.to_u64() ^ (sign - 1) } else { sum.to_u64() })
}

#[cold]
fn never(place: usize) -> Error {
    Error::corrupt(format!(
        "a predicted tile changes word {place}, which never changes: corrupt, or of another base"
    ))
}
