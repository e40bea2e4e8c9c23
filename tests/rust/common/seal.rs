//! Digests of resident deltas made right again after their bytes were changed, as SPEC.md says: what gets hostile bytes past the
//! checks that catch mistakes.

use xorz::matrix::Dtype;
use xxhash_rust::xxh3::xxh3_128;

/// Make the content's digest good again, as SPEC.md says, where the header leads to a payload at all.
pub fn reseal(bytes: &mut [u8]) {
    if bytes.len() < 192 {
        return;
    }
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (start, units) = (number(72), number(56));
    let unit = match bytes[10] {
        1 => 16 * (u64::from(bytes[14]) + word_bytes(bytes[11])),
        _ => word_bytes(bytes[11]),
    };
    let raw = number(16).checked_mul(number(24));
    let units = if bytes[10] == 3 { raw } else { Some(units) };
    let end = units.and_then(|u| u.checked_mul(unit)).and_then(|len| start.checked_add(len));
    let Some(payload) = end.and_then(|end| {
        let range = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
        (range.start >= 192).then_some(range).filter(|r| bytes.get(r.clone()).is_some())
    }) else {
        return;
    };
    let inner = xxh3_128(&bytes[payload.clone()]).to_le_bytes();
    let parts = [&bytes[..160], &bytes[176..payload.start], &inner, &bytes[payload.end..]];
    let content = xxh3_128(&parts.concat());
    bytes[160..176].copy_from_slice(&content.to_le_bytes());
}

fn word_bytes(dtype: u8) -> u64 {
    Dtype::from_code(dtype).map_or(1, |d| d.word_bytes() as u64)
}

/// [`reseal`], and say that the delta was made against a base of this digest.
pub fn reseal_for(bytes: &mut [u8], base: [u8; 16]) {
    if bytes.len() >= 192 {
        bytes[112..128].copy_from_slice(&base);
        reseal(bytes);
    }
}
