//! Ctrl-C and its like while a file or folder is written: the job ends as the library ends jobs, soon and with nothing left behind,
//! and the process then as the signal would have ended it, so that shells and supervisors see what they expect.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::{flag, low_level};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::thread;

static STOP: AtomicU32 = AtomicU32::new(0);
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// From now on signals that ask the process to end set the flag that is given; a second one ends it at once. `None` where that
/// cannot be had: they end it at once then.
pub(crate) fn watch() -> Option<&'static AtomicU32> {
    // What somebody has the process ignore (`nohup`, a script's background) is not for it.
    let mine: Vec<i32> = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| !ignored(*s)).collect();
    let mut signals = Signals::new(&mine).ok()?;
    let listen = move || {
        for signal in signals.forever() {
            if CAUGHT.swap(signal, Ordering::SeqCst) != 0 {
                end(signal);
            }
            STOP.store(1, Ordering::SeqCst);
        }
    };
    if thread::Builder::new().spawn(listen).is_ok() {
        return Some(&STOP);
    }
    for signal in mine {
        // Nobody listens, and signals are caught all the same: let each do what it would have done.
        let _ = flag::register_conditional_default(signal, Arc::new(AtomicBool::new(true)));
    }
    None
}

/// Whether the process ignores a signal; no where the system does not tell.
fn ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The signal that asked the job to end, and its name.
pub(crate) fn caught() -> Option<(i32, &'static str)> {
    match CAUGHT.load(Ordering::SeqCst) {
        0 => None,
        signal => Some((signal, low_level::signal_name(signal).unwrap_or("a signal"))),
    }
}

/// End the process as the signal does by itself.
pub(crate) fn end(signal: i32) {
    // It fails for signals that do not exist alone.
    let _ = low_level::emulate_default_handler(signal);
}
