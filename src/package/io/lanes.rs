//! Threads for several checkpoints at once: items of many lanes are made in any order by any thread, and taken in order within
//! each lane. Lanes do not wait for one another, so that their hashes are computed side by side.

use super::ordered::help;
use super::turns::{StopOnPanic, Turns};
use crate::error::Result;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Call `make(i)` for every item on `jobs` threads, begun in the order of `i`, and `take(i)` after it, in order within the lane
/// that `lanes[i]` names; both get the scratch of the thread that made the item.
///
/// # Errors
/// The first that comes; items of other lanes may have been taken or not.
pub(crate) fn in_lanes<S: Default>(
    jobs: usize,
    lanes: &[usize],
    make: impl Fn(usize, &mut S) -> Result<()> + Sync,
    take: impl Fn(usize, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    let mut counts = vec![0; lanes.iter().max().map_or(0, |last| last + 1)];
    let count = |&lane: &usize| {
        counts[lane] += 1;
        counts[lane] - 1
    };
    let turns: Vec<usize> = lanes.iter().map(count).collect();
    let (claim, state) = (AtomicUsize::new(0), Turns::of(counts.len()));
    let work = || {
        let _guard = StopOnPanic(&state);
        let mut scratch = S::default();
        loop {
            let i = claim.fetch_add(1, Ordering::Relaxed);
            if i >= lanes.len() || state.stopped() {
                return;
            }
            let made = make(i, &mut scratch);
            // Whoever has the earlier item of this lane began before, and waits for earlier ones only: the first of all waits
            // for nobody.
            if !state.wait(lanes[i], turns[i]) {
                return;
            }
            match made.and_then(|()| take(i, &mut scratch)) {
                Ok(()) => state.next(lanes[i]),
                Err(e) => return state.fail(e),
            }
        }
    };
    std::thread::scope(|scope| {
        // Neither is there one for the next where there was none for one.
        let _ = (1..jobs.min(lanes.len())).all(|_| help(scope, work));
        work();
    });
    state.ended()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::package::io::turns::lock;
    use std::sync::Mutex;

    #[test]
    fn every_lane_is_taken_in_its_order_by_any_number_of_threads() {
        let lanes: Vec<usize> = (0..600).map(|i| (i * i + i / 7) % 5).collect();
        for jobs in [1, 2, 9] {
            let seen: Vec<Mutex<Vec<usize>>> = (0..5).map(|_| Mutex::default()).collect();
            let make = |i: usize, s: &mut usize| {
                std::thread::sleep(std::time::Duration::from_micros((i as u64 * 37) % 100));
                *s = i;
                Ok(())
            };
            in_lanes::<usize>(jobs, &lanes, make, |i, s| {
                assert_eq!(i, *s);
                lock(&seen[lanes[i]]).push(i);
                Ok(())
            })
            .unwrap();
            for (lane, seen) in seen.iter().enumerate() {
                let want: Vec<usize> = (0..600).filter(|i| lanes[*i] == lane).collect();
                assert_eq!(*lock(seen), want, "lane {lane}, {jobs} threads");
            }
        }
    }

    #[test]
    fn an_error_or_a_panic_ends_all_of_them() {
        let lanes: Vec<usize> = (0..100).map(|i| i % 3).collect();
        for jobs in [1, 4] {
            let take = |i: usize, (): &mut ()| if i == 40 { Err(Error::invalid("forty")) } else { Ok(()) };
            let e = in_lanes::<()>(jobs, &lanes, |_, ()| Ok(()), take).unwrap_err();
            assert_eq!(e.message(), "forty");
            let make = |i: usize, (): &mut ()| if i == 9 { panic!("nine") } else { Ok(()) };
            let run = std::panic::AssertUnwindSafe(|| in_lanes::<()>(jobs, &lanes, make, |_, ()| Ok(())));
            assert!(std::panic::catch_unwind(run).is_err());
        }
        assert!(in_lanes::<()>(3, &[], |_, ()| Ok(()), |_, ()| Ok(())).is_ok());
    }
}
