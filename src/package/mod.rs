//! Bytes at rest: a delta of a whole checkpoint in one `.xorz` file, which is a valid safetensors file.
//!
//! [`Writer`] makes one tensor by tensor, [`Package`] reads one, and the `*_files` functions go from
//! checkpoint to package and back. Everything read here may come from a stranger: [`SafeTensors`],
//! [`Checkpoint`] and [`Package`] are the only parsers, and what they hand on is checked. Knows nothing of
//! torch or Python.
//!
//! | room | what |
//! |---|---|
//! | `jobs` | pack, unpack, verify; one tensor into stored bytes and back |
//! | `checkpoint` | files and folders; which base tensor belongs to which; a base's digests |
//! | `format` | the bytes of a package: safetensors, records, frames, planes, stored tensors |
//! | `io` | pieces, threads, room in memory, outputs that appear whole |
//! | `options` | what a caller chooses |
//!
//! A room knows those below it in this table and none above.
//!
#![doc = include_str!("SPEC.md")]
#![forbid(unsafe_code)]

pub(crate) mod checkpoint;
pub(crate) mod format;
pub(crate) mod io;
pub(crate) mod jobs;
pub(crate) mod options;

pub use checkpoint::bases::Base;
pub use checkpoint::cache::{DigestCache, Identity};
pub use checkpoint::digests::digest_files;
pub use checkpoint::files::{CarriedFile, Checkpoint, TensorFile};
pub use format::container::{Header, MAX_HEADER_BYTES, SafeTensors, TensorInfo};
pub use format::reader::Package;
pub use format::record::{BaseTensor, Entry, SourceFile};
pub use format::sums::Sum;
pub use format::totals::{FileLine, Report, describe_json, inspect_json};
pub use jobs::fleet::{FleetPackage, FleetReport, pack_fleet};
pub use jobs::pack::pack_files;
pub use jobs::unpack::{unpack_files, verify_files};
pub use jobs::writer::{Tensor, Writer};
pub use options::{Codec, Destination, PackOptions, Progress, Run, Trust};
