//! Commands and files of the machine: one way to run a program and one way to name what failed.
//!
//! Invariant: an error always names the program with its arguments, or the path, so that it can be repeated by hand.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What the machine refused.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The program could not be started at all (not installed, no permission).
    #[error("cannot start `{command}`: {source}")]
    Start {
        /// Program and arguments.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// The program ran and failed.
    #[error("`{command}` ended with {status}: {stderr}")]
    Failed {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said, trimmed.
        stderr: String,
    },
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something awaited did not happen in time.
    #[error("waited {} s for {what}", limit.as_secs())]
    Late {
        /// What was awaited.
        what: String,
        /// How long.
        limit: Duration,
    },
}

/// Gives an I/O error its path.
pub fn at<T>(path: &Path, result: std::io::Result<T>) -> Result<T, HostError> {
    result.map_err(|source| HostError::File { path: path.to_path_buf(), source })
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// The program cannot start, or ends with another status than 0.
pub fn run<S: AsRef<str>>(argv: &[S]) -> Result<String, HostError> {
    run_with_input(argv, &[])
}

/// As [`run`], with bytes on the program's standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input<S: AsRef<str>>(argv: &[S], input: &[u8]) -> Result<String, HostError> {
    let shown = show(argv);
    let started = Command::new(argv[0].as_ref())
        .args(argv[1..].iter().map(AsRef::as_ref))
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.map_err(|source| HostError::Start { command: shown.clone(), source })?;
    // Inputs are short (a manifest), so writing before reading cannot block both sides. A program that reads nothing gives
    // EPIPE here; its exit status says why.
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(input).ok();
    }
    let output = child.wait_with_output().map_err(|source| HostError::Start { command: shown.clone(), source })?;
    finish(shown, output)
}

/// As [`run`], with an open file as the program's standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_file<S: AsRef<str>>(argv: &[S], input: File) -> Result<String, HostError> {
    let shown = show(argv);
    let output = Command::new(argv[0].as_ref()).args(argv[1..].iter().map(AsRef::as_ref)).stdin(input).output();
    finish(shown.clone(), output.map_err(|source| HostError::Start { command: shown, source })?)
}

fn finish(command: String, output: Output) -> Result<String, HostError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(HostError::Failed { command, status: output.status, stderr })
}

/// Writes a file, making its folder.
///
/// # Errors
/// The folder or file cannot be written.
pub fn write(path: &Path, text: &str) -> Result<(), HostError> {
    if let Some(parent) = path.parent() {
        at(parent, std::fs::create_dir_all(parent))?;
    }
    at(path, std::fs::write(path, text))
}

/// Polls until `done` says so: the outside programs here offer no event to wait for.
///
/// # Errors
/// [`HostError::Late`] after `limit`; an error of `done` at once.
pub fn wait_until<E: From<HostError>>(
    what: &str,
    limit: Duration,
    mut done: impl FnMut() -> Result<bool, E>,
) -> Result<(), E> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > limit {
            return Err(HostError::Late { what: what.to_owned(), limit }.into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Mount points at or below `dir` in this process's mount namespace, deepest first.
///
/// # Errors
/// The mount table cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>, HostError> {
    let table = Path::new("/proc/self/mountinfo");
    let text = at(table, std::fs::read_to_string(table))?;
    let mut found: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir))
        .collect();
    found.sort();
    found.reverse();
    Ok(found)
}

/// Quotes a word for `sh`.
#[must_use]
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn show<S: AsRef<str>>(argv: &[S]) -> String {
    argv.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_program_is_named_with_its_words() {
        let error = run(&["sh", "-c", "echo no such thing >&2; exit 3"]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sh -c") && text.contains("no such thing") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_quoted_word_survives_the_shell() {
        let word = "it's $HOME `x` \"y\"";
        assert_eq!(run(&["sh", "-c", &format!("printf %s {}", quote(word))]).unwrap(), word);
    }

    #[test]
    fn waiting_ends_with_what_was_awaited() {
        let error = wait_until::<HostError>("rain", Duration::ZERO, || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("rain"));
    }
}
