//! The chart put into the cluster, and the storage servers waited for.

use std::time::Duration;

use lamina_cluster::Cluster;
use lamina_cluster::host::{run, wait_until, write};

use crate::images::{SIDECARS, source_tree};
use crate::kube::{KubeError, NAMESPACE, servers};

/// The chart's values for a cluster of this machine: a file device on each node, and images by the names they were
/// built under.
///
/// # Errors
/// As [`nodes`].
pub fn values(cluster: &Cluster, device_size: &str) -> Result<String, KubeError> {
    let sidecars =
        SIDECARS.map(|(program, image)| format!("  {}: {image}\n", program.trim_start_matches("csi-"))).concat();
    let device = format!("[{{path: /var/lib/lamina/devices/a.img, size: {device_size}}}]");
    let devices: String = nodes(cluster)?.iter().map(|node| format!("  {node}: {device}\n")).collect();
    Ok(format!("sidecars:\n{sidecars}devices:\n{devices}policies: []\nstorageClass: {{create: false}}\n"))
}

/// The nodes that run pods, by name.
///
/// # Errors
/// kubectl fails.
pub fn nodes(cluster: &Cluster) -> Result<Vec<String>, KubeError> {
    let workers = "!node-role.kubernetes.io/control-plane";
    let names = cluster.kubectl(&["get", "nodes", "-l", workers, "-o", "jsonpath={.items[*].metadata.name}"])?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

/// `helm upgrade --install` of the chart in the source tree.
///
/// # Errors
/// kubectl or helm fails.
pub fn chart(cluster: &Cluster, device_size: &str) -> Result<(), KubeError> {
    let file = cluster.dir().join("values.yaml");
    write(&file, &values(cluster, device_size)?)?;
    let chart = source_tree().join("charts/lamina");
    let (chart, file) = (chart.display().to_string(), file.display().to_string());
    let config = format!("--kubeconfig={}", cluster.kubeconfig().display());
    let words = ["upgrade", "--install", "lamina", &chart, "-n", NAMESPACE, "--create-namespace", "-f", &file, &config];
    let helm = cluster.tools().path("helm");
    run(&[[helm.as_str()].as_slice(), &words].concat())?;
    Ok(())
}

/// Waits until every node has a storage server that is Ready; tells every five seconds how they are.
///
/// # Errors
/// They are not in time.
pub fn await_servers(cluster: &Cluster, limit: Duration, tell: &dyn Fn(&str)) -> Result<(), KubeError> {
    let wanted = nodes(cluster)?.len();
    let mut told = std::time::Instant::now();
    wait_until("all storage servers to be Ready", limit, || {
        let all = servers(cluster)?;
        let ready = all.iter().filter(|server| server.status.state == "Ready").count();
        if told.elapsed() > Duration::from_secs(5) {
            told = std::time::Instant::now();
            tell(&format!("{ready} of {wanted} storage servers are Ready"));
        }
        Ok::<_, KubeError>(ready == wanted)
    })
}

/// Waits until every program of the chart runs in its newest version and its probes pass.
///
/// # Errors
/// One does not in time.
pub fn await_rollout(cluster: &Cluster) -> Result<(), KubeError> {
    let all = ["deployment/lamina-operator", "daemonset/lamina-storage-node", "daemonset/lamina-csi-node"];
    for one in all {
        cluster.kubectl(&["-n", NAMESPACE, "rollout", "status", one, "--timeout=120s"])?;
    }
    Ok(())
}
