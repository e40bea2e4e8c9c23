//! The ops on hostile deltas, shapes, slots, rows and indices: through the C ABI where it has them. Nothing may panic, hang, read
//! or write beyond what is given; what was not touched gives the fine-tuned words.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use support::{Choices, bounded, delta, edit, pair, seal};
use xorz::codec::Encoding;
use xorz::cpu::{
    Arena, Biases, EmbeddingArgs, GroupedArgs, GroupedGradArgs, Mode, delta_embedding, delta_linear_grouped,
    delta_linear_grouped_grad_input,
};
use xorz::ffi::capi::*;
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::vector::Serial;

/// A base, a fine-tune, and a delta that may be of them.
struct Case {
    dtype: Dtype,
    shape: Shape,
    base: Vec<u8>,
    tuned: Vec<u8>,
    delta: Vec<u8>,
    /// Nothing was changed: what comes out must be right.
    good: bool,
}

impl Case {
    fn of(choices: &mut Choices<'_>) -> Self {
        let dtype = choices.of_list(&Dtype::ALL);
        let shape = Shape { n: 1 + choices.below(70), k: 1 + choices.below(600) };
        let (seed, dense) = (u64::from(choices.byte()), choices.byte());
        let (base, tuned) = pair(dtype, shape.n * shape.k, seed, dense);
        let encoding = choices.of_list(&Encoding::ALL);
        let encoding =
            if base != tuned && encoding == Encoding::Unchanged { Encoding::Sparse } else { encoding };
        let mut delta = delta(dtype, shape, &base, &tuned, encoding);
        let good = !edit(&mut delta, choices);
        if !good && choices.byte() & 1 == 0 {
            let digest = Matrix::new(dtype, shape, &base).map(|m| m.digest().0).unwrap_or_default();
            seal::reseal_for(&mut delta, digest);
        }
        Self { dtype, shape, base, tuned, delta, good }
    }

    /// A matrix of these words, of a shape and dtype that may be any others.
    fn matrix(&self, words: &[u8], n: usize, k: usize, choices: &mut Choices<'_>) -> XorzMatrix {
        let wrong = choices.byte();
        let number = |good: usize, on: bool, choices: &mut Choices<'_>| match on {
            true => choices.number(good as u64) as usize,
            false => good,
        };
        let (n, k) = (number(n, wrong & 7 == 1, choices), number(k, wrong & 7 == 2, choices));
        let dtype = if wrong & 7 == 3 { u32::from(choices.byte()) } else { self.dtype as u32 };
        XorzMatrix { words: words.as_ptr().cast(), bytes: words.len(), n, k, dtype }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::of(data);
    let case = Case::of(&mut choices);
    let given = data.len() + case.delta.len() + 2 * case.base.len();
    let m = 1 + choices.below(40);
    bounded(2 * given + m * 8 * (case.shape.n + case.shape.k), || {
        words(&case, &mut choices);
        products(&case, m, &mut choices);
        parts(&case, &mut choices);
        batch(&case, m, &mut choices);
    });
});

/// Restoring, whole and in part, in another place and in place.
fn words(case: &Case, choices: &mut Choices<'_>) {
    let (delta, len): (*const c_void, _) = (case.delta.as_ptr().cast(), case.delta.len());
    let (none, serial) = (null_mut::<XorzError>(), null::<XorzExecutor>());
    let base = case.matrix(&case.base, case.shape.n, case.shape.k, choices);
    let right = case.good && (base.n, base.k, base.dtype) == (case.shape.n, case.shape.k, case.dtype as u32);
    let mut out = vec![0u8; case.base.len()];
    // SAFETY: every pointer is of a vector of the length that is said, here and below; shapes and dtypes are any.
    unsafe {
        let code =
            xorz_delta_restore(&raw const base, delta, len, out.as_mut_ptr().cast(), out.len(), serial, none);
        assert!(!right || (code == 0 && out == case.tuned), "restored {code}");
        let (first, end) = (choices.number(0) as usize, choices.number(base.n as u64) as usize);
        let at = out.as_mut_ptr().cast();
        xorz_delta_restore_rows(&raw const base, delta, len, first, end, at, out.len(), serial, none);
        let (west, east) = (choices.number(0) as usize, choices.number(base.k as u64) as usize);
        let at = out.as_mut_ptr().cast();
        let size = out.len();
        xorz_delta_restore_region(
            &raw const base,
            delta,
            len,
            first,
            end,
            west,
            east,
            at,
            size,
            serial,
            none,
        );
        let mut inside = case.base.clone();
        let weight = XorzMatrix { words: inside.as_mut_ptr().cast_const().cast(), ..base };
        let code = xorz_delta_apply(&raw const weight, delta, len, serial, none);
        assert!(!right || (code == 0 && inside == case.tuned), "applied {code}");
        assert!(code == 0 || inside == case.base, "half applied");
        let mut info = std::mem::zeroed::<XorzDeltaInfo>();
        xorz_delta_info(delta, len, &raw mut info, none);
        let base = case.matrix(&case.base, case.shape.n, case.shape.k, choices);
        xorz_delta_check(delta, len, &raw const base, none);
        xorz_delta_matches(delta, len, &raw const base, none);
    }
}

