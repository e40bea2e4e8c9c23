//! `xorz verify`: restore without writing, and compare.

use crate::job::{Job, Outcome, Sha256};
use crate::pipes::Inputs;
use crate::print;
use std::path::{Path, PathBuf};
use xorz::package::verify_files;

/// Check that base + package give back the fine-tuned checkpoint, without writing it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base that the package was made against: a .safetensors file, or a folder of them; - for a file on
    /// standard input.
    base: PathBuf,
    /// The package; - for standard input.
    package: PathBuf,
    /// The fine-tuned checkpoint, file or folder, to be compared tensor by tensor and by sha256; - for a file
    /// on standard input.
    fine_tuned: Option<PathBuf>,
    #[command(flatten)]
    sha256: Sha256,
    #[command(flatten)]
    job: Job,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let named: Vec<&Path> = [Some(&args.base), Some(&args.package), args.fine_tuned.as_ref()]
        .into_iter()
        .flatten()
        .map(|p| &**p)
        .collect();
    let inputs = Inputs::of(&named)?;
    let (base, package) = (inputs.path(&args.base), inputs.path(&args.package));
    let fine_tuned = args.fine_tuned.as_ref().map(|p| inputs.path(p));
    let report = args
        .job
        .run(Some(&args.sha256), None, |run| verify_files(&base, &package, fine_tuned.as_deref(), run));
    let report = report.map_err(|e| inputs.told(e).or_another_base())?;
    let files = report.files.len();
    let what = match (files, args.sha256.skipped(), &fine_tuned) {
        (1.., false, Some(_)) if files > 1 => {
            format!("every tensor and the sha256 of {files} files equal the fine-tune given")
        }
        (1.., false, Some(_)) => "every tensor and the file's sha256 equal the fine-tune given".into(),
        (_, _, Some(_)) => "every tensor equals the fine-tune given".into(),
        (0, _, None) => "every digest fits; there is no file to compare with".into(),
        (_, true, None) => "every digest fits; sha256 was not compared".into(),
        (1, false, None) => "the restored file has the sha256 of the file that was packed".to_owned(),
        (n, false, None) => format!("the {n} restored files have the sha256 of those that were packed"),
    };
    args.job.said(false, &print::row("verified", &what), &report)
}
