//! `xorz estimate`: what each way of keeping fine-tunes takes, before anything is packed.

use crate::job::{Job, Outcome, Said};
use crate::pipes::Inputs;
use crate::print;
use std::path::{Path, PathBuf};
use xorz::report::{Better, Comparison, EstimateOptions, Footprint, Strategy, estimate_files};

/// Tell what fine-tunes would take on an accelerator, in each way of keeping them, and from how many tenants on xorz is the
/// smaller one.
///
/// Every form is made, counted and dropped; nothing is written. Deltas are shown both ways: `attach` keeps `prefer=memory` on
/// CPUs with AVX-512 BF16 and `prefer=speed` on others unless told otherwise; the verdict goes by the smaller one. Weights only:
/// no caches, no activations. A step's time is a bound: every byte that is kept, read once at the bandwidth. What was measured is in docs/results.md.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base: a .safetensors file, or a folder of them; - for a file on standard input.
    base: PathBuf,
    /// Fine-tuned checkpoints, files or folders.
    #[arg(required = true, value_name = "FINE_TUNED")]
    fine_tuned: Vec<PathBuf>,
    /// Fine-tunes to be served at once, each like those given on average.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    tenants: u64,
    /// What the accelerator reads from its memory, in 10^9 bytes per second (such as 3350 for an H100, 50 for a desktop).
    #[arg(long, value_name = "GB/s", value_parser = bandwidth)]
    bandwidth: Option<f64>,
    /// Leave out strategy B, zstd of the XOR, which takes most of the time.
    #[arg(long)]
    no_zstd: bool,
    /// Drop this prefix from names on both sides before pairing them, such as "bert.".
    #[arg(long, value_name = "PREFIX")]
    strip_prefix: Option<String>,
    #[command(flatten)]
    job: Job,
}

fn bandwidth(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "is no number of GB/s".to_owned())?;
    if rate > 0.0 && rate.is_finite() { Ok(rate) } else { Err("must be more than 0 GB/s".into()) }
}

pub(crate) fn run(args: &Args) -> Outcome {
    let named: Vec<&Path> = std::iter::once(&args.base).chain(&args.fine_tuned).map(|p| &**p).collect();
    let inputs = Inputs::of(&named)?;
    let fine_tuned: Vec<PathBuf> = args.fine_tuned.iter().map(|p| inputs.path(p)).collect();
    let options = EstimateOptions {
        tenants: args.tenants,
        bandwidth: args.bandwidth.map(|b| b * 1e9),
        zstd: !args.no_zstd,
        strip_prefix: args.strip_prefix.clone(),
    };
    let base = inputs.path(&args.base);
    let found = args.job.run(None, None, |run| estimate_files(&base, &fine_tuned, &options, run));
    let mut found = found.map_err(|e| inputs.told(e))?;
    found.fine_tunes.iter_mut().zip(&args.fine_tuned).for_each(|(f, path)| f.path = inputs.name(path));
    if args.job.json {
        return Ok(Said::Out(print::json(&found.to_json()?) + "\n"));
    }
    Ok(Said::Out(describe(&inputs.name(&args.base), &found)))
}

fn describe(base: &str, c: &Comparison) -> String {
    let mut out = print::row("base", &format!("{base}, {}", print::bytes(c.base_bytes)));
    c.fine_tunes.iter().for_each(|f| out += &fine_tune(f));
    let of = if c.fine_tunes.len() > 1 { ", each like the mean of those" } else { ", each like that one" };
    out += &print::row("tenants", &format!("{}{of}", c.tenants));
    out += "\n";
    out += &table(c);
    out += "\n";
    out += &print::row("memory", &from(c, "takes less than separate copies"));
    out += &print::row("time", &from(c, "reads fewer bytes for a row of every tenant"));
    out += &print::row("", "(bytes bound the time from below; docs/results.md has what was measured)");
    out + &print::row("verdict", &verdict(c))
}

fn fine_tune(f: &Footprint) -> String {
    let deltas = f.tensors - f.alone;
    let mut text = format!(
        "{}, {}: {deltas} deltas ({} unchanged), {} of {} words changed",
        f.path,
        print::bytes(f.bytes),
        f.unchanged,
        print::percent(f.changed, f.words),
        f.words,
    );
    if f.alone > 0 {
        text += &format!("; {} tensors are no deltas ({})", f.alone, print::bytes(f.alone_bytes));
    }
    let mut out = print::row("fine-tune", &text);
    if let Some(advice) = &f.advice {
        out += &print::row("", &print::name(advice));
    }
    if f.memory_bytes > f.bytes / 2 {
        let share = print::percent(f.memory_bytes, f.bytes);
        out += &print::row(
            "",
            &format!(
                "its delta takes {share} of it even with prefer=memory: storing the fine-tune alone may be better"
            ),
        );
    }
    out
}

fn table(c: &Comparison) -> String {
    let separate = c.strategy("separate").map_or(0, |s| s.total_bytes);
    let step = if c.bandwidth.is_some() { "ms a step" } else { "" };
    let tenants = tenants(c);
    let mut rows = vec![["kept as", "a tenant", &tenants, "of separate", step].map(String::from)];
    rows.extend(c.strategies.iter().map(|s: &Strategy| {
        let step = match (s.step_seconds, c.bandwidth) {
            (Some(seconds), _) => milliseconds(seconds),
            (None, Some(_)) => "-".into(),
            (None, None) => String::new(),
        };
        [
            s.name.into(),
            print::bytes(s.tenant_bytes),
            print::bytes(s.total_bytes),
            print::percent(s.total_bytes, separate),
            step,
        ]
    }));
    print::table(&rows, 4)
}

fn tenants(c: &Comparison) -> String {
    format!("{} tenant{}", c.tenants, if c.tenants == 1 { "" } else { "s" })
}

/// A number with three significant digits.
fn milliseconds(seconds: f64) -> String {
    let ms = 1e3 * seconds;
    let digits = if ms > 0.0 { (2.0 - ms.log10().floor()).clamp(0.0, 6.0) as usize } else { 0 };
    format!("{ms:.digits$}")
}

/// The words for: from how many tenants on xorz is the better one.
fn from(c: &Comparison, what: &str) -> String {
    let one = |n: Option<u64>| n.map_or("never".to_owned(), |n| format!("from {n} tenants on"));
    let (memory, speed) = (one(c.break_even.memory), one(c.break_even.speed));
    if memory == speed {
        return format!("xorz {what} {memory}");
    }
    format!("xorz {what} {memory} with prefer=memory, {speed} with prefer=speed")
}

fn verdict(c: &Comparison) -> String {
    let bytes = |key: &str| c.strategy(key).map_or(0, |s| s.total_bytes);
    let (ours, separate) = (bytes("memory"), bytes("separate"));
    let both = format!(
        "{} with prefer=memory, {} with prefer=speed, in place of {}",
        print::bytes(ours),
        print::bytes(bytes("speed")),
        print::bytes(separate)
    );
    match (c.better, c.break_even.memory) {
        (Better::Xorz, _) => format!("xorz: {both} for {}", tenants(c)),
        (Better::Either, _) => format!(
            "xorz saves less than half a copy for each tenant ({both}); storing the fine-tunes alone may be the better choice"
        ),
        (Better::Separate, Some(from)) => format!(
            "separate copies: {} for {}; xorz would take {} with prefer=memory, and takes less from {from} tenants on",
            print::bytes(separate),
            tenants(c),
            print::bytes(ours)
        ),
        (Better::Separate, None) => {
            "store the fine-tunes alone: their deltas take as much as they do, so xorz never takes less"
                .into()
        }
    }
}
