//! Tiles encoded, from their last word to their first: four words at a time, the lanes in registers.
//!
//! **Floor.** A word of a dense context takes about 30 operations: 8 for its step and symbol, 5 to look up how the lane goes
//! there, 8 for the bits and the state before, 6 to put bits, half of 6 to write them: 7 cycles. A lane waits 10 cycles for
//! itself, four lanes in turn 2.5 a word.

use super::backwards::{Backwards, BackwardsAt};
use super::count::{TileChanges, with_words};
use super::dense::{DensePlaces, DenseWords, HEADS, heads};
use crate::codec::predicted::step::{ESCAPE, number, step};
use crate::codec::predicted::{LANES, Predictor, unknown};
use crate::codec::word::{Word, with_word};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::vector::bits::{BitTask, Masks, RUN};
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::simd::Simd;

/// Symbols of a context, rounded up.
const SYMBOLS: usize = 128;
/// Says of a symbol that it never comes: no state is there.
const UNKNOWN: u32 = 1 << 31;

/// Encodes the tiles of one matrix.
pub(crate) struct PredictedEncoder {
    isa: Isa,
    predictor: Predictor,
    /// By context and symbol; those of gaps come last.
    symbols: Vec<SymbolCode>,
    /// Where the symbols of the context of each head begin.
    begin: [u32; HEADS],
    /// The states of all contexts, each plus their number.
    states: Vec<u16>,
    /// How many states a context has.
    size: u32,
}

/// How an encoder comes to a state: in state `x`, counted from the number of states on, a symbol takes
/// `(x + delta) >> 16` bits, and the state before is at `(x >> bits) + first`.
#[derive(Clone, Copy)]
struct SymbolCode {
    delta: u32,
    first: u32,
}

impl PredictedEncoder {
    /// Make the tables of `predictor`.
    ///
    /// # Errors
    /// Those of [`Isa::active`].
    pub(crate) fn new(predictor: Predictor) -> Result<Self> {
        Self::on(Isa::active()?, predictor)
    }

    /// [`PredictedEncoder::new`] on an instruction set of the caller's choice.
    pub(crate) fn on(isa: Isa, predictor: Predictor) -> Result<Self> {
        let (log, dtype) = (predictor.log(), predictor.dtype());
        let size = 1u32 << log;
        let (mut symbols, mut states) = (Vec::new(), Vec::<u16>::new());
        for coding in predictor.coding() {
            let (at, (first, own)) = (states.len() as u32, coding.parts());
            let code = |symbol: usize| match first.get(symbol) {
                Some(&(start, f)) if f > 0 => {
                    let most = log - f.ilog2();
                    let delta = (most << 16).wrapping_sub(f << most);
                    SymbolCode { delta, first: (at + start).wrapping_sub(f) }
                }
                _ => SymbolCode { delta: 0, first: UNKNOWN },
            };
            symbols.extend((0..SYMBOLS).map(code));
            states.extend(own.iter().map(|state| state + size as u16));
        }
        let begin = with_word!(dtype, W => heads::<W>(&predictor, |context| (context * SYMBOLS) as u32));
        Ok(Self { isa, symbols, begin, states, size, predictor })
    }

    /// Append a tile, as [`crate::codec::predicted::encode_predicted`] does. Returns how many words differ.
    pub(crate) fn encode(
        &self,
        dtype: Dtype,
        base: &[u8],
        fine_tuned: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<u64> {
        with_word!(dtype, W => with_words::<W, _>(base, fine_tuned, |base, fine_tuned| {
            on_isa!(self.isa, s => s.with_bits(EncodeTask { encoder: self, base, fine_tuned, out }))?
        }))
    }
}

/// One tile to be encoded.
struct EncodeTask<'a, W> {
    encoder: &'a PredictedEncoder,
    base: &'a [W],
    fine_tuned: &'a [W],
    out: &'a mut Vec<u8>,
}

