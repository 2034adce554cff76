//! One node: its disk, its mount namespace, containerd and the kubelet.
//!
//! The node has its own `/var/lib`, `/var/log` (folders of its disk) and `/run` (fresh at each start, as after a boot); the rest
//! of the file system, `/dev` too, is the machine's. The mounts of kubelet and pods live in the node's mount namespace and go
//! with its last process.
//!
//! Invariant: nothing of the machine's `/etc`, `/opt`, `/var`, `/run` is written by a node.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cgroup;
use crate::fuse;
use crate::host::{HostError, at, mounts_below, quote, run_with_file, wait_until, write};
use crate::image::PAUSE;
use crate::layout::{Layout, NodeId, Place, Tools};
use crate::loops;
use crate::network;
use crate::process::{self, Daemon, ProcessError};

/// Its daemons in the order of their start.
pub const DAEMONS: [&str; 2] = ["containerd", "kubelet"];

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// Starts what does not run of the node, up to a containerd that answers; the kubelet is not started.
///
/// # Errors
/// Files cannot be written, or a daemon does not start.
pub fn start_runtime(layout: &Layout, tools: &Tools, node: NodeId) -> Result<(), ProcessError> {
    let place = Place::Node(node);
    cgroup::make(&layout.name_of(place))?;
    write_configuration(layout, tools, node)?;
    process::start_holder(layout, tools, node, &prepare(layout, tools, node)?)?;
    let argv = vec![tools.path("containerd"), "--config".to_owned(), configuration(layout, node, "containerd.toml")];
    process::start(layout, tools, &Daemon { place, name: DAEMONS[0], argv })?;
    let ctr = tools.path("ctr");
    wait_until(&format!("containerd on {node} to answer"), Duration::from_secs(60), || {
        process::expect_alive(layout, place, DAEMONS[0])?;
        let ready = process::run_in_node(layout, node, &[&ctr, "--connect-timeout", "1s", "plugins", "ls", "id==cri"]);
        Ok(ready.is_ok())
    })
}

/// Starts the kubelet unless it runs.
///
/// # Errors
/// It does not start.
pub fn start_kubelet(layout: &Layout, tools: &Tools, node: NodeId) -> Result<(), ProcessError> {
    let argv = vec![
        tools.path("kubelet"),
        format!("--config={}", configuration(layout, node, "kubelet.json")),
        format!("--kubeconfig={}", layout.pki().join(format!("kubelet-{node}.kubeconfig")).display()),
        format!("--hostname-override={node}"),
        format!("--node-ip={}", layout.node_address(node)),
        format!("--node-labels=topology.kubernetes.io/zone={}", zone(node)),
        "--root-dir=/var/lib/kubelet".to_owned(),
        "--v=1".to_owned(),
    ];
    process::start(layout, tools, &Daemon { place: Place::Node(node), name: DAEMONS[1], argv })
}

/// The zone that the node's label names: a zone per node.
#[must_use]
pub fn zone(node: NodeId) -> String {
    format!("zone-{}", node.number())
}

/// Takes an image from an OCI tar into the node's containerd.
///
/// # Errors
/// The node is down or containerd refuses the file.
pub fn import_image(layout: &Layout, tools: &Tools, node: NodeId, tar: &Path) -> Result<(), ProcessError> {
    // Through a pipe: the node may not see the folder where the file is.
    let file = at(tar, File::open(tar))?;
    let enter = process::node_namespaces(layout, node)?;
    let ctr = tools.path("ctr");
    let words = [ctr.as_str(), "-n", "k8s.io", "images", "import", "--local", "-"];
    let argv: Vec<&str> = ["nsenter"].into_iter().chain(enter.iter().map(String::as_str)).chain(words).collect();
    run_with_file(&argv, file)?;
    Ok(())
}

/// A power cut: the network goes silent first, so that no dying process says good-bye; then everything is killed and the node's
/// loop devices, which the kernel keeps machine-wide, are detached. Its cgroups go too: a kubelet that finds those of dead pods
/// looks for each pod for 3 s before it is Ready.
///
/// # Errors
/// The cable is not there, or a process cannot be ended.
pub fn power_off(layout: &Layout, node: NodeId) -> Result<(), HostError> {
    network::cut(layout, &[node])?;
    end_all(layout, node)?;
    cgroup::remove(&layout.name_of(Place::Node(node)))
}

/// Kills all processes of the node and detaches its loop devices.
///
/// # Errors
/// A process cannot be ended or a device cannot be detached.
pub fn end_all(layout: &Layout, node: NodeId) -> Result<(), HostError> {
    let name = layout.name_of(Place::Node(node));
    let mut devices = loops::of_cgroup(&name)?;
    let connections = fuse::of_cgroup(&name)?;
    cgroup::kill(&name);
    fuse::abort(&connections, &layout.place_dir(Place::Node(node)).join("fusectl"))?;
    cgroup::kill_all(&name)?;
    devices.extend(loops::on_disk(&layout.node_disk(node))?);
    loops::detach(&devices)
}

/// Forgets what a reboot forgets: the pods' addresses.
///
/// # Errors
/// The disk cannot be written.
pub fn forget_boot(layout: &Layout, node: NodeId) -> Result<(), HostError> {
    let addresses = layout.node_disk(node).join("lib/cni");
    if addresses.exists() {
        at(&addresses, std::fs::remove_dir_all(&addresses))?;
    }
    Ok(())
}

