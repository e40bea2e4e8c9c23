//! `xorz inspect`: what a package holds, without its base.

use crate::job::{Outcome, Said};
use crate::pipes::Inputs;
use crate::print;
use std::path::PathBuf;
use xorz::package::{Entry, Package, Report, inspect_json};

/// Show what a package holds.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The package; - for standard input.
    package: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let inputs = Inputs::of(&[&args.package])?;
    let path = inputs.path(&args.package);
    let tell = || {
        if args.json {
            return Ok(inspect_json(&path)? + "\n");
        }
        Ok(describe(&inputs.name(&args.package), &Package::open(&path)?))
    };
    tell().map(Said::Out).map_err(|e| inputs.told(e))
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
    out += &print::table(&table);
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
