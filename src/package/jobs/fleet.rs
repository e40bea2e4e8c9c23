//! `pack` of many fine-tunes in one run: each against the nearest of some bases, those of one base together.

use super::pack::Pack;
use super::walk::{Walker, walk};
use crate::error::{Error, Result};
use crate::package::checkpoint::bases::BaseDigests;
use crate::package::checkpoint::files::Checkpoint;
use crate::package::checkpoint::nearest::distance;
use crate::package::format::record::to_json;
use crate::package::format::totals::Report;
use crate::package::io::ordered;
use crate::package::io::shared::ReadCache;
use crate::package::options::{PackOptions, Run};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Tensors of the fine-tunes that are packed together, at most, unless one of them has more.
const TENSORS: usize = 1 << 18;
/// Open files that are left to others.
const OTHER_FILES: u64 = 128;

/// What became of one of many fine-tunes.
#[derive(Clone, Debug)]
pub struct FleetPackage {
    /// The fine-tune.
    pub fine_tuned: PathBuf,
    /// Where its package is, or would be.
    pub package: PathBuf,
    /// Which of the bases it was packed against; the first one, if it could not be read.
    pub base: usize,
    /// How far it is from each base, where there are several: the share of its bits, in a sample, that lie below the highest
    /// one in which a word differs from the base's.
    pub distances: Vec<f64>,
    /// Its package's totals, or why there is none.
    pub report: Result<Report>,
}

#[derive(Serialize)]
struct FleetLine<'a> {
    fine_tuned: String,
    package: String,
    base: String,
    distances: &'a [f64],
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<&'a Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<i32>,
}

#[derive(Serialize)]
struct FleetLines<'a> {
    base_bytes: u64,
    base_bytes_read: u64,
    packages: Vec<FleetLine<'a>>,
}

/// What became of many fine-tunes.
#[derive(Clone, Debug)]
pub struct FleetReport {
    /// The bases that were given.
    pub bases: Vec<PathBuf>,
    /// Each fine-tune, in the order in which they were given.
    pub packages: Vec<FleetPackage>,
    /// Bytes of all bases' files.
    pub base_bytes: u64,
    /// Bytes of them that were read: samples, and each base's words once for those that were packed together.
    pub base_bytes_read: u64,
}

impl FleetReport {
    /// As one JSON object: `base_bytes`, `base_bytes_read` and `packages`, each with `fine_tuned`, `package`, `base`,
    /// `distances`, and `report`, or `error` with its `kind`, a number as in `csrc/xorz.h`.
    ///
    /// # Errors
    /// `Internal` only.
    pub fn to_json(&self) -> Result<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let lines = self.packages.iter().map(|p| FleetLine {
            fine_tuned: text(&p.fine_tuned),
            package: text(&p.package),
            base: self.bases.get(p.base).map(|b| text(b)).unwrap_or_default(),
            distances: &p.distances,
            report: p.report.as_ref().ok(),
            error: p.report.as_ref().err().map(Error::message),
            kind: p.report.as_ref().err().map(|e| e.kind() as i32),
        });
        let (base_bytes, base_bytes_read) = (self.base_bytes, self.base_bytes_read);
        to_json(&FleetLines { base_bytes, base_bytes_read, packages: lines.collect() })
    }
}

/// Pack many fine-tuned checkpoints, each against the nearest of `bases`, into a package each: `fleet` names a checkpoint and
/// its package. The packages are those that [`pack_files`](super::pack::pack_files) makes, bit for bit. Those of one base are
/// packed together, and its words are read once for as many of them as this process may have files open. What is wrong with
/// one of them is told in its place and ends no other.
///
/// # Errors
/// What concerns all of them: bases as [`Checkpoint::open_base`]; `InvalidArgument` for no base, or two packages of one path;
/// `Io` if the caller has had enough.
pub fn pack_fleet(
    bases: &[PathBuf],
    fleet: &[(PathBuf, PathBuf)],
    options: &PackOptions,
    run: &Run<'_>,
) -> Result<FleetReport> {
    if bases.is_empty() {
        return Err(Error::invalid("no base was given"));
    }
    let mut paths = HashSet::new();
    if let Some((ft, package)) = fleet.iter().find(|(_, package)| !paths.insert(package)) {
        let what = format!("is where two packages would go, one of them that of {}", ft.display());
        return Err(Error::invalid(what).within(package.display()));
    }
    refuse_inputs(fleet)?;
    let cache = Arc::new(ReadCache::new(ordered::threads(run.jobs)));
    let mut number = 0;
    let open = |path: &PathBuf| -> Result<Checkpoint> {
        let base = Checkpoint::open_base(path)?;
        let first = number;
        number += base.files().len() as u32;
        Ok(base.share(first, &cache))
    };
    let opened: Vec<Checkpoint> = bases.iter().map(open).collect::<Result<_>>()?;
    let mut packed = choose(&opened, fleet, options, run)?;
    for (b, base) in opened.iter().enumerate() {
        let digests = BaseDigests::cached(base);
        let mine = packed.iter_mut().filter(|p| p.base == b && p.report.is_ok()).collect();
        Fleet { base: (base, &digests), all: &opened, options, run }.pack(mine)?;
    }
    let base_bytes = opened.iter().flat_map(Checkpoint::files).map(|f| f.tensors.file_bytes()).sum();
    let base_bytes_read = cache.bytes_read();
    Ok(FleetReport { bases: bases.to_vec(), packages: packed, base_bytes, base_bytes_read })
}

