//! What the bytes of a package mean, read and written: safetensors containers, the records in their metadata,
//! frames and planes, and the stored bytes of one tensor. Stands on `io`. Must hold no search for a base and
//! no loop over a checkpoint: what is parsed here is checked here, and handed up.
//!
//! | file | what |
//! |---|---|
//! | `container`, `kinds` | safetensors files; the words that a tensor of any dtype is |
//! | `words`, `parts` | where a tensor's words are; a base put together of several tensors |
//! | `record`, `sums`, `totals`, `refusals` | what is known of each tensor; totals; what is said of a base that is another one |
//! | `columns`, `table_columns`, `table`, `table_writer` | the table of a package; `version1`: what was in its place before |
//! | `frames`, `planes`, `xor` | zstd frames and their table, byte planes, the notebook's one frame |
//! | `predicted` | tiles whose changes the base predicts |
//! | `joint`, `joint_reader` | the words of many small tensors in one frame |
//! | `blob`, `reader` | stored bytes, compared with their digest and read by position; an opened package |
//! | `stored`, `contents` | stored bytes in the making; the package that they become |

pub(crate) mod blob;
mod columns;
pub(crate) mod container;
pub(crate) mod contents;
pub(crate) mod frames;
pub(crate) mod joint;
mod joint_reader;
pub(crate) mod kinds;
pub(crate) mod parts;
pub(crate) mod paths;
pub(crate) mod planes;
pub(crate) mod predicted;
pub(crate) mod reader;
pub(crate) mod record;
pub(crate) mod refusals;
pub(crate) mod stored;
pub(crate) mod sums;
mod table;
mod table_columns;
mod table_writer;
pub(crate) mod totals;
mod version1;
pub(crate) mod words;
pub(crate) mod xor;
