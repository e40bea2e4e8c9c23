//! A warp: 32 lanes in step. Lanes that a branch parts run one part after the other and meet again where `flow.rs` says.
//! What was never written may be carried about and thrown away, but decides no branch, makes no address, and goes to no device
//! memory.

use crate::arith::Lanes;
use crate::collective::{Fragment, matrices, multiply, shuffled};
use crate::memory::{Loaded, Memory};
use crate::ops::{Address, Instruction, Kernel, Op, Operand, Space, Special};
use crate::races::Who;
use crate::registers::{FULL, Registers, lanes_of};

/// Of a warp, between two barriers of its block: more is a hang.
const MOST_STEPS: u64 = 20_000_000;

/// What the whole grid shares.
pub(crate) struct Grid<'k> {
    pub(crate) kernel: &'k Kernel,
    /// Parameters as the driver packs them.
    pub(crate) params: Vec<u64>,
    pub(crate) blocks: (u32, u32),
}

/// Lanes that run together until they come to where others wait.
struct Part {
    at: u32,
    meets: u32,
    lanes: u32,
}

/// An asynchronous copy under way.
struct Flight {
    lane: u32,
    to: u64,
    bytes: [u8; 16],
    /// Its group, once that has ended.
    group: Option<u32>,
}

/// Why a warp stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    Barrier,
    /// A barrier that asks whether any thread says yes: the predicate, and its answer.
    Any {
        p: u32,
        says: bool,
    },
    Done,
}

pub(crate) struct Warp<'k> {
    grid: &'k Grid<'k>,
    block: (u32, u32),
    first_thread: u32,
    registers: Registers,
    parts: Vec<Part>,
    who: Who,
    flights: Vec<Flight>,
    groups: [u32; 32],
}

type Done<T> = Result<T, String>;

impl<'k> Warp<'k> {
    pub(crate) fn new(grid: &'k Grid<'k>, warp: u32) -> Self {
        Self {
            grid,
            block: (0, 0),
            first_thread: 32 * warp,
            registers: Registers::new(grid.kernel.values, grid.kernel.predicates),
            parts: vec![],
            who: Who::default(),
            flights: vec![],
            groups: [0; 32],
        }
    }

    /// At the first instruction of a block; what is in registers is of nobody.
    pub(crate) fn begin(&mut self, block: (u32, u32)) {
        let number = block.1 * self.grid.blocks.0 + block.0;
        self.block = block;
        self.who = Who { block: number, epoch: 1, warp_epoch: 0, thread: 0 };
        self.registers.forget();
        self.parts = vec![Part { at: 0, meets: u32::MAX, lanes: FULL }];
        self.flights.clear();
        self.groups = [0; 32];
    }

    /// The block's barrier is behind it; of one that asked, the answer.
    pub(crate) fn pass(&mut self, stop: Stop, answer: bool) {
        self.who.epoch += 1;
        if let Stop::Any { p, .. } = stop {
            self.registers.decide(p, if answer { FULL } else { 0 }, 0, FULL);
        }
    }

    /// On to the next barrier, or the end.
    ///
    /// # Errors
    /// What went wrong, and where.
    pub(crate) fn run(&mut self, memory: &mut Memory) -> Done<Stop> {
        for _ in 0..MOST_STEPS {
            let Some(part) = self.parts.last() else { return Ok(Stop::Done) };
            if part.at == part.meets {
                self.parts.pop();
                continue;
            }
            let (at, lanes) = (part.at, part.lanes);
            let kernel = self.grid.kernel;
            let one = &kernel.code[at as usize];
            let stop = self.step(one, at, lanes, memory);
            let stop = stop.map_err(|e| {
                let (name, line) = (&kernel.name, one.line);
                let (block, warp) = (self.block, self.first_thread / 32);
                format!(
                    "{name}, block {block:?}, warp {warp}, lanes {lanes:#x}, line {line}, {}: {e}",
                    one.name
                )
            })?;
            if let Some(stop) = stop {
                return Ok(stop);
            }
        }
        Err(format!("{}: more than {MOST_STEPS} instructions between two barriers", self.grid.kernel.name))
    }

    fn step(&mut self, one: &Instruction, at: u32, lanes: u32, memory: &mut Memory) -> Done<Option<Stop>> {
        let mut on = lanes;
        if let Some((p, negated)) = one.guard {
            let (truth, unsure) = self.registers.predicate(p);
            if unsure & lanes != 0 {
                return Err("is under a predicate that was never written".into());
            }
            on &= if negated { !truth } else { truth };
        }
        match one.op {
            Op::Branch { to } => {
                self.branch(one, (at, to), lanes, on);
                return Ok(None);
            }
            Op::Return if on == FULL && self.parts.len() == 1 => self.parts.clear(),
            Op::Return => return Err("some lanes end before others".into()),
            _ => self.go(at + 1),
        }
        match &one.op {
            Op::BlockSync => self.whole(on).map(|()| Some(Stop::Barrier)),
            Op::BlockAny { p, a } => {
                self.whole(on)?;
                let (truth, unsure) = self.registers.predicate(*a);
                if unsure != 0 {
                    return Err("asks of a predicate that was never written".into());
                }
                Ok(Some(Stop::Any { p: *p, says: truth != 0 }))
            }
            Op::Return => Ok(Some(Stop::Done)),
            op if on != 0 => self.execute(op, on, memory).map(|()| None),
            _ => Ok(None),
        }
    }

