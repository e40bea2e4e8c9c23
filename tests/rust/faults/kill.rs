//! Promise: a run that is killed leaves the old file or none, or the whole new one, never half; what it may
//! leave under a temporary name does not pile up. Two runs that write to one name leave one whole result.

use crate::common::data::Rng;
use crate::common::disk::{command, complaint, done, matrices, model, names, safetensors, tree};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How often each verb is killed: 200 times, or as often as XORZ_KILLS says (`make faults KILLS=1000`).
pub(crate) fn kills() -> usize {
    std::env::var("XORZ_KILLS").map_or(200, |n| n.parse().expect("XORZ_KILLS is a number"))
}

/// `base`, `ft` (files), `base.d`, `ft.d` (folders), `p.whole`, `d.whole` (packages of each).
pub(crate) fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(21, 8, 512, 512);
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    fs::write(d.join("ft"), safetensors(&ft)).unwrap();
    model(&d.join("base.d"), &base, 2);
    model(&d.join("ft.d"), &ft, 3);
    done(d, &["pack", "base", "ft", "-o", "p.whole"]);
    done(d, &["pack", "base.d", "ft.d", "-o", "d.whole"]);
    dir
}

/// What the kills of one verb met.
#[derive(Debug, Default)]
struct Met {
    killed: usize,
    untouched: usize,
    whole: usize,
    most_left: usize,
}

/// Run `args` [`kills`] times, killing it after a random part of the time it takes. `before` sets the stage,
/// `after` says whether the new result is there, whole, and fails if it is half.
fn kill(d: &Path, args: &[&str], before: impl Fn(usize), after: impl Fn(usize) -> bool) -> Met {
    let (mut rng, mut met) = (Rng::new(args.len() as u64), Met::default());
    let start = Instant::now();
    before(1);
    done(d, args);
    let mut takes = start.elapsed().as_secs_f64();
    let kills = kills();
    for round in 0..kills {
        before(round);
        let mut child = command(d, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(takes * 1.1 * rng.unit()));
        child.kill().unwrap();
        let killed = child.wait().unwrap().signal().is_some();
        // Kills must land in the run whatever else this machine is doing.
        takes *= if killed { 1.01 } else { 0.95 };
        let whole = after(round);
        met.killed += usize::from(killed);
        met.whole += usize::from(whole);
        met.untouched += usize::from(!whole);
        met.most_left = met.most_left.max(names(d).iter().filter(|n| n.starts_with('.')).count());
    }
    println!("{args:?}: {met:?}");
    before(1);
    done(d, args);
    assert!(met.killed >= kills / 3, "{args:?}: only {} of {kills} runs were killed", met.killed);
    assert!(met.untouched >= kills / 5 && met.whole >= 3, "{args:?}: {met:?}");
    assert!(met.most_left <= 2, "{args:?}: {} temporary names at once", met.most_left);
    let left: Vec<_> = names(d).into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(left.is_empty(), "{args:?}: a whole run leaves {left:?}");
    met
}

/// A stage where `name` is an old file in even rounds and absent in odd ones, and its judge.
fn kill_file(d: &Path, args: &[&str], name: &str, new: &[u8]) {
    let path = d.join(name);
    let before = |round: usize| match round % 2 {
        0 => fs::write(&path, b"old").unwrap(),
        _ => drop(fs::remove_file(&path)),
    };
    let after = |round: usize| match fs::read(&path) {
        Ok(found) if found == b"old" && round.is_multiple_of(2) => false,
        Ok(found) => {
            assert!(found == new, "{args:?}, round {round}: {name} is {} bytes of something", found.len());
            true
        }
        Err(_) => {
            assert!(round % 2 == 1, "{args:?}, round {round}: the old {name} is gone");
            false
        }
    };
    kill(d, args, before, after);
}

#[test]
fn killed_packs_of_files() {
    let dir = folder();
    let new = fs::read(dir.path().join("p.whole")).unwrap();
    kill_file(dir.path(), &["pack", "base", "ft", "-o", "p"], "p", &new);
}

#[test]
fn killed_packs_of_folders() {
    let dir = folder();
    let new = fs::read(dir.path().join("d.whole")).unwrap();
    kill_file(dir.path(), &["pack", "base.d", "ft.d", "-o", "p"], "p", &new);
}

