//! Numbers and texts of a package's table, column by column: what is alike lies together, so that zstd finds it. A number
//! is 7 bits a byte, lowest first, the highest bit saying that more follow, and no byte too many; a text is what it has in
//! common with the one before it, and the rest.

use crate::error::{Error, Result};

/// Bytes of the longest text: a name, a path, a dtype.
pub(crate) const MAX_TEXT: usize = 4096;

/// Refuse a text that no table may hold.
///
/// # Errors
/// `Unsupported`, with its first letters.
pub(super) fn check_text(text: &str) -> Result<()> {
    if text.len() <= MAX_TEXT {
        return Ok(());
    }
    let start: String = text.chars().take(60).collect();
    Err(Error::unsupported(format!(
        "the name `{start}...` has {} bytes, more than the {MAX_TEXT} that a package holds",
        text.len()
    )))
}

/// Append a number.
pub(super) fn put_number(mut v: u64, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

/// Reads numbers; knows how its column is called.
#[derive(Clone)]
pub(super) struct ColumnReader<'a> {
    what: &'static str,
    left: &'a [u8],
}

impl<'a> ColumnReader<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, left: bytes }
    }

    fn ends(&self) -> Error {
        Error::truncated(format!("the table ends within its {}", self.what))
    }

    pub(super) fn number(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for i in 0..self.left.len().min(10) {
            let byte = self.left[i];
            let bits = u64::from(byte & 0x7F);
            if (i == 9 && byte > 1) || (i > 0 && byte == 0) {
                return Err(Error::corrupt(format!("the table's {} hold a number that is none", self.what)));
            }
            value |= bits << (7 * i);
            if byte < 0x80 {
                self.left = &self.left[i + 1..];
                return Ok(value);
            }
        }
        Err(self.ends())
    }

    /// A number that counts things, of which there can be at most `most`.
    pub(super) fn count(&mut self, what: &str, most: usize) -> Result<usize> {
        let n = self.number()?;
        match usize::try_from(n) {
            Ok(n) if n <= most => Ok(n),
            _ => Err(Error::corrupt(format!("the table announces {n} {what}, but has room for {most}"))),
        }
    }

    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (now, later) = self.left.split_at_checked(n).ok_or_else(|| self.ends())?;
        self.left = later;
        Ok(now)
    }

    /// The next `n` numbers as a column of their own.
    pub(super) fn column(&mut self, what: &'static str, n: usize) -> Result<ColumnReader<'a>> {
        let mut rest = ColumnReader::new(what, self.left);
        let last = (0..self.left.len()).filter(|i| self.left[*i] < 0x80);
        let bytes = match n.checked_sub(1) {
            Some(n) => last.clone().nth(n).ok_or_else(|| rest.ends())? + 1,
            None => 0,
        };
        rest.left = self.take(bytes)?;
        Ok(rest)
    }

    /// Nothing is left over.
    pub(super) fn end(&self) -> Result<()> {
        match self.left.len() {
            0 => Ok(()),
            n => Err(Error::corrupt(format!("{n} bytes follow the table's {}", self.what))),
        }
    }
}

/// Texts on their way into a table.
#[derive(Debug, Default)]
pub(super) struct TextWriter {
    /// Whether a text is written without what the one before it begins with, too.
    share: bool,
    count: u64,
    /// Bytes that a reader will hold.
    pub(super) decoded: u64,
    common: Vec<u8>,
    lengths: Vec<u8>,
    bytes: Vec<u8>,
    last: Vec<u8>,
}

impl TextWriter {
    pub(super) fn new(share: bool) -> Self {
        Self { share, ..Self::default() }
    }

    /// # Errors
    /// `Unsupported` for a text that is too long.
    pub(super) fn push(&mut self, text: &str) -> Result<()> {
        check_text(text)?;
        let alike = self.last.iter().zip(text.as_bytes()).take_while(|(a, b)| a == b).count();
        let common = if self.share { alike } else { 0 };
        put_number(common as u64, &mut self.common);
        put_number((text.len() - common) as u64, &mut self.lengths);
        self.bytes.extend_from_slice(&text.as_bytes()[common..]);
        self.last.clear();
        self.last.extend_from_slice(text.as_bytes());
        self.count += 1;
        self.decoded += text.len() as u64;
        Ok(())
    }

