//! Promise: the fast encoders give the oracle's bytes, on every instruction set, for every dtype, encoding
//! and shape; cut into pieces anywhere, on any number of threads.

use crate::common::data::{Rng, adversarial, matrix, perturbed, stepped, unaligned};
use crate::common::linear::{Shuffled, isas};
use std::ops::Range;
use xorz::codec::{Encoding, GapKind, Grid, Prefer};
use xorz::error::Kind;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{
    Assembler, DeltaPiece, Estimate, Listed, Pair, Plan, Resident, encode_as, encode_pair, encode_tiles,
    estimate, estimate_exactly,
};
use xorz::vector::{self, Isa, Serial};

const SHAPES: [(usize, usize); 12] = [
    (0, 3),
    (3, 0),
    (1, 1),
    (1, 33),
    (1, 3 * 4096 + 517),
    (1500, 1),
    (35, 301),
    (16, 256),
    (17, 4500),
    (300, 40),
    (3, 8192),
    (67, 95),
];

/// Pairs that ask everything of an encoder: nothing, little, much and all changed; words that arithmetic
/// mishandles.
fn pairs(rng: &mut Rng, dtype: Dtype, words: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    let floating = matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64);
    let base = rng.weights(dtype, words);
    let mut all = vec![(base.clone(), base.clone()), (base.clone(), perturbed(rng, dtype, &base, 0.02))];
    let odd = if floating { adversarial(rng, dtype, words) } else { rng.bytes(base.len()) };
    all.push((odd.clone(), perturbed(rng, dtype, &odd, 0.3)));
    all.push((odd, rng.bytes(base.len())));
    all.push((rng.bytes(base.len()), rng.bytes(base.len())));
    if floating {
        all.extend([1e-5, 1e-3].map(|lr| (base.clone(), stepped(rng, dtype, &base, lr))));
    }
    all
}

/// Plans of every encoding, good ones and bad ones.
fn plans(rng: &mut Rng, dtype: Dtype, shape: Shape) -> Vec<Plan> {
    let bits = 8 * dtype.word_bytes() as u64;
    let plan = |encoding, grid, gap, widths| Plan { encoding, grid, gap, widths };
    let (narrow, tall) = (Grid::for_sparse(shape), Grid::for_exponent(shape));
    let mut plans = vec![
        plan(Encoding::Raw, narrow, GapKind::U8, [0; 32]),
        plan(Encoding::Sparse, narrow, GapKind::U8, [0; 32]),
        plan(Encoding::Sparse, narrow, GapKind::U16, [0; 32]),
    ];
    let mut table =
        |f: &mut dyn FnMut(u64) -> u64| -> [u8; 32] { std::array::from_fn(|_| f(rng.next()) as u8) };
    let tables = [
        [0; 32],
        [1; 32],
        [bits as u8; 32],
        [bits as u8 - 1; 32],
        table(&mut |r| r % (bits + 1)),
        table(&mut |r| r % 5),
        table(&mut |r| if r % 2 == 0 { bits } else { 0 }),
    ];
    plans.extend(tables.map(|t| plan(Encoding::Exponent, tall, GapKind::U8, t)));
    plans.push(plan(Encoding::Exponent, narrow, GapKind::U8, tables[4]));
    plans
}

fn region(plan: &Plan, w: usize, tiles: &Range<usize>) -> Range<usize> {
    if tiles.is_empty() {
        return 0..0;
    }
    let (first, last) = (plan.grid.rect(tiles.start), plan.grid.rect(tiles.end - 1));
    let k = plan.grid.shape.k;
    if plan.grid.shape.n == 1 { first.c0 * w..last.c1 * w } else { first.r0 * k * w..last.r1 * k * w }
}

fn oracle(plan: &Plan, dtype: Dtype, base: &[u8], fine_tuned: &[u8]) -> DeltaPiece {
    let mut piece = DeltaPiece::default();
    encode_tiles(plan, dtype, 0..plan.grid.tiles(), base, fine_tuned, &mut piece).unwrap();
    piece
}

#[test]
fn every_instruction_set_encodes_the_oracles_tiles() {
    let mut rng = Rng::new(51);
    for dtype in Dtype::ALL {
        for (n, k) in SHAPES {
            let shape = Shape { n, k };
            for (base, fine_tuned) in pairs(&mut rng, dtype, n * k) {
                let (b, f) = (unaligned(&base), unaligned(&fine_tuned));
                for plan in plans(&mut rng, dtype, shape) {
                    let want = oracle(&plan, dtype, &base, &fine_tuned);
                    for isa in isas() {
                        for words in [(&base[..], &fine_tuned[..]), (&b[1..], &f[1..])] {
                            let mut got = DeltaPiece::default();
                            let tiles = 0..plan.grid.tiles();
                            vector::encode_tiles_on(isa, &plan, dtype, tiles, words, &mut got).unwrap();
                            same(&got, &want, &format!("{isa:?} {dtype} {shape} {plan:?}"));
                        }
                    }
                }
            }
        }
    }
}