    fn go(&mut self, to: u32) {
        if let Some(part) = self.parts.last_mut() {
            part.at = to;
        }
    }

    fn branch(&mut self, one: &Instruction, (at, to): (u32, u32), lanes: u32, taken: u32) {
        match taken {
            0 => self.go(at + 1),
            all if all == lanes => self.go(to),
            _ => {
                self.go(one.meets);
                self.parts.push(Part { at: at + 1, meets: one.meets, lanes: lanes & !taken });
                self.parts.push(Part { at: to, meets: one.meets, lanes: taken });
            }
        }
    }

    /// Instructions that are `.aligned`, and members of a mask, need every lane.
    fn whole(&self, on: u32) -> Done<()> {
        if on == FULL { Ok(()) } else { Err("not every lane of the warp takes part".into()) }
    }

    fn members(&self, on: u32, mask: Operand) -> Done<()> {
        self.whole(on)?;
        let (mask, unknown) = self.registers.read(mask);
        let all = mask.iter().all(|mask| *mask as u32 == FULL) && unknown == 0;
        if all { Ok(()) } else { Err("its mask does not name every lane, all of which come".into()) }
    }

    fn execute(&mut self, op: &Op, on: u32, memory: &mut Memory) -> Done<()> {
        match op {
            Op::One { .. }
            | Op::Two { .. }
            | Op::Three { .. }
            | Op::Insert { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. } => self.registers.compute(op, on),
            Op::Compare { .. } | Op::Logic { .. } | Op::Not { .. } | Op::Truth { .. } | Op::Select { .. } => {
                self.registers.judge(op, on);
                Ok(())
            }
            Op::Param { d, at } => {
                self.registers.write(*d, &[self.grid.params[*at]; 32], 0, on);
                Ok(())
            }
            Op::Special { d, what } => {
                self.registers.write(*d, &self.special(*what), 0, on);
                Ok(())
            }
            Op::Load { .. } => self.load(op, on, memory),
            Op::Store { space, bytes, from, at } => self.store((*space, *bytes), from, *at, on, memory),
            Op::Atomic { .. } => self.atomic(op, on, memory),
            Op::Copy { to, from } => self.set_out(*to, *from, on, memory),
            Op::EndGroup => {
                self.end_group(on);
                Ok(())
            }
            Op::WaitGroups { left } => self.land(on, *left, memory),
            Op::Prefetch => Ok(()),
            _ => self.together(op, on, memory),
        }
    }

    fn special(&self, what: Special) -> Lanes {
        match what {
            Special::Thread => std::array::from_fn(|lane| u64::from(self.first_thread) + lane as u64),
            Special::BlockX => [self.block.0.into(); 32],
            Special::BlockY => [self.block.1.into(); 32],
            Special::BlocksX => [self.grid.blocks.0.into(); 32],
            Special::BlocksY => [self.grid.blocks.1.into(); 32],
        }
    }

    fn by(&self, lane: u32) -> Who {
        Who { thread: self.first_thread + lane, ..self.who }
    }

    fn load(&mut self, op: &Op, on: u32, memory: &mut Memory) -> Done<()> {
        let Op::Load { space, bytes, signed, d, at, used } = op else { unreachable!("no load") };
        let at = self.registers.addresses(*at, on)?;
        let mut words: [Loaded; 4] = Default::default();
        let words = &mut words[..d.len()];
        for lane in lanes_of(on) {
            memory.load(*space, at[lane as usize], (*bytes, *used), self.by(lane), words)?;
            for (to, (word, known)) in d.iter().zip(words.iter()) {
                let word = if *signed { *word as u32 as i32 as u64 } else { *word };
                self.registers.put(*to, lane, word, *known);
            }
        }
        Ok(())
    }

    fn store(
        &self,
        (space, bytes): (Space, u32),
        from: &[Operand],
        at: Address,
        on: u32,
        memory: &mut Memory,
    ) -> Done<()> {
        let at = self.registers.addresses(at, on)?;
        let from: Vec<_> = from.iter().map(|from| self.registers.read(*from)).collect();
        let mut words: [Loaded; 4] = Default::default();
        for lane in lanes_of(on) {
            let word = |from: &(Lanes, u32)| (from.0[lane as usize], from.1 >> lane & 1 == 0);
            words.iter_mut().zip(&from).for_each(|(to, from)| *to = word(from));
            memory.store(space, at[lane as usize], bytes, self.by(lane), &words[..from.len()])?;
        }
        Ok(())
    }

