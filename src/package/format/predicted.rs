//! Codec `predicted`: tiles whose changes the base predicts, each decoded alone.
//!
//! Stored bytes (SPEC.md): the predictor; the tiles; the length of every tile but the last, `u32` each; the length of the
//! predictor, `u16`; the words of a tile, `u32`.

use super::blob::compare_check;
use super::container::SafeTensors;
use super::record::Entry;
use crate::codec::predicted::{MAX_TILE_WORDS, Predictor, predictable};
use crate::error::{Error, Result};
use crate::matrix::{Digest, Dtype};
use crate::package::io::spool::Spool;
use crate::package::options::Codec;
use crate::vector::predicted::{PredictedDecoder, PredictedEncoder};
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

const TAIL_BYTES: usize = 6;
/// Words of a tile that writers aim at: enough to forget what a tile costs, few enough to stay in a core's caches.
const TILE_WORDS: usize = 1 << 17;

/// How many words a tile has where a tensor of `words` words is cut into pieces of `piece` words, so that every piece is a
/// run of whole tiles. `None` where no such tile is large enough to be worth it, or the words are too long.
pub(crate) fn tile_words(dtype: Dtype, piece: usize, words: usize) -> Option<usize> {
    if !predictable(dtype) || words == 0 {
        return None;
    }
    if piece == words {
        return Some(words.min(TILE_WORDS));
    }
    let least = piece.div_ceil(TILE_WORDS);
    let parts = (least..=8 * least).find(|d| piece.is_multiple_of(*d));
    parts.map(|d| piece / d).or_else(|| (piece <= MAX_TILE_WORDS).then_some(piece))
}

/// How a tensor is stored.
pub(crate) struct Predicted {
    /// The predictor's bytes.
    pub(crate) predictor: Vec<u8>,
    pub(crate) encoder: PredictedEncoder,
    pub(crate) tile_words: usize,
}

/// Stored bytes in the making.
pub(crate) struct PredictedBody {
    hash: Xxh3,
    lengths: Vec<u8>,
    predictor: usize,
    tile_words: usize,
}

impl PredictedBody {
    /// Begin with the predictor's bytes.
    pub(crate) fn new(predictor: &[u8], tile_words: usize, to: &mut Spool) -> Result<Self> {
        let mut body =
            Self { hash: Xxh3::new(), lengths: Vec::new(), predictor: predictor.len(), tile_words };
        body.append(to, predictor)?;
        Ok(body)
    }

    fn append(&mut self, to: &mut Spool, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        to.append(bytes)
    }

    /// Append tiles, of `lengths` bytes each.
    pub(crate) fn push(&mut self, to: &mut Spool, tiles: &[u8], lengths: &[(usize, usize)]) -> Result<()> {
        for (bytes, _) in lengths {
            let bytes = u32::try_from(*bytes).map_err(|_| Error::internal("a tile beyond 4 GiB"))?;
            self.lengths.extend_from_slice(&bytes.to_le_bytes());
        }
        self.append(to, tiles)
    }

    pub(crate) fn finish(mut self, to: &mut Spool) -> Result<Digest> {
        let wide = |_| Error::internal("a predictor or a tile that is too long");
        let mut tail = std::mem::take(&mut self.lengths);
        tail.truncate(tail.len().saturating_sub(4));
        tail.extend_from_slice(&u16::try_from(self.predictor).map_err(wide)?.to_le_bytes());
        tail.extend_from_slice(&u32::try_from(self.tile_words).map_err(wide)?.to_le_bytes());
        self.append(to, &tail)?;
        Ok(Digest(self.hash.digest128().to_le_bytes()))
    }
}

/// Stored bytes at rest, opened: their digest is compared, their tiles are found.
pub(crate) struct PredictedTiles<'a> {
    container: &'a SafeTensors,
    dtype: Dtype,
    decoder: PredictedDecoder,
    tile_words: usize,
    words: usize,
    /// Where each tile begins in the container's data, and where the last one ends.
    at: Vec<u64>,
}

/// What a thread keeps from piece to piece.
#[derive(Default)]
pub(crate) struct PredictedScratch {
    stored: Vec<u8>,
    tile: Vec<u8>,
}

