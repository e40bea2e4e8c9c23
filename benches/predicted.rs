//! `cargo bench --bench predicted`: codec `predicted`, GB/s of bf16 on one thread, through files as packages are: packed,
//! restored, and made into resident deltas for either preference from a base in a file (hashed as it is read) and from one
//! in memory. Each is the best of several turns by the thread's own time, where the system tells it, so that a busy machine
//! tells little less; every result is compared. The data are AdamW-like changes of shares of the words, and sums of many
//! steps, of which codec `predicted` codes almost every word (`dense`).
//!
//! With arguments, only the rows whose names begin with one of them: `cargo bench --bench predicted -- dense`.

use half::bf16;
use std::path::Path;
use std::time::Instant;
use xorz::codec::Prefer;
use xorz::error::{Error, Result};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Base, Codec, PackOptions, Package, Run, Tensor, Writer};
use xorz::resident::{Resident, restore};

const SHAPE: Shape = Shape { n: 5632, k: 2048 };
const TURNS: usize = 7;

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

/// The words after training: every value moved by `step` times what `move_by` says, from anywhere between its neighbours'
/// midpoints.
fn trained(base: &[u16], step: f32, wide: bool) -> Vec<u16> {
    let mut random = Random(base.len() as u64);
    let value = |w: u16| bf16::from_bits(w).to_f32();
    base.iter()
        .map(|&w| {
            let master = value(w) + (random.unit() - 0.5) * (value(w + 1) - value(w)).abs();
            let by = match wide {
                true => random.normal(),
                false if random.next().is_multiple_of(2) => 1.0,
                false => -1.0,
            };
            bf16::from_f32(master + by * step).to_bits()
        })
        .collect()
}

fn share(base: &[u16], tuned: &[u16]) -> f64 {
    base.iter().zip(tuned).filter(|(b, t)| b != t).count() as f64 / base.len() as f64
}

/// The step that changes `wanted` of the words.
fn step_for(base: &[u16], wanted: f64, wide: bool) -> f32 {
    let (mut low, mut high) = (1e-9f32, 1e-1f32);
    for _ in 0..24 {
        let middle = (low * high).sqrt();
        let found = share(base, &trained(base, middle, wide));
        *if found < wanted { &mut low } else { &mut high } = middle;
    }
    low
}

/// Seconds that this thread has run for; those that have passed, where the system does not tell.
fn ran(start: Instant) -> f64 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = told.and_then(|text| text.split(' ').next().and_then(|n| n.parse::<f64>().ok()));
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |n| n / 1e9)
}

/// GB/s of the matrix: the best of several turns, since other work on the machine only adds. A turn takes a tenth of a second
/// at least: the clock is one of milliseconds.
fn speed<T>(mut f: impl FnMut() -> Result<T>) -> Result<(f64, T)> {
    let (mut best, start) = (f64::MAX, Instant::now());
    let mut out = f()?;
    for _ in 0..TURNS {
        let (before, mut times) = (ran(start), 0.0);
        while ran(start) - before < 0.1 {
            out = f()?;
            times += 1.0;
        }
        best = best.min((ran(start) - before) / times);
    }
    Ok((SHAPE.bytes(Dtype::BF16)? as f64 / 1e9 / best, out))
}

fn safetensors(words: &[u8]) -> Vec<u8> {
    let (n, k, end) = (SHAPE.n, SHAPE.k, words.len());
    let text = format!(r#"{{"w":{{"dtype":"BF16","shape":[{n},{k}],"data_offsets":[0,{end}]}}}}"#);
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), words].concat()
}

fn row(what: &str, dir: &Path, base: &[u16], tuned: &[u16]) -> Result<()> {
    let (old, new): (&[u8], &[u8]) = (bytemuck::cast_slice(base), bytemuck::cast_slice(tuned));
    let (path, file) = (dir.join("p.xorz"), dir.join("base.safetensors"));
    let options = PackOptions { codec: Some(Codec::Predicted), ..PackOptions::default() };
    let dims = [SHAPE.n, SHAPE.k];
    let side = |bytes| Tensor { name: "w", dtype: "BF16", dims: &dims, bytes };
    let (packed, stored) = speed(|| {
        let mut writer = Writer::create(&path, options.clone())?.jobs(1);
        writer.add(&side(new), Some(&side(old)))?;
        Ok(writer.finish()?.package_bytes)
    })?;
    let (package, on_disk) = (Package::open(&path)?, Base::open(&file, &Run::default())?);
    let matrix = Matrix::new(Dtype::BF16, SHAPE, old)?;
    let mut out = vec![0; new.len()];
    let (restored, ()) = speed(|| package.restore("w", Some(&matrix), &mut out))?;
    let mut wrong = out != new;
    let mut loads = Vec::new();
    for prefer in [Prefer::Speed, Prefer::Memory] {
        let (from_file, delta) = speed(|| on_disk.resident(&package, "w", Some(prefer)))?;
        let (in_memory, again) = speed(|| package.resident("w", &matrix, Some(prefer)))?;
        let view = Resident::parse(&delta)?;
        restore(&view, &matrix, &mut out)?;
        wrong |= out != new || delta != again;
        loads.push(format!("{:>9} {from_file:>5.2} {in_memory:>6.2}", view.header().encoding));
    }
    if wrong {
        return Err(Error::internal(format!("{what}: other words came back")));
    }
    println!(
        "{what:>12} {:>6.2} % {:>6.3} | {packed:>6.2} {restored:>8.2} | {} | {}",
        100.0 * share(base, tuned),
        8.0 * stored as f64 / base.len() as f64,
        loads[0],
        loads[1],
    );
    Ok(())
}

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mut random = Random(1);
    let words = SHAPE.words()?;
    let base: Vec<u16> = (0..words).map(|_| bf16::from_f32(0.02 * random.normal()).to_bits()).collect();
    let dir = std::env::temp_dir().join(format!("xorz-predicted-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("base.safetensors"), safetensors(bytemuck::cast_slice(&base)))?;
    println!(
        "GB/s of a {SHAPE} matrix of bf16, one thread; resident deltas from a base in a file, in memory"
    );
    println!(
        "{:>12} {:>8} {:>6} | {:>6} {:>8} | {:<22} | {:<22}",
        "", "changed", "bits", "packed", "restored", "to resident for speed", "to resident for memory"
    );
    let rows =
        [("1 %", 0.01, false), ("5 %", 0.05, false), ("dense 40 %", 0.4, false), ("dense 70 %", 0.7, true)];
    let done = rows
        .into_iter()
        .filter(|(what, ..)| wanted.is_empty() || wanted.iter().any(|w| what.starts_with(w.as_str())));
    let done = done.into_iter().try_for_each(|(what, share, wide)| {
        let step = step_for(&base[..1 << 16], share, wide);
        row(what, &dir, &base, &trained(&base, step, wide))
    });
    std::fs::remove_dir_all(&dir)?;
    done
}
