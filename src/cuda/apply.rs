//! Applying a delta in place, which begins with the digest of the words; and the digest alone.

use super::driver::Device;
use super::launch::{DELTA_ALIGN, DeviceMatrix, Place, check_aligned, check_workspace};
use super::params::{Apply, DigestLeaves, DigestRoot, Params};
use super::plan::{self, Digesting, WORKSPACE_ALIGN};
use super::status::Op;
use crate::error::{Error, Result};

/// The two launches of a digest. `root`: its delta, verdict and digest, as far as they are wanted.
///
/// # Safety
/// The words of `matrix`, [`Digesting::workspace_bytes`] at `workspace` and what `root` names are memory that the device can
/// reach until the stream has passed them.
unsafe fn launch_digest(
    device: &Device,
    place: Place,
    matrix: DeviceMatrix,
    (launches, workspace): (&Digesting, u64),
    root: DigestRoot,
) -> Result<()> {
    let (n, k, word_bytes) = (matrix.shape.n as u64, matrix.shape.k as u64, matrix.dtype.word_bytes());
    let leaves = DigestLeaves { words: matrix.address, n, row_bytes: k * word_bytes as u64, workspace };
    let status = device.status(Op::Apply);
    let root = DigestRoot { workspace, n, k, word_bytes: word_bytes as u32, status, ..root };
    // SAFETY: the parameters of that kernel, by its table; the memory is the caller's promise.
    unsafe { device.launch(launches.leaves, place.stream, leaves.pack()) }?;
    // SAFETY: as above.
    unsafe { device.launch(launches.root, place.stream, root.pack()) }
}

/// Bytes of device memory that [`delta_apply`] works in, aligned to 16. No address is looked at.
///
/// # Errors
/// `Unsupported` for a matrix that is too large.
pub fn apply_workspace_bytes(weight: DeviceMatrix) -> Result<usize> {
    Ok(plan::apply(weight.dtype, weight.shape)?.workspace_bytes())
}

/// `weight [n, k]` turns from base into fine-tuned words, in place. Launches before the one that changes words compare the
/// digest of the words with that of the delta's base, and decode every tile: where the base is another, a tile contradicts
/// itself or its words, or the delta does not fit, no word changes and that is reported.
///
/// # Errors
/// As [`super::delta_restore`]; `InvalidArgument` for a misaligned `workspace` or none.
///
/// # Safety
/// As [`super::delta_restore`], `weight` in the place of `out`; and [`apply_workspace_bytes`] at `workspace`, whose contents
/// may be anything.
pub unsafe fn delta_apply(
    place: Place,
    weight: DeviceMatrix,
    delta: u64,
    delta_bytes: usize,
    workspace: u64,
) -> Result<()> {
    let launches = plan::apply(weight.dtype, weight.shape)?;
    check_aligned("weight", weight.address, weight.dtype.word_bytes() as u64)?;
    check_aligned("delta", delta, DELTA_ALIGN)?;
    check_workspace(workspace, WORKSPACE_ALIGN)?;
    let device = Device::get(place.device)?;
    device.raise()?;
    let params = Apply {
        weight: weight.address,
        delta,
        delta_bytes: delta_bytes as u64,
        n: weight.shape.n as u64,
        k: weight.shape.k as u64,
        dtype: weight.accepted(),
        status: device.status(Op::Apply),
        verdicts: workspace + launches.digest.workspace_bytes as u64,
        verdict_count: launches.verdicts() as u64,
    };
    let verdict = params.verdicts + 4 * (params.verdict_count - 1);
    let root = DigestRoot {
        dtype: params.dtype,
        delta,
        delta_bytes: params.delta_bytes,
        verdict,
        ..Default::default()
    };
    // SAFETY: the caller's promise; the verdict is the last of those in the workspace.
    unsafe { launch_digest(device, place, weight, (&launches.digest, workspace), root) }?;
    [launches.verify, launches.apply].into_iter().try_for_each(|launch| {
        // SAFETY: the parameters of both kernels, by their table; the memory is the caller's promise.
        unsafe { device.launch(launch, place.stream, params.pack()) }
    })
}

/// Bytes of device memory that [`delta_digest`] works in, aligned to 16. No address is looked at.
///
/// # Errors
/// `Unsupported` for a matrix that is too large.
pub fn digest_workspace_bytes(matrix: DeviceMatrix) -> Result<usize> {
    Ok(plan::digest(matrix.shape)?.workspace_bytes)
}

/// The 16 bytes at `out` become the digest of `matrix`, as [`crate::matrix::Matrix::digest`] has it.
///
/// # Errors
/// As [`super::delta_restore`], but for the reports of earlier calls; `InvalidArgument` for a misaligned `workspace` or none.
///
/// # Safety
/// The words of `matrix`, [`digest_workspace_bytes`] at `workspace` and 16 bytes at `out` are memory that the device can reach
/// until the stream has passed this call; the latter two overlap nothing. Their contents may be anything.
pub unsafe fn delta_digest(place: Place, matrix: DeviceMatrix, workspace: u64, out: u64) -> Result<()> {
    let launches = plan::digest(matrix.shape)?;
    check_aligned("words", matrix.address, matrix.dtype.word_bytes() as u64)?;
    check_aligned("out", out, 8)?;
    check_workspace(workspace, WORKSPACE_ALIGN)?;
    if out == 0 {
        return Err(Error::invalid("out is at no address"));
    }
    // Reports nothing, and hears of nothing: what another op has reported is for whoever asked for that.
    let device = Device::get(place.device)?;
    let root = DigestRoot { dtype: matrix.dtype as u32, digest: out, ..Default::default() };
    // SAFETY: the caller's promise.
    unsafe { launch_digest(device, place, matrix, (&launches, workspace), root) }
}
