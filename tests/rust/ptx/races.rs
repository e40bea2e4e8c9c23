//! Who touched a byte of memory last, and whether what orders two threads lies between: `bar.sync` for the threads of a
//! block, `bar.warp.sync` for those of a warp (PTX ISA, bar.sync and bar.warp.sync: both order memory among those that take part; `shfl`, `vote`,
//! `ldmatrix` and `mma` do not). Nothing orders two blocks. Accesses are races unless ordered, both reads, both atomic, or plain
//! writes of the same value (of which one is performed, whichever: CUDA C++ Programming Guide, SIMT architecture).

/// A thread at one point of its program.
#[derive(Clone, Copy, Default)]
pub(crate) struct Who {
    pub(crate) block: u32,
    /// How many barriers of the block are behind it, and one; 0 is nobody.
    pub(crate) epoch: u32,
    /// How many barriers of its warp.
    pub(crate) warp_epoch: u32,
    pub(crate) thread: u32,
}

impl Who {
    fn is_nobody(self) -> bool {
        self.epoch == 0
    }

    fn is_beside(self, other: Self) -> bool {
        self.block == other.block && self.thread / 32 == other.thread / 32
    }

    /// Whether what it did is before what `later` does.
    fn is_before(self, later: Self) -> bool {
        let own = self.thread == later.thread;
        let by_warp = self.is_beside(later) && self.warp_epoch < later.warp_epoch;
        self.is_nobody() || (self.block == later.block && (own || by_warp || self.epoch < later.epoch))
    }
}

/// Readers since the last write that `Cell::read` does not name.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Others {
    #[default]
    None,
    /// Of its warp, since its last barrier.
    Lanes,
    /// Of other warps of the block, since its last barrier.
    Warps,
    Blocks,
}

/// What is known of a byte.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cell {
    write: Who,
    read: Who,
    others: Others,
    atomic: bool,
    /// Whether threads that nothing orders wrote the same here; `write` is one of them.
    many_writers: bool,
    /// Whether it holds what somebody wrote.
    pub(crate) is_known: bool,
    /// Whether an asynchronous copy to it is under way.
    in_flight: bool,
    /// Whether somebody read it past the coherent path.
    constant: bool,
}

/// How a byte is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    Plain,
    /// Of what is there already.
    Same,
    Atomic,
    /// An asynchronous copy sets out.
    Copy,
}

impl Cell {
    pub(crate) fn new(is_known: bool) -> Self {
        Self { is_known, ..Self::default() }
    }

    fn is_written_before(&self, who: Who) -> bool {
        let whole_block = self.write.block == who.block && self.write.epoch < who.epoch;
        self.write.is_before(who) && (whole_block || !self.many_writers)
    }

    /// # Errors
    /// The race, in words.
    pub(crate) fn read(&mut self, who: Who) -> Result<(), String> {
        if self.in_flight {
            return Err("reads what an asynchronous copy has not brought yet".into());
        }
        if !self.is_written_before(who) {
            return Err(format!("races: it reads what thread {} writes", self.write.thread));
        }
        let last = self.read;
        if !last.is_nobody() && last.block != who.block {
            self.others = Others::Blocks;
        } else if last.epoch != who.epoch {
            // Readers before the last barrier of the block are behind whoever writes now.
            self.others = if self.others == Others::Blocks { Others::Blocks } else { Others::None };
        } else if !last.is_beside(who) {
            self.others = self.others.max(Others::Warps);
        } else if last.warp_epoch == who.warp_epoch && last.thread != who.thread {
            self.others = self.others.max(Others::Lanes);
        } else if last.warp_epoch != who.warp_epoch && self.others == Others::Lanes {
            self.others = Others::None;
        }
        self.read = who;
        Ok(())
    }

    /// A read past the coherent path, of what nobody may write during the launch (PTX ISA, ld.global.nc).
    ///
    /// # Errors
    /// Somebody wrote it.
    pub(crate) fn read_constant(&mut self, who: Who) -> Result<(), String> {
        if !self.write.is_nobody() {
            return Err("reads past the coherent path (.nc) what this launch wrote".into());
        }
        self.constant = true;
        self.read(who)
    }

