//! `helm uninstall` and another installation over what the first one left.

use std::collections::BTreeMap;

use lamina_cluster::NodeId;
use lamina_cluster::host::run;
use lamina_demo::install;
use lamina_demo::kube::{self, NAMESPACE};
use serde_json::Value;

use crate::manifests::{claim, noise, pod, write_noise};
use crate::stage::{DEVICE, Stage};

/// What is kept, by kind and name, with its uid and what a person wished of it: the definitions, servers and policies, and
/// this volume (those of earlier cases are being deleted).
fn kept(stage: &Stage, volume: &str) -> BTreeMap<String, (String, Value)> {
    let get = |what: &[&str]| kube::get::<Value>(&stage.cluster, what).unwrap();
    let crds = ["crd/volumes.lamina.dev", "crd/storageservers.lamina.dev", "crd/replicationpolicies.lamina.dev"];
    let lists = [get(&crds), get(&["storageservers.lamina.dev,replicationpolicies.lamina.dev"])];
    let of_list = |list: &Value| list["items"].as_array().cloned().unwrap();
    let all = lists.iter().flat_map(of_list).chain([get(&["volumes.lamina.dev", volume])]);
    let one = |object: Value| {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let metadata = &object["metadata"];
        assert!(metadata["deletionTimestamp"].is_null(), "{object}");
        let spec = if object["kind"] == "CustomResourceDefinition" { Value::Null } else { object["spec"].clone() };
        (format!("{}/{}", text(&object["kind"]), text(&metadata["name"])), (text(&metadata["uid"]), spec))
    };
    all.map(one).collect()
}

/// The device file of each node: which file it is, and its size.
fn devices(stage: &Stage) -> BTreeMap<NodeId, String> {
    let of = |node: NodeId| {
        let stat = ["stat", "-c", "%i %s", "/var/lib/lamina/devices/a.img"];
        (node, stage.cluster.run_in_node(node, &stat).unwrap())
    };
    NodeId::first(3).map(of).collect()
}

fn helm(stage: &Stage, words: &str) -> String {
    let config = format!("--kubeconfig={}", stage.cluster.kubeconfig().display());
    let helm = stage.cluster.tools().path("helm");
    let words: Vec<&str> = [helm.as_str()].into_iter().chain(words.split(' ')).chain([config.as_str()]).collect();
    run(&words).unwrap()
}

pub(crate) fn keeps_data(stage: &Stage) {
    let text = claim("kept", "64Mi", "Filesystem", "lamina-demo") + &pod("kept", "kept", false, "n1");
    stage.cluster.apply(&text).unwrap();
    stage.await_pod("kept", "");
    let sum = write_noise(stage, "kept");
    let volume = kube::volume_of_claim(&stage.cluster, "kept").unwrap();
    stage.kubectl("delete pod kept --now --wait=true");
    stage.await_that("the detachment", 60, || stage.kubectl("get volumeattachments -o name").is_empty());
    let name = &volume.metadata.name;
    let before = (kept(stage, name), devices(stage));
    assert!(before.0.len() >= 8, "definitions, servers, a policy, a volume: {:?}", before.0.keys());
    let notes = helm(stage, &format!("get notes lamina -n {NAMESPACE}"));
    for kind in ["volumes", "storageservers", "crd volumes.lamina.dev"] {
        assert!(notes.contains(&format!("kubectl delete {kind}")), "how to remove {kind}: {notes}");
    }

    helm(stage, &format!("uninstall lamina -n {NAMESPACE} --wait --timeout=120s"));
    let programs = format!("-n {NAMESPACE} get pods,daemonsets,deployments -o name");
    stage.await_that("every program to be gone", 120, || stage.kubectl(&programs).is_empty());
    assert!(stage.cluster.kubectl(&["get", "csidriver", "csi.lamina.dev"]).is_err(), "the programs' own objects went");
    assert_eq!((kept(stage, name), devices(stage)), before, "what stands for data stays as it was");

    install::chart(&stage.cluster, DEVICE).unwrap();
    stage.calm();
    stage.cluster.apply(&pod("kept", "kept", false, "n3")).unwrap();
    assert_eq!(stage.await_pod("kept", "").spec.node_name, "n3");
    assert_eq!(noise(stage, "kept"), sum, "every byte is there");
    let again = kube::volume_of_claim(&stage.cluster, "kept").unwrap();
    assert_eq!((&again.metadata.name, &again.status.volume_id), (name, &volume.status.volume_id));
    assert!(again.status.generation > volume.status.generation, "{}", again.in_short());
    assert_eq!(devices(stage), before.1);
}
