//! Several fine-tunes along one base: their files' tensors in the order of the base's, piece after piece, so that what one of
//! them reads of the base serves all. Each goes into a package of its own, and fails alone.

use super::append::OpenTensor;
use super::encode::{EncodeScratch, TensorJob};
use super::pack::{Pack, file_part, sha256_begun};
use crate::error::{Error, Result};
use crate::package::checkpoint::files::{CarriedFile, TensorFile};
use crate::package::checkpoint::pairing::Paired;
use crate::package::format::contents::ContentsPart;
use crate::package::format::totals::Report;
use crate::package::io::lanes::in_lanes;
use crate::package::io::ordered;
use crate::package::io::spool::Spool;
use crate::package::options::{Destination, PackOptions, Run};
use sha2::{Digest as _, Sha256};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What the buffer of a spool holds, of which there are many here.
const SPOOL_ROOM: usize = 64 << 10;

/// A fine-tune that is planned, and where its package goes.
pub(super) struct Walker<'a> {
    pub(super) pack: Pack<'a>,
    pub(super) package: &'a Path,
}

/// Pack all of them. What became of each, in their order.
///
/// # Errors
/// `Io` if the caller has had enough; whatever else happens concerns one of them.
pub(super) fn walk(
    walkers: &[Walker<'_>],
    options: &PackOptions,
    run: &Run<'_>,
) -> Result<Vec<Result<Report>>> {
    let mut ends: Vec<OnceLock<Result<Report>>> = walkers.iter().map(|_| OnceLock::new()).collect();
    let mut lanes = Vec::new();
    for (w, walker) in walkers.iter().enumerate() {
        match lanes_of(w, walker) {
            Ok(found) => lanes.extend(found),
            Err(e) => drop(ends[w].set(Err(e))),
        }
    }
    run.begin("pack", lanes.iter().map(WalkLane::bytes).sum());
    let left = |w: usize| AtomicUsize::new(lanes.iter().filter(|lane| lane.walker == w).count());
    let states = lanes.iter().map(|_| Mutex::default()).collect();
    let left = (0..walkers.len()).map(left).collect();
    let walk = FleetWalk { walkers, lanes: &lanes, states, left, ends: &ends, options, run };
    walk.all()?;
    drop(walk);
    let lost = || Err(Error::internal("a fine-tune was left out"));
    Ok(ends.iter_mut().map(|end| end.take().unwrap_or_else(lost)).collect())
}

/// A file of a fine-tune, which is read from its start to its end.
struct WalkLane<'a> {
    walker: usize,
    what: LaneFile<'a>,
}

enum LaneFile<'a> {
    /// Tensors, and their pieces in order: where in the base its words are, which tensor, which piece.
    Tensors { file: &'a TensorFile, jobs: Vec<TensorJob<'a>>, pieces: Vec<(Place, usize, usize)> },
    /// A file that is carried along.
    Carried(&'a CarriedFile),
}

/// A place in the base: file and byte; the first of all where there is none.
type Place = (usize, u64);

fn lanes_of<'a>(w: usize, walker: &'a Walker<'_>) -> Result<Vec<WalkLane<'a>>> {
    let pack = &walker.pack;
    let mut lanes = Vec::new();
    for (f, file) in pack.ft.files().iter().enumerate() {
        let jobs = pack.jobs(f, file).map_err(|e| e.within(file.place.display()))?;
        let mut pieces = Vec::new();
        for (j, job) in jobs.iter().enumerate() {
            let paired = pack.bases[f][j].as_ref().filter(|_| job.delta.is_some());
            let at = |c: usize| paired.and_then(|p| pack.place(p, job.pieces.bytes(c).start as u64));
            pieces.extend((0..job.pieces.count()).map(|c| (at(c).unwrap_or_default(), j, c)));
        }
        lanes.push(WalkLane { walker: w, what: LaneFile::Tensors { file, jobs, pieces } });
    }
    lanes.extend(pack.ft.carried().iter().map(|file| WalkLane { walker: w, what: LaneFile::Carried(file) }));
    Ok(lanes)
}

