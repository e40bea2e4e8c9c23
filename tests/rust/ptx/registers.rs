//! The registers of a warp, and what instructions make of them alone. Every register knows of each lane whether anything was ever
//! written to it; what is made of such is such.

use crate::arith::{Lanes, insert};
use crate::ops::{Address, Logic, Op, Operand};

/// All 32 lanes.
pub(crate) const FULL: u32 = u32::MAX;

pub(crate) struct Registers {
    values: Vec<Lanes>,
    /// Lanes of which the value is not known.
    unknown: Vec<u32>,
    truths: Vec<u32>,
    unsure: Vec<u32>,
}

pub(crate) fn lanes_of(mask: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

impl Registers {
    pub(crate) fn new(values: usize, predicates: usize) -> Self {
        Self {
            values: vec![[0xA7A7_A7A7; 32]; values],
            unknown: vec![FULL; values],
            truths: vec![0xA7A7_A7A7; predicates],
            unsure: vec![FULL; predicates],
        }
    }

    /// Nothing is known of any.
    pub(crate) fn forget(&mut self) {
        self.unknown.fill(FULL);
        self.unsure.fill(FULL);
    }

    /// The value of each lane, and the lanes that do not know theirs.
    pub(crate) fn read(&self, operand: Operand) -> (Lanes, u32) {
        match operand {
            Operand::Register(at) => (self.values[at as usize], self.unknown[at as usize]),
            Operand::Number(number) => ([number; 32], 0),
        }
    }

    pub(crate) fn write(&mut self, to: u32, value: &Lanes, unknown: u32, on: u32) {
        let to = to as usize;
        if on == FULL {
            (self.values[to], self.unknown[to]) = (*value, unknown);
            return;
        }
        for (lane, (to, from)) in self.values[to].iter_mut().zip(value).enumerate() {
            *to = if on >> lane & 1 == 1 { *from } else { *to };
        }
        self.unknown[to] = (self.unknown[to] & !on) | (unknown & on);
    }

    /// Of one lane.
    pub(crate) fn put(&mut self, to: u32, lane: u32, value: u64, known: bool) {
        self.values[to as usize][lane as usize] = value;
        let unknown = &mut self.unknown[to as usize];
        *unknown = (*unknown & !(1 << lane)) | (u32::from(!known) << lane);
    }

    pub(crate) fn predicate(&self, p: u32) -> (u32, u32) {
        (self.truths[p as usize], self.unsure[p as usize])
    }

    pub(crate) fn decide(&mut self, p: u32, truth: u32, unsure: u32, on: u32) {
        let p = p as usize;
        self.truths[p] = (self.truths[p] & !on) | (truth & on);
        self.unsure[p] = (self.unsure[p] & !on) | (unsure & on);
    }

    /// # Errors
    /// An address that was made of what was never written.
    pub(crate) fn addresses(&self, at: Address, on: u32) -> Result<Lanes, String> {
        let (base, unknown) = self.read(at.base);
        if unknown & on != 0 {
            return Err("its address was made of what was never written".into());
        }
        Ok(base.map(|base| base.wrapping_add_signed(at.offset)))
    }

    /// Values made of values.
    ///
    /// # Errors
    /// A division by zero, or by what was never written.
    pub(crate) fn compute(&mut self, op: &Op, on: u32) -> Result<(), String> {
        match *op {
            Op::One { f, d, a } => {
                let (a, unknown) = self.read(a);
                self.write(d, &f(&a), unknown, on);
            }
            Op::Two { f, d, a, b, divides } => {
                let ((a, unknown_a), (b, unknown_b)) = (self.read(a), self.read(b));
                if divides && lanes_of(on).any(|lane| b[lane as usize] == 0 || unknown_b >> lane & 1 == 1) {
                    return Err("divides by zero, or by what was never written".into());
                }
                self.write(d, &f(&a, &b), unknown_a | unknown_b, on);
            }
            Op::Three { f, d, a, b, c } => {
                let [a, b, c] = [a, b, c].map(|of| self.read(of));
                self.write(d, &f(&a.0, &b.0, &c.0), a.1 | b.1 | c.1, on);
            }
            Op::Insert { wide, d, of } => {
                let of = of.map(|of| self.read(of));
                let unknown = of.iter().fold(0, |all, of| all | of.1);
                let value = insert(wide, [&of[0].0, &of[1].0, &of[2].0, &of[3].0]);
                self.write(d, &value, unknown, on);
            }
            Op::Pack { d, low, high } => {
                let (low, high) = (self.read(low), self.read(high));
                let value = std::array::from_fn(|i| low.0[i] | (high.0[i] << 32));
                self.write(d, &value, low.1 | high.1, on);
            }
            Op::Unpack { low, high, a } => {
                let (a, unknown) = self.read(a);
                self.write(low, &a.map(|a| a & 0xFFFF_FFFF), unknown, on);
                self.write(high, &a.map(|a| a >> 32), unknown, on);
            }
            _ => unreachable!("no operation on values"),
        }
        Ok(())
    }

    /// Predicates, and what they choose. What is so whatever an unknown one is, is known.
    pub(crate) fn judge(&mut self, op: &Op, on: u32) {
        match *op {
            Op::Compare { f, p, a, b } => {
                let (a, b) = (self.read(a), self.read(b));
                self.decide(p, f(&a.0, &b.0), a.1 | b.1, on);
            }
            Op::Logic { f, p, a, b } => {
                let ((a, unsure_a), (b, unsure_b)) = (self.predicate(a), self.predicate(b));
                let either = unsure_a | unsure_b;
                let (truth, settled) = match f {
                    Logic::And => (a & b, (!a & !unsure_a) | (!b & !unsure_b)),
                    Logic::Or => (a | b, (a & !unsure_a) | (b & !unsure_b)),
                    Logic::Xor => (a ^ b, 0),
                };
                self.decide(p, truth, either & !settled, on);
            }
            Op::Not { p, a } => {
                let (a, unsure) = self.predicate(a);
                self.decide(p, !a, unsure, on);
            }
            Op::Truth { p, is } => self.decide(p, if is { FULL } else { 0 }, 0, on),
            Op::Select { d, a, b, p } => {
                let ((a, unknown_a), (b, unknown_b)) = (self.read(a), self.read(b));
                let (truth, unsure) = self.predicate(p);
                let value = std::array::from_fn(|i| if truth >> i & 1 == 1 { a[i] } else { b[i] });
                self.write(d, &value, (truth & unknown_a) | (!truth & unknown_b) | unsure, on);
            }
            _ => unreachable!("no operation on predicates"),
        }
    }
}
