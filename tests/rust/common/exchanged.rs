//! A tensor as the exchanges of its package make it of its base, in place.

use xorz::error::Result;
use xorz::matrix::Matrix;
use xorz::package::Package;
use xorz::vector::exchange_apply;

/// The fine-tuned words, after they were made of the base's and taken back, and made again.
pub fn exchanged(package: &Package, name: &str, base: &Matrix<'_>) -> Result<Vec<u8>> {
    let (mut steps, w) = (Vec::new(), base.dtype().word_bytes());
    let mut words = vec![0u64; base.bytes().len().div_ceil(8)];
    let words = &mut bytemuck::cast_slice_mut(&mut words)[..base.bytes().len()];
    words.copy_from_slice(base.bytes());
    let (mut at, mut wrong) = (0, false);
    package.exchanges(name, base, &mut |range, bytes, changed| {
        // In order, within the matrix, and none without a word that differs.
        wrong |= range.start < at || range.end > base.bytes().len() || changed == 0;
        at = range.end;
        steps.push((range, bytes.to_vec(), changed));
        Ok(())
    })?;
    assert!(!wrong, "parts of `{name}`");
    for (range, bytes, changed) in &steps {
        let before = words[range.clone()].to_vec();
        exchange_apply(bytes, &mut words[range.clone()], false)?;
        let differ = before.chunks(w).zip(words[range.clone()].chunks(w)).filter(|(a, b)| a != b).count();
        assert_eq!(differ as u64, *changed, "`{name}` {range:?}");
    }
    let made = words.to_vec();
    for back in [true, false] {
        for (range, bytes, _) in &steps {
            exchange_apply(bytes, &mut words[range.clone()], back)?;
        }
        assert!(words == if back { base.bytes() } else { &made[..] }, "`{name}` back: {back}");
    }
    Ok(made)
}
