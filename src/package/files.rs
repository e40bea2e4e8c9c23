//! From checkpoint files to a package and back: single safetensors files. Tensors are taken in groups, encoded or restored
//! in parallel, and written in order, so that memory holds a group and never a checkpoint.

use super::container::{SafeTensors, TensorInfo};
use super::reader::parse_source_header;
use super::record::{Entry, SourceFile};
use super::temp::Output;
use super::writer::{self, Packed, Tensor, Writer};
use super::{Destination, PackOptions, Package, Report, Run};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use rayon::prelude::*;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// Bytes of fine-tuned tensors in memory at once, unless a single tensor is larger.
const GROUP_BYTES: u64 = 64 << 20;

/// Pack the safetensors file `fine_tuned` against the safetensors file `base` into the package `out`.
///
/// # Errors
/// `Io`, `Corrupt` or `Truncated` inputs, `InvalidArgument` for bad options or an `out` that is one of the inputs. Messages
/// name file and tensor; no output is left then.
pub fn pack_files(
    base: &Path,
    fine_tuned: &Path,
    out: Destination<'_>,
    options: &PackOptions,
    _run: &Run<'_>,
) -> Result<Report> {
    let out = match out {
        Destination::Path(path) => path,
        Destination::Stream(stream) => {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("package");
            let report = pack_files(base, fine_tuned, Destination::Path(&path), options, &Run::default())?;
            io::copy(&mut File::open(&path)?, stream)?;
            return Ok(report);
        }
    };
    refuse_overwrite(out, &[base, fine_tuned])?;
    let (base_file, ft_file) = (SafeTensors::open(base)?, SafeTensors::open(fine_tuned)?);
    let pairs = pair(&base_file, &ft_file, options.strip_prefix.as_deref())?;
    let mut writer = Writer::create(out, options.clone())?;
    let used: HashSet<&str> = pairs.iter().filter_map(|(_, b)| b.map(|b| b.name.as_str())).collect();
    let lacking = base_file.header().tensors.iter().filter(|t| !used.contains(t.name.as_str()));
    lacking.for_each(|t| writer.removed(&t.name));
    let pack = || -> Result<Writer> {
        for group in groups(&pairs, |(ft, _)| ft.bytes()) {
            let packed: Vec<Packed> = group
                .par_iter()
                .map(|(ft, b)| encode(&ft_file, ft, &base_file, *b, options))
                .collect::<Result<_>>()?;
            packed.into_iter().try_for_each(|p| writer.push(p))?;
        }
        Ok(writer)
    };
    let (sha256, writer) = rayon::join(|| sha256_file(fine_tuned), pack);
    let mut writer = writer?;
    let file = SourceFile {
        name: fine_tuned.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        sha256: sha256?,
        bytes: ft_file.file_bytes(),
        header_bytes: ft_file.header_text().len() as u64,
        header_check: String::new(),
    };
    writer.set_file(file, ft_file.header_text())?;
    writer.finish()
}

fn encode(
    ft_file: &SafeTensors,
    ft: &TensorInfo,
    base_file: &SafeTensors,
    base: Option<&TensorInfo>,
    options: &PackOptions,
) -> Result<Packed> {
    fn tensor<'a>(info: &'a TensorInfo, bytes: &'a [u8]) -> Tensor<'a> {
        Tensor { name: &info.name, dtype: &info.dtype, dims: &info.dims, bytes }
    }
    let ft_bytes = ft_file.read(ft)?;
    // A base of another dtype or shape is of no use; it is not read.
    let base = base.filter(|b| (&b.dtype, &b.dims) == (&ft.dtype, &ft.dims));
    let base_bytes = base.map(|b| base_file.read(b)).transpose()?;
    let base = base.zip(base_bytes.as_ref()).map(|(b, bytes)| tensor(b, bytes));
    writer::encode(&tensor(ft, &ft_bytes), base.as_ref(), options)
}

type Pair<'a> = (&'a TensorInfo, Option<&'a TensorInfo>);

/// Each fine-tuned tensor with the base tensor of its name, a prefix dropped on either side if that is asked for.
fn pair<'a>(base: &'a SafeTensors, ft: &'a SafeTensors, prefix: Option<&str>) -> Result<Vec<Pair<'a>>> {
    fn strip<'n>(name: &'n str, prefix: Option<&str>) -> &'n str {
        prefix.and_then(|p| name.strip_prefix(p)).unwrap_or(name)
    }
    let exact: HashMap<&str, &TensorInfo> =
        base.header().tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut stripped = HashMap::new();
    for t in base.header().tensors.iter().filter(|_| prefix.is_some()) {
        if let Some(other) = stripped.insert(strip(&t.name, prefix), t) {
            return Err(Error::invalid(format!(
                "without the prefix, the base tensors `{}` and `{}` have one name",
                other.name, t.name
            )));
        }
    }
    let find = |name: &str| exact.get(name).or_else(|| stripped.get(strip(name, prefix))).copied();
    Ok(ft.header().tensors.iter().map(|t| (t, find(&t.name))).collect())
}

