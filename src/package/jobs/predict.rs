//! The predictor of one tensor, made of its words or of a sample of them, and what the tensor takes by it.

use super::encode::TensorJob;
use crate::codec::predicted::StepCounts;
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use crate::package::format::predicted::{Predicted, tile_words};
use crate::package::io::aligned::Aligned;
use crate::vector::predicted::{PredictedEncoder, count_gaps, count_steps};

/// The predictor of a tensor of so many words at most is made of all of them, that of a longer one of a sample.
const PREDICTED_WHOLE: usize = 1 << 20;
/// Pieces of the sample.
const PREDICTED_SAMPLE: usize = 4;

impl TensorJob<'_> {
    /// Make the predictor from all of the tensor's words or a sample of them; gives about how many bytes the tensor takes by
    /// it, or `None` for tensors that the codec does not hold.
    pub(super) fn predict(&self, dtype: Dtype) -> Result<Option<f64>> {
        let (words, piece) =
            (self.bytes / dtype.word_bytes(), self.pieces.bytes(0).len() / dtype.word_bytes());
        let Some(tile_words) = tile_words(dtype, piece, words) else { return Ok(None) };
        let whole = words <= PREDICTED_WHOLE;
        let count = self.pieces.count();
        let step = if whole { 1 } else { count.div_ceil(PREDICTED_SAMPLE) };
        let sample: Vec<usize> = (0..count).skip(step / 2).step_by(step).collect();
        let mut counts = StepCounts::new(dtype);
        self.count_pieces(dtype, &sample, |base, tuned| count_steps(&mut counts, base, tuned))?;
        let (_, first, _) = counts.fit(words, tile_words, whole)?;
        let tile_bytes = tile_words * dtype.word_bytes();
        self.count_pieces(dtype, &sample, |base, tuned| {
            let mut tiles = base.chunks(tile_bytes).zip(tuned.chunks(tile_bytes));
            tiles.try_for_each(|(b, t)| count_gaps(&mut counts, &first, b, t))
        })?;
        let (predictor, model, bits) = counts.fit(words, tile_words, whole)?;
        let share = words as f64 / counts.words().max(1) as f64;
        let bytes = bits / 8.0 * share + predictor.len() as f64 + words.div_ceil(tile_words) as f64 * 10.0;
        let encoder = PredictedEncoder::new(model)?;
        let _ = self.predicted.set(Box::new(Predicted { predictor, encoder, tile_words }));
        Ok(Some(bytes))
    }

    /// Show `count` base and fine-tuned words of some pieces.
    fn count_pieces(
        &self,
        dtype: Dtype,
        sample: &[usize],
        mut count: impl FnMut(&[u8], &[u8]) -> Result<()>,
    ) -> Result<()> {
        let Some((_, _, base)) = self.delta else { return Ok(()) };
        debug_assert_eq!(self.bytes % dtype.word_bytes(), 0);
        let mut rooms = (Aligned::default(), Aligned::default());
        for &index in sample {
            let range = self.pieces.bytes(index);
            let base = base.words.get(range.clone(), &mut rooms.0)?;
            count(base, self.words.get(range, &mut rooms.1)?)?;
        }
        Ok(())
    }

    /// What [`TensorJob::predict`] has made.
    pub(super) fn prediction(&self) -> Result<&Predicted> {
        self.predicted.get().map(|made| &**made).ok_or_else(|| Error::internal("no predictor was made"))
    }
}
