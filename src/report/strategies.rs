//! Ways of keeping many fine-tunes of one base on an accelerator, beside one another: bytes, bytes read for a step, and
//! from how many tenants xorz is the smaller one. Arithmetic on footprints; reads no tensor.

use super::footprint::{Footprint, footprint, weight_bytes};
use crate::error::{Error, Result};
use crate::package::format::record::to_json;
use crate::package::{Checkpoint, Run};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What to compare.
#[derive(Clone, Debug)]
pub struct EstimateOptions {
    /// Fine-tunes that are served at once, each like those given on average.
    pub tenants: u64,
    /// Bytes that the accelerator reads from its memory in a second; `None` compares no times.
    pub bandwidth: Option<f64>,
    /// Whether to make zstd of the XOR, which takes most of the time.
    pub zstd: bool,
    /// As in [`PackOptions`](crate::package::PackOptions).
    pub strip_prefix: Option<String>,
}

/// A way of keeping the tenants.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Strategy {
    /// What it is called in JSON.
    pub key: &'static str,
    /// What it is called in tables.
    pub name: &'static str,
    /// Bytes that each tenant adds, on average.
    pub tenant_bytes: u64,
    /// Bytes of all tenants, with the base where it is needed.
    pub total_bytes: u64,
    /// The least time in which a step with a row of every tenant can be computed: every byte read once at the bandwidth.
    /// `None` without a bandwidth, and for zstd, on which nothing computes.
    pub step_seconds: Option<f64>,
}

/// From how many tenants on xorz takes fewer bytes than separate copies; `None`: from no number on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BreakEven {
    /// With deltas for memory.
    pub memory: Option<u64>,
    /// With deltas for speed.
    pub speed: Option<u64>,
}

/// Which way is the smaller one, for the tenants asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// xorz, and by half or more for each tenant.
    Xorz,
    /// xorz, but a delta takes more than half of its fine-tune.
    Either,
    /// A copy of each fine-tune.
    Separate,
}

/// Fine-tunes of one base, in every way of keeping them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Bytes of the base's weights, tensors with the same bytes once.
    pub base_bytes: u64,
    /// Tenants asked for.
    pub tenants: u64,
    /// The bandwidth that was asked for, in bytes per second.
    pub bandwidth: Option<f64>,
    /// What was measured.
    pub fine_tunes: Vec<Footprint>,
    /// The ways, separate copies first, xorz last.
    pub strategies: Vec<Strategy>,
    /// In memory. By bytes alone it is in time as well: a step reads what is kept, once.
    pub break_even: BreakEven,
    /// Which is better for these tenants.
    pub better: Better,
}

/// Measure every fine-tune against `base` (safetensors files or folders), and compare the ways of keeping them. Reads them
/// piece by piece and writes nothing.
///
/// # Errors
/// As [`Checkpoint::open_base`], naming file and tensor; `InvalidArgument` without a fine-tune or a tenant, or for a bandwidth
/// that is no positive number.
pub fn estimate_files(
    base: &Path,
    fine_tunes: &[PathBuf],
    options: &EstimateOptions,
    run: &Run<'_>,
) -> Result<Comparison> {
    if fine_tunes.is_empty() || options.tenants == 0 {
        return Err(Error::invalid("at least one fine-tune and one tenant are needed"));
    }
    if let Some(rate) = options.bandwidth.filter(|b| !b.is_finite() || *b <= 0.0) {
        return Err(Error::invalid(format!("a bandwidth of {rate} bytes a second is no positive number")));
    }
    let base = Checkpoint::open_base(base)?;
    let measure = |ft: &PathBuf| footprint(&base, ft, options.strip_prefix.as_deref(), options.zstd, run);
    let fine_tunes = fine_tunes.iter().map(measure).collect::<Result<Vec<_>>>()?;
    Ok(Comparison::new(weight_bytes(&base)?, fine_tunes, options.tenants, options.bandwidth))
}

/// Key and name of a way, whether it needs the base, whether it can be computed on, and its bytes.
type KeepingWay = (&'static str, &'static str, bool, bool, fn(&Footprint) -> Option<u64>);

const WAYS: [KeepingWay; 7] = [
    ("separate", "separate copies", false, true, |f| Some(f.bytes)),
    ("a", "A: the XOR as it is", true, true, |f| Some(f.bytes)),
    ("b", "B: zstd-10 of the XOR", true, false, |f| f.zstd_bytes),
    ("c32", "C32: COO, 32-bit indices", true, true, |f| Some(f.coo32_bytes)),
    ("c64", "C64: COO, 64-bit indices", true, true, |f| Some(f.coo64_bytes)),
    ("memory", "xorz, prefer=memory", true, true, |f| Some(f.memory_bytes)),
    ("speed", "xorz, prefer=speed", true, true, |f| Some(f.speed_bytes)),
];

