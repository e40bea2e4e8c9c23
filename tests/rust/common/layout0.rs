//! Deltas of layout 0, encoding `exponent`, put together by hand from SPEC.md: what packages of version 1
//! hold and no library writes any more. The bits of words that do not fit are noise, as layout 0 allows.

use super::data::{Rng, matrix};
use xorz::matrix::{Dtype, Shape};
use xxhash_rust::xxh3::xxh3_128;

/// The stream of one tile: units, and the bits of each lane's units that are filled.
#[derive(Default)]
struct Stream {
    units: Vec<u64>,
    /// By lane: its units, and how many of their bits are used.
    lanes: [(Vec<usize>, u32); 32],
}

impl Stream {
    fn put(&mut self, lane: usize, value: u64, width: u32, word_bits: u32) {
        let (places, used) = &mut self.lanes[lane];
        if places.len() as u32 * word_bits - *used < width {
            places.push(self.units.len());
            self.units.push(0);
        }
        for bit in 0..width {
            let unit = &mut self.units[places[(*used / word_bits) as usize]];
            *unit |= (value >> bit & 1) << (*used % word_bits);
            *used += 1;
        }
    }
}

struct Pair<'a> {
    dtype: Dtype,
    base: &'a [u8],
    fine_tuned: &'a [u8],
}

impl Pair<'_> {
    fn words(&self, at: usize) -> (u64, u64) {
        let w = self.dtype.word_bytes();
        let load = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..w].copy_from_slice(&bytes[at * w..(at + 1) * w]);
            u64::from_le_bytes(word)
        };
        (load(self.base), load(self.fine_tuned))
    }
}

/// A delta of tiles of `tile` rows and columns.
pub fn exponent(
    (dtype, shape): (Dtype, Shape),
    tile: (usize, usize),
    widths: &[u8; 32],
    (base, fine_tuned): (&[u8], &[u8]),
    rng: &mut Rng,
) -> Vec<u8> {
    let pair = Pair { dtype, base, fine_tuned };
    let w = dtype.word_bytes();
    let (mut first_unit, mut first_exception) = (vec![0u32], vec![0u32]);
    let (mut payload, mut positions, mut words) = (vec![], vec![], vec![]);
    let (mut units, mut exceptions, mut changed) = (0u64, 0u64, 0u64);
    for r0 in (0..shape.n).step_by(tile.0) {
        for c0 in (0..shape.k).step_by(tile.1) {
            let mut stream = Stream::default();
            for r in r0..(r0 + tile.0).min(shape.n) {
                for c in c0..(c0 + tile.1).min(shape.k) {
                    let (b, f) = pair.words(r * shape.k + c);
                    changed += u64::from(b != f);
                    if put(&mut stream, dtype, widths, (b, f), (c - c0) % 32, rng) {
                        continue;
                    }
                    positions.extend((((r - r0) * tile.1 + c - c0) as u16).to_le_bytes());
                    words.extend(&f.to_le_bytes()[..w]);
                    exceptions += 1;
                }
            }
            stream.units.iter().for_each(|unit| payload.extend(&unit.to_le_bytes()[..w]));
            units += stream.units.len() as u64;
            first_unit.push(units as u32);
            first_exception.push(exceptions as u32);
        }
    }
    let list = |firsts: &[u32]| -> Vec<u8> { firsts.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let directory = if exceptions > 0 { list(&first_exception) } else { vec![] };
    let sections = [list(&first_unit), payload, directory, positions, words];
    let numbers = [shape.n as u64, shape.k as u64, 0, changed, exceptions, units];
    seal((dtype, shape), tile, widths, base, numbers, &sections)
}

/// Append a word to its lane; whether it fits.
fn put(
    stream: &mut Stream,
    dtype: Dtype,
    widths: &[u8; 32],
    (b, f): (u64, u64),
    lane: usize,
    rng: &mut Rng,
) -> bool {
    let bits = 8 * dtype.word_bytes() as u32;
    let shift = match (dtype, bits) {
        (Dtype::F16, _) => 10,
        (_, 8) => 3,
        (_, 16) => 7,
        (_, 32) => 23,
        _ => 52,
    };
    let width = u32::from(widths[(b >> shift & 31) as usize]);
    if width == 0 {
        return b == f;
    }
    let mask = u64::MAX >> (64 - bits);
    let v = f.wrapping_sub(b).wrapping_add(1 << (width - 1)) & mask;
    let fits = v <= u64::MAX >> (64 - width);
    stream.put(lane, if fits { v } else { rng.next() }, width, bits);
    fits
}

fn seal(
    (dtype, shape): (Dtype, Shape),
    tile: (usize, usize),
    widths: &[u8; 32],
    base: &[u8],
    mut numbers: [u64; 6],
    sections: &[Vec<u8>; 5],
) -> Vec<u8> {
    let mut out = vec![0; 192];
    let mut offsets = vec![];
    for section in sections {
        offsets.push(out.len() as u64);
        out.extend(section);
        out.resize(out.len().next_multiple_of(64), 0);
    }
    numbers[2] = out.len() as u64;
    out[..8].copy_from_slice(b"XORZDLT\0");
    out[10] = 2;
    out[11] = dtype as u8;
    (out[12], out[13], out[14]) = (tile.0.trailing_zeros() as u8, tile.1.trailing_zeros() as u8, 1);
    for (i, v) in numbers.iter().chain(&offsets).enumerate() {
        out[16 + 8 * i..24 + 8 * i].copy_from_slice(&v.to_le_bytes());
    }
    out[112..128].copy_from_slice(&matrix(dtype, shape, base).digest().0);
    out[128..160].copy_from_slice(widths);
    let payload = offsets[1] as usize..offsets[1] as usize + sections[1].len();
    let inner = xxh3_128(&out[payload.clone()]).to_le_bytes();
    let content = [&out[..160], &out[176..payload.start], &inner, &out[payload.end..]].concat();
    out[160..176].copy_from_slice(&xxh3_128(&content).to_le_bytes());
    out
}
