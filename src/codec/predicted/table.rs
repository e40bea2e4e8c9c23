//! Frequencies of symbols, and the tables that code them: tabled asymmetric numeral systems (Duda, arXiv 1311.2540).
//!
//! A table of `2^log` states gives each symbol as many states as its frequency says. State `i` belongs to the symbol that
//! is spread there: symbols in order, each as often as its frequency, at `0, t, 2t, ...` modulo `2^log` with
//! `t = 2^log / 2 + 2^log / 8 + 3`. The states of a symbol of frequency `f` are numbered `x = f, f + 1, .. 2f - 1` in
//! order. A decoder in state `i` gives the symbol; then, with `n = log - floor(log2 x)`, it takes `n` bits `b` and goes to
//! state `x * 2^n - 2^log + b`.

use super::bits::BitReader;
use crate::error::{Error, Result};

/// Logarithms of the number of states.
pub(crate) const LOGS: std::ops::RangeInclusive<u32> = 5..=12;
/// Bits of a weight's length.
const LENGTH_BITS: u32 = 4;
/// Bits of how many symbols a table lists.
const COUNT_BITS: u32 = 7;

/// How often each symbol comes: they sum to `2^log`, or are empty for a context in which nothing ever comes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frequencies(Vec<u16>);

impl Frequencies {
    /// Those of weights: each its share of `2^log`, rounded down but at least 1; the first of the largest takes what is
    /// left. `None` where that would leave it nothing.
    pub(crate) fn of_weights(weights: &[u16], log: u32) -> Option<Self> {
        let sum: u64 = weights.iter().map(|&w| u64::from(w)).sum();
        if sum == 0 {
            return Some(Self::default());
        }
        let share = |w: u16| if w == 0 { 0 } else { ((u64::from(w) << log) / sum).max(1) as u16 };
        let mut shares: Vec<u16> = weights.iter().map(|&w| share(w)).collect();
        let given: i64 = shares.iter().map(|&s| i64::from(s)).sum();
        let largest = shares.iter().copied().max()?;
        let first = shares.iter_mut().find(|s| **s == largest)?;
        *first = u16::try_from(i64::from(*first) + (1 << log) - given).ok().filter(|f| *f > 0)?;
        Some(Self(shares))
    }

    /// The frequency of `symbol`.
    pub(crate) fn of(&self, symbol: usize) -> u32 {
        self.0.get(symbol).map_or(0, |&f| u32::from(f))
    }

    /// Whether nothing ever comes.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The symbol of each state; of a table in which nothing comes, no states.
    fn spread(&self, log: u32) -> Vec<u8> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let (states, mut at) = (1usize << log, 0);
        let mut symbols = vec![0u8; states];
        for (symbol, &f) in self.0.iter().enumerate() {
            for _ in 0..f {
                symbols[at] = symbol as u8;
                at = (at + states / 2 + states / 8 + 3) % states;
            }
        }
        symbols
    }

    /// The symbol of each state, and its number among those of the symbol.
    fn states(&self, log: u32) -> impl Iterator<Item = (usize, u32)> {
        let mut next: Vec<u32> = self.0.iter().map(|&f| u32::from(f)).collect();
        self.spread(log).into_iter().map(move |symbol| {
            let x = next[usize::from(symbol)];
            next[usize::from(symbol)] += 1;
            (usize::from(symbol), x)
        })
    }

    /// Append a decoder's states: see [`State`]. `raw` tells how many raw bits follow a symbol.
    pub(crate) fn decoding(&self, log: u32, raw: impl Fn(usize) -> u32, out: &mut Vec<State>) {
        out.extend(self.states(log).map(|(symbol, x)| {
            let bits = log - x.ilog2();
            State::new(symbol, bits, (x << bits) - (1 << log), raw(symbol))
        }));
    }

    /// The encoder's side.
    pub(crate) fn coding(&self, log: u32) -> Coding {
        let mut first = Vec::with_capacity(self.0.len());
        let mut sum = 0u32;
        for &f in &self.0 {
            first.push((sum, u32::from(f)));
            sum += u32::from(f);
        }
        let mut states = vec![0u16; sum as usize];
        for (i, (symbol, x)) in self.states(log).enumerate() {
            let (start, f) = first[symbol];
            states[(start + x - f) as usize] = i as u16;
        }
        Coding { log, first, states }
    }
}

/// A state of a decoder: what it gives, and where it leads.
#[derive(Clone, Copy, Default)]
pub(crate) struct State {
    next: u16,
    /// The symbol.
    pub(crate) symbol: u8,
    /// State bits in the low half, raw bits added to them in the high one: 4 and 6 bits; the next state shares no byte.
    bits: u8,
    raw: u8,
}

