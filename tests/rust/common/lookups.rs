//! Tables to look rows up in: a base, its fine-tunes, their deltas in one arena among rubbish. Must hold no
//! expectation.

use super::data::Rng;
use super::device::{Launch, Param};
use super::kernels::{nudged, on_tiles, tuned};
use super::linear::Case;
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::Resident;

/// Where in the parameters output and status are.
pub const LOOKUP_OUT: usize = 7;
pub const LOOKUP_STATUS: usize = 12;

#[derive(Clone)]
pub struct Tables {
    pub dtype: Dtype,
    pub shape: Shape,
    pub base: Vec<u8>,
    /// Fine-tuned words of each slot.
    pub tables: Vec<Vec<u8>>,
    pub arena: Vec<u8>,
    pub slots: Vec<[i64; 2]>,
}

impl Tables {
    /// A tenant of each encoding with few changes and with many, on other tiles than usual, and an empty
    /// slot.
    pub fn new(rng: &mut Rng, dtype: Dtype, shape: Shape) -> Self {
        let base = rng.weights(dtype, shape.n * shape.k);
        let mut all = Self { dtype, shape, base, tables: vec![], arena: vec![0xEE; 64], slots: vec![] };
        for share in [0.04, 0.5] {
            for encoding in Encoding::ALL {
                let odd = tuned(rng, dtype, &all.base, share);
                let fine_tuned = match encoding {
                    Encoding::Unchanged => all.base.clone(),
                    Encoding::Exponent => {
                        let near = nudged(rng, dtype.word_bytes(), &all.base, 3, 0);
                        rng.mix(dtype, &near, &odd, share / 4.0)
                    }
                    Encoding::Sparse | Encoding::Raw => odd,
                };
                all.add(encoding, &fine_tuned, share > 0.1);
            }
        }
        all.tables.push(all.base.clone());
        all.slots.push([-7, 0]);
        all
    }

    fn add(&mut self, encoding: Encoding, fine_tuned: &[u8], narrow: bool) {
        let mut case = Case::new(self.dtype, self.shape, encoding, &self.base, fine_tuned);
        match Resident::parse(&case.blob).unwrap().header().encoding {
            Encoding::Sparse if narrow => case.blob = on_tiles(&case, 16, 256),
            Encoding::Exponent if narrow => case.blob = on_tiles(&case, 32, 512),
            _ => {}
        }
        self.slots.push([self.arena.len() as i64, case.blob.len() as i64]);
        self.arena.extend_from_slice(&case.blob);
        self.arena.resize(self.arena.len().next_multiple_of(64) + 64, 0xEE);
        self.tables.push(case.fine_tuned);
    }

    pub fn row_bytes(&self) -> usize {
        self.shape.k * self.dtype.word_bytes()
    }

    pub fn row(&self, tenant: i32, index: i64) -> &[u8] {
        let table = usize::try_from(tenant).map_or(&self.base, |slot| &self.tables[slot]);
        &table[index as usize * self.row_bytes()..][..self.row_bytes()]
    }

    pub fn rows(&self, indices: &[i64], map: &[i32]) -> Vec<u8> {
        indices.iter().zip(map).flat_map(|(index, tenant)| self.row(*tenant, *index)).copied().collect()
    }

    /// `m` rows of any tenants, half of them of a few rows of the table.
    pub fn batch(&self, rng: &mut Rng, m: usize) -> (Vec<i64>, Vec<i32>) {
        let n = self.shape.n as u64;
        let index = |rng: &mut Rng| (rng.next() % if rng.unit() < 0.5 { n } else { n.min(5) }) as i64;
        let tenant = |rng: &mut Rng| (rng.next() % (self.slots.len() as u64 + 1)) as i32 - 1;
        ((0..m).map(|_| index(rng)).collect(), (0..m).map(|_| tenant(rng)).collect())
    }

    /// On `blocks` blocks; cuda/README.md has the parameters.
    pub fn launch(&self, indices: &[i64], map: &[i32], blocks: (u32, u32), seed: u64) -> Launch {
        let le = |words: &[i64]| Param::In(words.iter().flat_map(|v| v.to_le_bytes()).collect(), 0);
        let params = vec![
            le(indices),
            Param::In(self.base.clone(), 0),
            Param::In(self.arena.clone(), 0),
            Param::U64(self.arena.len() as u64),
            le(self.slots.as_flattened()),
            Param::U64(self.slots.len() as u64),
            Param::In(map.iter().flat_map(|v| v.to_le_bytes()).collect(), 0),
            Param::Out(vec![0x5A; indices.len() * self.row_bytes()], 0),
            Param::U64(indices.len() as u64),
            Param::U64(self.shape.n as u64),
            Param::U64(self.shape.k as u64),
            // Words that are bits may be those of any dtype of their size, as the host says it.
            Param::U32(if matches!(self.dtype, Dtype::I16 | Dtype::I32) { 0 } else { self.dtype as u32 }),
            Param::Out(vec![0; 4], 0),
        ];
        let kernel = format!("xorz_delta_embedding_{}", 8 * self.dtype.word_bytes());
        Launch { kernel, blocks, seed, count: false, late: false, only: None, params }
    }
}
