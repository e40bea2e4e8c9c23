//! What the shim says, made into what the core asks for.

use super::door::{Batch, Executor, HostMatrix, Part};
use crate::cpu;
use crate::error::{Error, Result};
use crate::ffi::Task;
use crate::matrix::{Dtype, Matrix, Shape};
use crate::resident::Resident;
use crate::vector;

impl<'a> HostMatrix<'a> {
    pub(super) fn matrix(&self) -> Result<Matrix<'a>> {
        Matrix::new(Dtype::of_code(self.dtype.into())?, Shape { n: self.n, k: self.k }, self.bytes)
    }
}

impl<'a> Part<'a> {
    pub(super) fn parse(&self) -> Result<(Resident<'a>, Matrix<'a>)> {
        Ok((Resident::parse(self.delta)?, self.base.matrix()?))
    }
}

impl<'a> Batch<'a> {
    pub(super) fn arena(&self) -> cpu::Arena<'a> {
        cpu::Arena { bytes: self.arena, slots: self.slots.as_chunks().0 }
    }
}

/// The shim's executor as the kernels want it.
pub(super) struct Shim<'a>(pub(super) &'a Executor);

// SAFETY: the C++ class is a stateless front of torch's thread pool; its const methods may be called from any
// thread.
unsafe impl Sync for Shim<'_> {}

impl vector::Executor for Shim<'_> {
    fn threads(&self) -> usize {
        self.0.threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        let task = Task::new(tasks, task);
        let ran = self.0.run(tasks, &task);
        task.finish()?;
        ran.map_err(|e| Error::internal(format!("the thread pool failed: {e}")))
    }
}
