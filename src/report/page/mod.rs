//! `inspect --html`: what packages hold, as one page for people. It asks nothing of the network, runs no script, and is
//! bounded whatever a package says; names are a stranger's, and made harmless.
//!
//! | file | what |
//! |---|---|
//! | `sections`, `head.html`, `style.css` | the parts of the page, and how it looks |
//! | `layers` | heat maps: layer by kind of module |
//! | `exponents` | changed share by the base's exponent, where the base is given |
//! | `html` | text made harmless, numbers, tables |

mod exponents;
mod html;
mod layers;
mod sections;

use crate::error::{Error, Result};
use crate::package::io::temp::{Output, check_target};
use crate::package::jobs::pack::refuse_overwrite;
use crate::package::{Checkpoint, Destination, Entry, Package, Run};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Packages on one page: each is a column of its tables.
const MOST_PACKAGES: usize = 16;

/// A package for the page.
#[derive(Clone, Debug)]
pub struct PagePackage {
    /// What the page calls it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// Write a page about `packages`, which are compared if they are several. With `base` every package is restored on it, which
/// compares digests, and the page tells which words changed by the exponent of the base's.
///
/// # Errors
/// As [`Package::open`] and, with a base, [`verify_files`](crate::package::verify_files); `InvalidArgument` without a package, with more than 16, or for an
/// output that is an input; `Io`. Nothing appears at a path then.
pub fn report_html(
    packages: &[PagePackage],
    base: Option<&Path>,
    out: Destination<'_>,
    run: &Run<'_>,
) -> Result<()> {
    if packages.is_empty() || packages.len() > MOST_PACKAGES {
        return Err(Error::invalid(format!(
            "a page takes 1 to {MOST_PACKAGES} packages, but {} are named",
            packages.len()
        )));
    }
    let base = base.map(Checkpoint::open_base).transpose()?;
    if let Destination::Path(path) = &out {
        check_target(path)?;
        base.iter().try_for_each(|b| refuse_overwrite(path, b))?;
        packages.iter().try_for_each(|p| refuse_input(path, &p.path))?;
    }
    let opened = packages.iter().map(|p| Package::open(&p.path)).collect::<Result<Vec<_>>>()?;
    let mut shares = Vec::new();
    for (base, (package, p)) in base.iter().flat_map(|b| opened.iter().zip(packages).map(move |x| (b, x))) {
        shares.push(exponents::shares(base, package, run).map_err(|e| e.within(p.path.display()))?);
    }
    let names: Vec<&str> = packages.iter().map(|p| p.name.as_str()).collect();
    let page = sections::page(&names, &opened.iter().collect::<Vec<_>>(), &shares);
    match out {
        Destination::Stream(stream) => Ok(stream.write_all(page.as_bytes()).and_then(|()| stream.flush())?),
        Destination::Path(path) => {
            let output = Output::create(path)?;
            let within =
                |e: std::io::Error| Error::from(e).within(format_args!("cannot write {}", path.display()));
            output.file().write_all(page.as_bytes()).map_err(within)?;
            output.commit()
        }
    }
}

fn refuse_input(out: &Path, input: &Path) -> Result<()> {
    if out.canonicalize().is_ok_and(|p| input.canonicalize().is_ok_and(|q| p == q)) {
        return Err(Error::invalid(format!("the output would overwrite the input {}", input.display())));
    }
    Ok(())
}

/// Words of a tensor; 0 where its dimensions overflow.
fn words(e: &Entry) -> u64 {
    e.dims.iter().try_fold(1u64, |a, &d| a.checked_mul(d as u64)).unwrap_or(0)
}
