//! The command line: a file per verb. Reads arguments, calls `xorz::package`, prints; no logic of its own.
#![forbid(unsafe_code)]

mod inspect;
mod pack;
mod print;
mod unpack;
mod verify;

use clap::{Parser, Subcommand};
use std::io::Write;
use std::panic;
use std::process::ExitCode;
use xorz::error::{Error, Kind, Result};

/// Exact fine-tunes of one base model, stored as small lossless deltas.
#[derive(Parser)]
#[command(name = "xorz", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 not the same (another base, or verification failed), 2 wrong use,\n\
                          3 damaged or unreadable input, 4 the system refused (file, disk), 70 a defect of xorz.";

#[derive(Subcommand)]
enum Verb {
    Pack(pack::Args),
    Unpack(unpack::Args),
    Verify(verify::Args),
    Inspect(inspect::Args),
}

fn main() -> ExitCode {
    // One line in place of a backtrace, whichever thread it came from.
    panic::set_hook(Box::new(|info| complain(&format!("internal error, please report it: {info}"))));
    let result = panic::catch_unwind(|| run(Cli::parse()));
    ExitCode::from(match result {
        Ok(Ok(())) => 0,
        Ok(Err(e)) => {
            complain(e.message());
            exit_code(e.kind())
        }
        Err(_) => 70,
    })
}

fn run(cli: Cli) -> Result<()> {
    let text = match cli.verb {
        Verb::Pack(args) => pack::run(&args),
        Verb::Unpack(args) => unpack::run(&args),
        Verb::Verify(args) => verify::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
    }?;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // A reader that has seen enough, such as `head`, is no error.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|e| Error::from(e).within("standard output")),
    }
}

fn complain(message: &str) {
    // Nothing is left to tell where even standard error is closed.
    let _ = writeln!(std::io::stderr(), "xorz: {}", print::name(message));
}

fn exit_code(kind: Kind) -> u8 {
    match kind {
        Kind::Mismatch => 1,
        Kind::InvalidArgument => 2,
        Kind::Corrupt | Kind::Truncated | Kind::Unsupported => 3,
        Kind::Io => 4,
        _ => 70,
    }
}
