//! Promise: `xorz inspect --html` writes one page that needs nothing but itself, says what `--json` says,
//! stays well-formed and small whatever a package says, and compares packages of one base.

use crate::common::data::{Rng, perturbed, stepped};
use crate::common::disk::{Tensor, done, names, refused, safetensors, xorz};
use crate::common::forge::{Forge, hex};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use xorz::matrix::Dtype;

const KINDS: [&str; 3] = ["self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"];

/// A model of three layers, and fine-tunes `ft` (stepped) and `other` (of another base).
fn model(d: &Path) -> (Vec<Tensor>, Vec<Tensor>) {
    let mut rng = Rng::new(8);
    let (mut base, mut ft) = (Vec::new(), Vec::new());
    let mut add = |name: String, dims: Vec<usize>, lr: f64| {
        let b = rng.weights(Dtype::BF16, dims.iter().product());
        let f = stepped(&mut rng, Dtype::BF16, &b, lr);
        base.push((name.clone(), "BF16", dims.clone(), b));
        ft.push((name, "BF16", dims, f));
    };
    for layer in 0..3 {
        add(format!("model.layers.{layer}.{}", KINDS[0]), vec![96, 128], 2e-5 * f64::from(layer));
        add(format!("model.layers.{layer}.{}", KINDS[1]), vec![200, 128], 2e-4);
        add(format!("model.layers.{layer}.{}", KINDS[2]), vec![128], 1e-3);
    }
    add("lm_head.weight".into(), vec![300, 128], 1e-5);
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    fs::write(d.join("ft"), safetensors(&ft)).unwrap();
    done(d, &["pack", "base", "ft", "-o", "p.xorz"]);
    (base, ft)
}

/// The page, after checks that hold for every page.
fn page(d: &Path, args: &[&str]) -> String {
    let out = done(d, &[&["inspect"], args, &["--html", "page.html"]].concat());
    assert_eq!(out, "page      page.html\n");
    let page = fs::read_to_string(d.join("page.html")).unwrap();
    well_formed(&page);
    let lower = page.to_lowercase();
    for outside in [
        "http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link", "<img", "<iframe",
        "<object",
    ] {
        assert!(!lower.contains(outside), "the page has {outside}");
    }
    assert!(page.contains("default-src 'none'"), "no policy");
    page
}

/// Tags nest and close, attributes are known ones, and no stray `<`, `>` or `&` is left.
fn well_formed(page: &str) {
    let page = page.strip_prefix("<!DOCTYPE html>\n").expect("no doctype");
    let (mut rest, mut open) = (page, Vec::new());
    while let Some(at) = rest.find('<') {
        text(&rest[..at], open.last() == Some(&"style"));
        let end = rest[at..].find('>').expect("a tag without an end") + at;
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "</{name}> closes something else");
            continue;
        }
        let name = tag.split(' ').next().unwrap();
        assert!(
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
            "<{tag}>"
        );
        assert!(!tag.contains(" on"), "<{tag}>");
        if !["meta", "wbr"].contains(&name) {
            open.push(name);
        }
    }
    assert_eq!((open, rest.trim()), (vec![], ""), "left open, or left over");
}

fn text(text: &str, style: bool) {
    assert!(!text.contains('>') || style, "{text}");
    for part in text.split('&').skip(1).filter(|_| !style) {
        let name = part.split(';').next().unwrap();
        assert!(["amp", "lt", "gt", "quot", "#39", "nbsp"].contains(&name), "&{part}");
    }
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "a control is left");
}

fn grouped(v: &Value) -> String {
    let digits = v.as_u64().unwrap().to_string();
    let parts: Vec<_> = digits.as_bytes().rchunks(3).rev().map(|c| std::str::from_utf8(c).unwrap()).collect();
    parts.join(",")
}

/// What the map prints for a share.
fn percents(changed: u64, words: u64) -> String {
    match 100.0 * changed as f64 / words as f64 {
        0.0 => "0".into(),
        p if p < 0.01 => "&lt;.01".into(),
        p if p < 0.995 => format!("{p:.2}")[1..].into(),
        p if p < 9.95 => format!("{p:.1}"),
        p => format!("{p:.0}"),
    }
}

