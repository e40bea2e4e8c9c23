//! What the main kernels execute, and how long that takes: `cargo bench --bench budget`, a minute or two.
//!
//! Instructions are counted by `valgrind --tool=callgrind` (Debian's package; without it that column is empty), in the region
//! of the calls only. Times are best of many passes on one thread over a matrix that stays in the last cache. Cycles are
//! times by the clock, which a chain of dependent products measures beside them (3 cycles a product, 1 a xor). What a
//! kernel adds is the difference of two variants, as named. Counted work over cycles is what the loop reaches of the
//! machine's width; the modules' docs say what bounds it.
#![allow(missing_docs)]

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;
use xorz::codec::{Encoding, Tile};
use xorz::cpu::{LinearArgs, Mode, delta_linear};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::resident::{Pair, Resident, encode_as};
use xorz::vector::{Isa, Serial, delta_restore};

const SHAPE: Shape = Shape { n: 256, k: 4096 };
const WORDS: usize = SHAPE.n * SHAPE.k;

struct Rng(u64);

impl Rng {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn word(dtype: Dtype, v: f64) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => half::bf16::from_f64(v).to_le_bytes().to_vec(),
        _ => (v as f32).to_le_bytes().to_vec(),
    }
}

/// A base, and its fine-tune as `encoding` holds it: 3 % of the words moved by a step, or for `exponent` all by noise.
struct Case {
    dtype: Dtype,
    base: Vec<u8>,
    blob: Vec<u8>,
}

impl Case {
    fn new(dtype: Dtype, encoding: Encoding) -> Self {
        let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
        let (mut base, mut tuned) = (Vec::new(), Vec::new());
        for _ in 0..WORDS {
            let v = (rng.unit() + rng.unit() + rng.unit() - 1.5) * 0.04;
            let noise = match encoding {
                Encoding::Exponent => (rng.unit() - 0.5) * 1e-4,
                Encoding::Sparse if rng.unit() < 0.03 => v / 64.0,
                _ => 0.0,
            };
            base.extend(word(dtype, v));
            tuned.extend(word(dtype, v + noise));
        }
        let blob = {
            let pair = [&base, &tuned].map(|w| Matrix::new(dtype, SHAPE, w).unwrap());
            encode_as(&mut Pair::new(pair[0], pair[1]).unwrap(), encoding).unwrap()
        };
        Self { dtype, base, blob }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.dtype, SHAPE, &self.base).unwrap()
    }

    fn delta(&self) -> Resident<'_> {
        Resident::parse(&self.blob).unwrap()
    }

    /// Records of sixteen entries.
    fn records(&self) -> usize {
        let delta = self.delta();
        (0..delta.grid().tiles())
            .map(|i| match delta.tile(i).unwrap() {
                Tile::Sparse(t) => t.records,
                _ => 0,
            })
            .sum()
    }
}

/// One row of the table: the work of `of` less that of `less` (on `unchanged`), a unit.
struct Row {
    what: &'static str,
    unit: &'static str,
    dtype: Dtype,
    of: Encoding,
    /// Rows of x; 0 restores.
    m: usize,
    less: bool,
    units: fn(&Case, usize) -> usize,
}

fn rows() -> Vec<Row> {
    let (bf16, f32) = (Dtype::BF16, Dtype::F32);
    let words: fn(&Case, usize) -> usize = |_, m| WORDS * m.max(1);
    let decoded: fn(&Case, usize) -> usize = |_, _| WORDS;
    let by_row: fn(&Case, usize) -> usize = |case, m| case.records() * m;
    let records: fn(&Case, usize) -> usize = |case, _| case.records();
    let row = |what, unit, dtype, of, m, less, units| Row { what, unit, dtype, of, m, less, units };
    let (unchanged, sparse, exponent) = (Encoding::Unchanged, Encoding::Sparse, Encoding::Exponent);
    vec![
        row("base product, 1 row", "word and row", bf16, unchanged, 1, false, words),
        row("base product, 4 rows", "word and row", bf16, unchanged, 4, false, words),
        row("base product, 16 rows", "word and row", bf16, unchanged, 16, false, words),
        row("base product, 1 row", "word and row", f32, unchanged, 1, false, words),
        row("base product, 16 rows", "word and row", f32, unchanged, 16, false, words),
        row("panels, 128 rows", "word and row", bf16, sparse, 128, false, words),
        row("entries gathered, 1 row", "record and row", bf16, sparse, 1, true, by_row),
        row("entries gathered, 4 rows", "record and row", bf16, sparse, 4, true, by_row),
        row("entries transposed, 16 rows", "record", bf16, sparse, 16, true, records),
        row("sparse restored", "record", bf16, sparse, 0, true, records),
        row("exponent decoded", "word", bf16, exponent, 0, true, decoded),
        row("exponent decoded", "word", f32, exponent, 0, true, decoded),
        row("exponent product, 1 row", "word", bf16, exponent, 1, false, decoded),
        row("exponent product, 16 rows", "word and row", bf16, exponent, 16, false, words),
    ]
}

