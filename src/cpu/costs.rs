//! What the cost model of the products (`plan`) knows of a machine: numbers by processor, as CPUID names it.
//!
//! Nothing is measured while serving. What changes bits may not go by a measurement, which differs from one
//! run to the next; of the others, wrong ones cost a few percent at most where few words changed (a
//! `transposed_ns` of 25 in place of 13, up to 1.7 times on Zen 4 with 6 rows and 30 % changed).
//!
//! **Calibration.** `python benches/calibrate.py` times each number beside other values of it on the machine
//! at hand and says what the known ones lose. `XORZ_COSTS="panel_above=64,cached_bytes=4194304"` in the
//! environment takes other values, in mode fast and beyond the caches the first thing to try on a machine
//! unlike those below.

use crate::vector::exec::LEAST_WORDS;
use crate::vector::processor::{Processor, Vendor};
use crate::vector::simd::SIMD_LANES;
use crate::vector::trace::traces;
use std::sync::OnceLock;

/// What the model knows of a machine. In `mode = "fast"`, `panel_above`, `decoded_above`, `packed_above`,
/// `widen_from` and `torch_panels` change bits of the result; nothing else does.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Costs {
    /// Rows of x of one tenant above which a restored panel pays in `mode = "fast"`. Below, restoring costs
    /// as much as walking the entries once more for the second block of rows.
    pub(super) panel_above: usize,
    /// The same for `exponent`, where a second block of rows means decoding once more: 0.6 of the time at 24
    /// rows.
    pub(super) decoded_above: usize,
    /// The same for panels that the bf16 dot product multiplies, of any encoding and of the base.
    pub(super) packed_above: usize,
    /// Rows of x of a call from which bf16 words are widened and multiplied as f32, though there is a bf16
    /// dot product: where that takes as long as four f32 products. `usize::MAX` for never.
    pub(super) widen_from: usize,
    /// Whether more than `packed_above` rows of x of bf16 words are torch's to multiply, panel after restored
    /// panel: where it has matrix units (AMX) that nothing here uses.
    pub(super) torch_panels: bool,
    /// A record of sixteen entries and a row of x, gathered: ns.
    pub(super) gathered_ns: f64,
    /// A record of sixteen entries and up to sixteen rows of x, transposed: ns. More where changes are so
    /// rare that every entry finds its row of x outside of the second cache: not for less than one word in
    /// `rare`.
    pub(super) transposed_ns: f64,
    /// See `transposed_ns`.
    pub(super) rare: u64,
    /// So many bytes of a base stay in the cache from one block of rows of x to the next.
    pub(super) cached_bytes: usize,
    /// Words of W that a task takes at least, once for each sixteen rows of x; see [`LEAST_WORDS`].
    pub(super) least_words: usize,
}

impl Costs {
    /// Measured on Zen 3 with AVX2.
    const DEFAULT: Self = Self {
        panel_above: 2 * SIMD_LANES,
        decoded_above: SIMD_LANES,
        packed_above: SIMD_LANES,
        widen_from: usize::MAX,
        torch_panels: false,
        gathered_ns: 6.5,
        transposed_ns: 25.0,
        rare: 64,
        cached_bytes: 8 << 20,
        least_words: LEAST_WORDS,
    };

    /// Of a processor.
    fn of(processor: &Processor) -> Self {
        let default = Self::DEFAULT;
        match (processor.vendor, processor.family) {
            // Zen 4 (model 17 is Genoa), whose second cache of 1 MiB, twice that of Zen 3, holds more rows of x.
            (Vendor::Amd, 25) if matches!(processor.model, 0x10..=0x1f | 0x60..=0x7f | 0xa0..=0xaf) => {
                Self { transposed_ns: 13.0, rare: 256, ..default }
            }
            // Zen 5: a record of sixteen entries takes 20 cycles. Of 11 ns transposing pays from five rows on, where it takes 0.74
            // to 1.0 of the time; with four it takes 0.9 to 1.1.
            (Vendor::Amd, 26..) => Self { gathered_ns: 5.0, transposed_ns: 11.0, rare: 256, ..default },
            // Sapphire Rapids: a record takes 8.7 cycles, so that transposing never pays; four rows of W by
            // four of x take 35 cycles per step by the bf16 dot product.
            (Vendor::Intel, _) => {
                let (widen_from, torch_panels) = (4, processor.amx_bf16);
                Self { gathered_ns: 2.9, transposed_ns: 50.0, widen_from, torch_panels, ..default }
            }
            _ => default,
        }
        .within(processor.cache_bytes)
    }

    /// No more of the base is in a cache than the largest one holds beside other things.
    fn within(self, cache_bytes: usize) -> Self {
        match cache_bytes {
            0 => self,
            most => Self { cached_bytes: self.cached_bytes.min(most / 2), ..self },
        }
    }

