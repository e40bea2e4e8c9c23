//! Promise: what no host compiler would show is noticed here: an instruction's operands in another order, a fragment of another
//! layout, a copy that nobody waits for, a barrier or a mask that is not there. Each mutant is a kernel of the PTX with one instruction
//! changed, found by what it is and where, and not by its line.

use crate::common::data::Rng;
use crate::common::kernels::{Fleet, maps, nudged};
use crate::common::linear::{Case, integers};
use crate::common::lookups::Tables;
use crate::machine::Machine;
use crate::oracle::texts;
use crate::products::{Way, check_exact};
use crate::restores::check;
use crate::rows::look_up;
use xorz::codec::Encoding;
use xorz::matrix::{Dtype, Shape};

/// One instruction changed.
struct Changed {
    what: &'static str,
    /// Of which kernel, without `xorz_`.
    kernel: &'static str,
    /// The first line that has this,
    after: &'static str,
    /// and the first one from there on that has this,
    pick: &'static str,
    /// becomes this.
    to: fn(&str) -> String,
}

const MMA: &str = "mma.sync";
const LDMATRIX: &str = "ldmatrix.sync";

fn nothing(_: &str) -> String {
    String::new()
}

/// The line with its registers `a` and `b` (counted from the left) exchanged.
fn exchanged(line: &str, a: usize, b: usize) -> String {
    let is_name = |c: char| c.is_alphanumeric() || c == '%';
    let mut parts: Vec<&str> =
        line.split_inclusive(|c| !is_name(c)).flat_map(|p| halves(p, is_name)).collect();
    let at: Vec<usize> = (0..parts.len()).filter(|i| parts[*i].starts_with('%')).collect();
    parts.swap(at[a], at[b]);
    parts.concat()
}

/// A name, and the character that ends it.
fn halves(part: &str, is_name: impl Fn(char) -> bool) -> [&str; 2] {
    let end = part.find(|c| !is_name(c)).unwrap_or(part.len());
    let (name, rest) = part.split_at(end);
    [name, rest]
}

/// The last operand.
fn with_mask(line: &str, mask: &str) -> String {
    format!("{}, {mask};", line.rsplit_once(',').unwrap().0)
}