/// The region that is counted.
#[inline(never)]
fn region(case: &Case, m: usize, x: &[u8], out: &mut [u8]) {
    let (base, delta) = (case.matrix(), case.delta());
    if m == 0 {
        return delta_restore(&delta, &base, out, &Serial).unwrap();
    }
    let args = LinearArgs { x, m, base, delta, bias: None, mode: Mode::Fast };
    delta_linear(&args, out, &Serial).unwrap();
}

fn buffers(case: &Case, m: usize) -> (Vec<u8>, Vec<u8>) {
    let size = case.dtype.word_bytes();
    let mut rng = Rng(7);
    let x = (0..m * SHAPE.k).flat_map(|_| word(case.dtype, rng.unit() - 0.5)).collect();
    (x, vec![0; if m == 0 { WORDS } else { m * SHAPE.n } * size])
}

/// Seconds of the best pass.
fn time(case: &Case, m: usize) -> f64 {
    let (x, mut out) = buffers(case, m);
    let once = |out: &mut [u8]| {
        let start = Instant::now();
        region(case, m, &x, out);
        start.elapsed().as_secs_f64()
    };
    (0..60 / m.clamp(1, 10)).map(|_| once(&mut out)).fold(f64::MAX, f64::min)
}

/// Instructions of one call, after a first that finds its scratch.
fn count(row: usize, base_alone: bool) -> Option<f64> {
    let out = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
        .args(["--toggle-collect=budget::region", "--"])
        .arg(std::env::current_exe().ok()?)
        // valgrind's processor is an Intel of its own, whatever the machine is; the numbers of any other make the same choices.
        .env("XORZ_COSTS", "gathered_ns=6.5,transposed_ns=25")
        .args(["--count", &row.to_string(), if base_alone { "base" } else { "delta" }])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    let line = text.lines().find(|l| l.contains("Collected :"))?;
    line.split_whitespace().last()?.parse::<f64>().ok().map(|n| n / 2.0)
}

/// Cycles a second, by a chain of dependent operations of known latency (3 for a product, 1 for a xor, on every x86-64
/// of the last ten years).
fn clock() -> f64 {
    let chain = 20_000_000u64;
    let best = (0..5).map(|_| {
        let (start, mut v) = (Instant::now(), black_box(3u64));
        let odd = black_box(0x9E37_79B9_7F4A_7C15u64);
        for i in 0..chain {
            v = (v ^ i).wrapping_mul(odd);
        }
        black_box(v);
        start.elapsed().as_secs_f64()
    });
    4.0 * chain as f64 / best.fold(f64::MAX, f64::min)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let rows = rows();
    if let [flag, row, which] = &args[..]
        && flag == "--count"
    {
        let row = &rows[row.parse::<usize>().unwrap()];
        let case = Case::new(row.dtype, if which == "base" { Encoding::Unchanged } else { row.of });
        let (x, mut out) = buffers(&case, row.m);
        (0..2).for_each(|_| region(&case, row.m, &x, &mut out));
        return;
    }
    let clock = clock();
    println!("{SHAPE}, one thread, {}, {:.2} GHz", Isa::active().unwrap().name(), clock / 1e9);
    println!(
        "{:28} {:5} {:>15} {:>12} {:>9} {:>9} {:>15}",
        "what", "", "a", "instructions", "ns", "cycles", "instr. a cycle"
    );
    for (i, row) in rows.iter().enumerate() {
        let case = Case::new(row.dtype, row.of);
        let units = (row.units)(&case, row.m) as f64;
        let alone = row.less.then(|| Case::new(row.dtype, Encoding::Unchanged));
        let seconds = time(&case, row.m) - alone.as_ref().map_or(0.0, |a| time(a, row.m));
        let counted = count(i, false).zip(if row.less { count(i, true) } else { Some(0.0) });
        let instructions = counted.map(|(all, base)| (all - base) / units);
        let (ns, cycles) = (seconds / units * 1e9, seconds / units * clock);
        let shown = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2}"));
        println!(
            "{:28} {:5} {:>15} {:>12} {ns:9.3} {cycles:9.2} {:>15}",
            row.what,
            row.dtype.to_string(),
            row.unit,
            shown(instructions),
            shown(instructions.map(|n| n / cycles))
        );
    }
}
