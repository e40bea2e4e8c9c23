//! The doors to products and lookups of many rows on the CPU.

use super::arguments::Shim;
use super::door::{Batch, Executor, Grouped, HostMatrix, Linear, Tenant};
use crate::cpu;
use crate::error::Result;
use crate::ffi::guard;
use crate::resident::Resident;

pub(super) fn delta_linear(args: &Linear<'_>, out: &mut [u8], executor: &Executor) -> Result<()> {
    guard(|| {
        let product = cpu::LinearArgs {
            x: args.input,
            m: args.m,
            base: args.weight.matrix()?,
            delta: Resident::parse(args.delta)?,
            bias: args.has_bias.then_some(args.bias),
            mode: args.mode.parse()?,
        };
        cpu::delta_linear(&product, out, &Shim(executor))
    })
}

pub(super) fn delta_linear_grad_input(
    grad: &[u8],
    m: usize,
    weight: &HostMatrix<'_>,
    delta: &[u8],
    out: &mut [u8],
    executor: &Executor,
) -> Result<()> {
    guard(|| {
        let (base, delta) = (weight.matrix()?, Resident::parse(delta)?);
        cpu::delta_linear_grad_input(grad, m, &base, &delta, out, &Shim(executor))
    })
}

pub(super) fn delta_linear_grouped(args: &Grouped<'_>, out: &mut [u8], executor: &Executor) -> Result<()> {
    guard(|| {
        let biases = cpu::Biases { bytes: args.biases, stride: args.bias_stride };
        let product = cpu::GroupedArgs {
            x: args.input,
            m: args.m,
            base: args.weight.matrix()?,
            arena: args.batch.arena(),
            tenant_of_row: args.batch.tenant_of_row,
            biases: args.has_biases.then_some(biases),
            mode: args.mode.parse()?,
        };
        cpu::delta_linear_grouped(&product, out, &Shim(executor))
    })
}

pub(super) fn delta_linear_grouped_grad_input(
    grad: &[u8],
    m: usize,
    weight: &HostMatrix<'_>,
    batch: &Batch<'_>,
    out: &mut [u8],
    executor: &Executor,
) -> Result<()> {
    guard(|| {
        let (base, arena, tenant_of_row) = (weight.matrix()?, batch.arena(), batch.tenant_of_row);
        let product = cpu::GroupedGradArgs { grad, m, base, arena, tenant_of_row };
        cpu::delta_linear_grouped_grad_input(&product, out, &Shim(executor))
    })
}

pub(super) fn grouped_tenants(m: usize, weight: &HostMatrix<'_>, batch: &Batch<'_>) -> Result<Vec<Tenant>> {
    let base_bias = batch.slots.len() / 2;
    let tenant = |t: cpu::Tenant| {
        let (bias, delta) = (t.slot.unwrap_or(base_bias), t.delta.unwrap_or_default());
        let rows = t.rows.into_iter().map(|row| row as i64).collect();
        Tenant { bias, rows, offset: delta.start, length: delta.len() }
    };
    guard(|| {
        let tenants = batch.arena().tenants(&weight.matrix()?, batch.tenant_of_row, m)?;
        Ok(tenants.into_iter().map(tenant).collect())
    })
}

pub(super) fn delta_embedding(
    indices: &[i64],
    weight: &HostMatrix<'_>,
    batch: &Batch<'_>,
    out: &mut [u8],
    executor: &Executor,
) -> Result<()> {
    guard(|| {
        let (arena, tenant_of_row) = (batch.arena(), batch.tenant_of_row);
        let base = arena.base_of_bits(weight.matrix()?, tenant_of_row)?;
        let lookup = cpu::EmbeddingArgs { indices, base, arena, tenant_of_row };
        cpu::delta_embedding(&lookup, out, &Shim(executor))
    })
}