#[test]
fn the_page_says_what_json_says() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    model(d);
    let page = page(d, &["p.xorz"]);
    let json: Value = serde_json::from_str(&done(d, &["inspect", "p.xorz", "--json"])).unwrap();
    for key in ["changed", "words", "package_bytes", "tensors"] {
        assert!(page.contains(&grouped(&json[key])), "{key} {}", json[key]);
    }
    for file in json["files"].as_array().unwrap() {
        assert!(page.contains(file["sha256"].as_str().unwrap()));
    }
    let entries = json["entries"].as_array().unwrap();
    let find = |name: &str| entries.iter().find(|e| e["name"] == name).unwrap();
    for e in entries {
        assert!(
            page.contains(&format!("<code>{}</code>", e["name"].as_str().unwrap().replace('.', ".<wbr>"))),
            "{e}"
        );
        let bits = 8.0 * e["stored_bytes"].as_f64().unwrap() / (e["bytes"].as_f64().unwrap() / 2.0);
        assert!(page.contains(&format!(">{bits:.3}<")), "{e}");
        // Tensors without a resident delta are told by their codec.
        let form = e["encoding"].as_str().or(e["codec"].as_str());
        assert!(page.contains(form.unwrap()), "{e}");
    }
    // The map: a row for each layer, its cells in order of the kinds.
    for layer in 0..3 {
        let start = format!("<tr><th scope=\"row\">{layer}</th>");
        let row = &page[page.find(&start).unwrap() + start.len()..];
        let row = &row[..row.find("</tr>").unwrap()];
        let cells: Vec<_> =
            row.split("</td>").filter(|c| !c.is_empty()).map(|c| c.rsplit('>').next().unwrap()).collect();
        let mut kinds = KINDS;
        kinds.sort_unstable();
        let want = kinds.map(|kind| {
            let e = find(&format!("model.layers.{layer}.{kind}"));
            percents(e["changed"].as_u64().unwrap(), e["bytes"].as_u64().unwrap() / 2)
        });
        assert_eq!(cells, want, "layer {layer}");
    }
    assert!(page.contains("--base BASE"), "it says what a base would add");
    assert_eq!(done(d, &["inspect", "p.xorz", "--html", "-"]), page);
    let both = done(d, &["inspect", "p.xorz", "--html", "q.html", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&both).unwrap(), json);
    assert_eq!(fs::read_to_string(d.join("q.html")).unwrap(), page);
}

#[test]
fn with_a_base_shares_are_counted_by_exponent_for_every_codec() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = model(d);
    let mut counts: BTreeMap<i32, [u64; 2]> = BTreeMap::new();
    for (b, f) in base.iter().zip(&ft) {
        for (b, f) in b.3.chunks(2).zip(f.3.chunks(2)) {
            let field = i32::from(u16::from_le_bytes([b[0], b[1]]) >> 7 & 255);
            let row = counts.entry(field).or_default();
            *row = [row[0] + 1, row[1] + u64::from(b != f)];
        }
    }
    assert!(counts.len() > 8 && counts.len() < 32, "{counts:?}");
    let packages: [&[&str]; 3] = [&[], &["--codec", "planes"], &["--codec", "xor"]];
    for options in packages {
        done(d, &[&["pack", "base", "ft", "-o", "p.xorz"], options].concat());
        for jobs in ["1", "3"] {
            let page = page(d, &["p.xorz", "--base", "base", "-j", jobs]);
            for (field, [words, changed]) in &counts {
                let label = match field {
                    0 => "<td>0</td>".to_owned(),
                    _ => format!("<td>2<sup>{}</sup>", (field - 127).to_string().replace('-', "\u{2212}")),
                };
                let row = &page[page.find(&label).unwrap_or_else(|| panic!("no row {label}"))..];
                let row = &row[..row.find("</tr>").unwrap()];
                assert!(row.contains(&format!(">{}<", grouped(&(*words).into()))), "{row}: {words}");
                let share = 100.0 * *changed as f64 / *words as f64;
                let share =
                    if share == 0.0 || share >= 1.0 { format!("{share:.1}") } else { format!("{share:.3}") };
                assert!(row.contains(&format!("<td class=n>{share}&nbsp;%")), "{row}: {share}");
            }
        }
    }
}

