//! `xorz pack` of several checkpoints: a package for each, in one folder.

use crate::job::{Job, Outcome, Said};
use crate::pipes::Inputs;
use crate::{complain, print, say, signals};
use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};
use xorz::error::{Error, Result};
use xorz::package::{FleetPackage, FleetReport, PackOptions, Report, pack_fleet};

/// Parts of a path that may become part of a name.
const PARTS: usize = 8;

/// From this distance on a base is no base of a fine-tune: unrelated weights differ by about 0.95.
const FAR: f64 = 0.9;

/// Whether packages are to go into the folder `output`, however few they are: a pattern of the shell's may mean one.
pub(crate) fn wants_folder(output: &Path) -> bool {
    // Nobody means the root of all folders.
    output.as_os_str().as_encoded_bytes().ends_with(b"/") && output.parent().is_some()
}

pub(crate) fn run(
    bases: &[PathBuf],
    fine_tuned: &[PathBuf],
    folder: &Path,
    options: &PackOptions,
    job: &Job,
) -> Outcome {
    if folder.as_os_str() == "-" {
        return Err(Error::invalid("standard output takes one package; name a folder with -o").into());
    }
    let named: Vec<&Path> = bases.iter().chain(fine_tuned).map(|p| &**p).collect();
    let inputs = Inputs::of(&named)?;
    let names = names(fine_tuned)?;
    std::fs::create_dir_all(folder).map_err(|e| folder_error(folder, e))?;
    let fleet: Vec<(PathBuf, PathBuf)> =
        fine_tuned.iter().zip(&names).map(|(ft, name)| (inputs.path(ft), folder.join(name))).collect();
    let real: Vec<PathBuf> = bases.iter().map(|b| inputs.path(b)).collect();
    let mut found = job
        .run(None, signals::watch(), |run| pack_fleet(&real, &fleet, options, run))
        .map_err(|e| inputs.told(e))?;
    found.bases = bases.to_vec();
    found.packages.iter_mut().zip(fine_tuned).for_each(|(p, given)| p.fine_tuned.clone_from(given));
    say(if job.json {
        Said::Out(print::json(&found.to_json()?) + "\n")
    } else {
        job.unless_quiet(describe(&found))
    })?;
    failures(&found, folder, &inputs)
}

/// Each failure in a line of its own, and the exit code of the first.
fn failures(found: &FleetReport, folder: &Path, inputs: &Inputs) -> Outcome {
    let mut first = None;
    for p in &found.packages {
        let Err(e) = &p.report else { continue };
        let failure = inputs.told(e.clone());
        complain(&format!("{} is not packed: {}", p.fine_tuned.display(), failure.text));
        first = first.or(Some(failure));
    }
    let failed = found.packages.iter().filter(|p| p.report.is_err()).count();
    match first {
        None => Ok(Said::Nothing),
        Some(failure) => Err(failure.saying(format!(
            "{failed} of {} checkpoints were not packed; the packages of the others are in {}",
            found.packages.len(),
            folder.display()
        ))),
    }
}

fn folder_error(folder: &Path, e: std::io::Error) -> Error {
    if folder.exists() && !folder.is_dir() {
        let what = "is a file, but several packages need a folder; name one with -o";
        return Error::invalid(what).within(folder.display());
    }
    Error::from(e).within(folder.display())
}

/// What the packages are called: each checkpoint's own name, with as much of its path in front as tells it from the others.
fn names(fine_tuned: &[PathBuf]) -> Result<Vec<String>> {
    let mut taken: BTreeMap<String, &Path> = BTreeMap::new();
    let parts: Vec<Vec<String>> = fine_tuned.iter().map(|path| parts(path)).collect::<Result<_>>()?;
    let tail = |parts: &[String], n: usize| parts[parts.len().saturating_sub(n)..].join("-");
    let mut lengths = vec![1; parts.len()];
    for _ in 1..PARTS {
        let mut seen: HashMap<String, usize> = HashMap::new();
        parts.iter().zip(&lengths).for_each(|(p, n)| *seen.entry(tail(p, *n)).or_default() += 1);
        let longer = parts.iter().zip(&lengths).map(|(p, n)| n + usize::from(seen[&tail(p, *n)] > 1));
        lengths = longer.collect();
    }
    let mut out = Vec::new();
    for ((path, parts), n) in fine_tuned.iter().zip(&parts).zip(lengths) {
        let name = format!("{}.xorz", tail(parts, n));
        if let Some(other) = taken.insert(name.clone(), path) {
            return Err(Error::invalid(format!(
                "{} and {} would both become {name}; pack them one by one, or into two folders",
                other.display(),
                path.display()
            )));
        }
        out.push(name);
    }
    Ok(out)
}

