//! The sha256 of base tensors, which some packages keep: what tells a base from one that somebody made to have its digests.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A sha256.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sum(pub [u8; 32]);

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Sum> for String {
    fn from(sum: Sum) -> Self {
        sum.to_string()
    }
}

impl TryFrom<String> for Sum {
    type Error = String;

    /// Of 64 lower-case hexadecimal digits.
    fn try_from(hex: String) -> std::result::Result<Self, String> {
        let mut out = [0; 32];
        let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
        if pairs.len() != out.len() || !rest.is_empty() {
            return Err(format!("a sha256 of {} digits", hex.len()));
        }
        for (byte, [high, low]) in out.iter_mut().zip(pairs) {
            let digit = |c: u8| match c {
                b'0'..=b'9' => Some(c - b'0'),
                b'a'..=b'f' => Some(c - b'a' + 10),
                _ => None,
            };
            let both =
                digit(*high).zip(digit(*low)).ok_or("a sha256 of other digits than 0 to 9 and a to f")?;
            *byte = both.0 << 4 | both.1;
        }
        Ok(Self(out))
    }
}
