//! Progress bars: on standard error, on a terminal only.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;
use xorz::package::Progress;

/// One bar, of the stage that began last; it goes when the job ends.
pub(crate) struct Bar(RwLock<ProgressBar>);

impl Bar {
    /// A bar if standard error is a terminal.
    pub(crate) fn on_terminal() -> Option<Self> {
        std::io::stderr().is_terminal().then(|| Self(RwLock::new(ProgressBar::hidden())))
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, bytes: u64) {
        let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
        // As wide as the terminal, so that no line wraps.
        let look =
            "{msg} [{wide_bar}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(look) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar.tick();
        bar.enable_steady_tick(Duration::from_millis(200));
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        current.finish_and_clear();
        *current = bar;
    }

    fn advance(&self, bytes: u64) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).finish_and_clear();
    }
}
