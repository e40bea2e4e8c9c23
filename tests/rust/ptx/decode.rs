//! Statements as operations that the machine executes: decoded once, unknown ones refused by name.

use crate::arith::{comparison, one, three, two};
use crate::flow::meetings;
use crate::ops::{
    Address, Atomic, Factors, Instruction, Kernel, Logic, Op, Operand, SHARED_AT, Space, Special, TABLE_AT,
};
use crate::parse::{Register, Source, Statement, kernels};

/// Every kernel of a file of PTX.
///
/// # Errors
/// What the text has that is not known here, with its line.
pub(crate) fn decode(text: &str) -> Result<Vec<Kernel>, String> {
    kernels(text)?.iter().map(kernel).collect()
}

fn kernel(source: &Source<'_>) -> Result<Kernel, String> {
    let mut code = Vec::with_capacity(source.statements.len());
    for statement in &source.statements {
        let said = |e| {
            let (name, arguments) = (statement.name, statement.arguments.join(", "));
            format!("{}, line {}: {e}: `{name} {arguments}`", source.name, statement.line)
        };
        let op = Decoder { source, statement }.op().map_err(said)?;
        let (guard, line, name) = (statement.guard, statement.line, statement.name.to_owned());
        code.push(Instruction { op, guard, line, meets: u32::MAX, name });
    }
    let ways: Vec<_> = code.iter().enumerate().map(|(i, one)| ways(one, i as u32)).collect();
    meetings(&ways).into_iter().zip(&mut code).for_each(|(meets, one)| one.meets = meets);
    let falls = ways.last().is_none_or(|last| last.iter().flatten().any(|to| *to as usize >= code.len()));
    if falls || source.shared.is_some_and(|(_, align, _)| !SHARED_AT.is_multiple_of(align)) {
        return Err(format!(
            "{}: the code runs past its end, or its shared memory is not aligned",
            source.name
        ));
    }
    let accesses = code.iter().filter_map(|one| match one.op {
        // Past the coherent path lies what nobody writes, of which there are no cells.
        Op::Load { space: Space::Constant | Space::Table, .. } => None,
        Op::Load { bytes, .. } | Op::Store { bytes, .. } => Some(bytes as usize),
        Op::Matrices { .. } => Some(2),
        _ => None,
    });
    Ok(Kernel {
        granule: accesses.min().unwrap_or(4).min(4),
        name: source.name.to_owned(),
        params: source.params.iter().map(|(_, bytes)| *bytes).collect(),
        shared: source.shared.map_or(0, |(_, _, bytes)| bytes as usize),
        tables: source.tables.iter().map(|(_, bytes)| bytes.clone()).collect(),
        code,
        values: source.values.len(),
        predicates: source.predicates as usize,
    })
}

fn ways(one: &Instruction, at: u32) -> [Option<u32>; 2] {
    let next = Some(at + 1);
    match (&one.op, one.guard) {
        (Op::Branch { to }, None) => [Some(*to), None],
        (Op::Branch { to }, Some(_)) => [next, Some(*to)],
        (Op::Return, None) => [None, None],
        _ => [next, None],
    }
}

/// One statement among its registers.
struct Decoder<'s, 't> {
    source: &'s Source<'t>,
    statement: &'s Statement<'t>,
}

type Decoded<T> = Result<T, String>;

