//! Threads for whole checkpoints: pieces are made in any order by any thread and handed over in order, so that hashes and
//! files grow as one thread would make them grow, and memory holds one piece per thread. Starts threads of its own: nothing
//! here is ever called by an op.

use super::turns::{StopOnPanic, Turns, lock};
use crate::error::{Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of threads that `jobs` asks for: `jobs` itself, or one per core if it is 0.
pub(crate) fn threads(jobs: usize) -> usize {
    match jobs {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n.min(1024),
    }
}

/// Start a thread that helps with `work`, or do without: where the system gives no more threads, those that are there do all
/// of it.
pub(super) fn help<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl FnOnce() + Send + 'scope,
) -> bool {
    std::thread::Builder::new().spawn_scoped(scope, work).is_ok()
}

/// The threads of a job. Lanes share them; who has nothing left to do goes where something is left.
#[derive(Debug)]
pub(crate) struct Crew {
    jobs: usize,
    /// Threads that have nothing to do.
    idle: AtomicUsize,
    /// Lanes at work.
    lanes: AtomicUsize,
}

impl Crew {
    /// The threads that `jobs` asks for, the calling one among them, for one lane.
    pub(crate) fn of(jobs: usize) -> Self {
        Self::sharing(threads(jobs), 1)
    }

    fn sharing(jobs: usize, lanes: usize) -> Self {
        Self { jobs, idle: AtomicUsize::new(jobs.saturating_sub(lanes)), lanes: AtomicUsize::new(lanes) }
    }

    /// Take an idle thread for a lane that has `mine`, if that is not more than its share.
    fn recruit(&self, mine: usize) -> bool {
        let share = self.jobs.div_ceil(self.lanes.load(Ordering::Relaxed).max(1));
        let one = |idle: usize| idle.checked_sub(1);
        mine < share && self.idle.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one).is_ok()
    }

    /// So many threads have nothing to do any more.
    fn dismiss(&self, count: usize) {
        self.idle.fetch_add(count, Ordering::Relaxed);
    }

    /// A lane has come to its end, or could not be begun.
    fn leave(&self) {
        self.lanes.fetch_sub(1, Ordering::Relaxed);
        self.dismiss(1);
    }
}

/// Call `make(i)` for every `i < items` on the threads of `crew` that are due to this lane, then `take(i)` one after the other
/// in order of `i`; both get the scratch of the thread that made the piece. Threads that other lanes do without join in midway.
///
/// # Errors
/// That of the lowest item; nothing of later items has been taken then.
pub(crate) fn in_order<S: Default>(
    crew: &Crew,
    items: usize,
    make: impl Fn(usize, &mut S) -> Result<()> + Sync,
    mut take: impl FnMut(usize, &mut S) -> Result<()> + Send,
) -> Result<()> {
    if crew.jobs.min(items) <= 1 {
        let mut scratch = S::default();
        return (0..items).try_for_each(|i| make(i, &mut scratch).and_then(|()| take(i, &mut scratch)));
    }
    let (claim, turns, take) = (AtomicUsize::new(0), Turns::of(1), Mutex::new(take));
    // `before` is called before each item.
    let work = |before: &mut dyn FnMut()| {
        let _guard = StopOnPanic(&turns);
        let mut scratch = S::default();
        loop {
            before();
            let i = claim.fetch_add(1, Ordering::Relaxed);
            if i >= items || turns.stopped() {
                return;
            }
            let made = make(i, &mut scratch);
            if !turns.wait(0, i) {
                return;
            }
            match made.and_then(|()| lock(&take)(i, &mut scratch)) {
                Ok(()) => turns.next(0),
                Err(e) => return turns.fail(e),
            }
        }
    };
    let mut mine = 1;
    std::thread::scope(|scope| {
        let (work, claim) = (&work, &claim);
        // Neither is there one for the next where there was none for one.
        let mut more = true;
        work(&mut || {
            while more && mine < items.saturating_sub(claim.load(Ordering::Relaxed)) && crew.recruit(mine) {
                more = help(scope, move || work(&mut || ()));
                match more {
                    true => mine += 1,
                    false => crew.dismiss(1),
                }
            }
        });
    });
    crew.dismiss(mine - 1);
    turns.ended()
}

