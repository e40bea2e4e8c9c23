//! Many tenants' deltas in one piece of memory, and which row of a batch belongs to which. Everything here
//! comes from a caller who may be wrong: what is used is checked, what is not used is not read. Must hold no
//! arithmetic on words.

use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix};
use crate::resident::Resident;
use std::ops::Range;

/// Offsets of deltas in an arena are multiples of this.
pub const ARENA_ALIGN: usize = 64;

/// Resident deltas side by side, and where each lies. Bytes that no used slot names are never read.
#[derive(Clone, Copy, Debug)]
pub struct Arena<'a> {
    /// The memory, at any alignment.
    pub bytes: &'a [u8],
    /// Offset and length of each delta. Length 0 is an empty slot, which stands for the base's own weights.
    pub slots: &'a [[i64; 2]],
}

impl<'a> Arena<'a> {
    /// Where in the arena slot `slot` lies; none if it is empty.
    ///
    /// # Errors
    /// `InvalidArgument`, naming slot, offset and length, where there is no such slot or they lie outside of
    /// the arena.
    pub fn place(&self, slot: usize) -> Result<Option<Range<usize>>> {
        let Some(&[offset, length]) = self.slots.get(slot) else {
            return Err(Error::invalid(format!("slot {slot} of {} does not exist", self.slots.len())));
        };
        if length == 0 {
            return Ok(None);
        }
        let refuse = |why: String| {
            Err(Error::invalid(format!("slots[{slot}] has offset {offset} and length {length}, but {why}")))
        };
        let (Ok(start), Ok(len)) = (usize::try_from(offset), usize::try_from(length)) else {
            return refuse("neither may be negative".into());
        };
        if !start.is_multiple_of(ARENA_ALIGN) {
            return refuse(format!("an offset must be a multiple of {ARENA_ALIGN}"));
        }
        match start.checked_add(len).filter(|&end| end <= self.bytes.len()) {
            Some(end) => Ok(Some(start..end)),
            None => refuse(format!("the arena has {} bytes", self.bytes.len())),
        }
    }

    /// The delta in slot `slot`, which must be one of matrices like `base`; none if the slot is empty.
    ///
    /// # Errors
    /// `InvalidArgument` where there is no such slot or it lies outside of the arena; `Truncated`, `Corrupt`
    /// or `Unsupported` for bad bytes; `Mismatch` for the delta of another dtype or shape. Messages name the
    /// slot.
    pub fn delta(&self, slot: usize, base: &Matrix<'_>) -> Result<Option<Resident<'a>>> {
        let Some(place) = self.place(slot)? else { return Ok(None) };
        let delta =
            Resident::parse(&self.bytes[place]).and_then(|delta| delta.check_base(base).map(|()| delta));
        delta.map(Some).map_err(|e| e.within(format_args!("slots[{slot}]")))
    }

    /// The base as the deltas of a batch see it: int16 and int32 words stand for the bits of any dtype of
    /// their size, so the first delta in use tells which. Only of use to ops that compute nothing, such as
    /// lookups.
    ///
    /// # Errors
    /// `InvalidArgument`, `Truncated`, `Corrupt` or `Unsupported` as [`Arena::delta`], for the first slot in
    /// use.
    pub fn base_of_bits<'b>(&self, base: Matrix<'b>, tenant_of_row: &[i32]) -> Result<Matrix<'b>> {
        if !matches!(base.dtype(), Dtype::I16 | Dtype::I32) {
            return Ok(base);
        }
        let used = tenant_of_row.iter().filter_map(|&tenant| usize::try_from(tenant).ok());
        for slot in used.filter(|&slot| slot < self.slots.len()) {
            let Some(place) = self.place(slot)? else { continue };
            let delta =
                Resident::parse(&self.bytes[place]).map_err(|e| e.within(format_args!("slots[{slot}]")))?;
            let dtype = delta.header().dtype;
            let same = dtype.word_bytes() == base.dtype().word_bytes();
            return if same { Matrix::new(dtype, base.shape(), base.bytes()) } else { Ok(base) };
        }
        Ok(base)
    }

    /// The tenants of a batch of `m` rows on `base`, for a front end that computes them one by one. All that
    /// [`delta_linear_grouped`](super::delta_linear_grouped) checks of arena and rows is checked.
    ///
    /// # Errors
    /// As [`Tenants::new`] and [`Arena::delta`].
    pub fn tenants(&self, base: &Matrix<'_>, tenant_of_row: &[i32], m: usize) -> Result<Vec<Tenant>> {
        let tenants = Tenants::new(tenant_of_row, m, self.slots.len())?;
        let tenant = |(slot, rows): (Option<usize>, Range<usize>)| {
            slot.map_or(Ok(None), |slot| self.delta(slot, base))?;
            let delta = slot.map_or(Ok(None), |slot| self.place(slot))?;
            Ok(Tenant { slot, rows: tenants.order()[rows].to_vec(), delta })
        };
        tenants.groups().map(tenant).collect()
    }
}

/// One tenant of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its slot; none is the base.
    pub slot: Option<usize>,
    /// Its rows, in the order of the batch.
    pub rows: Vec<usize>,
    /// Where in the arena its delta is; none for the base and for an empty slot.
    pub delta: Option<Range<usize>>,
}

/// The rows of a batch, tenant by tenant.
pub struct Tenants<'a> {
    /// Which slot per row belongs to; negative is the base.
    of_row: &'a [i32],
    /// Rows by tenant, the base first; within a tenant in the order of the batch.
    order: Vec<usize>,
}

impl<'a> Tenants<'a> {
    /// Sort rows by tenant. `of_row` names a slot of `slots`, or -1, the base, for each of `m` rows.
    ///
    /// # Errors
    /// `Mismatch` if there are not `m`, `InvalidArgument` for a slot that does not exist.
    pub fn new(of_row: &'a [i32], m: usize, slots: usize) -> Result<Self> {
        if of_row.len() != m {
            let len = of_row.len();
            return Err(Error::mismatch(format!("tenant_of_row has {len} entries, but input has {m} rows")));
        }
        let wrong = |&(_, &t): &(usize, &i32)| t < -1 || usize::try_from(t).is_ok_and(|t| t >= slots);
        if let Some((row, tenant)) = of_row.iter().enumerate().find(wrong) {
            return Err(Error::invalid(format!(
                "tenant_of_row[{row}] is {tenant}, but must be -1 (the base) or the index of one of {slots} slots"
            )));
        }
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by_key(|&row| of_row[row]);
        Ok(Self { of_row, order })
    }

    /// The rows, tenant by tenant.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// Each tenant of the batch once: its slot, none for the base, and where in [`Self::order`] its rows are.
    pub fn groups(&self) -> impl Iterator<Item = (Option<usize>, Range<usize>)> {
        let same = |a: &usize, b: &usize| self.of_row[*a] == self.of_row[*b];
        self.order.chunk_by(same).scan(0, |end, rows| {
            let start = *end;
            *end += rows.len();
            Some((usize::try_from(self.of_row[rows[0]]).ok(), start..*end))
        })
    }
}
