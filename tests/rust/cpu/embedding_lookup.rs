//! Promise: a row looked up is that row of the tenant's restored table, bit for bit: any encoding, dtype,
//! shape, mix of tenants, instruction set and threads. Only what the rows asked need is read, and no bytes do
//! harm.

use crate::common::alone::alone;
use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped, unaligned};
use crate::common::linear::{Shuffled, isas, values};
use xorz::codec::Encoding;
use xorz::cpu::{Arena, EmbeddingArgs, counters, delta_embedding_on};
use xorz::error::{Error, Kind};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Pair, Resident, encode_as};
use xorz::vector::{Executor, Isa, Serial, delta_restore};

/// A table, its fine-tunes, and their deltas in one arena whose gaps are full of rubbish.
struct Fleet {
    dtype: Dtype,
    shape: Shape,
    base: Vec<u8>,
    /// The table of each slot.
    tables: Vec<Vec<u8>>,
    arena: Vec<u8>,
    slots: Vec<[i64; 2]>,
}

impl Fleet {
    fn new(rng: &mut Rng, dtype: Dtype, shape: Shape, odd: bool) -> Self {
        let words = shape.n * shape.k;
        let base =
            if odd && dtype.computes() { adversarial(rng, dtype, words) } else { rng.weights(dtype, words) };
        let mut fleet = Self { dtype, shape, base, tables: vec![], arena: vec![0xEE; 64], slots: vec![] };
        for share in [0.03, 0.5] {
            for encoding in Encoding::ALL {
                let few = if dtype.computes() && share < 0.1 && encoding == Encoding::Exponent {
                    stepped(rng, dtype, &fleet.base, 1e-3)
                } else {
                    perturbed(rng, dtype, &fleet.base, share)
                };
                let strange =
                    if dtype.computes() { adversarial(rng, dtype, words) } else { rng.bytes(few.len()) };
                let table = rng.mix(dtype, &few, &strange, if odd { share } else { 0.0 });
                fleet.add(encoding, table);
            }
        }
        fleet.tables.push(fleet.base.clone());
        fleet.slots.push([12345, 0]);
        fleet
    }

    fn add(&mut self, encoding: Encoding, table: Vec<u8>) {
        let table = if encoding == Encoding::Unchanged { self.base.clone() } else { table };
        let (b, f) = (matrix(self.dtype, self.shape, &self.base), matrix(self.dtype, self.shape, &table));
        let delta = encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap();
        let found = Resident::parse(&delta).unwrap().header().encoding;
        assert!(found == encoding || table == self.base, "{encoding} became {found}");
        self.slots.push([self.arena.len() as i64, delta.len() as i64]);
        self.arena.extend(&delta);
        self.arena.extend([0xEE; 128]);
        self.tables.push(table);
    }

    fn row_bytes(&self) -> usize {
        self.shape.k * self.dtype.word_bytes()
    }

    fn row(&self, tenant: i32, index: i64) -> &[u8] {
        let table = usize::try_from(tenant).map_or(&self.base, |slot| &self.tables[slot]);
        &table[index as usize * self.row_bytes()..][..self.row_bytes()]
    }

    fn look_up(
        &self,
        isa: Isa,
        indices: &[i64],
        tenant_of_row: &[i32],
        exec: &dyn Executor,
    ) -> Result<Vec<u8>, Error> {
        let base = matrix(self.dtype, self.shape, &self.base);
        let arena = Arena { bytes: &self.arena, slots: &self.slots };
        let mut out = vec![0xA5; indices.len() * self.row_bytes()];
        delta_embedding_on(isa, &EmbeddingArgs { indices, base, arena, tenant_of_row }, &mut out, exec)?;
        Ok(out)
    }

    /// Look up and compare row by row.
    fn check(&self, isa: Isa, indices: &[i64], tenant_of_row: &[i32], exec: &dyn Executor) {
        let out = self.look_up(isa, indices, tenant_of_row, exec).unwrap();
        for (i, (&index, &tenant)) in indices.iter().zip(tenant_of_row).enumerate() {
            let got = &out[i * self.row_bytes()..][..self.row_bytes()];
            let (dtype, shape) = (self.dtype, self.shape);
            assert!(got == self.row(tenant, index), "{dtype} {shape} {isa:?}: row {i}, {index} of {tenant}");
        }
    }

