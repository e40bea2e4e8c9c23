//! The command line: a file per verb.
#![forbid(unsafe_code)]

fn main() {}