fn same(got: &DeltaPiece, want: &DeltaPiece, what: &str) {
    assert_eq!(got.changed, want.changed, "changed, {what}");
    assert!(got.units == want.units, "units, {what}");
    assert!(got.entries == want.entries, "entries, {what}");
    assert!(got.exceptions == want.exceptions, "exceptions, {what}");
    let at = got.payload.iter().zip(&want.payload).position(|(a, b)| a != b);
    assert!(got.payload == want.payload, "payload at {at:?} of {}, {what}", want.payload.len());
}

#[test]
fn pieces_cut_anywhere_give_the_same_bytes() {
    let mut rng = Rng::new(52);
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::U8, Dtype::F64] {
        for (n, k) in [(1, 9 * 4096 + 3), (1000, 200), (70, 9000)] {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
            for plan in plans(&mut rng, dtype, shape) {
                let want = oracle(&plan, dtype, &base, &fine_tuned);
                let unit = if n == 1 { 1 } else { plan.grid.tile_cols_count() };
                let mut got = DeltaPiece::default();
                let mut at = 0;
                while at < plan.grid.tiles() {
                    let end = (at + unit * (1 + rng.next() as usize % 3)).min(plan.grid.tiles());
                    let bytes = region(&plan, dtype.word_bytes(), &(at..end));
                    let words = (&base[bytes.clone()], &fine_tuned[bytes]);
                    if rng.next().is_multiple_of(2) {
                        vector::encode_tiles(&plan, dtype, at..end, words.0, words.1, &mut got).unwrap();
                    } else {
                        encode_tiles(&plan, dtype, at..end, words.0, words.1, &mut got).unwrap();
                    }
                    at = end;
                }
                same(&got, &want, &format!("{dtype} {shape} {plan:?}"));
            }
        }
    }
}

#[test]
fn pieces_put_together_are_the_encoders_delta() {
    let mut rng = Rng::new(53);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::I8, Dtype::I64] {
        for (n, k) in [(0, 5), (1, 13000), (130, 77), (40, 5000)] {
            let shape = Shape { n, k };
            let base = rng.weights(dtype, n * k);
            for share in [0.0, 0.03, 0.9] {
                let fine_tuned = perturbed(&mut rng, dtype, &base, share);
                let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
                for encoding in Encoding::ALL {
                    let want = encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap();
                    let header = *Resident::parse(&want).unwrap().header();
                    let grid = header.grid();
                    let plan =
                        Plan { encoding: header.encoding, grid, gap: header.gap, widths: header.widths };
                    let mut assembler = Assembler::new(dtype, &plan).unwrap();
                    let (mut payload, head) = (vec![], assembler.head_bytes());
                    let unit = if n == 1 { 1 } else { grid.tile_cols_count().max(1) };
                    for start in (0..grid.tiles()).step_by(unit) {
                        let tiles = start..start + unit;
                        let bytes = region(&plan, dtype.word_bytes(), &tiles);
                        let mut piece = DeltaPiece::default();
                        vector::encode_tiles(
                            &plan,
                            dtype,
                            tiles,
                            &base[bytes.clone()],
                            &fine_tuned[bytes],
                            &mut piece,
                        )
                        .unwrap();
                        assembler.add(&piece).unwrap();
                        payload.extend(piece.payload);
                    }
                    let (bytes, changed) = (assembler.bytes(), assembler.changed());
                    let done = assembler.finish(b.digest()).unwrap();
                    assert_eq!((done.header, changed), (header, header.changed));
                    assert_eq!(done.keep_payload, header.changed > 0);
                    let kept = if done.keep_payload { payload } else { vec![] };
                    assert!(!done.keep_payload || done.head.len() == head);
                    let got = [done.head, kept, done.tail].concat();
                    assert!(got == want, "{dtype} {shape} {share} {encoding}");
                    assert_eq!(bytes, got.len() as u64);
                }
            }
        }
    }
}

