//! How kernels report what only they can see, and how the host says it.
//!
//! A kernel that meets a delta it must refuse writes NaN and raises a status word (`cuda/README.md`). The
//! words are pinned host memory that the device writes through a mapping, one word per op, one set per
//! device: the host reads them without a copy or a wait, a launch costs nothing more, and the address is
//! fixed, so that a captured graph reports like any launch. Each call looks at the words of its device first,
//! clears what it finds, and returns that as an error, launching nothing: the report of an asynchronous call
//! comes with a later one, as CUDA's own errors do. To hear of all that was launched, synchronise and make
//! one more call.
//!
//! Only the device's atomics order what it writes, only the host clears. A kernel that reports while the host
//! clears may have its report said twice; of two reports of one op between two calls, one is said.

#![forbid(unsafe_code)]

use crate::error::{Error, Hint};

/// The op that a status word belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Restore,
    Apply,
    Linear,
    Grouped,
    Embedding,
    GradInput,
    GroupedGradInput,
}

impl Op {
    /// All, in the order of their words.
    pub const ALL: [Self; 7] = [
        Self::Restore,
        Self::Apply,
        Self::Linear,
        Self::Grouped,
        Self::Embedding,
        Self::GradInput,
        Self::GroupedGradInput,
    ];

    /// As torch calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Restore => "delta_restore",
            Self::Apply => "delta_apply_",
            Self::Linear => "delta_linear",
            Self::Grouped => "delta_linear_grouped",
            Self::Embedding => "delta_embedding",
            Self::GradInput => "delta_linear_grad_input",
            Self::GroupedGradInput => "delta_linear_grouped_grad_input",
        }
    }
}

/// Bits of a status word that hold the slot, or the place of an index.
pub const SLOT_BITS: u32 = 24;

/// What a kernel reports, by the number in the word's high bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Code {
    TileCorrupt = 1,
    NoTenant = 2,
    BadSlot = 3,
    Misaligned = 4,
    NotADelta = 5,
    Mismatch = 6,
    NoRow = 7,
    OldLayout = 8,
    OtherBase = 9,
}

impl Code {
    /// All, from the mildest.
    pub const ALL: [Self; 9] = [
        Self::TileCorrupt,
        Self::NoTenant,
        Self::BadSlot,
        Self::Misaligned,
        Self::NotADelta,
        Self::Mismatch,
        Self::NoRow,
        Self::OldLayout,
        Self::OtherBase,
    ];
}

/// What a status word other than 0 means.
pub fn error(op: Op, device: i32, word: u32) -> Error {
    let slot = word & ((1 << SLOT_BITS) - 1);
    let code = Code::ALL.into_iter().find(|c| *c as u32 == word >> SLOT_BITS);
    let of_slots = matches!(op, Op::Grouped | Op::Embedding | Op::GroupedGradInput);
    let whose = if of_slots { format!("the delta of slot {slot}") } else { "the delta".into() };
    let lost = if op == Op::Apply { "the weight is as it was" } else { "what depends on it came out as NaN" };
    let (make, what): (fn(String) -> Error, String) = match code {
        Some(Code::TileCorrupt) => {
            (Error::corrupt, format!("{whose} contradicts itself or the base; {lost}"))
        }
        Some(Code::NoTenant) => (
            Error::invalid,
            // A negative slot other than -1 arrives without its high bits.
            format!(
                "tenant_of_row names slot {slot} (modulo 2^{SLOT_BITS}), which does not exist; that row is NaN"
            ),
        ),
        Some(Code::BadSlot) => (
            Error::invalid,
            format!("slot {slot} lies outside of the arena, or not at a multiple of 64; its rows are NaN"),
        ),
        Some(Code::Misaligned) => {
            (Error::invalid, format!("{whose} is at an address that is no multiple of 16"))
        }
        Some(Code::NotADelta) => (Error::corrupt, format!("{whose} is no delta of this version, or is cut")),
        Some(Code::Mismatch) => {
            (Error::mismatch, format!("{whose} is of another dtype or shape than the weight"))
        }
        Some(Code::NoRow) => (
            Error::invalid,
            format!(
                "indices[{slot}] (modulo 2^{SLOT_BITS}) lies outside of the weight; that row has all bits set"
            ),
        ),
        Some(Code::OldLayout) => (
            Error::unsupported,
            format!(
                "{whose} is of encoding exponent and layout 0, from a package of version 1, which only the CPU \
                 computes on: pack it again, or encode the delta again"
            ),
        ),
        Some(Code::OtherBase) => (
            |text| Error::mismatch(text).with_hint(Hint::OtherBase),
            format!("{whose} was made against another base than the weight, whose digest is another; {lost}"),
        ),
        None => (Error::internal, format!("status word {word:#010x}, which means nothing")),
    };
    make(format!("an earlier {} on cuda:{device} reported: {what}", op.name()))
}
