//! Where in a model a tensor belongs, told by its name, and how much changed there: layer by kind of module.

use super::html;
use crate::package::{Codec, Package};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Stacks of layers, layers of a stack and kinds of module that a map shows at most: those with the most words.
const STACKS: usize = 4;
const LAYERS: usize = 128;
const KINDS: usize = 20;

/// `model.layers.12.self_attn.q_proj.weight`: stack `model.layers`, layer 12, kind `self_attn.q_proj`. `None` without a number.
/// Further numbers (experts) become `*`.
pub(super) fn place(name: &str) -> Option<(String, u32, String)> {
    let number = |p: &&str| !p.is_empty() && p.len() <= 6 && p.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts.iter().position(number)?;
    let rest: Vec<&str> = parts[at + 1..].iter().map(|p| if number(p) { "*" } else { p }).collect();
    let kind = rest.join(".");
    let kind = kind.strip_suffix(".weight").unwrap_or(&kind).to_owned();
    Some((parts[..at].join("."), parts[at].parse().ok()?, kind))
}

/// Words and changes of the tensors of one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) words: u64,
    pub(super) changed: u64,
    /// Tensors that are no deltas.
    pub(super) alone: u64,
}

/// One stack of layers.
#[derive(Default)]
struct Stack {
    words: u64,
    layers: BTreeSet<u32>,
    kinds: HashMap<String, u64>,
    cells: HashMap<(u32, String), Cell>,
}

fn stacks(package: &Package) -> BTreeMap<String, Stack> {
    let mut stacks: BTreeMap<String, Stack> = BTreeMap::new();
    for e in package.entries().iter().filter(|e| e.codec != Codec::Same) {
        let Some((stack, layer, kind)) = place(&e.name) else { continue };
        let words = super::words(e);
        let stack = stacks.entry(stack).or_default();
        stack.words += words;
        stack.layers.insert(layer);
        *stack.kinds.entry(kind.clone()).or_default() += words;
        let cell = stack.cells.entry((layer, kind)).or_default();
        match e.changed {
            Some(changed) => (cell.words, cell.changed) = (cell.words + words, cell.changed + changed),
            None => cell.alone += 1,
        }
    }
    stacks
}

/// The kinds shown: those with the most words, in order of their names.
fn most(kinds: &HashMap<String, u64>, limit: usize) -> Vec<&str> {
    let mut order: Vec<(&String, u64)> = kinds.iter().map(|(k, w)| (k, *w)).collect();
    order.sort_by_key(|(kind, words)| (std::cmp::Reverse(*words), *kind));
    let mut kinds: Vec<&str> = order.into_iter().take(limit).map(|(k, _)| k.as_str()).collect();
    kinds.sort_unstable();
    kinds
}

/// The heat maps of a package; empty if none of its names has a number.
pub(super) fn maps(package: &Package) -> String {
    let found = stacks(package);
    let mut order: Vec<(&String, &Stack)> = found.iter().collect();
    order.sort_by_key(|(name, stack)| (std::cmp::Reverse(stack.words), *name));
    let mut out: String = order.iter().take(STACKS).map(|(name, stack)| map(name, stack)).collect();
    if order.len() > STACKS {
        out +=
            &format!("<p class=note>{} smaller stacks of layers are left out.</p>\n", order.len() - STACKS);
    }
    out
}

fn map(name: &str, stack: &Stack) -> String {
    let kinds = most(&stack.kinds, KINDS);
    let mut out = String::new();
    if !name.is_empty() {
        out += &format!("<h3><code>{}</code></h3>\n", html::name(name, 40));
    }
    out += "<div class=wide><table class=heat>\n<thead><tr><th scope=\"col\">layer</th>";
    for kind in &kinds {
        let kind = if kind.is_empty() { "(itself)".into() } else { html::name(kind, 32) };
        out += &format!("<th scope=\"col\" class=k><span>{kind}</span></th>");
    }
    out += "</tr></thead>\n<tbody>\n";
    for layer in stack.layers.iter().take(LAYERS) {
        out += &format!("<tr><th scope=\"row\">{layer}</th>");
        for kind in &kinds {
            out += &cell(stack.cells.get(&(*layer, (*kind).to_owned())));
        }
        out += "</tr>\n";
    }
    out += "</tbody></table></div>\n";
    let (layers, kinds) = (stack.layers.len().saturating_sub(LAYERS), stack.kinds.len() - kinds.len());
    if layers + kinds > 0 {
        out += &format!(
            "<p class=note>{layers} more layers and {kinds} more kinds of module are left out.</p>\n"
        );
    }
    out
}

