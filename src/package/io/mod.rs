//! How bytes come and go: room in memory, the pieces of a tensor, threads that make pieces in order, outputs
//! that appear whole or not at all. The lowest room of the package. Must hold nothing of a file's format, of
//! checkpoints or of deltas.

pub(crate) mod aligned;
pub(crate) mod lanes;
pub(crate) mod ordered;
pub(crate) mod pieces;
pub(crate) mod regular;
pub(crate) mod shared;
pub(crate) mod spool;
pub(crate) mod temp;
mod turns;
pub(crate) mod writeback;
