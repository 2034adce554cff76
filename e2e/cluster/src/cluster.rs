//! A running cluster and what one can do to it: bring it up, look at it, cut cables, switch nodes off and on.
//!
//! `cluster.json` in the state directory holds slot and number of nodes. It is written before anything is made, so that
//! [`Cluster::down`] knows what to look for whenever `up` stops.
//!
//! Invariant: every step of `up` checks for what is there already, so a second `up` only mends what is missing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::certificates::{self, CertificateError};
use crate::cgroup;
use crate::control_plane;
use crate::down;
use crate::host::{HostError, at, run, run_with_input, write};
use crate::image::{self, ImageError};
use crate::layout::{Layout, MAX_NODES, NODE_OWN, NoHome, NodeId, Place, Tools, ToolsError};
use crate::network;
use crate::node;
use crate::process::{self, HOLDER, ProcessError};
use crate::slot::{self, SlotError};

/// Why a cluster cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Namespaces, mounts and cgroups need root.
    #[error("a cluster needs root (network namespaces, mounts, cgroups)")]
    NotRoot,
    /// The state directory would be hidden from the nodes.
    #[error("{0} lies below /run, /var/lib or /var/log, which every node has as its own: choose another folder")]
    Hidden(PathBuf),
    /// Another number of nodes than the cluster that is up.
    #[error("the cluster in {dir} has {has} nodes, not {wanted}: run `lamina-cluster down` first", dir = dir.display())]
    OtherSize {
        /// State directory.
        dir: PathBuf,
        /// Its nodes.
        has: u8,
        /// What was asked for.
        wanted: u8,
    },
    /// A number of nodes that cannot be.
    #[error("1 to {MAX_NODES} nodes are possible, not {0}")]
    NodeCount(u8),
    /// No cluster in this state directory.
    #[error("no cluster in {0}: run `lamina-cluster up`")]
    None(PathBuf),
    /// Its state file is not one.
    #[error("{0} is not a cluster's state: {1}")]
    State(PathBuf, serde_json::Error),
    /// The pod is not yet on a node of the cluster.
    #[error("the pod is not on a node yet")]
    NotPlaced,
    /// Another program works on this cluster.
    #[error("another lamina-cluster is at work on {0}: try again when it has ended")]
    Busy(PathBuf),
    /// The cluster has no such node.
    #[error("the cluster has no node {0}")]
    NoSuchNode(NodeId),
    /// Something of the cluster could not be removed; a second `down` tries again.
    #[error("not everything could be removed (try again): {}", .0.join("; "))]
    Left(Vec<String>),
    /// See [`NoHome`].
    #[error(transparent)]
    NoHome(#[from] NoHome),
    /// See [`ToolsError`].
    #[error(transparent)]
    Tools(#[from] ToolsError),
    /// See [`SlotError`].
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// See [`CertificateError`].
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// See [`ImageError`].
    #[error(transparent)]
    Image(#[from] ImageError),
    /// See [`ProcessError`].
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// See [`HostError`].
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Where progress is told, a line at a time.
pub type Progress<'a> = &'a dyn Fn(&str);

/// A cluster that `up` has made.
#[derive(Debug, Clone)]
pub struct Cluster {
    layout: Layout,
    tools: Tools,
    /// Of somebody else's cluster: it has no node of ours, so all that needs its machine answers that there is none.
    foreign: Option<PathBuf>,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct State {
    slot: u8,
    nodes: u8,
}

impl Cluster {
    /// Brings the cluster of this state directory up, or mends it: returns when all nodes are Ready.
    ///
    /// # Errors
    /// Not root, no programs, no slot, or any step fails; what was made so far stays for [`Cluster::down`].
    pub fn up(dir: PathBuf, tools: &Tools, nodes: u8, progress: Progress<'_>) -> Result<Self, ClusterError> {
        let _alone = alone(&dir)?;
        let layout = prepare(dir, tools, nodes)?;
        let cluster = Self { layout, tools: tools.clone(), foreign: None };
        let layout = &cluster.layout;
        step(progress, "certificates and network", || {
            certificates::make(layout)?;
            Ok(network::make(layout)?)
        })?;
        step(progress, "control plane (etcd, API server, controller manager, scheduler)", || {
            cgroup::make(&layout.name_of(Place::ControlPlane))?;
            Ok(control_plane::start(layout, tools)?)
        })?;
        let images = step(progress, "pause and busybox images", || {
            Ok([image::pause().build_cached()?, image::busybox().build_cached()?])
        })?;
        let mut stale = control_plane::heartbeats(layout, tools)?;
        stale.retain(|name, _| name.parse().is_ok_and(|node| !cluster.is_on(node)));
        for id in layout.node_ids() {
            step(progress, &format!("node {id} (containerd, kubelet)"), || cluster.start_node(id, &images))?;
        }
        step(progress, "nodes Ready", || {
            control_plane::await_nodes(layout, tools, &stale)?;
            Ok(control_plane::await_service_account(layout, tools)?)
        })?;
        Ok(cluster)
    }

    /// The cluster that is in this state directory, whatever its health.
    ///
    /// # Errors
    /// There is none, its state file is broken, or the programs are missing.
    pub fn open(dir: &Path) -> Result<Self, ClusterError> {
        let dir = dir.canonicalize().map_err(|_| ClusterError::None(dir.to_path_buf()))?;
        let state = read_state(&dir)?.ok_or_else(|| ClusterError::None(dir.clone()))?;
        let layout = Layout { dir, slot: state.slot, nodes: state.nodes };
        Ok(Self { layout, tools: Tools::find()?, foreign: None })
    }

    /// A cluster that somebody else runs, through a kubeconfig; files of the caller go into `dir`. [`Cluster::kubectl`] and
    /// [`Cluster::apply`] work as on an own one; there is no machine to cut, signal or import images into.
    #[must_use]
    pub fn existing(kubeconfig: PathBuf, dir: PathBuf, tools: Tools) -> Self {
        Self { layout: Layout { dir, slot: 0, nodes: 0 }, tools, foreign: Some(kubeconfig) }
    }

    /// Whether `up` made it, on this machine.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.foreign.is_none()
    }

    /// Removes everything that the cluster of this state directory has made, also after a crash, and looks that nothing of it is
    /// left: processes, mounts, loop devices, namespaces, interfaces, cgroups, files. No cluster is no error.
    ///
    /// # Errors
    /// Something could not be removed; the rest is gone all the same.
    pub fn down(dir: &Path, progress: Progress<'_>) -> Result<(), ClusterError> {
        // The folder may have been removed by hand: the claim still names it.
        let there = dir.canonicalize();
        let dir = match &there {
            Ok(dir) => dir.clone(),
            Err(_) => at(dir, std::path::absolute(dir))?,
        };
        let held = slot::held_by(&dir)?;
        if there.is_err() && held.is_none() {
            return Ok(());
        }
        let _alone = alone(&dir)?;
        // A state file that a crash left broken still leaves the claim, and nodes are found by their cgroups.
        let state = read_state(&dir).unwrap_or_default();
        let Some(slot) = held.or(state.map(|state| state.slot)) else {
            return Ok(());
        };
        step(progress, "removing the cluster", || down::remove(&dir, slot).map_err(ClusterError::Left))
    }

    /// The state directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.layout.dir
    }

    /// Names, paths and addresses.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its programs.
    #[must_use]
    pub fn tools(&self) -> &Tools {
        &self.tools
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.foreign.clone().unwrap_or_else(|| self.layout.kubeconfig())
    }

    /// Runs kubectl as administrator and returns what it printed.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn kubectl(&self, args: &[&str]) -> Result<String, ClusterError> {
        Ok(run(&self.kubectl_words(args))?)
    }

    /// `kubectl apply` of a manifest given as text.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn apply(&self, manifest: &str) -> Result<String, ClusterError> {
        Ok(run_with_input(&self.kubectl_words(&["apply", "-f", "-"]), manifest.as_bytes())?)
    }

    /// Program and arguments of kubectl as administrator.
    #[must_use]
    pub fn kubectl_words(&self, args: &[&str]) -> Vec<String> {
        let config = format!("--kubeconfig={}", self.kubeconfig().display());
        [self.tools.path("kubectl"), config].into_iter().chain(args.iter().map(ToString::to_string)).collect()
    }

    /// Takes an image (OCI tar) into all nodes that are on.
    ///
    /// # Errors
    /// containerd refuses the file.
    pub fn import_image(&self, tar: &Path) -> Result<(), ClusterError> {
        let tar = at(tar, tar.canonicalize())?;
        let on = self.layout.node_ids().filter(|node| self.is_on(*node));
        // Side by side: each node unpacks a copy of its own.
        std::thread::scope(|scope| {
            let (layout, tools, tar) = (&self.layout, &self.tools, &tar);
            let imports: Vec<_> =
                on.map(|node| scope.spawn(move || node::import_image(layout, tools, node, tar))).collect();
            imports.into_iter().try_for_each(|import| import.join().expect("the import does not panic"))
        })?;
        Ok(())
    }

    /// Cuts these nodes off from everyone but each other.
    ///
    /// # Errors
    /// No such node, or the network is not there.
    pub fn cut(&self, nodes: &[NodeId]) -> Result<(), ClusterError> {
        self.know(nodes)?;
        Ok(network::cut(&self.layout, nodes)?)
    }

    /// Undoes [`Cluster::cut`]; without nodes, for all that are cut off and on.
    ///
    /// # Errors
    /// No such node, or the network is not there.
    pub fn heal(&self, nodes: &[NodeId]) -> Result<(), ClusterError> {
        self.know(nodes)?;
        let all = network::cut_off(&self.layout)?;
        let chosen: Vec<NodeId> = all.into_iter().filter(|node| nodes.is_empty() || nodes.contains(node)).collect();
        let on: Vec<NodeId> = chosen.into_iter().filter(|node| self.is_on(*node)).collect();
        Ok(network::heal(&self.layout, &on)?)
    }

    /// Switches a node off as a power cut does: silent at once, all its processes gone, its disk kept.
    ///
    /// # Errors
    /// No such node, or something cannot be ended.
    pub fn kill_node(&self, node: NodeId) -> Result<(), ClusterError> {
        self.know(&[node])?;
        Ok(node::power_off(&self.layout, node)?)
    }

    /// Switches a node on again and waits until it is Ready. A node that is on is switched off first.
    ///
    /// # Errors
    /// No such node, or it does not come up.
    pub fn restart_node(&self, node: NodeId, progress: Progress<'_>) -> Result<(), ClusterError> {
        self.kill_node(node)?;
        let mut stale = control_plane::heartbeats(&self.layout, &self.tools)?;
        stale.retain(|name, _| *name == node.to_string());
        network::heal(&self.layout, &[node])?;
        step(progress, &format!("node {node} (containerd, kubelet)"), || self.start_node(node, &[]))?;
        step(progress, "node Ready", || Ok(control_plane::await_nodes(&self.layout, &self.tools, &stale)?))
    }

    /// Sends STOP, CONT, TERM or KILL to `containerd` or `kubelet` of a node.
    ///
    /// # Errors
    /// No such node or signal, or the daemon does not run.
    pub fn signal(&self, node: NodeId, daemon: &str, signal: &str) -> Result<(), ClusterError> {
        self.know(&[node])?;
        Ok(process::signal(&self.layout, Place::Node(node), daemon, signal)?)
    }

    /// Sends STOP, CONT, TERM or KILL to all processes of a pod's containers, past Kubernetes; returns how many there were.
    ///
    /// # Errors
    /// No such pod or signal, or the API server does not answer.
    pub fn signal_pod(&self, namespace: &str, pod: &str, signal: &str) -> Result<usize, ClusterError> {
        let path = r#"jsonpath={.spec.nodeName}{range .status.containerStatuses[*]} {.containerID}{end}"#;
        let seen = self.kubectl(&["-n", namespace, "get", "pod", pod, "-o", path])?;
        let mut words = seen.split_whitespace();
        let node: NodeId = words.next().and_then(|name| name.parse().ok()).ok_or(ClusterError::NotPlaced)?;
        let containers: Vec<&str> = words.filter_map(|id| id.strip_prefix("containerd://")).collect();
        let signal = process::signal_number(signal)?;
        let pids: Vec<i32> = self.pids_of(node).into_iter().filter(|pid| cgroup::in_any(*pid, &containers)).collect();
        for pid in &pids {
            process::send(&format!("{pid} of {pod}"), *pid, signal)?;
        }
        Ok(pids.len())
    }

    /// Runs a program in a node's namespaces and returns what it printed.
    ///
    /// # Errors
    /// No such node, it is off, or the program fails.
    pub fn run_in_node(&self, node: NodeId, argv: &[&str]) -> Result<String, ClusterError> {
        self.know(&[node])?;
        Ok(process::run_in_node(&self.layout, node, argv)?)
    }

    /// The processes of a node, pods included.
    #[must_use]
    pub fn pids_of(&self, node: NodeId) -> Vec<i32> {
        cgroup::pids(&self.layout.name_of(Place::Node(node)))
    }

    /// A table for people: every place with its daemons, memory and network.
    ///
    /// # Errors
    /// The network namespaces are not there.
    pub fn status(&self) -> Result<String, ClusterError> {
        let layout = &self.layout;
        let cut = network::cut_off(layout)?;
        let mut text = format!("{:<6} {:<14} {:>10}  {:<8} daemons\n", "place", "address", "memory", "network");
        for place in layout.places() {
            let (address, daemons, joined) = match place {
                Place::ControlPlane => (layout.control_plane_address(), control_plane::DAEMONS.as_slice(), true),
                Place::Node(node) => (layout.node_address(node), node::DAEMONS.as_slice(), !cut.contains(&node)),
            };
            let memory = cgroup::memory_bytes(&layout.name_of(place)).unwrap_or(0) >> 20;
            let daemons: Vec<String> = daemons
                .iter()
                .map(|name| match process::pid_of(layout, place, name) {
                    Some(pid) => format!("{name}={pid}"),
                    None => format!("{name}=down"),
                })
                .collect();
            let network = if joined { "joined" } else { "cut off" };
            text += &format!(
                "{:<6} {:<14} {memory:>6} MiB  {network:<8} {}\n",
                place.to_string(),
                address.to_string(),
                daemons.join(" ")
            );
        }
        Ok(text)
    }

    fn start_node(&self, node: NodeId, images: &[PathBuf]) -> Result<(), ClusterError> {
        if !self.is_on(node) {
            node::forget_boot(&self.layout, node)?;
        }
        node::start_runtime(&self.layout, &self.tools, node)?;
        for tar in images {
            node::import_image(&self.layout, &self.tools, node, tar)?;
        }
        Ok(node::start_kubelet(&self.layout, &self.tools, node)?)
    }

    fn is_on(&self, node: NodeId) -> bool {
        process::pid_of(&self.layout, Place::Node(node), HOLDER).is_some()
    }

    fn know(&self, nodes: &[NodeId]) -> Result<(), ClusterError> {
        let unknown = nodes.iter().find(|node| node.number() > self.layout.nodes);
        unknown.map_or(Ok(()), |node| Err(ClusterError::NoSuchNode(*node)))
    }
}

