//! Log lines that others can provoke: at most a few a second, the rest is counted and told with the next one.

use lamina_protocol::time::Millis;
use std::cell::Cell;

/// Lines of one kind in a second.
const LINES: u32 = 5;

/// A limit for one kind of line.
#[derive(Debug, Default)]
pub(crate) struct LineLimit {
    second: Cell<u64>,
    lines: Cell<u32>,
    left_out: Cell<u64>,
}

impl LineLimit {
    /// Whether a line may be written now; holds how many were left out before it.
    pub(crate) fn admit(&self, now: Millis) -> Option<u64> {
        let second = now.0 / 1000;
        if self.second.replace(second) != second {
            self.lines.set(0);
        }
        if self.lines.get() >= LINES {
            self.left_out.set(self.left_out.get() + 1);
            return None;
        }
        self.lines.set(self.lines.get() + 1);
        Some(self.left_out.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_told_with_the_next_line() {
        let limit = LineLimit::default();
        let admitted = (0..100).filter(|_| limit.admit(Millis(500)).is_some()).count();
        assert_eq!(admitted, LINES as usize);
        assert_eq!(limit.admit(Millis(1500)), Some(95));
    }
}
