//! What the demo says, and how long things take.
//!
//! Invariant: whatever takes longer than two seconds is announced before it begins and closed with its time.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Speaks to the person who runs the demo, with the time since it began.
#[derive(Debug, Clone, Copy)]
pub struct Teller {
    begun: Instant,
}

impl Teller {
    /// A clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self { begun: Instant::now() }
    }

    /// A line with the time.
    pub fn say(&self, line: impl Display) {
        println!("[{:6.1} s] {line}", self.begun.elapsed().as_secs_f64());
    }

    /// A heading.
    pub fn title(&self, line: impl Display) {
        println!();
        self.say(format_args!("== {line}"));
    }

    /// Does something, saying so before, and after if it took over two seconds.
    ///
    /// # Errors
    /// What `work` gives.
    pub fn step<T, E>(&self, what: impl Display, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.say(format_args!("{what} …"));
        let start = Instant::now();
        let done = work()?;
        if start.elapsed() > Duration::from_secs(2) {
            self.say(format_args!("{what}: done after {:.1} s", start.elapsed().as_secs_f64()));
        }
        Ok(done)
    }
}

impl Default for Teller {
    fn default() -> Self {
        Self::new()
    }
}
