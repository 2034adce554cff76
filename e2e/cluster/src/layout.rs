//! Where everything of a cluster is: folders below the state directory, names that carry the slot, addresses, programs.
//!
//! Invariant: names and addresses follow from (state directory, slot, node number) alone, so that `down` can compute them again
//! after a crash. Nothing here touches the machine except [`Tools::find`].

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Nodes that a cluster may have: their addresses are 10.89.slot.10 + number, and memory ends the fun long before.
pub const MAX_NODES: u8 = 20;

/// Folders that a node has as its own, so neither the state directory nor the tools may lie there.
pub const NODE_OWN: [&str; 3] = ["/run", "/var/lib", "/var/log"];

/// A node by its number, 1 to [`MAX_NODES`]; shown as `n1`, which is also its Kubernetes name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u8);

impl NodeId {
    /// The nodes 1 to `count`.
    pub fn first(count: u8) -> impl Iterator<Item = Self> + Clone {
        (1..=count).map(Self)
    }

    /// 1 to [`MAX_NODES`].
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// What was given as a node is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a node is written n1 … n{MAX_NODES}")]
pub struct NotANode;

impl FromStr for NodeId {
    type Err = NotANode;

    fn from_str(text: &str) -> Result<Self, NotANode> {
        let number: u8 = text.strip_prefix('n').and_then(|n| n.parse().ok()).ok_or(NotANode)?;
        if (1..=MAX_NODES).contains(&number) { Ok(Self(number)) } else { Err(NotANode) }
    }
}

/// One of the places where a cluster runs processes; each has a network namespace and a cgroup of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// etcd, API server, controller manager, scheduler; the bridge is here too.
    ControlPlane,
    /// containerd, the kubelet and the pods of one node.
    Node(NodeId),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ControlPlane => f.write_str("cp"),
            Self::Node(node) => node.fmt(f),
        }
    }
}

/// Names, paths and addresses of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The state directory, absolute.
    pub dir: PathBuf,
    /// Which of the machine's clusters this is; see [`crate::slot`].
    pub slot: u8,
    /// Number of nodes, 1 to [`MAX_NODES`].
    pub nodes: u8,
}

/// The usual state directory cannot be told.
#[derive(Debug, thiserror::Error)]
#[error("neither XDG_STATE_HOME nor HOME is set: give --dir")]
pub struct NoHome;

impl Layout {
    /// `$XDG_STATE_HOME/lamina/cluster` or `~/.local/state/lamina/cluster`.
    ///
    /// # Errors
    /// Neither variable is set.
    pub fn default_dir() -> Result<PathBuf, NoHome> {
        let base = std::env::var_os("XDG_STATE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
        base.map(|base| base.join("lamina/cluster")).ok_or(NoHome)
    }

    /// All nodes in order.
    pub fn node_ids(&self) -> impl Iterator<Item = NodeId> + Clone + use<> {
        NodeId::first(self.nodes)
    }

    /// The control plane and then all nodes.
    pub fn places(&self) -> impl Iterator<Item = Place> + use<> {
        std::iter::once(Place::ControlPlane).chain(self.node_ids().map(Place::Node))
    }

    /// Network namespace and cgroup of a place.
    #[must_use]
    pub fn name_of(&self, place: Place) -> String {
        format!("lamina{}-{place}", self.slot)
    }

    /// The folder of a place: configuration, logs, pid files, a node's own disk.
    #[must_use]
    pub fn place_dir(&self, place: Place) -> PathBuf {
        self.dir.join(place.to_string())
    }

    /// A node's disk: what is `/var/lib` and so on inside the node.
    #[must_use]
    pub fn node_disk(&self, node: NodeId) -> PathBuf {
        self.place_dir(Place::Node(node)).join("disk")
    }

    /// Where a started process wrote its pid.
    #[must_use]
    pub fn pid_file(&self, place: Place, process: &str) -> PathBuf {
        self.place_dir(place).join("pids").join(process)
    }

    /// Where a process writes what it has to say.
    #[must_use]
    pub fn log_file(&self, place: Place, process: &str) -> PathBuf {
        self.place_dir(place).join("logs").join(format!("{process}.log"))
    }

    /// Certificates, keys and kubeconfigs.
    #[must_use]
    pub fn pki(&self) -> PathBuf {
        self.dir.join("pki")
    }

    /// The administrator's kubeconfig, usable from the machine itself.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.pki().join("admin.kubeconfig")
    }

