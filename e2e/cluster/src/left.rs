//! What of a cluster is still on the machine: asked after its removal, which has failed if there is anything.
//!
//! Invariant: found by the slot's names and the state directory alone, as [`crate::down`] finds what to remove, but by other
//! means where there are any: a process by its command line, not only by its cgroup.

use std::path::Path;

use crate::cgroup;
use crate::host::{HostError, mounts_below, run};
use crate::layout::{Layout, Tools};
use crate::network;

/// Everything that is left, a line each; loop devices are [`crate::down`]'s to name, as only their mounts tell whose they are.
///
/// # Errors
/// Mounts, namespaces or interfaces cannot be listed.
pub fn find(layout: &Layout) -> Result<Vec<String>, HostError> {
    let mut left: Vec<String> = Vec::new();
    for name in layout.places().map(|place| layout.name_of(place)) {
        let pids = cgroup::pids(&name);
        left.extend((!pids.is_empty()).then(|| format!("processes {pids:?} in the cgroup {name}")));
        left.extend(cgroup::exists(&name).then(|| format!("the cgroup {name}")));
    }
    left.extend(network::namespaces_of(layout.slot)?.iter().map(|name| format!("the network namespace {name}")));
    let links = run(&["ip", "-o", "link", "show"])?;
    let interface = layout.host_interface();
    left.extend(links.contains(&format!(" {interface}@")).then(|| format!("the network interface {interface}")));
    let mounts = mounts_below(&layout.dir)?;
    left.extend(
        mounts.iter().filter(|point| **point != layout.dir).map(|point| format!("a mount at {}", point.display())),
    );
    left.extend(programs_of(layout));
    let files = layout.places().map(|place| layout.place_dir(place)).chain([layout.pki()]);
    left.extend(files.filter(|path| path.exists()).map(|path| format!("files in {}", path.display())));
    Ok(left)
}

/// Programs of Kubernetes that name the state directory, such as a `kubectl exec` that nobody ended.
fn programs_of(layout: &Layout) -> Vec<String> {
    let Ok(tools) = Tools::find() else { return Vec::new() };
    let tools = tools.dir().canonicalize().ok().and_then(|dir| Some(dir.parent()?.to_path_buf()));
    let (Some(tools), Ok(entries)) = (tools, std::fs::read_dir("/proc")) else { return Vec::new() };
    let dir = format!("{}/", layout.dir.display());
    let names_it = |process: &Path| {
        let program = std::fs::read_link(process.join("exe")).ok()?;
        let words = String::from_utf8_lossy(&std::fs::read(process.join("cmdline")).ok()?).replace('\0', " ");
        (program.starts_with(&tools) && words.contains(&dir)).then_some(words)
    };
    let found = entries.flatten().filter_map(|entry| Some((entry.file_name(), names_it(&entry.path())?)));
    found.map(|(pid, words)| format!("the process {} ({})", pid.display(), words.trim_end())).collect()
}