impl<W: Word> BitTask for EncodeTask<'_, W> {
    type Out = Result<u64>;

    #[inline(always)]
    fn call(self, masks: impl Masks) -> Result<u64> {
        let (e, base, fine_tuned) = (self.encoder, self.base, self.fine_tuned);
        let dense = DenseWords::new::<W>(&e.predictor);
        let mut found = TileChanges::default();
        found.find(masks, dense, base, fine_tuned);
        if found.changed == 0 {
            return Ok(0);
        }
        let gaps = e.predictor.has_gaps();
        if !gaps && !found.rare.is_empty() {
            return Err(unknown());
        }
        let rare = if gaps { 2 * found.rare.len() + 1 } else { 0 };
        let mut to = Backwards::new(e.size, found.dense + rare);
        if gaps {
            e.rare(&found.rare, dense.shift, (base, fine_tuned), &mut to);
        }
        e.dense(&found.masks, dense.shift, (base, fine_tuned), &mut to);
        to.finish(e.predictor.log(), self.out)?;
        Ok(found.changed)
    }
}

impl PredictedEncoder {
    /// Put `step` from `base`, by a lane.
    #[inline(always)]
    fn step<W: Word>(&self, (base, step): (W, i32), shift: u32, lane: &mut u32, at: &mut BackwardsAt) {
        let begin = self.begin[(base.to_u64() >> shift) as usize % HEADS];
        let magnitude = step.unsigned_abs();
        let raw_bits = (magnitude | 2).ilog2() - 1;
        let symbol = 2 * (2 * raw_bits + (magnitude >> raw_bits)) + u32::from(step < 0);
        let mut code = self.symbols[(begin + symbol) as usize];
        let mut raw = (u64::from(magnitude) & ((1 << raw_bits) - 1), raw_bits);
        if code.first == UNKNOWN {
            code = self.symbols[begin as usize + ESCAPE];
            raw = (u64::from(step as u32 & (u32::MAX >> (32 - W::BITS))), W::BITS);
            at.known &= code.first != UNKNOWN;
        }
        self.symbol(code, raw, lane, at);
    }

    #[inline(always)]
    fn symbol(&self, code: SymbolCode, (raw, raw_bits): (u64, u32), lane: &mut u32, at: &mut BackwardsAt) {
        let x = *lane;
        let bits = x.wrapping_add(code.delta) >> 16;
        let value = u64::from(x) & ((1 << bits) - 1);
        // Whatever comes of a symbol that never comes, it is refused at the end.
        *lane = self.states.get((x >> bits).wrapping_add(code.first) as usize).map_or(x, |x| u32::from(*x));
        at.put(raw << bits | value, raw_bits + bits);
    }

    /// The changed words at `places`, which are not dense, their gaps, and the gap to the tile's end.
    #[inline(always)]
    fn rare<W: Word>(
        &self,
        places: &[u32],
        shift: u32,
        (base, fine_tuned): (&[W], &[W]),
        to: &mut Backwards,
    ) {
        let after = |places: &[u32]| places.last().map_or(0, |place| place + 1);
        self.gap(base.len() as u32 - after(places), to);
        let mut rest = places;
        while let [before @ .., place] = rest {
            to.reserve(2);
            self.single(*place as usize, shift, (base, fine_tuned), to);
            self.gap(place - after(before), to);
            rest = before;
        }
    }

    #[inline(always)]
    fn gap(&self, words: u32, to: &mut Backwards) {
        let (symbol, raw_bits) = number(words);
        let raw = u64::from(words) & ((1 << raw_bits) - 1);
        let code = self.symbols[self.predictor.gap_context() * SYMBOLS + symbol];
        to.at.known &= code.first != UNKNOWN;
        to.left -= 1;
        self.symbol(code, (raw, raw_bits), &mut to.lanes[to.left % LANES], &mut to.at);
        to.at.flush(&mut to.bytes);
    }

