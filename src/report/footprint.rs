//! What a fine-tune takes in each of the forms in which its weights can be kept: each form is made, piece by piece on several
//! threads, counted and dropped. Writes nothing, and holds a piece per thread (and zstd's tables for each tensor in hand). Must compare nothing: that is `strategies`.

use crate::codec::Prefer;
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Shape};
use crate::package::checkpoint::pairing::{Pairs, pair};
use crate::package::format::planes;
use crate::package::format::words::{PairSource, TensorWords};
use crate::package::io::aligned::Aligned;
use crate::package::io::ordered::{self, Crew};
use crate::package::io::pieces::Pieces;
use crate::package::jobs::encode::count_changed;
use crate::package::{Checkpoint, Run, TensorFile, TensorInfo};
use crate::resident::{self, Assembler, DeltaPiece, Estimate};
use crate::vector;
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The notebook's zstd level.
const ZSTD_LEVEL: i32 = 10;

/// Bytes of one fine-tune in each form. Tensors with the same bytes, such as tied ones, count once; tensors that are no
/// deltas (new, or of another dtype or shape than in the base) are in every form as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Where it is.
    pub path: String,
    /// Tensors, but for those that are the same as another.
    pub tensors: usize,
    /// How many of them are no deltas.
    pub alone: usize,
    /// How many of them equal the base's.
    pub unchanged: usize,
    /// Words of all deltas.
    pub words: u64,
    /// Words that differ from the base.
    pub changed: u64,
    /// Bytes of the fine-tune itself; of the XOR kept as it is, too.
    pub bytes: u64,
    /// How many of these bytes belong to tensors that are no deltas.
    pub alone_bytes: u64,
    /// With resident deltas, as `delta_encode(prefer="memory")` makes them.
    pub memory_bytes: u64,
    /// With resident deltas, as `delta_encode(prefer="speed")` makes them.
    pub speed_bytes: u64,
    /// With zstd of the XOR at level 10, as `pack --codec xor` stores it; `None` where it was not asked for.
    pub zstd_bytes: Option<u64>,
    /// With a word and two indices of 32 bits for every changed word.
    pub coo32_bytes: u64,
    /// With a word and two indices of 64 bits for every changed word.
    pub coo64_bytes: u64,
    /// Why most of it is no delta, where that is so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Footprint {
    fn add(&mut self, t: &Sizes) {
        self.tensors += 1;
        self.words += t.words;
        self.changed += t.changed;
        self.unchanged += usize::from(t.delta && t.changed == 0);
        self.alone += usize::from(!t.delta);
        self.alone_bytes += if t.delta { 0 } else { t.bytes };
        self.bytes += t.bytes;
        self.memory_bytes += t.resident[0];
        self.speed_bytes += t.resident[1];
        self.zstd_bytes = self.zstd_bytes.map(|z| z + t.zstd);
        self.coo32_bytes += t.coo[0];
        self.coo64_bytes += t.coo[1];
    }
}

/// One tensor in each form.
#[derive(Default)]
struct Sizes {
    delta: bool,
    words: u64,
    changed: u64,
    bytes: u64,
    /// Bytes of the resident delta, encoded for memory and for speed.
    resident: [u64; 2],
    zstd: u64,
    /// Bytes as COO, with indices of 32 and of 64 bits.
    coo: [u64; 2],
}

impl Sizes {
    fn alone(bytes: u64) -> Self {
        Self { bytes, resident: [bytes; 2], zstd: bytes, coo: [bytes; 2], ..Self::default() }
    }
}