/// Products with some rows, and the gradient.
fn products(case: &Case, m: usize, choices: &mut Choices<'_>) {
    let (delta, len): (*const c_void, _) = (case.delta.as_ptr().cast(), case.delta.len());
    let (none, serial) = (null_mut::<XorzError>(), null::<XorzExecutor>());
    let (Shape { n, k }, w) = (case.shape, case.dtype.word_bytes());
    let (x, bias) = (pair(case.dtype, m * n.max(k), 7, 0).0, vec![0u8; n * w]);
    let weight = case.matrix(&case.base, n, k, choices);
    let input = case.matrix(&x[..m * k * w], m, k, choices);
    let grad = case.matrix(&x[..m * n * w], m, n, choices);
    let mut out = vec![0u8; m * n.max(k) * w];
    let flags = choices.byte();
    let bias = if flags & 1 == 0 { null() } else { bias.as_ptr().cast() };
    // A bias is as long as a row of the output by the shapes that are said.
    if flags & 1 == 1 && (weight.n, weight.dtype) != (n, case.dtype as u32) {
        return;
    }
    let size = if flags & 2 == 0 { m * n * w } else { out.len() };
    // SAFETY: as above.
    unsafe {
        let (mode, at) = (i32::from(flags >> 2 & 3), out.as_mut_ptr().cast());
        let (input, weight) = (&raw const input, &raw const weight);
        xorz_delta_linear(input, weight, bias, delta, len, mode, at, size, serial, none);
        let (size, at) = (m * k * w, out.as_mut_ptr().cast());
        xorz_delta_linear_grad_input(&raw const grad, weight, delta, len, at, size, serial, none);
    }
}

/// Cut, joined and encoded anew.
fn parts(case: &Case, choices: &mut Choices<'_>) {
    let (delta, len): (*const c_void, _) = (case.delta.as_ptr().cast(), case.delta.len());
    let none = null_mut::<XorzError>();
    let base = case.matrix(&case.base, case.shape.n, case.shape.k, choices);
    let side = u64::from(choices.byte() & 1);
    let dim = choices.number(side) as usize;
    let (start, end) = (choices.number(1) as usize, choices.number(9) as usize);
    let mut out = XorzBuffer { data: null_mut(), length: 0 };
    // SAFETY: as above; each buffer is freed once after it was filled.
    unsafe {
        if xorz_delta_slice(delta, len, &raw const base, dim, start, end, &raw mut out, none) == 0 {
            xorz_buffer_free(&raw mut out);
        }
        let part = || XorzPart { delta, delta_bytes: len, base: XorzMatrix { ..base } };
        let two = [part(), part()];
        let count = choices.below(3);
        if xorz_delta_concat(two.as_ptr(), count, dim, &raw mut out, none) == 0 {
            xorz_buffer_free(&raw mut out);
        }
        let tuned = case.matrix(&case.tuned, case.shape.n, case.shape.k, choices);
        let (prefer, serial) = (i32::from(choices.byte() & 3), null::<XorzExecutor>());
        if xorz_delta_encode(&raw const base, &raw const tuned, prefer, &raw mut out, serial, none) == 0 {
            xorz_buffer_free(&raw mut out);
        }
    }
}

/// Many tenants: an arena of the delta among others, slots and rows that may be any.
fn batch(case: &Case, m: usize, choices: &mut Choices<'_>) {
    let (Shape { n, k }, w) = (case.shape, case.dtype.word_bytes());
    let Ok(base) = Matrix::new(case.dtype, case.shape, &case.base) else { return };
    let whole = case.delta.len().next_multiple_of(64);
    let mut bytes = case.delta.clone();
    bytes.resize(whole, 0);
    bytes.extend_from_slice(&case.delta);
    let len = case.delta.len() as u64;
    let good = [[0, len], [whole as u64, len], [0, 0]];
    let slots = good.map(|[at, len]| [choices.number(at) as i64, choices.number(len) as i64]);
    let asked: Vec<i32> = (0..m).map(|_| i32::from(choices.byte()) % 4 - 1).collect();
    let rows: Vec<i32> =
        asked.iter().map(|&row| if choices.byte() < 4 { choices.number(0) as i32 } else { row }).collect();
    let indices: Vec<i64> = (0..m).map(|i| choices.number((i % n) as u64) as i64).collect();
    let arena = Arena { bytes: &bytes, slots: &slots };
    let right = case.good
        && slots == good.map(|pair| pair.map(|v| v as i64))
        && rows == asked
        && indices.iter().all(|&i| usize::try_from(i).is_ok_and(|i| i < n));
    let mut out = vec![0u8; m * k * w];
    let lookup = EmbeddingArgs { indices: &indices, base, arena, tenant_of_row: &rows };
    let done = delta_embedding(&lookup, &mut out, &Serial);
    if right {
        done.expect("good deltas are looked up in");
        for (i, row) in out.chunks_exact((k * w).max(1)).enumerate() {
            let from = if matches!(rows[i], 0 | 1) { &case.tuned } else { &case.base };
            assert!(row == &from[indices[i] as usize * k * w..][..k * w], "row {i} is not the tenant's");
        }
    }
    let x = pair(case.dtype, m * n.max(k), 8, 0).0;
    let biases = vec![0u8; 4 * n * w];
    let biases = (choices.byte() & 1 == 0).then_some(Biases { bytes: &biases, stride: n * w });
    let mode = choices.of_list(&[Mode::Fast, Mode::Deterministic]);
    let product = GroupedArgs { x: &x[..m * k * w], m, base, arena, tenant_of_row: &rows, biases, mode };
    let mut out = vec![0u8; m * n.max(k) * w];
    let _ = delta_linear_grouped(&product, &mut out[..m * n * w], &Serial);
    let grad = GroupedGradArgs { grad: &x[..m * n * w], m, base, arena, tenant_of_row: &rows };
    let _ = delta_linear_grouped_grad_input(&grad, &mut out[..m * k * w], &Serial);
}
