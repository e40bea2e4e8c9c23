//! What every verb that works on checkpoints shares: how it runs, what it says and where, and how it fails.

use crate::print;
use crate::progress::Bar;
use std::sync::atomic::AtomicU32;
use xorz::error::{Error, Hint, Kind};
use xorz::package::{Progress, Report, Run, Trust};

/// Options of every verb that takes a while.
#[derive(clap::Args)]
pub(crate) struct Job {
    /// Threads to use [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// No progress and no report: errors alone.
    #[arg(short, long)]
    quiet: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is compared by sha256 beside the digests: by default each file, where every tensor has been compared.
#[derive(clap::Args)]
pub(crate) struct Sha256 {
    /// Do not compute and compare the sha256 of each restored file. Every tensor is compared all the same: its base by
    /// digest, its stored bytes by digest; not compared is how they are put together into the file.
    #[arg(long = "no-sha256")]
    no: bool,
    /// Compare the base's tensors by sha256, too, before anything is made of them. Their digests (digest) find mistakes, but
    /// who wants to can make other words of the same digest. Needs a package of `pack --trust sha256`; others are refused.
    #[arg(long, default_value = "digest", value_parser = trust)]
    trust: Trust,
}

/// What `--trust` takes.
pub(crate) fn trust(text: &str) -> std::result::Result<Trust, String> {
    text.parse().map_err(|e: Error| e.message().into())
}

/// Where the report of a verb goes.
pub(crate) enum Said {
    /// On standard output.
    Out(String),
    /// On standard error, where standard output carries the result.
    Aside(String),
    /// The user asked for silence.
    Nothing,
}

/// Why a verb failed: the exit code, the sentence, and what may be added to it.
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) text: String,
    hint: Option<Hint>,
}

pub(crate) type Outcome = Result<Said, Failure>;

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self { code: exit_code(e.kind()), text: e.message().into(), hint: e.hint() }
    }
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

impl Failure {
    /// The same in other words.
    pub(crate) fn saying(self, text: String) -> Self {
        Self { text, ..self }
    }

    /// What to do about it, where another base is what is wrong.
    pub(crate) fn or_another_base(mut self) -> Self {
        if self.hint == Some(Hint::OtherBase) {
            self.text +=
                "; `xorz digest BASE` prints a base's digests, `xorz inspect PACKAGE --json` the wanted ones";
        }
        self
    }
}

impl Job {
    /// Call `work` with how it is to run, a progress bar shown meanwhile on a terminal. `stop` ends it: only for what writes
    /// under a name, since a signal that ends the process at once is sooner, and a stalled pipe hears of no flag.
    pub(crate) fn run<T>(
        &self,
        sha256: Option<&Sha256>,
        stop: Option<&AtomicU32>,
        work: impl FnOnce(&Run<'_>) -> xorz::error::Result<T>,
    ) -> xorz::error::Result<T> {
        let bar = if self.quiet { None } else { Bar::on_terminal() };
        let progress = bar.as_ref().map(|b| b as &dyn Progress);
        let jobs = self.jobs.map_or(0, usize::from);
        let trust = sha256.map_or_else(Trust::default, |s| s.trust);
        work(&Run { jobs, progress, sha256: sha256.is_none_or(|s| !s.no), trust, stop })
    }

    /// What is said only to those who want to hear it.
    pub(crate) fn unless_quiet(&self, text: String) -> Said {
        if self.quiet { Said::Nothing } else { Said::Out(text) }
    }

    /// The report: as JSON, or `first` and the totals; beside the result if that went to standard output.
    pub(crate) fn said(&self, aside: bool, first: &str, report: &Report) -> Outcome {
        if self.json {
            return Ok(Said::Out(print::json(&report.to_json()?) + "\n"));
        }
        let text = || first.to_owned() + &print::report(report, true);
        Ok(match (self.quiet, aside) {
            (true, _) => Said::Nothing,
            (false, true) => Said::Aside(text()),
            (false, false) => Said::Out(text()),
        })
    }
}

impl Sha256 {
    /// Whether it is not compared.
    pub(crate) fn skipped(&self) -> bool {
        self.no
    }
}
