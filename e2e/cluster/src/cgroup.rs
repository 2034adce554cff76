//! The cgroup of each place: memory accounting, and the one sure list of what runs there.
//!
//! On cgroup v1 a place has a directory in every mounted hierarchy, on v2 one below `/sys/fs/cgroup`. Its own daemons are in the
//! child `system`; the kubelet makes `kubepods` beside it. The v2 branch follows the documentation but was not run on the machine
//! this was written on, whose controllers are bound to v1.
//!
//! Invariant: a process of the cluster is always in a cgroup named after the slot, as children inherit it; so killing all pids
//! of these cgroups ends everything and nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::host::{HostError, at, wait_until};

const ROOT: &str = "/sys/fs/cgroup";

/// The directories of the hierarchies: several on v1, one on v2.
///
/// # Errors
/// The mount table cannot be read.
pub fn hierarchies() -> Result<Vec<PathBuf>, HostError> {
    let table = Path::new("/proc/self/mounts");
    let text = at(table, std::fs::read_to_string(table))?;
    let mounted = |kind: &str| -> Vec<PathBuf> {
        text.lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .filter(|words| words.len() > 2 && words[2] == kind)
            .map(|words| PathBuf::from(words[1]))
            .collect()
    };
    let v1 = mounted("cgroup");
    Ok(if v1.is_empty() { mounted("cgroup2") } else { v1 })
}

/// Makes the cgroup `name` with its child `system`, ready to take processes.
///
/// # Errors
/// The kernel refuses a directory or a setting.
pub fn make(name: &str) -> Result<(), HostError> {
    for hierarchy in hierarchies()? {
        let own = hierarchy.join(name);
        for dir in [own.clone(), own.join("system")] {
            at(&dir, std::fs::create_dir_all(&dir))?;
            let parent = dir.parent().expect("made by join");
            inherit_cpuset(parent, &dir)?;
            if is_v2(&hierarchy) {
                enable_controllers(parent)?;
            }
        }
    }
    Ok(())
}

/// The shell words that put the calling shell into `name`'s child `system`.
///
/// # Errors
/// The mount table cannot be read.
pub fn enter_script(name: &str) -> Result<String, HostError> {
    let dirs = hierarchies()?;
    let lines = dirs.iter().map(|dir| format!("echo $$ > {}/{name}/system/cgroup.procs\n", dir.display()));
    Ok(lines.collect())
}

/// Whether the process is in cgroup `name` or below.
#[must_use]
pub fn contains(name: &str, pid: i32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().any(|line| line.splitn(3, ':').nth(2).is_some_and(|path| below(path, name)))
}

/// Whether some part of the process's cgroup path is one of `parts`, as the id of a container is.
#[must_use]
pub fn in_any(pid: i32, parts: &[&str]) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().any(|line| line.split('/').any(|part| parts.contains(&part)))
}

/// All processes of cgroup `name`, over all hierarchies.
#[must_use]
pub fn pids(name: &str) -> Vec<i32> {
    let mut found: Vec<i32> = Vec::new();
    for top in tops(name) {
        visit(&top, &mut |dir| {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        });
    }
    found.sort_unstable();
    found.dedup();
    found.retain(|pid| *pid > 1);
    found
}

/// Whether a cgroup of this name is anywhere.
#[must_use]
pub fn exists(name: &str) -> bool {
    !tops(name).is_empty()
}

/// Memory that cgroup `name` holds, in bytes, page cache included; `None` where it is not accounted.
#[must_use]
pub fn memory_bytes(name: &str) -> Option<u64> {
    let read = |path: String| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    read(format!("{ROOT}/memory/{name}/memory.usage_in_bytes"))
        .or_else(|| read(format!("{ROOT}/{name}/memory.current")))
}

/// Kills everything in cgroup `name` until it is empty.
///
/// # Errors
/// Something is still there after 20 s (a process stuck in the kernel).
pub fn kill_all(name: &str) -> Result<(), HostError> {
    wait_until(&format!("the processes of {name} to end"), Duration::from_secs(20), || Ok(kill(name) == 0))
}

