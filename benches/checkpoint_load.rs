//! Package to resident deltas, the time that a server waits for a tenant: `checkpoint_load BASE.safetensors PACKAGE.xorz`,
//! as `benches/checkpoint.py` runs it. The base's digests are known beforehand, as in a server that has loaded a tenant
//! before; with a third argument, `digest`, the base is in memory and they are computed each time. One thread; deltas are taken as
//! they are stored. Prints one JSON line: the fastest of five turns, and the bytes made.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use xorz::error::{Error, Result};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Base, Package, Run, SafeTensors};

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

fn measure(base: &Path, package: &Path, known: bool) -> Result<(f64, usize)> {
    let (on_disk, file) = (Base::open(base, &Run::default())?, SafeTensors::open(base)?);
    let mut words = HashMap::new();
    for t in file.header().tensors.iter().filter(|_| !known) {
        words.insert(t.name.as_str(), (t, file.read(t)?));
    }
    let (mut best, mut bytes) = (f64::INFINITY, 0);
    for _ in 0..5 {
        let start = Instant::now();
        let opened = Package::open(package)?;
        let mut deltas = Vec::new();
        for entry in opened.entries().iter().filter(|e| e.codec.delta()) {
            if known {
                deltas.push(on_disk.resident(&opened, &entry.name, None)?);
                continue;
            }
            let name = &opened.base_of(&entry.name)?.name;
            let found = words.get(name.as_str());
            let (info, bytes) = found.ok_or_else(|| Error::mismatch(format!("no base tensor `{name}`")))?;
            let dtype =
                Dtype::from_name(&info.dtype).ok_or_else(|| Error::unsupported(info.dtype.clone()))?;
            let matrix = Matrix::new(dtype, Shape::of_dims(&info.dims)?, bytes)?;
            deltas.push(opened.resident(&entry.name, &matrix, None)?);
        }
        best = best.min(start.elapsed().as_secs_f64());
        bytes = deltas.iter().map(Vec::len).sum();
    }
    Ok((best, bytes))
}
