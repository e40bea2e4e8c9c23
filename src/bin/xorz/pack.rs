//! `xorz pack`: checkpoint against base, into a package.

use crate::print;
use std::path::PathBuf;
use xorz::codec::Prefer;
use xorz::error::Result;
use xorz::package::{Codec, Destination, PackOptions, Run, pack_files};

/// Pack a fine-tuned checkpoint against its base.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base: a .safetensors file.
    base: PathBuf,
    /// The fine-tuned checkpoint: a .safetensors file.
    fine_tuned: PathBuf,
    /// The package to write, such as alice.xorz.
    #[arg(short, long)]
    output: PathBuf,
    /// What deltas are encoded for when loaded: speed or memory.
    #[arg(long, default_value = "memory", value_parser = prefer)]
    prefer: Prefer,
    /// One codec for all deltas: xor, resident, resident-zstd or planes [default: the smallest for each tensor].
    #[arg(long, value_parser = codec)]
    codec: Option<Codec>,
    /// zstd level [default: 3, or 10 with --codec xor].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: Option<i32>,
    /// Drop this prefix from names on both sides before pairing them, such as "bert.".
    #[arg(long, value_name = "PREFIX")]
    strip_prefix: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn prefer(text: &str) -> std::result::Result<Prefer, String> {
    text.parse().map_err(|e: xorz::error::Error| e.message().into())
}

fn codec(text: &str) -> std::result::Result<Codec, String> {
    text.parse().map_err(|e: xorz::error::Error| e.message().into())
}

pub(crate) fn run(args: &Args) -> Result<String> {
    let options = PackOptions {
        prefer: args.prefer,
        codec: args.codec,
        level: args.level,
        strip_prefix: args.strip_prefix.clone(),
    };
    let report =
        pack_files(&args.base, &args.fine_tuned, Destination::Path(&args.output), &options, &Run::default())?;
    if args.json {
        return Ok(report.to_json()? + "\n");
    }
    Ok(print::row("packed", &args.output.display().to_string()) + &print::report(&report))
}
