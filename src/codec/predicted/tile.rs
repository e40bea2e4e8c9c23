//! A tile, encoded and decoded the plain way.
//!
//! A tile is a run of words. Its stream holds, in the order of reading: the first states of the four lanes, `log` bits each;
//! for each word of a dense context a symbol of that context's table; then, if there is a table of gaps, for each changed
//! word of another context a gap, the number of words of the tile between it and the one before (or the tile's first
//! word), and a symbol of its context's table; at last a gap that leads to or beyond the tile's end. Symbols go to the
//! lanes in turn. A symbol is followed by its raw bits, which come after the bits of its lane's next state. All lanes end
//! in state 0, and no bit is left. A tile without a byte is unchanged.

use super::bits::{BitReader, BitsBackwards};
use super::predictor::Predictor;
use super::step::{ESCAPE, number, number_of, octave, step, step_of, step_raw_bits, step_symbol, stepped};
use super::table::{Coding, State};
use crate::codec::word::Word;
use crate::error::{Error, Result};

/// States that take turns.
pub(crate) const LANES: usize = 4;

/// A symbol of a context, and its raw bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Item {
    context: u8,
    symbol: u8,
    raw_bits: u8,
    raw: u32,
}

impl Predictor {
    /// What is coded of the step between two words.
    #[inline(always)]
    fn item<W: Word>(&self, base: W, fine_tuned: W, shift: u32) -> Item {
        let context = self.context[octave(base, shift)];
        let step = step(base, fine_tuned);
        let (symbol, raw_bits) = step_symbol(step);
        if self.knows(usize::from(context), symbol) {
            let raw = step.unsigned_abs() & ((1 << raw_bits) - 1);
            return Item { context, symbol: symbol as u8, raw_bits: raw_bits as u8, raw };
        }
        let raw = step as u32 & (u32::MAX >> (32 - W::BITS));
        Item { context, symbol: ESCAPE as u8, raw_bits: W::BITS as u8, raw }
    }

    /// What is coded of a gap.
    fn gap(&self, words: usize) -> Item {
        let (symbol, raw_bits) = number(words as u32);
        let raw = words as u32 & ((1 << raw_bits) - 1);
        Item { context: self.gap_context() as u8, symbol: symbol as u8, raw_bits: raw_bits as u8, raw }
    }
}

/// Append the tile that turns `base` into `fine_tuned`. Returns how many words differ.
///
/// # Errors
/// `Internal` for a step or gap that the predictor says never comes.
pub fn encode_predicted<W: Word>(
    p: &Predictor,
    base: &[W],
    fine_tuned: &[W],
    out: &mut Vec<u8>,
) -> Result<u64> {
    let shift = p.shift::<W>();
    let is_dense = |b: W| p.dense().contains(&octave(b, shift));
    let pairs = || base.iter().copied().zip(fine_tuned.iter().copied());
    let changed = pairs().filter(|(b, f)| b != f).count() as u64;
    if changed == 0 {
        return Ok(0);
    }
    let mut items: Vec<Item> =
        pairs().filter(|(b, _)| is_dense(*b)).map(|(b, f)| p.item(b, f, shift)).collect();
    if p.has_gaps() {
        let mut from = 0;
        for (i, (b, f)) in pairs().enumerate().filter(|(_, (b, f))| !is_dense(*b) && b != f) {
            items.extend([p.gap(i - from), p.item(b, f, shift)]);
            from = i + 1;
        }
        items.push(p.gap(base.len() - from));
    } else if pairs().any(|(b, f)| !is_dense(b) && b != f) {
        return Err(unknown());
    }
    write_items(p.log(), &p.coding(), &items, out)?;
    Ok(changed)
}

/// What cannot be coded: the predictor was made of other words.
#[cold]
pub(crate) fn unknown() -> Error {
    Error::internal("a step or a gap that its predictor does not know")
}

/// Append the stream of `items`.
fn write_items(log: u32, coding: &[Coding], items: &[Item], out: &mut Vec<u8>) -> Result<()> {
    let (mut states, mut bits) = ([0u16; LANES], BitsBackwards::default());
    for (i, item) in items.iter().enumerate().rev() {
        let state = &mut states[i % LANES];
        let (from, value, count) = coding
            .get(usize::from(item.context))
            .and_then(|c| c.enter(usize::from(item.symbol), *state))
            .ok_or_else(unknown)?;
        *state = from;
        let raw_bits = u32::from(item.raw_bits);
        if raw_bits + count <= 32 {
            bits.put(item.raw.checked_shl(count).unwrap_or(0) | value, raw_bits + count);
            continue;
        }
        bits.put(item.raw, raw_bits);
        bits.put(value, count);
    }
    states.iter().rev().for_each(|s| bits.put(u32::from(*s), log));
    bits.finish(out);
    Ok(())
}

/// Decode a tile in place: base words in, fine-tuned ones out.
///
/// # Errors
/// `Corrupt` or `Truncated` where the bytes contradict themselves, the predictor or the base; `words` holds anything then.
pub fn decode_predicted<W: Word>(p: &Predictor, tile: &[u8], words: &mut [W]) -> Result<()> {
    if tile.is_empty() {
        return Ok(());
    }
    let (shift, states) = (p.shift::<W>(), p.decoding());
    let mut r = BitReader::new(tile)?;
    let mut lanes = [0u16; LANES];
    lanes.iter_mut().for_each(|l| *l = r.take(p.log()) as u16);
    let mut turn = 0;
    let mut next = |r: &mut BitReader<'_>, context: usize| {
        let lane = &mut lanes[turn % LANES];
        let state: State = states[(context << p.log()) + usize::from(*lane)];
        let (to, raw) = state.leave(r);
        (*lane, turn) = (to, turn + 1);
        (usize::from(state.symbol), raw)
    };
    let change = |word: W, (symbol, raw): (usize, u32)| stepped(word, step_of::<W>(symbol, raw));
    for word in words.iter_mut().filter(|w| p.dense().contains(&octave(**w, shift))) {
        *word = change(*word, next(&mut r, usize::from(p.context[octave(*word, shift)])));
    }
    let mut at = 0;
    while p.has_gaps() && !r.is_beyond() {
        let (symbol, raw) = next(&mut r, p.gap_context());
        at += (number_of(symbol).1 | raw) as usize;
        let Some(word) = words.get_mut(at) else { break };
        let context = usize::from(p.context[octave(*word, shift)]);
        if !p.comes(context) {
            return Err(Error::corrupt(format!(
                "a predicted tile changes word {at}, which never changes: corrupt, or of another base"
            )));
        }
        *word = change(*word, next(&mut r, context));
        at += 1;
    }
    if lanes != [0; LANES] {
        return Err(Error::corrupt(
            "a predicted tile does not end where it began: corrupt, or of another base",
        ));
    }
    r.finish()
}

/// Raw bits of an item of steps.
pub(super) fn raw_bits<W: Word>(symbol: usize) -> u32 {
    step_raw_bits::<W>(symbol)
}
