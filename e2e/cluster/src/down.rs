//! Removing a cluster, from its state directory and slot alone: `up` may have stopped anywhere, or the machine's memory of it
//! may be all that is left.
//!
//! Invariant: only what carries the slot's name, or lies in the state directory under a name that `up` gives, is removed. Every
//! part is tried, whatever the others say; then all is looked for once more ([`crate::left`]). The state file goes last, so that
//! a failed `down` can be repeated.

use std::path::Path;
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};

use crate::cgroup;
use crate::host::{HostError, at, mounts_below, wait_until};
use crate::layout::{Layout, MAX_NODES, NodeId, Place};
use crate::left;
use crate::network;
use crate::node;
use crate::slot;

/// For what goes by itself once the rest is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ends and removes everything.
///
/// # Errors
/// What could not be removed, in words.
pub fn remove(dir: &Path, slot: u8) -> Result<(), Vec<String>> {
    // All possible nodes: the number in the state file may be lost.
    let layout = Layout { dir: dir.to_path_buf(), slot, nodes: MAX_NODES };
    let mut left = Vec::new();
    let mut note = |result: Result<(), HostError>| {
        if let Err(error) = result {
            left.push(error.to_string());
        }
    };
    for node in NodeId::first(MAX_NODES) {
        note(node::end_all(&layout, node));
    }
    note(cgroup::kill_all(&layout.name_of(Place::ControlPlane)));
    note(network::remove(slot));
    for place in layout.places() {
        note(cgroup::remove(&layout.name_of(place)));
    }
    if left.is_empty() {
        // A device that stayed is found again by the files of its node.
        left.extend(remove_files(&layout).err().map(|error| error.to_string()));
    }
    left.extend(still_there(&layout));
    if left.is_empty()
        && let Err(error) = slot::give_back(slot)
    {
        left.push(error.to_string());
    }
    if left.is_empty() {
        note_last(dir, &mut left);
    }
    if left.is_empty() { Ok(()) } else { Err(left) }
}

/// What is left after a while: a program that lost its API server needs a moment to see it.
fn still_there(layout: &Layout) -> Vec<String> {
    let mut found = Ok(Vec::new());
    let gone = wait_until::<HostError>("everything to be gone", PATIENCE, || {
        found = left::find(layout);
        Ok(found.as_ref().is_ok_and(Vec::is_empty))
    });
    match (gone, found) {
        (Ok(()), _) => Vec::new(),
        (Err(_), Ok(found)) => found.into_iter().map(|what| format!("still there: {what}")).collect(),
        (Err(_), Err(error)) => vec![error.to_string()],
    }
}

/// Removes what `up` puts into the state directory, never through a mount point.
fn remove_files(layout: &Layout) -> Result<(), HostError> {
    for point in mounts_below(&layout.dir)?.iter().filter(|point| **point != layout.dir) {
        at(point, unmount(point.as_path(), UnmountFlags::DETACH).map_err(Into::into))?;
    }
    let places = layout.places().map(|place| layout.place_dir(place));
    for folder in places.chain([layout.pki(), layout.pki().with_extension("part")]) {
        if folder.exists() {
            at(&folder, std::fs::remove_dir_all(&folder))?;
        }
    }
    Ok(())
}

fn note_last(dir: &Path, left: &mut Vec<String>) {
    let file = dir.join("cluster.json");
    if file.exists()
        && let Err(error) = std::fs::remove_file(&file)
    {
        left.push(format!("{}: {error}", file.display()));
    }
    // Others' files in it keep the folder.
    std::fs::remove_dir(dir).ok();
}
