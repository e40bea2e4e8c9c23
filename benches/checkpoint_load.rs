//! Package to resident deltas, the time that a server waits for a tenant: `checkpoint_load BASE.safetensors PACKAGE.xorz`,
//! as `benches/checkpoint.py` runs it. The base is in memory beforehand, as in a server; one thread; deltas are taken in
//! the form they are stored in. Prints one JSON line: the fastest of five turns, and the bytes made.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use xorz::error::{Error, Result};
use xorz::matrix::Matrix;
use xorz::package::{Package, SafeTensors};

fn main() -> ExitCode {
    // `cargo bench` adds a flag of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [base, package] = args.as_slice() else {
        eprintln!("SKIPPED checkpoint_load: it takes a base and a package; benches/checkpoint.py gives them");
        return ExitCode::SUCCESS;
    };
    match measure(Path::new(base), Path::new(package)) {
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

fn measure(base: &Path, package: &Path) -> Result<(f64, usize)> {
    let file = SafeTensors::open(base)?;
    let base: Vec<(&str, Vec<u8>)> =
        file.header().tensors.iter().map(|t| Ok((t.name.as_str(), file.read(t)?))).collect::<Result<_>>()?;
    let (mut best, mut bytes) = (f64::INFINITY, 0);
    for _ in 0..5 {
        let start = Instant::now();
        let opened = Package::open(package)?;
        let mut deltas = Vec::new();
        for entry in opened.entries().iter().filter(|e| !e.codec.alone()) {
            let wanted = entry.base.as_ref().map_or(entry.name.as_str(), |b| b.name.as_str());
            let found = base.iter().find(|(name, _)| *name == wanted);
            let (_, words) = found.ok_or_else(|| Error::mismatch(format!("no base for {wanted}")))?;
            let dtype = entry.word_dtype().ok_or_else(|| Error::unsupported(entry.dtype.clone()))?;
            let matrix = Matrix::new(dtype, entry.shape()?, words)?;
            deltas.push(opened.resident(&entry.name, &matrix, None)?);
        }
        best = best.min(start.elapsed().as_secs_f64());
        bytes = deltas.iter().map(Vec::len).sum();
    }
    Ok((best, bytes))
}
