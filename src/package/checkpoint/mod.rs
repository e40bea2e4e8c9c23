//! Checkpoints: files and folders of tensors, which base tensor belongs to which fine-tuned one, and the
//! digests of a base with the cache that keeps them. Stands on `format` and `io`. Must hold no encoder and
//! write no package.

pub(crate) mod bases;
pub(crate) mod cache;
pub(crate) mod digests;
pub(crate) mod files;
mod folders;
mod joined;
mod likeness;
pub(crate) mod lonely;
mod moved;
pub(crate) mod nearest;
pub(crate) mod pairing;
mod renames;
pub(crate) mod resized;
