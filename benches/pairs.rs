//! Bits per element of every delta on real pairs, beside zstd-10 of the raw XOR (the notebook's way). Matrices only. Of codec
//! `predicted` also how fast a package is made and restored with it on one thread, base and checks hashed, GB/s of model.
//! The last column counts the tensors that take more in the package than zstd-10 of their XOR takes.
//!
//! `cargo bench --bench pairs`, with the folder in `XORZ_PAIRS` (default `../shared/pairs`): files called
//! `X.base.safetensors` and `X.ft*.safetensors`. fp32 pairs are measured again as bf16, both sides cast (round to even).

use half::bf16;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
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
        "{:<40} {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8} {:>8} {:>9} {:>8} | {:>6} {:>7} | {:>7}",
        "",
        "",
        "zstd-10",
        "resident",
        "resident",
        "package",
        "of them",
        "of them",
        "of them",
        "package",
        "packed",
        "restored",
        "above"
    );
    println!(
        "{:<40} {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8} {:>8} {:>9} {:>8} | {:>6} {:>8} | {:>7}",
        "pair",
        "changed",
        "raw XOR",
        "speed",
        "memory",
        "smallest",
        "res-zstd",
        "planes",
        "predicted",
        "on disk",
        "GB/s",
        "GB/s",
        "zstd-10"
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

/// What one codec (or the smallest) makes of all tensors.
struct Packed {
    /// Stored bytes, tensor by tensor.
    stored: Vec<u64>,
    /// The package file with its header.
    file: u64,
    /// Seconds of one thread.
    packing: f64,
    restoring: f64,
}

impl Packed {
    fn bytes(&self) -> u64 {
        self.stored.iter().sum()
    }
}

fn packed(pairs: &[Pair], codec: Option<Codec>) -> Result<Packed> {
    let path = std::env::temp_dir().join(format!("xorz-pairs-{}.xorz", std::process::id()));
    let start = Instant::now();
    let mut writer = Writer::create(&path, PackOptions { codec, ..PackOptions::default() })?.jobs(1);
    for p in pairs {
        let side = |bytes| Tensor { name: &p.name, dtype: p.dtype.name(), dims: &p.dims, bytes };
        writer.add(&side(&p.fine_tuned), Some(&side(&p.base)))?;
    }
    let file = writer.finish()?.package_bytes;
    let packing = start.elapsed().as_secs_f64();
    let package = Package::open(&path)?;
    let mut restoring = 0.0;
    for p in pairs {
        let mut out = vec![0; p.fine_tuned.len()];
        let start = Instant::now();
        let base = Matrix::new(p.dtype, Shape::of_dims(&p.dims)?, &p.base)?;
        package.restore(&p.name, Some(&base), &mut out)?;
        restoring += start.elapsed().as_secs_f64();
        if out != p.fine_tuned {
            return Err(Error::internal(format!("`{}` came back wrong", p.name)));
        }
    }
    std::fs::remove_file(&path)?;
    // By name: entries of joint frames come after those of their own.
    let stored = pairs.iter().map(|p| Ok(package.entry(&p.name)?.stored_bytes)).collect::<Result<_>>()?;
    Ok(Packed { stored, file, packing, restoring })
}

fn row(label: &str, pairs: &[Pair]) -> Result<()> {
    let (mut words, mut changed, mut speed, mut memory, mut bytes) = (0, 0, 0, 0, 0);
    for p in pairs {
        let shape = Shape::of_dims(&p.dims)?;
        let (b, f) = (Matrix::new(p.dtype, shape, &p.base)?, Matrix::new(p.dtype, shape, &p.fine_tuned)?);
        let w = p.dtype.word_bytes();
        words += shape.words()?;
        bytes += p.base.len();
        changed += p.base.chunks(w).zip(p.fine_tuned.chunks(w)).filter(|(x, y)| x != y).count();
        speed += encode_pair(&b, &f, Prefer::Speed)?.len();
        memory += encode_pair(&b, &f, Prefer::Memory)?.len();
    }
    let bits = |bytes: u64| 8.0 * bytes as f64 / words as f64;
    let speed_of = |seconds: f64| bytes as f64 / 1e9 / seconds;
    let (zstd, smallest) = (packed(pairs, Some(Codec::Xor))?, packed(pairs, None)?);
    let predicted = packed(pairs, Some(Codec::Predicted))?;
    let both = pairs.iter().zip(&smallest.stored).zip(&zstd.stored);
    let above: Vec<_> = both.filter(|((_, ours), theirs)| ours > theirs).collect();
    println!(
        "{label:<40} {:>6.2} % {:>8.3} | {:>8.3} {:>8.3} | {:>8.3} {:>8.3} {:>8.3} {:>9.3} {:>8.3} | {:>6.2} {:>8.2} | {:>2} of {:>2}",
        100.0 * changed as f64 / words as f64,
        bits(zstd.bytes()),
        bits(speed as u64),
        bits(memory as u64),
        bits(smallest.bytes()),
        bits(packed(pairs, Some(Codec::ResidentZstd))?.bytes()),
        bits(packed(pairs, Some(Codec::Planes))?.bytes()),
        bits(predicted.bytes()),
        bits(smallest.file),
        speed_of(predicted.packing),
        speed_of(predicted.restoring),
        above.len(),
        pairs.len(),
    );
    above.iter().for_each(|((p, ours), theirs)| println!("    {}: {ours} bytes for {theirs}", p.name));
    Ok(())
}
