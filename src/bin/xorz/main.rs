//! The command line: a file per verb. Reads arguments, calls `xorz::package` and `xorz::report`, prints; no
//! logic of its own.
#![forbid(unsafe_code)]

mod digest;
mod estimate;
mod fleet;
mod generate;
mod inspect;
mod job;
mod pack;
mod pipes;
mod print;
mod progress;
mod signals;
mod unpack;
mod verify;

use clap::{Parser, Subcommand};
use job::{Failure, Outcome, Said};
use std::io::Write;
use std::panic;
use std::process::ExitCode;
use xorz::error::Error;

/// Exact fine-tunes of one base model, stored as small lossless deltas.
#[derive(Parser)]
#[command(name = "xorz", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 not the same (another base, or verification failed), 2 wrong use,\n\
                          3 damaged or unreadable input, 4 the system refused (file, disk), 70 a defect of xorz.\n\
                          Of several checkpoints that are packed, that of the first that failed.";

#[derive(Subcommand)]
enum Verb {
    Pack(pack::Args),
    Unpack(unpack::Args),
    Verify(verify::Args),
    Estimate(estimate::Args),
    Inspect(inspect::Args),
    Digest(digest::Args),
    Completions(generate::Completions),
    Man(generate::Manual),
}

fn main() -> ExitCode {
    // One line in place of a backtrace, whichever thread it came from.
    panic::set_hook(Box::new(|info| complain(&format!("internal error, please report it: {info}"))));
    let result = panic::catch_unwind(|| run(Cli::parse()).and_then(say));
    ExitCode::from(match result {
        Ok(Ok(())) => 0,
        Ok(Err(failure)) => {
            if let Some((signal, name)) = signals::caught() {
                complain(&format!("ended by {name}; nothing is left of what was being written"));
                signals::end(signal);
            }
            complain(&failure.text);
            failure.code
        }
        Err(_) => 70,
    })
}

fn run(cli: Cli) -> Outcome {
    match cli.verb {
        Verb::Pack(args) => pack::run(&args),
        Verb::Unpack(args) => unpack::run(&args),
        Verb::Verify(args) => verify::run(&args),
        Verb::Estimate(args) => estimate::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
        Verb::Digest(args) => digest::run(&args),
        Verb::Completions(args) => generate::completions(&args),
        Verb::Man(args) => generate::manual(&args),
    }
}

pub(crate) fn say(what: Said) -> Result<(), Failure> {
    let (done, place) = match what {
        Said::Out(text) => {
            let mut out = std::io::stdout().lock();
            (out.write_all(text.as_bytes()).and_then(|()| out.flush()), "standard output")
        }
        Said::Aside(text) => (std::io::stderr().lock().write_all(text.as_bytes()), "standard error"),
        Said::Nothing => return Ok(()),
    };
    match done {
        // A reader that has seen enough, such as `head`, is no error.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|e| Error::from(e).within(place).into()),
    }
}

pub(crate) fn complain(message: &str) {
    // Nothing is left to tell where even standard error is closed.
    let _ = writeln!(std::io::stderr(), "xorz: {}", print::name(message));
}
