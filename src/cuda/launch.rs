//! The ops: what the host can check, then kernels on the caller's stream.

use super::driver::Device;
use super::params::{self, Params};
use super::plan::{self, Large, Product, WORKSPACE_ALIGN};
use super::status::Op;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};

/// Where to launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The device, as the driver counts those that are visible.
    pub device: i32,
    /// A `CUstream` of the device's primary context; 0 is its default stream.
    pub stream: u64,
}

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMatrix {
    /// Dtype of the words; the delta must be of it.
    pub dtype: Dtype,
    /// Whether a delta of any dtype of that size will do, for restore, apply and lookups: the words are bits.
    pub bits: bool,
    /// Rows and columns.
    pub shape: Shape,
    /// Address of the first word, aligned to words.
    pub address: u64,
}

impl DeviceMatrix {
    /// What the kernels compare a delta's dtype with; 0 takes any.
    pub(super) fn accepted(&self) -> u32 {
        if self.bits { 0 } else { self.dtype as u32 }
    }
}

/// The tenants of a batch: addresses of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRows {
    /// `[slots, 2]` i64: offset and length in bytes of each slot's delta.
    pub slots: u64,
    /// Slots.
    pub slot_count: usize,
    /// `[m]` i32: the slot of each row of x, -1 the base.
    pub tenant_of_row: u64,
}

/// Arguments of [`delta_linear`] and [`delta_linear_grad_input`], addresses of device memory. All words are of the weight's dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// `[m, k]`; of the gradient `[m, n]`.
    pub x: u64,
    /// Rows of x.
    pub m: usize,
    /// The base, `[n, k]`.
    pub weight: DeviceMatrix,
    /// Rows of biases; 0 is none.
    pub biases: u64,
    /// Words from one row of biases to the next.
    pub bias_stride: usize,
    /// The delta, or the arena of all deltas.
    pub arena: u64,
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// None: `arena` is the delta of every row, and `biases` is one row.
    pub rows: Option<BatchRows>,
    /// Whether a row's bits shall not depend on the other rows of the batch.
    pub deterministic: bool,
}

/// Arguments of [`delta_embedding`], addresses of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedding {
    /// `[m]` i64: which row of the table each row of the batch is.
    pub indices: u64,
    /// Rows of the batch.
    pub m: usize,
    /// The base's table.
    pub weight: DeviceMatrix,
    /// The memory of all deltas.
    pub arena: u64,
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// The tenant of each row.
    pub rows: BatchRows,
}

impl BatchRows {
    /// What the kernels get as the address of slots. A null address would mean that there is only one delta,
    /// so a table of no slots gets another one, which is never read.
    fn named(self) -> Self {
        Self { slots: self.slots.max(SLOT_ALIGN), ..self }
    }

    /// For `m` rows of a batch.
    fn check(&self, m: usize) -> Result<()> {
        check_aligned("slots", self.slots, SLOT_ALIGN)?;
        check_aligned("tenant_of_row", self.tenant_of_row, 4)?;
        if (self.slots == 0 && self.slot_count > 0) || (self.tenant_of_row == 0 && m > 0) {
            return Err(Error::invalid("slots or tenant_of_row are at no address"));
        }
        Ok(())
    }
}

impl Linear {
    fn plan_rows(&self) -> plan::ProductRows {
        let slots = self.rows.map(|r| r.slot_count);
        plan::ProductRows { m: self.m, slots, deterministic: self.deterministic }
    }

    fn plan(&self) -> Result<Product> {
        plan::linear(self.weight.dtype, self.plan_rows(), self.weight.shape)
    }

    fn plan_grad(&self) -> Result<Option<Large>> {
        plan::grad_input(self.weight.dtype, self.plan_rows(), self.weight.shape)
    }

    /// Bytes of device memory that [`delta_linear`] works in, aligned to 16; 0 is none. No address is looked
    /// at.
    ///
    /// # Errors
    /// `Unsupported` for a dtype that does not compute or for too many rows, slots or words.
    pub fn workspace_bytes(&self) -> Result<usize> {
        Ok(match self.plan()? {
            Product::Large(large) => large.workspace_bytes,
            Product::Small(_) | Product::Nothing => 0,
        })
    }

    /// Rows of W of each panel that [`super::delta_linear_panel`] is to restore, for torch to multiply; None where [`delta_linear`]
    /// is to be called.
    pub fn panel_rows(&self) -> Option<usize> {
        plan::panel_rows(self.weight.dtype, self.plan_rows(), self.weight.shape)
    }

