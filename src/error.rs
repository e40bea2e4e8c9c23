//! The one error type of the crate: a kind for callers that branch, a message for people.
//!
//! Messages name the argument or tensor and both values of whatever disagreed. Nothing here formats for
//! a particular front end: the C ABI, the shim and the command line map kinds to their own conventions.

#![forbid(unsafe_code)]

use std::fmt;

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, and on whose side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i32)]
pub enum Kind {
    /// The bytes of a package or resident delta contradict themselves.
    Corrupt = 1,
    /// The bytes end before what they announce.
    Truncated = 2,
    /// Two valid things do not belong together: a delta and another base, a shape and another shape.
    Mismatch = 3,
    /// Valid, but not something this version or this op can do.
    Unsupported = 4,
    /// The caller passed something that is never valid.
    InvalidArgument = 5,
    /// The operating system refused: a file, a pipe, memory.
    Io = 6,
    /// An accelerator or its driver refused.
    Device = 7,
    /// A defect of xorz itself (a caught panic among them).
    Internal = 8,
}

/// An error: what kind, and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    message: String,
}

macro_rules! constructors {
    ($($name:ident => $kind:ident),* $(,)?) => {
        $(
            #[doc = concat!("An error of kind [`Kind::", stringify!($kind), "`].")]
            pub fn $name(message: impl Into<String>) -> Self {
                Self { kind: Kind::$kind, message: message.into() }
            }
        )*
    };
}

impl Error {
    constructors! {
        corrupt => Corrupt,
        truncated => Truncated,
        mismatch => Mismatch,
        unsupported => Unsupported,
        invalid => InvalidArgument,
        io => Io,
        device => Device,
        internal => Internal,
    }

    /// The kind, for callers that branch.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence, without the kind.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same error with `what: ` in front, for instance the tensor's name.
    #[must_use]
    pub fn within(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::io(remedy(e.kind()).map_or_else(|| e.to_string(), |what| format!("{e}; {what}")))
    }
}

/// What people can do about what the system refused.
fn remedy(kind: std::io::ErrorKind) -> Option<&'static str> {
    use std::io::ErrorKind as Io;
    Some(match kind {
        Io::NotFound => "check the path",
        Io::PermissionDenied => "allow it with chmod or chown (the folder, too), or use another path",
        Io::StorageFull => "make room there, or write to another disk",
        Io::QuotaExceeded => "make room in the quota, or write to another disk",
        Io::FileTooLarge => "raise the limit (ulimit -f), or write to a file system that takes longer files",
        Io::ReadOnlyFilesystem => "write elsewhere",
        _ => return None,
    })
}
