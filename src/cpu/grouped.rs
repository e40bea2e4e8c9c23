//! `delta_linear_grouped` and its gradient: one batch, many tenants on one base.

use super::arena::{Arena, Tenants};
use super::grad;
use super::job::{Mode, Segment, check_words};
use super::linear;
use super::plan::{ProductWay, Sums};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Shape};
use crate::resident::Resident;
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::exec::Executor;
use crate::vector::float::{Float, with_float};
use crate::vector::simd::Simd;
use std::ops::Range;

/// One bias for each slot and one for the base, some bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct Biases<'a> {
    /// `[slots + 1, n]` words of the base's dtype, the base's last; any alignment.
    pub bytes: &'a [u8],
    /// Bytes from one row to the next; 0 where all rows are the same one.
    pub stride: usize,
}

impl<'a> Biases<'a> {
    fn check(&self, slots: usize, len: usize) -> Result<()> {
        let want = slots.checked_mul(self.stride).and_then(|at| at.checked_add(len));
        if want == Some(self.bytes.len()) {
            return Ok(());
        }
        Err(Error::mismatch(format!(
            "biases have {} bytes, but {} rows of {len} bytes, {} apart, take {want:?}",
            self.bytes.len(),
            slots + 1,
            self.stride
        )))
    }

    fn row(&self, row: usize, len: usize) -> &'a [u8] {
        &self.bytes[row * self.stride..][..len]
    }
}

/// What [`delta_linear_grouped`] multiplies.
#[derive(Clone, Copy, Debug)]
pub struct GroupedArgs<'a> {
    /// x, `[m, k]` words of the base's dtype, any alignment.
    pub x: &'a [u8],
    /// Rows of x.
    pub m: usize,
    /// The base, `[n, k]` of f32, bf16 or f16, any alignment.
    pub base: Matrix<'a>,
    /// The tenants' deltas. Base digests are not checked here.
    pub arena: Arena<'a>,
    /// Which slot each row of x belongs to; -1 is the base.
    pub tenant_of_row: &'a [i32],
    /// Biases, if there are any.
    pub biases: Option<Biases<'a>>,
    /// The order of summing.
    pub mode: Mode,
}

/// [`delta_linear`](super::delta_linear) of many tenants at once: row i of `out [m, n]` is what it gives for
/// row i of x with the delta and the bias of row i's tenant; an empty slot and -1 stand for the base's own
/// weights.
///
/// The rows of a tenant are computed in the order of the batch. With [`Mode::Deterministic`] a row's bits are
/// those of [`delta_linear`](super::delta_linear) on that row alone, whatever else is in the batch; with
/// [`Mode::Fast`] they are within the same bound and depend on the map, never on another row's values. The
/// decode path of results that are not finite is taken row by row.
///
/// # Errors
/// As [`delta_linear`](super::delta_linear); `InvalidArgument` for a slot outside of the arena or a tenant
/// that does not exist. Only slots that a row uses are looked at.
pub fn delta_linear_grouped(args: &GroupedArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    delta_linear_grouped_on(Isa::active()?, args, out, exec)
}

/// [`delta_linear_grouped`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_linear_grouped`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_linear_grouped_on(
    isa: Isa,
    args: &GroupedArgs<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    on_isa!(isa, s => with_float!(args.base.dtype(), D => linear_groups::<_, D>(s, args, out, exec)))?
}

fn linear_groups<S: Simd, D: Float>(
    s: S,
    args: &GroupedArgs<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    let Shape { n, k } = args.base.shape();
    let dtype = args.base.dtype();
    check_words("x", args.x, Shape { n: args.m, k }, dtype)?;
    check_words("out", out, Shape { n: args.m, k: n }, dtype)?;
    let slots = args.arena.slots.len();
    args.biases.map_or(Ok(()), |b| b.check(slots, n * D::BYTES))?;
    let tenants = Tenants::new(args.tenant_of_row, args.m, slots)?;
    let groups: Vec<_> = tenants.groups().collect();
    let deltas = deltas(&groups, &args.arena, &args.base)?;
    if out.is_empty() {
        return Ok(());
    }
    let bias = |slot: Option<usize>| args.biases.map(|b| b.row(slot.unwrap_or(slots), n * D::BYTES));
    let (order, segments) =
        segments(&args.base, &tenants, &groups, &deltas, Sums::of::<S, D>(args.mode, args.m), bias);
    let (order, segments) = (Some(&order[..]), &segments[..]);
    let call = linear::ProductCall { x: args.x, base: args.base, order, segments, mode: args.mode };
    linear::run_linear::<S, D>(s, &call, out, exec)
}

