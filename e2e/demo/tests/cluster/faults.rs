//! Things that go wrong on one node, done to it and undone on every way out.

use lamina_cluster::process::{send, signal_number};
use lamina_cluster::{Cluster, NodeId};
use lamina_demo::kube::{self, NAMESPACE};
use lamina_demo::objects::Pod;

use crate::stage::Stage;

/// The pod of one of Lamina's DaemonSets on a node.
pub(crate) fn daemon(stage: &Stage, component: &str, node: &str) -> Option<Pod> {
    let label = format!("app.kubernetes.io/component={component}");
    let all = kube::pods(&stage.cluster, NAMESPACE, &label).unwrap();
    all.into_iter().find(|pod| pod.spec.node_name == node && pod.metadata.deletion_timestamp.is_none())
}

/// A node where no replica of the operator runs: what is done to it is done to a consumer alone.
pub(crate) fn node_without_operator(stage: &Stage) -> NodeId {
    let operators = kube::pods(&stage.cluster, NAMESPACE, "app.kubernetes.io/component=operator").unwrap();
    let free = |node: &NodeId| operators.iter().all(|pod| pod.spec.node_name != node.to_string());
    stage.cluster.layout().node_ids().find(free).expect("two replicas on three nodes")
}

/// Processes that are stopped; they go on when this is dropped.
pub(crate) struct Stopped(Vec<i32>);

impl Stopped {
    pub(crate) fn new(pids: Vec<i32>) -> Self {
        assert!(!pids.is_empty(), "there is something to stop");
        signal(&pids, "STOP");
        Self(pids)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(&self.0, "CONT");
    }
}

fn signal(pids: &[i32], name: &str) {
    let number = signal_number(name).unwrap();
    pids.iter().for_each(|pid| send(name, *pid, number).unwrap());
}

/// A stopped kubelet; it goes on when this is dropped.
pub(crate) struct StoppedKubelet<'a>(&'a Cluster, NodeId);

impl<'a> StoppedKubelet<'a> {
    pub(crate) fn new(stage: &'a Stage, node: NodeId) -> Self {
        stage.cluster.signal(node, "kubelet", "STOP").unwrap();
        Self(&stage.cluster, node)
    }
}

impl Drop for StoppedKubelet<'_> {
    fn drop(&mut self) {
        report(self.0.signal(self.1, "kubelet", "CONT"));
    }
}

/// A node that is cut off; it is joined again when this is dropped.
pub(crate) struct Cut<'a>(&'a Cluster, NodeId);

impl<'a> Cut<'a> {
    pub(crate) fn new(stage: &'a Stage, node: NodeId) -> Self {
        stage.cluster.cut(&[node]).unwrap();
        Self(&stage.cluster, node)
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        report(self.0.heal(&[self.1]));
    }
}

/// A node that people declared to be out of service; the taint goes when this is dropped.
pub(crate) struct OutOfService<'a>(&'a Cluster, NodeId);

const TAINT: &str = "node.kubernetes.io/out-of-service";

impl<'a> OutOfService<'a> {
    pub(crate) fn new(stage: &'a Stage, node: NodeId) -> Self {
        stage.kubectl(&format!("taint node {node} {TAINT}=nodeshutdown:NoExecute"));
        Self(&stage.cluster, node)
    }
}

impl Drop for OutOfService<'_> {
    fn drop(&mut self) {
        report(self.0.kubectl(&["taint", "node", &self.1.to_string(), &format!("{TAINT}-")]));
    }
}

fn report<T, E: std::fmt::Display>(result: Result<T, E>) {
    if let Err(error) = result {
        println!("undoing a fault: {error}");
    }
}
