//! How far a fine-tune is from a base, from a sample of its largest tensors: which of several bases is the nearest.

use super::files::Checkpoint;
use super::likeness::{WordRun, differing_bits};
use super::pairing::{FoundBases, find_bases};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::format::container::TensorInfo;
use crate::package::format::words::TensorWords;

/// Tensors that are looked at, the largest ones.
const LOOKED_AT: usize = 256;

/// The share of a fine-tune's bits that lie below the highest one in which a word differs from the base's: 0 for the base
/// itself, about 0.05 to 0.4 for its fine-tunes, near 1 for another model. What has no base tensor differs in all of them.
pub(crate) fn distance(base: &Checkpoint, ft: &Checkpoint, prefix: Option<&str>) -> Result<f64> {
    let found = find_bases(base, ft, prefix)?;
    let tensors = ft.files().iter().enumerate().flat_map(|(f, file)| {
        let all = file.tensors.header().tensors.iter().enumerate();
        all.filter_map(move |(i, t)| Some((f, i, t, t.matrix()?.0)))
    });
    let mut tensors: Vec<_> = tensors.filter(|(_, _, t, _)| t.bytes() > 0).collect();
    tensors.sort_by_key(|(f, i, t, _)| (std::cmp::Reverse(t.bytes()), *f, *i));
    let (mut differing, mut all) = (0.0, 0.0);
    for (f, i, t, dtype) in tensors.into_iter().take(LOOKED_AT) {
        let share = share(base, ft, &found, (f, i), (t, dtype)).map_err(|e| e.of_tensor(&t.name))?;
        differing += share * t.bytes() as f64;
        all += t.bytes() as f64;
    }
    Ok(if all > 0.0 { differing / all } else { 1.0 })
}

/// The share of one tensor.
fn share(
    base: &Checkpoint,
    ft: &Checkpoint,
    found: &FoundBases<'_>,
    (f, i): (usize, usize),
    (t, dtype): (&TensorInfo, Dtype),
) -> Result<f64> {
    let Some(paired) = &found[f][i] else { return Ok(1.0) };
    let new = WordRun::whole(TensorWords::File(&ft.files()[f].tensors, t))?.spots()?;
    let old = WordRun::whole(paired.words(base))?.spots()?;
    Ok(differing_bits(dtype, &new, &old))
}
