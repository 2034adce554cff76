//! A real Kubernetes on one Linux machine, for tests and the demo: etcd, kube-apiserver, controller manager and scheduler in one
//! network namespace, and per node a network and mount namespace with containerd, runc and a kubelet. No systemd, no registry,
//! no internet.
//!
//! Invariants:
//! - Everything that a cluster starts or makes carries its slot number (`lamina<slot>-…`): network namespaces, cgroups,
//!   interfaces. [`Cluster::down`] finds what to end by these names, never by program name, so it also works after a crash of
//!   [`Cluster::up`] and never touches what the cluster did not start.
//! - A node writes only below the state directory: its `/var/lib`, `/var/log` and `/run` are its own.
//! - Machine-wide settings that the kubelet changes are saved before the first node starts and restored by the last cluster that
//!   goes down.
//!
//! Absent on purpose: kube-proxy and DNS (pods reach the API at 10.96.0.1, each other by pod address), network policies,
//! host ports, a container registry.
//!
//! ```no_run
//! use lamina_cluster::{Cluster, Layout, Tools};
//! let tools = Tools::find()?;
//! let cluster = Cluster::up(Layout::default_dir()?, &tools, 2, &|line| println!("{line}"))?;
//! cluster.kubectl(&["get", "nodes"])?;
//! Cluster::down(cluster.dir(), &|line| println!("{line}"))?;
//! # Ok::<(), lamina_cluster::ClusterError>(())
//! ```

pub mod certificates;
pub mod cgroup;
pub mod cluster;
pub mod control_plane;
pub mod down;
pub mod fuse;
pub mod host;
pub mod image;
pub mod layout;
pub mod left;
pub mod loops;
pub mod network;
pub mod node;
pub mod process;
pub mod slot;

pub use cluster::{Cluster, ClusterError};
pub use layout::{Layout, NodeId, Place, Tools};
