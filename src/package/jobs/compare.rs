//! Whether a package was made of the fine-tune that is given beside it: its tensors by name and kind, its files by sha256.

use super::pack::sha256_file;
use crate::error::{Error, Result};
use crate::package::checkpoint::files::Checkpoint;
use crate::package::format::container::TensorInfo;
use crate::package::format::reader::Package;
use crate::package::format::record::Entry;
use crate::package::io::ordered;
use crate::package::options::Run;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// The tensor of the fine-tune that `entry` of source file `i` should be: that of the same path, where several have its name.
pub(super) fn in_fine_tune<'a>(
    ft: &'a Checkpoint,
    package: &Package,
    i: usize,
    entry: &Entry,
) -> Option<(usize, &'a TensorInfo)> {
    let path = package.files().get(i).map(|f| f.path.as_str());
    ft.find_near(&entry.name, path, |t| (&t.dtype, &t.dims) == (&entry.dtype, &entry.dims))
}

/// Names, dtypes and shapes of package and fine-tune are the same.
pub(super) fn compare_names(package: &Package, ft: &Checkpoint) -> Result<()> {
    for (f, t) in ft.tensors() {
        let source = package.files().iter().position(|s| s.path == ft.files()[f].path);
        let entry = match source.filter(|_| ft.has_several(&t.name)) {
            Some(i) => package.entry_of(i, &t.name),
            None => package.entry(&t.name),
        };
        let e = entry.map_err(|_| {
            Error::mismatch(format!("tensor `{}` of the fine-tune is not in the package", t.name))
        })?;
        if (&e.dtype, &e.dims, e.bytes) != (&t.dtype, &t.dims, t.bytes()) {
            let both = format!(
                "is {} {:?} in the package, but {} {:?} in the fine-tune",
                e.dtype, e.dims, t.dtype, t.dims
            );
            return Err(Error::mismatch(both).of_tensor(&e.name));
        }
    }
    match package.entries().iter().find(|e| ft.find(&e.name).is_none()) {
        Some(e) => Err(Error::mismatch("is not in the fine-tune given").of_tensor(&e.name)),
        None => Ok(()),
    }
}

/// The files of the fine-tune are those that were packed, where both are folders or both are files.
pub(super) fn compare_files(package: &Package, ft: &Checkpoint, run: &Run<'_>) -> Result<()> {
    if package.files().is_empty() || package.is_folder() != ft.is_folder() {
        return Ok(());
    }
    let mut places: HashMap<&str, &Path> =
        ft.files().iter().map(|f| (f.path.as_str(), f.place.as_path())).collect();
    places.extend(ft.carried().iter().map(|f| (f.path.as_str(), f.place.as_path())));
    if !package.is_folder() {
        // One file has any name.
        places = package
            .files()
            .iter()
            .zip(ft.files())
            .map(|(p, f)| (p.path.as_str(), f.place.as_path()))
            .collect();
    }
    let packed: HashSet<&str> = package.files().iter().map(|f| f.path.as_str()).collect();
    if let Some(more) = places.keys().filter(|p| !packed.contains(**p)).min() {
        return Err(Error::mismatch(format!(
            "the fine-tune has the file `{more}`, which is not in the package"
        )));
    }
    ordered::side_by_side(ordered::threads(run.jobs), package.files().len(), |i, _| {
        let file = &package.files()[i];
        let lacking = || Error::mismatch(format!("the fine-tune lacks the file `{}`", file.path));
        let place = places.get(file.path.as_str()).ok_or_else(lacking)?;
        let found = sha256_file(place)?;
        if found == file.sha256 {
            return Ok(());
        }
        Err(Error::mismatch(format!(
            "{}: has sha256 {found}, but the file that was packed had {}",
            place.display(),
            file.sha256
        )))
    })
}