/// Checks what can be checked, claims the slot and writes the state file.
fn prepare(dir: PathBuf, tools: &Tools, nodes: u8) -> Result<Layout, ClusterError> {
    if !rustix::process::geteuid().is_root() {
        return Err(ClusterError::NotRoot);
    }
    if !(1..=MAX_NODES).contains(&nodes) {
        return Err(ClusterError::NodeCount(nodes));
    }
    at(&dir, std::fs::create_dir_all(&dir))?;
    let dir = at(&dir, dir.canonicalize())?;
    let programs = at(tools.dir(), tools.dir().canonicalize())?;
    for path in [&dir, &programs] {
        if NODE_OWN.iter().any(|own| path.starts_with(own)) {
            return Err(ClusterError::Hidden(path.clone()));
        }
    }
    if let Some(state) = read_state(&dir)?.filter(|state| state.nodes != nodes) {
        return Err(ClusterError::OtherSize { dir, has: state.nodes, wanted: nodes });
    }
    let slot = slot::take(&dir)?;
    // Certificates hold addresses, which follow from the slot: after a reboot another cluster may have taken it.
    if read_state(&dir)?.is_some_and(|state| state.slot != slot) {
        let pki = dir.join("pki");
        at(&pki, std::fs::remove_dir_all(&pki))?;
    }
    let state = serde_json::to_string(&State { slot, nodes }).expect("two numbers are JSON");
    write(&state_file(&dir), &state)?;
    Ok(Layout { dir, slot, nodes })
}

