//! The promises of `delta_linear_grouped` and its gradient: each row of a batch has the bits of its tenant
//! alone (deterministic), the exact sums of its tenant's weights (any mode), and nothing of another row;
//! hostile arenas, slots and maps are refused in words or answered, never followed.

use crate::common::data::{Rng, adversarial, matrix, word};
use crate::common::linear::{Case, DTYPES, MODES, Shuffled, first_difference, integers, isas, values};
use xorz::codec::{Encoding, Grid};
use xorz::cpu::{
    Arena, Biases, GroupedArgs, GroupedGradArgs, Mode, delta_linear_grouped, delta_linear_grouped_grad_input,
    delta_linear_grouped_on,
};
use xorz::error::{Kind, Result};
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Assembler, DeltaPiece, Plan, Resident, encode_tiles};
use xorz::vector::{Executor, Isa, Serial};

/// Tenants on one base, their deltas in one arena among rubbish.
struct Fleet {
    dtype: Dtype,
    shape: Shape,
    /// By slot; empty slots and the base (last) are of encoding `unchanged`.
    cases: Vec<Case>,
    arena: Vec<u8>,
    slots: Vec<[i64; 2]>,
    biases: Vec<u8>,
}

/// A delta of `case` on other tiles than the encoder would choose.
fn on_tiles(case: &Case, tile_rows: usize, tile_cols: usize) -> Vec<u8> {
    let widths = Resident::parse(&case.blob).unwrap().header().widths;
    planned(case, (tile_rows, tile_cols), widths)
}

/// A delta of `case` as a plan of the caller's says.
fn planned(case: &Case, (tile_rows, tile_cols): (usize, usize), widths: [u8; 32]) -> Vec<u8> {
    let h = *Resident::parse(&case.blob).unwrap().header();
    let grid = Grid { shape: case.shape, tile_rows, tile_cols };
    let plan = Plan { encoding: h.encoding, grid, gap: h.gap, widths };
    let (mut piece, mut assembler) = (DeltaPiece::default(), Assembler::new(case.dtype, &plan).unwrap());
    encode_tiles(&plan, case.dtype, 0..grid.tiles(), &case.base, &case.fine_tuned, &mut piece).unwrap();
    assembler.add(&piece).unwrap();
    let finished = assembler.finish(matrix(case.dtype, case.shape, &case.base).digest()).unwrap();
    let payload = if finished.keep_payload { &piece.payload[..] } else { &[] };
    [&finished.head[..], payload, &finished.tail].concat()
}

impl Fleet {
    /// A tenant of each encoding, one of them twice, one on small tiles, and an empty slot.
    fn new(
        rng: &mut Rng,
        dtype: Dtype,
        shape: Shape,
        words: impl Fn(&mut Rng, usize) -> Vec<u8>,
        share: f64,
    ) -> Self {
        let base = words(rng, shape.n * shape.k);
        let mut cases = Vec::new();
        let (mut arena, mut slots) = (vec![0xEE; 128], Vec::new());
        let kinds = [Encoding::Sparse, Encoding::Sparse, Encoding::Sparse, Encoding::Exponent];
        let kinds = kinds.into_iter().chain([Encoding::Raw, Encoding::Unchanged, Encoding::Unchanged]);
        for (slot, encoding) in kinds.enumerate() {
            let other = words(rng, shape.n * shape.k);
            let fine_tuned = rng.mix(dtype, &base, &other, if slot == 2 { share / 20.0 } else { share });
            let mut case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            if slot == 1 {
                case.blob = on_tiles(&case, 16, 256);
            }
            let empty = slot == 6;
            slots.push(if empty { [-5, 0] } else { [arena.len() as i64, case.blob.len() as i64] });
            arena.extend_from_slice(if empty { &[] } else { &case.blob });
            arena.resize(arena.len().next_multiple_of(64) + 64, 0xEE);
            cases.push(case);
        }
        // A slot that no row may use, and one that shares its bytes with another.
        slots.push([i64::MIN, i64::MAX]);
        cases.push(Case::new(dtype, shape, Encoding::Unchanged, &base, &base));
        slots.push(slots[0]);
        let twin = Case::new(dtype, shape, Encoding::Sparse, &base, &cases[0].fine_tuned);
        cases.push(twin);
        cases.push(Case::new(dtype, shape, Encoding::Unchanged, &base, &base));
        let biases = words(rng, cases.len() * shape.n);
        Self { dtype, shape, cases, arena, slots, biases }
    }

