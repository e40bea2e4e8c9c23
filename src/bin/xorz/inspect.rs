//! `xorz inspect`: what packages hold; without their base, but for one part of a page.

use crate::job::{Job, Outcome, Said};
use crate::pipes::{Inputs, Output};
use crate::print;
use std::path::{Path, PathBuf};
use xorz::error::{Error, Result};
use xorz::package::{Entry, Package, Report, describe_json};
use xorz::report::{PagePackage, report_html};

/// Show what packages hold, as text, JSON or a page for a browser.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The package, or several of one base; - for standard input.
    #[arg(required = true, value_name = "PACKAGE")]
    packages: Vec<PathBuf>,
    /// Write a page about them: layers, encodings, tensors, and the packages side by side. It needs nothing but itself. - for
    /// standard output.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Their base, so that the page also tells which words changed by the size of the base's weights. Restores every package
    /// once, without writing it.
    #[arg(long, requires = "html")]
    base: Option<PathBuf>,
    #[command(flatten)]
    job: Job,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let named: Vec<&Path> = args.packages.iter().chain(&args.base).map(|p| &**p).collect();
    let inputs = Inputs::of(&named)?;
    if let Some(to) = &args.html {
        page(args, &inputs, to)?;
    }
    match (&args.html, args.job.json) {
        (_, true) => {
            json(args, &inputs).map(|text| Said::Out(print::json(&text))).map_err(|e| inputs.told(e))
        }
        (Some(to), false) if to.as_os_str() != "-" => {
            Ok(args.job.unless_quiet(print::row("page", &print::path(to))))
        }
        (Some(_), false) => Ok(Said::Nothing),
        (None, false) => text(args, &inputs).map(Said::Out).map_err(|e| inputs.told(e)),
    }
}

fn page(args: &Args, inputs: &Inputs, to: &Path) -> std::result::Result<(), crate::job::Failure> {
    let packages = args.packages.iter().map(|p| PagePackage { name: inputs.name(p), path: inputs.path(p) });
    let packages: Vec<PagePackage> = packages.collect();
    let base = args.base.as_ref().map(|b| inputs.path(b));
    let mut output = Output::of(to, args.job.json, "--html -")?;
    let done =
        args.job.run(None, None, |run| report_html(&packages, base.as_deref(), output.destination(), run));
    done.map_err(|e| inputs.told(e).or_another_base())
}

/// One object; of several packages one that holds theirs, each with its path.
fn json(args: &Args, inputs: &Inputs) -> Result<String> {
    let one = |path: &PathBuf| describe_json(&Package::open(&inputs.path(path))?);
    if let [path] = &args.packages[..] {
        return Ok(one(path)? + "\n");
    }
    let internal = |e| Error::internal(format!("json: {e}"));
    let mut all = Vec::new();
    for path in &args.packages {
        let mut value: serde_json::Value = serde_json::from_str(&one(path)?).map_err(internal)?;
        value["path"] = inputs.name(path).into();
        all.push(value);
    }
    Ok(serde_json::json!({ "packages": all }).to_string() + "\n")
}

fn text(args: &Args, inputs: &Inputs) -> Result<String> {
    let one = |path: &PathBuf| Ok(describe(&inputs.name(path), &Package::open(&inputs.path(path))?));
    Ok(args.packages.iter().map(one).collect::<Result<Vec<_>>>()?.join("\n"))
}

fn describe(path: &str, package: &Package) -> String {
    let report = Report::of(package);
    let mut out = print::row("package", path);
    for file in &report.files {
        let kind = if file.tensors { "" } else { ", carried along" };
        let (name, sha256) = (print::name(&file.path), print::name(&file.sha256));
        out +=
            &print::row("made from", &format!("{name}, {}, sha256 {sha256}{kind}", print::bytes(file.bytes)));
    }
    out += &print::report(&report, false);
    let mut entries: Vec<&Entry> = package.entries().iter().collect();
    entries.sort_by_key(|e| &e.name);
    let mut table = vec![HEAD.map(String::from)];
    table.extend(entries.into_iter().map(line));
    out += "\n";
    out += &print::table(&table, 3);
    for name in package.removed() {
        out += &format!("removed   {}\n", print::name(name));
    }
    out
}

const HEAD: [&str; 8] = ["tensor", "dtype", "shape", "codec", "encoding", "changed", "stored", "bits/word"];

fn line(e: &Entry) -> [String; 8] {
    let words = e.dims.iter().try_fold(1u64, |a, &d| a.checked_mul(d as u64)).unwrap_or(0);
    [
        print::name(&e.name),
        print::name(&e.dtype),
        format!("{:?}", e.dims),
        e.codec.name().into(),
        e.encoding.map_or("-", |x| x.name()).into(),
        e.changed.map_or("-".into(), |c| print::percent(c, words)),
        print::bytes(e.stored_bytes),
        print::bits(e.stored_bytes, words),
    ]
}
