//! Programs of Lamina killed, replaced or away while volumes are used.

use std::time::{Duration, Instant};

use lamina_cluster::NodeId;
use lamina_demo::images::{self, LAMINA};
use lamina_demo::kube::{self, NAMESPACE};
use lamina_demo::objects::Volume;
use serde_json::Value;

use crate::faults::{StoppedKubelet, daemon, node_without_operator};
use crate::load::Load;
use crate::manifests::{claim, noise, pod, write_noise};
use crate::stage::Stage;

/// The same programs under another tag, as after an upgrade.
const NEXT: &str = "lamina.dev/lamina:0.1.0-next";
const NODE_PLUGIN: &str = "daemonset/lamina-csi-node";

/// Puts another image into the node plugin. Nothing is replaced until a pod is deleted (`OnDelete`); `RollingUpdate` has
/// the old ones replaced.
fn set_image(stage: &Stage, image: &str, strategy: &str) {
    let rolling = if strategy == "RollingUpdate" { r#","rollingUpdate":{"maxUnavailable":1}"# } else { "" };
    let patch = format!(
        r#"{{"spec":{{"updateStrategy":{{"type":"{strategy}"{rolling}}},"template":{{"spec":{{"containers":[{{"name":"csi-node","image":"{image}"}}]}}}}}}}}"#
    );
    let rolling = if strategy == "OnDelete" { r#"{"spec":{"updateStrategy":{"rollingUpdate":null}}}"# } else { "{}" };
    stage.cluster.kubectl(&["-n", NAMESPACE, "patch", NODE_PLUGIN, "-p", rolling]).unwrap();
    stage.cluster.kubectl(&["-n", NAMESPACE, "patch", NODE_PLUGIN, "-p", &patch]).unwrap();
}

pub(crate) fn plugin_killed_and_replaced(stage: &Stage) {
    stage.import(&images::lamina(NEXT));
    let load = Load::start(stage, "plugin", "n2");
    let old = daemon(stage, "csi-node", "n2").unwrap();
    let killed = stage.cluster.signal_pod(NAMESPACE, &old.metadata.name, "KILL").unwrap();
    assert!(killed >= 1, "the node plugin had a process");
    stage.await_that("the node plugin to be back", 90, || {
        daemon(stage, "csi-node", "n2")
            .is_some_and(|pod| pod.is_ready() && pod.status.container_statuses[0].restart_count > 0)
    });
    load.await_rounds(2);
    // Another image, and the pod taken away by force, as when a node is out of hand.
    set_image(stage, NEXT, "OnDelete");
    stage.kubectl(&format!("-n lamina delete pod {} --force --grace-period=0", old.metadata.name));
    stage.await_that("another pod of the node plugin", 90, || {
        daemon(stage, "csi-node", "n2").is_some_and(|pod| pod.is_ready() && pod.metadata.uid != old.metadata.uid)
    });
    let new = daemon(stage, "csi-node", "n2").unwrap().metadata.name;
    let image = stage.kubectl(&format!("-n lamina get pod {new} -o jsonpath={{.spec.containers[0].image}}"));
    assert_eq!(image, NEXT);
    load.await_rounds(2);
    // Back to the first image the gentle way.
    set_image(stage, LAMINA, "RollingUpdate");
    stage.kubectl("-n lamina rollout status daemonset/lamina-csi-node --timeout=120s");
    load.await_rounds(2);
    load.end();
}

/// protocol.md R10: the kernel's side of the device is gone, so the leader replaces the session.
pub(crate) fn node_rebooted(stage: &Stage) {
    let node = node_without_operator(stage);
    let place = node.to_string();
    let text = claim("boots", "64Mi", "Filesystem", "lamina-demo") + &pod("boots", "boots", false, &place);
    stage.cluster.apply(&text).unwrap();
    let before = stage.await_pod("boots", "");
    let sum = write_noise(stage, "boots");
    stage.cluster.kill_node(node).unwrap();
    stage.cluster.restart_node(node, &|line| println!("{line}")).unwrap();
    let mut now = None;
    stage.await_that("the pod to run again", 180, || {
        let pod = kube::pod(&stage.cluster, "default", "boots").unwrap();
        let again = pod.is_ready() && pod.status.container_statuses[0].restart_count > 0;
        now = again.then_some(pod);
        again
    });
    assert_eq!(now.map(|pod| pod.metadata.uid), Some(before.metadata.uid), "nobody deleted the pod");
    assert_eq!(noise(stage, "boots"), sum);
    stage.sh("boots", "echo again > /data/again && sync && cat /data/again").unwrap();
    stage.calm();
}

/// As [`node_rebooted`], for a pod that comes to the same node anew.
pub(crate) fn holder_lost(stage: &Stage) {
    let node = node_without_operator(stage).to_string();
    let text = claim("lost", "64Mi", "Filesystem", "lamina-demo") + &pod("lost", "lost", false, &node);
    stage.cluster.apply(&text).unwrap();
    let before = stage.await_pod("lost", "");
    let sum = write_noise(stage, "lost");
    for component in ["device-holder", "csi-node"] {
        let program = daemon(stage, component, &node).unwrap().metadata.name;
        assert!(stage.cluster.signal_pod(NAMESPACE, &program, "KILL").unwrap() >= 1);
    }
    stage.await_that("the dead device to fail", 60, || {
        stage.sh("lost", "dd if=/dev/zero of=/data/x bs=4k count=1 conv=fsync").is_err()
    });
    stage.kubectl("delete pod lost --now --wait=true --timeout=90s");
    stage.cluster.apply(&pod("lost", "lost", false, &node)).unwrap();
    stage.await_pod("lost", &before.metadata.uid);
    assert_eq!(noise(stage, "lost"), sum);
    stage.calm();
}

fn leader(stage: &Stage) -> String {
    stage.kubectl("-n lamina get lease lamina-operator -o jsonpath={.spec.holderIdentity}")
}

/// The pod that a holder's identity names.
fn pod_of(stage: &Stage, holder: &str) -> String {
    let all = kube::pods(&stage.cluster, NAMESPACE, "app.kubernetes.io/component=operator").unwrap();
    let found = all.into_iter().find(|pod| holder.contains(&pod.metadata.name));
    found.unwrap_or_else(|| panic!("no pod is called as {holder} says")).metadata.name
}

pub(crate) fn leader_killed(stage: &Stage) {
    let load = Load::start(stage, "leader", "n2");
    let volume = kube::volume_of_claim(&stage.cluster, "leader").unwrap();
    let victim = server_of(stage, &volume, &["n2"]);
    let old = leader(stage);
    assert!(stage.cluster.signal_pod(NAMESPACE, &pod_of(stage, &old), "KILL").unwrap() >= 1);
    // Nobody leads now, and a copy goes away.
    let server = daemon(stage, "storage-node", &victim.to_string()).unwrap();
    assert!(stage.cluster.signal_pod(NAMESPACE, &server.metadata.name, "KILL").unwrap() >= 1);
    stage.await_that("another leader", 60, || {
        let now = leader(stage);
        !now.is_empty() && now != old
    });
    let old = volume.status.generation;
    let limit = Duration::from_secs(150);
    let healed = |volume: &Volume| volume.status.generation > old && volume.is_healthy();
    kube::await_volume(&stage.cluster, &volume.metadata.name, "to be healed by it", limit, healed).unwrap();
    load.await_rounds(2);
    load.end();
}

/// A node with an Active copy of the volume, none of `but`.
fn server_of(stage: &Stage, volume: &Volume, but: &[&str]) -> NodeId {
    let servers = kube::servers(&stage.cluster).unwrap();
    let holds = |id: &str| volume.members_on(id).any(|(_, member)| member.state == "Active");
    let found = servers.iter().find(|one| !but.contains(&one.metadata.name.as_str()) && holds(&one.status.server_id));
    found.expect("copies on two servers").metadata.name.parse().unwrap()
}

pub(crate) fn deletion_with_a_server_away(stage: &Stage) {
    let text = claim("away", "64Mi", "Filesystem", "lamina-demo") + &pod("away", "away", false, "n1");
    stage.cluster.apply(&text).unwrap();
    stage.await_pod("away", "");
    write_noise(stage, "away");
    let volume = kube::volume_of_claim(&stage.cluster, "away").unwrap();
    let name = volume.metadata.name.as_str();
    stage.kubectl("delete pod away --now --wait=true");
    stage.await_that("the detachment", 60, || stage.kubectl("get volumeattachments -o name").is_empty());
    let gone = server_of(stage, &volume, &[]);
    let kubelet = StoppedKubelet::new(stage, gone);
    let server = daemon(stage, "storage-node", &gone.to_string()).unwrap();
    assert!(stage.cluster.signal_pod(NAMESPACE, &server.metadata.name, "KILL").unwrap() >= 1);
    stage.kubectl("delete pvc away --wait=false");
    let object = || -> Option<Value> { kube::get(&stage.cluster, &["volume", name]).ok() };
    let says = |object: &Value, part: &str| {
        let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let of_deletion = |one: &&Value| one["type"] == "Deleting" && one["status"] == "True";
        all.iter().find(of_deletion).is_some_and(|one| one["message"].as_str().is_some_and(|text| text.contains(part)))
    };
    stage.await_that("the Volume to say whom it waits for", 60, || {
        object().is_some_and(|object| says(&object, "does not answer"))
    });
    // It stays so: no copy is forgotten because its server is away.
    let start = Instant::now();
    stage.await_that("a while", 20, || start.elapsed() > Duration::from_secs(5));
    let held = object().expect("a Volume with a copy on a server that is away is still there");
    assert!(!held["metadata"]["deletionTimestamp"].is_null(), "{held}");
    assert!(held["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty()), "{held}");
    drop(kubelet);
    stage.await_that("the Volume to go once its server is back", 120, || {
        stage.cluster.kubectl(&["get", "volume", name, "--ignore-not-found", "-o", "name"]).unwrap().is_empty()
    });
}
