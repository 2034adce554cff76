//! A program that the benchmark starts: its output, its CPU time and memory, and its end.
//!
//! Invariant: what is started here ends with its guard, also when the benchmark fails, and with this process, however
//! it ends (`setpriv`, of every Debian, asks the kernel for that).

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Anything that a healthy program does when it starts happens within this time, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what a program has written.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A running program.
#[derive(Debug)]
pub struct Program {
    name: String,
    id: u32,
    child: Mutex<Child>,
    output: PathBuf,
}

impl Program {
    /// Starts it; what it writes goes to `NAME.out` in the folder.
    ///
    /// # Errors
    /// The program is not there, or the folder cannot be written.
    pub fn start(name: &str, folder: &Path, command: Command) -> Result<Self> {
        let output = folder.join(format!("{name}.out"));
        let file = File::create(&output).with_context(|| output.display().to_string())?;
        let program = command.get_program().to_string_lossy().into_owned();
        let mut guarded = Command::new("setpriv");
        guarded.args(["--pdeathsig", "KILL", "--", &program]).args(command.get_args());
        let command = guarded.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("start {program}"))?;
        Ok(Self { name: name.to_owned(), id: child.id(), child: Mutex::new(child), output })
    }

    /// Waits until `found` finds what it looks for in the output.
    ///
    /// # Errors
    /// The program ended before, or it took more than a minute; with the output's last lines.
    pub fn wait_for<T>(&self, what: &str, found: impl Fn(&str) -> Option<T>) -> Result<T> {
        let begun = Instant::now();
        loop {
            let text = std::fs::read_to_string(&self.output)?;
            if let Some(value) = found(&text) {
                return Ok(value);
            }
            if let Some(status) = self.child().try_wait()? {
                bail!("{} ended with {status} before {what}:\n{}", self.name, last_lines(&text));
            }
            if begun.elapsed() > PATIENCE {
                bail!("{}: no {what} within {PATIENCE:?}:\n{}", self.name, last_lines(&text));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits until it takes connections on a unix socket.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn wait_for_socket(&self, path: &Path) -> Result<()> {
        self.wait_for("its socket", |_| std::os::unix::net::UnixStream::connect(path).ok().map(drop))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// All that it has written so far.
    ///
    /// # Errors
    /// Its file is gone.
    pub fn output(&self) -> Result<String> {
        std::fs::read_to_string(&self.output).with_context(|| self.output.display().to_string())
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it runs, or is stopped.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.child().try_wait()?.is_none())
    }

    /// SIGKILL, and until its ports and files are free.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child();
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// A signal, if it still runs.
    ///
    /// # Errors
    /// It has ended, or the kernel's.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = self.child();
        anyhow::ensure!(child.try_wait()?.is_none(), "{} has ended", self.name);
        kill_process(Pid::from_child(&child), signal).with_context(|| self.name.clone())
    }

    /// Waits until it ends by itself, and with success.
    ///
    /// # Errors
    /// Another status, with the output's last lines, or it takes too long.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            let ended = self.child().try_wait()?;
            match ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("{} ended with {status}:\n{}", self.name, last_lines(&self.output()?)),
                None if begun.elapsed() > limit => bail!("{} runs after {limit:?}", self.name),
                None => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// CPU time of a process with all its threads, those that ended too; exact to 10 ms.
///
/// # Errors
/// The process is gone.
pub fn cpu_time(process: u32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).context("a measured process is gone")?;
    ticks(&text).map(|ticks| Duration::from_millis(ticks * 10)).context("a line of /proc/…/stat")
}

fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
    let (user, system) = (fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
    Some(user + system)
}

/// CPU time of the threads that a process has now, exact to the nanosecond: for idle processes, which end none.
///
/// # Errors
/// The process is gone.
pub fn cpu_time_of_threads(process: u32) -> Result<Duration> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).context("a measured process is gone")?;
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Ok(Duration::from_nanos(nanoseconds.sum()))
}

/// Memory of a process in bytes: resident now.
///
/// # Errors
/// The process is gone.
pub fn resident_bytes(process: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).context("a measured process is gone")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_cpu_time_of_a_process_counts_user_and_system_whatever_its_name() {
        assert_eq!(ticks("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 21 4 0 0 20"), Some(25));
        assert_eq!(ticks("7 (x) S 1"), None);
    }

    #[test]
    fn work_of_this_process_shows_in_its_cpu_time() {
        let before = cpu_time_of_threads(std::process::id()).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(80) {
            std::hint::black_box(before);
        }
        std::thread::yield_now();
        assert!(cpu_time_of_threads(std::process::id()).unwrap() > before);
        assert!(resident_bytes(std::process::id()).unwrap() > 4096);
    }
}
