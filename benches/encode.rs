//! `cargo bench --bench encode`: gigabytes of a bf16 fine-tune per second on one thread, encoding, checking, restoring.
//!
//! Floor: base and fine_tuned are read once by the analysis and once by the writing, the base once more by its digest.

use half::bf16;
use std::hint::black_box;
use std::time::Instant;
use xorz::codec::Prefer;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Resident, encode_pair, restore};

const SHAPE: Shape = Shape { n: 4096, k: 4096 };

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Median gigabytes of fine-tuned words per second over five runs.
fn rate(mut f: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (SHAPE.n * SHAPE.k * 2) as f64 / times[2] / 1e9
}

fn main() {
    let words = SHAPE.n * SHAPE.k;
    let mut state = 1;
    let weight =
        |s: &mut u64| 0.02 * ((0..4).map(|_| random(s) as f32 / (1u64 << 31) as f32).sum::<f32>() - 2.0);
    let base: Vec<f32> = (0..words).map(|_| weight(&mut state)).collect();
    let bits = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
    };
    let old = bits(&base);
    println!(
        "{:>22} {:>7} {:>9} {:>9} {:>8} {:>8} {:>8}",
        "4096x4096 bf16", "prefer", "encoding", "bits", "encode", "check", "restore"
    );
    for (what, lr) in
        [("AdamW-like lr 1e-6", 1e-6f32), ("AdamW-like lr 1e-5", 1e-5), ("AdamW-like lr 1e-3", 1e-3)]
    {
        // The base is what bf16 keeps; a step of about lr then rounds back for most words.
        let tuned: Vec<f32> = old
            .chunks_exact(2)
            .map(|b| {
                bf16::from_le_bytes([b[0], b[1]]).to_f32()
                    + lr * (random(&mut state) as f32 / (1u64 << 30) as f32 - 1.0) * 2.0
            })
            .collect();
        let new = bits(&tuned);
        let matrix = |bytes| Matrix::new(Dtype::BF16, SHAPE, bytes);
        let (Ok(b), Ok(f)) = (matrix(&old), matrix(&new)) else { return };
        for prefer in [Prefer::Speed, Prefer::Memory] {
            let encode = rate(|| drop(black_box(encode_pair(&b, &f, prefer))));
            let Ok(blob) = encode_pair(&b, &f, prefer) else { return };
            let Ok(delta) = Resident::parse(&blob) else { return };
            let mut out = vec![0; new.len()];
            let check = rate(|| drop(black_box(delta.check_full(&b))));
            let restored = rate(|| drop(black_box(restore(&delta, &b, &mut out))));
            println!(
                "{what:>22} {:>7} {:>9} {:>9.3} {encode:>8.2} {check:>8.2} {restored:>8.2}",
                format!("{prefer:?}"),
                delta.header().encoding,
                8.0 * blob.len() as f64 / words as f64,
            );
        }
    }
}
