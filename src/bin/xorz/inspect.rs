//! `xorz inspect`: what a package holds, without its base.

use crate::print;
use std::path::PathBuf;
use xorz::error::Result;
use xorz::package::{Entry, Package, Report, inspect_json};

/// Show what a package holds.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The package.
    package: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<String> {
    if args.json {
        return Ok(inspect_json(&args.package)? + "\n");
    }
    let package = Package::open(&args.package)?;
    let report = Report::of(&package);
    let mut out = print::row("package", &args.package.display().to_string());
    for file in package.files() {
        out +=
            &print::row("made from", &format!("{}, {}", print::name(&file.name), print::bytes(file.bytes)));
    }
    out += &print::report(&report);
    let mut entries: Vec<&Entry> = package.entries().iter().collect();
    entries.sort_by_key(|e| &e.name);
    let mut table = vec![HEAD.map(String::from)];
    table.extend(entries.into_iter().map(line));
    out += "\n";
    out += &print::table(&table);
    for name in package.removed() {
        out += &format!("removed   {}\n", print::name(name));
    }
    Ok(out)
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
