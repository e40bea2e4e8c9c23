#![doc = include_str!("SPEC.md")]
#![forbid(unsafe_code)]

mod assemble;
mod encode;
mod estimate;
mod header;
mod outline;
mod piece;
mod plan;
mod regions;
mod tiles;
mod view;
mod widths;

pub use assemble::{Assembler, Finished};
pub(crate) use encode::encoded_bytes;
pub use encode::{Pair, Source, encode, encode_as, encode_pair};
pub use estimate::{Estimate, estimate, estimate_exactly};
pub use header::{HEADER_BYTES, Header, MAGIC, VERSION};
pub(crate) use outline::head_bytes;
pub use outline::{Outline, ReadAt};
pub use piece::{DeltaPiece, Listed, encode_tiles};
pub use plan::Plan;
pub use regions::{concat, slice};
pub use view::{Resident, restore, restore_rows};

// What the fast encoders of `vector` share with the plain ones here.
pub(crate) use estimate::{Count, Oracle, estimate_by};
pub(crate) use piece::Region;
pub(crate) use widths::Need;
