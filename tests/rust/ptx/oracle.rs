//! The machine that the tests run kernels on, and what every launch of a kernel must leave: each byte of its outputs
//! written, and its status.

use crate::common::device::{After, Launch, Param};
use crate::common::kernels::{APPLY_VERDICTS, LARGE_WORKSPACE, LINEAR_OUT, LINEAR_STATUS, Large};
use crate::common::lookups::LOOKUP_OUT;
use crate::machine::{Left, Machine};
use crate::memory::Known;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Where the PTX is: a file for each of `cuda/*.cu`.
pub(crate) fn texts() -> Option<&'static [(String, String)]> {
    static TEXTS: OnceLock<Option<Vec<(String, String)>>> = OnceLock::new();
    let read = || {
        let folder = PathBuf::from(std::env::var_os("XORZ_PTX")?);
        let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|e| e == "ptx"));
        files.sort();
        let text = |path: &PathBuf| {
            (path.file_stem().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(path).unwrap())
        };
        Some(files.iter().map(text).collect())
    };
    TEXTS.get_or_init(read).as_deref()
}

/// The kernels of `XORZ_PTX`; without, None, and that is said.
pub(crate) fn machine(test: &str) -> Option<&'static Machine> {
    static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
    let read = || Some(Machine::new(texts()?.iter().map(|(_, text)| &text[..])).unwrap());
    let found = MACHINE.get_or_init(read).as_ref();
    if found.is_none() {
        eprintln!("SKIPPED {test}: XORZ_PTX is not set; `make cuda-gate` makes the PTX and runs this");
    }
    found
}

/// What a kernel has to write, all of it, without having read it (cuda/README.md).
fn output(kernel: &str) -> Option<usize> {
    let name = kernel.strip_prefix("xorz_").unwrap();
    let outputs = [
        ("digest", None),
        ("delta_restore", Some(1)),
        ("delta_verify", Some(APPLY_VERDICTS)),
        ("delta_apply", None),
        ("delta_embedding", Some(LOOKUP_OUT)),
        ("linear_segments", None),
        ("linear", Some(LINEAR_OUT)),
    ];
    outputs.into_iter().find(|(begin, _)| name.starts_with(begin)).unwrap().1
}

fn nothing(launch: &Launch, at: usize) -> Known {
    match &launch.params[at] {
        Param::Out(bytes, _) => (at, vec![false; bytes.len()]),
        _ => panic!("{} writes to parameter {at}", launch.kernel),
    }
}

fn launch(machine: &Machine, launch: &Launch, mut known: Vec<Known>) -> Result<Left, String> {
    let output = output(&launch.kernel);
    known.extend(output.map(|at| nothing(launch, at)));
    let left = machine.run(launch, &known)?;
    match output.and_then(|at| left.known[at].iter().position(|known| !known)) {
        Some(byte) => Err(format!("{}: byte {byte} of the output was not written", launch.kernel)),
        None => Ok(left),
    }
}

/// # Errors
/// What a thread did that it may not, or bytes of the output that it left out.
pub(crate) fn run(machine: &Machine, one: &Launch) -> Result<Vec<After>, String> {
    Ok(launch(machine, one, vec![])?.after)
}

/// Rows by tenant, then the product or the gradient.
///
/// # Errors
/// As `run`.
pub(crate) fn run_large(machine: &Machine, large: &Large) -> Result<Vec<After>, String> {
    let known = vec![nothing(&large.segments, LARGE_WORKSPACE)];
    let mut left = launch(machine, &large.segments, known)?;
    let product = large.product_after(&mut left.after);
    let known = std::mem::take(&mut left.known[LARGE_WORKSPACE]);
    Ok(launch(machine, &product, vec![(LARGE_WORKSPACE, known)])?.after)
}

/// The status word of a product.
pub(crate) fn product_status(after: &[After]) -> u32 {
    u32::from_le_bytes(after[LINEAR_STATUS].bytes[..].try_into().unwrap())
}

#[test]
fn every_kernel_that_is_launched_is_understood() {
    let Some(machine) = machine("every_kernel_that_is_launched_is_understood") else { return };
    let mut wanted = xorz::cuda::plan::ENTRIES;
    wanted.sort_unstable();
    assert!(machine.names().eq(wanted), "{:?}", machine.names().collect::<Vec<_>>());
}