impl Decoder<'_, '_> {
    fn op(&self) -> Decoded<Op> {
        let name = self.statement.name;
        if let Some(f) = one(name).filter(|_| self.is_plain()) {
            return Ok(Op::One { f, d: self.value(0)?, a: self.operand(1)? });
        }
        if let Some((f, divides)) = two(name) {
            return Ok(Op::Two { f, d: self.value(0)?, a: self.operand(1)?, b: self.operand(2)?, divides });
        }
        if let Some(f) = three(name) {
            let [a, b, c] = [self.operand(1)?, self.operand(2)?, self.operand(3)?];
            return Ok(Op::Three { f, d: self.value(0)?, a, b, c });
        }
        if let Some(f) = name.strip_prefix("setp.").and_then(comparison) {
            return Ok(Op::Compare { f, p: self.predicate(0)?, a: self.operand(1)?, b: self.operand(2)? });
        }
        let parts: Vec<&str> = name.split('.').collect();
        match parts[..] {
            ["selp", _] => self.select(),
            ["bfi", kind] => {
                let of = [self.operand(1)?, self.operand(2)?, self.operand(3)?, self.operand(4)?];
                Ok(Op::Insert { wide: kind == "b64", d: self.value(0)?, of })
            }
            [what @ ("mov" | "and" | "or" | "xor" | "not"), "pred"] => self.logic(what),
            ["mov", kind] => self.mov(kind),
            ["ld", "param", _] => self.param(),
            ["ld", ref rest @ ..] => self.load(rest),
            ["st", ref rest @ ..] => self.store(rest),
            ["atom", space, f, kind] => self.atomic(space, f, kind),
            _ => self.machine(name),
        }
    }

    /// No register in braces.
    fn is_plain(&self) -> bool {
        self.statement.arguments.iter().all(|a| !a.starts_with('{') && !a.starts_with("%tid"))
            && self.statement.arguments.get(1).is_some_and(|a| !a.contains("ctaid"))
    }

    /// What touches more than registers of a lane.
    fn machine(&self, name: &str) -> Decoded<Op> {
        Ok(match name {
            "cp.async.cg.shared.global" if self.number(2)? == 16 => {
                Op::Copy { to: self.address(0)?, from: self.address(1)? }
            }
            "cp.async.commit_group" => Op::EndGroup,
            "cp.async.wait_group" => Op::WaitGroups { left: self.number(0)? as u32 },
            "prefetch.global.L2" => Op::Prefetch,
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16" => self.matrices(false)?,
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" => self.matrices(true)?,
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => self.multiply(Factors::Bf16)?,
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" => self.multiply(Factors::F16)?,
            "shfl.sync.idx.b32" => self.shuffle(false)?,
            "shfl.sync.bfly.b32" => self.shuffle(true)?,
            "vote.sync.ballot.b32" => {
                Op::Ballot { d: self.value(0)?, p: self.predicate(1)?, mask: self.operand(2)? }
            }
            "bar.sync" if self.number(0)? == 0 => Op::BlockSync,
            "bar.red.or.pred" if self.number(1)? == 0 => {
                Op::BlockAny { p: self.predicate(0)?, a: self.predicate(2)? }
            }
            "bar.warp.sync" => Op::WarpSync { mask: self.number(0)? & 0xFFFF_FFFF },
            "bra" | "bra.uni" => {
                let label = self.argument(0)?;
                let to = self.source.labels.get(label).ok_or_else(|| format!("no label {label}"))?;
                Op::Branch { to: *to }
            }
            "ret" => Op::Return,
            _ => return Err("an instruction that the interpreter does not know".into()),
        })
    }

    fn select(&self) -> Decoded<Op> {
        Ok(Op::Select { d: self.value(0)?, a: self.operand(1)?, b: self.operand(2)?, p: self.predicate(3)? })
    }

    fn logic(&self, what: &str) -> Decoded<Op> {
        let p = self.predicate(0)?;
        let f = match what {
            "mov" => match self.predicate(1) {
                // Both are the one that is copied, which is no more certain for being asked twice.
                Ok(a) => return Ok(Op::Logic { f: Logic::And, p, a, b: a }),
                Err(_) => return Ok(Op::Truth { p, is: self.number(1)? != 0 }),
            },
            "not" => return Ok(Op::Not { p, a: self.predicate(1)? }),
            "and" => Logic::And,
            "or" => Logic::Or,
            _ => Logic::Xor,
        };
        Ok(Op::Logic { f, p, a: self.predicate(1)?, b: self.predicate(2)? })
    }