/// Runs of items that together take at most [`GROUP_BYTES`], or are one.
fn groups<T>(items: &[T], bytes: impl Fn(&T) -> u64) -> Vec<&[T]> {
    let (mut out, mut start, mut sum) = (Vec::new(), 0, 0u64);
    for (i, item) in items.iter().enumerate() {
        let size = bytes(item);
        if i > start && sum.saturating_add(size) > GROUP_BYTES {
            out.push(&items[start..i]);
            (start, sum) = (i, 0);
        }
        sum = sum.saturating_add(size);
    }
    out.push(&items[start..]);
    out
}

fn refuse_overwrite(out: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(target) = out.canonicalize() else { return Ok(()) };
    match inputs.iter().find(|p| p.canonicalize().is_ok_and(|p| p == target)) {
        Some(p) => Err(Error::invalid(format!("the output would overwrite the input {}", p.display()))),
        None => Ok(()),
    }
}

/// sha256 of a file, 64 hexadecimal digits.
fn sha256_file(path: &Path) -> Result<String> {
    let hash = || -> io::Result<String> {
        let (mut file, mut sha) = (File::open(path)?, Sha256::new());
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hex(&sha.finalize())),
                n => sha.update(&buffer[..n]),
            }
        }
    };
    hash().map_err(|e| Error::from(e).within(path.display()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Restore the fine-tuned file from `base` and `package` into `out`: byte for byte the file that was packed, or, if the
/// package was made from tensors in memory, a safetensors file of them in order of their names.
///
/// # Errors
/// `Mismatch` for another base, naming the tensor and both digests; `Corrupt` or `Truncated` for a damaged package; `Io`;
/// `InvalidArgument` for an `out` that is one of the inputs. No output is left then.
pub fn unpack_files(base: &Path, package: &Path, out: Destination<'_>, run: &Run<'_>) -> Result<Report> {
    let _ = run;
    if let Destination::Path(out) = &out {
        refuse_overwrite(out, &[base, package])?;
    }
    let (base, opened) = (SafeTensors::open(base)?, Package::open(package)?);
    let restore =
        |out: &mut dyn Write| restore_all(&base, &opened, None, out).map_err(|e| e.within(package.display()));
    match out {
        Destination::Path(out) => {
            let mut output = Output::create(out)?;
            restore(&mut output)?;
            output.commit()?;
        }
        Destination::Stream(stream) => restore(stream)?,
    }
    Ok(Report::of(&opened))
}

/// Restore everything without writing it: each base digest and stored digest, each delta, and the sha256 of the file that
/// was packed are compared; with `fine_tuned`, every tensor (and the file's sha256) with that file, too.
///
/// # Errors
/// As [`unpack_files`]; `Mismatch` naming the first tensor that differs from `fine_tuned`.
pub fn verify_files(
    base: &Path,
    package: &Path,
    fine_tuned: Option<&Path>,
    _run: &Run<'_>,
) -> Result<Report> {
    let (base, opened) = (SafeTensors::open(base)?, Package::open(package)?);
    let ft = fine_tuned.map(SafeTensors::open).transpose()?;
    restore_all(&base, &opened, ft.as_ref(), &mut io::sink()).map_err(|e| e.within(package.display()))?;
    if let (Some(path), Some(file)) = (fine_tuned, opened.files().first()) {
        let found = sha256_file(path)?;
        if found != file.sha256 {
            return Err(Error::mismatch(format!(
                "{}: has sha256 {found}, but the file that was packed had {}; the tensors are equal, \
                 header or order are not",
                path.display(),
                file.sha256
            )));
        }
    }
    Ok(Report::of(&opened))
}

/// Passes bytes on and hashes them.
struct Hashing<'a> {
    out: &'a mut dyn Write,
    sha: Sha256,
}

impl Write for Hashing<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.sha.update(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn restore_all(
    base: &SafeTensors,
    package: &Package,
    ft: Option<&SafeTensors>,
    out: &mut dyn Write,
) -> Result<()> {
    let (header, order) = plan(package)?;
    if let Some(ft) = ft {
        compare_names(package, ft)?;
    }
    let names: HashMap<&str, &TensorInfo> =
        base.header().tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut out = Hashing { out, sha: Sha256::new() };
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for group in groups(&order, |e| if e.codec.alone() { 0 } else { e.bytes }) {
        let restored: Vec<Option<Vec<u8>>> =
            group.par_iter().map(|e| restore(e, base, &names, package, ft)).collect::<Result<_>>()?;
        for (entry, bytes) in group.iter().zip(restored) {
            match bytes {
                Some(bytes) => out.write_all(&bytes)?,
                None => package.copy_alone(entry, &mut out).map_err(|e| named(e, entry))?,
            }
        }
    }
    let found = hex(&out.sha.finalize());
    match package.files().first() {
        Some(file) if file.sha256 != found => Err(Error::corrupt(format!(
            "what was restored has sha256 {found}, but the file that was packed had {}",
            file.sha256
        ))),
        _ => Ok(()),
    }
}

fn named(e: Error, entry: &Entry) -> Error {
    e.within(format_args!("tensor `{}`", entry.name))
}

/// The header of the restored file, and the entries in the order of their bytes in it.
fn plan(package: &Package) -> Result<(Vec<u8>, Vec<&Entry>)> {
    let Some(file) = package.files().first() else { return own_plan(package) };
    let text = package.source_header(0)?;
    let header = parse_source_header(&text, file)?;
    if header.tensors.len() != package.entries().len() {
        return Err(Error::corrupt(format!(
            "{} tensors, but the file that was packed had {}",
            package.entries().len(),
            header.tensors.len()
        )));
    }
    let order = header.tensors.iter().map(|t| {
        let e = package.entry(&t.name).map_err(|e| Error::corrupt(e.message()))?;
        if (&e.dtype, &e.dims, e.bytes) != (&t.dtype, &t.dims, t.bytes()) {
            return Err(named(Error::corrupt("its record and the packed file's header disagree"), e));
        }
        Ok(e)
    });
    let order = order.collect::<Result<_>>()?;
    Ok((text, order))
}

fn own_plan(package: &Package) -> Result<(Vec<u8>, Vec<&Entry>)> {
    let mut order: Vec<&Entry> = package.entries().iter().collect();
    order.sort_by_key(|e| &e.name);
    let mut at = 0u64;
    let mut infos = Vec::new();
    for e in &order {
        let end = at.checked_add(e.bytes).ok_or_else(|| Error::corrupt("the tensors' sizes overflow"))?;
        infos.push(TensorInfo {
            name: e.name.clone(),
            dtype: e.dtype.clone(),
            dims: e.dims.clone(),
            range: at..end,
        });
        at = end;
    }
    Ok((writer::header_text(&BTreeMap::new(), &infos)?.into_bytes(), order))
}

/// One restored tensor; `None` for one that is stored alone and need not be compared, since it can be streamed.
fn restore(
    entry: &Entry,
    base: &SafeTensors,
    names: &HashMap<&str, &TensorInfo>,
    package: &Package,
    ft: Option<&SafeTensors>,
) -> Result<Option<Vec<u8>>> {
    if entry.codec.alone() && ft.is_none() {
        return Ok(None);
    }
    let base_bytes = base_bytes(entry, base, names)?;
    let matrix = match (entry.word_dtype(), &base_bytes) {
        (Some(dtype), Some(bytes)) => Some(Matrix::new(dtype, entry.shape()?, bytes)?),
        _ => None,
    };
    // As long as the base tensor just read, or as the tensor of `ft` that it is to equal.
    let len = usize::try_from(entry.bytes).map_err(|_| Error::unsupported("too large for this machine"))?;
    let mut out = vec![0u8; len];
    package.restore(&entry.name, matrix.as_ref(), &mut out)?;
    if let Some((ft, info)) = ft.and_then(|f| Some((f, f.find(&entry.name)?)))
        && ft.read(info)? != out
    {
        return Err(named(Error::mismatch("base + delta is not the fine-tuned tensor given"), entry));
    }
    Ok(Some(out))
}

/// The bytes of a delta's base tensor, which has the delta's dtype and shape.
fn base_bytes(
    entry: &Entry,
    base: &SafeTensors,
    names: &HashMap<&str, &TensorInfo>,
) -> Result<Option<Vec<u8>>> {
    let Some(wanted) = &entry.base else { return Ok(None) };
    let info = names
        .get(wanted.name.as_str())
        .ok_or_else(|| named(Error::mismatch(format!("the base has no tensor `{}`", wanted.name)), entry))?;
    if (&info.dtype, &info.dims) != (&entry.dtype, &entry.dims) {
        let both = format!(
            "is a delta of {} {:?}, but the base has {} {:?}",
            entry.dtype, entry.dims, info.dtype, info.dims
        );
        return Err(named(Error::mismatch(both), entry));
    }
    base.read(info).map(Some)
}

/// Names, dtypes and shapes of package and fine-tuned file are the same.
fn compare_names(package: &Package, ft: &SafeTensors) -> Result<()> {
    for t in &ft.header().tensors {
        let e = package.entry(&t.name).map_err(|_| {
            Error::mismatch(format!("tensor `{}` of the fine-tune is not in the package", t.name))
        })?;
        if (&e.dtype, &e.dims, e.bytes) != (&t.dtype, &t.dims, t.bytes()) {
            let both = format!(
                "is {} {:?} in the package, but {} {:?} in the fine-tune",
                e.dtype, e.dims, t.dtype, t.dims
            );
            return Err(named(Error::mismatch(both), e));
        }
    }
    let names: HashSet<&str> = ft.header().tensors.iter().map(|t| t.name.as_str()).collect();
    match package.entries().iter().find(|e| !names.contains(e.name.as_str())) {
        Some(e) => Err(named(Error::mismatch("is not in the fine-tune given"), e)),
        None => Ok(()),
    }
}
