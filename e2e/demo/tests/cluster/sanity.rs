//! csi-sanity, upstream's test of CSI drivers, against the real controller and the real node plugin.

use std::collections::BTreeMap;
use std::process::Command;

use lamina_cluster::NodeId;
use lamina_cluster::process::node_namespaces;
use lamina_demo::kube::{self, NAMESPACE};
use serde_json::Value;

use crate::stage::Stage;

/// What a spec of upstream's program says when it skips itself, and why it is right to. Any other skip is a failure.
const WHY_SKIPPED: &[(&str, &str)] = &[
    ("Snapshot not supported", "snapshots are not announced yet"),
    ("Snapshots not supported", "snapshots are not announced yet"),
    ("Volume Cloning not supported", "clones are not announced yet"),
    ("GroupControllerService not supported", "groups of snapshots are not announced yet"),
    ("VolumeHealth not supported", "volume health, an alpha of CSI, is not announced"),
    ("StorageHealth not supported", "volume health, an alpha of CSI, is not announced"),
    ("odify", "VolumeAttributesClass is not announced yet"),
    ("testnodevolumeattachlimit not enabled", "it would attach 256 volumes to a node"),
];
/// The spec that upstream itself has pending.
const PENDING: &str = "upstream has it pending";

pub(crate) fn passes_whole(stage: &Stage) {
    let pods = kube::pods(&stage.cluster, NAMESPACE, "app.kubernetes.io/component=operator").unwrap();
    let pod = pods.iter().find(|pod| pod.is_ready()).expect("a ready replica: any of them answers");
    let node: NodeId = pod.spec.node_name.parse().unwrap();
    let kubelet = "/var/lib/kubelet";
    let controller =
        format!("unix://{kubelet}/pods/{}/volumes/kubernetes.io~empty-dir/socket/csi.sock", pod.metadata.uid);
    let parameters = stage.cluster.dir().join("sanity.yaml");
    std::fs::write(&parameters, "policy: demo\n").unwrap();
    let report = stage.cluster.dir().join("sanity-report.json");
    let mut words = vec!["nsenter".to_owned()];
    words.extend(node_namespaces(stage.cluster.layout(), node).unwrap());
    words.push(stage.cluster.tools().path("csi-sanity"));
    words.extend([
        format!("--csi.controllerendpoint={controller}"),
        format!("--csi.endpoint=unix://{kubelet}/plugins/csi.lamina.dev/csi.sock"),
        format!("--csi.stagingdir={kubelet}/sanity-stage"),
        format!("--csi.mountdir={kubelet}/sanity-mount"),
        format!("--csi.testvolumeparameters={}", parameters.display()),
        format!("--csi.testvolumesize={}", 64 << 20),
        format!("--csi.testvolumeexpandsize={}", 128 << 20),
        format!("--ginkgo.json-report={}", report.display()),
        "--ginkgo.no-color".to_owned(),
    ]);
    let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    judge(&report);
}

/// Enough passed, nothing failed, and whatever was skipped was so for a reason that is known; those are listed.
fn judge(report: &Value) {
    let specs: Vec<&Value> = report[0]["SpecReports"].as_array().unwrap().iter().collect();
    let specs: Vec<&&Value> = specs.iter().filter(|spec| spec["LeafNodeType"] == "It").collect();
    let in_state = |state: &str| specs.iter().filter(|spec| spec["State"] == state).count();
    let mut skipped: BTreeMap<&str, u32> = BTreeMap::new();
    for spec in specs.iter().filter(|spec| spec["State"] == "skipped" || spec["State"] == "pending") {
        let said = spec["Failure"]["Message"].as_str().unwrap_or_default();
        let known = WHY_SKIPPED.iter().find(|(part, _)| said.contains(part)).map(|(_, why)| *why);
        let pending = (spec["State"] == "pending").then_some(PENDING);
        let why = known.or(pending).unwrap_or_else(|| panic!("{} was skipped: {said}", spec["LeafNodeText"]));
        *skipped.entry(why).or_default() += 1;
    }
    for (why, count) in &skipped {
        println!("skipped: csi_sanity_passes_whole: {count} specs ({why})");
    }
    let (passed, out) = (in_state("passed"), skipped.values().sum::<u32>() as usize);
    println!("csi-sanity: {passed} passed, {out} skipped");
    assert_eq!(passed + out, specs.len(), "nothing failed");
    assert!(passed >= 50, "csi-sanity ran next to nothing: {passed}");
}
