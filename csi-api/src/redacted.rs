//! What stands in a log where credentials would: how many there were, nothing else.

use std::fmt;

/// Number of entries that are not shown.
pub(crate) struct Redacted(pub(crate) usize);

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} not shown>", self.0)
    }
}