    /// `m` rows of any tenants, the base too; half of them of a few rows.
    fn batch(&self, rng: &mut Rng, m: usize) -> (Vec<i64>, Vec<i32>) {
        let n = self.shape.n as u64;
        let index = |rng: &mut Rng| (rng.next() % if rng.unit() < 0.5 { n } else { n.min(5) }) as i64;
        let tenant = |rng: &mut Rng| (rng.next() % (self.slots.len() as u64 + 1)) as i32 - 1;
        ((0..m).map(|_| index(rng)).collect(), (0..m).map(|_| tenant(rng)).collect())
    }
}

#[test]
fn rows_are_those_of_the_restored_tables() {
    let mut rng = Rng::new(81);
    let shapes = [(1, 1), (17, 300), (64, 33), (300, 7), (130, 576), (21, 5000)];
    for dtype in Dtype::ALL {
        for (n, k) in shapes {
            let fleet = Fleet::new(&mut rng, dtype, Shape { n, k }, false);
            let base = matrix(dtype, fleet.shape, &fleet.base);
            for (table, &[at, len]) in fleet.tables.iter().zip(&fleet.slots).filter(|(_, slot)| slot[1] > 0) {
                let delta = Resident::parse(&fleet.arena[at as usize..(at + len) as usize]).unwrap();
                let mut restored = vec![0; table.len()];
                delta_restore(&delta, &base, &mut restored, &Serial).unwrap();
                assert!(restored == *table);
            }
            for isa in isas() {
                for m in [1, 2, 9, 200] {
                    let (indices, tenants) = fleet.batch(&mut rng, m);
                    fleet.check(isa, &indices, &tenants, &Serial);
                    fleet.check(isa, &indices, &tenants, &Shuffled(3));
                }
            }
        }
    }
}

#[test]
fn every_row_of_every_tenant_in_any_order() {
    let mut rng = Rng::new(82);
    for (dtype, shape) in [(Dtype::BF16, Shape { n: 700, k: 100 }), (Dtype::F32, Shape { n: 50, k: 4500 })] {
        let fleet = Fleet::new(&mut rng, dtype, shape, true);
        for tenant in -1..fleet.slots.len() as i32 {
            let forward: Vec<i64> = (0..shape.n as i64).collect();
            let backward: Vec<i64> = forward.iter().rev().copied().collect();
            for indices in [forward, backward] {
                fleet.check(Isa::active().unwrap(), &indices, &vec![tenant; shape.n], &Shuffled(2));
            }
        }
    }
}

#[test]
fn words_that_arithmetic_mishandles_come_back() {
    let mut rng = Rng::new(83);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64] {
        for (n, k) in [(40, 300), (100, 64)] {
            let fleet = Fleet::new(&mut rng, dtype, Shape { n, k }, true);
            for isa in isas() {
                let (indices, tenants) = fleet.batch(&mut rng, 300);
                fleet.check(isa, &indices, &tenants, &Serial);
            }
        }
    }
}

#[test]
fn nothing_is_asked_of_alignment() {
    let mut rng = Rng::new(84);
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::F64, Dtype::U8] {
        let fleet = Fleet::new(&mut rng, dtype, Shape { n: 70, k: 45 }, false);
        let (base, bytes) = (unaligned(&fleet.base), unaligned(&fleet.arena));
        let (indices, tenant_of_row) = fleet.batch(&mut rng, 50);
        let arena = Arena { bytes: &bytes[1..], slots: &fleet.slots };
        let base = matrix(dtype, fleet.shape, &base[1..]);
        let args = EmbeddingArgs { indices: &indices, base, arena, tenant_of_row: &tenant_of_row };
        let mut out = vec![0; 50 * fleet.row_bytes() + 1];
        for isa in isas() {
            delta_embedding_on(isa, &args, &mut out[1..], &Serial).unwrap();
            assert!(out[1..] == fleet.look_up(isa, &indices, &tenant_of_row, &Serial).unwrap());
        }
    }
}

