//! `xorz unpack`: base and package, into the fine-tuned checkpoint.

use crate::job::{Job, Outcome, Sha256};
use crate::pipes::{Inputs, Output};
use crate::print;
use crate::signals;
use std::path::PathBuf;
use xorz::package::unpack_files;

/// Give back the fine-tuned checkpoint, byte for byte.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base that the package was made against: a .safetensors file, or a folder of them; it may be
    /// sharded otherwise than it was. - for a file on standard input.
    base: PathBuf,
    /// The package; - for standard input.
    package: PathBuf,
    /// What to write: a .safetensors file, or a folder (new or empty) if the package was made from one; - for
    /// a single file on standard output.
    #[arg(short, long)]
    output: PathBuf,
    #[command(flatten)]
    sha256: Sha256,
    #[command(flatten)]
    job: Job,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let mut output = Output::of(&args.output, args.job.json, "-o -")?;
    let inputs = Inputs::of(&[&args.base, &args.package])?;
    let (base, package) = (inputs.path(&args.base), inputs.path(&args.package));
    let stop = if output.is_stdout() { None } else { signals::watch() };
    let report = args
        .job
        .run(Some(&args.sha256), stop, |run| unpack_files(&base, &package, output.destination(), run));
    let report = report.map_err(|e| inputs.told(e).or_another_base())?;
    let exact = match (report.files.len(), args.sha256.skipped()) {
        (0, _) => "exact: every tensor; the package was not made from a file".into(),
        (_, true) => "every tensor is exact; sha256 was not compared".into(),
        (1, false) => "exact: its sha256 is that of the file that was packed".to_owned(),
        (n, false) => format!("exact: {n} files, the sha256 of each is that of the file that was packed"),
    };
    let first = print::row("restored", &print::path(&args.output)) + &print::row("", &exact);
    args.job.said(output.is_stdout(), &first, &report)
}
