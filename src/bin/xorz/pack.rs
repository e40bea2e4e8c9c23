//! `xorz pack`: checkpoints against a base, into packages.

use crate::job::{Job, Outcome, trust};
use crate::pipes::{Inputs, Output};
use crate::{fleet, print, signals};
use std::path::PathBuf;
use xorz::codec::Prefer;
use xorz::package::{Codec, PackOptions, Trust, pack_files};

/// Pack fine-tuned checkpoints against their base.
///
/// One goes into the file that -o names. Of several, each goes into a package of its own in the folder that -o names, called
/// as the checkpoint is; the base is read once for all of them, one that fails ends no other, and the exit code is that of the
/// first that failed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base: a .safetensors file, or a folder of them, sharded or not; - for a file on standard input. A checkpoint to
    /// pack like the others, where bases are given by --base.
    base: PathBuf,
    /// Fine-tuned checkpoints: .safetensors files (- for one on standard input), or folders such as save_pretrained makes;
    /// their other files (config, tokenizer) are carried along.
    #[arg(required_unless_present = "bases", value_name = "FINE_TUNED")]
    fine_tuned: Vec<PathBuf>,
    /// The package to write, such as alice.xorz, - for standard output; of several checkpoints, and with a / at its end, the
    /// folder for their packages.
    #[arg(short, long)]
    output: PathBuf,
    /// A base, once for each of several: every checkpoint is packed against the nearest one.
    #[arg(long = "base", value_name = "BASE", id = "bases")]
    bases: Vec<PathBuf>,
    /// What deltas are encoded for when loaded: speed or memory.
    #[arg(long, default_value = "memory", value_parser = prefer)]
    prefer: Prefer,
    /// One codec for all deltas: xor, resident, resident-zstd, planes or predicted [default: the smallest of the last three, tensor by tensor].
    #[arg(long, value_parser = codec)]
    codec: Option<Codec>,
    /// Leave out codecs predicted and xor: the package is larger, but quicker to make and to load.
    #[arg(long, conflicts_with = "codec")]
    fast: bool,
    /// zstd level [default: 1 for resident deltas, 3 for planes, 10 for xor].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: Option<i32>,
    /// Drop this prefix from names on both sides before pairing them, such as "bert.".
    #[arg(long, value_name = "PREFIX")]
    strip_prefix: Option<String>,
    /// Keep the sha256 of each base tensor in the package, so that `unpack --trust sha256` can tell a forged base (sha256), or
    /// do without (digest). Takes longer.
    #[arg(long, default_value = "digest", value_parser = trust)]
    trust: Trust,
    #[command(flatten)]
    job: Job,
}

fn prefer(text: &str) -> std::result::Result<Prefer, String> {
    text.parse().map_err(|e: xorz::error::Error| e.message().into())
}

fn codec(text: &str) -> std::result::Result<Codec, String> {
    text.parse().map_err(|e: xorz::error::Error| e.message().into())
}

impl Args {
    fn options(&self) -> PackOptions {
        PackOptions {
            prefer: self.prefer,
            codec: self.codec,
            fast: self.fast,
            level: self.level,
            strip_prefix: self.strip_prefix.clone(),
            trust: self.trust,
        }
    }

    /// Bases and fine-tunes: the first checkpoint is the base, unless bases are given by name.
    fn roles(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let given = std::iter::once(&self.base).chain(&self.fine_tuned).cloned();
        match self.bases.is_empty() {
            true => (vec![self.base.clone()], self.fine_tuned.clone()),
            false => (self.bases.clone(), given.collect()),
        }
    }
}

pub(crate) fn run(args: &Args) -> Outcome {
    let (bases, fine_tuned) = args.roles();
    let ([base], [one], false) = (&*bases, &*fine_tuned, fleet::wants_folder(&args.output)) else {
        return fleet::run(&bases, &fine_tuned, &args.output, &args.options(), &args.job);
    };
    let mut output = Output::of(&args.output, args.job.json, "-o -")?;
    let inputs = Inputs::of(&[base, one])?;
    let (base, fine_tuned) = (inputs.path(base), inputs.path(one));
    let stop = if output.is_stdout() { None } else { signals::watch() };
    let options = args.options();
    let report =
        args.job.run(None, stop, |run| pack_files(&base, &fine_tuned, output.destination(), &options, run));
    let report = report.map_err(|e| inputs.told(e))?;
    let mut first = print::row("packed", &print::path(&args.output));
    if let Some(advice) = &report.advice {
        first += &print::row("note", &print::name(advice));
    }
    args.job.said(output.is_stdout(), &first, &report)
}