/// Kills what is in cgroup `name` now; returns how many there were.
pub fn kill(name: &str) -> usize {
    thaw(name);
    let left = pids(name);
    for pid in left.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        // Gone already is what we want; a fork since is found by who asks again.
        kill_process(pid, Signal::KILL).ok();
    }
    left.len()
}

/// Removes the emptied cgroup `name` everywhere.
///
/// # Errors
/// The kernel holds a directory for longer than 10 s.
pub fn remove(name: &str) -> Result<(), HostError> {
    wait_until(&format!("the cgroup {name} to go"), Duration::from_secs(10), || {
        for top in tops(name) {
            let mut dirs = Vec::new();
            visit(&top, &mut |dir| dirs.push(dir.to_path_buf()));
            // Visited parents first, so children are removed first in reverse. Busy ones are tried again.
            for dir in dirs.iter().rev() {
                std::fs::remove_dir(dir).ok();
            }
        }
        Ok(tops(name).is_empty())
    })
}

/// The directories named `name` right below each hierarchy, also in one that is mounted beside the others.
fn tops(name: &str) -> Vec<PathBuf> {
    let mut candidates = vec![Path::new(ROOT).join(name)];
    if let Ok(entries) = std::fs::read_dir(ROOT) {
        candidates.extend(entries.flatten().map(|entry| entry.path().join(name)));
    }
    candidates.retain(|dir| dir.symlink_metadata().is_ok_and(|meta| meta.is_dir()));
    // `cpu,cpuacct` is often reachable by symlinks too; one path to each is enough.
    let mut seen = Vec::new();
    candidates.retain(|dir| {
        let real = dir.canonicalize().unwrap_or_else(|_| dir.clone());
        let fresh = !seen.contains(&real);
        seen.push(real);
        fresh
    });
    candidates
}

fn visit(dir: &Path, each: &mut dyn FnMut(&Path)) {
    each(dir);
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), each);
        }
    }
}

/// A frozen process ignores even SIGKILL on v1.
fn thaw(name: &str) {
    let frozen = Path::new(ROOT).join("freezer").join(name);
    if frozen.is_dir() {
        visit(&frozen, &mut |dir| {
            std::fs::write(dir.join("freezer.state"), "THAWED").ok();
        });
    }
}

/// A v1 cpuset starts empty and then takes no process.
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<(), HostError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (from, to) = (parent.join(file), child.join(file));
        let Ok(value) = std::fs::read_to_string(&from) else { continue };
        if at(&to, std::fs::read_to_string(&to))?.trim().is_empty() {
            at(&to, std::fs::write(&to, value.trim()))?;
        }
    }
    Ok(())
}

fn is_v2(hierarchy: &Path) -> bool {
    hierarchy.join("cgroup.controllers").exists()
}

fn enable_controllers(parent: &Path) -> Result<(), HostError> {
    let path = parent.join("cgroup.controllers");
    let offered = at(&path, std::fs::read_to_string(&path))?;
    let control = parent.join("cgroup.subtree_control");
    for controller in offered.split_whitespace() {
        at(&control, std::fs::write(&control, format!("+{controller}")))?;
    }
    Ok(())
}

fn below(path: &str, name: &str) -> bool {
    path.trim_start_matches('/').split('/').next() == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_only_begins_alike_is_not_ours() {
        assert!(below("/lamina0-n1/system", "lamina0-n1"));
        assert!(below("/lamina0-n1", "lamina0-n1"));
        assert!(!below("/lamina0-n10/system", "lamina0-n1"));
        assert!(!below("/other/lamina0-n1", "lamina0-n1"));
        assert!(!below("/", "lamina0-n1"));
    }

    #[test]
    fn no_process_is_found_in_a_cgroup_that_is_not_there() {
        assert_eq!(pids("lamina-no-such-cgroup"), Vec::<i32>::new());
        assert_eq!(kill_all("lamina-no-such-cgroup").map_err(|error| error.to_string()), Ok(()));
        assert_eq!(remove("lamina-no-such-cgroup").map_err(|error| error.to_string()), Ok(()));
    }
}
