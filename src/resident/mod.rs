#![doc = include_str!("SPEC.md")]
#![forbid(unsafe_code)]

mod analyze;
mod encode;
mod header;
mod regions;
mod view;

pub use encode::{Pair, Source, encode, encode_as, encode_pair};
pub use header::{HEADER_BYTES, Header, MAGIC, VERSION};
pub use regions::{concat, slice};
pub use view::{Resident, restore, restore_rows};