    /// As [`Linear::workspace_bytes`], of [`delta_linear_grad_input`].
    ///
    /// # Errors
    /// As [`Linear::workspace_bytes`].
    pub fn grad_workspace_bytes(&self) -> Result<usize> {
        Ok(self.plan_grad()?.map_or(0, |large| large.workspace_bytes))
    }

    /// The parameters that are read; those that are written are filled in by the launch.
    fn params(&self) -> params::Linear {
        let rows =
            self.rows.map_or(BatchRows { slots: 0, slot_count: 0, tenant_of_row: 0 }, BatchRows::named);
        let Shape { n, k } = self.weight.shape;
        params::Linear {
            x: self.x,
            weight: self.weight.address,
            biases: self.biases,
            bias_stride: self.bias_stride as u64,
            arena: self.arena,
            arena_bytes: self.arena_bytes as u64,
            slots: rows.slots,
            slot_count: rows.slot_count as u64,
            tenant_of_row: rows.tenant_of_row,
            m: self.m as u64,
            n: n as u64,
            k: k as u64,
            ..Default::default()
        }
    }

    /// `all` for `count` rows of x from row `first` on.
    fn rows_of(&self, all: &params::Linear, first: u64, count: u64) -> params::Linear {
        let word = self.weight.dtype.word_bytes() as u64;
        let after = |address: u64, bytes: u64| if address == 0 { 0 } else { address + first * bytes };
        params::Linear {
            x: after(all.x, all.k * word),
            tenant_of_row: after(all.tenant_of_row, 4),
            out: after(all.out, all.n * word),
            m: count,
            ..*all
        }
    }
}

/// Alignment of deltas that the kernels take.
pub(super) const DELTA_ALIGN: u64 = 16;
/// Alignment of slots.
const SLOT_ALIGN: u64 = 8;

pub(super) fn check_workspace(address: u64, align: u64) -> Result<()> {
    check_aligned("workspace", address, align)?;
    if address == 0 {
        return Err(Error::invalid("workspace is at no address"));
    }
    Ok(())
}

pub(super) fn check_aligned(what: &str, address: u64, to: u64) -> Result<()> {
    if address.is_multiple_of(to) {
        return Ok(());
    }
    Err(Error::invalid(format!("{what} is at an address that is no multiple of {to} bytes")))
}

/// Makes `device` ready where it is not, so that an op tells what is wrong there before it asks torch for memory.
///
/// # Errors
/// `Device`, with what to do: no libcuda, no such device, too old a driver or device, no kernels.
pub fn open(device: i32) -> Result<()> {
    Device::get(device).map(|_| ())
}

/// What kernels on a device have reported since the last call of an op there, or of this: one report, which is then
/// forgotten. For processes that only replay captured graphs, whose launches pass by the host. Waits for nothing: what has
/// not run yet has not reported.
///
/// # Errors
/// The report.
pub fn reported(device: i32) -> Result<()> {
    Device::made(device).map_or(Ok(()), Device::raise)
}

pub(super) fn check_linear(args: &Linear, out: u64) -> Result<()> {
    let word = args.weight.dtype.word_bytes() as u64;
    for (what, address) in
        [("input", args.x), ("weight", args.weight.address), ("biases", args.biases), ("out", out)]
    {
        check_aligned(what, address, word)?;
    }
    check_aligned(if args.rows.is_some() { "arena" } else { "delta" }, args.arena, DELTA_ALIGN)?;
    // To a kernel no address would be no delta, and that the base.
    if args.rows.is_none() && (args.arena == 0 || args.arena_bytes == 0) {
        return Err(Error::corrupt("delta has no bytes, so it is no resident delta"));
    }
    args.rows.map_or(Ok(()), |rows| rows.check(args.m))
}

