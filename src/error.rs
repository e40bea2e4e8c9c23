//! The one error type of the crate: a kind for callers that branch, a message for people.
//!
//! Messages name the argument or tensor and both values of whatever disagreed. Nothing here formats for
//! a particular front end: the C ABI, the shim and the command line map kinds to their own conventions.

#![forbid(unsafe_code)]

use std::fmt;

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Whether a terminal shows this character as it is: it is no control, turns no line's direction, and is not invisible.
pub fn is_harmless(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    !c.is_control() && !turns
}

/// Text that may hold names from files, made harmless for terminals: what is not ([`is_harmless`]) is replaced by U+FFFD.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if is_harmless(c) { c } else { '\u{fffd}' }).collect()
}

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

/// What a front end may add to the sentence in words of its own, such as the command that shows more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hint {
    /// The base is another one than the delta was made against. Digests tell bases apart.
    OtherBase,
}

/// An error: what kind, a sentence for people, and what callers need to know of it without reading the sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    message: String,
    subject: Option<String>,
    hint: Option<Hint>,
}

macro_rules! constructors {
    ($($name:ident => $kind:ident),* $(,)?) => {
        $(
            #[doc = concat!("An error of kind [`Kind::", stringify!($kind), "`].")]
            pub fn $name(message: impl Into<String>) -> Self {
                let message = harmless(&message.into());
                Self { kind: Kind::$kind, message, subject: None, hint: None }
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

    /// The sentence, without the kind: one line, which terminals may be given whatever names are in it.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The tensor that the error is about, where one was named by [`Error::of_tensor`].
    pub fn subject(&self) -> Option<&str> {
        self.subject.as_deref()
    }

    /// What a front end may add to the sentence.
    pub fn hint(&self) -> Option<Hint> {
        self.hint
    }

    /// The same error with a hint for front ends.
    #[must_use]
    pub fn with_hint(mut self, hint: Hint) -> Self {
        self.hint = Some(hint);
        self
    }

    /// The same error with the name of the tensor in front. An error that names a tensor already stays as it is: the tensor
    /// that was at fault first is the one to look at.
    #[must_use]
    pub fn of_tensor(self, name: &str) -> Self {
        if self.subject.is_some() {
            return self;
        }
        Self { subject: Some(name.to_owned()), ..self.within(format_args!("tensor `{name}`")) }
    }

    /// The same error with `what: ` in front, for instance the path of the file.
    #[must_use]
    pub fn within(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{}: {}", harmless(&what.to_string()), self.message);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tensor_met_first_is_named_once_and_stays_the_subject() {
        let e = Error::corrupt("is damaged");
        assert_eq!((e.subject(), e.hint()), (None, None));
        let e = e.of_tensor("a").within("file").of_tensor("b").within("folder");
        assert_eq!((e.subject(), e.kind()), (Some("a"), Kind::Corrupt));
        assert_eq!(e.message(), "folder: file: tensor `a`: is damaged");
        // What a message looks like says nothing: this one is about no tensor yet.
        let e = Error::mismatch("tensor `x` is like this").of_tensor("y");
        assert_eq!((e.subject(), e.message()), (Some("y"), "tensor `y`: tensor `x` is like this"));
    }

    #[test]
    fn a_hint_survives_what_is_put_in_front() {
        let e = Error::mismatch("another").with_hint(Hint::OtherBase).of_tensor("a").within("file");
        assert_eq!(e.hint(), Some(Hint::OtherBase));
    }
}