impl State {
    fn new(symbol: usize, bits: u32, next: u32, raw: u32) -> Self {
        Self { next: next as u16, symbol: symbol as u8, bits: bits as u8, raw: raw as u8 }
    }

    /// The next state without the bits taken for it, how many those are, and how many raw bits follow.
    pub(crate) fn parts(self) -> (u32, u32, u32) {
        (u32::from(self.next), u32::from(self.bits), u32::from(self.raw))
    }

    /// Leave this state by what `reader` gives: the next state, and the symbol's raw bits.
    #[inline(always)]
    pub(crate) fn leave(self, reader: &mut BitReader<'_>) -> (u16, u32) {
        let bits = reader.peek();
        reader.skip(u32::from(self.bits) + u32::from(self.raw));
        let next = self.next + (bits as u16 & ((1 << self.bits) - 1));
        (next, ((bits >> self.bits) & ((1u64 << self.raw) - 1)) as u32)
    }
}

/// The states as an encoder goes through them.
pub(crate) struct Coding {
    log: u32,
    /// For each symbol where its states begin, and its frequency.
    first: Vec<(u32, u32)>,
    states: Vec<u16>,
}

impl Coding {
    /// For each symbol where its states begin, and its frequency; and the states.
    pub(crate) fn parts(&self) -> (&[(u32, u32)], &[u16]) {
        (&self.first, &self.states)
    }

    /// The state before `state` that gives `symbol` and leads to it, and the bits by which it does. `None` for a symbol
    /// that never comes.
    #[inline(always)]
    pub(crate) fn enter(&self, symbol: usize, state: u16) -> Option<(u16, u32, u32)> {
        let &(start, f) = self.first.get(symbol)?;
        if f == 0 {
            return None;
        }
        let x = u32::from(state) + (1 << self.log);
        let most = self.log - f.ilog2();
        let bits = most - u32::from(x >> most < f);
        let from = *self.states.get((start + (x >> bits) - f) as usize)?;
        Some((from, x & ((1 << bits) - 1), bits))
    }
}

/// A weight with all but its leading bits cleared: the leading one, and `precision` below it.
pub(crate) fn rounded(weight: u16, precision: u32) -> u16 {
    let drop = (16 - weight.leading_zeros()).saturating_sub(1 + precision);
    weight >> drop << drop
}

/// Append the weights of a table to `bits`, as [`read_weights`] reads them.
pub(crate) fn write_weights(weights: &[u16], precision: u32, bits: &mut Vec<(u32, u32)>) {
    let count = weights.iter().rposition(|w| *w > 0).map_or(0, |i| i + 1);
    bits.push((count as u32, COUNT_BITS));
    for &w in &weights[..count] {
        let length = 16 - w.leading_zeros();
        bits.push((length, LENGTH_BITS));
        let kept = length.saturating_sub(1).min(precision);
        let below = u32::from(w) & ((1 << length.saturating_sub(1)) - 1);
        bits.push((below >> (length.saturating_sub(1) - kept), kept));
    }
}

/// Bits that [`write_weights`] takes.
pub(crate) fn weights_bits(present: usize, last: usize, precision: u32) -> f64 {
    f64::from(COUNT_BITS) + f64::from(LENGTH_BITS) * last as f64 + f64::from(precision) * 0.8 * present as f64
}

/// Read the frequencies of a table of at most `most` symbols: `count: 7`, then for each symbol the length of its weight,
/// 4 bits, and the highest `precision` bits below its leading one, or all if there are fewer.
pub(crate) fn read_weights(
    r: &mut BitReader<'_>,
    (log, precision): (u32, u32),
    most: usize,
) -> Result<Frequencies> {
    let count = r.take(COUNT_BITS) as usize;
    if count > most {
        return Err(Error::corrupt(format!("a table of {count} symbols where there are {most}")));
    }
    let mut weights = vec![0u16; count];
    for w in &mut weights {
        let length = r.take(LENGTH_BITS);
        if length > *LOGS.end() + 1 {
            return Err(Error::corrupt(format!("a weight of {length} bits")));
        }
        if length > 0 {
            let kept = (length - 1).min(precision);
            *w = ((1 << kept | r.take(kept)) << (length - 1 - kept)) as u16;
        }
    }
    if count > 0 && weights[count - 1] == 0 {
        return Err(Error::corrupt("a table that ends with a symbol that never comes"));
    }
    Frequencies::of_weights(&weights, log)
        .ok_or_else(|| Error::corrupt(format!("a table of more symbols than 2^{log} states")))
}