impl Comparison {
    fn new(base_bytes: u64, fine_tunes: Vec<Footprint>, tenants: u64, bandwidth: Option<f64>) -> Self {
        let count = fine_tunes.len() as u64;
        let sum = |of: fn(&Footprint) -> Option<u64>| fine_tunes.iter().map(of).sum::<Option<u64>>();
        let strategy = |&(key, name, shared, computes, of): &KeepingWay| {
            let sum = sum(of)?;
            let total_bytes = times(sum, tenants, count).saturating_add(if shared { base_bytes } else { 0 });
            let step_seconds = bandwidth.filter(|_| computes).map(|b| total_bytes as f64 / b);
            Some(Strategy { key, name, tenant_bytes: sum.div_ceil(count), total_bytes, step_seconds })
        };
        let strategies: Vec<Strategy> = WAYS.iter().filter_map(strategy).collect();
        let separate = sum(|f| Some(f.bytes)).unwrap_or(0);
        let memory = sum(|f| Some(f.memory_bytes)).unwrap_or(0);
        let speed = sum(|f| Some(f.speed_bytes)).unwrap_or(0);
        let from = |ours| break_even(base_bytes, separate, ours, count);
        let break_even = BreakEven { memory: from(memory), speed: from(speed) };
        let better = match break_even.memory {
            Some(from) if from <= tenants && memory <= separate / 2 => Better::Xorz,
            Some(from) if from <= tenants => Better::Either,
            _ => Better::Separate,
        };
        Self { base_bytes, tenants, bandwidth, fine_tunes, strategies, break_even, better }
    }

    /// The way of that key.
    pub fn strategy(&self, key: &str) -> Option<&Strategy> {
        self.strategies.iter().find(|s| s.key == key)
    }

    /// As one JSON object.
    ///
    /// # Errors
    /// `Internal` only.
    pub fn to_json(&self) -> Result<String> {
        to_json(self)
    }
}

/// `sum * tenants / count`, rounded up.
fn times(sum: u64, tenants: u64, count: u64) -> u64 {
    let all = (u128::from(sum) * u128::from(tenants)).div_ceil(u128::from(count.max(1)));
    u64::try_from(all).unwrap_or(u64::MAX)
}

/// The least `n` with `base + n * ours / count < n * separate / count`.
fn break_even(base: u64, separate: u64, ours: u64, count: u64) -> Option<u64> {
    let saved = separate.checked_sub(ours).filter(|s| *s > 0)?;
    u64::try_from(u128::from(base) * u128::from(count) / u128::from(saved) + 1).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fine_tune(bytes: u64, memory_bytes: u64, speed_bytes: u64) -> Footprint {
        let coo32_bytes = 3 * memory_bytes;
        Footprint { bytes, memory_bytes, speed_bytes, coo32_bytes, ..Footprint::default() }
    }

    #[test]
    fn break_even_is_the_first_number_that_is_smaller_and_no_smaller_one_is() {
        for (base, f, d) in
            [(100, 100, 10), (100, 100, 50), (100, 100, 99), (7, 3, 2), (1000, 10, 9), (0, 5, 1)]
        {
            let n = break_even(base, f, d, 1).unwrap();
            assert!(base + n * d < n * f, "{base} {f} {d}: {n}");
            assert!(n == 1 || base + (n - 1) * d >= (n - 1) * f, "{base} {f} {d}: {n} is not the first");
        }
        assert_eq!(break_even(100, 100, 100, 1), None);
        assert_eq!(break_even(100, 100, 130, 3), None);
        assert_eq!(break_even(u64::MAX, u64::MAX, u64::MAX - 1, 1000), None, "beyond what can be said");
    }

    #[test]
    fn several_fine_tunes_count_by_their_mean() {
        let c = Comparison::new(100, vec![fine_tune(100, 10, 20), fine_tune(100, 31, 20)], 4, Some(1e3));
        let get = |key| c.strategy(key).map(|s| (s.tenant_bytes, s.total_bytes, s.step_seconds));
        assert_eq!(get("separate"), Some((100, 400, Some(0.4))));
        assert_eq!(get("a"), Some((100, 500, Some(0.5))));
        assert_eq!(get("b"), None, "not measured");
        assert_eq!(get("memory"), Some((21, 182, Some(0.182))));
        assert_eq!(get("c32"), Some((62, 346, Some(0.346))));
        assert_eq!((c.break_even.memory, c.break_even.speed, c.better), (Some(2), Some(2), Better::Xorz));
    }

    #[test]
    fn what_is_better_follows_from_the_numbers() {
        let better =
            |memory, tenants| Comparison::new(100, vec![fine_tune(100, memory, 99)], tenants, None).better;
        assert_eq!(better(10, 1), Better::Separate, "the base alone is as large as one fine-tune");
        assert_eq!(better(10, 2), Better::Xorz);
        assert_eq!(better(80, 5), Better::Separate);
        assert_eq!(better(80, 6), Better::Either);
        assert_eq!(better(101, 1000), Better::Separate);
    }
}
