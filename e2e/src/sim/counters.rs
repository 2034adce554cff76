//! Which states the runs reached, and how often: a test that never gets there proves nothing.

use std::collections::BTreeMap;
use std::fmt;

/// Counts by name, and highest values by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>, BTreeMap<String, u64>);

impl Counters {
    /// One more of this.
    pub(super) fn count(&mut self, name: &str) {
        self.add(name, 1);
    }

    /// So many more of this.
    pub(super) fn add(&mut self, name: &str, more: u64) {
        if let Some(count) = self.0.get_mut(name) {
            *count += more;
        } else {
            self.0.insert(name.to_owned(), more);
        }
    }

    /// The highest of one run.
    pub(super) fn most(&mut self, name: &str, value: u64) {
        self.1.insert(name.to_owned(), value.max(self.1.get(name).copied().unwrap_or(0)));
    }

    /// How often.
    pub fn of(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds what another run reached.
    pub fn join(&mut self, other: &Self) {
        for (name, count) in &other.0 {
            self.add(name, *count);
        }
        for (name, value) in &other.1 {
            self.most(name, *value);
        }
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in self.0.iter().chain(&self.1) {
            writeln!(f, "{count:>10}  {name}")?;
        }
        Ok(())
    }
}
