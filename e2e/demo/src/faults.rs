//! Blows: a storage server killed with SIGKILL while it holds a copy that was just written.
//!
//! Invariant: a server is killed only if the committed map names an `Active` copy of the volume on it and its process
//! wrote to its device within the second before; both are shown. What the kernel counts (`write_bytes` of the process)
//! is believed, not what the server says of itself.

use std::time::{Duration, Instant};

use lamina_cluster::{Cluster, NodeId};

use crate::kube::{self, KubeError, NAMESPACE};
use crate::objects::Pod;

/// Between the two looks at what a process has written.
const LOOK: Duration = Duration::from_millis(400);
/// Longest time from the first look to the blow.
const FRESH: Duration = Duration::from_secs(1);

/// The taint that keeps a server away from a node of somebody else's cluster.
const AWAY: &str = "lamina.dev/demo-away";

/// Why no blow was struck.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// The API server or a pod.
    #[error(transparent)]
    Kube(#[from] KubeError),
    /// A node or signal.
    #[error(transparent)]
    Cluster(#[from] lamina_cluster::ClusterError),
    /// See the text.
    #[error("no server with an Active copy wrote anything within a second: is there no load?")]
    Idle,
}

/// A server that may be killed.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its node.
    pub node: String,
    /// Its id in maps.
    pub server: String,
    /// Its pod.
    pub pod: Pod,
    /// Its processes; none are known on a cluster of somebody else.
    pub pids: Vec<i32>,
    /// `copy … of group …`, all Active.
    pub copies: Vec<String>,
}

/// What was done.
#[derive(Debug, Clone)]
pub struct Blow {
    /// To whom.
    pub target: Target,
    /// Bytes that its process wrote just before.
    pub wrote_bytes: u64,
    /// Within this time before the blow.
    pub within: Duration,
}

/// The servers that hold an Active copy of a volume, those of `spare` last.
///
/// # Errors
/// kubectl fails.
pub fn targets(cluster: &Cluster, volume: &str, spare: &[String]) -> Result<Vec<Target>, FaultError> {
    let volume = kube::volume(cluster, volume)?;
    let mut found = Vec::new();
    for server in kube::servers(cluster)? {
        let node = server.metadata.name.clone();
        let members = volume.members_on(&server.status.server_id).filter(|(_, member)| member.state == "Active");
        let copies: Vec<String> = members
            .map(|(group, member)| format!("{} of group {group}", &member.copy[..8.min(member.copy.len())]))
            .collect();
        if copies.is_empty() {
            continue;
        }
        let pod = kube::storage_pod(cluster, &server.metadata.name)?;
        let pids = if cluster.is_own() { kube::processes(cluster, &pod)? } else { Vec::new() };
        found.push(Target { node, server: server.status.server_id, pod, pids, copies });
    }
    found.sort_by_key(|target| spare.contains(&target.node));
    Ok(found)
}

/// Kills a server of a volume that has just written, if possible on none of the nodes in `spare`. With `freeze`, its
/// kubelet is stopped first, so that nothing starts the container again until [`thaw`].
///
/// On a cluster of somebody else nobody can look at processes or signal them: there the pod of any server with an Active
/// copy is taken away by force, and with `freeze` its node is tainted, so that none comes in its place.
///
/// # Errors
/// None of them writes.
pub fn strike(cluster: &Cluster, volume: &str, spare: &[String], freeze: bool) -> Result<Blow, FaultError> {
    if !cluster.is_own() {
        return take_away(
            cluster,
            targets(cluster, volume, spare)?.into_iter().next().ok_or(FaultError::Idle)?,
            freeze,
        );
    }
    for _ in 0..10 {
        for target in targets(cluster, volume, spare)? {
            let first = Instant::now();
            let before = written(&target.pids);
            std::thread::sleep(LOOK);
            let wrote_bytes = written(&target.pids).saturating_sub(before);
            if wrote_bytes == 0 || first.elapsed() > FRESH {
                continue;
            }
            if freeze {
                cluster.signal(node_id(&target.node)?, "kubelet", "STOP")?;
            }
            kill(&target)?;
            return Ok(Blow { target, wrote_bytes, within: first.elapsed() });
        }
    }
    Err(FaultError::Idle)
}

fn take_away(cluster: &Cluster, target: Target, freeze: bool) -> Result<Blow, FaultError> {
    if freeze {
        cluster.kubectl(&["taint", "node", &target.node, &format!("{AWAY}=demo:NoSchedule"), "--overwrite"])?;
    }
    cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", &target.pod.metadata.name, "--force", "--grace-period=0"])?;
    Ok(Blow { target, wrote_bytes: 0, within: Duration::ZERO })
}

/// Undoes the `freeze` of [`strike`].
///
/// # Errors
/// The kubelet is gone, or kubectl fails.
pub fn thaw(cluster: &Cluster, node: &str) -> Result<(), FaultError> {
    if cluster.is_own() {
        return Ok(cluster.signal(node_id(node)?, "kubelet", "CONT")?);
    }
    cluster.kubectl(&["taint", "node", node, &format!("{AWAY}-")])?;
    Ok(())
}

fn node_id(name: &str) -> Result<NodeId, FaultError> {
    name.parse().map_err(|_| KubeError::NotPlaced(name.to_owned()).into())
}

/// Whether none of a target's processes lives any more.
#[must_use]
pub fn is_dead(target: &Target) -> bool {
    target.pids.iter().all(|pid| status(*pid).is_none_or(|state| state == 'Z' || state == 'X'))
}

fn kill(target: &Target) -> Result<(), FaultError> {
    use lamina_cluster::process::{send, signal_number};
    let number = signal_number("KILL").map_err(lamina_cluster::ClusterError::from)?;
    for pid in &target.pids {
        send(&format!("{pid} of {}", target.pod.metadata.name), *pid, number)
            .map_err(lamina_cluster::ClusterError::from)?;
    }
    Ok(())
}

/// Bytes that processes caused to be written to block devices, as the kernel counts.
fn written(pids: &[i32]) -> u64 {
    let counts = pids.iter().filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/io")).ok());
    counts.filter_map(|text| write_bytes(&text)).sum()
}

fn write_bytes(io: &str) -> Option<u64> {
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.trim().parse().ok()
}

/// The state letter of a process; `None` if there is none.
fn status(pid: i32) -> Option<char> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_count_is_read() {
        let text = "rchar: 5\nwchar: 6\nsyscr: 1\nread_bytes: 7\nwrite_bytes: 4096\ncancelled_write_bytes: 0\n";
        assert_eq!(write_bytes(text), Some(4096));
        assert_eq!(write_bytes("rchar: 5\n"), None);
    }

    #[test]
    fn a_living_process_is_not_dead() {
        let own = std::process::id() as i32;
        assert!(status(own).is_some_and(|state| state == 'R' || state == 'S'));
        assert_eq!(status(i32::MAX), None);
    }
}