#[test]
fn empty_things_are_looked_up() {
    let mut rng = Rng::new(85);
    let isa = Isa::active().unwrap();
    for (n, k) in [(0, 0), (0, 5), (5, 0), (5, 5)] {
        let mut fleet = Fleet::new(&mut rng, Dtype::BF16, Shape { n, k }, false);
        assert!(fleet.look_up(isa, &[], &[], &Serial).unwrap().is_empty());
        if n > 0 {
            fleet.check(isa, &[4, 0, 4], &[0, -1, 1], &Serial);
        }
        (fleet.slots, fleet.arena) = (vec![], vec![]);
        assert!(fleet.look_up(isa, &[], &[], &Serial).unwrap().is_empty());
        if n > 0 {
            fleet.check(isa, &[1, 2], &[-1, -1], &Serial);
        }
    }
}

/// Bytes of the payload of each tile, from the header and directory as SPEC.md has them.
fn payloads(delta: &[u8]) -> Vec<std::ops::Range<usize>> {
    let number = |at: usize| u64::from_le_bytes(delta[at..at + 8].try_into().unwrap()) as usize;
    let (resident, start, directory) = (Resident::parse(delta).unwrap(), number(72), number(64));
    let h = resident.header();
    let unit = match h.encoding {
        Encoding::Sparse => 16 * (h.gap.bytes() + h.dtype.word_bytes()),
        _ => h.dtype.word_bytes(),
    };
    let entry = |i: usize| {
        let at = directory + 4 * i;
        start + unit * u32::from_le_bytes(delta[at..at + 4].try_into().unwrap()) as usize
    };
    (0..resident.grid().tiles()).map(|i| entry(i)..entry(i + 1)).collect()
}

#[test]
fn only_the_tiles_that_hold_the_rows_are_read() {
    let mut rng = Rng::new(86);
    let isa = Isa::active().unwrap();
    let shape = Shape { n: 300, k: 600 };
    for encoding in [Encoding::Sparse, Encoding::Exponent] {
        let base = rng.weights(Dtype::BF16, shape.n * shape.k);
        let table = stepped(&mut rng, Dtype::BF16, &base, 1e-3);
        let mut fleet =
            Fleet { dtype: Dtype::BF16, shape, base, tables: vec![], arena: vec![], slots: vec![] };
        fleet.add(encoding, table);
        let end = fleet.slots[0][1] as usize;
        let grid = Resident::parse(&fleet.arena[..end]).unwrap().grid();
        let tiles = payloads(&fleet.arena[..end]);
        let height = grid.tile_rows as i64;
        let rows = |band: i64| (band * height..((band + 1) * height).min(300)).collect::<Vec<_>>();
        let asked =
            |fleet: &Fleet, band| fleet.look_up(isa, &rows(band), &vec![0; rows(band).len()], &Serial);
        let intact = asked(&fleet, 2).unwrap();
        assert!(tiles.len() > 3 && grid.tile_cols_count() == 1);
        for (i, range) in tiles.into_iter().enumerate().filter(|(i, _)| *i != 2) {
            let before = asked(&fleet, i as i64).unwrap();
            fleet.arena[range].fill(0xFF);
            assert!(
                asked(&fleet, i as i64).ok() != Some(before),
                "{encoding}: damage to tile {i} has no effect"
            );
        }
        assert!(asked(&fleet, 2).unwrap() == intact);
        fleet.check(isa, &rows(2), &vec![0; rows(2).len()], &Serial);
    }
}

#[test]
fn little_scratch_is_taken() {
    alone(|| {
        let mut rng = Rng::new(87);
        counters::reset();
        let fleet = Fleet::new(&mut rng, Dtype::F64, Shape { n: 40, k: 5000 }, false);
        let (indices, tenants) = fleet.batch(&mut rng, 100);
        std::thread::scope(|s| {
            s.spawn(|| fleet.check(Isa::active().unwrap(), &indices, &tenants, &Serial));
        });
        let peak = counters::scratch_peak_bytes();
        assert!((1..=4096 * 8).contains(&peak), "{peak} bytes");
        assert_eq!(counters::panels_restored(), 0);
    });
}

