//! Volumes in pods: filesystems, raw blocks, moves, growth, deletion.

use std::time::{Duration, Instant};

use lamina_demo::kube;
use serde_json::Value;

use crate::manifests::{claim, class, noise, pod, write_noise};
use crate::stage::Stage;

pub(crate) fn claim_waits(stage: &Stage) {
    stage.cluster.apply(&claim("waits", "64Mi", "Filesystem", "lamina-demo")).unwrap();
    let reason = "-o jsonpath={.items[*].reason} get events --field-selector involvedObject.name=waits";
    stage.await_that("the word that the claim waits", 30, || stage.kubectl(reason).contains("WaitForFirstConsumer"));
    assert_eq!(stage.kubectl("get pvc waits -o jsonpath={.status.phase}"), "Pending");
    stage.cluster.apply(&pod("waits", "waits", false, "n2")).unwrap();
    let placed = stage.await_pod("waits", "");
    assert_eq!(placed.spec.node_name, "n2");
    assert_eq!(stage.kubectl("get pvc waits -o jsonpath={.status.phase}"), "Bound");
    // Locality: one copy of each group lies on the consumer's node.
    let volume = kube::volume_of_claim(&stage.cluster, "waits").unwrap();
    let near = kube::servers(&stage.cluster).unwrap().into_iter().find(|server| server.metadata.name == "n2").unwrap();
    assert!(
        volume.members_on(&near.status.server_id).count() >= 1,
        "a copy lies near its consumer: {}",
        volume.in_short()
    );
}

const ON_N3: &str = "apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: lamina-n3}
provisioner: csi.lamina.dev
volumeBindingMode: Immediate
allowedTopologies:
- matchLabelExpressions: [{key: topology.lamina.dev/node, values: [n3]}]
parameters: {policy: demo}
";

pub(crate) fn allowed_topologies(stage: &Stage) {
    stage.cluster.apply(ON_N3).unwrap();
    stage.cluster.apply(&claim("there", "64Mi", "Filesystem", "lamina-n3")).unwrap();
    // No pod yet: the class alone says where.
    stage.await_that("the claim to be bound", 60, || {
        stage.kubectl("get pvc there -o jsonpath={.status.phase}") == "Bound"
    });
    let volume = kube::volume_of_claim(&stage.cluster, "there").unwrap();
    let near = kube::servers(&stage.cluster).unwrap().into_iter().find(|server| server.metadata.name == "n3").unwrap();
    let map = volume.status.map.as_ref().unwrap();
    for group in map.placements.iter().flat_map(|placement| &placement.groups) {
        assert_eq!(group.members[0].server, near.status.server_id, "the first copy lies there: {}", volume.in_short());
    }
    // Every node can attach it all the same.
    stage.cluster.apply(&pod("there", "there", false, "n1")).unwrap();
    assert_eq!(stage.await_pod("there", "").spec.node_name, "n1");
}

pub(crate) fn ext4(stage: &Stage) {
    filesystem(stage, "lamina-demo", "ext4", "64Mi");
}

fn filesystem(stage: &Stage, class: &str, kind: &str, size: &str) {
    stage.cluster.apply(&(claim("files", size, "Filesystem", class) + &pod("files", "files", false, ""))).unwrap();
    stage.await_pod("files", "");
    let mounts = stage.sh("files", "grep ' /data ' /proc/mounts").unwrap();
    assert!(mounts.contains(&format!(" {kind} rw")), "{mounts}");
    let sum = write_noise(stage, "files");
    assert_eq!(noise(stage, "files"), sum);
}

pub(crate) fn xfs_grows(stage: &Stage) {
    class(stage, "lamina-xfs", "xfs");
    filesystem(stage, "lamina-xfs", "xfs", "320Mi");
    let sum = noise(stage, "files");
    let size = || mebibytes(stage, "files");
    assert!(size() < 330, "{} MiB", size());
    let patch = r#"{"spec":{"resources":{"requests":{"storage":"512Mi"}}}}"#;
    stage.cluster.kubectl(&["patch", "pvc", "files", "--type=merge", "-p", patch]).unwrap();
    stage.await_that("the filesystem to be larger", 120, || size() > 400);
    assert_eq!(noise(stage, "files"), sum, "what was there stays");
    println!("skipped: a_pod_grows_ext4_online (needs CAP_SYS_RESOURCE, which this machine's root lacks)");
}

fn mebibytes(stage: &Stage, pod: &str) -> u64 {
    stage.sh(pod, "df -m /data | awk 'NR == 2 { print $2 }'").unwrap().trim().parse().unwrap()
}

