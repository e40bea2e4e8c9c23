//! What `prefer="auto"` comes to on this machine.
//!
//! `memory` where `exponent` is decoded about as fast as the base's words come from memory: with the bf16 dot
//! product and VBMI2 (one tenant at 0.7 to 1.0 of a dense product's speed). Everywhere else `exponent` takes
//! two to six times as long as `sparse`, and `auto` is `speed`. By instruction set alone, not measured: the
//! two forms differ in bytes and may in bits.

use super::dispatch::Isa;
use super::trace::traces;
use crate::codec::Prefer;
use crate::error::{Error, Result};
use std::sync::Once;

/// The preference of a name: "speed", "memory", or "auto" for what is right for this machine's instruction
/// set.
///
/// # Errors
/// `InvalidArgument` for another name; those of [`Isa::active`] for "auto".
pub fn preference(name: &str) -> Result<Prefer> {
    if name == "auto" {
        return Ok(preference_of(Isa::active()?));
    }
    name.parse().map_err(|_| {
        Error::invalid(format!("prefer must be \"auto\", \"speed\" or \"memory\", but is {name:?}"))
    })
}

/// What "auto" comes to with an instruction set.
pub fn preference_of(isa: Isa) -> Prefer {
    let prefer = if isa == Isa::Avx512Bf16 { Prefer::Memory } else { Prefer::Speed };
    static SAID: Once = Once::new();
    if traces() {
        let keeps_up = if prefer == Prefer::Memory { "keeps up" } else { "does not keep up" };
        SAID.call_once(|| {
            eprintln!("xorz: prefer=auto is {prefer:?}: decoding {keeps_up} with memory on {}", isa.name());
        });
    }
    prefer
}
