//! Which words changed, by the exponent of the base's: what a package does not store, and its base tells.

use super::html;
use super::layers::{self, Cell};
use crate::error::Result;
use crate::matrix::Dtype;
use crate::package::checkpoint::bases::BaseDigests;
use crate::package::io::aligned::Aligned;
use crate::package::io::ordered;
use crate::package::jobs::restore;
use crate::package::jobs::unpack::restore_on;
use crate::package::{Checkpoint, Codec, Package, Run, TensorFile};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Exponents shown, those with the most words; the others are one row.
const ROWS: usize = 32;

/// Words of the base and how many of them changed, by exponent: a word w has |w| in 2^e to 2^(e+1). `None` is 0 with
/// everything too small to have an exponent.
pub(super) type Shares = BTreeMap<Option<i32>, [u64; 2]>;

/// Bits below the exponent, bits of the exponent. `None` for integers.
fn fields(dtype: Dtype) -> Option<(u32, u32)> {
    match dtype {
        Dtype::F32 => Some((23, 8)),
        Dtype::BF16 => Some((7, 8)),
        Dtype::F16 => Some((10, 5)),
        Dtype::F64 => Some((52, 11)),
        Dtype::F8E4M3 => Some((3, 4)),
        Dtype::F8E5M2 => Some((2, 5)),
        _ => None,
    }
}

/// What a thread keeps from piece to piece: counts by exponent field.
#[derive(Default)]
struct PageScratch {
    restore: restore::RestoreScratch,
    base: Aligned,
    counts: Vec<[u64; 2]>,
}

impl PageScratch {
    fn count(&mut self, dtype: Dtype) {
        let (fine_tuned, base) = (self.restore.words(), self.base.get());
        match dtype.word_bytes() {
            1 => tally::<1>(dtype, base, fine_tuned, &mut self.counts),
            2 => tally::<2>(dtype, base, fine_tuned, &mut self.counts),
            4 => tally::<4>(dtype, base, fine_tuned, &mut self.counts),
            _ => tally::<8>(dtype, base, fine_tuned, &mut self.counts),
        }
    }
}

fn tally<const W: usize>(dtype: Dtype, base: &[u8], fine_tuned: &[u8], counts: &mut Vec<[u64; 2]>) {
    let Some((mantissa, exponent)) = fields(dtype) else { return };
    counts.clear();
    counts.resize(1 << exponent, [0; 2]);
    let ((base, _), (fine_tuned, _)) = (base.as_chunks::<W>(), fine_tuned.as_chunks::<W>());
    for (b, f) in base.iter().zip(fine_tuned) {
        let word = b.iter().rev().fold(0u64, |v, x| (v << 8) | u64::from(*x));
        let count = &mut counts[(word >> mantissa) as usize & ((1 << exponent) - 1)];
        count[0] += 1;
        count[1] += u64::from(b != f);
    }
}