const MUTANTS: [Changed; 28] = [
    Changed {
        what: "the two registers of b exchanged",
        kernel: "linear_small_bf16_m16",
        after: "",
        pick: MMA,
        to: |l| exchanged(l, 8, 9),
    },
    Changed {
        what: "rows 8 on of a for its columns 8 on",
        kernel: "linear_small_bf16_m16",
        after: "",
        pick: MMA,
        to: |l| exchanged(l, 5, 6),
    },
    Changed {
        what: "rows of a exchanged",
        kernel: "linear_small_f16_m16",
        after: "",
        pick: MMA,
        to: |l| exchanged(l, 4, 5),
    },
    Changed {
        what: "sums taken from other places than they are put to",
        kernel: "linear_small_f16_m16",
        after: MMA,
        pick: MMA,
        to: |l| exchanged(l, 11, 12),
    },
    Changed {
        what: "words of f16 taken as bf16",
        kernel: "linear_small_f16_m16",
        after: "",
        pick: MMA,
        to: |l| l.replace(".f16.f16.", ".bf16.bf16."),
    },
    Changed { what: "an mma left out", kernel: "linear_small_bf16_m16", after: MMA, pick: MMA, to: nothing },
    Changed {
        what: "no barrier before sums are read",
        kernel: "linear_small_bf16_m16",
        after: MMA,
        pick: "bar.sync",
        to: nothing,
    },
    Changed {
        what: "a lane by its number in place of the one across",
        kernel: "linear_small_f32_m4",
        after: "",
        pick: "shfl.sync.bfly",
        to: |l| l.replace("bfly", "idx"),
    },
    Changed {
        what: "half of the lanes in the mask of a shuffle",
        kernel: "linear_small_f32_m4",
        after: "",
        pick: "shfl.sync.bfly",
        to: |l| with_mask(l, "65535"),
    },
    Changed {
        what: "half of the lanes in the mask of a ballot",
        kernel: "linear_small_f32_m16",
        after: "",
        pick: "vote.sync.ballot",
        to: |l| with_mask(l, "65535"),
    },
    Changed {
        what: "two matrices of ldmatrix exchanged",
        kernel: "linear_large_bf16",
        after: "",
        pick: LDMATRIX,
        to: |l| exchanged(l, 1, 2),
    },
    Changed {
        what: "a matrix turned",
        kernel: "linear_large_f16",
        after: "",
        pick: LDMATRIX,
        to: |l| l.replace(".x4.", ".x4.trans."),
    },
    Changed {
        what: "the sums of mma exchanged as they come out",
        kernel: "linear_large_bf16",
        after: "",
        pick: MMA,
        to: |l| exchanged(l, 0, 1),
    },
    Changed {
        what: "one group of copies more left under way",
        kernel: "linear_large_bf16",
        after: "",
        pick: "cp.async.wait_group",
        to: |l| l.replace("wait_group 1", "wait_group 2").replace("wait_group 0", "wait_group 1"),
    },
    Changed {
        what: "no wait for copies",
        kernel: "linear_large_f32",
        after: "",
        pick: "cp.async.wait_group",
        to: nothing,
    },
    Changed {
        what: "no barrier after the wait for copies",
        kernel: "linear_large_bf16",
        after: "cp.async.wait_group",
        pick: "bar.sync",
        to: nothing,
    },
    Changed {
        what: "a group of copies that does not end",
        kernel: "linear_large_bf16",
        after: "cp.async.wait_group",
        pick: "cp.async.commit_group",
        to: nothing,
    },
    Changed {
        what: "a copy left out",
        kernel: "linear_large_f32",
        after: "cp.async.wait_group",
        pick: "cp.async.cg",
        to: nothing,
    },
    Changed {
        what: "a copy left out",
        kernel: "linear_grad_f32",
        after: "",
        pick: "cp.async.cg",
        to: nothing,
    },
    Changed {
        what: "no meeting of the warp before matrices are read",
        kernel: "linear_large_bf16",
        after: "",
        pick: "bar.warp.sync",
        to: nothing,
    },
    Changed {
        what: "a matrix not turned",
        kernel: "linear_grad_bf16",
        after: "",
        pick: ".trans.",
        to: |l| l.replace(".trans", ""),
    },
    Changed {
        what: "two turned matrices exchanged",
        kernel: "linear_grad_f16",
        after: "",
        pick: ".trans.",
        to: |l| exchanged(l, 1, 2),
    },
    Changed {
        what: "no barrier after the wait for copies",
        kernel: "linear_grad_bf16",
        after: "cp.async.wait_group",
        pick: "bar.sync",
        to: nothing,
    },
    Changed {
        what: "no barrier of the warp",
        kernel: "delta_restore_16",
        after: "",
        pick: "bar.warp.sync",
        to: nothing,
    },
    Changed {
        what: "no barrier after the delta is opened",
        kernel: "delta_restore_16",
        after: "",
        pick: "bar.sync",
        to: nothing,
    },
    Changed {
        what: "lanes that take a unit, not counted",
        kernel: "delta_restore_16",
        after: "vote.sync",
        pick: "popc.b32",
        to: |l| l.replace("popc.b32", "brev.b32"),
    },
    Changed {
        what: "no barrier before rows are placed",
        kernel: "linear_segments_bf16",
        after: "atom.global.add",
        pick: "bar.sync",
        to: nothing,
    },
    Changed {
        what: "no barrier after the delta is opened",
        kernel: "delta_embedding_16",
        after: "",
        pick: "bar.sync",
        to: nothing,
    },
];

/// The text of one kernel.
fn entry<'t>(name: &str) -> &'t str {
    let begin = format!(".entry {name}(");
    let all = texts().unwrap();
    let (text, at) = all.iter().find_map(|(_, text)| Some((text, text.find(&begin)?))).unwrap();
    let end = text[at..].find("\n}").unwrap_or_else(|| panic!("{name} has no end"));
    &text[at..at + end + 3]
}