/// Measure the fine-tune at `path` against `base`. `zstd` says whether its form is made too: it takes most of the time.
pub(crate) fn footprint(
    base: &Checkpoint,
    path: &Path,
    strip_prefix: Option<&str>,
    zstd: bool,
    run: &Run<'_>,
) -> Result<Footprint> {
    let ft = Checkpoint::open_base(path)?;
    let Pairs { bases, same, lonely, .. } = pair(base, &ft, strip_prefix)?;
    let mut tensors = Vec::new();
    for (f, file) in ft.files().iter().enumerate() {
        for (i, info) in
            file.tensors.header().tensors.iter().enumerate().filter(|(i, _)| same[f][*i].is_none())
        {
            let delta = bases[f][i].as_ref().zip(info.matrix());
            let delta = delta.map(|(base_of, (dtype, shape))| (dtype, shape, base_of.words(base)));
            tensors.push(Tensor { file, info, delta, zstd, run });
        }
    }
    // Large tensors first, so that no large one is begun when all others are done.
    tensors.sort_by_key(|t| std::cmp::Reverse(t.info.bytes()));
    run.begin("estimate", tensors.iter().map(|t| t.info.bytes()).sum());
    let path = path.display().to_string();
    let sum =
        Footprint { path, zstd_bytes: zstd.then_some(0), advice: lonely.advice(), ..Footprint::default() };
    let sum = Mutex::new(sum);
    ordered::side_by_side(ordered::threads(run.jobs), tensors.len(), |i, crew| {
        let sizes = tensors[i].measure(crew).map_err(|e| tensors[i].named(e))?;
        sum.lock().unwrap_or_else(PoisonError::into_inner).add(&sizes);
        Ok(())
    })?;
    base.files().iter().chain(ft.files()).try_for_each(TensorFile::check_unchanged)?;
    Ok(sum.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Bytes of a checkpoint's weights, tensors with the same bytes once.
pub(crate) fn weight_bytes(base: &Checkpoint) -> Result<u64> {
    let same = pair(base, base, None)?.same;
    let files = base.files().iter().zip(&same);
    let all = files.flat_map(|(file, same)| file.tensors.header().tensors.iter().zip(same));
    Ok(all.filter(|(_, same)| same.is_none()).map(|(t, _)| t.bytes()).sum())
}

struct Tensor<'a> {
    file: &'a TensorFile,
    info: &'a TensorInfo,
    /// Words, matrix and base, where it is a delta.
    delta: Option<(Dtype, Shape, TensorWords<'a>)>,
    zstd: bool,
    run: &'a Run<'a>,
}

/// What a thread keeps from piece to piece.
#[derive(Default)]
struct CountScratch {
    base: Aligned,
    fine_tuned: Aligned,
    pieces: Vec<DeltaPiece>,
    difference: Vec<u8>,
}

impl Tensor<'_> {
    fn named(&self, e: Error) -> Error {
        e.of_tensor(&self.info.name).within(self.file.place.display())
    }

    fn measure(&self, crew: &Crew) -> Result<Sizes> {
        let bytes = self.info.bytes();
        let Some((dtype, shape, base)) = self.delta else {
            self.run.advance(bytes)?;
            return Ok(Sizes::alone(bytes));
        };
        let fine_tuned = TensorWords::File(&self.file.tensors, self.info);
        let source = PairSource { dtype, shape, base, fine_tuned };
        let job =
            CountJob { source, pieces: Pieces::new(dtype, shape, fine_tuned.len()?), crew, tensor: self };
        let (resident, changed, zstd) = job.resident()?;
        let coo = [4, 8].map(|index| changed * (dtype.word_bytes() as u64 + 2 * index));
        let words = shape.words()? as u64;
        Ok(Sizes { delta: true, words, changed, bytes, resident, zstd, coo })
    }
}

const PREFERENCES: [Prefer; 2] = [Prefer::Memory, Prefer::Speed];

/// One delta being counted.
struct CountJob<'a> {
    source: PairSource<'a>,
    pieces: Pieces,
    crew: &'a Crew,
    tensor: &'a Tensor<'a>,
}

