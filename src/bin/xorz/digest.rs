//! `xorz digest`: the digests that packages know a base's tensors by.

use crate::job::{Job, Outcome, Said};
use crate::pipes::Inputs;
use crate::print;
use std::collections::BTreeMap;
use std::path::PathBuf;
use xorz::error::Error;
use xorz::package::{DigestCache, digest_files};

/// Print the digest of every tensor of a base, as packages hold them.
///
/// They are kept in the user's cache folder ($XORZ_CACHE_DIR, else $XDG_CACHE_HOME/xorz, else ~/.cache/xorz; an empty
/// XORZ_CACHE_DIR keeps nothing) until the file changes. They tell bases apart and find accidents; they are no protection
/// against forgery.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The base: a .safetensors file, a folder of them, or - for a file on standard input.
    base: PathBuf,
    #[command(flatten)]
    job: Job,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let inputs = Inputs::of(&[&args.base])?;
    let base = inputs.path(&args.base);
    let digests = args.job.run(None, None, |run| digest_files(&base, &DigestCache::user(), run));
    let digests = digests.map_err(|e| inputs.told(e))?;
    if args.job.json {
        let named: BTreeMap<&str, String> =
            digests.iter().map(|(n, d)| (n.as_str(), d.to_string())).collect();
        let json = serde_json::to_string(&BTreeMap::from([("digests", named)]))
            .map_err(|e| Error::internal(format!("json: {e}")))?;
        return Ok(Said::Out(print::json(&json) + "\n"));
    }
    let lines = digests.iter().map(|(name, digest)| format!("{digest}  {}\n", print::name(name)));
    Ok(Said::Out(lines.collect()))
}