/// What the holder does before it sleeps: the machine's mounts that the node has no use for go first, as this copy of them would
/// keep them busy; then the node gets its own folders.
fn prepare(layout: &Layout, tools: &Tools, node: NodeId) -> Result<String, HostError> {
    let disk = layout.node_disk(node);
    let quoted = |path: &Path| quote(&path.display().to_string());
    let programs = at(tools.dir(), tools.dir().canonicalize())?;
    let mut script = String::new();
    for point in foreign(&mounts_below(Path::new("/"))?, &[&layout.dir, &programs]) {
        // Gone or hidden under another already is as well.
        script += &format!("umount -l {} 2>/dev/null || true\n", quoted(&point));
    }
    script += &format!("mount --bind {} /var/lib\n", quoted(&disk.join("lib")));
    script += &format!("mount --bind {} /var/log\n", quoted(&disk.join("log")));
    script += "mount -t tmpfs -o mode=755 tmpfs /run\nmkdir -p /run/netns /run/lock /run/containerd\n";
    Ok(script + &format!("mount --make-rshared /\nhostname {node}"))
}

/// The mount points (deepest first) that hold no part of the system and none of the `needed` folders.
fn foreign(points: &[PathBuf], needed: &[&Path]) -> Vec<PathBuf> {
    const NO_SYSTEM: [&str; 9] = ["/home", "/media", "/mnt", "/root", "/run", "/snap", "/srv", "/tmp", "/var"];
    let no_system = |point: &Path| NO_SYSTEM.iter().any(|top| point.starts_with(top));
    let holds = |point: &Path| needed.iter().any(|folder| folder.starts_with(point));
    points.iter().filter(|point| no_system(point) && !holds(point)).cloned().collect()
}

fn configuration(layout: &Layout, node: NodeId, file: &str) -> String {
    layout.place_dir(Place::Node(node)).join("etc").join(file).display().to_string()
}

fn write_configuration(layout: &Layout, tools: &Tools, node: NodeId) -> Result<(), HostError> {
    let disk = layout.node_disk(node);
    for folder in ["lib/kubelet", "lib/containerd", "lib/cni", "log/pods", "log/containers"] {
        let path = disk.join(folder);
        at(&path, std::fs::create_dir_all(&path))?;
    }
    let etc = layout.place_dir(Place::Node(node)).join("etc");
    let network = pretty(&cni(layout, node));
    write(&etc.join("cni/10-lamina.conflist"), &network)?;
    write(&etc.join("containerd.toml"), &containerd(tools, &etc.join("cni")))?;
    write(&etc.join("kubelet.json"), &pretty(&kubelet(layout, node)))
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("plain values are JSON")
}

fn cni(layout: &Layout, node: NodeId) -> serde_json::Value {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "lamina",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": layout.pods_of(node) }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
                "dataDir": "/var/lib/cni/networks",
            },
        }],
    })
}

fn containerd(tools: &Tools, cni: &Path) -> String {
    let programs = tools.dir().display();
    let cni = cni.display();
    let runc = tools.path("runc");
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
# The first would make /opt/containerd on the machine; the others are not used.
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
address = "{CONTAINERD_SOCKET}"

[debug]
level = "warn"

[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{PAUSE}"

[plugins.'io.containerd.cri.v1.runtime']
# Without CAP_SYS_RESOURCE no sandbox starts otherwise ("can't get final child's PID from pipe").
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{programs}"]
conf_dir = "{cni}"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
"#
    )
}

fn kubelet(layout: &Layout, node: NodeId) -> serde_json::Value {
    let pki = layout.pki();
    let file = |name: &str| pki.join(name).display().to_string();
    serde_json::json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": file("ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": file(&format!("kubelet-{node}-server.crt")),
        "tlsPrivateKeyFile": file(&format!("kubelet-{node}-server.key")),
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", layout.name_of(Place::Node(node))),
        "failCgroupV1": false,
        "enforceNodeAllocatable": [],
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "failSwapOn": false,
        "makeIPTablesUtilChains": false,
        "evictionHard": { "memory.available": "1Mi", "nodefs.available": "1Mi", "imagefs.available": "1Mi",
                          "nodefs.inodesFree": "1", "imagefs.inodesFree": "1" },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "resolvConf": "",
        "clusterDNS": [],
        // Heard from every 2 s: the controller manager's grace period is set to match.
        "nodeLeaseDurationSeconds": 8,
        "nodeStatusUpdateFrequency": "4s",
        // How often a pod's volumes are looked at again, for one: a filesystem grows then.
        "syncFrequency": "10s",
        "registerNode": true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_lets_go_of_others_mounts_but_not_of_what_it_needs() {
        let points = ["/tmp/x/fuse", "/tmp", "/home", "/dev/shm", "/sys/fs/cgroup", "/", "/usr", "/run/user/0"];
        let points = points.map(PathBuf::from);
        let needed = [Path::new("/home/me/.cache/tools"), Path::new("/state/dir")];
        let gone = foreign(&points, &needed);
        assert_eq!(gone, ["/tmp/x/fuse", "/tmp", "/run/user/0"].map(PathBuf::from));
    }
}