fn changed(mutant: &Changed) -> String {
    let text = entry(&format!("xorz_{}", mutant.kernel));
    let find = |from: usize, what: &str| {
        let at = text[from..].find(what).unwrap_or_else(|| panic!("{} has no {what}", mutant.kernel));
        from + at
    };
    let after = find(0, mutant.after);
    let from = if mutant.after.is_empty() { 0 } else { after + text[after..].find('\n').unwrap() };
    let at = find(from, mutant.pick);
    let begin = text[..at].rfind('\n').unwrap() + 1;
    let end = at + text[at..].find('\n').unwrap();
    let line = (mutant.to)(&text[begin..end]);
    assert_ne!(line, text[begin..end], "{} of {}", mutant.what, mutant.kernel);
    [&text[..begin], &line, &text[end..]].concat()
}

/// What a kernel must pass.
fn passes(kernel: &str, machine: &Machine) -> Result<(), String> {
    let mut rng = Rng::new(501);
    let dtype = match kernel {
        name if name.contains("bf16") || name.starts_with("delta") => Dtype::BF16,
        name if name.contains("f16") => Dtype::F16,
        _ => Dtype::F32,
    };
    let words = |r: &mut Rng, w| integers(r, dtype, w, 8);
    if kernel.starts_with("delta_embedding") {
        return look_up(machine, &mut rng, &Tables::new(&mut Rng::new(502), dtype, Shape { n: 30, k: 300 }));
    }
    if kernel.starts_with("delta") {
        let shape = Shape { n: 33, k: 300 };
        let base = rng.weights(dtype, shape.n * shape.k);
        let fine_tuned = nudged(&mut rng, 2, &base, 4, 0);
        return check(machine, &Case::new(dtype, shape, Encoding::Exponent, &base, &fine_tuned), &mut rng);
    }
    let (way, rows) = match kernel {
        name if name.ends_with("m4") => (Way::Few(4), 4),
        name if name.ends_with("m16") => (Way::Few(16), 13),
        name if name.contains("grad") => (Way::Grad, 40),
        _ => (Way::Many, 40),
    };
    if way == Way::Many {
        // The base, entries and streams; whole windows; warps with sixteen rows of x, and with more.
        let fleet = Fleet::new(&mut rng, dtype, Shape { n: 20, k: 320 }, words, 0.1);
        [-1, 0, 3]
            .into_iter()
            .try_for_each(|tenant| check_exact(machine, &fleet, way, &vec![tenant; rows], 3))?;
    }
    // Rows that begin anywhere, and rows that go by sixteen bytes.
    [(35, 259), (72, 544)].into_iter().try_for_each(|(n, k)| {
        let fleet = Fleet::new(&mut rng, dtype, Shape { n, k }, words, 0.1);
        let maps = maps(&mut rng, rows);
        [2, 0].into_iter().try_for_each(|map| check_exact(machine, &fleet, way, &maps[map], 3))
    })
}

/// The kernel in place of the original, among those that its launches need beside it.
fn with(kernel: &str, text: &str) -> Result<Machine, String> {
    let beside: &[&str] = match kernel {
        name if name.starts_with("linear_large") || name.starts_with("linear_grad") => &["linear_segments"],
        name if name.starts_with("linear_segments") => &["linear_large"],
        name if name.starts_with("delta_restore") => &["delta_verify", "delta_apply"],
        _ => &[],
    };
    let (_, kind) = kernel.rsplit_once('_').unwrap();
    let beside = beside.iter().map(|name| entry(&format!("xorz_{name}_{kind}")));
    Machine::new(beside.chain([text]))
}

#[test]
fn mutants_of_the_ptx_are_caught() {
    if texts().is_none() {
        return eprintln!("SKIPPED mutants_of_the_ptx_are_caught: XORZ_PTX is not set");
    }
    let mut sound: Vec<&str> = MUTANTS.iter().map(|mutant| mutant.kernel).collect();
    sound.sort_unstable();
    sound.dedup();
    for kernel in sound {
        passes(kernel, &with(kernel, entry(&format!("xorz_{kernel}"))).unwrap()).unwrap();
    }
    let live = |mutant: &&Changed| {
        let found = with(mutant.kernel, &changed(mutant)).and_then(|machine| passes(mutant.kernel, &machine));
        println!("{} of {}: {}", mutant.what, mutant.kernel, found.as_ref().err().map_or("lives", |e| e));
        found.is_ok()
    };
    let alive: Vec<_> = MUTANTS.iter().filter(live).map(|m| (m.what, m.kernel)).collect();
    assert!(alive.is_empty(), "{alive:?} live");
}
