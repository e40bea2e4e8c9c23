//! `xorz unpack`: base and package, into the fine-tuned checkpoint.

use crate::print;
use std::path::PathBuf;
use xorz::error::Result;
use xorz::package::{Destination, Run, unpack_files};

/// Give back the fine-tuned checkpoint, byte for byte.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base that the package was made against: a .safetensors file.
    base: PathBuf,
    /// The package.
    package: PathBuf,
    /// The .safetensors file to write.
    #[arg(short, long)]
    output: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<String> {
    let report = unpack_files(&args.base, &args.package, Destination::Path(&args.output), &Run::default())?;
    if args.json {
        return Ok(report.to_json()? + "\n");
    }
    let exact = match report.sha256 {
        Some(_) => "exact: its sha256 is that of the file that was packed",
        None => "exact: every tensor; the package was not made from a file",
    };
    Ok(print::row("restored", &args.output.display().to_string())
        + &print::row("", exact)
        + &print::report(&report))
}