    pub(super) fn finish(self, out: &mut Vec<u8>) {
        put_number(self.count, out);
        put_number(self.bytes.len() as u64, out);
        [self.common, self.lengths, self.bytes].iter().for_each(|column| out.extend_from_slice(column));
    }
}

/// The texts of a table, one after the other.
pub(super) struct TextReader<'a> {
    common: ColumnReader<'a>,
    lengths: ColumnReader<'a>,
    bytes: ColumnReader<'a>,
    last: Vec<u8>,
    left: usize,
    /// Bytes that may still be given out.
    room: u64,
}

impl<'a> TextReader<'a> {
    /// Texts that take at most `room` bytes in all.
    pub(super) fn new(from: &mut ColumnReader<'a>, room: u64) -> Result<Self> {
        let most = from.left.len();
        let count = from.count("texts", most)?;
        let bytes = from.count("bytes of texts", most)?;
        let (common, lengths) = (from.column("texts", count)?, from.column("texts", count)?);
        let bytes = ColumnReader::new("texts", from.take(bytes)?);
        Ok(Self { common, lengths, bytes, last: Vec::new(), left: count, room })
    }

    pub(super) fn next(&mut self) -> Result<String> {
        self.left = self.left.checked_sub(1).ok_or_else(|| Error::corrupt("the table lacks a text"))?;
        let common = self.common.count("bytes in common with the text before", self.last.len())?;
        let length = self.lengths.count("bytes of a text", MAX_TEXT - common)?;
        self.last.truncate(common);
        self.last.extend_from_slice(self.bytes.take(length)?);
        self.room = self.room.checked_sub(self.last.len() as u64).ok_or_else(|| {
            Error::corrupt("the table's texts are longer than a table of its length may hold")
        })?;
        let text = std::str::from_utf8(&self.last).map_err(|_| {
            Error::corrupt(format!("the table's name `{}` is not UTF-8", String::from_utf8_lossy(&self.last)))
        })?;
        Ok(text.to_owned())
    }

    /// Each text was asked for.
    pub(super) fn end(&self) -> Result<()> {
        if self.left > 0 {
            return Err(Error::corrupt(format!("the table holds {} texts too many", self.left)));
        }
        self.bytes.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_come_back_and_have_one_form() {
        let numbers = [0, 1, 127, 128, 300, 1 << 14, u64::from(u32::MAX), u64::MAX];
        let mut bytes = Vec::new();
        numbers.iter().for_each(|n| put_number(*n, &mut bytes));
        let mut reader = ColumnReader::new("numbers", &bytes);
        numbers.iter().for_each(|n| assert_eq!(reader.number().unwrap(), *n));
        reader.end().unwrap();
        let overlong: [&[u8]; 5] = [&[], &[0x80], &[0x80, 0], &[0xFF; 10], &[0xFF, 0x80, 0]];
        for bad in overlong {
            assert!(ColumnReader::new("numbers", bad).number().is_err(), "{bad:?}");
        }
        for share in [true, false] {
            let texts = ["", "model.layers.1.up", "model.layers.10.up", "Ü", "Ö", "Ö"];
            let (mut writer, mut bytes) = (TextWriter::new(share), Vec::new());
            texts.iter().for_each(|t| writer.push(t).unwrap());
            let room = writer.decoded;
            writer.finish(&mut bytes);
            for room in [room, room - 1] {
                let mut from = ColumnReader::new("texts", &bytes);
                let mut reader = TextReader::new(&mut from, room).unwrap();
                let read: Result<Vec<String>> = texts.iter().map(|_| reader.next()).collect();
                assert_eq!(read.is_ok(), room == texts.concat().len() as u64);
                if let Ok(read) = read {
                    assert_eq!(read, texts);
                    reader.end().unwrap();
                    from.end().unwrap();
                    assert!(reader.next().is_err());
                }
            }
        }
    }
}
