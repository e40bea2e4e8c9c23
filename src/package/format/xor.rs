//! Codec `xor`: one zstd frame over a whole tensor, decoded forwards from the file.

use super::container::SafeTensors;
use crate::error::{Error, Result};
use std::io;
use std::io::{BufReader, Read};
use std::ops::Range;

/// Bytes of a container as a stream.
struct Bytes<'a> {
    container: &'a SafeTensors,
    range: Range<u64>,
}

impl Read for Bytes<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = (self.range.end - self.range.start).min(out.len() as u64) as usize;
        self.container
            .read_at(self.range.start, &mut out[..n])
            .map_err(|e| io::Error::other(e.message().to_owned()))?;
        self.range.start += n as u64;
        Ok(n)
    }
}

type Decoder<'a> = zstd::stream::read::Decoder<'static, BufReader<Bytes<'a>>>;

/// The XOR bytes of a tensor, from the first to the last.
pub(crate) struct XorStream<'a> {
    decoder: Decoder<'a>,
    buffer: Vec<u8>,
    left: u64,
}

impl<'a> XorStream<'a> {
    /// A stream over the frame in `range`, which gives `total` bytes.
    pub(crate) fn new(container: &'a SafeTensors, range: Range<u64>, total: u64) -> Result<Self> {
        let fail = |e: io::Error| Error::corrupt(format!("zstd: {e}"));
        let bytes = BufReader::new(Bytes { container, range });
        let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(fail)?.single_frame();
        // The window is no larger than the bytes need. A frame may announce a larger one, but has not earned that memory.
        let log = 64 - total.saturating_sub(1).leading_zeros();
        decoder.window_log_max(log.clamp(20, 27)).map_err(fail)?;
        Ok(Self { decoder, buffer: Vec::new(), left: total })
    }

    /// XOR the next bytes into `words`.
    pub(crate) fn apply(&mut self, words: &mut [u8]) -> Result<()> {
        self.buffer.resize(words.len(), 0);
        let fail = |e: io::Error| Error::corrupt(format!("zstd: {e}"));
        self.decoder.read_exact(&mut self.buffer).map_err(fail)?;
        self.left = self.left.saturating_sub(words.len() as u64);
        if self.left == 0 && self.decoder.read(&mut [0]).map_err(fail)? > 0 {
            return Err(Error::corrupt("a zstd frame gives more bytes than it announces"));
        }
        let input = self.decoder.get_ref();
        if self.left == 0 && !(input.buffer().is_empty() && input.get_ref().range.is_empty()) {
            return Err(Error::corrupt("more than one whole zstd frame"));
        }
        words.iter_mut().zip(&self.buffer).for_each(|(w, x)| *w ^= x);
        Ok(())
    }
}
