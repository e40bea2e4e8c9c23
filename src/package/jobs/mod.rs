//! The work itself: whole checkpoints into a package and back, and single tensors of an open package. Stands
//! on all other rooms. Must parse nothing and write no byte of a format by itself: `format` does both.
//!
//! | file | what |
//! |---|---|
//! | `pack`, `unpack` | the jobs over files: side by side, tensors in order, pieces on every thread |
//! | `fleet`, `walk` | `pack` of many fine-tunes: which base, which of them at once; along one base together |
//! | `compare`, `trust` | whether a package and a fine-tune belong together; whether its base is the very one |
//! | `writer`, `tensor` | the same for one tensor at a time: into a new package, out of an open one |
//! | `encode`, `choose`, `predict`, `append` | a tensor into stored bytes |
//! | `restore`, `reencode` | back to words; to another resident delta |

mod append;
mod choose;
mod compare;
pub(crate) mod encode;
pub(crate) mod fleet;
pub(crate) mod pack;
mod predict;
pub(crate) mod reencode;
pub(crate) mod restore;
pub(crate) mod tensor;
mod trust;
pub(crate) mod unpack;
mod walk;
pub(crate) mod writer;