/// No package may take the place of a fine-tune, or of a file in one, of which others are still to be made.
fn refuse_inputs(fleet: &[(PathBuf, PathBuf)]) -> Result<()> {
    let inputs: Vec<PathBuf> = fleet.iter().filter_map(|(ft, _)| ft.canonicalize().ok()).collect();
    for (_, package) in fleet {
        let Ok(target) = package.canonicalize() else { continue };
        if let Some(input) = inputs.iter().find(|input| target.starts_with(input)) {
            let what = format!("the output would overwrite the input {}", input.display());
            return Err(Error::invalid(what).within(package.display()));
        }
    }
    Ok(())
}

/// The nearest base of each; an error for those that cannot be read.
fn choose(
    bases: &[Checkpoint],
    fleet: &[(PathBuf, PathBuf)],
    options: &PackOptions,
    run: &Run<'_>,
) -> Result<Vec<FleetPackage>> {
    let found: Vec<Mutex<Result<Vec<f64>>>> = fleet.iter().map(|_| Mutex::new(Ok(Vec::new()))).collect();
    if bases.len() > 1 {
        ordered::side_by_side(ordered::threads(run.jobs), fleet.len(), |i, _| {
            run.go_on()?;
            let all = Checkpoint::open(&fleet[i].0).and_then(|ft| {
                bases.iter().map(|base| distance(base, &ft, options.strip_prefix.as_deref())).collect()
            });
            *found[i].lock().unwrap_or_else(PoisonError::into_inner) = all;
            Ok(())
        })?;
    }
    let one = |((fine_tuned, package), found): (&(PathBuf, PathBuf), Mutex<Result<Vec<f64>>>)| {
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (distances, report) = match found {
            Ok(distances) => (distances, Ok(Report::default())),
            Err(e) => (Vec::new(), Err(e)),
        };
        let nearest = distances.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
        let base = nearest.map_or(0, |(b, _)| b);
        let (fine_tuned, package) = (fine_tuned.clone(), package.clone());
        FleetPackage { fine_tuned, package, base, distances, report }
    };
    Ok(fleet.iter().zip(found).map(one).collect())
}

/// The fine-tunes of one base.
struct Fleet<'a> {
    base: (&'a Checkpoint, &'a BaseDigests),
    /// All bases, none of which may be overwritten.
    all: &'a [Checkpoint],
    options: &'a PackOptions,
    run: &'a Run<'a>,
}

impl Fleet<'_> {
    /// Pack them, as many at once as there may be.
    fn pack(&self, fleet: Vec<&mut FleetPackage>) -> Result<()> {
        let most_files = open_files();
        let (mut wave, mut files, mut tensors) = (Vec::new(), 0, 0);
        for item in fleet {
            let ft = match Checkpoint::open(&item.fine_tuned) {
                Ok(ft) => ft,
                Err(e) => {
                    item.report = Err(e);
                    continue;
                }
            };
            let (f, t) = (ft.files().len() + ft.carried().len(), ft.tensors().count());
            if !wave.is_empty() && (files + f > most_files || tensors + t > TENSORS) {
                self.wave(std::mem::take(&mut wave))?;
                (files, tensors) = (0, 0);
            }
            (files, tensors) = (files + f, tensors + t);
            wave.push((item, ft));
        }
        self.wave(wave)
    }

    /// Pack some of them together.
    fn wave(&self, wave: Vec<(&mut FleetPackage, Checkpoint)>) -> Result<()> {
        let (items, opened): (Vec<_>, Vec<_>) = wave.into_iter().unzip();
        let paths: Vec<PathBuf> = items.iter().map(|item| item.package.clone()).collect();
        let plans: Vec<Mutex<Option<Result<Pack<'_>>>>> = items.iter().map(|_| Mutex::new(None)).collect();
        ordered::side_by_side(ordered::threads(self.run.jobs), opened.len(), |i, _| {
            self.run.go_on()?;
            let plan = self.plan(&opened[i], &paths[i]);
            *plans[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
            Ok(())
        })?;
        let (mut walkers, mut walking) = (Vec::new(), Vec::new());
        for ((item, plan), package) in items.into_iter().zip(plans).zip(&paths) {
            match plan.into_inner().unwrap_or_else(PoisonError::into_inner) {
                Some(Ok(pack)) => {
                    walkers.push(Walker { pack, package });
                    walking.push(item);
                }
                Some(Err(e)) => item.report = Err(e),
                None => item.report = Err(Error::internal("a fine-tune was not planned")),
            }
        }
        let ends = walk(&walkers, self.options, self.run)?;
        walking.into_iter().zip(ends).for_each(|(item, end)| item.report = end);
        Ok(())
    }

    fn plan<'p>(&'p self, ft: &'p Checkpoint, package: &'p Path) -> Result<Pack<'p>> {
        self.all.iter().try_for_each(|base| super::pack::refuse_overwrite(package, base))?;
        Pack::plan(self.base, ft, Some(package), self.options, self.run)
    }
}

/// Files of fine-tunes that may be open at once: each takes two, with what is stored of it.
fn open_files() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 16);
    usize::try_from(limit.saturating_sub(OTHER_FILES) / 2).unwrap_or(usize::MAX).max(1)
}
