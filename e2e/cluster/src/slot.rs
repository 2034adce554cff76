//! Which of the machine's clusters one is, and the machine-wide settings that all of them share.
//!
//! A slot is claimed by creating a file in `/run/lamina-clusters` that holds the state directory; a file system gives it to one
//! claimant only. `/run` is empty after a reboot, as are namespaces and cgroups, so a stale claim cannot outlive what
//! it stands for.
//!
//! Invariant: the machine's state is saved before the first cluster makes anything, and restored when the last claim goes.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use crate::host::{HostError, at, mounts_below};

/// Clusters that one machine may run at once: their pod addresses are 10.244.0.0/16 downwards.
pub const MAX_SLOTS: u8 = 8;

const CLAIMS: &str = "/run/lamina-clusters";

/// What the kubelet writes machine-wide.
const SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Why no slot could be had.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All slots are taken by other state directories.
    #[error("{MAX_SLOTS} clusters are up on this machine already (see {CLAIMS}): take one down")]
    AllTaken,
    /// A file could not be read or written.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// The slot that `dir` holds, if any.
///
/// # Errors
/// The claims cannot be read.
pub fn held_by(dir: &Path) -> Result<Option<u8>, HostError> {
    for slot in 0..MAX_SLOTS {
        match std::fs::read_to_string(claim(slot)) {
            Ok(owner) if Path::new(&owner) == dir => return Ok(Some(slot)),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(source) => return Err(HostError::File { path: claim(slot), source }),
        }
    }
    Ok(None)
}

/// The slot that `dir` holds, or a free one claimed for it; saves the machine's state for the first claimant.
///
/// # Errors
/// All slots are taken, or files cannot be written.
pub fn take(dir: &Path) -> Result<u8, SlotError> {
    let claims = Path::new(CLAIMS);
    at(claims, std::fs::create_dir_all(claims))?;
    save_machine()?;
    if let Some(slot) = held_by(dir)? {
        return Ok(slot);
    }
    for slot in 0..MAX_SLOTS {
        match std::fs::OpenOptions::new().write(true).create_new(true).open(claim(slot)) {
            Ok(mut file) => {
                at(&claim(slot), file.write_all(dir.as_os_str().as_encoded_bytes()))?;
                return Ok(slot);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(HostError::File { path: claim(slot), source }.into()),
        }
    }
    Err(SlotError::AllTaken)
}

/// Gives the slot back; the last one restores the machine's state and removes the folder of claims.
///
/// # Errors
/// Files cannot be read or removed; a sysctl cannot be written.
pub fn give_back(slot: u8) -> Result<(), HostError> {
    match std::fs::remove_file(claim(slot)) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            return Err(HostError::File { path: claim(slot), source });
        }
        _ => {}
    }
    if (0..MAX_SLOTS).any(|other| claim(other).exists()) || !Path::new(CLAIMS).exists() {
        return Ok(());
    }
    restore_machine()?;
    at(Path::new(CLAIMS), std::fs::remove_dir_all(CLAIMS))
}

fn claim(slot: u8) -> PathBuf {
    Path::new(CLAIMS).join(format!("slot{slot}"))
}

fn saved() -> PathBuf {
    Path::new(CLAIMS).join("machine.json")
}

/// What clusters change machine-wide, as it was before.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Machine {
    sysctls: BTreeMap<String, String>,
    /// `ip netns add` makes this folder a mount point, and nobody undoes it.
    namespaces_mounted: bool,
}

const NAMESPACES: &str = "/run/netns";

fn save_machine() -> Result<(), HostError> {
    if saved().exists() {
        return Ok(());
    }
    let value = |name: &str| std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok();
    let machine = Machine {
        sysctls: SYSCTLS.into_iter().filter_map(|name| Some((name.to_owned(), value(name)?))).collect(),
        namespaces_mounted: namespaces_mounted()?,
    };
    let text = serde_json::to_string_pretty(&machine).expect("texts are JSON");
    // Written aside and renamed: a half-written file would later be restored.
    let part = saved().with_extension("part");
    at(&part, std::fs::write(&part, text))?;
    at(&saved(), std::fs::rename(&part, saved()))
}

fn restore_machine() -> Result<(), HostError> {
    let Ok(text) = std::fs::read_to_string(saved()) else { return Ok(()) };
    let machine: Machine = match serde_json::from_str(&text) {
        Ok(machine) => machine,
        Err(error) => return Err(HostError::File { path: saved(), source: error.into() }),
    };
    for (name, value) in machine.sysctls {
        let path = Path::new("/proc/sys").join(name);
        let now = at(&path, std::fs::read_to_string(&path))?;
        if now != value {
            at(&path, std::fs::write(&path, value))?;
        }
    }
    if machine.namespaces_mounted || !namespaces_mounted()? {
        return Ok(());
    }
    let folder = Path::new(NAMESPACES);
    let empty = at(folder, std::fs::read_dir(folder))?.next().is_none();
    // Someone else's namespace keeps it.
    if empty { at(folder, unmount(folder, UnmountFlags::empty()).map_err(Into::into)) } else { Ok(()) }
}

fn namespaces_mounted() -> Result<bool, HostError> {
    Ok(mounts_below(Path::new(NAMESPACES))?.iter().any(|point| point == Path::new(NAMESPACES)))
}