    fn case(&self, tenant: i32) -> &Case {
        &self.cases[usize::try_from(tenant).unwrap_or(self.slots.len())]
    }

    fn bias(&self, tenant: i32) -> &[u8] {
        let len = self.shape.n * self.dtype.word_bytes();
        &self.biases[usize::try_from(tenant).unwrap_or(self.slots.len()) * len..][..len]
    }

    fn args<'a>(&'a self, x: &'a [u8], map: &'a [i32], mode: Mode) -> GroupedArgs<'a> {
        let stride = self.shape.n * self.dtype.word_bytes();
        GroupedArgs {
            x,
            m: map.len(),
            base: matrix(self.dtype, self.shape, &self.cases[0].base),
            arena: Arena { bytes: &self.arena, slots: &self.slots },
            tenant_of_row: map,
            biases: Some(Biases { bytes: &self.biases, stride }),
            mode,
        }
    }

    fn run(&self, isa: Isa, x: &[u8], map: &[i32], mode: Mode, exec: &dyn Executor) -> Vec<u8> {
        let mut out = vec![0xA5; map.len() * self.shape.n * self.dtype.word_bytes()];
        delta_linear_grouped_on(isa, &self.args(x, map, mode), &mut out, exec).unwrap();
        out
    }

    /// What `delta_linear` gives each row alone.
    fn alone(&self, isa: Isa, x: &[u8], map: &[i32]) -> Vec<u8> {
        let row = self.shape.k * self.dtype.word_bytes();
        let each = map.iter().enumerate().flat_map(|(i, &t)| {
            let x = &x[i * row..(i + 1) * row];
            self.case(t).linear(isa, x, 1, Some(self.bias(t)), Mode::Deterministic)
        });
        each.collect()
    }
}

/// The tenants that a row may be of.
const TENANTS: [i32; 9] = [-1, 0, 1, 2, 3, 4, 5, 6, 8];

/// Maps of `m` rows: all different, one tenant, the base, empty slots, a few favourites, any, in runs.
fn maps(rng: &mut Rng, m: usize) -> Vec<Vec<i32>> {
    let mut any = |of: u64| TENANTS[(rng.next() % of) as usize];
    let one = any(9);
    let favourite = any(9);
    let zipf = (0..m).map(|i| if i % 5 < 3 { favourite } else { any(9) }).collect();
    let mixed = (0..m).map(|_| any(9)).collect();
    let sparse = (0..m).map(|_| any(4)).collect();
    let distinct = (0..m).map(|i| TENANTS[i % 9]).collect();
    let runs = (0..m).map(|i| TENANTS[i * 4 / m.max(1) + 1]).collect();
    let idle = (0..m).map(|i| if i % 7 == 3 { 0 } else { 6 - (i % 2) as i32 }).collect();
    vec![distinct, vec![one; m], vec![-1; m], zipf, mixed, sparse, runs, idle]
}

