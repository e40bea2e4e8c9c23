//! `xorz pack`: checkpoint against base, into a package.

use crate::job::{Job, Outcome};
use crate::pipes::{Inputs, Output};
use crate::print;
use std::path::PathBuf;
use xorz::codec::Prefer;
use xorz::package::{Codec, PackOptions, pack_files};

/// Pack a fine-tuned checkpoint against its base.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base: a .safetensors file, or a folder of them, sharded or not; - for a file on standard input.
    base: PathBuf,
    /// The fine-tuned checkpoint: a .safetensors file (- for one on standard input), or a folder such as save_pretrained
    /// makes; its other files (config, tokenizer) are carried along.
    fine_tuned: PathBuf,
    /// The package to write, such as alice.xorz; - for standard output.
    #[arg(short, long)]
    output: PathBuf,
    /// What deltas are encoded for when loaded: speed or memory.
    #[arg(long, default_value = "memory", value_parser = prefer)]
    prefer: Prefer,
    /// One codec for all deltas: xor, resident, resident-zstd, planes or predicted [default: the smallest of the last three, tensor by tensor].
    #[arg(long, value_parser = codec)]
    codec: Option<Codec>,
    /// Leave out codec predicted: the package is larger, but quicker to make and to load.
    #[arg(long, conflicts_with = "codec")]
    fast: bool,
    /// zstd level [default: 1 for resident deltas, 3 for planes, 10 for xor].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: Option<i32>,
    /// Drop this prefix from names on both sides before pairing them, such as "bert.".
    #[arg(long, value_name = "PREFIX")]
    strip_prefix: Option<String>,
    #[command(flatten)]
    job: Job,
}

fn prefer(text: &str) -> std::result::Result<Prefer, String> {
    text.parse().map_err(|e: xorz::error::Error| e.message().into())
}

fn codec(text: &str) -> std::result::Result<Codec, String> {
    text.parse().map_err(|e: xorz::error::Error| e.message().into())
}

pub(crate) fn run(args: &Args) -> Outcome {
    let options = PackOptions {
        prefer: args.prefer,
        codec: args.codec,
        fast: args.fast,
        level: args.level,
        strip_prefix: args.strip_prefix.clone(),
    };
    let mut output = Output::of(&args.output, args.job.json, "-o -")?;
    let inputs = Inputs::of(&[&args.base, &args.fine_tuned])?;
    let (base, fine_tuned) = (inputs.path(&args.base), inputs.path(&args.fine_tuned));
    let report =
        args.job.run(None, |run| pack_files(&base, &fine_tuned, output.destination(), &options, run));
    let report = report.map_err(|e| inputs.told(e))?;
    let mut first = print::row("packed", &print::path(&args.output));
    if let Some(advice) = &report.advice {
        first += &print::row("note", &print::name(advice));
    }
    args.job.said(output.is_stdout(), &first, &report)
}