/// Held while a cluster is brought up or down, on the state directory itself; the kernel lets go of it when the program ends.
fn alone(dir: &Path) -> Result<File, ClusterError> {
    at(dir, std::fs::create_dir_all(dir))?;
    let held = at(dir, File::open(dir))?;
    match flock(&held, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(held),
        Err(_) => Err(ClusterError::Busy(dir.to_path_buf())),
    }
}

fn state_file(dir: &Path) -> PathBuf {
    dir.join("cluster.json")
}

fn read_state(dir: &Path) -> Result<Option<State>, ClusterError> {
    let path = state_file(dir);
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| ClusterError::State(path, error))
}

/// Runs a step, telling when it begins and, if it took over 2 s, how long it took.
fn step<T>(
    progress: Progress<'_>,
    what: &str,
    work: impl FnOnce() -> Result<T, ClusterError>,
) -> Result<T, ClusterError> {
    let start = Instant::now();
    progress(what);
    let done = work()?;
    if start.elapsed() > Duration::from_secs(2) {
        progress(&format!("{what}: {:.1} s", start.elapsed().as_secs_f64()));
    }
    Ok(done)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn down_without_a_cluster_removes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "mine").unwrap();
        Cluster::down(dir.path(), &|_| {}).unwrap();
        Cluster::down(&dir.path().join("absent"), &|_| {}).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("precious")).unwrap(), "mine");
    }

    #[test]
    fn a_folder_without_state_is_no_cluster() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Cluster::open(dir.path()), Err(ClusterError::None(_))));
    }
}
