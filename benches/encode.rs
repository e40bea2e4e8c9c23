//! `cargo bench --bench encode`: nanoseconds a word, and gigabytes of bf16 a second, of one thread: estimate, tiles (fast
//! and oracle, words in L2), a whole matrix from memory with its digests, patch.
//!
//! Floors are in src/vector/encode/exponent.rs and sparse.rs. A whole matrix reads base and fine_tuned once and base once
//! more for its digest: 6 bytes per word, 0.5 ns at 12 GB/s.

use half::bf16;
use std::hint::black_box;
use std::time::Instant;
use xorz::codec::Prefer;
use xorz::error::Result;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{self, DeltaPiece, Pair, Plan, Resident};
use xorz::vector::{self, Isa, Serial};

const SHAPE: Shape = Shape { n: 4096, k: 4096 };
/// Words of the tiles that are timed in L2.
const HOT: usize = 64 << 10;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// In 0 .. 1.
    fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32
    }

    /// Mean 0, deviation 1, near enough (Irwin-Hall of 6).
    fn normal(&mut self) -> f32 {
        ((0..6).map(|_| self.unit()).sum::<f32>() - 3.0) * std::f32::consts::SQRT_2
    }
}

fn value(word: u16) -> f32 {
    bf16::from_bits(word).to_f32()
}

/// What AdamW does: the word stands for a value anywhere between its neighbours' midpoints, which moves by `step` up or
/// down; so whether the word changes, and by how much, follows from its exponent.
fn adamw(random: &mut Random, base: &[u16], step: f32) -> Vec<u16> {
    base.iter()
        .map(|&w| {
            let spacing = (value(w + 1) - value(w)).abs();
            let master = value(w) + (random.unit() - 0.5) * spacing;
            let sign = if random.next().is_multiple_of(2) { 1.0 } else { -1.0 };
            bf16::from_f32(master + sign * step).to_bits()
        })
        .collect()
}

fn share(base: &[u16], tuned: &[u16]) -> f64 {
    base.iter().zip(tuned).filter(|(b, t)| b != t).count() as f64 / base.len() as f64
}

/// The step that changes `wanted` of the words.
fn step_for(base: &[u16], wanted: f64) -> f32 {
    let (mut low, mut high) = (1e-9f32, 1e-1f32);
    for _ in 0..24 {
        let middle = (low * high).sqrt();
        let found = share(base, &adamw(&mut Random(3), base, middle));
        *if found < wanted { &mut low } else { &mut high } = middle;
    }
    low
}

/// Best nanoseconds a word of nine runs: other work on the machine only adds.
fn time(words: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..9 {
        let start = Instant::now();
        f()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best * 1e9 / words as f64)
}

/// Tiles of the first words, again and again, by one encoder.
fn hot(isa: Isa, plan: &Plan, base: &[u8], tuned: &[u8]) -> Result<f64> {
    let rows = (HOT / SHAPE.k).max(plan.grid.tile_rows);
    let tiles = 0..rows / plan.grid.tile_rows * plan.grid.tile_cols_count();
    let bytes = rows * SHAPE.k * 2;
    let (base, tuned) = (&base[..bytes], &tuned[..bytes]);
    let mut piece = DeltaPiece::default();
    time(16 * rows * SHAPE.k, || {
        (0..16).try_for_each(|_| {
            piece.clear();
            vector::encode_tiles_on(isa, plan, Dtype::BF16, tiles.clone(), (base, tuned), &mut piece)
        })
    })
}

fn run(what: &str, base: &[u16], tuned: &[u16]) -> Result<()> {
    let words = base.len();
    let (old, new): (&[u8], &[u8]) = (bytemuck::cast_slice(base), bytemuck::cast_slice(tuned));
    let matrix = |bytes| Matrix::new(Dtype::BF16, SHAPE, bytes);
    let (b, f) = (matrix(old)?, matrix(new)?);
    for prefer in [Prefer::Speed, Prefer::Memory] {
        let mut pair = Pair::new(b, f)?;
        let plan = vector::estimate(&mut pair, prefer)?.plan;
        let estimate = time(words, || vector::estimate(&mut pair, prefer).map(|e| _ = black_box(e)))?;
        let fast = hot(Isa::active()?, &plan, old, new)?;
        let oracle = hot(Isa::Scalar, &plan, old, new)?;
        let encode = time(words, || vector::encode(&b, &f, prefer, &Serial).map(|d| drop(black_box(d))))?;
        let delta = resident::encode_pair(&b, &f, prefer)?;
        let parsed = Resident::parse(&delta)?;
        let mut patched = old.to_vec();
        let patch = time(words, || {
            patched.copy_from_slice(old);
            vector::patch(&parsed, &mut patched)
        })?;
        assert!(patched == new, "patch gave other words");
        println!(
            "{what:>14} {:>6.1}% {:>7} {:>9} {:>6.3} {estimate:>9.3} {fast:>7.2} {oracle:>7.2} {encode:>7.2} {:>7.2} {patch:>7.2}",
            100.0 * share(base, tuned),
            format!("{prefer:?}"),
            parsed.header().encoding,
            8.0 * delta.len() as f64 / words as f64,
            2.0 / encode,
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let words = SHAPE.n * SHAPE.k;
    let mut random = Random(1);
    let base: Vec<u16> = (0..words).map(|_| bf16::from_f32(0.02 * random.normal()).to_bits()).collect();
    println!(
        "{:>14} {:>7} {:>7} {:>9} {:>6} {:>9} {:>7} {:>7} {:>7} {:>7} {:>7}   (4096 x 4096 bf16, ns a word, {})",
        "",
        "changed",
        "prefer",
        "encoding",
        "bits",
        "estimate",
        "tiles",
        "oracle",
        "encode",
        "GB/s",
        "patch",
        Isa::active()?.name(),
    );
    for wanted in [0.01, 0.05, 0.60] {
        let step = step_for(&base[..1 << 16], wanted);
        run("AdamW-like", &base, &adamw(&mut random, &base, step))?;
    }
    for wanted in [0.01, 0.05, 0.60] {
        let moved = |w: u16, random: &mut Random| if random.unit() < wanted { w ^ 1 } else { w };
        let tuned: Vec<u16> = base.iter().map(|&w| moved(w, &mut random)).collect();
        run("anywhere", &base, &tuned)?;
    }
    run("unchanged", &base, &base)
}