/// Restore every floating tensor of `package` on `base`, comparing digests, and count.
///
/// # Errors
/// `Mismatch` for a base of another digest; `Corrupt` or `Truncated` for bad stored bytes; `Io`. Messages name the tensor.
pub(super) fn shares(base: &Checkpoint, package: &Package, run: &Run<'_>) -> Result<Shares> {
    let deltas = package.entries().iter().filter(|e| e.codec.delta() && e.codec != Codec::Same);
    let mut entries: Vec<_> =
        deltas.filter_map(|e| Some((e, e.word_dtype().filter(|d| fields(*d).is_some())?))).collect();
    entries.sort_by_key(|(e, _)| std::cmp::Reverse(e.bytes));
    run.begin("compare", entries.iter().fold(0, |sum, (e, _)| e.bytes.saturating_add(sum)));
    let (digests, sum) = (BaseDigests::cached(base), Mutex::new(Shares::new()));
    ordered::side_by_side(ordered::threads(run.jobs), entries.len(), |i, crew| {
        let (entry, dtype) = entries[i];
        let job = restore_on(base, &digests, package, entry)?;
        let words = job.base_words()?;
        let mut taken = job.begin();
        let mut counts = vec![[0u64; 2]; 1 << fields(dtype).map_or(0, |f| f.1)];
        ordered::in_order::<PageScratch>(
            crew,
            job.pieces.count(),
            |index, s| {
                job.make(index, &mut s.restore)?;
                words.get(job.pieces.bytes(index), &mut s.base)?;
                if !job.forwards()? {
                    s.count(dtype);
                }
                Ok(())
            },
            |_, s| {
                taken.take(&mut s.restore)?;
                if job.forwards()? {
                    s.count(dtype);
                }
                run.advance(s.base.get().len() as u64)?;
                counts.iter_mut().zip(&s.counts).for_each(|(a, b)| *a = [a[0] + b[0], a[1] + b[1]]);
                Ok(())
            },
        )?;
        taken.finish()?;
        let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
        for (field, [words, changed]) in counts.into_iter().enumerate().filter(|(_, c)| c[0] > 0) {
            let bias = (1 << (fields(dtype).map_or(1, |f| f.1) - 1)) - 1;
            let row = sum.entry((field > 0).then_some(field as i32 - bias)).or_default();
            *row = [row[0] + words, row[1] + changed];
        }
        Ok(())
    })?;
    base.files().iter().try_for_each(TensorFile::check_unchanged)?;
    Ok(sum.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The exponents of all packages, large ones first: of one package with a bar, of several as a heat map.
pub(super) fn chart(all: &[Shares]) -> String {
    // Packages of one base count the same words, or some of them: the most that any of them counts.
    let mut words: BTreeMap<Option<i32>, u64> = BTreeMap::new();
    for (e, [n, _]) in all.iter().flatten() {
        let most = words.entry(*e).or_default();
        *most = (*most).max(*n);
    }
    let mut order: Vec<_> = words.iter().map(|(e, n)| (*n, *e)).collect();
    order.sort_unstable_by(|a, b| b.cmp(a));
    let mut shown: Vec<Option<i32>> = order.iter().take(ROWS).map(|(_, e)| *e).collect();
    shown.sort_unstable_by(|a, b| b.cmp(a));
    let total: u64 = words.values().sum();
    let of = |s: &Shares, e: &Option<i32>| s.get(e).copied().unwrap_or_default();
    let mut rows: Vec<Row> = shown
        .iter()
        .map(|e| Row { label: label(*e), words: words[e], shares: all.iter().map(|s| of(s, e)).collect() })
        .collect();
    let left = total - rows.iter().map(|r| r.words).sum::<u64>();
    if left > 0 {
        let other = |s: &Shares| {
            let left = s.iter().filter(|(e, _)| !shown.contains(e));
            left.fold([0, 0], |sum, (_, c)| [sum[0] + c[0], sum[1] + c[1]])
        };
        rows.push(Row { label: "all others".into(), words: left, shares: all.iter().map(other).collect() });
    }
    if all.len() == 1 { bars(&rows, total) } else { heat_table(&rows, total, all.len()) }
}

/// Words of one exponent, and words and changed words of each package.
struct Row {
    label: String,
    words: u64,
    shares: Vec<[u64; 2]>,
}

fn bars(rows: &[Row], total: u64) -> String {
    let row = |r: &Row| {
        let [n, changed] = r.shares.first().copied().unwrap_or_default();
        let share = format!("{} {}", html::percent(changed, n), html::bar(changed, n));
        vec![r.label.clone(), share, html::percent(r.words, total), html::count(r.words)]
    };
    let rows: Vec<_> = rows.iter().map(row).collect();
    html::table(&["|w| from", "changed", "of all", "words"], &[0], &rows)
}

fn heat_table(rows: &[Row], total: u64, packages: usize) -> String {
    let mut out = layers::legend();
    out += "<div class=wide><table class=heat>\n<thead><tr><th scope=\"col\">|w| from</th>";
    (1..=packages).for_each(|i| out += &format!("<th scope=\"col\">{i}</th>"));
    out += "<th scope=\"col\">of all</th></tr></thead>\n<tbody>\n";
    for r in rows {
        out += &format!("<tr><th scope=\"row\">{}</th>", r.label);
        for &[words, changed] in &r.shares {
            let cell = (words > 0).then_some(Cell { words, changed, alone: 0 });
            out += &layers::cell(cell.as_ref());
        }
        out += &format!("<td>{}</td></tr>\n", html::percent(r.words, total));
    }
    out + "</tbody></table></div>\n"
}

fn label(e: Option<i32>) -> String {
    let Some(e) = e else { return "0".into() };
    let size = 2f64.powi(e);
    // Two digits, as far as they can be read without counting zeros.
    let size = match size {
        s if (1e-4..1.0).contains(&s) => format!("{s:.*}", (1.0 - s.log10().floor()) as usize),
        s if (1.0..1e4).contains(&s) => format!("{s:.0}"),
        s => format!("{s:.0e}"),
    };
    format!("2<sup>{}</sup>&nbsp;\u{2248}&nbsp;{size}", e.to_string().replace('-', "\u{2212}"))
}
