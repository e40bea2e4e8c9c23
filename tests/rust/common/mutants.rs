//! Kernels with one thing changed, and whether a check notices. Must hold no mutant.

use super::device::{Device, root};
use std::path::{Path, PathBuf};

/// Name, file, what stands there, what the mutant has; the first place counts from the last occurrence of
/// `after`.
pub type Mutant = (&'static str, &'static str, &'static str, &'static str, &'static str);

/// Unless that is there already, so that a build from it stays newer.
fn write(to: &Path, text: &str) {
    if std::fs::read_to_string(to).is_ok_and(|there| there == text) {
        return;
    }
    std::fs::write(to, text).unwrap();
}

/// The kernels with one thing changed, and only those that the checks launch.
fn mutated((name, file, after, from, to): Mutant, list: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants").join(format!("{file} {name}"));
    std::fs::create_dir_all(&dir).unwrap();
    for entry in std::fs::read_dir(root("cuda")).unwrap().map(|e| e.unwrap().path()) {
        let Ok(mut text) = std::fs::read_to_string(&entry) else { continue };
        let this = entry.file_name().unwrap();
        if this == file {
            let start = text.find(after).unwrap_or_else(|| panic!("{file} has no {after}"));
            let at = start
                + text[start..].find(from).unwrap_or_else(|| panic!("{file} has no {from} after {after}"));
            text.replace_range(at..at + from.len(), to);
        }
        let lacks = |kernel: String| !list.contains(&kernel);
        let unwanted = |line: &str| {
            let dtype = line.split(['(', ',']).nth(1).unwrap_or_default();
            let rows = line.split([',', ')']).nth(2).unwrap_or_default().trim();
            (line.starts_with("XORZ_LINEAR_SMALL(") && lacks(format!("linear_small_{dtype}_m{rows})")))
                || (line.starts_with("XORZ_RESTORE(") && !line.contains("(16)"))
                || (line.starts_with("XORZ_EMBEDDING(") && !line.contains("(16)"))
                || (line.starts_with("XORZ_LINEAR_LARGE(") && lacks(format!("linear_large_{dtype}")))
                || (line.starts_with("XORZ_LINEAR_GRAD(") && lacks(format!("linear_grad_{dtype}")))
                || (line.starts_with("XORZ_LINEAR_SEGMENTS(") && lacks(format!("linear_segments_{dtype}")))
        };
        text = text.lines().filter(|l| !unwanted(l)).map(|l| format!("{l}\n")).collect();
        write(&dir.join(this), &text);
    }
    write(&dir.join("few_kernels.h"), list);
    dir
}

fn device(mutant: Mutant, list: &str, flags: &[&str]) -> Device {
    let dir = mutated(mutant, list);
    let name = format!("mutant_{}", dir.file_name().unwrap().to_string_lossy().replace([' ', '.'], "_"));
    let flags = [&["-O1", "-Wno-error", "-w", "-DXORZ_KERNELS_HEADER=\"few_kernels.h\""], flags].concat();
    Device::of(&name, &dir, &flags).unwrap()
}

/// Which check a mutant does not pass.
pub fn all_caught(
    mutants: &[Mutant],
    list: &str,
    flags: &[&str],
    check: impl Fn(&Device) -> Result<(), String>,
) {
    let name = if flags.is_empty() { "nothing" } else { "nothing, watched" };
    check(&device((name, mutants[0].1, "", "", ""), list, flags)).unwrap();
    let mut missed = vec![];
    for &mutant in mutants {
        match check(&device(mutant, list, flags)) {
            Err(how) => {
                println!("caught: {} ({}): {}", mutant.0, mutant.1, how.lines().take(2).last().unwrap_or(""))
            }
            Ok(()) => missed.push(mutant.0),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
