//! The parts of the page, from what packages say of themselves.

use super::exponents::{self, Shares};
use super::{html, layers, words};
use crate::package::{Codec, Entry, Package, Report, SourceFile};
use std::collections::{BTreeMap, HashMap};

/// Tensors listed, and source files.
const TENSORS: usize = 20;
const FILES: usize = 10;
/// Packages that get maps and lists of their own; all are in the comparison.
const IN_FULL: usize = 4;
/// Characters of a name.
const NAME: usize = 72;

/// The whole page; `shares` holds nothing where no base was given, else one for every package.
pub(super) fn page(names: &[&str], packages: &[&Package], shares: &[Shares]) -> String {
    let title = match names {
        [one] => html::name(one, NAME),
        all => format!("{} packages", all.len()),
    };
    let head =
        include_str!("head.html").replace("{style}", include_str!("style.css")).replace("{title}", &title);
    let mut out = format!(
        "{head}<body>\n<header><h1>{title}</h1>\n\
         <p class=note>What a fine-tune changed, and how xorz stores it. A word is one weight; changed means that its bits \
         differ from the base's.</p></header>\n<main>\n"
    );
    if packages.len() > 1 {
        out += &comparison(names, packages);
        out += &by_exponent(shares);
    }
    for (name, package) in names.iter().zip(packages).take(IN_FULL) {
        if packages.len() > 1 {
            out += &format!("<section><h2>{}</h2></section>\n", html::name(name, NAME));
        }
        out += &cards(package);
        out += &map_section(package);
        if packages.len() == 1 {
            out += &by_exponent(shares);
        }
        out += &encodings(package);
        out += &tensors(package);
        out += &files(package);
    }
    if packages.len() > IN_FULL {
        out += &format!("<p class=note>Only the first {IN_FULL} packages are shown in full.</p>\n");
    }
    let version = env!("CARGO_PKG_VERSION");
    out + &format!(
        "</main>\n<footer><p>Made by xorz {version}, <code>xorz inspect --html</code>.</p></footer>\n</body></html>\n"
    )
}

fn cards(package: &Package) -> String {
    let r = Report::of(package);
    let deltas = r.tensors - r.alone - r.same;
    let card = |value: String, what: String| format!("<div><b>{value}</b><span>{what}</span></div>\n");
    let mut out = String::from("<div class=cards>\n");
    out += &card(
        html::percent(r.changed, r.words),
        format!("of the words changed: {} of {}", html::count(r.changed), html::count(r.words)),
    );
    out += &card(
        html::bytes(r.package_bytes),
        format!(
            "{} bytes, {} of the fine-tune's {}",
            html::count(r.package_bytes),
            html::percent(r.package_bytes, r.tensor_bytes),
            html::bytes(r.tensor_bytes)
        ),
    );
    let stored = package
        .entries()
        .iter()
        .filter(|e| e.codec.delta())
        .fold(0u64, |a, e| a.saturating_add(e.stored_bytes));
    out += &card(html::bits(stored, r.words), "bits per word of all deltas".into());
    let mut kinds = format!(
        "tensors: {} deltas ({} unchanged)",
        html::count(deltas as u64),
        html::count(r.unchanged as u64)
    );
    for (n, what) in
        [(r.alone, "stored alone"), (r.same, "the same as another"), (r.removed, "of the base removed")]
    {
        if n > 0 {
            kinds += &format!(", {} {what}", html::count(n as u64));
        }
    }
    out += &card(html::count(r.tensors as u64), kinds);
    out + "</div>\n"
}

fn map_section(package: &Package) -> String {
    let maps = layers::maps(package);
    if maps.is_empty() {
        return html::section("Where it changed", "No tensor's name holds the number of a layer.", "");
    }
    let note = "Percents of the words of each layer (rows) and kind of module (columns) that changed.";
    html::section("Where it changed", note, &(layers::legend() + &maps))
}

fn by_exponent(shares: &[Shares]) -> String {
    let title = "Changed by size of the base's weight";
    if shares.is_empty() {
        let note = "Training moves a weight by about the learning rate, so small weights change and large ones round back. \
                    A package does not hold the base's weights: run again with <code>--base BASE</code> to see it here.";
        return html::section(title, note, "");
    }
    let note = "Training moves a weight by about the learning rate, so small weights change and large ones round back: \
                what the encoding <code>exponent</code> uses. A row holds the weights from its size to twice that.";
    html::section(title, note, &exponents::chart(shares))
}

/// What tensors of one encoding have in common.
#[derive(Default)]
struct Group {
    tensors: u64,
    words: u64,
    changed: u64,
    bytes: u64,
}

fn encodings(package: &Package) -> String {
    let mut groups: BTreeMap<(&str, &str, &str), Group> = BTreeMap::new();
    for e in package.entries() {
        let dtype = e.word_dtype().map_or("other", |d| d.name());
        let g =
            groups.entry((e.encoding.map_or("\u{2013}", |x| x.name()), e.codec.name(), dtype)).or_default();
        g.tensors += 1;
        g.words = g.words.saturating_add(words(e));
        g.changed = g.changed.saturating_add(e.changed.unwrap_or(0));
        g.bytes = g.bytes.saturating_add(e.stored_bytes);
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(_, g)| std::cmp::Reverse(g.bytes));
    let row = |((encoding, codec, dtype), g): ((&str, &str, &str), Group)| {
        vec![
            encoding.into(),
            html::percent(g.changed, g.words),
            html::bytes(g.bytes),
            html::bits(g.bytes, g.words),
            html::count(g.tensors),
            html::count(g.words),
            codec.into(),
            dtype.into(),
        ]
    };
    let rows: Vec<_> = groups.into_iter().map(row).collect();
    let head = ["encoding", "changed", "stored", "bits/word", "tensors", "words", "codec", "dtype"];
    let note = "Encoding: how a delta lies in memory. Codec: how it lies in the package.";
    html::section("How it is stored", note, &html::table(&head, &[0, 6, 7], &rows))
}