    /// Those in force, read once.
    pub(super) fn active() -> &'static Self {
        static ACTIVE: OnceLock<Costs> = OnceLock::new();
        ACTIVE.get_or_init(|| {
            let (asked, known) =
                (std::env::var("XORZ_COSTS").unwrap_or_default(), Self::of(Processor::here()));
            known.clone().with(&asked).unwrap_or_else(|wrong| {
                eprintln!("xorz: XORZ_COSTS is ignored: {wrong}");
                known
            })
        })
    }

    /// These, but for what `name=value,name=value` says.
    fn with(self, asked: &str) -> Result<Self, String> {
        let mut costs = self;
        for part in asked.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (name, value) =
                part.split_once('=').ok_or_else(|| format!("\"{part}\" is not name=value"))?;
            let wrong = |range| format!("{name} is \"{value}\", not {range}");
            let count = |least: usize| {
                value.parse().ok().filter(|v| *v >= least).ok_or_else(|| wrong("a count in range"))
            };
            let ns = || {
                value.parse().ok().filter(|v: &f64| *v > 0.0 && v.is_finite()).ok_or_else(|| wrong("above 0"))
            };
            match name {
                "panel_above" => costs.panel_above = count(0)?,
                "decoded_above" => costs.decoded_above = count(0)?,
                "packed_above" => costs.packed_above = count(0)?,
                "widen_from" => costs.widen_from = count(0)?,
                "torch_panels" => costs.torch_panels = count(0)? > 0,
                "gathered_ns" => costs.gathered_ns = ns()?,
                "transposed_ns" => costs.transposed_ns = ns()?,
                "rare" => costs.rare = count(1)? as u64,
                "cached_bytes" => costs.cached_bytes = count(0)?,
                "least_words" => costs.least_words = count(1)?,
                _ => return Err(format!("there is no \"{name}\"")),
            }
        }
        Ok(costs)
    }
}

/// The least rows of x of one tenant's bf16 words that torch is to multiply in `mode = "fast"`, on panels of
/// restored weights: many, on a processor whose matrix units torch uses (AMX); elsewhere `usize::MAX`.
pub fn least_torch_rows() -> usize {
    let costs = Costs::active();
    if costs.torch_panels { costs.packed_above.saturating_add(1) } else { usize::MAX }
}

/// Whether `rows` are no less than [`least_torch_rows`]. `XORZ_TRACE` says so.
pub fn torch_multiplies(rows: usize) -> bool {
    let torchs = rows >= least_torch_rows();
    if torchs && traces() {
        eprintln!(
            "xorz: BF16, {rows} rows of one tenant: torch's product on restored panels, {}",
            Processor::here()
        );
    }
    torchs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_known_by_vendor_and_family_and_an_unknown_one_takes_the_defaults() {
        let known = |vendor, family, amx_bf16| {
            Costs::of(&Processor { vendor, family, amx_bf16, cache_bytes: 4 << 20, ..Processor::default() })
        };
        assert_eq!(Costs::of(&Processor::default()), Costs::DEFAULT);
        assert_eq!(known(Vendor::Amd, 25, false), Costs { cached_bytes: 2 << 20, ..Costs::DEFAULT });
        let intel = known(Vendor::Intel, 6, true);
        assert!(intel.torch_panels && intel.widen_from == 4 && intel.cached_bytes == 2 << 20);
        assert!(!known(Vendor::Intel, 6, false).torch_panels);
        assert_eq!(known(Vendor::Amd, 26, false).widen_from, usize::MAX);
        let zen5 = Costs { gathered_ns: 5.0, transposed_ns: 11.0, rare: 256, ..Costs::DEFAULT };
        assert_eq!(known(Vendor::Amd, 26, false), Costs { cached_bytes: 2 << 20, ..zen5 });
        let zen4 = Processor { vendor: Vendor::Amd, family: 25, model: 17, ..Processor::default() };
        assert_eq!(Costs::of(&zen4), Costs { transposed_ns: 13.0, rare: 256, ..Costs::DEFAULT });
    }

    #[test]
    fn costs_are_read_by_name_and_refused_by_name() {
        assert_eq!(Costs::DEFAULT.with(""), Ok(Costs::DEFAULT));
        let two = Costs::DEFAULT.with("panel_above=64, rare=7").unwrap();
        assert_eq!(two, Costs { panel_above: 64, rare: 7, ..Costs::DEFAULT });
        for (asked, named) in [
            ("rare", "\"rare\" is not name=value"),
            ("rare=0", "rare is \"0\""),
            ("gathered_ns=inf", "gathered_ns is \"inf\""),
            ("transposed_ns=-1", "transposed_ns is \"-1\""),
            ("least_words=x", "least_words is \"x\""),
            ("speed=1", "no \"speed\""),
        ] {
            assert!(Costs::DEFAULT.with(asked).unwrap_err().contains(named), "{asked}");
        }
    }
}