/// What [`delta_linear_grouped_grad_input`] multiplies.
#[derive(Clone, Copy, Debug)]
pub struct GroupedGradArgs<'a> {
    /// The gradient of the output, `[m, n]` words of the base's dtype, any alignment.
    pub grad: &'a [u8],
    /// Rows of `grad`.
    pub m: usize,
    /// As in [`GroupedArgs`].
    pub base: Matrix<'a>,
    /// As in [`GroupedArgs`].
    pub arena: Arena<'a>,
    /// As in [`GroupedArgs`].
    pub tenant_of_row: &'a [i32],
}

/// [`delta_linear_grad_input`](super::delta_linear_grad_input) of many tenants at once: row i of `out [m, k]`
/// has the bits that it gives for row i of grad with row i's tenant.
///
/// # Errors
/// `InvalidArgument` for a slot outside of the arena or a tenant that does not exist; `Mismatch` where base,
/// a used delta, `grad` and `out` do not fit; `Unsupported` for a dtype that does not compute; `Corrupt` or
/// `Truncated` for bad delta bytes.
pub fn delta_linear_grouped_grad_input(
    args: &GroupedGradArgs<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    on_isa!(Isa::active()?, s => with_float!(args.base.dtype(), D => grad_groups::<_, D>(s, args, out, exec)))?
}

fn grad_groups<S: Simd, D: Float>(
    s: S,
    args: &GroupedGradArgs<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    let Shape { n, k } = args.base.shape();
    let dtype = args.base.dtype();
    check_words("grad", args.grad, Shape { n: args.m, k: n }, dtype)?;
    check_words("out", out, Shape { n: args.m, k }, dtype)?;
    let tenants = Tenants::new(args.tenant_of_row, args.m, args.arena.slots.len())?;
    let groups: Vec<_> = tenants.groups().collect();
    let deltas = deltas(&groups, &args.arena, &args.base)?;
    if out.is_empty() {
        return Ok(());
    }
    let out = D::share(out, "out")?;
    let (order, segments) = segments(&args.base, &tenants, &groups, &deltas, Sums::Deterministic, |_| None);
    let job = grad::GradJob { grad: args.grad, base: args.base, order: Some(&order), out };
    grad::run_grad::<S, D>(s, &job, &segments, exec)
}

/// The deltas of the groups of a batch: every slot in use is looked at before a word is computed.
fn deltas<'a>(
    groups: &[(Option<usize>, Range<usize>)],
    arena: &Arena<'a>,
    base: &Matrix<'_>,
) -> Result<Vec<Option<Resident<'a>>>> {
    groups.iter().map(|(slot, _)| slot.map_or(Ok(None), |slot| arena.delta(slot, base))).collect()
}

/// The rows of a batch, way after way and tenant after tenant: which row is at each place, and which places
/// belong to which tenant.
fn segments<'a>(
    base: &Matrix<'a>,
    tenants: &Tenants<'_>,
    groups: &[(Option<usize>, Range<usize>)],
    deltas: &'a [Option<Resident<'a>>],
    sums: Sums,
    bias: impl Fn(Option<usize>) -> Option<&'a [u8]>,
) -> (Vec<usize>, Vec<Segment<'a>>) {
    let weights = |i: usize| Weights::new(*base, deltas[i].as_ref());
    let mut ways: Vec<_> =
        (0..groups.len()).map(|i| (ProductWay::of(&weights(i), groups[i].1.len(), sums), i)).collect();
    ways.sort_unstable();
    let (mut order, mut segments) = (Vec::new(), Vec::with_capacity(groups.len()));
    for (_, i) in ways {
        let (slot, rows) = &groups[i];
        let start = order.len();
        order.extend_from_slice(&tenants.order()[rows.clone()]);
        segments.push(Segment {
            weights: weights(i),
            bias: bias(*slot),
            rows: start..order.len(),
            slot: *slot,
        });
    }
    (order, segments)
}
