//! What a caller chooses: how tensors are stored, where the result goes, how a job runs. Must hold nothing
//! that reads or writes.

use crate::codec::Prefer;
use crate::error::{Error, Result};
use std::sync::atomic::{AtomicU32, Ordering};

/// How one tensor is stored. SPEC.md says what the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Codec {
    /// One zstd frame of the raw XOR bytes; the notebook's own decompressor reads it. Only on request.
    Xor = 0,
    /// The resident delta's bytes.
    Resident = 1,
    /// zstd over the resident delta's sections.
    ResidentZstd = 2,
    /// zstd over the byte planes of the XOR, in frames of 1 MiB that decode alone.
    Planes = 3,
    /// zstd over the byte planes of the fine-tuned words: no base tensor of this dtype and shape belongs to
    /// it.
    Alone = 4,
    /// Nothing: the bytes are those of another tensor of the fine-tune.
    Same = 5,
    /// The change of each word, entropy-coded by what the base word's exponent says of it, in tiles that decode alone.
    Predicted = 6,
    /// Its XOR words in one zstd frame with those of other small tensors. Never on request.
    Joint = 7,
    /// Nothing: the bytes are those of the base tensor. Never on request.
    Unchanged = 8,
}

impl Codec {
    /// Every codec, in the order of their codes.
    pub const ALL: [Self; 9] = [
        Self::Xor,
        Self::Resident,
        Self::ResidentZstd,
        Self::Planes,
        Self::Alone,
        Self::Same,
        Self::Predicted,
        Self::Joint,
        Self::Unchanged,
    ];

    /// The name in packages and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xor => "xor",
            Self::Resident => "resident",
            Self::ResidentZstd => "resident-zstd",
            Self::Planes => "planes",
            Self::Alone => "alone",
            Self::Same => "same",
            Self::Predicted => "predicted",
            Self::Joint => "joint",
            Self::Unchanged => "unchanged",
        }
    }

    /// The codec of a name, or `None`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == name)
    }

    /// The codec of a number in a package, or `None`.
    pub(crate) fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|c| *c as u64 == code)
    }

    /// Whether a caller may ask for it.
    pub fn on_request(self) -> bool {
        self.delta() && !matches!(self, Self::Joint | Self::Unchanged)
    }

    /// Whether the tensor is stored as a delta against a base tensor.
    pub fn delta(self) -> bool {
        !matches!(self, Self::Alone | Self::Same)
    }
}

impl std::str::FromStr for Codec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::from_name(s).filter(|c| c.on_request()).ok_or_else(|| {
            Error::invalid(format!("codec `{s}` is none of xor, resident, resident-zstd, planes, predicted"))
        })
    }
}

/// What must speak for a base, beside the digests of its tensors, which are compared in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Nothing more: xxh3-128 finds mistakes, but who wants to can make other words of the same digest.
    #[default]
    Digest,
    /// The sha256 of each base tensor's words. Packages have them where they were packed so; others are refused.
    Sha256,
}

impl std::str::FromStr for Trust {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "digest" => Ok(Self::Digest),
            "sha256" => Ok(Self::Sha256),
            _ => Err(Error::invalid(format!("trust `{s}` is neither digest nor sha256"))),
        }
    }
}

/// How to pack.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// What resident deltas are encoded for. Packages are mostly stored and moved, so the default is memory.
    pub prefer: Prefer,
    /// One codec for all deltas (planes for those that it cannot hold); `None` takes the smallest of resident-zstd, planes and
    /// predicted for each tensor.
    pub codec: Option<Codec>,
    /// Leave out codecs predicted and xor where none is named: packages are larger, but quicker made and loaded.
    pub fast: bool,
    /// zstd level; `None` is 3 for planes, 1 for resident deltas, and 10 for [`Codec::Xor`], as in the
    /// notebook.
    pub level: Option<i32>,
    /// A prefix that is dropped from tensor names on both sides before they are paired, such as `bert.`.
    pub strip_prefix: Option<String>,
    /// What the package says of its base: [`Trust::Sha256`] keeps the sha256 of each base tensor, which takes time.
    pub trust: Trust,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self {
            prefer: Prefer::Memory,
            codec: None,
            fast: false,
            level: None,
            strip_prefix: None,
            trust: Trust::Digest,
        }
    }
}

/// Where a package or a restored file goes.
pub enum Destination<'a> {
    /// A path: a temporary file in its folder, synced and renamed, so that it appears whole or not at all.
    Path(&'a std::path::Path),
    /// A stream, such as standard output; what it has taken when an error comes stays there.
    Stream(&'a mut (dyn std::io::Write + Send)),
}

/// Told how far a job over whole checkpoints is; called from several threads.
pub trait Progress: Sync {
    /// A stage of `bytes` bytes begins; `what` names it, such as `pack` or `digest`.
    fn begin(&self, what: &str, bytes: u64);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
}

/// How a job over whole checkpoints runs. Nothing in it changes the bytes written.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Threads; 0 takes one per core.
    pub jobs: usize,
    /// Told of the progress.
    pub progress: Option<&'a dyn Progress>,
    /// Whether `unpack` and `verify` compare the sha256 of each restored file; without, tensors are still
    /// compared by the digests of base and delta.
    pub sha256: bool,
    /// What `unpack` and `verify` ask of the base before they read it for anything else.
    pub trust: Trust,
    /// Ends the job, with an error and nothing left behind, soon after it is no longer 0.
    pub stop: Option<&'a AtomicU32>,
}

impl Default for Run<'_> {
    fn default() -> Self {
        Self { jobs: 0, progress: None, sha256: true, trust: Trust::Digest, stop: None }
    }
}

impl Run<'_> {
    pub(crate) fn begin(&self, what: &str, bytes: u64) {
        if let Some(progress) = self.progress {
            progress.begin(what, bytes);
        }
    }

    /// `bytes` more are done; an error where the caller has had enough.
    pub(crate) fn advance(&self, bytes: u64) -> Result<()> {
        if let Some(progress) = self.progress {
            progress.advance(bytes);
        }
        self.go_on()
    }

    /// An error where the caller has had enough.
    pub(crate) fn go_on(&self) -> Result<()> {
        match self.stop {
            Some(stop) if stop.load(Ordering::Relaxed) != 0 => Err(Error::io("stopped, as was asked")),
            _ => Ok(()),
        }
    }
}

impl PackOptions {
    pub(crate) fn level(&self) -> i32 {
        self.level.unwrap_or(if self.codec == Some(Codec::Xor) { 10 } else { 3 })
    }

    /// For the bit streams of resident deltas, where higher levels find no more.
    pub(crate) fn stream_level(&self) -> i32 {
        self.level.unwrap_or(1)
    }
}