    /// The control plane's address on the bridge.
    #[must_use]
    pub fn control_plane_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 89, self.slot, 1)
    }

    /// The machine's own address on the bridge.
    #[must_use]
    pub fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 89, self.slot, 254)
    }

    /// A node's address on the bridge.
    #[must_use]
    pub fn node_address(&self, node: NodeId) -> Ipv4Addr {
        Ipv4Addr::new(10, 89, self.slot, 10 + node.0)
    }

    /// Pod addresses of all nodes, a /16 in CIDR notation; apart for each slot, as the machine itself has a route there.
    #[must_use]
    pub fn all_pods(&self) -> String {
        format!("10.{}.0.0/16", 244 - self.slot)
    }

    /// Pod addresses of one node, a /24 in CIDR notation.
    #[must_use]
    pub fn pods_of(&self, node: NodeId) -> String {
        format!("10.{}.{}.0/24", 244 - self.slot, node.0)
    }

    /// URL of the API server for everyone but pods (who have 10.96.0.1).
    #[must_use]
    pub fn server_url(&self) -> String {
        format!("https://{}:443", self.control_plane_address())
    }

    /// The interface of the machine that leads to the bridge.
    #[must_use]
    pub fn host_interface(&self) -> String {
        format!("lam{}-host", self.slot)
    }
}

/// The programs that `build-tools.sh` built.
#[derive(Debug, Clone)]
pub struct Tools {
    dir: PathBuf,
}

/// The programs are not there.
#[derive(Debug, thiserror::Error)]
pub enum ToolsError {
    /// Some program is missing in the folder.
    #[error("{} is missing in {}: run {}", missing.join(", "), dir.display(), BUILD_TOOLS)]
    Missing {
        /// Which programs.
        missing: Vec<&'static str>,
        /// Where they were looked for.
        dir: PathBuf,
    },
    /// There is no cache folder to look in.
    #[error("none of LAMINA_CACHE, XDG_CACHE_HOME and HOME is set, so the built programs cannot be found")]
    NoCache,
}

/// The script that builds the programs.
pub const BUILD_TOOLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/build-tools.sh");

const NEEDED: [&str; 12] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kubectl",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "bridge",
    "host-local",
];

impl Tools {
    /// Looks in `$LAMINA_CACHE/cluster-tools/bin`, with the defaults of `build-tools.sh`.
    ///
    /// # Errors
    /// No cache folder is known, or a program is missing there.
    pub fn find() -> Result<Self, ToolsError> {
        Self::in_dir(cache_dir().ok_or(ToolsError::NoCache)?.join("cluster-tools/bin"))
    }

    /// Takes the programs from a folder.
    ///
    /// # Errors
    /// A program is missing there.
    pub fn in_dir(dir: PathBuf) -> Result<Self, ToolsError> {
        let missing: Vec<_> = NEEDED.into_iter().filter(|name| !dir.join(name).exists()).collect();
        if missing.is_empty() { Ok(Self { dir }) } else { Err(ToolsError::Missing { missing, dir }) }
    }

    /// The folder with all programs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of one program, as text for a command line.
    #[must_use]
    pub fn path(&self, program: &str) -> String {
        self.dir.join(program).display().to_string()
    }
}

/// Where built programs, Debian packages and images are kept between runs.
#[must_use]
pub fn cache_dir() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("LAMINA_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|dir| dir.join("lamina")))
        .or_else(|| named("HOME").map(|dir| dir.join(".cache/lamina")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_reads_back_and_nothing_else_is_one() {
        for node in NodeId::first(MAX_NODES) {
            assert_eq!(node.to_string().parse(), Ok(node));
        }
        for text in ["", "n", "n0", "n21", "1", "n-1", "n256", "node1"] {
            assert_eq!(text.parse::<NodeId>(), Err(NotANode), "{text}");
        }
    }

    #[test]
    fn two_slots_share_no_name_and_no_address() {
        let one = Layout { dir: "/a".into(), slot: 0, nodes: MAX_NODES };
        let two = Layout { slot: 1, ..one.clone() };
        for (left, right) in one.places().zip(two.places()) {
            assert_ne!(one.name_of(left), two.name_of(right));
        }
        for node in one.node_ids() {
            assert_ne!(one.node_address(node), two.node_address(node));
            assert_ne!(one.pods_of(node), two.pods_of(node));
        }
        assert_ne!(one.all_pods(), two.all_pods());
    }

    #[test]
    fn missing_programs_are_named_with_the_script_that_builds_them() {
        let empty = tempfile::tempdir().unwrap();
        let text = Tools::in_dir(empty.path().to_path_buf()).unwrap_err().to_string();
        assert!(text.contains("kubelet") && text.contains("build-tools.sh"), "{text}");
    }
}
