//! The judge: is every commit that a client was told of in the database, as it was written?
//!
//! Invariant: an empty log passes nothing. Rows that no log names are fine: their clients may have been cut off before
//! the word came. A row that is there with other contents is as bad as one that is missing.

use std::collections::HashMap;

use postgres::{Client, Config};

use crate::commits::payload;
use crate::log::Acknowledged;

/// What the check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Commits in the log.
    pub logged: usize,
    /// Rows in the database.
    pub rows: usize,
    /// Logged, and not in the database.
    pub missing: Vec<Acknowledged>,
    /// In the database (client, n) with other contents than were written.
    pub wrong: Vec<(u32, u64)>,
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The database does not answer.
    #[error("the database cannot be asked: {0}")]
    Database(#[from] postgres::Error),
    /// A row has a client or number that nobody writes.
    #[error("a row has client {client} and n {n}")]
    Row {
        /// Its client.
        client: i32,
        /// Its number.
        n: i64,
    },
}

impl Verdict {
    /// Whether everything logged is there, and something was logged.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.logged > 0 && self.missing.is_empty() && self.wrong.is_empty()
    }

    /// For people.
    #[must_use]
    pub fn in_words(&self) -> String {
        let Self { logged, rows, missing, wrong } = self;
        let mut text = format!(
            "{logged} commits were acknowledged, {} of them are missing, {} rows differ, {rows} rows are there",
            missing.len(),
            wrong.len()
        );
        for commit in missing.iter().take(5) {
            text +=
                &format!("\n  missing: client {}, n {}, acknowledged at {} ms", commit.client, commit.n, commit.at_ms);
        }
        for (client, n) in wrong.iter().take(5) {
            text += &format!("\n  differs: client {client}, n {n}");
        }
        text
    }
}

/// Compares a log with the rows (client, n, payload) of the database.
#[must_use]
pub fn compare(log: &[Acknowledged], rows: &HashMap<(u32, u64), String>) -> Verdict {
    let missing = log.iter().filter(|one| !rows.contains_key(&(one.client, one.n))).copied().collect();
    let differs = |((client, n), text): &(&(u32, u64), &String)| **text != payload(*client, *n);
    let mut wrong: Vec<(u32, u64)> = rows.iter().filter(differs).map(|(key, _)| *key).collect();
    wrong.sort_unstable();
    Verdict { logged: log.len(), rows: rows.len(), missing, wrong }
}

/// Reads all rows of the database and compares.
///
/// # Errors
/// [`CheckError`].
pub fn check(log: &[Acknowledged], database: &Config) -> Result<Verdict, CheckError> {
    let mut client: Client = database.connect(postgres::NoTls)?;
    let mut rows = HashMap::new();
    for row in client.query("select client, n, payload from commits", &[])? {
        let (client, n): (i32, i64) = (row.try_get(0)?, row.try_get(1)?);
        let key = u32::try_from(client).ok().zip(u64::try_from(n).ok()).ok_or(CheckError::Row { client, n })?;
        rows.insert(key, row.try_get(2)?);
    }
    Ok(compare(log, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(client: u32, n: u64) -> Acknowledged {
        Acknowledged { client, n, at_ms: 1 }
    }

    fn rows(keys: &[(u32, u64)]) -> HashMap<(u32, u64), String> {
        keys.iter().map(|(client, n)| ((*client, *n), payload(*client, *n))).collect()
    }

    #[test]
    fn every_logged_commit_found_passes_also_with_more_rows() {
        assert!(compare(&[ack(1, 1), ack(2, 1)], &rows(&[(1, 1), (2, 1), (2, 2)])).passes());
    }

    #[test]
    fn one_commit_that_never_happened_fails() {
        let verdict = compare(&[ack(1, 1), ack(1, 2)], &rows(&[(1, 1)]));
        assert_eq!(verdict.missing, [ack(1, 2)]);
        assert!(!verdict.passes() && verdict.in_words().contains("client 1, n 2"));
    }

    #[test]
    fn other_contents_fail() {
        let mut found = rows(&[(1, 1)]);
        found.insert((1, 2), "torn".into());
        let verdict = compare(&[ack(1, 1)], &found);
        assert_eq!(verdict.wrong, [(1, 2)]);
        assert!(!verdict.passes());
    }

    #[test]
    fn an_empty_log_proves_nothing() {
        assert!(!compare(&[], &rows(&[(1, 1)])).passes());
    }
}