/// A cell: its colour tells the share of changed words, its text the percents.
pub(super) fn cell(cell: Option<&Cell>) -> String {
    match cell {
        None => "<td></td>".into(),
        Some(c) if c.words == 0 && c.alone > 0 => "<td class=alone>+</td>".into(),
        Some(c) if c.words == 0 => "<td class=h0>0</td>".into(),
        Some(c) => {
            let percent = 100.0 * c.changed as f64 / c.words as f64;
            format!("<td class=h{}>{}</td>", heat(percent), short(percent))
        }
    }
}

/// Colour of a share: 0 for none, 8 for nearly all.
fn heat(percent: f64) -> usize {
    const STEPS: [f64; 7] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0];
    if percent == 0.0 { 0 } else { 1 + STEPS.iter().filter(|s| percent >= **s).count() }
}

fn short(percent: f64) -> String {
    match percent {
        0.0 => "0".into(),
        p if p < 0.01 => "&lt;.01".into(),
        p if p < 0.995 => format!("{p:.2}").trim_start_matches('0').into(),
        p if p < 9.95 => format!("{p:.1}"),
        p => format!("{p:.0}"),
    }
}

/// The line that says what the colours mean.
pub(super) fn legend() -> String {
    let steps = ["0", "&lt;0.1", "0.1", "0.3", "1", "3", "10", "30", "60&nbsp;%"];
    let steps: String =
        steps.iter().enumerate().map(|(i, s)| format!("<span class=h{i}>{s}</span>")).collect();
    format!("<p class=legend>changed words: {steps} <span class=alone>+</span> stored alone</p>\n")
}

/// Every package's share by kind of module, one column each.
pub(super) fn compare(packages: &[&Package]) -> String {
    let mut kinds: HashMap<String, u64> = HashMap::new();
    let mut cells: HashMap<(usize, String), Cell> = HashMap::new();
    for (i, package) in packages.iter().enumerate() {
        for e in package.entries().iter().filter(|e| e.codec != Codec::Same) {
            let kind = place(&e.name).map_or_else(|| e.name.clone(), |(_, _, kind)| kind);
            *kinds.entry(kind.clone()).or_default() += super::words(e);
            let cell = cells.entry((i, kind)).or_default();
            match e.changed {
                Some(changed) => {
                    (cell.words, cell.changed) = (cell.words + super::words(e), cell.changed + changed);
                }
                None => cell.alone += 1,
            }
        }
    }
    let mut out =
        String::from("<div class=wide><table class=heat>\n<thead><tr><th scope=\"col\">module</th>");
    (1..=packages.len()).for_each(|i| out += &format!("<th scope=\"col\">{i}</th>"));
    out += "</tr></thead>\n<tbody>\n";
    for kind in most(&kinds, 2 * KINDS) {
        out += &format!("<tr><th scope=\"row\">{}</th>", html::name(kind, 40));
        (0..packages.len()).for_each(|i| out += &self::cell(cells.get(&(i, kind.to_owned()))));
        out += "</tr>\n";
    }
    out + "</tbody></table></div>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_stack_layer_and_kind() {
        let at = |name| place(name).map(|(s, l, k)| format!("{s}|{l}|{k}"));
        assert_eq!(at("model.layers.12.mlp.up_proj.weight").unwrap(), "model.layers|12|mlp.up_proj");
        assert_eq!(at("h.0.attn.c_attn.bias").unwrap(), "h|0|attn.c_attn.bias");
        assert_eq!(at("layers.3.experts.17.w1.weight").unwrap(), "layers|3|experts.*.w1");
        assert_eq!(at("0.weight").unwrap(), "|0|weight");
        assert_eq!(at("embed_tokens.weight"), None);
        assert_eq!(at("x.99999999999999999999.w"), None);
    }

    #[test]
    fn colours_follow_the_share() {
        assert_eq!([0.0, 0.05, 0.1, 2.4, 9.9, 81.0, 100.0].map(heat), [0, 1, 2, 4, 5, 8, 8]);
        assert_eq!(
            [0.0, 0.004, 0.23, 2.44, 9.96, 100.0].map(short),
            ["0", "&lt;.01", ".23", "2.4", "10", "100"]
        );
    }
}