/// The row of the most frequent exponent, as the map of several packages prints it.
fn exponents_side_by_side(base: &[Tensor], tunes: &[&Vec<Tensor>]) -> String {
    let mut counts: BTreeMap<i32, Vec<u64>> = BTreeMap::new();
    for (i, b) in base.iter().enumerate() {
        for (at, word) in b.3.chunks(2).enumerate() {
            let field = i32::from(u16::from_le_bytes([word[0], word[1]]) >> 7 & 255);
            let row = counts.entry(field).or_insert_with(|| vec![0; 1 + tunes.len()]);
            row[0] += 1;
            for (n, tune) in row[1..].iter_mut().zip(tunes) {
                *n += u64::from(word != &tune[i].3[2 * at..2 * at + 2]);
            }
        }
    }
    let total: u64 = counts.values().map(|r| r[0]).sum();
    let (field, row) = counts.iter().max_by_key(|(_, r)| r[0]).unwrap();
    let power = (field - 127).to_string().replace('-', "\u{2212}");
    let size = 2f64.powi(field - 127);
    let size = format!("{size:.*}", (1.0 - size.log10().floor()) as usize);
    let cells: String = row[1..]
        .iter()
        .map(|n| {
            let percent = 100.0 * *n as f64 / row[0] as f64;
            let steps = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0];
            let heat = if *n == 0 { 0 } else { 1 + steps.iter().filter(|s| percent >= **s).count() };
            format!("<td class=h{heat}>{}</td>", percents(*n, row[0]))
        })
        .collect();
    let share = 100.0 * row[0] as f64 / total as f64;
    format!(
        "<tr><th scope=\"row\">2<sup>{power}</sup>&nbsp;\u{2248}&nbsp;{size}</th>{cells}<td>{share:.1}&nbsp;%</td></tr>"
    )
}

