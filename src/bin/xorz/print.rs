//! How numbers and tables look.

use std::path::Path;
use xorz::package::Report;

/// One line of a report: `label     text`.
pub(crate) fn row(label: &str, text: &str) -> String {
    format!("{label:<10}{text}\n")
}

/// The totals of a package, and each of its files unless they are printed elsewhere.
pub(crate) fn report(r: &Report, files: bool) -> String {
    let deltas = r.tensors - r.alone - r.same;
    let mut tensors =
        format!("{}: {deltas} deltas ({} unchanged), {} stored alone", r.tensors, r.unchanged, r.alone);
    if r.same > 0 {
        tensors += &format!(", {} the same as another", r.same);
    }
    if r.removed > 0 {
        tensors += &format!("; {} of the base removed", r.removed);
    }
    let codecs: Vec<_> = r.codecs.iter().map(|(name, n)| format!("{name} {n}")).collect();
    let changed = format!("{} of {} words in deltas", percent(r.changed, r.words), r.words);
    let size = format!(
        "{} for {} of tensors, {}",
        bytes(r.package_bytes),
        bytes(r.tensor_bytes),
        percent(r.package_bytes, r.tensor_bytes)
    );
    let mut out = row("tensors", &tensors) + &row("changed", &changed) + &row("size", &size);
    out += &row("codecs", &codecs.join(", "));
    for f in r.files.iter().filter(|_| files) {
        out += &row("sha256", &format!("{}  {}", name(&f.sha256), name(&f.path)));
    }
    out
}

/// A path as the user gave it; `-` in words.
pub(crate) fn path(path: &Path) -> String {
    if path.as_os_str() == "-" { "to standard output".into() } else { name(&path.display().to_string()) }
}

/// A name from a file, made harmless for a terminal.
pub(crate) fn name(text: &str) -> String {
    xorz::error::harmless(text)
}

/// JSON, which is made for programs, made harmless for the terminal of whoever looks at it: the same values, with such
/// characters written as JSON's escapes.
pub(crate) fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' || xorz::error::is_harmless(c) {
            out.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out += &format!("\\u{unit:04x}"));
        }
    }
    out
}

/// `1.5 MiB`
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.2} {unit}") }
}

/// `12.34 %`, with more digits where there is little.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    let p = 100.0 * part as f64 / whole as f64;
    if p == 0.0 || p >= 1.0 { format!("{p:.1} %") } else { format!("{p:.3} %") }
}

/// Stored bits of one word.
pub(crate) fn bits(bytes: u64, words: u64) -> String {
    if words == 0 { "-".into() } else { format!("{:.3}", 8.0 * bytes as f64 / words as f64) }
}

/// Columns, the last `right` of them right-aligned.
pub(crate) fn table<const N: usize>(rows: &[[String; N]], right: usize) -> String {
    let width: [usize; N] =
        std::array::from_fn(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0));
    let mut out = String::new();
    for r in rows {
        let cells: Vec<String> = (0..N)
            .map(|c| {
                let w = width[c];
                if c + right >= N { format!("{:>w$}", r[c]) } else { format!("{:<w$}", r[c]) }
            })
            .collect();
        out += cells.join("  ").trim_end();
        out += "\n";
    }
    out
}
