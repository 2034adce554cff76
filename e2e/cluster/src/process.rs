//! Starting, finding and signalling the cluster's daemons.
//!
//! A daemon is started in a session of its own, in the namespaces and the cgroup of its place; its pid goes to a file, its words
//! to a log. It outlives the program that started it.
//!
//! Invariant: a pid from a file counts only while that process is in the place's cgroup, so a reused pid is never taken for ours.

use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::cgroup;
use crate::host::{HostError, at, quote, run, wait_until};
use crate::layout::{Layout, NodeId, Place, Tools};

/// The process that keeps a node's mount namespace while its daemons come and go.
pub const HOLDER: &str = "holder";

/// What to run and where.
#[derive(Debug)]
pub struct Daemon<'a> {
    /// In which namespaces and cgroup.
    pub place: Place,
    /// Short name, for pid file and log.
    pub name: &'a str,
    /// Program with arguments.
    pub argv: Vec<String>,
}

/// Why a daemon is not there.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It is not running in its place.
    #[error("{name} is not running on {place}")]
    NotRunning {
        /// Which daemon.
        name: String,
        /// Where it should be.
        place: Place,
    },
    /// It ended by itself; the end of its log says why.
    #[error("{name} on {place} ended by itself; its log ends with:\n{log}")]
    Died {
        /// Which daemon.
        name: String,
        /// Where.
        place: Place,
        /// Last lines of the log.
        log: String,
    },
    /// A signal name that is not supported here.
    #[error("no such signal: {0} (STOP, CONT, TERM, KILL)")]
    NoSuchSignal(String),
    /// The kernel refused the signal.
    #[error("signalling {name}: {source}")]
    Signal {
        /// Which daemon.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// The machine refused.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// The daemon's pid, if it runs.
#[must_use]
pub fn pid_of(layout: &Layout, place: Place, name: &str) -> Option<i32> {
    let pid = std::fs::read_to_string(layout.pid_file(place, name)).ok()?.trim().parse().ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit(") ").next()?.chars().next()?;
    (state != 'Z' && cgroup::contains(&layout.name_of(place), pid)).then_some(pid)
}

/// As [`pid_of`], as an error with the end of the log.
///
/// # Errors
/// The daemon does not run.
pub fn expect_alive(layout: &Layout, place: Place, name: &str) -> Result<i32, ProcessError> {
    pid_of(layout, place, name).ok_or_else(|| ProcessError::Died {
        name: name.to_owned(),
        place,
        log: last_lines(&layout.log_file(place, name), 12),
    })
}

/// Starts a daemon unless it runs already.
///
/// # Errors
/// The namespaces or cgroup of its place are not there, or it did not come to life within 10 s.
pub fn start(layout: &Layout, tools: &Tools, daemon: &Daemon<'_>) -> Result<(), ProcessError> {
    let enter = match daemon.place {
        Place::ControlPlane => {
            vec![format!("--net=/run/netns/{}", layout.name_of(Place::ControlPlane)), "--".to_owned()]
        }
        Place::Node(node) => node_namespaces(layout, node)?,
    };
    launch(layout, tools, daemon, &enter)
}

/// Starts a node's holder: it makes the mount and host-name namespace in which `prepare` (shell) runs first.
///
/// # Errors
/// As [`start`].
pub fn start_holder(layout: &Layout, tools: &Tools, node: NodeId, prepare: &str) -> Result<(), ProcessError> {
    let place = Place::Node(node);
    let enter: Vec<String> = [
        &format!("--net=/run/netns/{}", layout.name_of(place)),
        "--",
        "unshare",
        "--mount",
        "--uts",
        "--propagation",
        "private",
        "--",
    ]
    .map(str::to_owned)
    .to_vec();
    let script = format!("set -e\n{prepare}\nexec sleep infinity");
    let daemon = Daemon { place, name: HOLDER, argv: vec!["sh".into(), "-c".into(), script] };
    launch(layout, tools, &daemon, &enter)?;
    // The holder becomes `sleep` only when everything before has worked.
    wait_until(&format!("{node} to be prepared"), Duration::from_secs(10), || {
        let pid = expect_alive(layout, place, HOLDER)?;
        Ok(std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "sleep"))
    })
}