impl<'a> PredictedTiles<'a> {
    /// Open what entry `e`, a matrix of `words` words of `dtype`, has stored.
    pub(crate) fn open(container: &'a SafeTensors, e: &Entry, dtype: Dtype, words: usize) -> Result<Self> {
        compare_check(container, e.range.clone(), Some(e.check))?;
        if e.codec != Codec::Predicted || !predictable(dtype) {
            return Err(Error::corrupt(format!("words of {dtype} by codec `{}`", e.codec.name())));
        }
        let (start, len) = (e.range.start, e.range.end - e.range.start);
        let short = || Error::truncated(format!("{len} bytes of predicted tiles"));
        let end = len.checked_sub(TAIL_BYTES as u64).ok_or_else(short)?;
        let mut tail = [0u8; TAIL_BYTES];
        container.read_at(start + end, &mut tail)?;
        let predictor = u64::from(u16::from_le_bytes([tail[0], tail[1]]));
        let tile_words = u32::from_le_bytes([tail[2], tail[3], tail[4], tail[5]]) as usize;
        if tile_words == 0 || tile_words > MAX_TILE_WORDS {
            return Err(Error::corrupt(format!("tiles of {tile_words} words")));
        }
        // As many lengths as the tiles of words that the caller holds.
        let listed = words.div_ceil(tile_words).saturating_sub(1);
        let table = end.checked_sub(4 * listed as u64).ok_or_else(short)?;
        let mut bytes = vec![0u8; usize::try_from(predictor.min(table)).unwrap_or(0)];
        container.read_at(start, &mut bytes)?;
        let mut lengths = vec![0u8; 4 * listed];
        container.read_at(start + table, &mut lengths)?;
        let (lengths, _) = lengths.as_chunks::<4>();
        let mut at = vec![start + predictor];
        for length in lengths {
            at.push(at.last().copied().unwrap_or(0) + u64::from(u32::from_le_bytes(*length)));
        }
        let last = at.last().copied().unwrap_or(0);
        if last > start + table {
            return Err(Error::corrupt(format!(
                "predictor and tiles take {} bytes, but {table} are stored",
                last - start
            )));
        }
        at.push(start + table);
        let predictor = Predictor::read(dtype, words, &bytes)?;
        Ok(Self { container, dtype, decoder: PredictedDecoder::new(predictor)?, tile_words, words, at })
    }

    /// Make the base words of the run that begins at word `from` the fine-tuned ones. `base` gives base bytes by position, for
    /// tiles that reach beyond the run.
    pub(crate) fn apply(
        &self,
        from: usize,
        run: &mut [u8],
        base: &dyn Fn(usize, &mut [u8]) -> Result<()>,
        s: &mut PredictedScratch,
    ) -> Result<()> {
        let w = self.dtype.word_bytes();
        let mut word = from;
        let mut rest = run;
        while !rest.is_empty() {
            let index = word / self.tile_words;
            let tile = self.tile(index);
            let n = (tile.end - word).min(rest.len() / w);
            let (now, later) = rest.split_at_mut(n * w);
            self.load(index, &mut s.stored)
                .and_then(|()| {
                    if n == tile.len() {
                        return self.decoder.decode(self.dtype, &mut s.stored, now);
                    }
                    s.tile.clear();
                    s.tile.resize(tile.len() * w, 0);
                    base(tile.start * w, &mut s.tile)?;
                    self.decoder.decode(self.dtype, &mut s.stored, &mut s.tile)?;
                    now.copy_from_slice(&s.tile[(word - tile.start) * w..][..n * w]);
                    Ok(())
                })
                .map_err(|e| e.within(format_args!("tile {index}")))?;
            (rest, word) = (later, word + n);
        }
        Ok(())
    }

    /// The words of tile `index`.
    fn tile(&self, index: usize) -> Range<usize> {
        let from = index * self.tile_words;
        from..(from + self.tile_words).min(self.words)
    }

    fn load(&self, index: usize, stored: &mut Vec<u8>) -> Result<()> {
        let (from, to) = (self.at[index], self.at[index + 1]);
        stored.clear();
        // Both lie in the file, which has been read once for its digest.
        stored.resize((to - from) as usize, 0);
        self.container.read_at(from, stored)
    }
}