/// The parts of a checkpoint's path that a name may be made of.
fn parts(path: &Path) -> Result<Vec<String>> {
    if path.as_os_str() == "-" {
        return Ok(vec!["stdin".into()]);
    }
    // `.` and `..` are called something, too.
    let plain = |p: &Path| p.components().all(|c| !matches!(c, Component::CurDir | Component::ParentDir));
    let whole = if plain(path) && path.file_name().is_some() {
        path.to_owned()
    } else {
        path.canonicalize().unwrap_or(path.into())
    };
    let mut parts: Vec<String> = whole
        .components()
        .filter_map(|c| match c {
            Component::Normal(part) => Some(part.to_string_lossy().into_owned()),
            _ => None,
        })
        .collect();
    match parts.last_mut() {
        Some(last) => {
            if let Some(stem) = last.strip_suffix(".safetensors").filter(|stem| !stem.is_empty()) {
                *last = stem.to_owned();
            }
            Ok(parts)
        }
        None => Err(Error::invalid("has no name that a package could have").within(path.display())),
    }
}

fn describe(found: &FleetReport) -> String {
    let mut rows = vec![["packed", "into", "size", "of it", "changed"].map(String::from)];
    let mut total = (0, 0);
    for (p, r) in found.packages.iter().filter_map(|p| Some((p, p.report.as_ref().ok()?))) {
        total = (total.0 + r.package_bytes, total.1 + r.tensor_bytes);
        rows.push([
            print::name(&p.fine_tuned.display().to_string()),
            print::name(&p.package.display().to_string()),
            print::bytes(r.package_bytes),
            print::percent(r.package_bytes, r.tensor_bytes),
            print::percent(r.changed, r.words),
        ]);
    }
    let mut out = if rows.len() > 1 { print::table(&rows, 3) } else { String::new() };
    found.packages.iter().for_each(|p| out += &aside(found, p));
    out += &print::row(
        "total",
        &format!(
            "{} of {} checkpoints: {} for {} of tensors, {}; {} read of {} of bases",
            rows.len() - 1,
            found.packages.len(),
            print::bytes(total.0),
            print::bytes(total.1),
            print::percent(total.0, total.1),
            print::bytes(found.base_bytes_read),
            print::bytes(found.base_bytes),
        ),
    );
    out
}

/// Which base it was packed against, where there are several, and advice.
fn aside(found: &FleetReport, p: &FleetPackage) -> String {
    let mut out = String::new();
    let name = |path: &Path| print::name(&path.display().to_string());
    if p.report.is_ok() && found.bases.len() > 1 {
        let away =
            |b: usize| format!("{} {:.3}", name(&found.bases[b]), p.distances.get(b).copied().unwrap_or(1.0));
        let others: Vec<_> = (0..found.bases.len()).filter(|b| *b != p.base).map(away).collect();
        let near = p.distances.get(p.base).is_some_and(|far| *far < FAR);
        let what = if near { "nearest is" } else { "none is near:" };
        let text = format!("{}: {what} {}, before {}", name(&p.fine_tuned), away(p.base), others.join(", "));
        out += &print::row("base", &text);
    }
    if let Ok(Report { advice: Some(advice), .. }) = &p.report {
        out += &print::row("note", &format!("{}: {}", name(&p.fine_tuned), print::name(advice)));
    }
    out
}