/// Runs a program inside a node to its end and returns what it printed.
///
/// # Errors
/// The node is down, or the program fails.
pub fn run_in_node(layout: &Layout, node: NodeId, argv: &[&str]) -> Result<String, ProcessError> {
    let enter = node_namespaces(layout, node)?;
    let words: Vec<&str> =
        std::iter::once("nsenter").chain(enter.iter().map(String::as_str)).chain(argv.iter().copied()).collect();
    Ok(run(&words)?)
}

/// The arguments of `nsenter` for a node.
///
/// # Errors
/// The node is down.
pub fn node_namespaces(layout: &Layout, node: NodeId) -> Result<Vec<String>, ProcessError> {
    let place = Place::Node(node);
    let holder =
        pid_of(layout, place, HOLDER).ok_or_else(|| ProcessError::NotRunning { name: HOLDER.to_owned(), place })?;
    Ok(["--target", &holder.to_string(), "--net", "--mount", "--uts", "--"].map(str::to_owned).to_vec())
}

/// Sends STOP, CONT, TERM or KILL to a daemon.
///
/// # Errors
/// It does not run, the signal is another, or the kernel refuses.
pub fn signal(layout: &Layout, place: Place, name: &str, signal: &str) -> Result<(), ProcessError> {
    let number = signal_number(signal)?;
    let pid = pid_of(layout, place, name).ok_or_else(|| ProcessError::NotRunning { name: name.to_owned(), place })?;
    send(name, pid, number)
}

/// STOP, CONT, TERM or KILL, with or without SIG before it.
///
/// # Errors
/// The name is another.
pub fn signal_number(name: &str) -> Result<Signal, ProcessError> {
    match name.trim_start_matches("SIG") {
        "STOP" => Ok(Signal::STOP),
        "CONT" => Ok(Signal::CONT),
        "TERM" => Ok(Signal::TERM),
        "KILL" => Ok(Signal::KILL),
        other => Err(ProcessError::NoSuchSignal(other.to_owned())),
    }
}

/// Sends a signal; a process that has ended meanwhile is no error.
///
/// # Errors
/// The kernel refuses.
pub fn send(name: &str, pid: i32, signal: Signal) -> Result<(), ProcessError> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    match kill_process(pid, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(ProcessError::Signal { name: name.to_owned(), source: error.into() }),
    }
}

fn launch(layout: &Layout, tools: &Tools, daemon: &Daemon<'_>, enter: &[String]) -> Result<(), ProcessError> {
    let (place, name) = (daemon.place, daemon.name);
    if pid_of(layout, place, name).is_some() {
        return Ok(());
    }
    let (pid_file, log) = (layout.pid_file(place, name), layout.log_file(place, name));
    for file in [&pid_file, &log] {
        let parent = file.parent().expect("a file below the state directory");
        at(parent, std::fs::create_dir_all(parent))?;
    }
    if pid_file.exists() {
        at(&pid_file, std::fs::remove_file(&pid_file))?;
    }
    let quoted = |path: &Path| quote(&path.display().to_string());
    let script = format!(
        "{}exec >>{} 2>&1 </dev/null\nexport PATH={}:/usr/sbin:/usr/bin:/sbin:/bin\ncd /\necho $$ > {}\nexec \"$@\"",
        cgroup::enter_script(&layout.name_of(place))?,
        quoted(&log),
        quoted(tools.dir()),
        quoted(&pid_file),
    );
    let mut argv: Vec<String> = ["setsid", "--fork", "nsenter"].map(str::to_owned).to_vec();
    argv.extend(enter.iter().cloned());
    argv.extend(["sh".to_owned(), "-c".to_owned(), script, name.to_owned()]);
    argv.extend(daemon.argv.iter().cloned());
    spawn_detached(&argv)?;
    wait_until(&format!("{name} on {place} to start"), Duration::from_secs(10), || Ok(pid_file.exists()))
}

/// `setsid --fork` returns at once; its output must not be our pipes, which the daemon would keep open.
fn spawn_detached(argv: &[String]) -> Result<(), ProcessError> {
    let script = "exec \"$@\" >/dev/null 2>&1 </dev/null";
    let mut words = vec!["sh".to_owned(), "-c".to_owned(), script.to_owned(), "start".to_owned()];
    words.extend(argv.iter().cloned());
    run(&words)?;
    Ok(())
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
