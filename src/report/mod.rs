//! Reports about packages and fine-tunes, for people: what each way of keeping fine-tunes takes
//! ([`estimate_files`]) and a page that shows what packages hold ([`report_html`]). Stands on all of
//! [`package`](crate::package), which does not know it. Must hold nothing that a package is made or read
//! with.
//!
//! | file | what |
//! |---|---|
//! | `footprint`, `strategies` | the bytes of each way of keeping fine-tunes; from when on xorz is worth it |
//! | `page` | a page about packages, for a browser |
#![forbid(unsafe_code)]

mod footprint;
mod page;
mod strategies;

pub use footprint::Footprint;
pub use page::{PagePackage, report_html};
pub use strategies::{Better, BreakEven, Comparison, EstimateOptions, Strategy, estimate_files};