    fn mov(&self, kind: &str) -> Decoded<Op> {
        let (to, from) = (self.argument(0)?, self.argument(1)?);
        let what = match from {
            "%tid.x" => Some(Special::Thread),
            "%ctaid.x" => Some(Special::BlockX),
            "%ctaid.y" => Some(Special::BlockY),
            "%nctaid.x" => Some(Special::BlocksX),
            "%nctaid.y" => Some(Special::BlocksY),
            _ => None,
        };
        if let Some(what) = what {
            return Ok(Op::Special { d: self.value(0)?, what });
        }
        match (kind, to.starts_with('{'), from.starts_with('{')) {
            ("b64", true, false) => {
                let [low, high] = self.values(0)?;
                Ok(Op::Unpack { low, high, a: self.operand(1)? })
            }
            ("b64", false, true) => {
                let [low, high] = self.values(1)?.map(Operand::Register);
                Ok(Op::Pack { d: self.value(0)?, low, high })
            }
            _ => Err("a move that the interpreter does not know".into()),
        }
    }

    fn param(&self) -> Decoded<Op> {
        let name = self.argument(1)?.trim_matches(['[', ']']);
        let at = self.source.params.iter().position(|p| p.0 == name);
        Ok(Op::Param { d: self.value(0)?, at: at.ok_or_else(|| format!("no parameter {name}"))? })
    }

    fn load(&self, kind: &[&str]) -> Decoded<Op> {
        let (space, kind) = match kind {
            ["shared", rest @ ..] => (Space::Shared, rest),
            ["global", "nc", rest @ ..] => (Space::Constant, rest),
            ["global", rest @ ..] => (Space::Global, rest),
            ["const", rest @ ..] => (Space::Table, rest),
            _ => return Err("a load from an unknown space".into()),
        };
        let (many, bytes, signed) = shape(kind)?;
        let d = self.list(0)?.into_iter().map(|r| self.value_of(r)).collect::<Decoded<Vec<_>>>()?;
        if d.len() != many {
            return Err(format!("{} registers for {many} words", d.len()));
        }
        // A sign fills a register that is wider than the word.
        let signed = signed && d.iter().any(|d| u32::from(self.source.values[*d as usize]) > 8 * bytes);
        if signed && bytes != 4 {
            return Err("a load with a sign that the interpreter does not know".into());
        }
        Ok(Op::Load { space, bytes, signed, d, at: self.address(1)?, used: self.statement.used })
    }

    fn store(&self, kind: &[&str]) -> Decoded<Op> {
        let (space, kind) = match kind {
            ["shared", rest @ ..] => (Space::Shared, rest),
            ["global", rest @ ..] => (Space::Global, rest),
            _ => return Err("a store to an unknown space".into()),
        };
        let (many, bytes, _) = shape(kind)?;
        let from = self.list(1)?.into_iter().map(|r| self.operand_of(r, 64)).collect::<Decoded<Vec<_>>>()?;
        if from.len() != many {
            return Err(format!("{} registers for {many} words", from.len()));
        }
        Ok(Op::Store { space, bytes, from, at: self.address(0)? })
    }

    fn atomic(&self, space: &str, f: &str, kind: &str) -> Decoded<Op> {
        let space = match space {
            "shared" => Space::Shared,
            "global" => Space::Global,
            _ => return Err("an atomic in an unknown space".into()),
        };
        let f = match (f, kind) {
            ("or", "b32") => Atomic::Or,
            ("max", "u32") => Atomic::Max,
            ("add", "u32") => Atomic::Add,
            _ => return Err("an atomic that the interpreter does not know".into()),
        };
        Ok(Op::Atomic { f, space, d: self.value(0)?, at: self.address(1)?, a: self.operand(2)? })
    }

    fn matrices(&self, turned: bool) -> Decoded<Op> {
        Ok(Op::Matrices { turned, d: self.values(0)?, at: self.address(1)? })
    }

    fn multiply(&self, of: Factors) -> Decoded<Op> {
        Ok(Op::Multiply {
            of,
            d: self.values(0)?,
            a: self.values(1)?,
            b: self.values(2)?,
            c: self.values(3)?,
        })
    }

    fn shuffle(&self, across: bool) -> Decoded<Op> {
        let both = self.argument(0)?;
        let (d, p) = both.split_once('|').ok_or("a shuffle without its predicate")?;
        let (d, p) = (self.value_of(d)?, self.predicate_of(p)?);
        let [a, b, c, mask] = [self.operand(1)?, self.operand(2)?, self.operand(3)?, self.operand(4)?];
        Ok(Op::Shuffle { across, d, p, a, b, c, mask })
    }

