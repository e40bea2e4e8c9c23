//! Exchanges of the C ABI: updates in place, forth and back.

use super::packages::XorzPackage;
use super::pointers::{
    XorzBuffer, XorzError, XorzMatrix, bytes, bytes_mut, call, give, give_bytes, matrix, null, reference,
    text,
};
use crate::error::Error;
use crate::matrix::{Dtype, Matrix, Shape};
use crate::vector;
use std::ffi::{c_char, c_void};

/// `xorz_exchange_sink`: takes one exchange, of `words` words of the base from `first` on, and gives 0.
pub type XorzExchangeSink = unsafe extern "C" fn(
    context: *mut c_void,
    first: usize,
    words: usize,
    exchange: *const c_void,
    exchange_bytes: usize,
    changed: u64,
) -> i32;

/// The exchange between two versions of a matrix, and how many of its words differ.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_exchange_encode(
    old: *const XorzMatrix,
    new: *const XorzMatrix,
    exchange: *mut XorzBuffer,
    changed: *mut u64,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            // Looked at first, since what goes into the other has to be freed.
            if changed.is_null() {
                return Err(null("changed"));
            }
            let (encoded, count) = vector::exchange(&matrix(old, "old")?, &matrix(new, "new")?)?;
            give_bytes(exchange, encoded, "exchange")?;
            give(changed, count, "changed")
        })
    }
}

/// Make the new words at `words` of the old ones in place, or the old ones of the new.
///
/// # Safety
/// As `csrc/xorz.h` says; the words of `words` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_exchange_apply(
    words: *const XorzMatrix,
    exchange: *const c_void,
    exchange_bytes: usize,
    back: i32,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let (w, exchange) = (reference(words, "words")?, bytes(exchange, exchange_bytes, "exchange")?);
            let inside = bytes_mut(w.words.cast_mut(), w.bytes, "words.words")?;
            Matrix::new(Dtype::of_code(w.dtype)?, Shape { n: w.n, k: w.k }, inside)?;
            vector::exchange_apply(exchange, inside, back != 0)
        })
    }
}

/// The exchanges that turn the base of one tensor into it.
///
/// # Safety
/// As `csrc/xorz.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xorz_package_exchanges(
    package: *const XorzPackage,
    name: *const c_char,
    base: *const XorzMatrix,
    sink: Option<XorzExchangeSink>,
    context: *mut c_void,
    error: *mut XorzError,
) -> i32 {
    // SAFETY: the caller keeps the header's contract.
    unsafe {
        call(error, || {
            let package = &reference(package, "package")?.0;
            let (name, base) = (text(name, "name")?, matrix(base, "base")?);
            let (sink, word) = (sink.ok_or_else(|| null("sink"))?, base.dtype().word_bytes());
            package.exchanges(name, &base, &mut |range, exchange, changed| {
                let (first, count) = (range.start / word, range.len() / word);
                match sink(context, first, count, exchange.as_ptr().cast(), exchange.len(), changed) {
                    0 => Ok(()),
                    code => Err(Error::internal(format!("the sink of exchanges failed with code {code}"))),
                }
            })
        })
    }
}