impl<'a> CountJob<'a> {
    fn source(&self) -> PairSource<'a> {
        let PairSource { dtype, shape, base, fine_tuned } = self.source;
        PairSource { dtype, shape, base, fine_tuned }
    }

    /// Bytes of the resident delta for each preference, words changed, bytes of the XOR's zstd frame.
    fn resident(&self) -> Result<([u64; 2], u64, u64)> {
        if !self.pieces.tiled() {
            return self.by_tiles();
        }
        let [memory, speed] = PREFERENCES;
        let sampled =
            [vector::estimate(&mut self.source(), memory)?, vector::estimate(&mut self.source(), speed)?];
        let one = sampled[0].plan == sampled[1].plan;
        let (made, changed, zstd) = self.pass(&sampled[..if one { 1 } else { 2 }], false)?;
        let mut sizes = [made[0], made[made.len() - 1]];
        for (i, prefer) in PREFERENCES.into_iter().enumerate() {
            if sampled[i].is_off(sizes[i]) {
                let exact = vector::estimate_exactly(&mut self.source(), prefer)?;
                sizes[i] = self.pass(&[exact], true)?.0[0];
            }
        }
        Ok((sizes, changed, zstd))
    }

    /// Where rows are too long for pieces of whole tiles, as `delta_encode` does it, but that the payload is not kept.
    fn by_tiles(&self) -> Result<([u64; 2], u64, u64)> {
        let (_, changed, zstd) = self.pass(&[], false)?;
        let mut sizes = [0; 2];
        for (size, prefer) in sizes.iter_mut().zip(PREFERENCES) {
            *size = resident::encoded_bytes(&mut self.source(), prefer)?;
        }
        Ok((sizes, changed, zstd))
    }

    /// Make every piece by each plan: bytes of each delta, words changed, bytes of the XOR's frame if it is asked for.
    /// `again` is for the resident delta alone: the frame and the progress have been seen to.
    fn pass(&self, plans: &[Estimate], again: bool) -> Result<(Vec<u64>, u64, u64)> {
        let PairSource { dtype, base, fine_tuned, .. } = self.source;
        let zstd = self.tensor.zstd && !again;
        let assemblers = plans.iter().map(|e| Assembler::new(dtype, &e.plan));
        let mut assemblers = assemblers.collect::<Result<Vec<_>>>()?;
        let mut frame = if zstd { Some(Frame::new(fine_tuned.len()?)?) } else { None };
        let mut changed = 0;
        ordered::in_order::<CountScratch>(
            self.crew,
            self.pieces.count(),
            |index, s| {
                let range = self.pieces.bytes(index);
                let (b, f) =
                    (base.get(range.clone(), &mut s.base)?, fine_tuned.get(range, &mut s.fine_tuned)?);
                s.pieces.resize_with(plans.len(), DeltaPiece::default);
                for (e, piece) in plans.iter().zip(&mut s.pieces) {
                    piece.clear();
                    vector::encode_tiles(
                        &e.plan,
                        dtype,
                        self.pieces.tiles(&e.plan.grid, index),
                        b,
                        f,
                        piece,
                    )?;
                }
                if zstd {
                    planes::xor(b, f, &mut s.difference);
                }
                Ok(())
            },
            |index, s| {
                let range = self.pieces.bytes(index);
                let (b, f) = (base.kept(range.clone(), &s.base), fine_tuned.kept(range, &s.fine_tuned));
                changed += match s.pieces.first() {
                    Some(piece) => piece.changed,
                    None => count_changed(dtype, b, f),
                };
                assemblers.iter_mut().zip(&s.pieces).try_for_each(|(a, p)| a.add(p))?;
                if let Some(frame) = &mut frame {
                    frame.zstd.write_all(&s.difference)?;
                }
                if !again {
                    self.tensor.run.advance(f.len() as u64)?;
                }
                Ok(())
            },
        )?;
        let sizes = assemblers.iter().map(Assembler::bytes).collect();
        Ok((sizes, changed, frame.map_or(Ok(0), Frame::bytes)?))
    }
}

/// A zstd frame of which nothing but the length is kept, made as `pack --codec xor` makes it.
struct Frame {
    zstd: zstd::stream::write::Encoder<'static, Counter>,
    raw: usize,
}

impl Frame {
    fn new(raw: usize) -> Result<Self> {
        let mut zstd = zstd::stream::write::Encoder::new(Counter(0), ZSTD_LEVEL)?;
        zstd.set_pledged_src_size(Some(raw as u64))?;
        Ok(Self { zstd, raw })
    }

    /// A tensor without words is stored without a frame.
    fn bytes(self) -> Result<u64> {
        if self.raw == 0 { Ok(0) } else { Ok(self.zstd.finish()?.0) }
    }
}

struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