    fn argument(&self, at: usize) -> Decoded<&str> {
        self.statement.arguments.get(at).copied().ok_or_else(|| "an argument is missing".into())
    }

    fn list(&self, at: usize) -> Decoded<Vec<&str>> {
        Ok(self.argument(at)?.trim_matches(['{', '}']).split(',').map(str::trim).collect())
    }

    fn values<const N: usize>(&self, at: usize) -> Decoded<[u32; N]> {
        let all: Vec<u32> = self.list(at)?.into_iter().map(|r| self.value_of(r)).collect::<Decoded<_>>()?;
        all.try_into().map_err(|_| format!("{N} registers are wanted"))
    }

    fn value(&self, at: usize) -> Decoded<u32> {
        self.value_of(self.argument(at)?)
    }

    fn value_of(&self, name: &str) -> Decoded<u32> {
        match self.source.register(self.statement.scope, name) {
            Some(Register::Value(at)) => Ok(at),
            _ => Err(format!("{name} is no register of values")),
        }
    }

    fn predicate(&self, at: usize) -> Decoded<u32> {
        self.predicate_of(self.argument(at)?)
    }

    fn predicate_of(&self, name: &str) -> Decoded<u32> {
        match self.source.register(self.statement.scope, name) {
            Some(Register::Predicate(at)) => Ok(at),
            _ => Err(format!("{name} is no predicate")),
        }
    }

    fn number(&self, at: usize) -> Decoded<u64> {
        number(self.argument(at)?).ok_or_else(|| format!("{} is no number", self.statement.arguments[at]))
    }

    fn operand(&self, at: usize) -> Decoded<Operand> {
        let digits = self.statement.name.trim_end_matches(|c: char| !c.is_ascii_digit());
        let from = digits.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        self.operand_of(self.argument(at)?, digits[from..].parse().unwrap_or(64))
    }

    /// A register, a number of so many bits, or the address of the shared variable.
    fn operand_of(&self, text: &str, bits: u32) -> Decoded<Operand> {
        if let Some(number) = number(text) {
            return Ok(Operand::Number(number & (u64::MAX >> (64 - bits))));
        }
        if self.source.shared.is_some_and(|(name, _, _)| name == text) {
            return Ok(Operand::Number(SHARED_AT));
        }
        if let Some(i) = self.source.tables.iter().position(|(name, _)| *name == text) {
            return Ok(Operand::Number(TABLE_AT * (i as u64 + 1)));
        }
        self.value_of(text).map(Operand::Register)
    }

    fn address(&self, at: usize) -> Decoded<Address> {
        let text = self.argument(at)?.trim_matches(['[', ']']);
        let (base, offset) = text.split_once('+').unwrap_or((text, "0"));
        let offset = offset.parse().map_err(|_| format!("{offset} is no offset"))?;
        Ok(Address { base: self.operand_of(base, 64)?, offset })
    }
}

/// `v4.u32` and so on: how many, of how many bytes, with a sign that fills wider registers.
fn shape(kind: &[&str]) -> Decoded<(usize, u32, bool)> {
    let (many, kind) = match kind {
        ["v2", kind] => (2, kind),
        ["v4", kind] => (4, kind),
        [kind] => (1, kind),
        _ => return Err("words of an unknown shape".into()),
    };
    let bits: u32 = kind[1..].parse().map_err(|_| format!("words of the unknown type {kind}"))?;
    Ok((many, bits / 8, kind.starts_with('s')))
}

/// A number: decimal, `0x`, or the bits of a float (PTX ISA, chapter 4, constants).
fn number(text: &str) -> Option<u64> {
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    match text.as_bytes() {
        [b'0', b'x', ..] => hex(&text[2..]),
        [b'0', b'f', ..] if text.len() == 10 => hex(&text[2..]),
        [b'0', b'd', ..] if text.len() == 18 => hex(&text[2..]),
        [b'-', ..] => text.parse::<i64>().ok().map(|n| n as u64),
        _ => text.parse().ok(),
    }
}
