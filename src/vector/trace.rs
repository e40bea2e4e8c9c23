//! Whether choices are told to people.

use std::sync::OnceLock;

/// Whether `XORZ_TRACE` asks for one line per choice on stderr; it is read once.
pub(crate) fn traces() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("XORZ_TRACE").is_some_and(|v| !v.is_empty() && v != "0"))
}
