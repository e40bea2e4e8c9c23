//! `predicted`: the change of a word, entropy-coded by what the base word says of it. The smallest form, for packages.
//!
//! AdamW moves a weight by about the learning rate, so the base word's exponent (its *octave*) tells how likely a word
//! changed and by how many steps. A [`Predictor`] holds, for a matrix, one table of symbols per *context*, a run of
//! neighbouring octaves; a tile is one bit stream of tabled asymmetric numeral systems (Duda, arXiv 1311.2540) with four
//! states in turn (Giesen, arXiv 1402.3392), and is decoded from its own bytes, the base words and the predictor.
//!
//! What is coded of a word is its *step*: the difference of the words in the order of their values, away from zero
//! positive. A step is a symbol (sign and two leading bits) and the bits below them, raw. Contexts are of two kinds. In
//! the *dense* ones, whose words change often, every word has a symbol. In all others only changed words have one, and
//! their places are coded as gaps. So a tile of which little changed costs no time per unchanged word.
//!
//! | file | what |
//! |---|---|
//! | `step` | words and their differences as symbols and raw bits |
//! | `table` | frequencies of symbols, and the tables that code them |
//! | `bits` | bit streams: read forwards, written backwards |
//! | `predictor` | contexts and tables of a matrix, and their bytes |
//! | `tile` | a tile, encoded and decoded the plain way |
//! | `fit` | the predictor that makes counted words small |

pub(crate) mod bits;
mod fit;
mod predictor;
pub(crate) mod step;
pub(crate) mod table;
mod tile;

pub use fit::StepCounts;
pub use predictor::Predictor;
pub use step::predictable;
pub(crate) use tile::{LANES, unknown};
pub use tile::{decode_predicted, encode_predicted};

/// Most words of a tile.
pub const MAX_TILE_WORDS: usize = 1 << 20;
