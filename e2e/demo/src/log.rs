//! The log of acknowledged commits: lines `client n milliseconds`, milliseconds since 1970 at which the acknowledgement
//! was read.
//!
//! Invariant: a line is written only after the database acknowledged the commit, and synced before the client goes on;
//! so the log never names a commit that no client was told of. A last line without its end is a write that was cut off:
//! it was acknowledged to nobody who could have read it, and is left out.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A commit that a client was told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Acknowledged {
    /// Which client.
    pub client: u32,
    /// Its how manieth insert.
    pub n: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
}

impl fmt::Display for Acknowledged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.client, self.n, self.at_ms)
    }
}

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A line is none.
    #[error("line {line} is not `client n milliseconds`")]
    Line {
        /// Which, from 1.
        line: usize,
    },
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    since.as_millis() as u64
}

/// One client's end of the log.
#[derive(Debug)]
pub struct Writer {
    file: File,
}

impl Writer {
    /// Opens the log to append, making it.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        let opened = OpenOptions::new().create(true).append(true).open(path);
        let file = opened.map_err(|source| LogError::File { path: path.display().to_string(), source })?;
        Ok(Self { file })
    }

    /// Appends a commit and waits until the disk has it. Several writers may share a file: a line is one write.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn append(&mut self, commit: Acknowledged) -> std::io::Result<()> {
        self.file.write_all(format!("{commit}\n").as_bytes())?;
        self.file.sync_data()
    }
}

/// Reads a log.
///
/// # Errors
/// It cannot be read, or a whole line is not one of its lines.
pub fn read(path: &Path) -> Result<Vec<Acknowledged>, LogError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| LogError::File { path: path.display().to_string(), source })?;
    parse(&text)
}

/// Reads the text of a log.
///
/// # Errors
/// A whole line is not one of its lines.
pub fn parse(text: &str) -> Result<Vec<Acknowledged>, LogError> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().enumerate().filter(|(_, line)| !line.is_empty());
    lines.map(|(index, line)| parse_line(line).ok_or(LogError::Line { line: index + 1 })).collect()
}

fn parse_line(line: &str) -> Option<Acknowledged> {
    let mut words = line.split(' ');
    let client = words.next()?.parse().ok()?;
    let n = words.next()?.parse().ok()?;
    let at_ms = words.next()?.parse().ok()?;
    words.next().is_none().then_some(Acknowledged { client, n, at_ms })
}

/// The longest time without an acknowledged commit of any client between `from_ms` and `to_ms`, and when it began.
#[must_use]
pub fn longest_gap(log: &[Acknowledged], from_ms: u64, to_ms: u64) -> (Duration, u64) {
    let mut times: Vec<u64> = log.iter().map(|one| one.at_ms).filter(|at| (from_ms..=to_ms).contains(at)).collect();
    times.extend([from_ms, to_ms]);
    times.sort_unstable();
    let gaps = times.windows(2).map(|pair| (pair[1] - pair[0], pair[0]));
    let (length, begin) = gaps.max().unwrap_or((0, from_ms));
    (Duration::from_millis(length), begin)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ack(client: u32, n: u64, at_ms: u64) -> Acknowledged {
        Acknowledged { client, n, at_ms }
    }

    #[test]
    fn what_is_appended_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut one, mut two) = (Writer::open(&path).unwrap(), Writer::open(&path).unwrap());
        one.append(ack(1, 1, 10)).unwrap();
        two.append(ack(2, 1, 11)).unwrap();
        one.append(ack(1, 2, 12)).unwrap();
        assert_eq!(read(&path).unwrap(), [ack(1, 1, 10), ack(2, 1, 11), ack(1, 2, 12)]);
    }

    #[test]
    fn a_line_that_was_cut_off_is_left_out_and_a_broken_one_is_named() {
        assert_eq!(parse("1 1 10\n1 2").unwrap(), [ack(1, 1, 10)]);
        assert!(matches!(parse("1 1 10\n1 x 3\n"), Err(LogError::Line { line: 2 })));
        assert!(matches!(parse("1 1 10 4\n"), Err(LogError::Line { line: 1 })));
    }

    #[test]
    fn a_gap_counts_from_the_begin_and_to_the_end_of_the_time_asked_for() {
        let log = [ack(1, 1, 100), ack(2, 1, 150), ack(1, 2, 900)];
        assert_eq!(longest_gap(&log, 0, 1000), (Duration::from_millis(750), 150));
        assert_eq!(longest_gap(&log, 100, 3000), (Duration::from_millis(2100), 900));
        assert_eq!(longest_gap(&[], 5, 10), (Duration::from_millis(5), 5));
    }
}
