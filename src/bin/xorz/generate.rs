//! `xorz completions` and `xorz man`: what packagers install, made from the very definition of the command
//! line.

use crate::job::{Outcome, Said};
use crate::{Cli, EXIT_CODES};
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use std::io::Write;
use std::path::PathBuf;
use xorz::error::{Error, Result};

/// Print a script that completes xorz's verbs and options in a shell.
///
/// Such as: xorz completions bash > ~/.local/share/bash-completion/completions/xorz
#[derive(clap::Args)]
pub(crate) struct Completions {
    /// The shell: bash, zsh or fish.
    #[arg(value_parser = ["bash", "zsh", "fish"])]
    shell: String,
}

pub(crate) fn completions(args: &Completions) -> Outcome {
    let shell: Shell = args.shell.parse().map_err(Error::invalid)?;
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "xorz", &mut out);
    text(out)
}

/// Print the manual page, to be read with `xorz man | man -l -`.
#[derive(clap::Args)]
pub(crate) struct Manual {
    /// Write xorz.1 and a page for every verb (xorz-pack.1, ...) into this folder instead.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn manual(args: &Manual) -> Outcome {
    let mut command = Cli::command().disable_help_subcommand(true);
    if let Some(dir) = &args.dir {
        clap_mangen::generate_to(command, dir).map_err(|e| Error::from(e).within(dir.display()))?;
        return Ok(Said::Nothing);
    }
    command.build();
    text(page(&command).map_err(Error::from)?)
}

/// One page: xorz, and a section for every verb.
fn page(command: &clap::Command) -> std::io::Result<Vec<u8>> {
    let main = Man::new(command.clone());
    let mut out = Vec::new();
    main.render_title(&mut out)?;
    main.render_name_section(&mut out)?;
    main.render_synopsis_section(&mut out)?;
    main.render_description_section(&mut out)?;
    for verb in command.get_subcommands() {
        let (man, mut section) = (Man::new(verb.clone()), Vec::new());
        man.render_synopsis_section(&mut section)?;
        man.render_description_section(&mut section)?;
        man.render_options_section(&mut section)?;
        writeln!(out, ".SH \"XORZ {}\"", verb.get_name().to_uppercase())?;
        out.extend(String::from_utf8_lossy(&section).replace(".SH ", ".SS ").bytes());
    }
    writeln!(out, ".SH \"EXIT STATUS\"\n{EXIT_CODES}")?;
    main.render_version_section(&mut out)?;
    Ok(out)
}

fn text(bytes: Vec<u8>) -> Outcome {
    let text: Result<String> =
        String::from_utf8(bytes).map_err(|e| Error::internal(format!("what was generated is no text: {e}")));
    Ok(Said::Out(text?))
}