impl Pack<'_> {
    /// Where byte `at` of a tensor's base lies.
    fn place(&self, paired: &Paired<'_>, at: u64) -> Option<Place> {
        match paired {
            Paired::Whole((f, b)) => Some((*f, b.range.start + at)),
            Paired::Parts(parts) => {
                let (parts, at) = parts.at_byte(at);
                let here = parts.first()?;
                let (f, b) = self.base.find_near(here.name.as_deref()?, here.file.as_deref(), |_| true)?;
                Some((f, b.range.start + here.at + at))
            }
        }
    }
}

impl WalkLane<'_> {
    fn bytes(&self) -> u64 {
        match &self.what {
            LaneFile::Tensors { file, .. } => file.tensors.file_bytes(),
            LaneFile::Carried(file) => file.bytes,
        }
    }

    fn items(&self) -> usize {
        match &self.what {
            LaneFile::Tensors { pieces, .. } => pieces.len(),
            LaneFile::Carried(_) => 1,
        }
    }

    fn place(&self, item: usize) -> Place {
        match &self.what {
            LaneFile::Tensors { pieces, .. } => pieces[item].0,
            LaneFile::Carried(_) => Place::default(),
        }
    }
}

/// The items of all lanes, each lane's in order, and as far as that goes in the order of their places in the base.
fn order(lanes: &[WalkLane<'_>]) -> Vec<(usize, usize)> {
    let next = |lane: usize, item: usize| Reverse((lanes[lane].place(item), lane, item));
    let begun = (0..lanes.len()).filter(|&lane| lanes[lane].items() > 0).map(|lane| next(lane, 0));
    let mut heap: BinaryHeap<_> = begun.collect();
    let mut out = Vec::new();
    while let Some(Reverse((_, lane, item))) = heap.pop() {
        out.push((lane, item));
        if item + 1 < lanes[lane].items() {
            heap.push(next(lane, item + 1));
        }
    }
    out
}

/// A lane's file as far as it is stored.
#[derive(Default)]
struct LaneState<'a> {
    open: Option<OpenFile<'a>>,
    part: Option<ContentsPart>,
}

struct OpenFile<'a> {
    sha: Sha256,
    part: ContentsPart,
    tensor: Option<OpenTensor<'a>>,
}

/// What a thread keeps from item to item.
#[derive(Default)]
struct WalkScratch {
    encode: EncodeScratch,
    part: Option<ContentsPart>,
    error: Option<Error>,
}

struct FleetWalk<'a> {
    walkers: &'a [Walker<'a>],
    lanes: &'a [WalkLane<'a>],
    states: Vec<Mutex<LaneState<'a>>>,
    /// Files of each that are not stored yet.
    left: Vec<AtomicUsize>,
    ends: &'a [OnceLock<Result<Report>>],
    options: &'a PackOptions,
    run: &'a Run<'a>,
}

impl<'a> FleetWalk<'a> {
    fn all(&self) -> Result<()> {
        // Files without tensors, and packages of nothing else.
        for (lane, _) in self.lanes.iter().enumerate().filter(|(_, lane)| lane.items() == 0) {
            self.closed(lane)?;
        }
        let order = order(self.lanes);
        let lanes: Vec<usize> = order.iter().map(|&(lane, _)| lane).collect();
        in_lanes::<WalkScratch>(
            ordered::threads(self.run.jobs),
            &lanes,
            |i, s| {
                s.error = self.make(order[i], s).err();
                Ok(())
            },
            |i, s| self.take(order[i], s),
        )
    }

    fn failed(&self, lane: usize) -> bool {
        self.ends[self.lanes[lane].walker].get().is_some()
    }

    fn make(&self, (lane, item): (usize, usize), s: &mut WalkScratch) -> Result<()> {
        if self.failed(lane) {
            return Ok(());
        }
        match &self.lanes[lane].what {
            LaneFile::Tensors { file, jobs, pieces } => {
                let (_, j, c) = pieces[item];
                let made = jobs[j].make(c, self.options, &mut s.encode);
                made.map_err(|e| e.within(file.place.display()))
            }
            LaneFile::Carried(file) => {
                s.part = Some(self.walkers[self.lanes[lane].walker].pack.carried_file(file)?);
                Ok(())
            }
        }
    }