    /// # Errors
    /// The race, in words.
    pub(crate) fn write(&mut self, who: Who, how: Write) -> Result<(), String> {
        if self.in_flight {
            return Err("writes where an asynchronous copy is under way".into());
        }
        if self.constant {
            return Err("writes what was read past the coherent path (.nc)".into());
        }
        let written_before = self.is_written_before(who);
        let alike = if self.atomic { how == Write::Atomic } else { how == Write::Same };
        if !written_before && !alike {
            return Err(format!("races: thread {} writes there, too", self.write.thread));
        }
        let since = self.read.block == who.block && self.read.epoch == who.epoch;
        let unseen = match self.others {
            Others::None => false,
            Others::Lanes => since && !(self.read.is_beside(who) && self.read.warp_epoch < who.warp_epoch),
            Others::Warps => since,
            Others::Blocks => true,
        };
        if unseen || !self.read.is_before(who) {
            return Err(format!("races: thread {} reads there, or others do", self.read.thread));
        }
        *self = Self { write: who, atomic: how == Write::Atomic, is_known: true, ..Self::default() };
        self.many_writers = !written_before && how == Write::Same;
        self.in_flight = how == Write::Copy;
        Ok(())
    }

    /// The copy has arrived, as far as `who`, who waited for it, can see.
    pub(crate) fn arrive(&mut self, who: Who) {
        (self.in_flight, self.write) = (false, who);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(thread: u32, epoch: u32, warp_epoch: u32) -> Who {
        Who { block: 0, epoch, warp_epoch, thread }
    }

    #[test]
    fn accesses_are_races_unless_a_barrier_lies_between() {
        for (first, second, is_race) in [
            (who(0, 1, 0), who(1, 1, 0), true),
            (who(0, 1, 0), who(1, 1, 1), false),
            (who(0, 1, 0), who(40, 1, 1), true),
            (who(0, 1, 0), who(40, 2, 0), false),
            (who(0, 1, 0), who(0, 1, 0), false),
            (who(0, 1, 0), Who { block: 1, ..who(0, 2, 5) }, true),
        ] {
            for (writes_first, writes_second) in [(true, false), (false, true), (true, true)] {
                let mut cell = Cell::new(true);
                let mut touch = |writes, who| {
                    if writes { cell.write(who, Write::Plain) } else { cell.read(who) }
                };
                touch(writes_first, first).unwrap();
                assert_eq!(touch(writes_second, second).is_err(), is_race);
            }
        }
    }

    #[test]
    fn a_write_races_with_every_reader_and_not_the_last_alone() {
        // Lanes 0 and 1 read; then 1 writes. Warps 0 and 1 read; then warp 1 writes.
        for (other, is_race) in [(who(0, 1, 0), true), (who(40, 1, 0), true), (who(1, 1, 0), false)] {
            let mut cell = Cell::new(true);
            cell.read(other).unwrap();
            cell.read(who(1, 1, 0)).unwrap();
            assert_eq!(cell.write(who(1, 1, 0), Write::Plain).is_err(), is_race);
        }
    }

    #[test]
    fn writes_of_the_same_are_no_race_but_reads_of_it_are() {
        let mut cell = Cell::new(true);
        cell.write(who(0, 1, 0), Write::Plain).unwrap();
        assert!({ cell }.write(who(1, 1, 0), Write::Plain).is_err());
        cell.write(who(1, 1, 0), Write::Same).unwrap();
        for (reader, is_race) in [(who(0, 1, 0), true), (who(1, 1, 0), true), (who(9, 2, 0), false)] {
            assert_eq!({ cell }.read(reader).is_err(), is_race);
        }
        assert!(cell.write(who(1, 1, 0), Write::Plain).is_err());
    }

    #[test]
    fn a_copy_is_seen_by_nobody_before_it_has_arrived_and_by_others_after_a_barrier() {
        let mut cell = Cell::default();
        cell.write(who(3, 1, 0), Write::Copy).unwrap();
        assert!(cell.read(who(3, 1, 0)).is_err());
        cell.arrive(who(3, 1, 0));
        assert!(cell.read(who(3, 1, 0)).is_ok() && cell.read(who(4, 1, 0)).is_err());
        assert!(cell.read(who(4, 2, 0)).is_ok());
    }
}
