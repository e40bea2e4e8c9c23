//! `exponent` on the CPU: what a word costs to decode, and what a product costs beside the base alone.
//!
//! `cargo bench --bench exponent [-- SIZE THREADS ROWS...]`: SIZE x SIZE matrices, fine-tuned as AdamW does (every weight
//! moves by about the learning rate, most bf16 words round back), at three rates of bits per weight. Decoding is
//! `delta_restore` on one thread less the copying of the base (`unchanged`), beside the codec's oracle. Variants are
//! interleaved pass by pass; best of all passes.
#![allow(missing_docs)]

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use xorz::codec::Encoding;
use xorz::cpu::{LinearArgs, Mode, delta_linear};
use xorz::error::Result;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, encode_as, restore};
use xorz::vector::{Executor, Isa, Serial, delta_restore};

/// Threads started per call, the same for every variant.
struct Threads(usize);

impl Executor for Threads {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(i) = Some(next.fetch_add(1, Relaxed)).filter(|&i| i < tasks) {
                task(i);
            }
        };
        std::thread::scope(|s| {
            (1..self.0).for_each(|_| drop(s.spawn(work)));
            work();
        });
        Ok(())
    }
}

struct Rng(u64);

impl Rng {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, deviation 0.5.
    fn bell(&mut self) -> f64 {
        self.unit() + self.unit() + self.unit() - 1.5
    }
}

fn word(dtype: Dtype, v: f64) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => half::bf16::from_f64(v).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f64(v).to_le_bytes().to_vec(),
        _ => (v as f32).to_le_bytes().to_vec(),
    }
}

fn value(dtype: Dtype, b: &[u8]) -> f64 {
    match dtype {
        Dtype::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f64(),
        _ => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
    }
}

/// A base, and its deltas: none, then one per learning rate.
fn case(dtype: Dtype, size: usize, rates: &[f64]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let base: Vec<u8> = (0..size * size).flat_map(|_| word(dtype, 0.04 * rng.bell())).collect();
    let shape = Shape { n: size, k: size };
    let encode = |fine_tuned: &[u8], encoding| {
        let of = |words| Matrix::new(dtype, shape, words).unwrap();
        encode_as(&mut Pair::new(of(&base), of(fine_tuned)).unwrap(), encoding).unwrap()
    };
    let mut blobs = vec![encode(&base, Encoding::Unchanged)];
    for rate in rates {
        let step = |b: &[u8]| word(dtype, value(dtype, b) + 2.0 * rate * rng.bell());
        let fine_tuned: Vec<u8> = base.chunks_exact(dtype.word_bytes()).flat_map(step).collect();
        blobs.push(encode(&fine_tuned, Encoding::Exponent));
    }
    (base, blobs)
}

fn best(passes: usize, variants: usize, mut run: impl FnMut(usize)) -> Vec<f64> {
    let mut times = vec![f64::MAX; variants];
    for _ in 0..passes {
        for (v, time) in times.iter_mut().enumerate() {
            let start = Instant::now();
            run(v);
            *time = time.min(start.elapsed().as_secs_f64());
        }
    }
    times
}

fn bits(blob: &[u8], words: usize) -> f64 {
    blob.len() as f64 * 8.0 / words as f64
}

fn decoding(dtype: Dtype, size: usize, rates: &[f64]) {
    let (base, blobs) = case(dtype, size, rates);
    let matrix = Matrix::new(dtype, Shape { n: size, k: size }, &base).unwrap();
    let mut out = vec![0; base.len()];
    let words = size * size;
    let fast = best(5, blobs.len(), |v| {
        delta_restore(&Resident::parse(&blobs[v]).unwrap(), &matrix, &mut out, &Serial).unwrap();
    });
    let oracle = best(2, blobs.len(), |v| {
        restore(&Resident::parse(&blobs[v]).unwrap(), &matrix, &mut out).unwrap();
    });
    let per_word = |times: &[f64], v: usize| (times[v] - times[0]) / words as f64 * 1e9;
    for (v, blob) in blobs.iter().enumerate().skip(1) {
        println!(
            "{dtype:5} {:6.2} bits  {:7.3} ns/word  (oracle {:7.3}; copying the base {:.3})",
            bits(blob, words),
            per_word(&fast, v),
            per_word(&oracle, v),
            fast[0] / words as f64 * 1e9
        );
    }
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let size = args.first().copied().unwrap_or(4096);
    let threads = args.get(1).copied().unwrap_or(2);
    let rows: Vec<usize> = if args.len() > 2 { args[2..].to_vec() } else { vec![1, 8, 64] };
    println!("{size} x {size}, {}; decoding on one thread", Isa::active().unwrap().name());
    let rates = [4e-6, 1.6e-5, 5e-4];
    decoding(Dtype::BF16, size.min(2048), &rates);
    decoding(Dtype::F16, size.min(2048), &rates);
    decoding(Dtype::F32, size.min(2048), &rates);

    let (base, blobs) = case(Dtype::BF16, size, &rates);
    let matrix = Matrix::new(Dtype::BF16, Shape { n: size, k: size }, &base).unwrap();
    println!("delta_linear, bf16, {threads} threads\n   m    bits   best ms   of the base alone");
    for m in rows {
        let mut rng = Rng(m as u64 + 1);
        let x: Vec<u8> = (0..m * size).flat_map(|_| word(Dtype::BF16, rng.bell())).collect();
        let mut out = vec![0u32; m * size / 2 + 1];
        let out = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut out)[..m * size * 2];
        let times = best((200 / m).clamp(4, 15), blobs.len(), |v| {
            let delta = Resident::parse(&blobs[v]).unwrap();
            let args = LinearArgs { x: &x, m, base: matrix, delta, bias: None, mode: Mode::Fast };
            delta_linear(&args, out, &Threads(threads)).unwrap();
        });
        for (v, time) in times.iter().enumerate() {
            let bits = if v == 0 { 0.0 } else { bits(&blobs[v], size * size) };
            println!("{m:4} {bits:7.2} {:9.3} {:9.2}", time * 1e3, time / times[0]);
        }
    }
}