#[test]
fn whole_matrices_are_the_oracles_on_any_threads() {
    let mut rng = Rng::new(54);
    for dtype in Dtype::ALL {
        for (n, k) in SHAPES.into_iter().chain([(700, 1100), (1, 700_000)]) {
            let shape = Shape { n, k };
            for (base, fine_tuned) in pairs(&mut rng, dtype, n * k).into_iter().step_by(1 + n * k / 200_000) {
                let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
                for prefer in [Prefer::Speed, Prefer::Memory] {
                    let want = encode_pair(&b, &f, prefer).unwrap();
                    for isa in isas() {
                        let serial = vector::encode_on(isa, &b, &f, prefer, &Serial).unwrap();
                        assert!(serial == want, "{isa:?} {dtype} {shape} {prefer:?}");
                        let shared = vector::encode_on(isa, &b, &f, prefer, &Shuffled(3)).unwrap();
                        assert!(shared == want, "{isa:?} {dtype} {shape} {prefer:?}, threads");
                    }
                    let mut words = unaligned(&base);
                    vector::patch(&Resident::parse(&want).unwrap(), &mut words[1..]).unwrap();
                    assert!(words[1..] == fine_tuned, "patch {dtype} {shape} {prefer:?}");
                }
            }
        }
    }
}

#[test]
fn estimates_are_the_oracles_and_near_the_truth() {
    let mut rng = Rng::new(55);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::U16, Dtype::U8, Dtype::F64] {
        for (n, k) in [(0, 3), (5, 7), (35, 301), (1600, 300), (1, 300_000)] {
            let shape = Shape { n, k };
            for (base, fine_tuned) in pairs(&mut rng, dtype, n * k) {
                let (b, f) = (matrix(dtype, shape, &base), matrix(dtype, shape, &fine_tuned));
                for prefer in [Prefer::Speed, Prefer::Memory] {
                    let pair = || Pair::new(b, f).unwrap();
                    let (sampled, exact) = (
                        estimate(&mut pair(), prefer).unwrap(),
                        estimate_exactly(&mut pair(), prefer).unwrap(),
                    );
                    for isa in isas() {
                        let on = |exactly| vector::estimate_on(isa, &mut pair(), prefer, exactly).unwrap();
                        assert_eq!((on(false), on(true)), (sampled, exact), "{isa:?} {dtype} {shape}");
                    }
                    assert!(exact.exact);
                    let actual = encode_pair(&b, &f, prefer).unwrap().len() as u64;
                    assert!(!sampled.is_off(actual), "{dtype} {shape} {sampled:?} {actual}");
                    let off = exact.bytes.abs_diff(actual);
                    assert!(off <= actual / 8 + 128, "{dtype} {shape} {prefer:?}: {off} off {actual}");
                }
            }
        }
    }
}

#[test]
fn a_misleading_sample_is_noticed_and_made_good() {
    // All changes in a few rows that no sample of one tile in many sees.
    let mut rng = Rng::new(56);
    let (dtype, shape) = (Dtype::BF16, Shape { n: 16 * 400, k: 256 });
    let base = rng.weights(dtype, shape.n * shape.k);
    let b = matrix(dtype, shape, &base);
    let blind = |rng: &mut Rng| -> (Vec<u8>, Estimate) {
        for band in 0..400 {
            let mut fine_tuned = base.clone();
            let at = band * 16 * 256 * 2..(band + 16).min(400) * 16 * 256 * 2;
            for word in fine_tuned[at].chunks_mut(2) {
                word[0] ^= u8::from(!rng.next().is_multiple_of(3));
            }
            let mut pair = Pair::new(b, matrix(dtype, shape, &fine_tuned)).unwrap();
            let found = estimate(&mut pair, Prefer::Memory).unwrap();
            if (found.plan.encoding, found.plan.widths) == (Encoding::Exponent, [0; 32]) {
                return (fine_tuned, found);
            }
        }
        panic!("every sample saw the changes");
    };
    let (fine_tuned, sampled) = blind(&mut rng);
    assert!(!sampled.exact);
    let f = matrix(dtype, shape, &fine_tuned);
    let delta = encode_pair(&b, &f, Prefer::Memory).unwrap();
    let misled = oracle(&sampled.plan, dtype, &base, &fine_tuned);
    let apart = misled.entries.bytes() + misled.exceptions.bytes();
    let misled_bytes = (misled.payload.len() + apart) as u64;
    assert!(sampled.is_off(misled_bytes));
    assert!((delta.len() as u64) < misled_bytes, "{} of {misled_bytes}", delta.len());
    assert!(vector::encode(&b, &f, Prefer::Memory, &Serial).unwrap() == delta);
    // Nothing changed at all: the same plan, and a header alone.
    let none = vector::encode(&b, &b, Prefer::Memory, &Serial).unwrap();
    assert_eq!(Resident::parse(&none).unwrap().header().encoding, Encoding::Unchanged);
    assert_eq!(none.len(), 192);
}