/// Call `work(i, crew)` for every `i < items`, several at once, the `jobs` threads shared out among them.
///
/// # Errors
/// That of the lowest item that failed; the others may have run or not.
pub(crate) fn side_by_side(
    jobs: usize,
    items: usize,
    work: impl Fn(usize, &Crew) -> Result<()> + Sync,
) -> Result<()> {
    let lanes = jobs.min(items).max(1);
    let crew = &Crew::sharing(jobs, lanes);
    if lanes == 1 {
        return (0..items).try_for_each(|i| work(i, crew));
    }
    let claim = AtomicUsize::new(0);
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let lane = || {
        loop {
            let i = claim.fetch_add(1, Ordering::Relaxed);
            if i >= items || lock(&failed).is_some() {
                return crew.leave();
            }
            if let Err(e) = work(i, crew) {
                let mut first = lock(&failed);
                if first.as_ref().is_none_or(|(at, _)| i < *at) {
                    *first = Some((i, e));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let begun = (1..lanes).take_while(|_| help(scope, lane)).count();
        (begun + 1..lanes).for_each(|_| crew.leave());
        lane();
    });
    lock(&failed).take().map_or(Ok(()), |(_, e)| Err(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_taken_once_and_in_order_by_any_number_of_threads() {
        for jobs in [1, 2, 7] {
            let mut seen = vec![];
            let make = |i: usize, s: &mut usize| {
                std::thread::sleep(std::time::Duration::from_micros((i as u64 * 37) % 200));
                *s = i * i;
                Ok(())
            };
            in_order::<usize>(&Crew::of(jobs), 200, make, |i, s| {
                seen.push((i, *s));
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, (0..200).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_error_of_the_lowest_item_comes_back_and_nothing_after_it_is_taken() {
        for jobs in [1, 2, 5] {
            let mut taken = 0;
            let make = |i: usize, _: &mut ()| {
                if i == 13 || i == 14 { Err(Error::invalid(format!("{i}"))) } else { Ok(()) }
            };
            let e = in_order::<()>(&Crew::of(jobs), 100, make, |_, ()| {
                taken += 1;
                Ok(())
            });
            assert_eq!((e.unwrap_err().message(), taken), ("13", 13));
        }
    }

    #[test]
    fn a_panic_ends_all_threads() {
        let run = || {
            in_order::<()>(
                &Crew::of(3),
                50,
                |i, ()| if i == 7 { panic!("seven") } else { Ok(()) },
                |_, ()| Ok(()),
            )
        };
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
    }

    #[test]
    fn lanes_do_every_item_and_share_the_threads() {
        for (jobs, items) in [(1, 3), (2, 5), (7, 3), (4, 1), (3, 0)] {
            let done: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            side_by_side(jobs, items, |i, _| {
                done[i].fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
            .unwrap();
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
        }
    }

    /// Those that are at work at once, and the most that have been.
    #[derive(Default)]
    struct AtOnce(AtomicUsize, AtomicUsize);

    impl AtOnce {
        fn with(&self, work: impl FnOnce()) {
            self.1.fetch_max(self.0.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            work();
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn threads_whose_lanes_are_at_their_end_help_those_that_are_not_and_never_are_there_more() {
        // Lanes and their lengths; the last one that ends is long enough to be joined by all.
        for (jobs, lengths) in [(2, &[20, 20, 60][..]), (3, &[5, 90]), (4, &[120]), (5, &[2, 2, 2, 2, 200])] {
            let (all, last) = (AtOnce::default(), AtOnce::default());
            side_by_side(jobs, lengths.len(), |i, crew| {
                let nap = || std::thread::sleep(std::time::Duration::from_millis(2));
                let make = |_: usize, (): &mut ()| {
                    all.with(|| if i + 1 == lengths.len() { last.with(nap) } else { nap() });
                    Ok(())
                };
                let mut seen = 0;
                in_order::<()>(crew, lengths[i], make, |j, ()| {
                    assert_eq!(j, seen);
                    seen += 1;
                    Ok(())
                })?;
                assert_eq!(seen, lengths[i]);
                Ok(())
            })
            .unwrap();
            let most = [&all, &last].map(|at_once| at_once.1.load(Ordering::SeqCst));
            assert_eq!(most, [jobs, jobs], "{lengths:?}");
        }
    }
}
