//! A whole cluster of two nodes up, used, and down again, with nothing left behind. Needs root, the programs of `build-tools.sh`
//! and Debian's package busybox-static; says by name what is missing and then counts as skipped.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lamina_cluster::host::{HostError, run, wait_until};
use lamina_cluster::{Cluster, ClusterError, NodeId, Tools};

/// What the machine has that a cluster could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Footprint {
    mounts: BTreeSet<String>,
    namespaces: String,
    interfaces: BTreeSet<String>,
    loops: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    sysctls: Vec<String>,
    places: Vec<bool>,
}

impl Footprint {
    fn take() -> Self {
        let lines = |text: String| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        // Other tests of the machine mount things too: only what a node or `ip netns` would leave counts.
        let ours = |line: &String| {
            ["lamina0", "lam0", "netns", "kubelet", "containerd", "smoke"].iter().any(|word| line.contains(word))
        };
        let sysctls = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"];
        let places = [
            "/opt/containerd",
            "/opt/cni",
            "/etc/cni",
            "/var/lib/kubelet",
            "/var/log/pods",
            "/run/containerd",
            "/run/lamina-clusters",
            "/usr/libexec/kubernetes",
        ];
        Self {
            mounts: lines(std::fs::read_to_string("/proc/mounts").unwrap()).into_iter().filter(ours).collect(),
            namespaces: run(&["ip", "netns", "list"]).unwrap(),
            interfaces: lines(run(&["ip", "-o", "link"]).unwrap()).into_iter().filter(ours).collect(),
            loops: lines(run(&["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"]).unwrap())
                .into_iter()
                .filter(|line| line.contains("smoke"))
                .collect(),
            cgroups: cgroups(),
            sysctls: sysctls.map(|name| std::fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap()).to_vec(),
            places: places.map(|path| Path::new(path).exists()).to_vec(),
        }
    }
}

/// Cgroups named after a cluster's slot, in all hierarchies.
fn cgroups() -> BTreeSet<String> {
    let tops = std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path());
    let all = tops.filter_map(|top| std::fs::read_dir(top).ok()).flatten().flatten();
    all.map(|entry| entry.path().display().to_string()).filter(|path| path.contains("/lamina")).collect()
}

/// Processes whose program lies in the tools' folder; a dead one that its parent has not yet taken note of is none.
fn daemons(tools: &Tools) -> Vec<String> {
    let folder = tools.dir().parent().unwrap().to_path_buf();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let programs = entries.filter_map(|entry| std::fs::read_link(entry.path().join("exe")).ok());
    programs.filter(|program| program.starts_with(&folder)).map(|program| program.display().to_string()).collect()
}

fn ready_to_run() -> Option<Tools> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a_cluster_comes_up_serves_pods_and_leaves_nothing (needs root)");
        return None;
    }
    match Tools::find() {
        Ok(tools) => Some(tools),
        Err(error) => {
            println!("skipped: a_cluster_comes_up_serves_pods_and_leaves_nothing ({error})");
            None
        }
    }
}

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: one}
spec:
  nodeSelector: {topology.kubernetes.io/zone: zone-1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: "lamina.dev/busybox:1", imagePullPolicy: Never, command: [httpd, -f, -p, "8080", -h, /etc]}
---
apiVersion: v1
kind: Pod
metadata: {name: two}
spec:
  nodeSelector: {topology.kubernetes.io/zone: zone-2}
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: lamina.dev/busybox:1
    imagePullPolicy: Never
    command: [sleep, "100000"]
    securityContext: {privileged: true}
    volumeMounts:
    - {name: kubelet, mountPath: /var/lib/kubelet, mountPropagation: Bidirectional}
    - {name: dev, mountPath: /dev}
  volumes:
  - {name: kubelet, hostPath: {path: /var/lib/kubelet}}
  - {name: dev, hostPath: {path: /dev}}
"#;

/// Takes the cluster down also when an assertion fails.
struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        if let Err(error) = Cluster::down(self.0, &|line| println!("{line}")) {
            println!("taking the cluster down: {error}");
        }
    }
}

#[test]
fn a_cluster_comes_up_serves_pods_and_leaves_nothing() {
    let Some(tools) = ready_to_run() else { return };
    if std::fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.split(' ').nth(2) == Some("cgroup")) {
        println!("skipped: a_cluster_comes_up_on_a_cgroup_v2_host: this machine binds its controllers to v1");
    }
    let before = Footprint::take();
    let busy_before = daemons(&tools).len();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("state");
    {
        let _down = Down(&dir);
        let cluster = Cluster::up(dir.clone(), &tools, 2, &|line| println!("{line}")).unwrap();
        assert!(daemons(&tools).len() >= busy_before + 8, "the daemons of a control plane and two nodes run");
        pods_talk_across_nodes(&cluster);
        a_cut_is_felt_and_healed(&cluster);
        a_frozen_kubelet_is_noticed(&cluster);
        a_killed_node_comes_back(&cluster);
        a_second_up_changes_nothing(&cluster, &tools);
        a_device_and_a_mount_are_left_behind(&cluster);
        everything_is_seen_by_the_look_for_leftovers(&cluster);
    }
    wait_until::<HostError>("the daemons to be gone", Duration::from_secs(5), || {
        Ok(daemons(&tools).len() <= busy_before)
    })
    .unwrap();
    assert_eq!(before, Footprint::take());
    assert!(!dir.exists(), "the state directory is gone");
}