#[test]
fn what_does_not_fit_is_refused() {
    let shape = Shape { n: 40, k: 5000 };
    let words = vec![0; shape.n * shape.k * 2];
    let good = Plan {
        encoding: Encoding::Exponent,
        grid: Grid::for_exponent(shape),
        gap: GapKind::U8,
        widths: [3; 32],
    };
    let refused = |plan: &Plan, tiles: Range<usize>, base: &[u8], fine_tuned: &[u8]| {
        let mut out = DeltaPiece::default();
        let slow = encode_tiles(plan, Dtype::BF16, tiles.clone(), base, fine_tuned, &mut out).unwrap_err();
        let fast = vector::encode_tiles(plan, Dtype::BF16, tiles, base, fine_tuned, &mut out).unwrap_err();
        assert_eq!((slow.kind(), slow.message()), (fast.kind(), fast.message()));
        slow.kind()
    };
    assert_eq!(refused(&good, 0..1, &words, &words), Kind::InvalidArgument);
    assert_eq!(refused(&good, 0..99, &words, &words), Kind::InvalidArgument);
    assert_eq!(refused(&good, 0..6, &words[1..], &words), Kind::Mismatch);
    assert_eq!(refused(&good, 0..6, &words, &words[2..]), Kind::Mismatch);
    let grid = |tile_rows, tile_cols| Grid { tile_rows, tile_cols, ..good.grid };
    for grid in [grid(16, 0), grid(0, 4096), grid(17, 512), grid(16, 300), grid(32, 4096), grid(1 << 62, 256)]
    {
        assert_eq!(refused(&Plan { grid, ..good }, 0..6, &words, &words), Kind::InvalidArgument);
    }
    let wide = Plan { widths: [17; 32], ..good };
    assert_eq!(refused(&wide, 0..6, &words, &words), Kind::InvalidArgument);
    let short =
        |delta: &[u8]| vector::patch(&Resident::parse(delta).unwrap(), &mut [0; 6]).unwrap_err().kind();
    let m = matrix(Dtype::BF16, shape, &words);
    assert_eq!(short(&encode_pair(&m, &m, Prefer::Speed).unwrap()), Kind::Mismatch);

    let mut assembler = Assembler::new(Dtype::BF16, &good).unwrap();
    let listed = |counts: &[u32], bytes: usize| Listed {
        counts: counts.to_vec(),
        positions: vec![0; bytes],
        words: vec![0; bytes],
    };
    let mut lying = |units: u32, entries: Listed, exceptions: Listed| {
        let piece = DeltaPiece { units: vec![units], entries, exceptions, ..DeltaPiece::default() };
        assert_eq!(assembler.add(&piece).unwrap_err().kind(), Kind::InvalidArgument, "{piece:?}");
    };
    let none = || listed(&[0], 0);
    [(&[0, 0][..], 0), (&[], 0), (&[2], 2), (&[1], 0), (&[0], 2)].iter().for_each(|(counts, bytes)| {
        lying(0, none(), listed(counts, *bytes));
        lying(0, listed(counts, *bytes), none());
    });
    lying(1, none(), none());
    let unfinished = Assembler::new(Dtype::BF16, &good).unwrap();
    assert_eq!(unfinished.finish(m.digest()).unwrap_err().kind(), Kind::InvalidArgument);
}

#[test]
fn real_fine_tunes_are_encoded_as_the_oracle_does() {
    let pairs = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/pairs");
    let open = |name: &str| xorz::package::SafeTensors::open(&pairs.join(name)).ok();
    let (Some(base), Some(tuned)) =
        (open("lm_bf16.base.safetensors"), open("lm_bf16.ft_sft_lr2e-05.safetensors"))
    else {
        println!("SKIPPED: no ../shared/pairs");
        return;
    };
    let mut seen = 0;
    for t in tuned.header().tensors.iter().filter(|t| t.dtype == "BF16").take(12) {
        let (Some(at), shape) = (base.find(&t.name), Shape::of_dims(&t.dims).unwrap()) else { continue };
        let (old, new) = (base.read(at).unwrap(), tuned.read(t).unwrap());
        let (b, f) = (matrix(Dtype::BF16, shape, &old), matrix(Dtype::BF16, shape, &new));
        for prefer in [Prefer::Speed, Prefer::Memory] {
            let want = encode_pair(&b, &f, prefer).unwrap();
            assert!(vector::encode(&b, &f, prefer, &Shuffled(2)).unwrap() == want, "{}", t.name);
            seen += Resident::parse(&want).unwrap().header().changed;
        }
    }
    assert!(seen > 1000);
    let _ = Isa::active().unwrap();
}
