//! Contexts and tables of a matrix, and their bytes.

use super::bits::{BitReader, BitsBackwards};
use super::step::{GAP_SYMBOLS, OCTAVES, STEP_SYMBOLS, number_of, octave_shift, step_raw_bits, step_symbols};
use super::table::{Coding, Frequencies, LOGS, State, read_weights, rounded, write_weights};
use crate::codec::word::{Word, with_word};
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use std::ops::Range;

/// What the words of a matrix predict of their changes.
#[derive(Clone, Debug)]
pub struct Predictor {
    dtype: Dtype,
    pub(super) log: u32,
    /// The context of each octave.
    pub(crate) context: [u8; OCTAVES],
    /// Octaves whose every word has a symbol.
    dense: Range<usize>,
    /// By context: what steps the words of it make.
    steps: Vec<Frequencies>,
    gaps: Frequencies,
}

/// Contexts and their weights, before they are frequencies.
pub(super) struct Weights {
    pub(super) log: u32,
    pub(super) precision: u32,
    /// The last octave of each context, ascending; that of the last one is 255.
    pub(super) last: Vec<u8>,
    /// Contexts that are dense.
    pub(super) dense: Range<usize>,
    pub(super) steps: Vec<Vec<u16>>,
    pub(super) gaps: Vec<u16>,
}

const LOG_BITS: u32 = 3;
const PRECISION_BITS: u32 = 3;
const CONTEXT_BITS: u32 = 6;
/// Most contexts: their number less one has [`CONTEXT_BITS`].
pub(super) const MAX_CONTEXTS: usize = 1 << CONTEXT_BITS;

impl Weights {
    /// The bytes of the predictor: one bit stream.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut list = vec![
            (self.log - LOGS.start(), LOG_BITS),
            (self.precision, PRECISION_BITS),
            (self.last.len() as u32 - 1, CONTEXT_BITS),
            (self.dense.start as u32, CONTEXT_BITS + 1),
            (self.dense.end as u32, CONTEXT_BITS + 1),
        ];
        list.extend(self.last[..self.last.len() - 1].iter().map(|&l| (u32::from(l), 8)));
        for weights in self.steps.iter().chain([&self.gaps]) {
            let kept: Vec<u16> = weights.iter().map(|&w| rounded(w, self.precision)).collect();
            write_weights(&kept, self.precision, &mut list);
        }
        let mut writer = BitsBackwards::default();
        list.iter().rev().for_each(|&(value, bits)| writer.put(value, bits));
        let mut out = Vec::new();
        writer.finish(&mut out);
        out
    }
}

impl Predictor {
    /// Read the bytes of a predictor for a matrix of `words` words.
    ///
    /// # Errors
    /// `Corrupt` or `Truncated` where they are none; `Unsupported` for a dtype whose words are too long.
    pub fn read(dtype: Dtype, words: usize, bytes: &[u8]) -> Result<Self> {
        if !super::step::predictable(dtype) {
            return Err(Error::unsupported(format!("words of {dtype} are not predicted")));
        }
        let mut r = BitReader::new(bytes)?;
        let (log, precision) = (r.take(LOG_BITS) + LOGS.start(), r.take(PRECISION_BITS));
        let count = r.take(CONTEXT_BITS) as usize + 1;
        let dense = r.take(CONTEXT_BITS + 1) as usize..r.take(CONTEXT_BITS + 1) as usize;
        // Tables are made before a word is decoded: what they cost must have been earned by the words.
        if 1 << log > words.max(1 << LOGS.start()) {
            return Err(Error::corrupt(format!("tables of 2^{log} states for {words} words")));
        }
        if dense.start > dense.end || dense.end > count {
            return Err(Error::corrupt(format!("contexts {dense:?} of {count} are dense")));
        }
        let (context, first) = read_contexts(&mut r, count)?;
        let symbols = with_word!(dtype, W => step_symbols::<W>()).min(STEP_SYMBOLS);
        let table = |r: &mut BitReader<'_>, most| read_weights(r, (log, precision), most);
        let steps = (0..count).map(|_| table(&mut r, symbols)).collect::<Result<Vec<_>>>()?;
        let gaps = table(&mut r, GAP_SYMBOLS)?;
        r.finish().map_err(|e| e.within("a predictor"))?;
        if dense.clone().any(|c| steps[c].is_empty()) {
            return Err(Error::corrupt("a dense context without symbols"));
        }
        let dense = first[dense.start]..first[dense.end];
        Ok(Self { dtype, log, context, dense, steps, gaps })
    }

    /// Dtype of the words.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Octaves whose every word has a symbol.
    pub(crate) fn dense(&self) -> Range<usize> {
        self.dense.clone()
    }

    /// Whether words of other octaves change at all.
    pub(crate) fn has_gaps(&self) -> bool {
        !self.gaps.is_empty()
    }

    /// How far the exponent field of a word is from its lowest bit.
    pub(crate) fn shift<W: Word>(&self) -> u32 {
        octave_shift::<W>(self.dtype)
    }

    /// Logarithm of the states of a table.
    pub(crate) fn log(&self) -> u32 {
        self.log
    }

    /// Whether a word of `context` may make a step of `symbol`.
    pub(super) fn knows(&self, context: usize, symbol: usize) -> bool {
        self.steps[context].of(symbol) > 0
    }

    /// A decoder's states: `2^log` for each context, then those of gaps. Contexts in which nothing ever comes have states
    /// that lead nowhere: whoever is in one is told by [`Predictor::comes`].
    pub(crate) fn decoding(&self) -> Vec<State> {
        let mut out = Vec::with_capacity((self.steps.len() + 1) << self.log);
        for steps in &self.steps {
            if steps.is_empty() {
                out.resize(out.len() + (1 << self.log), State::default());
                continue;
            }
            with_word!(self.dtype, W => steps.decoding(self.log, step_raw_bits::<W>, &mut out));
        }
        if self.has_gaps() {
            self.gaps.decoding(self.log, |symbol| number_of(symbol).0, &mut out);
        }
        out
    }

    /// Whether anything ever comes in `context`.
    pub(crate) fn comes(&self, context: usize) -> bool {
        !self.steps[context].is_empty()
    }

    /// Where the states of gaps begin: the context after the last one.
    pub(crate) fn gap_context(&self) -> usize {
        self.steps.len()
    }

    /// The encoder's side of all tables, gaps last.
    pub(crate) fn coding(&self) -> Vec<Coding> {
        self.steps.iter().chain([&self.gaps]).map(|f| f.coding(self.log)).collect()
    }
}

/// The context of each octave, and the first octave of each context (256 behind the last).
fn read_contexts(r: &mut BitReader<'_>, count: usize) -> Result<([u8; OCTAVES], Vec<usize>)> {
    let (mut context, mut first) = ([0u8; OCTAVES], vec![0usize]);
    for c in 0..count {
        let from = first[c];
        let end = if c + 1 == count { OCTAVES } else { r.take(8) as usize + 1 };
        if end <= from {
            return Err(Error::corrupt(format!("context {c} ends at octave {end}, but begins at {from}")));
        }
        context[from..end].fill(c as u8);
        first.push(end);
    }
    Ok((context, first))
}