#[test]
fn several_packages_are_compared_and_other_bases_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = model(d);
    let mut rng = Rng::new(9);
    let more: Vec<Tensor> = base
        .iter()
        .map(|(n, t, dims, b)| (n.clone(), *t, dims.clone(), perturbed(&mut rng, Dtype::BF16, b, 0.02)))
        .collect();
    fs::write(d.join("more"), safetensors(&more)).unwrap();
    done(d, &["pack", "base", "more", "-o", "q.xorz"]);
    done(d, &["pack", "more", "ft", "-o", "r.xorz"]);
    let both = page(d, &["p.xorz", "q.xorz", "--base", "base"]);
    for said in ["All are deltas of the same base", "1. p.<wbr>xorz", "2. q.<wbr>xorz"] {
        assert!(both.contains(said), "{said}");
    }
    assert!(both.contains(&exponents_side_by_side(&base, &[&ft, &more])), "by exponent");
    let json: Value = serde_json::from_str(&done(d, &["inspect", "p.xorz", "q.xorz", "--json"])).unwrap();
    for p in json["packages"].as_array().unwrap() {
        assert!(both.contains(&format!("<td class=n>{}</td>", grouped(&p["changed"]))), "{}", p["path"]);
    }
    // A row for each kind of module, a column for each package.
    for kind in ["self_attn.q_proj", "mlp.up_proj", "input_layernorm", "lm_head.weight"] {
        let want: String = json["packages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| {
                let of = p["entries"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|e| e["name"].as_str().unwrap().contains(kind));
                let sum = of.fold([0, 0], |s, e| {
                    [s[0] + e["changed"].as_u64().unwrap(), s[1] + e["bytes"].as_u64().unwrap() / 2]
                });
                format!("|{}", percents(sum[0], sum[1]))
            })
            .collect();
        let start = format!("<tr><th scope=\"row\">{kind}</th>");
        let row = &both[both.find(&start).unwrap_or_else(|| panic!("no row {kind}")) + start.len()..];
        let row = &row[..row.find("</tr>").unwrap()];
        let found: String = row
            .split("</td>")
            .filter(|c| !c.is_empty())
            .map(|c| format!("|{}", c.rsplit('>').next().unwrap()))
            .collect();
        assert_eq!(found, want, "{kind}");
    }
    let strange = page(d, &["p.xorz", "r.xorz"]);
    assert!(strange.contains("Not of one base:") && strange.contains("packages 1 and 2"));
    let text = done(d, &["inspect", "p.xorz", "q.xorz"]);
    assert_eq!(text.matches("package   ").count(), 2, "{text}");

    let before = (names(d), fs::read(d.join("p.xorz")).unwrap());
    refused(
        d,
        &["inspect", "p.xorz", "--html", "new.html", "--base", "more"],
        1,
        &["another base", "xorz digest BASE"],
    );
    refused(d, &["inspect", "p.xorz", "--html", "p.xorz"], 2, &["overwrite"]);
    refused(d, &["inspect", "p.xorz", "--html", "base", "--base", "base"], 2, &["overwrite"]);
    refused(d, &["inspect", "p.xorz", "--html", "no/where.html"], 4, &["no/where.html", "make it first"]);
    refused(d, &["inspect", "p.xorz", "--html", "-", "--json"], 2, &["--html -"]);
    refused(d, &[&["inspect", "--html", "new.html"][..], &["p.xorz"; 17]].concat(), 2, &["1 to 16", "17"]);
    assert_eq!(
        xorz(d, &["inspect", "p.xorz", "--base", "base"]).status.code(),
        Some(2),
        "a base is for a page"
    );
    assert_eq!((names(d), fs::read(d.join("p.xorz")).unwrap()), before);
}

#[test]
fn hostile_names_and_a_hundred_thousand_tensors_make_a_small_harmless_page() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let hostile = [
        "<script>alert(1)</script>".to_owned(),
        "\"><img src=x onerror=alert(1)>".into(),
        "'--></style><!--&amp;&#x3c;".into(),
        "a\u{1b}[2J\r\n\u{0}b\u{202e}c\u{2066}d".into(),
        format!("https://example.org/{}", "x".repeat(4000)),
        format!("{}.1.{}", "<b>".repeat(1 << 10), "&".repeat(1 << 9)),
    ];
    let mut forge = Forge::new();
    let mut add = |name: &str, dims: &[u64], changed: u64| {
        let bytes = 2 * dims.iter().product::<u64>();
        let record = serde_json::json!({
            "dtype": "BF16", "shape": dims, "bytes": bytes, "codec": "xor", "base": hex(b"x"), "prefer": "memory",
            "changed": changed
        });
        forge = std::mem::take(&mut forge).tensor(name, &record.to_string(), vec![0; 3]);
    };
    for (i, name) in hostile.iter().enumerate() {
        add(name, &[1 << 20, 4], i as u64);
        add(&format!("s.{i}.{name}"), &[1 << 30, 1, 1, 1, 1, 1, 1, 1, 1], 1 << 30);
    }
    (0..100_000).for_each(|i| add(&format!("<i>{}.{}.k{}<", i % 7, i / 50, i % 50), &[1], 1));
    fs::write(d.join("<script>alert(2)<&.xorz"), forge.build()).unwrap();
    let out = done(d, &["inspect", "<script>alert(2)<&.xorz", "--html", "page.html"]);
    assert!(out.starts_with("page"));
    let page = fs::read_to_string(d.join("page.html")).unwrap();
    well_formed(&page);
    assert!(page.len() < 300_000, "{} bytes", page.len());
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(page.contains("100,012") && page.contains("are left out"));
    for bad in ["<script", "<img", "<i>", "<!--", "\u{202e}", "\u{1b}"] {
        assert!(!page.contains(bad), "{bad:?}");
    }
}