fn tensors(package: &Package) -> String {
    let mut order: Vec<&Entry> = package.entries().iter().collect();
    order.sort_by(|a, b| (b.stored_bytes, &a.name).cmp(&(a.stored_bytes, &b.name)));
    let total = order.iter().fold(0u64, |a, e| a.saturating_add(e.stored_bytes));
    let rows: Vec<_> = order.iter().take(TENSORS).map(|e| tensor(e, total)).collect();
    let head = ["tensor", "changed", "stored", "of all", "bits/word", "words", "encoding", "kind"];
    let left = order.len().saturating_sub(TENSORS);
    let note = match left {
        0 => "By the bytes that they take in the package.".to_owned(),
        n => format!(
            "By the bytes that they take in the package; {} smaller ones follow.",
            html::count(n as u64)
        ),
    };
    html::section("Biggest tensors", &note, &html::table(&head, &[0, 6, 7], &rows))
}

fn tensor(e: &Entry, total: u64) -> Vec<String> {
    let n = words(e);
    let dims: Vec<String> = e.dims.iter().take(6).map(usize::to_string).collect();
    let dims = dims.join("\u{d7}") + if e.dims.len() > 6 { "\u{2026}" } else { "" };
    vec![
        format!("<code>{}</code>", html::path(&e.name, NAME)),
        e.changed.map_or("\u{2013}".into(), |c| html::percent(c, n)),
        html::bytes(e.stored_bytes),
        html::bar(e.stored_bytes, total),
        html::bits(e.stored_bytes, n),
        html::count(n),
        e.encoding.map_or_else(|| e.codec.name(), |x| x.name()).into(),
        format!("{} {dims}", html::name(&e.dtype, 12)),
    ]
}

fn files(package: &Package) -> String {
    let all = package.files();
    if all.is_empty() {
        return String::new();
    }
    let row = |f: &SourceFile| {
        let sha256: String = f.sha256.chars().take(64).collect();
        vec![html::name(&f.path, NAME), html::bytes(f.bytes), format!("<code>{}</code>", html::text(&sha256))]
    };
    let rows: Vec<_> = all.iter().take(FILES).map(row).collect();
    let note = match all.len().saturating_sub(FILES) {
        0 => String::from("<code>xorz unpack</code> gives back these files, byte for byte."),
        n => format!(
            "<code>xorz unpack</code> gives back these files, byte for byte, and {} more.",
            html::count(n as u64)
        ),
    };
    html::section("Made from", &note, &html::table(&["file", "size", "sha256"], &[0, 1, 2], &rows))
}

fn comparison(names: &[&str], packages: &[&Package]) -> String {
    let row = |(i, (name, package)): (usize, (&&str, &&Package))| {
        let r = Report::of(package);
        vec![
            format!("{}. {}", i + 1, html::path(name, NAME)),
            html::percent(r.changed, r.words),
            html::count(r.changed),
            html::bytes(r.package_bytes),
            html::percent(r.package_bytes, r.tensor_bytes),
            html::count(r.tensors as u64),
            html::count(r.alone as u64),
        ]
    };
    let rows: Vec<_> = names.iter().zip(packages).enumerate().map(row).collect();
    let head = ["package", "changed", "words changed", "size", "of the fine-tune", "tensors", "alone"];
    let body = html::table(&head, &[0], &rows) + "<h3>Changed, by kind of module</h3>\n" + &layers::legend();
    html::section("Side by side", &one_base(packages), &(body + &layers::compare(packages)))
}

/// Whether the packages are deltas of one base.
fn one_base(packages: &[&Package]) -> String {
    let mut seen: HashMap<&str, (usize, &crate::matrix::Digest)> = HashMap::new();
    let (mut shared, mut other) = (0u64, None);
    for (i, package) in packages.iter().enumerate() {
        for base in
            package.entries().iter().filter(|e| e.codec != Codec::Same).filter_map(|e| e.base.as_ref())
        {
            match seen.get(base.name.as_str()) {
                Some((first, digest)) if **digest == base.digest => shared += u64::from(*first < i),
                Some((first, _)) => other = other.or(Some((*first, i, base.name.as_str()))),
                None => {
                    seen.insert(&base.name, (i, &base.digest));
                }
            }
        }
    }
    match other {
        Some((a, b, name)) => format!(
            "<b>Not of one base:</b> packages {} and {} were made against different tensors <code>{}</code>.",
            a + 1,
            b + 1,
            html::name(name, NAME)
        ),
        None if shared == 0 => "No tensor of a base is common to them.".into(),
        None => {
            "All are deltas of the same base, by the digests of the tensors that they have in common.".into()
        }
    }
}
