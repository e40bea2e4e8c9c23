//! Bits per element of every delta on real pairs, beside zstd-10 of the raw XOR (the notebook's way). Matrices only.
//!
//! `cargo bench --bench pairs`, with the folder in `XORZ_PAIRS` (default `../shared/pairs`): files called
//! `X.base.safetensors` and `X.ft*.safetensors`. fp32 pairs are measured again as bf16, both sides cast (round to even).

use half::bf16;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use xorz::codec::Prefer;
use xorz::error::{Error, Result};
use xorz::matrix::{Dtype, Matrix, Shape};
use xorz::package::{Codec, PackOptions, Package, SafeTensors, Tensor, Writer};
use xorz::resident::encode_pair;

/// A matrix of both sides.
struct Pair {
    name: String,
    dtype: Dtype,
    dims: Vec<usize>,
    base: Vec<u8>,
    fine_tuned: Vec<u8>,
}

fn main() -> ExitCode {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/pairs");
    let dir = std::env::var_os("XORZ_PAIRS").map_or(default, PathBuf::from);
    match table(&dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pairs: {}: {e}", dir.display());
            ExitCode::FAILURE
        }
    }
}

fn table(dir: &Path) -> Result<()> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir)?.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    println!("bits per element, matrices only");
    println!(
        "{:<40} {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8} {:>8} {:>8}",
        "", "", "zstd-10", "resident", "resident", "package", "of them", "of them", "package"
    );
    println!(
        "{:<40} {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8} {:>8} {:>8}",
        "pair", "changed", "raw XOR", "speed", "memory", "smallest", "res-zstd", "planes", "on disk"
    );
    for name in names {
        let Some((stem, _)) = name.split_once(".ft") else { continue };
        let base = SafeTensors::open(&dir.join(format!("{stem}.base.safetensors")))?;
        let pairs = matrices(&base, &SafeTensors::open(&dir.join(&name))?)?;
        let label = name.trim_end_matches(".safetensors");
        row(label, &pairs)?;
        if pairs.iter().any(|p| p.dtype == Dtype::F32) {
            row(&format!("{label} as bf16"), &pairs.into_iter().map(cast).collect::<Vec<_>>())?;
        }
    }
    Ok(())
}

fn matrices(base: &SafeTensors, fine_tuned: &SafeTensors) -> Result<Vec<Pair>> {
    let tensors = fine_tuned.header().tensors.iter().filter(|t| t.dims.len() >= 2);
    tensors
        .map(|t| {
            let b = base.find(&t.name).ok_or_else(|| Error::mismatch(format!("no base for {}", t.name)))?;
            let dtype = Dtype::from_name(&t.dtype).ok_or_else(|| Error::unsupported(t.dtype.clone()))?;
            Ok(Pair {
                name: t.name.clone(),
                dtype,
                dims: t.dims.clone(),
                base: base.read(b)?,
                fine_tuned: fine_tuned.read(t)?,
            })
        })
        .collect()
}

fn cast(mut p: Pair) -> Pair {
    if p.dtype == Dtype::F32 {
        let side = |b: &[u8]| -> Vec<u8> {
            let words = b.chunks_exact(4).map(|w| f32::from_le_bytes([w[0], w[1], w[2], w[3]]));
            words.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect()
        };
        (p.base, p.fine_tuned, p.dtype) = (side(&p.base), side(&p.fine_tuned), Dtype::BF16);
    }
    p
}

/// Stored bytes of all tensors by one codec (or the smallest), and of the package file with its header.
fn packed(pairs: &[Pair], codec: Option<Codec>) -> Result<(u64, u64)> {
    let path = std::env::temp_dir().join(format!("xorz-pairs-{}.xorz", std::process::id()));
    let mut writer = Writer::create(&path, PackOptions { codec, ..PackOptions::default() })?;
    for p in pairs {
        let side = |bytes| Tensor { name: &p.name, dtype: p.dtype.name(), dims: &p.dims, bytes };
        writer.add(&side(&p.fine_tuned), Some(&side(&p.base)))?;
    }
    let report = writer.finish()?;
    let stored = Package::open(&path)?.entries().iter().map(|e| e.stored_bytes).sum();
    std::fs::remove_file(&path)?;
    Ok((stored, report.package_bytes))
}

fn row(label: &str, pairs: &[Pair]) -> Result<()> {
    let (mut words, mut changed, mut speed, mut memory) = (0, 0, 0, 0);
    for p in pairs {
        let shape = Shape::of_dims(&p.dims)?;
        let (b, f) = (Matrix::new(p.dtype, shape, &p.base)?, Matrix::new(p.dtype, shape, &p.fine_tuned)?);
        let w = p.dtype.word_bytes();
        words += shape.words()?;
        changed += p.base.chunks(w).zip(p.fine_tuned.chunks(w)).filter(|(x, y)| x != y).count();
        speed += encode_pair(&b, &f, Prefer::Speed)?.len();
        memory += encode_pair(&b, &f, Prefer::Memory)?.len();
    }
    let bits = |bytes: u64| 8.0 * bytes as f64 / words as f64;
    let (smallest, file) = packed(pairs, None)?;
    println!(
        "{label:<40} {:>6.2} % {:>8.3} | {:>8.3} {:>8.3} | {:>8.3} {:>8.3} {:>8.3} {:>8.3}",
        100.0 * changed as f64 / words as f64,
        bits(packed(pairs, Some(Codec::Xor))?.0),
        bits(speed as u64),
        bits(memory as u64),
        bits(smallest),
        bits(packed(pairs, Some(Codec::ResidentZstd))?.0),
        bits(packed(pairs, Some(Codec::Planes))?.0),
        bits(file),
    );
    Ok(())
}