#[test]
fn deterministic_rows_have_the_bits_of_their_tenant_alone() {
    let mut rng = Rng::new(41);
    for isa in isas() {
        for dtype in DTYPES {
            // Two column blocks of the base and 17 tile columns of one tenant; odd sizes; one row; one
            // column.
            for (n, k) in [(19, 4203), (70, 131), (1, 600), (33, 1)] {
                if isa == Isa::Scalar && k > 4000 && dtype != Dtype::BF16 {
                    continue;
                }
                let shape = Shape { n, k };
                let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
                let rows: &[usize] = if isa == Isa::Scalar { &[1, 7, 18] } else { &[1, 2, 5, 9, 16, 17, 40] };
                for &m in rows {
                    let x = rng.weights(dtype, m * k);
                    for map in maps(&mut rng, m) {
                        let want = fleet.alone(isa, &x, &map);
                        for threads in [1, 3] {
                            let exec = Shuffled(threads);
                            let got = fleet.run(isa, &x, &map, Mode::Deterministic, &exec);
                            let w = n * dtype.word_bytes();
                            let wrong = got.chunks(w).zip(want.chunks(w)).position(|(a, b)| a != b);
                            assert_eq!(wrong, None, "{isa:?} {dtype} {shape} m {m} {map:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn exact_sums_equal_float64_bit_for_bit_in_any_mix() {
    let mut rng = Rng::new(42);
    for isa in isas().into_iter().filter(|isa| *isa != Isa::Scalar) {
        for dtype in DTYPES {
            for (n, k) in [(35, 259), (18, 4099)] {
                let shape = Shape { n, k };
                let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| integers(r, dtype, w, 8), 0.1);
                // 40 and 100: some tenants have so many rows that their panels are restored.
                for m in [1, 8, 16, 33, 40, 100] {
                    let x = integers(&mut rng, dtype, m * k, 3);
                    let row = k * dtype.word_bytes();
                    for map in maps(&mut rng, m) {
                        let want: Vec<f64> = map
                            .iter()
                            .zip(x.chunks(row))
                            .flat_map(|(&t, x)| fleet.case(t).reference(x, 1, Some(fleet.bias(t))))
                            .collect();
                        for mode in MODES {
                            let got = fleet.run(isa, &x, &map, mode, &Serial);
                            let difference = first_difference(dtype, &got, &want);
                            assert_eq!(difference, None, "{isa:?} {dtype} {shape} m {m} {mode:?} {map:?}");
                        }
                    }
                }
            }
        }
    }
}

/// Tenants whose words are decoded side by side: ten with one width table, three with another, three with
/// tables of their own, one with other tiles, one whose table asks for whole words and one whose table asks
/// for none.
fn exponent_fleet(rng: &mut Rng, dtype: Dtype, shape: Shape) -> Fleet {
    let base = integers(rng, dtype, shape.n * shape.k, 8);
    let (mut cases, mut arena, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    let bits = 8 * dtype.word_bytes() as u8;
    for slot in 0..20u8 {
        let other = integers(rng, dtype, shape.n * shape.k, 8);
        let fine_tuned = rng.mix(dtype, &base, &other, 0.05);
        let mut case = Case::new(dtype, shape, Encoding::Exponent, &base, &fine_tuned);
        let table = |seed: u8| std::array::from_fn(|c| (c as u8).wrapping_mul(7 + 2 * seed) % (bits + 1));
        let (tiles, widths) = match slot {
            0..10 => ((16, 256), table(0)),
            10..13 => ((16, 256), table(1)),
            13..16 => ((16, 256), table(slot)),
            16 => ((32, 512), table(0)),
            17 => ((16, 256), [bits; 32]),
            18 => ((16, 256), [0; 32]),
            _ => ((64, 1024), table(2)),
        };
        case.blob = planned(&case, tiles, widths);
        slots.push([arena.len() as i64, case.blob.len() as i64]);
        arena.extend_from_slice(&case.blob);
        arena.resize(arena.len().next_multiple_of(64), 0);
        cases.push(case);
    }
    cases.push(Case::new(dtype, shape, Encoding::Unchanged, &base, &base));
    let biases = integers(rng, dtype, cases.len() * shape.n, 8);
    Fleet { dtype, shape, cases, arena, slots, biases }
}

#[test]
fn tenants_decoded_side_by_side_equal_float64_bit_for_bit() {
    let mut rng = Rng::new(47);
    for isa in isas().into_iter().filter(|isa| *isa != Isa::Scalar) {
        for dtype in DTYPES {
            for (n, k) in [(35, 259), (16, 32), (70, 1055), (1, 4099)] {
                let shape = Shape { n, k };
                let fleet = exponent_fleet(&mut rng, dtype, shape);
                let all: Vec<i32> = (0..16).collect();
                let others = [16, 17, 18, 19, 0, 0, 1, 1, 1, 1, 13, 13, 13, -1, 2, 3];
                let pairs = [13, 14, 15, 17, 18, 10];
                for map in [&all[..], &all[..9], &all[..5], &all[..3], &others, &pairs, &[17], &[12, 12]] {
                    let x = integers(&mut rng, dtype, map.len() * k, 3);
                    let row = k * dtype.word_bytes();
                    let rows = map.iter().zip(x.chunks(row));
                    let want: Vec<f64> =
                        rows.flat_map(|(&t, x)| fleet.case(t).reference(x, 1, Some(fleet.bias(t)))).collect();
                    for mode in MODES {
                        let got = fleet.run(isa, &x, map, mode, &Serial);
                        let difference = first_difference(dtype, &got, &want);
                        assert_eq!(difference, None, "{isa:?} {dtype} {shape} {mode:?} {map:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn streams_of_another_tenant_are_noticed_in_any_company() {
    let mut rng = Rng::new(48);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 35, k: 259 });
    let mut fleet = exponent_fleet(&mut rng, dtype, shape);
    // The stream of slot 3 as if its words were those of slot 17: longer than the base's words ask for.
    let mut cut = fleet.cases[3].blob.clone();
    cut[128..160].fill(1);
    let place = fleet.slots[3][0] as usize;
    fleet.arena[place..place + cut.len()].copy_from_slice(&cut);
    let x = integers(&mut rng, dtype, 16 * shape.k, 3);
    for isa in isas() {
        for map in [&[3][..], &[3, 14], &[0, 1, 2, 3, 4, 5, 6, 7], &[3, 3, 3, 3, 3, 3]] {
            let mut out = vec![0; map.len() * shape.n * 2];
            let x = &x[..map.len() * shape.k * 2];
            let error =
                delta_linear_grouped_on(isa, &fleet.args(x, map, Mode::Fast), &mut out, &Serial).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{isa:?} {map:?} {error}");
            assert!(error.message().contains("slots[3]"), "{isa:?} {map:?} {error}");
        }
    }
}

#[test]
fn a_batch_of_one_tenant_is_delta_linear_bit_for_bit() {
    let mut rng = Rng::new(43);
    let isa = Isa::active().unwrap();
    for dtype in DTYPES {
        let shape = Shape { n: 37, k: 300 };
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
        for m in [1, 6, 16, 32, 33, 70] {
            let x = rng.weights(dtype, m * shape.k);
            for tenant in TENANTS {
                for mode in MODES {
                    let want = fleet.case(tenant).linear(isa, &x, m, Some(fleet.bias(tenant)), mode);
                    let got = fleet.run(isa, &x, &vec![tenant; m], mode, &Shuffled(2));
                    assert!(got == want, "{dtype} tenant {tenant} m {m} {mode:?}");
                }
            }
        }
    }
}

#[test]
fn a_row_never_depends_on_the_values_of_another() {
    let mut rng = Rng::new(44);
    for isa in isas() {
        for dtype in DTYPES {
            let shape = Shape { n: 21, k: 270 };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
            let out = shape.n * dtype.word_bytes();
            for m in [2, 9, 37, 90] {
                let clean = rng.weights(dtype, m * shape.k);
                for map in maps(&mut rng, m) {
                    let keep = (rng.next() % m as u64) as usize;
                    let mut dirty = clean.clone();
                    for (i, w) in dirty.chunks_mut(dtype.word_bytes()).enumerate() {
                        if i / shape.k != keep {
                            w.copy_from_slice(&word(dtype, [f64::NAN, f64::INFINITY, 1e30, 0.0][i % 4]));
                        }
                    }
                    for mode in MODES {
                        let (a, b) = (
                            fleet.run(isa, &clean, &map, mode, &Serial),
                            fleet.run(isa, &dirty, &map, mode, &Serial),
                        );
                        let at = keep * out..(keep + 1) * out;
                        assert!(a[at.clone()] == b[at], "{isa:?} {dtype} m {m} {mode:?} row {keep} {map:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn non_finite_results_are_those_of_the_tenants_weights() {
    let mut rng = Rng::new(45);
    let isa = Isa::active().unwrap();
    for dtype in DTYPES {
        let shape = Shape { n: 40, k: 290 };
        let words = |r: &mut Rng, words: usize| {
            let plain = integers(r, dtype, words, 4);
            let odd = adversarial(r, dtype, words);
            r.mix(dtype, &plain, &odd, 0.002)
        };
        let fleet = Fleet::new(&mut rng, dtype, shape, words, 0.01);
        let mut seen = 0;
        for m in [1, 9, 36, 80] {
            let plain = integers(&mut rng, dtype, m * shape.k, 2);
            let odd = adversarial(&mut rng, dtype, m * shape.k);
            let x = rng.mix(dtype, &plain, &odd, 0.001);
            for map in maps(&mut rng, m) {
                assert!(
                    fleet.run(isa, &x, &map, Mode::Deterministic, &Serial) == fleet.alone(isa, &x, &map),
                    "{dtype} m {m} {map:?}"
                );
                let got = values(dtype, &fleet.run(isa, &x, &map, Mode::Fast, &Serial));
                let row = shape.k * dtype.word_bytes();
                let want = map
                    .iter()
                    .zip(x.chunks(row))
                    .flat_map(|(&t, x)| fleet.case(t).reference(x, 1, Some(fleet.bias(t))));
                for (i, (g, w)) in got.iter().zip(want).enumerate() {
                    seen += usize::from(w.is_nan());
                    assert_eq!(g.is_nan(), w.is_nan(), "{dtype} m {m} output {i}: {g} for {w} {map:?}");
                }
            }
        }
        assert!(seen > 100, "only {seen} NaN");
    }
}

#[test]
fn gradients_have_the_bits_of_each_tenant_alone() {
    let mut rng = Rng::new(46);
    let isa = Isa::active().unwrap();
    for dtype in DTYPES {
        for (n, k) in [(19, 131), (33, 1), (300, 67), (17, 4300)] {
            let shape = Shape { n, k };
            let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
            for m in [1, 5, 19, 40] {
                let grad = rng.weights(dtype, m * n);
                let row = n * dtype.word_bytes();
                for map in maps(&mut rng, m) {
                    let want: Vec<u8> = map
                        .iter()
                        .zip(grad.chunks(row))
                        .flat_map(|(&t, g)| fleet.case(t).grad(isa, g, 1, &Serial))
                        .collect();
                    let mut out = vec![0xA5; m * k * dtype.word_bytes()];
                    gradient(&fleet, &grad, &map, &mut out, &Shuffled(2)).unwrap();
                    assert!(out == want, "{dtype} {shape} m {m} {map:?}");
                }
            }
        }
    }
}

fn gradient(fleet: &Fleet, grad: &[u8], map: &[i32], out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    let args = GroupedGradArgs {
        grad,
        m: map.len(),
        base: matrix(fleet.dtype, fleet.shape, &fleet.cases[0].base),
        arena: Arena { bytes: &fleet.arena, slots: &fleet.slots },
        tenant_of_row: map,
    };
    delta_linear_grouped_grad_input(&args, out, exec)
}

#[test]
fn empty_dimensions_and_no_slots_are_computed_on() {
    for dtype in DTYPES {
        for (n, k, m) in [(3, 0, 2), (0, 5, 2), (3, 5, 0), (0, 0, 0), (3, 5, 2)] {
            let base = vec![0; n * k * dtype.word_bytes()];
            let bias: Vec<u8> = (0..n).flat_map(|i| word(dtype, i as f64 + 0.5)).collect();
            for mode in MODES {
                let args = GroupedArgs {
                    x: &vec![0; m * k * dtype.word_bytes()],
                    m,
                    base: matrix(dtype, Shape { n, k }, &base),
                    arena: Arena { bytes: &[], slots: &[] },
                    tenant_of_row: &vec![-1; m],
                    biases: Some(Biases { bytes: &bias, stride: 0 }),
                    mode,
                };
                let mut out = vec![0xA5; m * n * dtype.word_bytes()];
                delta_linear_grouped(&args, &mut out, &Serial).unwrap();
                assert_eq!(out, bias.repeat(m));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut rng = Rng::new(47);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 20, k: 300 });
    let mut fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
    let x = rng.weights(dtype, 3 * shape.k);
    let mut out = vec![0u8; 3 * shape.n * 2];
    let good = [0, -1, 4];
    let mut refused = |fleet: &Fleet, map: &[i32], kind: Kind, names: &[&str]| {
        let e = delta_linear_grouped(&fleet.args(&x, map, Mode::Fast), &mut out, &Serial).unwrap_err();
        let all = names.iter().all(|name| e.message().contains(name));
        assert!(e.kind() == kind && all, "{e} lacks one of {names:?}");
        if map.len() == 3 {
            let grad = vec![0; 3 * shape.n * 2];
            let mut gx = vec![0; 3 * shape.k * 2];
            let e = gradient(fleet, &grad, map, &mut gx, &Serial).unwrap_err();
            assert!(e.kind() == kind && names.iter().all(|name| e.message().contains(name)), "{e}");
        }
    };
    let wrong = Kind::InvalidArgument;
    refused(&fleet, &[0, 9, 1], wrong, &["tenant_of_row[1] is 9", "9 slots"]);
    refused(&fleet, &[0, 1, -2], wrong, &["tenant_of_row[2] is -2"]);
    refused(&fleet, &[i32::MIN, 1, 0], wrong, &["tenant_of_row[0] is -2147483648"]);
    refused(&fleet, &[0, 1, 7], wrong, &["slots[7]", "-9223372036854775808", "negative"]);
    refused(&fleet, &[0; 2], Kind::Mismatch, &["x has 1800 bytes"]);
    let (place, whole) = (fleet.slots[4], fleet.arena.len());
    let text = whole.to_string();
    for (slot, names) in [
        ([place[0] + 8, place[1]], ["offset must be a multiple of 64", "slots[4]"]),
        ([place[0], -1], ["length -1", "negative"]),
        ([-64, place[1]], ["offset -64", "negative"]),
        ([place[0], whole as i64], ["the arena has", &text]),
        ([i64::MAX - 63, i64::MAX], ["the arena has", &text]),
    ] {
        fleet.slots[4] = slot;
        refused(&fleet, &good, wrong, &names);
    }
    fleet.slots[4] = [place[0], 40];
    refused(&fleet, &good, Kind::Truncated, &["slots[4]"]);
    fleet.slots[4] = [0, 64];
    refused(&fleet, &good, Kind::Truncated, &["slots[4]"]);
    let other =
        Case::new(dtype, Shape { n: 300, k: 20 }, Encoding::Raw, &fleet.cases[0].base, &fleet.cases[4].base);
    let case =
        Case::new(Dtype::F16, shape, Encoding::Sparse, &fleet.cases[0].base, &fleet.cases[0].fine_tuned);
    for (blob, names) in [(other.blob, ["slots[4]", "[300, 20]"]), (case.blob, ["slots[4]", "F16"])] {
        fleet.arena.resize(whole, 0);
        fleet.arena.extend_from_slice(&blob);
        fleet.slots[4] = [whole as i64, blob.len() as i64];
        refused(&fleet, &good, Kind::Mismatch, &names);
    }
    let mut args = fleet.args(&x, &[-1; 3], Mode::Fast);
    args.biases = Some(Biases { bytes: &fleet.biases[2..], stride: 40 });
    let e = delta_linear_grouped(&args, &mut out, &Serial).unwrap_err();
    assert!(e.kind() == Kind::Mismatch && e.message().contains("biases have"), "{e}");
}

#[test]
fn a_broken_tile_is_named_with_its_slot() {
    let mut rng = Rng::new(48);
    for dtype in DTYPES {
        let shape = Shape { n: 20, k: 300 };
        let mut fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.2);
        let blob = fleet.cases[0].blob.clone();
        let xorz::codec::Tile::Sparse(tile) = Resident::parse(&blob).unwrap().tile(0).unwrap() else {
            panic!("not sparse")
        };
        let gaps = fleet.slots[0][0] as usize + tile.gaps.as_ptr().addr() - blob.as_ptr().addr();
        fleet.arena[gaps..gaps + 64].fill(255);
        for isa in isas() {
            for m in [2, 9, 40, 90] {
                let x = rng.weights(dtype, m * shape.k);
                let map: Vec<i32> = (0..m).map(|i| [0, 0, 0, 1, -1][i % 5]).collect();
                let mut out = vec![0; m * shape.n * dtype.word_bytes()];
                let args = fleet.args(&x, &map, Mode::Fast);
                let e = delta_linear_grouped_on(isa, &args, &mut out, &Serial).unwrap_err();
                assert!(e.kind() == Kind::Corrupt && e.message().contains("slots[0]"), "{e}");
                assert!(e.message().contains("tile 0"), "{e}");
            }
        }
    }
}

#[test]
fn hostile_arenas_and_slots_are_refused_or_answered() {
    let mut rng = Rng::new(49);
    let mut outcomes = [0; 2];
    for dtype in DTYPES {
        let shape = Shape { n: 35, k: 270 };
        let fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.05);
        let clean = fleet.arena.clone();
        let mut fleet = fleet;
        let x = rng.weights(dtype, 40 * shape.k);
        let mut out = vec![0u8; 40 * shape.n * dtype.word_bytes()];
        let grad = rng.weights(dtype, 6 * shape.n);
        let mut gx = vec![0u8; 6 * shape.k * dtype.word_bytes()];
        let slots = fleet.slots.clone();
        for round in 0..400 {
            fleet.arena.copy_from_slice(&clean);
            fleet.slots.clone_from(&slots);
            let slot = (rng.next() % 5) as usize;
            let [offset, length] = slots[slot].map(|v| v as u64);
            if round % 2 == 0 {
                for _ in 0..1 + rng.next() % 4 {
                    // The header and the directories as often as all the rest.
                    let within = if rng.next().is_multiple_of(2) { 256.min(length) } else { length };
                    fleet.arena[(offset + rng.next() % within) as usize] ^= 1 << (rng.next() % 8);
                }
            } else {
                let any = |rng: &mut Rng| match rng.next() % 4 {
                    0 => rng.next() as i64,
                    1 => (rng.next() % clean.len() as u64) as i64,
                    2 => (rng.next() % clean.len() as u64 / 64 * 64) as i64,
                    _ => slots[(rng.next() % 5) as usize][(rng.next() % 2) as usize],
                };
                let place = [any(&mut rng), any(&mut rng)];
                fleet.slots[slot][(rng.next() % 2) as usize] = place[0];
                if rng.next().is_multiple_of(2) {
                    fleet.slots[slot] = place;
                }
            }
            let m = [6, 40][(rng.next() % 2) as usize];
            let map: Vec<i32> = (0..m).map(|i| if i % 2 == 0 { slot as i32 } else { -1 }).collect();
            let row = shape.k * dtype.word_bytes();
            let args = fleet.args(&x[..m * row], &map, MODES[round / 2 % 2]);
            let done = delta_linear_grouped(&args, &mut out[..m * shape.n * dtype.word_bytes()], &Serial);
            outcomes[usize::from(done.is_ok())] += 1;
            let _ = gradient(&fleet, &grad, &map[..6], &mut gx, &Serial);
        }
    }
    assert!(outcomes.iter().all(|n| *n > 100), "{outcomes:?}");
}

#[test]
fn mutants_are_caught() {
    // What the comparisons above must not let pass: rows swapped between tenants, a slot ignored, another's
    // bias.
    let mut rng = Rng::new(50);
    let isa = Isa::active().unwrap();
    for dtype in DTYPES {
        let shape = Shape { n: 20, k: 300 };
        let mut fleet = Fleet::new(&mut rng, dtype, shape, |r, w| r.weights(dtype, w), 0.1);
        let map = [0, 1, 3, 4, -1, 6];
        let x = rng.weights(dtype, map.len() * shape.k);
        let want = fleet.alone(isa, &x, &map);
        let run = |fleet: &Fleet, map: &[i32]| fleet.run(isa, &x, map, Mode::Deterministic, &Serial);
        assert!(run(&fleet, &map) == want);
        for i in 0..map.len() - 1 {
            let mut swapped = map;
            swapped.swap(i, i + 1);
            assert!(run(&fleet, &swapped) != want, "{dtype}: rows {i} and {} swapped", i + 1);
        }
        for slot in [0, 1, 3, 4] {
            let kept = std::mem::take(&mut fleet.slots[slot]);
            assert!(run(&fleet, &map) != want, "{dtype}: slot {slot} ignored");
            fleet.slots[slot] = kept;
        }
        let len = fleet.biases.len() - 1;
        fleet.biases[len] ^= 0x40;
        assert!(run(&fleet, &map) != want, "{dtype}: the base's bias changed");
    }
}