/// Row i of `out [m, k]`, words of the weight's dtype, becomes row `indices[i]` of the fine-tuned table of
/// row i's tenant, bit for bit. An index outside of the table gives all bits set, and a report. Where the
/// weight's words are bits, each tenant's delta says which dtype they are.
///
/// # Errors
/// As [`super::delta_restore`], and `Unsupported` for too many rows or slots.
///
/// # Safety
/// All that `args` names, and `[m, k]` words at `out`, is memory that the device can reach until the stream
/// has passed this call; `out` overlaps nothing. Contents may be anything.
pub unsafe fn delta_embedding(place: Place, args: &Embedding, out: u64) -> Result<()> {
    let DeviceMatrix { dtype, shape, address, .. } = args.weight;
    let launch = plan::embedding(dtype, args.m, args.rows.slot_count, shape)?;
    check_aligned("indices", args.indices, 8)?;
    check_aligned("weight", address, dtype.word_bytes() as u64)?;
    check_aligned("arena", args.arena, DELTA_ALIGN)?;
    check_aligned("out", out, dtype.word_bytes() as u64)?;
    args.rows.check(args.m)?;
    let device = Device::get(place.device)?;
    device.raise()?;
    let Some(launch) = launch else { return Ok(()) };
    let rows = args.rows.named();
    let params = params::Embedding {
        indices: args.indices,
        weight: address,
        arena: args.arena,
        arena_bytes: args.arena_bytes as u64,
        slots: rows.slots,
        slot_count: rows.slot_count as u64,
        tenant_of_row: rows.tenant_of_row,
        out,
        m: args.m as u64,
        n: shape.n as u64,
        k: shape.k as u64,
        dtype: args.weight.accepted(),
        status: device.status(Op::Embedding),
    };
    // SAFETY: the parameters of that kernel, by its table; the memory is the caller's promise.
    unsafe { device.launch(launch, place.stream, params.pack()) }
}

/// `out [m, n] = x @ (weight (+) delta)^T + bias`, each row of x with its own tenant's delta where `rows` is
/// given.
///
/// # Errors
/// As [`super::delta_restore`], and `Unsupported` for a dtype that does not compute.
///
/// # Safety
/// All that `args` names, `[m, n]` words at `out` and [`Linear::workspace_bytes`] at `workspace` are memory
/// that the device can reach until the stream has passed this call; `out` and `workspace` overlap nothing.
/// Their contents may be anything.
pub unsafe fn delta_linear(place: Place, args: &Linear, workspace: u64, out: u64) -> Result<()> {
    let product = args.plan()?;
    check_linear(args, out)?;
    let device = Device::get(place.device)?;
    device.raise()?;
    let status = device.status(if args.rows.is_some() { Op::Grouped } else { Op::Linear });
    let all = params::Linear { out, workspace, status, ..args.params() };
    match product {
        Product::Nothing => Ok(()),
        Product::Small(small) => small.launches().try_for_each(|(launch, first, count)| {
            let part = args.rows_of(&all, first as u64, count as u64);
            // SAFETY: the parameters of that kernel, by its table; rows `first ..` of what the caller
            // promises.
            unsafe { device.launch(launch, place.stream, part.pack().first(params::SMALL)) }
        }),
        // SAFETY: the caller's promise.
        Product::Large(large) => unsafe { launch_tiles(device, place, &large, &all) },
    }
}

/// The two launches of `large`.
///
/// # Safety
/// What `all` names is memory that the device can reach, of the sizes that the kernels' parameters say.
unsafe fn launch_tiles(device: &Device, place: Place, large: &Large, all: &params::Linear) -> Result<()> {
    check_workspace(all.workspace, WORKSPACE_ALIGN)?;
    let tiles = large.tiles(device.multiprocessors());
    [large.segments, tiles].into_iter().try_for_each(|launch| {
        // SAFETY: the parameters of both kernels, by their table; the memory is the caller's promise.
        unsafe { device.launch(launch, place.stream, all.pack()) }
    })
}

/// `out [m, k] = x @ (weight (+) delta)`, where `x [m, n]` is the gradient of what [`delta_linear`] gave, each row with its own
/// tenant's delta where `rows` is given: the gradient for its input. Biases are not looked at.
///
/// # Errors
/// As [`delta_linear`].
///
/// # Safety
/// As [`delta_linear`], with `[m, k]` words at `out` and [`Linear::grad_workspace_bytes`] at `workspace`.
pub unsafe fn delta_linear_grad_input(place: Place, args: &Linear, workspace: u64, out: u64) -> Result<()> {
    let args = Linear { biases: 0, bias_stride: 0, ..*args };
    let plan = args.plan_grad()?;
    check_linear(&args, out)?;
    let device = Device::get(place.device)?;
    device.raise()?;
    let status = device.status(if args.rows.is_some() { Op::GroupedGradInput } else { Op::GradInput });
    let all = params::Linear { out, workspace, status, ..args.params() };
    // SAFETY: the caller's promise.
    plan.map_or(Ok(()), |large| unsafe { launch_tiles(device, place, &large, &all) })
}
