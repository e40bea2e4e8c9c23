//! Names of one tensor in different hands: parts that wrappers add, prefixes that models gain and lose, and the renamings that
//! transformers does when it loads. Strings only; whether the words agree is for others to see.

use super::files::{Checkpoint, Found};
use crate::package::format::container::TensorInfo;
use std::collections::HashMap;

/// Parts of names that wrappers put in (torch.compile, activation checkpointing, FSDP, DDP, DeepSpeed, PEFT).
const WRAPPERS: [&str; 7] = [
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "_flat_param",
    "base_layer",
    "modules_to_save",
];
/// What wrappers put in front.
const FRONT: [&str; 4] = ["module.", "base_model.model.", "_fsdp_wrapped_module.", "state_dict."];
/// Last parts of names that mean the same.
const ENDINGS: [(&str, &str); 6] = [
    (".gamma", ".weight"),
    (".beta", ".bias"),
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
    (".weight_scale_inv", ".weight_scale"),
    (".default.weight", ".weight"),
];
/// Parts that may be missing at the start of one of two names, such as `model.language_model.`.
const LEADING: usize = 4;

/// A name without what wrappers add, endings in one spelling.
fn bare(name: &str) -> String {
    let mut name = name;
    while let Some(rest) = FRONT.iter().find_map(|f| name.strip_prefix(f)) {
        name = rest;
    }
    let parts: Vec<&str> = name.split('.').filter(|p| !WRAPPERS.contains(p)).collect();
    let bare = parts.join(".");
    let ending = ENDINGS.iter().find_map(|(from, to)| Some(format!("{}{to}", bare.strip_suffix(from)?)));
    ending.unwrap_or(bare)
}

/// The name and what is left of it without its first parts; at least two parts, unless it has but one. A number stays: without
/// it, a layer would be any other layer.
fn tails(bare: &str) -> impl Iterator<Item = &str> {
    let cuts = bare.match_indices('.').map(|(i, _)| i + 1).filter(|i| bare[*i..].contains('.'));
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let cuts = cuts.take_while(move |i| !bare[..*i].split('.').any(number));
    std::iter::once(0).chain(cuts.take(LEADING)).map(|i| &bare[i..])
}

/// Its numbers, and its last two parts: what is left where parts were put in the middle.
fn skeleton(bare: &str) -> String {
    let parts: Vec<&str> = bare.split('.').collect();
    let (middle, last) = parts.split_at(parts.len().saturating_sub(2));
    let numbers = middle.iter().filter(|p| p.bytes().all(|b| b.is_ascii_digit()));
    numbers.chain(last).copied().collect::<Vec<_>>().join("/")
}

/// Base tensors by what is left of their names. What several have in common means none of them, unless their files tell.
#[derive(Debug, Default)]
pub(super) struct RenameTable<'a> {
    by_tail: HashMap<String, Vec<Found<'a>>>,
    by_skeleton: HashMap<String, Vec<Found<'a>>>,
}

/// Tensors that one key may mean and still tell something: one for each component of a pipeline.
const MEANT: usize = 8;

impl<'a> RenameTable<'a> {
    pub(super) fn new(base: &'a Checkpoint) -> Self {
        let mut table = Self::default();
        for found in base.tensors() {
            let name = bare(&found.1.name);
            for tail in tails(&name) {
                note(&mut table.by_tail, tail, found);
            }
            note(&mut table.by_skeleton, &skeleton(&name), found);
        }
        table
    }

    /// Base tensors that the name of `t` may mean, of those that `fit`, the likeliest first.
    pub(super) fn meant(&self, t: &TensorInfo, fits: impl Fn(&TensorInfo) -> bool) -> Vec<Found<'a>> {
        let name = bare(&t.name);
        let keys = tails(&name).filter_map(|tail| self.by_tail.get(tail));
        let lists = keys.chain(self.by_skeleton.get(&skeleton(&name)));
        let mut out: Vec<Found<'a>> = Vec::new();
        for &(f, b) in lists.filter(|l| l.len() <= MEANT).flatten() {
            // The same tensor may be found in several ways.
            if fits(b) && !out.iter().any(|(_, o)| std::ptr::eq(*o, b)) {
                out.push((f, b));
            }
        }
        out
    }
}

fn note<'a>(table: &mut HashMap<String, Vec<Found<'a>>>, key: &str, found: Found<'a>) {
    match table.get_mut(key) {
        Some(list) if list.len() > MEANT => {}
        Some(list) => list.push(found),
        None => {
            table.insert(key.to_owned(), vec![found]);
        }
    }
}

/// How alike the words of two tensors are, then how close their names.
pub(super) type Fitness = (f64, (usize, usize));

/// How much two names have in common: parts at the end, then all of them, for choosing between tensors that are equally alike.
pub(super) fn closeness(a: &str, b: &str) -> (usize, usize) {
    let (a, b) = (bare(a), bare(b));
    let ending = a.bytes().rev().zip(b.bytes().rev()).take_while(|(x, y)| x == y).count();
    let common = b.split('.').filter(|p| a.split('.').any(|q| q == *p)).count();
    (ending, common)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_tensor_share_a_tail_or_a_skeleton() {
        let meet = |a: &str, b: &str| {
            let (a, b) = (bare(a), bare(b));
            let tail = tails(&a).any(|x| tails(&b).any(|y| x == y));
            tail || skeleton(&a) == skeleton(&b)
        };
        for (a, b) in [
            ("blocks.70._checkpoint_wrapped_module.q", "blocks.70.q"),
            ("_orig_mod.model.layers.1.w", "model.layers.1.w"),
            ("base_model.model.model.layers.1.q_proj.base_layer.weight", "model.layers.1.q_proj.weight"),
            ("bert.encoder.layer.0.output.LayerNorm.gamma", "encoder.layer.0.output.LayerNorm.weight"),
            ("model.language_model.layers.3.mlp.up.weight", "language_model.model.layers.3.mlp.up.weight"),
            ("conv.parametrizations.weight.original0", "conv.weight_g"),
            ("blocks.70.wrapped.inner.q.weight", "blocks.70.q.weight"),
        ] {
            assert!(meet(a, b), "{a} and {b}");
        }
        for (a, b) in
            [("blocks.7.q.weight", "blocks.70.q.weight"), ("a.layers.1.k.weight", "a.layers.1.q.weight")]
        {
            assert!(!meet(a, b), "{a} and {b}");
        }
    }
}