    /// The word at `place`, by the lane whose turn it is.
    #[inline(always)]
    fn single<W: Word>(
        &self,
        place: usize,
        shift: u32,
        (base, fine_tuned): (&[W], &[W]),
        to: &mut Backwards,
    ) {
        to.left -= 1;
        let (b, f) = (base[place], fine_tuned[place]);
        self.step((b, step(b, f)), shift, &mut to.lanes[to.left % LANES], &mut to.at);
        to.at.flush(&mut to.bytes);
    }

    /// The dense words, by the masks of their runs.
    #[inline(always)]
    fn dense<W: Word>(&self, masks: &[u64], shift: u32, words: (&[W], &[W]), to: &mut Backwards) {
        let mut places = DensePlaces::new();
        for (i, &mask) in masks.iter().enumerate().rev() {
            if mask == u64::MAX
                && places.is_empty()
                && to.left.is_multiple_of(LANES)
                && let (Some(b), Some(f)) =
                    (words.0[i * RUN..].first_chunk(), words.1[i * RUN..].first_chunk())
            {
                to.reserve(RUN);
                self.run(b, f, shift, to);
                continue;
            }
            places.push::<false>((i * RUN) as u32, mask);
            if places.is_full() {
                let done = self.places(places.list(), shift, words, to);
                places.drop_first(done);
            }
        }
        // What is left of the symbols is a multiple of the lanes, once the first ones are out of the way.
        self.places(places.list(), shift, words, to);
    }

    /// Words at `places`, descending, until less than four are left; gives how many.
    #[inline(always)]
    fn places<W: Word>(&self, places: &[u32], shift: u32, words: (&[W], &[W]), to: &mut Backwards) -> usize {
        to.reserve(places.len());
        let (first, rest) = places.split_at((to.left % LANES).min(places.len()));
        first.iter().for_each(|place| self.single(*place as usize, shift, words, to));
        let (mut lanes, mut at, bytes) = (to.lanes, to.at, &mut to.bytes[..]);
        let (fours, _) = rest.as_chunks::<LANES>();
        for four in fours {
            let base = four.map(|place| words.0[place as usize]);
            let tuned = four.map(|place| words.1[place as usize]);
            // Lanes go backwards, too.
            let of = |i: usize| (base[LANES - 1 - i], step(base[LANES - 1 - i], tuned[LANES - 1 - i]));
            self.four(std::array::from_fn(of), shift, &mut lanes, &mut at, bytes);
        }
        (to.lanes, to.at) = (lanes, at);
        to.left -= LANES * fours.len();
        first.len() + LANES * fours.len()
    }

    /// Four words and their steps, one of each lane.
    #[inline(always)]
    fn four<W: Word>(
        &self,
        words: [(W, i32); LANES],
        shift: u32,
        [a, b, c, d]: &mut [u32; LANES],
        at: &mut BackwardsAt,
        bytes: &mut [u8],
    ) {
        self.step(words[3], shift, d, at);
        // Two symbols take 24 bits and those of two words at most.
        if W::BITS > 16 {
            at.flush(bytes);
        }
        self.step(words[2], shift, c, at);
        at.flush(bytes);
        self.step(words[1], shift, b, at);
        if W::BITS > 16 {
            at.flush(bytes);
        }
        self.step(words[0], shift, a, at);
        at.flush(bytes);
    }

    /// 64 dense words, the first of which is the first lane's.
    #[inline(always)]
    fn run<W: Word>(&self, base: &[W; RUN], fine_tuned: &[W; RUN], shift: u32, to: &mut Backwards) {
        let mut steps = [0; RUN];
        for (to, (b, f)) in steps.iter_mut().zip(base.iter().zip(fine_tuned)) {
            *to = step(*b, *f);
        }
        let (mut lanes, mut at, bytes) = (to.lanes, to.at, &mut to.bytes[..]);
        let (fours, _) = base.as_chunks::<LANES>();
        for (words, steps) in fours.iter().zip(steps.as_chunks::<LANES>().0).rev() {
            self.four(std::array::from_fn(|i| (words[i], steps[i])), shift, &mut lanes, &mut at, bytes);
        }
        (to.lanes, to.at) = (lanes, at);
        to.left -= RUN;
    }
}