fn pods_talk_across_nodes(cluster: &Cluster) {
    cluster.apply(PODS).unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s"]).unwrap();
    assert_eq!(node_of(cluster, "one"), "n1");
    assert_eq!(node_of(cluster, "two"), "n2");
    assert!(fetch(cluster).unwrap().contains("root:x:0:0"));
}

fn a_cut_is_felt_and_healed(cluster: &Cluster) {
    cluster.cut(&[node("n1")]).unwrap();
    assert!(fetch(cluster).is_err(), "nothing passes a cut");
    assert!(cluster.status().unwrap().contains("cut off"));
    cluster.heal(&[]).unwrap();
    fetch(cluster).unwrap();
    // Cut off together, both still reach each other, and nobody else does.
    cluster.cut(&[node("n1"), node("n2")]).unwrap();
    let layout = cluster.layout();
    let connect = |to: String| format!("</dev/tcp/{to}/10250");
    let reach = |from: &str, to: String| cluster.run_in_node(node(from), &["timeout", "2", "bash", "-c", &connect(to)]);
    let open = |to: String| TcpStream::connect_timeout(&format!("{to}:10250").parse().unwrap(), Duration::from_secs(2));
    reach("n2", layout.node_address(node("n1")).to_string()).unwrap();
    open(layout.node_address(node("n1")).to_string()).unwrap_err();
    cluster.heal(&[]).unwrap();
}

fn a_frozen_kubelet_is_noticed(cluster: &Cluster) {
    cluster.signal(node("n1"), "kubelet", "STOP").unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready=Unknown", "node/n1", "--timeout=60s"]).unwrap();
    cluster.signal(node("n1"), "kubelet", "CONT").unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready", "node/n1", "--timeout=60s"]).unwrap();
}

fn a_killed_node_comes_back(cluster: &Cluster) {
    let restarts =
        || cluster.kubectl(&["get", "pod", "two", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"]);
    assert_eq!(restarts().unwrap(), "0");
    cluster.kill_node(node("n2")).unwrap();
    assert_eq!(cluster.pids_of(node("n2")), Vec::<i32>::new());
    cluster.restart_node(node("n2"), &|line| println!("{line}")).unwrap();
    wait_until("the pod to run again", Duration::from_secs(60), || Ok::<_, ClusterError>(restarts()? == "1")).unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s"]).unwrap();
    fetch(cluster).unwrap();
}

fn a_second_up_changes_nothing(cluster: &Cluster, tools: &Tools) {
    let before = cluster.status().unwrap();
    let again = Cluster::up(cluster.dir().to_path_buf(), tools, 2, &|line| println!("{line}")).unwrap();
    let pids =
        |text: &str| text.split_whitespace().filter(|word| word.contains('=')).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(pids(&before), pids(&again.status().unwrap()));
    assert!(matches!(
        Cluster::up(cluster.dir().to_path_buf(), tools, 1, &|_| {}),
        Err(ClusterError::OtherSize { has: 2, wanted: 1, .. })
    ));
}

/// What a storage program leaves when it is killed: a mount in the kubelet's folder, and a loop device on a file there.
fn a_device_and_a_mount_are_left_behind(cluster: &Cluster) {
    let script = "mkdir -p /var/lib/kubelet/smoke && mount -t tmpfs smoke /var/lib/kubelet/smoke && \
                  dd if=/dev/zero of=/var/lib/kubelet/smoke/disk bs=1M count=1 && losetup -f /var/lib/kubelet/smoke/disk";
    cluster.kubectl(&["exec", "two", "--", "sh", "-c", script]).unwrap();
    assert!(run(&["losetup", "-l", "-n", "-O", "BACK-FILE"]).unwrap().contains("smoke/disk"));
}

/// The look that follows every removal is not blind: it names each kind of thing while the cluster is up.
fn everything_is_seen_by_the_look_for_leftovers(cluster: &Cluster) {
    let left = lamina_cluster::left::find(cluster.layout()).unwrap().join("\n");
    for kind in
        ["processes [", "the cgroup ", "the network namespace ", "the network interface ", "the process ", "files in "]
    {
        assert!(left.contains(kind), "{kind}: {left}");
    }
}

/// From the pod on n2 to the pod on n1.
fn fetch(cluster: &Cluster) -> Result<String, ClusterError> {
    let address = cluster.kubectl(&["get", "pod", "one", "-o", "jsonpath={.status.podIP}"])?;
    cluster.kubectl(&[
        "exec",
        "two",
        "--",
        "timeout",
        "3",
        "wget",
        "-q",
        "-O-",
        &format!("http://{address}:8080/passwd"),
    ])
}

fn node_of(cluster: &Cluster, pod: &str) -> String {
    cluster.kubectl(&["get", "pod", pod, "-o", "jsonpath={.spec.nodeName}"]).unwrap()
}

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

#[test]
fn help_shows_examples() {
    let output = Command::new(env!("CARGO_BIN_EXE_lamina-cluster")).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Examples:") && text.contains("lamina-cluster up --nodes 3"), "{text}");
}
