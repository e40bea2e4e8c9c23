//! Promise: Ctrl-C, `kill` and a terminal that closes end a run as they end others (the shell's 130, 143, 129), soon, with one line,
//! the old file as it was or the whole new one, and nothing left behind, not even under a temporary name. Signals that the
//! process was told to ignore are ignored; a second signal, and one where nothing is written under a name, ends it at once.

use super::kill::{folder, kills};
use crate::common::data::Rng;
use crate::common::disk::{command, done, names, tree};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SIGNALS: [(Signal, i32, &str); 3] =
    [(Signal::INT, 2, "SIGINT"), (Signal::TERM, 15, "SIGTERM"), (Signal::HUP, 1, "SIGHUP")];

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Interrupt `args` at a random moment of its work, many times. When that begins and ends is learnt on the way: on a fast machine
/// most of a run is the process's start, before which it does not listen, and on a busy one nobody knows.
fn interrupt(d: &Path, args: &[&str], before: impl Fn(), whole: impl Fn() -> bool) {
    before();
    let start = Instant::now();
    done(d, args);
    let (mut begins, mut takes) = (0.0, start.elapsed().as_secs_f64());
    let (mut rng, mut ended, mut slowest) = (Rng::new(7), 0, 0.0f64);
    let rounds = kills() / 3;
    for round in 0..rounds {
        before();
        let (signal, number, name) = SIGNALS[round % 3];
        let mut child = command(d, args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(begins + (takes - begins) * rng.unit()));
        send(&child, signal);
        let sent = Instant::now();
        let status = child.wait().unwrap();
        slowest = slowest.max(sent.elapsed().as_secs_f64());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let killed = status.signal() == Some(number);
        assert!(killed || status.success(), "{args:?}, {name}: {status:?} {said}");
        // A signal that comes before anything listens ends a run that has begun nothing.
        assert!(said.is_empty() || said.lines().count() == 1 && said.contains(name), "{args:?}: {said}");
        assert_eq!(whole(), !killed, "{args:?}, {name}, round {round}: {status:?}");
        let left: Vec<_> = names(d).into_iter().filter(|n| n.starts_with('.')).collect();
        assert!(left.is_empty(), "{args:?}, {name}, round {round}: leaves {left:?}");
        ended += usize::from(!said.is_empty());
        takes *= if killed { 1.01 } else { 0.95 };
        let early = killed && said.is_empty();
        begins = if early { begins + 0.1 * (takes - begins) } else { 0.95 * begins }.min(takes);
    }
    println!("{args:?}: {ended} of {rounds} ended by a signal within {slowest:.2} s");
    assert!(ended >= rounds / 4, "{args:?}: only {ended} of {rounds} were ended while they wrote");
}

#[test]
fn interrupted_packs_and_unpacks_leave_nothing() {
    let dir = folder();
    let d = dir.path();
    let new = |name: &str| fs::read(d.join(name)).unwrap();
    for (args, result) in [
        (["pack", "base", "ft", "-o", "p"], new("p.whole")),
        (["pack", "base.d", "ft.d", "-o", "p"], new("d.whole")),
        (["unpack", "base", "p.whole", "-o", "p"], new("ft")),
    ] {
        let old = || fs::write(d.join("p"), b"old").unwrap();
        interrupt(d, &args, old, || {
            let found = new("p");
            assert!(found == b"old" || found == result, "{args:?}: {} bytes of something", found.len());
            found == result
        });
    }
    let (out, wanted) = (d.join("out"), tree(&d.join("ft.d")));
    let gone = || drop(fs::remove_dir_all(&out));
    interrupt(d, &["unpack", "base.d", "d.whole", "-o", "out"], gone, || {
        assert!(!out.exists() || tree(&out) == wanted, "half a folder");
        out.exists()
    });
}

#[test]
fn what_is_ignored_stays_ignored_and_a_stalled_pipe_ends_at_once() {
    let dir = folder();
    let d = dir.path();
    let script = r#"trap "" HUP INT; echo trapped; exec "$XORZ" pack base ft -o p"#;
    let mut child = Command::new("sh")
        .args(["-c", script])
        .current_dir(d)
        .env("XORZ", env!("CARGO_BIN_EXE_xorz"))
        .env("XORZ_CACHE_DIR", "")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The shell ignores them by now.
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    while child.try_wait().unwrap().is_none() {
        send(&child, Signal::HUP);
        send(&child, Signal::INT);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success(), "`nohup` does not help");
    assert_eq!(fs::read(d.join("p")).unwrap(), fs::read(d.join("p.whole")).unwrap());

    // Nobody reads what it writes.
    let args = ["unpack", "base", "p.whole", "-o", "-"];
    let mut child = command(d, &args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the pipe took it all");
    send(&child, Signal::TERM);
    let sent = Instant::now();
    assert_eq!(child.wait().unwrap().signal(), Some(15));
    assert!(sent.elapsed() < Duration::from_secs(5));
}