#[test]
fn killed_packs_of_several() {
    let dir = folder();
    let d = dir.path();
    // Three of them: two that are fine-tunes, and the base itself.
    let args = ["pack", "base.d", "ft", "ft.d", "base", "-o", "out"];
    done(d, &[&args[..5], &["-o", "whole"]].concat());
    let (out, new) = (d.join("out"), tree(&d.join("whole")));
    assert_eq!(new.keys().collect::<Vec<_>>(), ["base.xorz", "ft.d.xorz", "ft.xorz"]);
    let before = |round: usize| {
        for name in new.keys() {
            match round % 2 {
                0 => fs::create_dir_all(&out).and_then(|()| fs::write(out.join(name), b"old")).unwrap(),
                _ => drop(fs::remove_file(out.join(name))),
            }
        }
    };
    let after = |round: usize| {
        let found = if out.exists() { tree(&out) } else { Default::default() };
        let (hidden, found): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(name, _)| name.starts_with('.'));
        assert!(hidden.len() <= 2 * new.len(), "round {round}: {} temporary names", hidden.len());
        let mut whole = 0;
        for (name, kept) in found.iter().filter(|(name, _)| !name.ends_with('/')) {
            let old = kept.1 == b"old" && round.is_multiple_of(2);
            assert!(
                old || *kept == new[name],
                "round {round}: {name} is {} bytes of something",
                kept.1.len()
            );
            whole += usize::from(!old);
        }
        whole == new.len()
    };
    kill(d, &args, before, after);
    assert!(tree(&out) == new, "a whole run leaves more than its packages");
}

#[test]
fn killed_unpacks_of_files() {
    let dir = folder();
    let new = fs::read(dir.path().join("ft")).unwrap();
    kill_file(dir.path(), &["unpack", "base", "p.whole", "-o", "out"], "out", &new);
}

#[test]
fn killed_unpacks_of_folders() {
    let dir = folder();
    let d = dir.path();
    let (out, new) = (d.join("out"), tree(&d.join("ft.d")));
    let before = |round: usize| {
        let _ = fs::remove_dir_all(&out);
        if round.is_multiple_of(2) {
            fs::create_dir(&out).unwrap();
        }
    };
    let after = |round: usize| {
        if !out.exists() {
            assert!(round % 2 == 1, "round {round}: the empty folder is gone");
            return false;
        }
        let found = tree(&out);
        assert!(found.is_empty() || found == new, "round {round}: {:?}", found.keys());
        !found.is_empty()
    };
    kill(d, &["unpack", "base.d", "d.whole", "-o", "out"], before, after);
}

#[test]
fn of_runs_that_write_to_one_name_one_wins_whole() {
    let dir = folder();
    let d = dir.path();
    done(d, &["pack", "base", "base", "-o", "same.whole"]);
    let results = [fs::read(d.join("p.whole")).unwrap(), fs::read(d.join("same.whole")).unwrap()];
    let start =
        |args: &[&str]| command(d, args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let tuned = tree(&d.join("ft.d"));
    for round in 0..10 {
        let packs: Vec<_> =
            ["ft", "base", "ft", "base"].map(|ft| start(&["pack", "base", ft, "-o", "p"])).into();
        for pack in packs {
            let out = pack.wait_with_output().unwrap();
            assert!(out.status.success(), "round {round}: {}", String::from_utf8_lossy(&out.stderr));
        }
        assert!(results.contains(&fs::read(d.join("p")).unwrap()), "round {round}");
        let _ = fs::remove_dir_all(d.join("out"));
        let unpacks: Vec<_> = (0..3).map(|_| start(&["unpack", "base.d", "d.whole", "-o", "out"])).collect();
        let ends: Vec<_> = unpacks.into_iter().map(|u| u.wait_with_output().unwrap()).collect();
        // Who comes second finds the folder taken.
        ends.iter().filter(|o| !o.status.success()).for_each(|o| assert!(complaint(o).contains("out")));
        assert!(ends.iter().any(|o| o.status.success()), "round {round}");
        assert!(tree(&d.join("out")) == tuned, "round {round}");
        let left: Vec<_> = names(d).into_iter().filter(|n| n.starts_with('.')).collect();
        assert!(left.is_empty(), "round {round}: {left:?}");
    }
}