pub(crate) fn ext4_grows_at_the_next_stage(stage: &Stage) {
    stage
        .cluster
        .apply(&(claim("grows", "64Mi", "Filesystem", "lamina-demo") + &pod("grows", "grows", false, "")))
        .unwrap();
    stage.await_pod("grows", "");
    let sum = write_noise(stage, "grows");
    assert!(mebibytes(stage, "grows") < 70);
    let patch = r#"{"spec":{"resources":{"requests":{"storage":"160Mi"}}}}"#;
    stage.cluster.kubectl(&["patch", "pvc", "grows", "--type=merge", "-p", patch]).unwrap();
    stage.await_that("the volume to be larger", 60, || {
        stage.kubectl("get pv -o jsonpath={.items[?(@.spec.claimRef.name=='grows')].spec.capacity.storage}") == "160Mi"
    });
    assert_eq!(noise(stage, "grows"), sum, "the pod goes on with what it has");
    stage.kubectl("delete pod grows --now --wait=true");
    stage.cluster.apply(&pod("grows", "grows", false, "")).unwrap();
    stage.await_pod("grows", "");
    assert!(mebibytes(stage, "grows") > 120, "{} MiB", mebibytes(stage, "grows"));
    assert_eq!(noise(stage, "grows"), sum, "what was there stays");
}

pub(crate) fn block(stage: &Stage) {
    let text = claim("raw", "64Mi", "Block", "lamina-demo") + &pod("raw", "raw", true, "");
    stage.cluster.apply(&text).unwrap();
    stage.await_pod("raw", "");
    let script = "dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null && \
                  dd if=/tmp/x of=/dev/data bs=1M conv=fsync 2>/dev/null && \
                  dd if=/dev/data bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/x && echo same";
    assert_eq!(stage.sh("raw", script).unwrap().trim(), "same");
    let size: u64 = stage.sh("raw", "blockdev --getsize64 /dev/data").unwrap().trim().parse().unwrap();
    assert_eq!(size, 64 << 20);
}

pub(crate) fn moves(stage: &Stage) {
    let text = claim("moves", "64Mi", "Filesystem", "lamina-demo") + &pod("moves", "moves", false, "n1");
    stage.cluster.apply(&text).unwrap();
    stage.await_pod("moves", "");
    let sum = write_noise(stage, "moves");
    let before = kube::volume_of_claim(&stage.cluster, "moves").unwrap().status.generation;
    stage.kubectl("delete pod moves --now --wait=true");
    stage.cluster.apply(&pod("moves", "moves", false, "n3")).unwrap();
    assert_eq!(stage.await_pod("moves", "").spec.node_name, "n3");
    assert_eq!(noise(stage, "moves"), sum);
    let after = kube::volume_of_claim(&stage.cluster, "moves").unwrap().status.generation;
    assert!(after > before, "another session is another generation: {before} then {after}");
}

const BY_HAND: &str = "apiVersion: lamina.dev/v1alpha1
kind: Volume
metadata: {name: by-hand, annotations: {lamina.dev/persistent-volume: \"true\"}}
spec: {size: 64Mi, policy: demo}
";

pub(crate) fn by_hand(stage: &Stage) {
    stage.cluster.apply(BY_HAND).unwrap();
    let mut name = String::new();
    stage.await_that("the PersistentVolume", 60, || {
        let all: Value = kube::get(&stage.cluster, &["pv"]).unwrap();
        let volume = kube::volume(&stage.cluster, "by-hand").unwrap();
        let handle = |pv: &&Value| pv["spec"]["csi"]["volumeHandle"] == Value::String(volume.status.volume_id.clone());
        let found = all["items"].as_array().unwrap().iter().find(handle);
        name = found.and_then(|pv| pv["metadata"]["name"].as_str()).unwrap_or_default().to_owned();
        !name.is_empty()
    });
    let text = claim("by-hand", "64Mi", "Filesystem", "\"\"") + &pod("by-hand", "by-hand", false, "");
    let text = text.replace("  volumeMode:", &format!("  volumeName: {name}\n  volumeMode:"));
    stage.cluster.apply(&text).unwrap();
    stage.await_pod("by-hand", "");
    let sum = write_noise(stage, "by-hand");
    assert_eq!(noise(stage, "by-hand"), sum);
}

pub(crate) fn deletion(stage: &Stage) {
    let text = claim("gone", "64Mi", "Filesystem", "lamina-demo") + &pod("gone", "gone", false, "");
    stage.cluster.apply(&text).unwrap();
    stage.await_pod("gone", "");
    write_noise(stage, "gone");
    let name = kube::volume_of_claim(&stage.cluster, "gone").unwrap().metadata.name;
    stage.kubectl(&format!("delete volume {name} --wait=false"));
    let start = Instant::now();
    stage.await_that("a while", 20, || start.elapsed() > Duration::from_secs(5));
    let held: Value = kube::get(&stage.cluster, &["volume", &name]).unwrap();
    assert!(held["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty()), "{held}");
    stage.sh("gone", "echo still > /data/there && sync && cat /data/there").unwrap();
    stage.kubectl("delete pod gone --now --wait=true");
    stage.kubectl("delete pvc gone --wait=false");
    stage.await_that("the Volume to be gone", 90, || {
        stage.cluster.kubectl(&["get", "volume", &name, "--ignore-not-found", "-o", "name"]).unwrap().is_empty()
    });
}
