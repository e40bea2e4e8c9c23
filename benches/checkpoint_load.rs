//! Package to resident deltas, the time that a server waits for a tenant: `checkpoint_load BASE.safetensors PACKAGE.xorz`,
//! as `benches/checkpoint.py` runs it. The base is in memory and its digests are known beforehand, as in a server that has
//! loaded a tenant before; with a third argument, `digest`, they are computed each time. One thread; deltas are taken as
//! they are stored. Prints one JSON line: the fastest of five turns, and the bytes made.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use xorz::error::{Error, Result};
use xorz::matrix::{Digest, Dtype, Matrix, Shape};
use xorz::package::{Package, SafeTensors};

fn main() -> ExitCode {
    // `cargo bench` adds a flag of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [base, package, rest @ ..] = args.as_slice() else {
        eprintln!("SKIPPED checkpoint_load: it takes a base and a package; benches/checkpoint.py gives them");
        return ExitCode::SUCCESS;
    };
    match measure(Path::new(base), Path::new(package), rest.is_empty()) {
        Ok((seconds, bytes)) => {
            println!("{{\"seconds\": {seconds}, \"cpu\": {seconds}, \"bytes\": {bytes}}}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("checkpoint_load: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A base tensor in memory, and its digest.
struct Base {
    dtype: Dtype,
    shape: Shape,
    bytes: Vec<u8>,
    digest: Digest,
}

impl Base {
    fn matrix(&self) -> Result<Matrix<'_>> {
        Matrix::new(self.dtype, self.shape, &self.bytes)
    }
}

fn load(path: &Path) -> Result<HashMap<String, Base>> {
    let (file, mut out) = (SafeTensors::open(path)?, HashMap::new());
    for t in &file.header().tensors {
        let Some(dtype) = Dtype::from_name(&t.dtype) else { continue };
        let (shape, bytes) = (Shape::of_dims(&t.dims)?, file.read(t)?);
        let digest = Matrix::new(dtype, shape, &bytes)?.digest();
        out.insert(t.name.clone(), Base { dtype, shape, bytes, digest });
    }
    Ok(out)
}

fn measure(base: &Path, package: &Path, known: bool) -> Result<(f64, usize)> {
    let base = load(base)?;
    let (mut best, mut bytes) = (f64::INFINITY, 0);
    for _ in 0..5 {
        let start = Instant::now();
        let opened = Package::open(package)?;
        let mut deltas = Vec::new();
        for entry in opened.entries().iter().filter(|e| e.codec.delta()) {
            let wanted = opened.base_of(&entry.name)?;
            let missing = || Error::mismatch(format!("no base tensor `{}`", wanted.name));
            let found = base.get(&wanted.name).ok_or_else(missing)?;
            let kept = match known {
                true => {
                    let base = (found.dtype, found.shape, found.digest);
                    opened.resident_as_stored(&entry.name, base, None)?
                }
                false => None,
            };
            // What is stored as byte planes is encoded from the base and them.
            deltas.push(match kept {
                Some(delta) => delta,
                None => opened.resident(&entry.name, &found.matrix()?, None)?,
            });
        }
        best = best.min(start.elapsed().as_secs_f64());
        bytes = deltas.iter().map(Vec::len).sum();
    }
    Ok((best, bytes))
}
