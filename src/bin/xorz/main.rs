//! The command line: a file per verb.

fn main() {}
