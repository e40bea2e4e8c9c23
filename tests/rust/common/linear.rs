//! Products to be checked: cases, references in f64, executors that do their worst.

use super::data::{Rng, matrix, value};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use xorz::codec::Encoding;
use xorz::cpu::{LinearArgs, Mode, delta_linear_grad_input_on, delta_linear_on};
use xorz::error::Result;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::{Pair, Resident, encode_as};
use xorz::vector::{Executor, Isa, Serial};

pub const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];
pub const ENCODINGS: [Encoding; 4] = Encoding::ALL;
pub const MODES: [Mode; 2] = [Mode::Fast, Mode::Deterministic];

/// The instruction sets of this machine; those that it lacks are named. `XORZ_TEST_ISA` leaves only the one
/// that it names, for machines on which every instruction is dear (tests/avx512).
pub fn isas() -> Vec<Isa> {
    let only = std::env::var("XORZ_TEST_ISA").ok();
    let wanted = Isa::ALL.into_iter().filter(|isa| only.as_deref().is_none_or(|name| name == isa.name()));
    let (has, lacks): (Vec<_>, Vec<_>) = wanted.partition(|isa| isa.is_available());
    lacks.iter().for_each(|isa| println!("SKIPPED: this machine lacks {}", isa.name()));
    assert!(only.is_none() || !has.is_empty(), "XORZ_TEST_ISA is {only:?}, which this machine lacks");
    has
}

/// Threads that take tasks in a shuffled order.
pub struct Shuffled(pub usize);

impl Executor for Shuffled {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        let mut order: Vec<usize> = (0..tasks).collect();
        let mut rng = Rng::new(self.0 as u64);
        (1..tasks).for_each(|i| order.swap(i, (rng.next() % (i as u64 + 1)) as usize));
        let next = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..self.0 {
                s.spawn(|| {
                    while let Some(&i) = order.get(next.fetch_add(1, Relaxed)) {
                        task(i);
                    }
                });
            }
        });
        Ok(())
    }
}

/// Base and fine-tuned words of one matrix, and a delta of a given encoding between them.
pub struct Case {
    pub dtype: Dtype,
    pub shape: Shape,
    pub base: Vec<u8>,
    pub fine_tuned: Vec<u8>,
    pub encoding: Encoding,
    pub blob: Vec<u8>,
}

impl Case {
    /// `Unchanged` sets fine_tuned to base.
    pub fn new(dtype: Dtype, shape: Shape, encoding: Encoding, base: &[u8], fine_tuned: &[u8]) -> Self {
        let fine_tuned = if encoding == Encoding::Unchanged { base } else { fine_tuned };
        let (b, f) = (matrix(dtype, shape, base), matrix(dtype, shape, fine_tuned));
        let blob = encode_as(&mut Pair::new(b, f).unwrap(), encoding).unwrap();
        let found = Resident::parse(&blob).unwrap().header().encoding;
        assert!(found == encoding || base == fine_tuned, "asked for {encoding}, got {found}");
        Self { dtype, shape, base: base.to_vec(), fine_tuned: fine_tuned.to_vec(), encoding, blob }
    }

    pub fn args<'a>(&'a self, x: &'a [u8], m: usize, bias: Option<&'a [u8]>, mode: Mode) -> LinearArgs<'a> {
        LinearArgs {
            x,
            m,
            base: matrix(self.dtype, self.shape, &self.base),
            delta: Resident::parse(&self.blob).unwrap(),
            bias,
            mode,
        }
    }

    pub fn linear(&self, isa: Isa, x: &[u8], m: usize, bias: Option<&[u8]>, mode: Mode) -> Vec<u8> {
        self.linear_by(isa, x, m, bias, mode, &Serial).unwrap()
    }

    pub fn linear_by(
        &self,
        isa: Isa,
        x: &[u8],
        m: usize,
        bias: Option<&[u8]>,
        mode: Mode,
        exec: &dyn Executor,
    ) -> Result<Vec<u8>> {
        let mut out = vec![0xA5; m * self.shape.n * self.dtype.word_bytes()];
        delta_linear_on(isa, &self.args(x, m, bias, mode), &mut out, exec)?;
        Ok(out)
    }

    pub fn grad(&self, isa: Isa, grad: &[u8], m: usize, exec: &dyn Executor) -> Vec<u8> {
        let mut out = vec![0xA5; m * self.shape.k * self.dtype.word_bytes()];
        let base = matrix(self.dtype, self.shape, &self.base);
        let delta = Resident::parse(&self.blob).unwrap();
        delta_linear_grad_input_on(isa, (grad, m), &base, &delta, &mut out, exec).unwrap();
        out
    }

    /// `x @ W_ft^T + bias` in f64, one sum per output.
    pub fn reference(&self, x: &[u8], m: usize, bias: Option<&[u8]>) -> Vec<f64> {
        let (w, x) = (values(self.dtype, &self.fine_tuned), values(self.dtype, x));
        let bias = bias.map(|b| values(self.dtype, b));
        let Shape { n, k } = self.shape;
        let mut out = Vec::with_capacity(m * n);
        for j in 0..m {
            for r in 0..n {
                let (x, w) = (&x[j * k..(j + 1) * k], &w[r * k..(r + 1) * k]);
                let sum: f64 = x.iter().zip(w).map(|(a, b)| a * b).sum();
                out.push(sum + bias.as_ref().map_or(0.0, |b| b[r]));
            }
        }
        out
    }

    /// `grad @ W_ft` in f64.
    pub fn reference_grad(&self, grad: &[u8], m: usize) -> Vec<f64> {
        let (w, g) = (values(self.dtype, &self.fine_tuned), values(self.dtype, grad));
        let Shape { n, k } = self.shape;
        let mut out = vec![0.0; m * k];
        for j in 0..m {
            for r in 0..n {
                let g = g[j * n + r];
                out[j * k..(j + 1) * k].iter_mut().zip(&w[r * k..]).for_each(|(o, w)| *o += g * w);
            }
        }
        out
    }

    pub fn name(&self) -> String {
        format!("{} {} {}", self.encoding, self.dtype, self.shape)
    }
}

pub fn values(dtype: Dtype, words: &[u8]) -> Vec<f64> {
    words.chunks(dtype.word_bytes()).map(|w| value(dtype, w)).collect()
}

/// The first output that is not, bit for bit, the reference rounded once. NaN matches NaN of any payload.
pub fn first_difference(dtype: Dtype, out: &[u8], reference: &[f64]) -> Option<String> {
    assert_eq!(out.len(), reference.len() * dtype.word_bytes());
    out.chunks(dtype.word_bytes()).zip(reference).enumerate().find_map(|(i, (got, &want))| {
        // The references used here are sums that f32 holds exactly, or not finite.
        let word = super::data::word(dtype, want);
        let same = got == word || (want.is_nan() && value(dtype, got).is_nan());
        let zero = want == 0.0 && value(dtype, got) == 0.0;
        (!same && !zero).then(|| format!("output {i}: {} instead of {want}", value(dtype, got)))
    })
}

/// Words that are integers of at most `limit` in size, so that every sum of products is exact in f32.
pub fn integers(rng: &mut Rng, dtype: Dtype, words: usize, limit: i64) -> Vec<u8> {
    let span = 2 * limit as u64 + 1;
    (0..words).flat_map(|_| super::data::word(dtype, (rng.next() % span) as f64 - limit as f64)).collect()
}
