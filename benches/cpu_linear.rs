//! `delta_linear` on the CPU beside the base product alone (`unchanged`, the same kernel): what the delta costs.
//!
//! `cargo bench --bench cpu_linear [-- SIZE THREADS ROWS...]`: SIZE x SIZE bf16 (with `WIDTH=K` in the
//! environment SIZE x K; with `SHARES=0.5,3` those percentages changed), several distinct matrices, beyond the caches unless made small, variants interleaved pass by pass; best
//! and median, ratios of both. GB/s count the bytes of base and delta, each once, at the best.
#![allow(missing_docs)]

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use xorz::codec::Encoding;
use xorz::cpu::{LinearArgs, Mode, delta_linear};
use xorz::error::Result;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, encode_as};
use xorz::vector::{Executor, Isa};

/// Threads started per call: a torch pool would be warmer, the same for every variant.
struct Threads(usize);

impl Executor for Threads {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        if self.0 == 1 {
            (0..tasks).for_each(task);
            return Ok(());
        }
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= tasks {
                    break;
                }
                task(i);
            }
        };
        std::thread::scope(|s| {
            (1..self.0).for_each(|_| {
                s.spawn(work);
            });
            work();
        });
        Ok(())
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// bf16 words of about 0.02 in size.
    fn weights(&mut self, words: usize) -> Vec<u8> {
        (0..words)
            .flat_map(|_| {
                let v = (self.unit() + self.unit() + self.unit() - 1.5) * 0.04;
                half::bf16::from_f64(v).to_le_bytes()
            })
            .collect()
    }
}

/// Bytes that begin with a cache line, as torch's tensors do: elsewhere each load of a line would touch two.
struct Lines {
    held: Vec<u8>,
    from: usize,
}

impl Lines {
    fn of(bytes: &[u8]) -> Self {
        let mut held = vec![0; bytes.len() + 63];
        let from = held.as_ptr().align_offset(64);
        held[from..from + bytes.len()].copy_from_slice(bytes);
        held.truncate(from + bytes.len());
        Self { held, from }
    }

    fn get(&self) -> &[u8] {
        &self.held[self.from..]
    }
}

fn matrix(shape: Shape, words: &[u8]) -> Matrix<'_> {
    Matrix::new(Dtype::BF16, shape, words).unwrap()
}

/// Distinct matrices: what a pass touches is far beyond a cache of 32 MiB.
const COPIES: usize = 3;
const SHARES: [f64; 4] = [0.005, 0.03, 0.10, 0.30];

/// The percentages of `SHARES` in the environment, or those above.
fn shares() -> Vec<f64> {
    let asked = std::env::var("SHARES").ok();
    let part = |p: &str| p.trim().parse::<f64>().ok().map(|p| p / 100.0);
    asked.map_or(SHARES.to_vec(), |asked| asked.split(',').filter_map(part).collect())
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let size = args.first().copied().unwrap_or(4096);
    let threads = args.get(1).copied().unwrap_or(2);
    let rows: Vec<usize> = if args.len() > 2 { args[2..].to_vec() } else { vec![1, 4, 8, 16, 64, 256] };
    let width = std::env::var("WIDTH").ok().and_then(|w| w.parse().ok()).unwrap_or(size);
    let shape = Shape { n: size, k: width };
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let bases: Vec<Lines> = (0..COPIES).map(|_| Lines::of(&rng.weights(size * width))).collect();
    // Variant 0 is the base alone; then sparse at each share.
    let mut blobs: Vec<Vec<Vec<u8>>> = vec![
        bases
            .iter()
            .map(|b| {
                let b = b.get();
                encode_as(&mut Pair::new(matrix(shape, b), matrix(shape, b)).unwrap(), Encoding::Unchanged)
                    .unwrap()
            })
            .collect(),
    ];
    let shares = shares();
    for &share in &shares {
        let encode = |b: &Lines| {
            let b = b.get();
            let mut rng = Rng(share.to_bits());
            let mut f = b.to_vec();
            for w in f.chunks_exact_mut(2) {
                if rng.unit() < share {
                    let v = u16::from_le_bytes([w[0], w[1]]).wrapping_add((rng.next() % 3 + 1) as u16);
                    w.copy_from_slice(&v.to_le_bytes());
                }
            }
            encode_as(&mut Pair::new(matrix(shape, b), matrix(shape, &f)).unwrap(), Encoding::Sparse).unwrap()
        };
        blobs.push(bases.iter().map(encode).collect());
    }
    println!("{size} x {width} bf16, {} threads, {}", threads, Isa::active().unwrap().name());
    println!("   m   changed   best ms  median ms  GB/s   over base alone: best, median");
    for m in rows {
        let x = Lines::of(&rng.weights(m * width));
        let mut out = vec![0u32; m * size / 2 + 1];
        let out = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut out)[..m * size * 2];
        let passes = (600 / m).clamp(5, 25);
        let mut times = vec![Vec::new(); blobs.len()];
        for _ in 0..passes {
            for (v, blobs) in blobs.iter().enumerate() {
                for (base, blob) in bases.iter().zip(blobs) {
                    let delta = Resident::parse(blob).unwrap();
                    let args = LinearArgs {
                        x: x.get(),
                        m,
                        base: matrix(shape, base.get()),
                        delta,
                        bias: None,
                        mode: Mode::Fast,
                    };
                    let start = Instant::now();
                    delta_linear(&args, out, &Threads(threads)).unwrap();
                    times[v].push(start.elapsed().as_secs_f64());
                }
            }
        }
        times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
        let figures: Vec<_> = times.iter().map(|t| (t[0], t[t.len() / 2])).collect();
        for (v, &(best, median)) in figures.iter().enumerate() {
            let bytes = bases[0].get().len() + if v == 0 { 0 } else { blobs[v][0].len() };
            let share = if v == 0 { 0.0 } else { shares[v - 1] * 100.0 };
            let rate = bytes as f64 / best / 1e9;
            let (r, q) = (best / figures[0].0, median / figures[0].1);
            println!(
                "{m:4} {share:8.1} % {:9.3} {:9.3} {rate:7.1} {r:9.2} {q:9.2}",
                best * 1e3,
                median * 1e3
            );
        }
    }
}
