//! Promise: an op on a small matrix runs on the calling thread, since waking another takes longer than the
//! op; a large one gives every thread work. How work is shared out changes no bit.

use crate::common::data::{Rng, matrix, perturbed};
use crate::common::linear::{Case, DTYPES, ENCODINGS, MODES};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use xorz::codec::Prefer;
use xorz::cpu::{
    Arena, EmbeddingArgs, GroupedArgs, GroupedGradArgs, delta_embedding, delta_linear,
    delta_linear_grad_input, delta_linear_grouped, delta_linear_grouped_grad_input,
};
use xorz::error::Result;
use xorz::matrix::{Dtype, Shape};
use xorz::resident::Resident;
use xorz::vector::{Executor, Serial, delta_apply, delta_restore, delta_restore_rows, encode};

/// Four threads, by turns: the last task first. Remembers the most tasks of a run.
#[derive(Default)]
struct Four {
    most: AtomicUsize,
}

impl Executor for Four {
    fn threads(&self) -> usize {
        4
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        self.most.fetch_max(tasks, Relaxed);
        std::thread::scope(|s| {
            for thread in 0..4 {
                s.spawn(move || (0..tasks).rev().filter(|i| i % 4 == thread).for_each(task));
            }
        });
        Ok(())
    }
}

type Op<'a> = (&'a str, Box<dyn Fn(&dyn Executor) -> Vec<u8> + 'a>);

/// Every op on one delta, and on two tenants with that delta and the base; `m` rows of x or of indices.
fn ops<'a>(rng: &mut Rng, case: &'a Case, m: usize) -> Vec<Op<'a>> {
    let (dtype, shape, w) = (case.dtype, case.shape, case.dtype.word_bytes());
    let (base, delta) = (matrix(dtype, shape, &case.base), Resident::parse(&case.blob).unwrap());
    let (x, grad) = (rng.weights(dtype, m * shape.k), rng.weights(dtype, m * shape.n));
    let slots = vec![[0i64, case.blob.len() as i64]];
    let tenants: Vec<i32> = (0..m).map(|i| -((i % 3 == 0) as i32)).collect();
    let indices: Vec<i64> = (0..m).map(|i| ((i * 37) % shape.n) as i64).collect();
    let mut all: Vec<Op<'a>> = vec![];
    let whole = delta.clone();
    all.push((
        "delta_restore",
        Box::new(move |exec| {
            let mut out = vec![0; case.base.len()];
            delta_restore(&whole, &base, &mut out, exec).unwrap();
            out
        }),
    ));
    let some = delta.clone();
    all.push((
        "delta_restore_rows",
        Box::new(move |exec| {
            let mut out = vec![0; (shape.n - 2) * base.row_bytes()];
            delta_restore_rows(&some, &base, 1..shape.n - 1, &mut out, exec).unwrap();
            out
        }),
    ));
    let applied = delta.clone();
    all.push((
        "delta_apply",
        Box::new(move |exec| {
            let mut words = case.base.clone();
            delta_apply(&applied, dtype, shape, &mut words, exec).unwrap();
            words
        }),
    ));
    for prefer in [Prefer::Speed, Prefer::Memory] {
        let to = matrix(dtype, shape, &case.fine_tuned);
        all.push(("encode", Box::new(move |exec| encode(&base, &to, prefer, exec).unwrap())));
    }
    let (map, places) = (tenants.clone(), slots.clone());
    all.push((
        "delta_embedding",
        Box::new(move |exec| {
            let arena = Arena { bytes: &case.blob, slots: &places };
            let args = EmbeddingArgs { indices: &indices, base, arena, tenant_of_row: &map };
            let mut out = vec![0; m * base.row_bytes()];
            delta_embedding(&args, &mut out, exec).unwrap();
            out
        }),
    ));
    for mode in MODES {
        let (x, map, places) = (x.clone(), tenants.clone(), slots.clone());
        all.push((
            "delta_linear",
            Box::new(move |exec| {
                let mut out = vec![0; 2 * m * shape.n * w];
                let (alone, grouped) = out.split_at_mut(m * shape.n * w);
                delta_linear(&case.args(&x, m, None, mode), alone, exec).unwrap();
                let arena = Arena { bytes: &case.blob, slots: &places };
                let args = GroupedArgs { x: &x, m, base, arena, tenant_of_row: &map, biases: None, mode };
                delta_linear_grouped(&args, grouped, exec).unwrap();
                out
            }),
        ));
    }
    all.push((
        "delta_linear_grad_input",
        Box::new(move |exec| {
            let mut out = vec![0; 2 * m * shape.k * w];
            let (alone, grouped) = out.split_at_mut(m * shape.k * w);
            delta_linear_grad_input(&grad, m, &base, &delta, alone, exec).unwrap();
            let arena = Arena { bytes: &case.blob, slots: &slots };
            let args = GroupedGradArgs { grad: &grad, m, base, arena, tenant_of_row: &tenants };
            delta_linear_grouped_grad_input(&args, grouped, exec).unwrap();
            out
        }),
    ));
    all
}

/// Run every op on a matrix of `shape`; `right` judges the most tasks that one was cut into.
fn each(shape: Shape, m: usize, right: impl Fn(usize) -> bool) {
    let mut rng = Rng::new(141);
    for dtype in DTYPES.into_iter().filter(|d| shape.n < 1000 || *d == Dtype::BF16) {
        for encoding in ENCODINGS {
            let base = rng.weights(dtype, shape.n * shape.k);
            let fine_tuned = perturbed(&mut rng, dtype, &base, 0.05);
            let case = Case::new(dtype, shape, encoding, &base, &fine_tuned);
            for (name, op) in ops(&mut rng, &case, m) {
                let four = Four::default();
                assert!(op(&four) == op(&Serial), "{name}, {}", case.name());
                let most = four.most.into_inner();
                assert!(right(most), "{name}, {}: {most} tasks", case.name());
            }
        }
    }
}

#[test]
fn small_matrices_are_one_task() {
    each(Shape { n: 64, k: 128 }, 16, |tasks| tasks <= 1);
}

#[test]
fn large_matrices_give_every_thread_work() {
    each(Shape { n: 1024, k: 2048 }, 256, |tasks| tasks >= 4);
}
