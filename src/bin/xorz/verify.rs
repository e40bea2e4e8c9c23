//! `xorz verify`: restore without writing, and compare.

use crate::print;
use std::path::PathBuf;
use xorz::error::Result;
use xorz::package::{Run, verify_files};

/// Check that base + package give back the fine-tuned checkpoint, without writing it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base that the package was made against: a .safetensors file.
    base: PathBuf,
    /// The package.
    package: PathBuf,
    /// The fine-tuned checkpoint, to be compared tensor by tensor and by sha256.
    fine_tuned: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<String> {
    let report = verify_files(&args.base, &args.package, args.fine_tuned.as_deref(), &Run::default())?;
    if args.json {
        return Ok(report.to_json()? + "\n");
    }
    let what = match (&report.sha256, &args.fine_tuned) {
        (Some(_), Some(_)) => "every tensor and the file's sha256 equal the fine-tune given",
        (None, Some(_)) => "every tensor equals the fine-tune given",
        (Some(_), None) => "the restored file has the sha256 of the file that was packed",
        (None, None) => "every digest fits; there is no file to compare with",
    };
    Ok(print::row("verified", what) + &print::report(&report))
}
