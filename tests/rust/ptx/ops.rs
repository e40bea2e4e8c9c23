//! What the machine executes: operations with the numbers of their registers.

use crate::arith::{Compare, One, Three, Two};

/// Where the shared variable begins: not at 0, so that an address that was forgotten is noticed.
pub(crate) const SHARED_AT: u64 = 0x1000;

/// Where the first table of constants begins, and how far the others are apart.
pub(crate) const TABLE_AT: u64 = 0x2_0000;

#[derive(Clone, Copy)]
pub(crate) enum Operand {
    Register(u32),
    Number(u64),
}

#[derive(Clone, Copy)]
pub(crate) struct Address {
    pub(crate) base: Operand,
    pub(crate) offset: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Shared,
    Global,
    /// Device memory past the coherent path: nobody may write there during the launch.
    Constant,
    /// Tables of constants that a file has.
    Table,
}

#[derive(Clone, Copy)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy)]
pub(crate) enum Special {
    Thread,
    BlockX,
    BlockY,
    BlocksX,
    BlocksY,
}

#[derive(Clone, Copy)]
pub(crate) enum Atomic {
    Or,
    Max,
    Add,
}

#[derive(Clone, Copy)]
pub(crate) enum Factors {
    Bf16,
    F16,
}

pub(crate) enum Op {
    One { f: One, d: u32, a: Operand },
    Two { f: Two, d: u32, a: Operand, b: Operand, divides: bool },
    Three { f: Three, d: u32, a: Operand, b: Operand, c: Operand },
    Insert { wide: bool, d: u32, of: [Operand; 4] },
    Compare { f: Compare, p: u32, a: Operand, b: Operand },
    Select { d: u32, a: Operand, b: Operand, p: u32 },
    Logic { f: Logic, p: u32, a: u32, b: u32 },
    Not { p: u32, a: u32 },
    Truth { p: u32, is: bool },
    Pack { d: u32, low: Operand, high: Operand },
    Unpack { low: u32, high: u32, a: Operand },
    Special { d: u32, what: Special },
    Param { d: u32, at: usize },
    Load { space: Space, bytes: u32, signed: bool, d: Vec<u32>, at: Address, used: u32 },
    Store { space: Space, bytes: u32, from: Vec<Operand>, at: Address },
    Atomic { f: Atomic, space: Space, d: u32, at: Address, a: Operand },
    Copy { to: Address, from: Address },
    EndGroup,
    WaitGroups { left: u32 },
    Prefetch,
    Matrices { turned: bool, d: [u32; 4], at: Address },
    Multiply { of: Factors, d: [u32; 4], a: [u32; 4], b: [u32; 2], c: [u32; 4] },
    Shuffle { across: bool, d: u32, p: u32, a: Operand, b: Operand, c: Operand, mask: Operand },
    Ballot { d: u32, p: u32, mask: Operand },
    BlockSync,
    BlockAny { p: u32, a: u32 },
    WarpSync { mask: u64 },
    Branch { to: u32 },
    Return,
}

pub(crate) struct Instruction {
    pub(crate) op: Op,
    pub(crate) guard: Option<(u32, bool)>,
    pub(crate) line: u32,
    /// Where lanes that part here meet again.
    pub(crate) meets: u32,
    pub(crate) name: String,
}

pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) params: Vec<u32>,
    pub(crate) shared: usize,
    pub(crate) tables: Vec<Vec<u8>>,
    /// Bytes of the smallest access, at most four.
    pub(crate) granule: usize,
    pub(crate) code: Vec<Instruction>,
    pub(crate) values: usize,
    pub(crate) predicates: usize,
}