    /// Store what was made; an error ends one fine-tune, unless the caller has had enough.
    fn take(&self, (lane, item): (usize, usize), s: &mut WalkScratch) -> Result<()> {
        self.run.go_on()?;
        let error = s.error.take();
        if self.failed(lane) {
            *self.state(lane) = LaneState::default();
            return Ok(());
        }
        let taken = error.map_or_else(|| self.stored(lane, item, s), Err);
        self.run.go_on()?;
        if let Err(e) = taken {
            self.end(lane, Err(e));
            *self.state(lane) = LaneState::default();
            return Ok(());
        }
        if item + 1 == self.lanes[lane].items() { self.closed(lane) } else { Ok(()) }
    }

    fn state(&self, lane: usize) -> MutexGuard<'_, LaneState<'a>> {
        self.states[lane].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, lane: usize, how: Result<Report>) {
        // Of several errors the first is told.
        let _ = self.ends[self.lanes[lane].walker].set(how);
    }

    fn stored(&self, lane: usize, item: usize, s: &mut WalkScratch) -> Result<()> {
        let mut state = self.state(lane);
        let LaneFile::Tensors { file, jobs, pieces } = &self.lanes[lane].what else {
            state.part = s.part.take();
            return Ok(());
        };
        let open = match &mut state.open {
            Some(open) => open,
            none => none.insert(self.opened(lane, file)?),
        };
        let ((_, j, c), s) = (pieces[item], &mut s.encode);
        let job: &'a TensorJob<'a> = &jobs[j];
        if c == 0 {
            open.tensor = Some(job.open(self.options, &mut open.part.spool)?);
        }
        open.sha.update(s.fine_tuned());
        self.run.advance(s.fine_tuned().len() as u64)?;
        if let Some(tensor) = &mut open.tensor {
            tensor.take(c, &mut open.part.spool, s)?;
        }
        if let Some(tensor) = open.tensor.take_if(|_| c + 1 == job.pieces.count()) {
            tensor.finish(&mut open.part)?;
        }
        Ok(())
    }

    fn opened(&self, lane: usize, file: &TensorFile) -> Result<OpenFile<'a>> {
        let beside = self.walkers[self.lanes[lane].walker].package;
        let spool = Spool::create(Some(beside))?.with_room(SPOOL_ROOM);
        Ok(OpenFile { sha: sha256_begun(file), part: ContentsPart::new(spool), tensor: None })
    }

    /// All of a lane's file is stored; with the last one of a fine-tune, its package is written.
    fn closed(&self, lane: usize) -> Result<()> {
        let walker = self.lanes[lane].walker;
        if let Err(e) = self.part(lane) {
            self.end(lane, Err(e));
        }
        if self.left[walker].fetch_sub(1, Ordering::AcqRel) == 1 && !self.failed(lane) {
            let written = self.write(walker);
            self.run.go_on()?;
            self.end(lane, written);
        }
        Ok(())
    }

    fn part(&self, lane: usize) -> Result<()> {
        let mut state = self.state(lane);
        if let LaneFile::Tensors { file, .. } = &self.lanes[lane].what {
            let open = state.open.take().map_or_else(|| self.opened(lane, file), Ok)?;
            state.part = Some(file_part(file, open.sha, open.part)?);
        }
        Ok(())
    }

    fn write(&self, walker: usize) -> Result<Report> {
        let mut parts = Vec::new();
        for (lane, _) in self.lanes.iter().enumerate().filter(|(_, lane)| lane.walker == walker) {
            let mut state = self.state(lane);
            parts.push(state.part.take().ok_or_else(|| Error::internal("a file was left out"))?);
        }
        self.walkers[walker].pack.write(parts, Destination::Path(self.walkers[walker].package))
    }
}