#[test]
fn misuse_is_refused_in_words() {
    let mut rng = Rng::new(88);
    let isa = Isa::active().unwrap();
    let fleet = Fleet::new(&mut rng, Dtype::BF16, Shape { n: 20, k: 30 }, false);
    let refused = |fleet: &Fleet, indices: &[i64], tenants: &[i32], kind: Kind, words: &str| {
        let error = fleet.look_up(isa, indices, tenants, &Serial).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(words), "{error}");
    };
    let invalid = Kind::InvalidArgument;
    refused(&fleet, &[3, 20], &[0, 1], invalid, "indices[1] is 20, but weight has 20 rows");
    refused(&fleet, &[3, -1], &[0, -1], invalid, "indices[1] is -1, but weight has 20 rows");
    refused(&fleet, &[i64::MIN], &[-1], invalid, "indices[0] is -9223372036854775808");
    refused(&fleet, &[3, 4], &[0, 9], invalid, "tenant_of_row[1] is 9");
    refused(&fleet, &[3, 4], &[-2, 0], invalid, "tenant_of_row[0] is -2");
    refused(&fleet, &[3, 4], &[0], Kind::Mismatch, "tenant_of_row has 1 entries");
    let mut bad = Fleet::new(&mut rng, Dtype::BF16, Shape { n: 20, k: 30 }, false);
    let end = bad.arena.len() as i64;
    for slot in [[1, 192], [-64, 192], [0, -1], [0, end + 1], [i64::MAX - 63, 192], [64, i64::MAX]] {
        bad.slots[2] = slot;
        refused(
            &bad,
            &[3],
            &[2],
            invalid,
            &format!("slots[2] has offset {} and length {}", slot[0], slot[1]),
        );
        // A slot that no row uses is not looked at.
        bad.check(isa, &[3], &[1], &Serial);
    }
    let other = Fleet::new(&mut rng, Dtype::F16, Shape { n: 20, k: 30 }, false);
    (bad.arena, bad.slots) = (other.arena, other.slots);
    refused(&bad, &[3], &[1], Kind::Mismatch, "slots[1]: the delta is of a [20, 30] matrix of F16");
}

/// Whether words are the same, or are NaN in both. A damaged delta may add a NaN to a NaN, and IEEE 754
/// leaves open whose payload the sum has.
fn alike(dtype: Dtype, got: &[u8], want: &[u8]) -> bool {
    if dtype == Dtype::I8 {
        return got == want;
    }
    let w = dtype.word_bytes();
    let pairs = got.chunks_exact(w).zip(want.chunks_exact(w));
    let values = values(dtype, got).into_iter().zip(values(dtype, want));
    got.len() == want.len() && pairs.zip(values).all(|((a, b), (x, y))| a == b || x.is_nan() && y.is_nan())
}

#[test]
fn hostile_arenas_give_an_error_or_what_restoring_gives() {
    let mut rng = Rng::new(89);
    let isa = Isa::active().unwrap();
    let (mut equal, mut refused) = (0, 0);
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::I8] {
        let mut fleet = Fleet::new(&mut rng, dtype, Shape { n: 18, k: 40 }, true);
        let indices: Vec<i64> = (0..18).collect();
        for slot in 0..4 {
            let [at, len] = fleet.slots[slot].map(|v| v as usize);
            for i in at..at + len {
                let was = fleet.arena[i];
                for flip in [0x01, 0x80, 0xFF] {
                    fleet.arena[i] = was ^ flip;
                    let got = fleet.look_up(isa, &indices, &[slot as i32; 18], &Serial);
                    let base = matrix(dtype, fleet.shape, &fleet.base);
                    let mut want = vec![0; fleet.base.len()];
                    let restored = Resident::parse(&fleet.arena[at..at + len])
                        .and_then(|delta| delta_restore(&delta, &base, &mut want, &Serial));
                    refused += usize::from(got.is_err());
                    if let (Ok(got), Ok(())) = (got, restored) {
                        assert!(
                            alike(dtype, &got, &want),
                            "{dtype}: byte {} ^ {flip:#x} of slot {slot}",
                            i - at
                        );
                        equal += 1;
                    }
                    // Others are not concerned.
                    fleet.check(isa, &[7, 8], &[(slot as i32 + 1) % 4, -1], &Serial);
                }
                fleet.arena[i] = was;
            }
        }
    }
    assert!(equal > 100 && refused > 100, "{equal} {refused}");
}