    fn atomic(&mut self, op: &Op, on: u32, memory: &mut Memory) -> Done<()> {
        let Op::Atomic { f, space, d, at, a } = *op else { unreachable!("no atomic") };
        let (at, (a, unknown)) = (self.registers.addresses(at, on)?, self.registers.read(a));
        if unknown & on != 0 {
            return Err("an atomic with what was never written".into());
        }
        let mut before = [0; 32];
        for lane in lanes_of(on) {
            let i = lane as usize;
            before[i] = memory.atomic((space, f), at[i], a[i] as u32, self.by(lane))?.into();
        }
        self.registers.write(d, &before, 0, on);
        Ok(())
    }

    fn set_out(&mut self, to: Address, from: Address, on: u32, memory: &mut Memory) -> Done<()> {
        let (to, from) = (self.registers.addresses(to, on)?, self.registers.addresses(from, on)?);
        for lane in lanes_of(on) {
            let i = lane as usize;
            let bytes = memory.set_out(to[i], from[i], self.by(lane))?;
            self.flights.push(Flight { lane, to: to[i], bytes, group: None });
        }
        Ok(())
    }

    /// Copies since the last one of a lane are a group (PTX ISA, cp.async.commit_group).
    fn end_group(&mut self, on: u32) {
        for flight in self.flights.iter_mut().filter(|f| f.group.is_none() && on >> f.lane & 1 == 1) {
            flight.group = Some(self.groups[flight.lane as usize]);
        }
        lanes_of(on).for_each(|lane| self.groups[lane as usize] += 1);
    }

    /// Groups of copies have landed, but for the last `left` of each lane; what is in no group has not.
    fn land(&mut self, on: u32, left: u32, memory: &mut Memory) -> Done<()> {
        let (groups, flights) = (self.groups, std::mem::take(&mut self.flights));
        let lands =
            |f: &Flight| on >> f.lane & 1 == 1 && f.group.is_some_and(|g| g + left < groups[f.lane as usize]);
        let (landed, under_way): (Vec<_>, _) = flights.into_iter().partition(lands);
        self.flights = under_way;
        landed.into_iter().try_for_each(|f| memory.arrive(f.to, f.bytes, self.by(f.lane)))
    }

    /// What the lanes of a warp do together.
    fn together(&mut self, op: &Op, on: u32, memory: &mut Memory) -> Done<()> {
        match *op {
            Op::WarpSync { mask } => {
                self.members(on, Operand::Number(mask))?;
                self.who.warp_epoch += 1;
            }
            Op::Ballot { d, p, mask } => {
                self.members(on, mask)?;
                let (truth, unsure) = self.registers.predicate(p);
                self.registers.write(d, &[truth.into(); 32], if unsure == 0 { 0 } else { FULL }, on);
            }
            Op::Shuffle { across, d, p, a, b, c, mask } => {
                self.members(on, mask)?;
                let [a, b, c] = [a, b, c].map(|of| self.registers.read(of));
                let (value, inside) = shuffled(across, &a, &b, &c);
                self.registers.write(d, &value.0, value.1, on);
                self.registers.decide(p, inside, b.1 | c.1, on);
            }
            Op::Matrices { turned, d, at } => {
                self.whole(on)?;
                let rows = self.matrix_rows(at, memory)?;
                self.put_all(d, &matrices(turned, &rows));
            }
            Op::Multiply { of, d, a, b, c } => {
                self.whole(on)?;
                let fragment = |at: u32| -> Fragment { self.registers.read(Operand::Register(at)) };
                let found = multiply(of, &a.map(fragment), &b.map(fragment), &c.map(fragment));
                self.put_all(d, &found);
            }
            _ => unreachable!("no operation of a warp"),
        }
        Ok(())
    }

    fn put_all(&mut self, d: [u32; 4], found: &[Fragment; 4]) {
        d.iter().zip(found).for_each(|(d, found)| self.registers.write(*d, &found.0, found.1, FULL));
    }

    /// Each lane's row of eight words of 16 bits (PTX ISA, ldmatrix: rows are aligned to their 16 bytes).
    fn matrix_rows(&self, at: Address, memory: &mut Memory) -> Done<[[Loaded; 8]; 32]> {
        let at = self.registers.addresses(at, FULL)?;
        let mut rows = [[(0, false); 8]; 32];
        for (lane, row) in (0..).zip(&mut rows) {
            if !at[lane as usize].is_multiple_of(16) {
                return Err("a row of a matrix begins at no multiple of 16".into());
            }
            for (i, word) in (0..).zip(row) {
                let (place, by) = (at[lane as usize] + 2 * i, self.by(lane));
                memory.load(Space::Shared, place, (2, FULL), by, std::slice::from_mut(word))?;
            }
        }
        Ok(rows)
    }
}
