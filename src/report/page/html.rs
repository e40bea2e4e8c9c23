//! The little HTML that a page is made of: text made harmless, numbers, tables. Knows no package.

use crate::error::is_harmless;

/// Text from a package, for any place in a page: markup escaped; controls, and what turns the direction of a line, replaced.
pub(super) fn text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c if !is_harmless(c) => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A name of at most `most` characters, its middle left out where it is longer, harmless.
pub(super) fn name(full: &str, most: usize) -> String {
    if full.char_indices().nth(most).is_none() {
        return text(full);
    }
    let half = (most - 1) / 2;
    let start: String = full.chars().take(half).collect();
    let end: Vec<char> = full.chars().rev().take(half).collect();
    let end: String = end.into_iter().rev().collect();
    text(&format!("{start}\u{2026}{end}"))
}

/// [`name`], which may be broken after its dots where a column is narrow.
pub(super) fn path(full: &str, most: usize) -> String {
    name(full, most).replace('.', ".<wbr>")
}

/// `12,345`
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

/// `1.5 MiB`
pub(super) fn bytes(n: u64) -> String {
    let (mut value, mut unit) = (n as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n}&nbsp;B") } else { format!("{value:.2}&nbsp;{unit}") }
}

/// `12.3 %`, with more digits where there is little.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "\u{2013}".into();
    }
    match 100.0 * part as f64 / whole as f64 {
        p if p == 0.0 || p >= 1.0 => format!("{p:.1}&nbsp;%"),
        p if p < 0.0005 => "&lt;0.001&nbsp;%".into(),
        p => format!("{p:.3}&nbsp;%"),
    }
}

/// Stored bits of one word.
pub(super) fn bits(bytes: u64, words: u64) -> String {
    if words == 0 { "\u{2013}".into() } else { format!("{:.3}", 8.0 * bytes as f64 / words as f64) }
}

/// A bar whose width is the share.
pub(super) fn bar(part: u64, whole: u64) -> String {
    let share = if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 };
    if share == 0.0 {
        return "<span class=bar></span>".into();
    }
    format!("<span class=bar><i style=\"width:{:.2}%\"></i></span>", share.clamp(0.0, 100.0))
}

/// A table that scrolls sideways where it is too wide, so what matters comes first. Columns of `words` hold text, the others
/// numbers; cells are HTML already.
pub(super) fn table(head: &[&str], words: &[usize], rows: &[Vec<String>]) -> String {
    let class = |i: usize| if words.contains(&i) { "" } else { " class=n" };
    let mut out = String::from("<div class=wide><table>\n<thead><tr>");
    head.iter().enumerate().for_each(|(i, h)| out += &format!("<th scope=\"col\"{}>{h}</th>", class(i)));
    out += "</tr></thead>\n<tbody>\n";
    for row in rows {
        out += "<tr>";
        row.iter().enumerate().for_each(|(i, cell)| out += &format!("<td{}>{cell}</td>", class(i)));
        out += "</tr>\n";
    }
    out + "</tbody></table></div>\n"
}

/// A part of the page; `note` says how to read it.
pub(super) fn section(title: &str, note: &str, body: &str) -> String {
    let note = if note.is_empty() { String::new() } else { format!("<p class=note>{note}</p>\n") };
    format!("<section>\n<h2>{title}</h2>\n{note}{body}</section>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_markup_control_or_turn_of_direction_survives() {
        assert_eq!(text("<a href='\"'>&"), "&lt;a href=&#39;&quot;&#39;&gt;&amp;");
        assert_eq!(text("a\n\u{1b}[2J\u{202e}b"), "a\u{fffd}\u{fffd}[2J\u{fffd}b");
    }

    #[test]
    fn long_names_keep_their_ends_and_cost_nothing() {
        let long = format!("model.{}<.weight", "x".repeat(1 << 20));
        assert!(name(&long, 41).chars().count() < 60);
        assert!(name(&long, 41).starts_with("model.") && name(&long, 41).ends_with("&lt;.weight"));
        assert_eq!(name("short", 41), "short");
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1000, 1234567].map(count), ["0", "999", "1,000", "1,234,567"]);
    }
}
